"""The asynchronous client: one connection, any number of requests outstanding, reconnecting by itself."""

from __future__ import annotations

import array
import asyncio
import os
import socket
import time
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from itertools import count, islice
from os import PathLike
from types import TracebackType
from typing import Any, Final, Self

from agent.client.bounds import READ_BYTES, SEND_BUFFER_BYTES, lane_wait_s, reconnects, restarting, wait_s
from agent.client.inbox import Inbox
from agent.client.lanes import Lanes, Target
from agent.client.messages import (
    ANSWER_LIMITS,
    DEFAULT_SOCKET,
    Hold,
    InferFrames,
    Part,
    Result,
    attach_frame,
    call_frame,
    cancel_frame,
    detach_frame,
    error_of,
    lane_frame,
    lend_frame,
    part_of,
    predict_frame,
    result_of,
    stream_frame,
    tensors_of,
    value_of,
)
from agent.client.regions import STAGED_BYTES_MIN, Plan, Region, SharedMemory, StagingRefusedError
from agent.errors import AgentError, DeadlineError, FrameError, TooLargeError, UnavailableError
from agent.tensors import Array
from agent.wire import FIRST_ID, RESULT_LEAD, Buffer, Decoder, Frame

_JOIN_BYTES_MAX: Final = 64 * 1024
_UNSENT_BYTES_MAX: Final = 256 * 1024  # above it new requests wait
_IOVECS_MAX: Final = 512  # of the kernel's 1024


