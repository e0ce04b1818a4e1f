"""The life of a worker: load, say hello, serve until the channel closes.

One thread, one loop: receive what has arrived, decide a batch, run it, answer everything in one write. It sleeps in
``recv`` while idle. Promises: each ``infer`` gets exactly one ``result`` or ``error``; one bad request fails alone;
when the daemon closes its side, what was received is still answered before the process leaves. Between two batches one
stream takes one step (``streams.py``).
Leaves out: every decision (``batcher.py``) and every byte (``channel.py``, ``requests.py``).
"""

from __future__ import annotations

import ctypes
import gc
import socket
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final

from agent import log
from agent.errors import (
    AgentError,
    CanceledError,
    DeadlineError,
    FrameError,
    LoadError,
    NotFoundError,
    OutOfMemoryError,
    SelfTestError,
    TooLargeError,
)
from agent.tensors import Array
from agent.wire import Frame, Limits, error_header
from agent.worker import golden, loading
from agent.worker import spec as specs
from agent.worker.batcher import Batcher, isolate
from agent.worker.channel import Channel
from agent.worker.loading import Loaded
from agent.worker.regions import Regions
from agent.worker.requests import Request, into_window, stacked
from agent.worker.streams import Streams

_log = log.get_logger("worker")
_WAITING_MAX: Final = 1024  # requests and bytes held here; the rest waits in the socket and in the daemon
_WAITING_BYTES_MAX: Final = 128 * 1024 * 1024

Outcome = Mapping[str, Array] | AgentError


def run(packed_spec: bytes, sock: socket.socket) -> int:
    """Live as a worker on ``sock``; return the process' exit code.

    Args:
        packed_spec: The MessagePack spec.
        sock: The channel, a connected stream socket.
    """
    log.setup()
    channel = Channel(sock, Limits())
    try:
        spec = specs.parse(packed_spec)
        channel = Channel(sock, spec.wire)
        loaded = loading.load(spec)
    except BaseException as error:  # noqa: BLE001  whatever a bundle's code raises, the daemon must hear of it
        failure = _load_failure(error)
        _log.error("worker cannot start", code=failure.code, error=str(failure))
        channel.post(error_header(None, failure.code, str(failure), retryable=failure.retryable))
        _flush_all(channel)
        return 1
    _give_back_memory()
    channel.post(loaded.hello)
    try:
        Server(loaded, channel).serve()
    except (FrameError, TooLargeError) as error:
        _log.error("the daemon broke the protocol", error=str(error))
        return 1
    return 0


