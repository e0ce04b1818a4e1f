"""Requests that a streaming handler answers: one step at a time, between the batches of all others.

A step is one item of a handler's generator. Streams take turns; a step whose part cannot leave yet is not taken, so
that a daemon which is behind, or asked for a pause, holds the generator and no memory grows.

Promises: a stream ends in exactly one ``result`` or ``error``, and nothing follows it; its generator is closed then, so
its ``finally`` has run; a deadline is looked at before each step; at most ``streams_max`` generators are at work, the
others wait by priority. A request that did not ask for parts gets them joined; the daemon hears meanwhile that the
worker is alive. Streams of direct lanes come whole: they are joined too.
Leaves out: which requests are streams (``requests.py``), and when steps are taken (``main.py``).
"""

from __future__ import annotations

import time
from bisect import insort
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Final

from agent import log
from agent.errors import (
    AgentError,
    CanceledError,
    DeadlineError,
    HandlerError,
    OverloadedError,
    TooLargeError,
)
from agent.tensors import Array
from agent.wire import PART_BYTES_MAX
from agent.worker.lines import Line
from agent.worker.requests import RawForm, Request, blamed, checked, into_window
from agent.worker.signature import Signature
from handlers.base import Handler, Prepared, StreamingHandler

_log = log.get_logger("worker.streams")
_JOINED_BYTES_MAX: Final = 64 * 1024 * 1024  # of items kept for a caller that did not ask for parts
_ALIVE_S: Final = 1.0  # between two words to a daemon that gets no parts
_ITEM_BYTES: Final = 64  # the least that one of them counts
_STREAMS_MAX: Final = 256  # open and waiting; the daemon hands over fewer
_HELD_BYTES_MAX: Final = 128 * 1024 * 1024  # of their bodies
_END: Final = object()


class Stream:
    """One request on its way through a handler's ``stream``."""

    __slots__ = ("items", "kept", "kept_bytes", "line", "number", "paused", "request", "told_at")

    def __init__(self, request: Request) -> None:
        self.request = request
        self.line: Line = request.line
        self.items: Iterator[Any] | None = None  # the open generator
        self.number = 0  # of the next part
        self.paused = False  # by the daemon
        self.kept: list[Any] | None = None if request.header.get("stream") else []  # what will be joined
        self.kept_bytes = 0
        self.told_at = request.arrived  # when the daemon was told that this one is worked on (seconds)

    @property
    def ready(self) -> bool:
        """Whether a step may be taken: the last one's part has left, and the daemon has not asked for a pause.

        While a frame is half here such a wish may lie behind it.
        """
        channel = self.line.channel
        return not self.paused and not channel.pending and not (self.kept is None and channel.filling)