class AsyncClient:
    """A connection to ``inferd`` for one event loop, opened at the first request and again when it broke.

    Cancelling the task that waits for an answer withdraws the request at the daemon.

    A request whose connection breaks before it is answered is sent again, at most ``retries`` times: it may then run
    twice. Set ``retries=0`` for a model where that matters.

    Large arrays go through shared memory by themselves, copied once; arrays over a ``region`` are not copied at all.

    With ``lanes`` requests go straight to each model's worker where the daemon allows it, as with ``Client``.

    Args:
        socket_path: The daemon's frame socket.
        connect_timeout_s: How long to wait for a daemon that is not there (restarting).
        timeout_s: How long to wait for an answer when the request has no deadline of its own.
        retries: Bound of repeated requests, see above.
        lanes: Whether to use direct lanes, see above.
    """

    def __init__(
        self,
        socket_path: str | PathLike[str] = DEFAULT_SOCKET,
        *,
        connect_timeout_s: float = 5.0,
        timeout_s: float = 60.0,
        retries: int = 2,
        lanes: bool = False,
    ) -> None:
        self._path = str(socket_path)
        self._connect_timeout_s = connect_timeout_s
        self._timeout_s = timeout_s
        self._retries = retries
        self._ids = count(FIRST_ID)
        self._frames = InferFrames()
        self._lanes: Lanes[_Lane] = Lanes(enabled=lanes)
        self._opening = asyncio.Lock()
        self._line: _Line | None = None
        self._connecting = asyncio.Lock()
        self._attaching = asyncio.Lock()
        self._memory = SharedMemory(self._detach)

    async def infer(
        self,
        model: str,
        inputs: Mapping[str, Array],
        *,
        version: str | None = None,
        deadline_ms: float | None = None,
        outputs: Sequence[str] | None = None,
        priority: int | None = None,
        params: Mapping[str, Any] | None = None,
        reply: Region | None = None,
    ) -> Result:
        """Run ``model`` on tensors; arguments and errors as ``Client.infer``. Leave the arrays alone until then."""
        plan = self._memory.plan(model, inputs, reply)

        def build(request_id: int) -> list[Buffer]:
            return self._frames.frame(
                request_id,
                model,
                inputs,
                version=version,
                deadline_ms=deadline_ms,
                outputs=outputs,
                priority=priority,
                params=params,
                plan=plan,
            )

        try:
            frame = await self._ask(build, deadline_ms, self._retries, plan, (model, version or None))
            if plan is None and len(frame.body) <= STAGED_BYTES_MIN:
                return result_of(frame)
            return tensors_of(frame, model, plan, self._memory)
        except StagingRefusedError:
            self._memory.refused()
        except BaseException:
            self._memory.failed(plan)
            raise
        self._memory.failed(plan)
        return await self.infer(
            model,
            inputs,
            version=version,
            deadline_ms=deadline_ms,
            outputs=outputs,
            priority=priority,
            params=params,
            reply=reply,
        )

    async def region(self, nbytes: int) -> Region:
        """Return memory shared with the models' workers, as ``Client.region``: ``with await client.region(n) as r``."""
        region = self._memory.region(nbytes)
        try:
            await self._attach(await self._connected(), region)
        except _BrokenError as error:
            region.close()
            raise UnavailableError(f"the connection to {self._path} broke: {error}") from error
        except BaseException:
            region.close()
            raise
        return region

    async def predict(
        self,
        model: str,
        body: Buffer,
        content_type: str = "application/octet-stream",
        *,
        version: str | None = None,
        deadline_ms: float | None = None,
        priority: int | None = None,
        params: Mapping[str, Any] | None = None,
    ) -> Result:
        """Let the model's handler decode ``body`` and answer; as ``Client.predict``."""

        def build(request_id: int) -> list[Buffer]:
            return predict_frame(
                request_id,
                model,
                body,
                content_type=content_type,
                version=version,
                deadline_ms=deadline_ms,
                priority=priority,
                params=params,
            )

        return result_of(await self._ask(build, deadline_ms, self._retries, None, (model, version or None)))

    async def stream(
        self,
        model: str,
        inputs: Mapping[str, Array] | Buffer,
        content_type: str = "application/octet-stream",
        *,
        version: str | None = None,
        deadline_ms: float | None = None,
        outputs: Sequence[str] | None = None,
        priority: int | None = None,
        params: Mapping[str, Any] | None = None,
    ) -> AsyncGenerator[Part, None]:
        """Yield the parts of an answer as they come; arguments and errors as ``Client.stream``.

        Other requests go on beside it. Leaving the loop early ends the work at the daemon, at once within
        ``async with contextlib.aclosing(client.stream(…)) as parts``. Parts that are not taken pause the model.
        """
        request_id = next(self._ids)
        frame = stream_frame(
            request_id,
            model,
            inputs,
            content_type=content_type,
            version=version,
            deadline_ms=deadline_ms,
            outputs=outputs,
            priority=priority,
            params=params,
        )
        patience_s = wait_s(deadline_ms, self._timeout_s)
        part: Part | None = None
        retries = self._retries
        while True:
            line = await self._connected()
            try:
                async with asyncio.timeout(patience_s):
                    inbox = await line.open(request_id, frame)
                while True:
                    async with asyncio.timeout(patience_s):
                        answer = await inbox.take()
                    if answer.header["kind"] != "part":
                        line.close(request_id)
                    part = part_of(answer, part)
                    if part is None:
                        return
                    yield part
            except TimeoutError as error:
                raise DeadlineError(f"nothing came for {patience_s} s") from error
            except _BrokenError as error:
                if part is not None or not retries:
                    raise UnavailableError(f"the connection to {self._path} broke: {error}") from error
                retries -= 1
            finally:
                line.abandon(request_id)

    async def call(
        self, method: str, args: Mapping[str, Any] | None = None, *, deadline_ms: float | None = None
    ) -> Any:
        """Return the value of a management verb. It is not repeated when the connection breaks."""

        def build(request_id: int) -> list[Buffer]:
            return call_frame(request_id, method, args, deadline_ms)

        return value_of(await self._ask(build, deadline_ms, 0))

    async def status(self) -> Any:
        """Return the daemon's status."""

        def build(request_id: int) -> list[Buffer]:
            return call_frame(request_id, "status", None, None)

        return value_of(await self._ask(build, None, self._retries))

    @asynccontextmanager
    async def hold(self, model: str = "*", *, reason: str = "") -> AsyncIterator[Hold]:
        """Keep new versions of ``model`` from being loaded as long as the body runs; as ``Client.hold``."""
        async with AsyncClient(self._path, connect_timeout_s=self._connect_timeout_s, retries=0) as own:
            value = await own.call("hold", {"model": model, "reason": reason})
            line = own._line
            yield Hold(value["model"], value["under_way"], lambda: line is not None and line.broken is None)

    async def close(self) -> None:
        """Close the connection; waiting requests fail with ``UnavailableError``."""
        for lane in self._lanes:
            lane.line.end(UnavailableError("the client was closed"))
        self._lanes.clear()
        if self._line is not None:
            self._line.end(UnavailableError("the client was closed"))
        self._memory.close_staging()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    # Inside

    async def _ask(
        self,
        build: Callable[[int], list[Buffer]],
        deadline_ms: float | None,
        retries: int,
        plan: Plan | None = None,
        target: Target | None = None,
    ) -> Frame:
        """Return the answer to the frame that ``build`` makes; ``target`` may be asked on its direct lane."""
        patience_s = wait_s(deadline_ms, self._timeout_s)
        request_id = next(self._ids)
        frame = build(request_id)
        broken: _BrokenError | None = None
        tries = retries + 1
        lane = await self._lane(target) if target is not None else None
        if lane is not None:
            try:
                lane_patience_s = lane_wait_s(deadline_ms, self._timeout_s)
                return await self._ask_on_lane(lane, request_id, frame, lane_patience_s, plan)
            except _UnsentError:
                pass  # nobody took it, so no try is used up
            except _BrokenError as error:
                broken = error
                tries -= 1
        for _ in range(tries):
            line = await self._connected()
            try:
                async with asyncio.timeout(patience_s):
                    if plan is not None:
                        await self._attach_all(line, plan)
                    return await line.ask(request_id, frame)
            except TimeoutError as error:
                raise DeadlineError(f"no answer within {patience_s} s") from error
            except _BrokenError as error:
                broken = error
        raise UnavailableError(f"the connection to {self._path} broke {retries + 1} times: {broken}")

    async def _lane(self, target: Target) -> _Lane | None:
        """Return the model's lane, asking for one if it is time to."""
        lane = self._lanes.get(target)
        if lane is not None:
            if not lane.line.leaving and lane.line.broken is None:
                return lane
            self._lanes.drop(target, lane, time.monotonic(), farewell=lane.line.leaving)
        if not self._lanes.wanted(target, time.monotonic()):
            return None
        async with self._opening:
            lane = self._lanes.get(target)
            if lane is not None or not self._lanes.wanted(target, time.monotonic()):
                return lane
            try:
                async with asyncio.timeout(self._timeout_s):
                    return await self._open_lane(target)
            except (AgentError, _BrokenError, TimeoutError):  # refused; or no daemon, which the request will find out
                self._lanes.refused(target, time.monotonic())
                return None

    async def _open_lane(self, target: Target) -> _Lane:
        line = await self._connected()
        request_id = next(self._ids)
        value = value_of(await line.ask(request_id, lane_frame(request_id, *target)))
        lane = _Lane(_Line(line.take_socket(request_id), is_lane=True), int(value["lane"]), line)
        self._lanes.add(target, lane)
        return lane

    async def _ask_on_lane(
        self, lane: _Lane, request_id: int, frame: list[Buffer], patience_s: float, plan: Plan | None
    ) -> Frame:
        """Return the answer of a model's worker; ``_BrokenError`` if the lane has ended."""
        try:
            async with asyncio.timeout(patience_s):
                if plan is not None:
                    await self._lend_all(lane, plan)
                return await lane.line.ask(request_id, frame)
        except TimeoutError as error:
            raise DeadlineError(f"no answer within {patience_s} s") from error

    async def _lend_all(self, lane: _Lane, plan: Plan) -> None:
        """Let the lane's worker know the regions of a request."""
        for number, region in plan.regions.items():
            if number in lane.known:
                continue
            try:
                await self._attach(lane.home, region)
                request_id = next(self._ids)
                value_of(await lane.home.ask(request_id, lend_frame(request_id, lane.number, region)))
            except AgentError as error:  # this worker cannot have it
                raise _UnsentError(str(error)) from error
            lane.known.add(number)

    async def _attach_all(self, line: _Line, plan: Plan) -> None:
        """Let this connection know the regions of a request."""
        for region in plan.regions.values():
            try:
                await self._attach(line, region)
            except AgentError as error:
                if region is plan.staging:
                    raise StagingRefusedError from error
                raise

    async def _attach(self, line: _Line, region: Region) -> None:
        if region.attached_to is line:
            return
        async with self._attaching:  # two requests may name the same region
            if region.attached_to is line:
                return
            region.note_attached(line)  # it will be so even if this task is canceled
            request_id = next(self._ids)
            try:
                value_of(await line.ask(request_id, attach_frame(request_id, region), region.descriptor))
            except AgentError:
                region.attached_to = None
                raise

    def _detach(self, region: Region) -> None:
        line = self._line
        if line is not None and region.attached_to is line and line.broken is None:
            line.tell(detach_frame(next(self._ids), region))

    async def _connected(self) -> _Line:
        async with self._connecting:
            if self._line is None or self._line.broken is not None:
                self._line = await _connect(self._path, self._connect_timeout_s)
            return self._line