class Server:
    """The loop around one loaded model."""

    def __init__(self, loaded: Loaded, channel: Channel) -> None:
        self._loaded = loaded
        self._channel = channel
        self._signature = loaded.signature
        self._runtime = loaded.runtime
        self._forms = loaded.forms
        self._regions = Regions()
        self._held_bytes = 0
        self._batcher: Batcher[Request] = Batcher(
            rows_max=loaded.signature.rows_max, delay_max_s=loaded.spec.batch_delay_s
        )
        self._streams = Streams(loaded.handler, loaded.signature, loaded.runtime.run)

    def serve(self) -> None:
        """Answer until the daemon has closed its side and nothing is left.

        Raises:
            FrameError: the daemon broke the protocol.
        """
        channel, batcher = self._channel, self._batcher
        while True:
            channel.flush()
            if channel.congested:
                channel.wait(to_receive=False)
                continue
            self._receive()
            if batcher:
                self._turn()
            elif channel.closed:
                self._streams.end(CanceledError("the worker leaves"))
                _flush_all(channel)
                return
            if self._streams.count:
                self._streams.step()

    def _receive(self) -> None:
        """Take what has arrived; sleep if there is nothing else to do."""
        channel, batcher, streams = self._channel, self._batcher, self._streams
        if channel.closed:
            return
        wait = not batcher and not (streams.count and streams.ready)
        if channel.pending and wait:
            channel.wait(to_receive=True)
            wait = False
        room = _WAITING_MAX - len(batcher)
        if room <= 0 or self._held_bytes > _WAITING_BYTES_MAX:
            return
        frames = channel.receive(wait=wait, frames_max=room)
        now = time.monotonic()
        for frame in frames:
            self._take(frame, now)

    def _take(self, frame: Frame, now: float) -> None:
        header = frame.header
        kind = header["kind"]
        if kind == "attach":
            self._regions.attach(header, self._channel.descriptor())
            return
        if kind == "detach":
            self._regions.detach(header)
            return
        if "id" not in header:
            raise FrameError(f"a frame of kind {kind!r} without an id")
        if kind == "infer":
            try:
                request = Request(header, frame.body, self._forms.of(header), now)
                shared = header.get("shared")
                if shared is not None:
                    self._share(request, shared)
                streamed = self._streams.takes(request)
            except FrameError:
                raise
            except AgentError as error:
                self._refuse(header["id"], error)
                return
            if streamed:
                self._streams.add(request, self._channel)
                return
            self._held_bytes += len(request.body)
            self._batcher.add(request)
        elif kind == "cancel":
            if self._streams.count and self._streams.cancel(header["id"], self._channel):
                return
            withdrawn = self._batcher.cancel(header["id"])
            if withdrawn is not None:
                self._held_bytes -= len(withdrawn.body)
                self._refuse(withdrawn.id, CanceledError("withdrawn before it started"))
        elif kind in ("pause", "resume"):
            self._streams.pace(header["id"], self._channel, paused=kind == "pause")
        elif kind == "call":
            self._call(header)
        else:
            raise FrameError(f"a worker takes no frame of kind {kind!r}")

    def _share(self, request: Request, shared: Mapping[str, Any]) -> None:
        """Give the request the shared memory that the daemon named for it."""
        regions = self._regions
        if "regions" in shared:
            request.regions = regions.named(shared["regions"])
        if "body" in shared:
            request.body = regions.part(*shared["body"])
        if "answer" in shared:
            request.window = regions.part(*shared["answer"])

    def _turn(self) -> None:
        """Run one batch, or sleep as long as the batcher wants to wait for company."""
        batcher, now = self._batcher, time.monotonic()
        batch, expired = batcher.take(now, self._prepare, closing=self._channel.closed)
        for request in expired:
            self._held_bytes -= len(request.body)
            self._refuse(request.id, DeadlineError("the deadline passed while it waited in the worker"))
        if not batch:
            due = batcher.due()
            if due is not None and not (self._streams.count and self._streams.ready):
                self._channel.flush()
                self._channel.wait(due - now, to_receive=True)
            return
        parts: Iterator[tuple[Sequence[Request], Outcome]] = isolate(batch, self._attempt)
        for part, outcome in parts:
            self._answer(part, outcome)
        for request in batch:
            self._held_bytes -= len(request.body)

    def _prepare(self, request: Request) -> bool:
        """Decode one request; a bad one is answered here."""
        try:
            request.prepare(self._signature)
            if request.deadline <= time.monotonic():
                raise DeadlineError("the deadline passed while it was decoded")
        except Exception as error:  # noqa: BLE001  a request may fail, the worker may not
            self._held_bytes -= len(request.body)
            self._refuse(request.id, _failure(error))
            return False
        return True

    def _attempt(self, part: Sequence[Request]) -> Outcome | None:
        """Run requests together; ``None`` asks for halves."""
        try:
            if len(part) == 1:
                return self._runtime.run(part[0].inputs)
            names = part[0].inputs
            rows = sum(request.rows for request in part)
            outputs = self._runtime.run({name: stacked(part, name, rows) for name in names})
            return outputs if all(len(array) == rows for array in outputs.values()) else None
        except Exception as error:  # noqa: BLE001  as above
            return None if len(part) > 1 else _failure(error)

    def _answer(self, part: Sequence[Request], outcome: Outcome) -> None:
        if isinstance(outcome, AgentError):
            for request in part:
                self._refuse(request.id, outcome)
            return
        row = 0
        for request in part:
            own = outcome
            if len(part) > 1:
                own = {name: array[row : row + request.rows] for name, array in outcome.items()}
                row += request.rows
            try:
                fields, body = request.answer(own)
                if request.window is not None:
                    body = into_window(request.window, fields, body)
                self._channel.post({"kind": "result", "id": request.id, **fields}, body)
            except Exception as error:  # noqa: BLE001  as above
                self._refuse(request.id, _failure(error))

    def _refuse(self, request_id: int, error: AgentError) -> None:
        self._channel.post(error_header(request_id, error.code, str(error), retryable=error.retryable))

    def _call(self, header: Mapping[str, Any]) -> None:
        method, value = header.get("method"), {"ok": True}
        if method == "selftest":
            value = self._self_test()
        elif method != "ping":
            self._refuse(header["id"], NotFoundError(f"a worker has no method {method!r}"))
            return
        self._channel.post({"kind": "reply", "id": header["id"], "value": value})

    def _self_test(self) -> dict[str, Any]:
        try:
            return {"ok": True, "golden": golden.verify(self._loaded.goldens, self._runtime.run)}
        except Exception as error:  # noqa: BLE001  as above
            failure = error if isinstance(error, SelfTestError) else _failure(error)
            return {"ok": False, "golden": [], "code": failure.code, "message": str(failure)}


def _failure(error: Exception) -> AgentError:
    if isinstance(error, AgentError):
        return error
    if isinstance(error, MemoryError):
        return OutOfMemoryError("memory did not suffice for this request")
    _log.exception("a request failed inside the worker")
    return AgentError(f"the worker failed on this request: {type(error).__name__}")


def _load_failure(error: BaseException) -> AgentError:
    if isinstance(error, AgentError):
        return error
    if isinstance(error, MemoryError):
        return OutOfMemoryError("memory did not suffice to load the model")
    return LoadError(f"{type(error).__name__}: {str(error)[:300]}")


def _give_back_memory() -> None:
    """Return what loading left over to the kernel: 6 MB of 29 for a 3 MB model. glibc keeps it otherwise."""
    gc.collect()
    gc.freeze()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # absent in other C libraries
    if trim is not None:
        trim(0)


def _flush_all(channel: Channel) -> None:
    while channel.pending:
        channel.flush()
        if channel.pending:
            channel.wait(to_receive=False)