class Streams:
    """All streams of one worker."""

    def __init__(
        self, handler: Handler | None, signature: Signature, run: Callable[[Mapping[str, Array]], Mapping[str, Array]]
    ) -> None:
        self._handler = handler if isinstance(handler, StreamingHandler) else None
        self._signature = signature
        self._run = run
        self._open: deque[Stream] = deque()  # whose turn it is comes first
        self._waiting: list[Stream] = []  # by level, then arrival
        self._held_bytes = 0  # bodies of all
        self.count = 0  # of all

    @property
    def ready(self) -> bool:
        """Whether ``step`` would do anything."""
        return any(stream.ready for stream in self._open) or self._may_open()

    def add(self, request: Request) -> None:
        """Queue a request whose answer a handler's stream gives.

        Raises:
            OverloadedError: too many are here.
        """
        if self.count >= _STREAMS_MAX or self._held_bytes > _HELD_BYTES_MAX:
            raise OverloadedError("too many streams are under way; try again later")
        self.count += 1
        self._held_bytes += len(request.body)
        insort(self._waiting, Stream(request), key=lambda stream: stream.request.level)

    def cancel(self, request_id: int, line: Line) -> bool:
        """End a stream whose answer nobody waits for; ``False`` if it is not here."""
        stream = self._find(request_id, line)
        if stream is not None:
            self._fail(stream, CanceledError("withdrawn while it was answered"))
        return stream is not None

    def pace(self, request_id: int, line: Line, *, paused: bool) -> None:
        """Hold a stream, or let it go on; one that has ended is no fault, the frames crossed."""
        stream = self._find(request_id, line)
        if stream is not None:
            stream.paused = paused

    def step(self) -> Line | None:
        """Take one item of the stream whose turn it is; return the line that has something to send now."""
        while self._may_open():
            self._open.append(self._waiting.pop(0))
        for _ in range(len(self._open)):
            stream = self._open[0]
            self._open.rotate(-1)
            if stream.ready:
                self._step(stream)
                return stream.line
        return None

    def expire(self, now: float) -> list[Line]:
        """End the streams whose deadline has passed, without waiting for their next step; return their lines."""
        late = [stream for stream in (*self._open, *self._waiting) if stream.request.deadline <= now]
        for stream in late:
            self._fail(stream, DeadlineError("the deadline passed while the answer waited in the worker"))
        return [stream.line for stream in late]

    def end(self, line: Line, error: AgentError) -> None:
        """End all streams of ``line`` with ``error``."""
        for stream in (*self._open, *self._waiting):
            if stream.line is line:
                self._fail(stream, error)

    def _may_open(self) -> bool:
        """Whether another generator may begin; a paused one leaves its place, or slow callers would keep others out."""
        if not self._waiting or self._handler is None:
            return False
        return sum(not stream.paused for stream in self._open) < self._handler.streams_max

    def _find(self, request_id: int, line: Line) -> Stream | None:
        for stream in (*self._open, *self._waiting):
            if stream.request.id == request_id and stream.line is line:
                return stream
        return None

    def _step(self, stream: Stream) -> None:
        request, handler = stream.request, self._handler
        assert handler is not None
        try:
            if request.deadline <= time.monotonic():
                raise DeadlineError("the deadline passed between two parts of the answer")
            if stream.items is None:
                stream.items = self._begin(request, handler)
            try:
                item = next(stream.items, _END)
            except BaseException as error:  # foreign code: anything may come out of it
                raise blamed(handler, "stream", error) from error
            if item is _END:
                self._finish(stream)
            elif stream.kept is None:
                self._send(stream, item)
            else:
                self._keep(stream, stream.kept, item)
        except AgentError as error:
            self._fail(stream, error)
        except Exception as error:  # noqa: BLE001  a request may fail, the worker may not
            self._fail(stream, blamed(handler, "stream", error))

    def _begin(self, request: Request, handler: StreamingHandler) -> Iterator[Any]:
        request.prepare(self._signature)
        state = request.state.state if isinstance(request.state, Prepared) else None
        try:
            return iter(handler.stream(request.arrays(), request.rows, self._model, state))
        except BaseException as error:  # as above
            raise blamed(handler, "stream", error) from error

    def _model(self, given: Mapping[str, Array]) -> Mapping[str, Array]:
        """Run the model for a handler, whose inputs are checked like everybody's."""
        inputs, _ = checked(self._signature, given)
        return self._run(inputs)

    def _send(self, stream: Stream, item: Any) -> None:
        request = stream.request
        fields, body = request.form.part(request, item)
        size = sum(map(len, body))
        if size > PART_BYTES_MAX:
            raise HandlerError(f"a part of {size} bytes; the limit is {PART_BYTES_MAX}: yield smaller ones")
        stream.line.channel.post({"kind": "part", "id": request.id, "seq": stream.number, **fields}, body)
        stream.number += 1

    def _keep(self, stream: Stream, kept: list[Any], item: Any) -> None:
        request = stream.request
        assert isinstance(request.form, RawForm)
        made = request.form.made_of(request, item)
        _, body = request.form.pack(request, made, part=True)
        stream.kept_bytes += max(_ITEM_BYTES, sum(map(len, body)))
        if stream.kept_bytes > _JOINED_BYTES_MAX:
            raise TooLargeError(f"the whole answer is above {_JOINED_BYTES_MAX} bytes: ask for it in parts")
        kept.append(made)
        now = time.monotonic()
        if now - stream.told_at > _ALIVE_S:
            stream.told_at = now
            stream.line.post_alive(request.id)

    def _finish(self, stream: Stream) -> None:
        request = stream.request
        fields: dict[str, Any] = {}
        body: Any = ()
        if stream.kept is not None:
            assert isinstance(request.form, RawForm)
            fields, body = request.form.joined(request, stream.kept)
            if request.window is not None:
                body = into_window(request.window, fields, body)
        self._close(stream)
        stream.line.post_result(request.id, fields, body)
        self._drop(stream, "ok")

    def _fail(self, stream: Stream, error: AgentError) -> None:
        self._close(stream)
        if not stream.line.gone:
            stream.line.post_error(stream.request.id, error)
        self._drop(stream, error.code)

    def _drop(self, stream: Stream, code: str) -> None:
        (self._open if stream in self._open else self._waiting).remove(stream)
        self.count -= 1
        self._held_bytes -= len(stream.request.body)
        stream.line.settled(stream.request, code, time.monotonic())

    def _close(self, stream: Stream) -> None:
        """Close the generator where it stands; what its ``finally`` raises concerns nobody else."""
        close = getattr(stream.items, "close", None)
        stream.items = None
        if close is None:
            return
        try:
            close()
        except BaseException:  # noqa: BLE001  as above
            _log.exception("a handler's stream failed while it was closed")