class _BrokenError(Exception):
    """The connection ended and the request had no answer."""


class _UnsentError(_BrokenError):
    """The connection ended before the whole request had left: nobody took it."""


class _Lane:
    """A connection straight to a model's worker."""

    def __init__(self, line: _Line, number: int, home: _Line) -> None:
        self.line = line
        self.number = number
        self.home = home  # the daemon's connection it hangs on
        self.known: set[int] = set()  # regions the worker knows


class _Line:
    """One connection: who waits for which answer. A bare socket: transports cannot pass descriptors."""

    def __init__(self, sock: socket.socket, *, is_lane: bool = False) -> None:
        self._sock = sock
        self._is_lane = is_lane
        self._loop = asyncio.get_running_loop()
        self._decoder = Decoder(ANSWER_LIMITS, repeats=RESULT_LEAD)
        self._waiting: dict[int, asyncio.Future[Frame]] = {}
        self._inboxes: dict[int, Inbox] = {}  # of answers that come in parts
        self._ends: dict[int, int] = {}  # of those who wait: at which byte of all that was written their frame ends
        self._written = 0
        self._left = 0  # bytes the kernel has taken
        self._received: deque[int] = deque()  # descriptors whose frames are not complete yet
        self._sockets: dict[int, int] = {}  # descriptors that came with replies, until their askers take them
        self.leaving = False  # the other side takes nothing more
        self._unsent: deque[Buffer] = deque()
        self._unsent_bytes = 0
        self._passing: deque[tuple[Buffer, int]] = deque()  # the buffers of ``_unsent`` a descriptor goes with
        self._flush_due = False
        self._blocked = False  # the socket is full and we are told when it is not
        self._writable = asyncio.Event()
        self._writable.set()
        self.broken: Exception | None = None
        self._loop.add_reader(sock.fileno(), self._readable)

    def tell(self, frame: Sequence[Buffer]) -> None:
        """Send a frame whose answer nobody waits for."""
        self._write(frame)

    async def ask(self, request_id: int, frame: Sequence[Buffer], descriptor: int | None = None) -> Frame:
        """Return the answer to ``request_id``; ``_BrokenError`` if there will be none."""
        if descriptor is None:  # a frame with one is small, and must have left even if its caller is canceled
            await self._writable.wait()
        if self.leaving:
            raise _UnsentError("the lane takes nothing more")
        if self.broken is not None:
            raise self.broken
        future: asyncio.Future[Frame] = asyncio.get_running_loop().create_future()
        self._waiting[request_id] = future
        self._write(frame, descriptor)
        self._ends[request_id] = self._written
        try:
            return await future
        except asyncio.CancelledError:
            if self.broken is None and request_id in self._waiting:
                self._write(cancel_frame(request_id))
            if request_id in self._sockets:
                os.close(self._sockets.pop(request_id))
            raise
        finally:
            self._waiting.pop(request_id, None)
            self._ends.pop(request_id, None)

    def take_socket(self, request_id: int) -> socket.socket:
        """Return the socket that came with the reply to ``request_id``.

        Raises:
            FrameError: none came.
        """
        if request_id not in self._sockets:
            raise FrameError("a lane came without its socket")
        sock = socket.socket(fileno=self._sockets.pop(request_id))
        sock.setblocking(False)
        return sock

    async def open(self, request_id: int, frame: Sequence[Buffer]) -> Inbox:
        """Send a request whose answer comes in parts, and return where they arrive; ``_BrokenError`` as ``ask``."""
        await self._writable.wait()
        if self.broken is not None:
            raise self.broken
        inbox = self._inboxes[request_id] = Inbox(request_id, self.tell)
        self._write(frame)
        return inbox

    def close(self, request_id: int) -> None:
        """Forget an answer whose last frame has been taken."""
        self._inboxes.pop(request_id, None)

    def abandon(self, request_id: int) -> None:
        """Withdraw a request whose answer is not complete; one that is closed is not."""
        if self._inboxes.pop(request_id, None) is not None and self.broken is None:
            self._write(cancel_frame(request_id))

    def end(self, error: Exception) -> None:
        """Fail all who wait with ``error`` and close."""
        if self.broken is None:
            self.broken = error
            if isinstance(error, _BrokenError):
                self._fail_unsent()
            for future in self._waiting.values():
                if not future.done():
                    future.set_exception(type(error)(*error.args))  # each waiter raises its own
            for inbox in self._inboxes.values():
                inbox.fail(type(error)(*error.args))
            for descriptor in (*self._received, *self._sockets.values()):
                os.close(descriptor)
            self._received.clear()
            self._sockets.clear()
            self._writable.set()
            self._loop.remove_reader(self._sock.fileno())
            self._loop.remove_writer(self._sock.fileno())
            self._sock.close()
            while self._passing:
                os.close(self._passing.popleft()[1])

    def _fail_unsent(self) -> None:
        """Tell those whose frame has not left: nobody will take it."""
        for request_id, future in self._waiting.items():
            if self._ends.get(request_id, 0) > self._left and not future.done():
                future.set_exception(_UnsentError("nobody took the request"))

    # Out

    def _write(self, frame: Sequence[Buffer], descriptor: int | None = None) -> None:
        size = sum(len(part) for part in frame)
        self._written += size
        parts: Sequence[Buffer] = [part for part in frame if len(part)]
        if size <= _JOIN_BYTES_MAX:
            parts = (b"".join(parts),)
        if descriptor is not None:
            self._passing.append((parts[0], os.dup(descriptor)))  # the caller may close its own meanwhile
        self._unsent.extend(parts)
        self._unsent_bytes += size
        if self._unsent_bytes > _UNSENT_BYTES_MAX:
            self._writable.clear()
        if not self._flush_due and not self._blocked:
            self._flush_due = True  # what is asked in one turn of the loop leaves together
            self._loop.call_soon(self._flush)

    def _flush(self) -> None:
        self._flush_due = False
        if self.broken is not None:
            return
        try:
            while self._unsent:
                self._sent(self._send())
        except (BlockingIOError, InterruptedError):
            if not self._blocked:
                self._blocked = True
                self._loop.add_writer(self._sock.fileno(), self._flush)
        except OSError as error:  # the other side takes nothing more: it may have said why
            if self._is_lane:  # what it took it still answers
                self.leaving = True
                self._fail_unsent()
                self._unsent.clear()
                self._loop.remove_writer(self._sock.fileno())
            elif not self._last_words():
                self.end(_BrokenError(str(error)))
        else:
            if self._blocked:
                self._blocked = False
                self._loop.remove_writer(self._sock.fileno())
        if self._unsent_bytes <= _UNSENT_BYTES_MAX:
            self._writable.set()

    def _send(self) -> int:
        if not self._passing:
            return self._sock.sendmsg(list(islice(self._unsent, _IOVECS_MAX)))
        head, descriptor = self._passing[0]
        before = next(index for index, part in enumerate(self._unsent) if part is head)
        if before:
            return self._sock.sendmsg(list(islice(self._unsent, min(before, _IOVECS_MAX))))
        rights = array.array("i", [descriptor])
        sent = self._sock.sendmsg([head], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, rights)])
        self._passing.popleft()
        os.close(descriptor)
        return sent

    def _sent(self, count: int) -> None:
        self._unsent_bytes -= count
        self._left += count
        while count:
            first = self._unsent[0]
            if len(first) > count:
                self._unsent[0] = memoryview(first)[count:]
                return
            count -= len(first)
            self._unsent.popleft()

    # In

    def _readable(self) -> None:
        try:
            frames = self._receive()
        except (BlockingIOError, InterruptedError):
            return
        except OSError as error:
            self.end(_BrokenError(str(error)))
            return
        except (FrameError, TooLargeError) as error:
            self.end(error)
            return
        for frame in frames:
            self._deliver(frame)

    def _receive(self) -> Sequence[Frame]:
        body = self._decoder.body_buffer()
        if body is not None:
            received = self._sock.recv_into(body)
            if not received:
                raise ConnectionResetError("closed by the daemon")
            frame = self._decoder.body_filled(received)
            return () if frame is None else (frame,)
        data, descriptors, _, _ = socket.recv_fds(self._sock, READ_BYTES, 1, socket.MSG_CMSG_CLOEXEC)
        self._received.extend(descriptors)
        if not data:
            raise ConnectionResetError("closed by the daemon")
        return self._decoder.feed(data)

    def _last_words(self) -> bool:
        """Read what the daemon wrote before it closed; return whether that ended the line with its reason."""
        while self.broken is None:
            try:
                frames = self._receive()
            except (OSError, FrameError, TooLargeError):
                return False
            for frame in frames:
                self._deliver(frame)
        return True

    def _deliver(self, frame: Frame) -> None:
        request_id = frame.id
        if request_id is None:
            if frame.header["kind"] == "error":
                self.end(error_of(frame))
            elif frame.header["kind"] == "bye":
                self.leaving = True
            return
        inbox = self._inboxes.get(request_id) if self._inboxes else None
        if inbox is not None:
            inbox.put(frame)
            return
        future = self._waiting.get(request_id)
        waits = future is not None and not future.done()
        if self._received and _brings_socket(frame):
            descriptor = self._received.popleft()
            if waits:
                self._sockets[request_id] = descriptor
            else:  # its asker was canceled: it must not pass for another's
                os.close(descriptor)
        if future is not None and waits:
            future.set_result(frame)


def _brings_socket(frame: Frame) -> bool:
    """Whether a reply is the one that a lane's socket comes with."""
    value = frame.header.get("value") if frame.header["kind"] == "reply" else None
    return isinstance(value, dict) and "lane" in value and "region" not in value


async def _connect(path: str, timeout_s: float) -> _Line:
    """Return a connection, waiting for a daemon that is (re)starting."""
    loop = asyncio.get_running_loop()
    give_up = loop.time() + timeout_s
    backoff = reconnects()
    while True:
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        sock.setblocking(False)
        try:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER_BYTES)
            await loop.sock_connect(sock, path)
        except OSError as error:
            sock.close()
            if not restarting(error) or loop.time() >= give_up:
                raise UnavailableError(f"cannot reach inferd at {path}: {error.strerror or error}") from error
        except BaseException:
            sock.close()
            raise
        else:
            return _Line(sock)
        await asyncio.sleep(backoff.next())
