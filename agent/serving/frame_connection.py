"""One application's connection to the frame socket.

Requests go to the engine as they arrive and answers leave in the order they come, so a client may keep many
outstanding; ids are the client's own. A request-level fault is answered and the connection goes on; bytes that are not
our protocol get an error frame naming the fault, then the connection closes. When the peer closes its side, even
half-way, everything it had outstanding is canceled and its shared memory is let go. Tensors are not looked at here:
the worker checks them.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable, Coroutine, Mapping, Sequence
from contextlib import suppress
from functools import partial
from typing import Any, Final, Protocol

from agent.arena import SHARED_BYTES_MIN, Arena
from agent.config import ServingConfig, SharedMemoryConfig
from agent.errors import (
    AgentError,
    CanceledError,
    DeadlineError,
    FrameError,
    InvalidInputError,
    LaneRefusedError,
    OverloadedError,
    TooLargeError,
)
from agent.log import get_logger
from agent.regions import RegionTable
from agent.serving.attachments import ANCILLARY_BYTES, Attachments
from agent.serving.budget import ReceiveBudget
from agent.serving.identity import Caller, require
from agent.serving.outbound import Outbound
from agent.serving.pacing import Pacing
from agent.serving.ports import Control, Engine, InferRequest, Lane
from agent.wire import (
    DEADLINE_MS_MAX,
    INFER_LEAD,
    PROTOCOL,
    RESULT_LEAD,
    Buffer,
    Decoder,
    Frame,
    Header,
    Limits,
    encode,
    error_header,
    lead_frame,
    packed_pairs,
)

_log = get_logger("serving.frames")

_READ_BYTES: Final = 64 * 1024  # per turn; the rest of a large body goes straight to its own buffer
_PAUSE_BYTES: Final = 1024 * 1024  # answers not taken yet; above it no new requests are read
_CALLS_MAX: Final = 16  # at once per connection
_LANES_MAX: Final = 16  # per connection: one for each model it asks
_NAME_CHARS_MAX: Final = 128
# As plain integers: the enumeration's own operators cost a microsecond each.
_CLOSE_ON_EXEC: Final = int(socket.MSG_CMSG_CLOEXEC)
_CUT_OFF: Final = int(socket.MSG_CTRUNC)


class Owner(Protocol):
    """What a connection needs of its server."""

    engine: Engine
    control: Control
    budget: ReceiveBudget
    config: ServingConfig
    limits: Limits
    regions: RegionTable
    shared_memory: SharedMemoryConfig
    arena: Arena

    def spawn(self, work: Coroutine[Any, Any, None], name: str) -> asyncio.Task[None]:
        """Start a task that lives no longer than the server."""

    def closed(self, connection: FrameConnection, reason: str) -> None:
        """``connection`` is closed; a ``reason`` means that we ended it."""


class FrameConnection:
    """State of one connection. Open it once; it tells its server when it is closed."""

    __slots__ = (
        "_at_end", "_blocked_since", "_calls", "_closed", "_decoder", "_failing", "_finishing", "_flush_due", "_lanes",
        "_loop", "_mid_since", "_out", "_outstanding", "_paused", "_reserved", "_serial", "_server", "_shared", "_sock",
        "_streams", "caller",
    )  # fmt: skip

    def __init__(self, server: Owner, sock: socket.socket, caller: Caller) -> None:
        self._server = server
        self._sock = sock
        self._loop = asyncio.get_running_loop()
        self._decoder = Decoder(server.limits, place=self._place, repeats=INFER_LEAD)
        self._out = Outbound()
        self._outstanding: dict[int, InferRequest] = {}  # by the client's id
        self._calls: dict[int, asyncio.Task[None]] = {}
        self._mid_since = 0.0  # when the frame under way began (loop seconds); 0: none is
        self._blocked_since = 0.0  # since when the peer has taken nothing (loop seconds); 0: it is not behind
        self._reserved = 0  # bytes of the receive budget
        self._lanes: dict[int, Lane] = {}
        self._at_end: list[Callable[[], None]] = []  # what verbs asked to be done then
        self._shared: Attachments | None = None  # made for the first descriptor: most clients pass none
        self._streams: Pacing | None = None  # made for the first request that takes its answer in parts
        self._serial = 0  # of the last request
        self._flush_due = False
        self._paused = False
        self._finishing = False  # no more is read; closes when everything is answered
        self._failing = ""  # why an error frame is the last thing to be sent; empty: it is not
        self._closed = False
        self.caller = caller

    def open(self) -> None:
        """Start to read."""
        self._loop.add_reader(self._sock.fileno(), self._readable)

    def finish(self) -> None:
        """Take what has arrived, let nothing more arrive, answer, then close.

        From here on the peer's ``send`` fails, so it knows that a request was not taken; one that had arrived whole is
        answered like any other.
        """
        if self._closed or self._finishing:
            return
        with suppress(OSError):
            self._sock.shutdown(socket.SHUT_RD)
        self._loop.remove_reader(self._sock.fileno())
        self._finishing = True
        self._take_rest()
        self._close_if_done()

    def _take_rest(self) -> None:
        """Handle the whole frames that lie in the socket's buffer; a begun one was never accepted."""
        try:
            while not self._closed and not self._failing:
                for frame in self._receive():
                    self._handle(frame)
        except OSError:  # the end of what had arrived
            return
        except (FrameError, TooLargeError, OverloadedError) as error:
            self._fail(error, error.code)

    def close(self, reason: str = "") -> None:
        """Close now; what is outstanding is canceled, what is unsent is lost. A second call does nothing."""
        if self._closed:
            return
        self._closed = True
        self._loop.remove_reader(self._sock.fileno())
        self._loop.remove_writer(self._sock.fileno())
        self._sock.close()
        self._release_budget()
        self._withdraw()
        for lane in tuple(self._lanes.values()):
            lane.revoke()
        for act in self._at_end:
            act()
        if self._shared is not None:
            self._shared.close()
        self._decoder.drop()
        self._out.drop()
        self._server.closed(self, reason)

    def enforce_deadlines(self, now: float) -> None:
        """Cut a peer that left a frame unfinished, or does not take its answers; ``now`` in loop seconds."""
        config = self._server.config
        if self._blocked_since and now - self._blocked_since > config.write_timeout_s:
            self.close("slow_reader")
        elif self._mid_since and not self._paused and now - self._mid_since > config.read_timeout_s:
            self._fail(FrameError(f"the frame was not completed within {config.read_timeout_s} s"), "half_sent")

    # In

    def _readable(self) -> None:
        try:
            frames = self._receive()
            for frame in frames:
                self._handle(frame)
                if self._closed or self._failing:
                    return
            if self._shared is not None and self._shared.descriptors_wait and not self._decoder.mid_frame:
                raise FrameError("a descriptor came with a frame that takes none")
        except (BlockingIOError, InterruptedError):
            return
        except OSError:
            self.close()
        except (FrameError, TooLargeError, OverloadedError) as error:
            self._fail(error, error.code)
        else:
            if self._decoder.mid_frame:
                self._mid_since = self._mid_since if self._mid_since and not frames else self._loop.time()
            else:
                self._mid_since = 0.0

    def _receive(self) -> Sequence[Frame]:
        """Return the frames that one read completed."""
        body = self._decoder.body_buffer()
        if body is not None:
            count, ancillary, flags, _ = self._sock.recvmsg_into((body,), ANCILLARY_BYTES, _CLOSE_ON_EXEC)
            if ancillary or flags & _CUT_OFF:
                self._attachments().receive(ancillary, flags)
            if not count:
                raise ConnectionResetError("the peer closed")
            frame = self._decoder.body_filled(count)
            if frame is None:
                return ()
            self._release_budget()
            return (frame,)
        data, ancillary, flags, _ = self._sock.recvmsg(_READ_BYTES, ANCILLARY_BYTES, _CLOSE_ON_EXEC)
        if ancillary or flags & _CUT_OFF:
            self._attachments().receive(ancillary, flags)
        if not data:
            raise ConnectionResetError("the peer closed")
        frames = self._decoder.feed(data)
        body = self._decoder.body_buffer()
        if body is not None:
            if not self._server.budget.take(len(body)):
                raise OverloadedError("too many large bodies are being received")
            self._reserved = len(body)
        return frames

    def _place(self, header: Mapping[str, Any], nbytes: int) -> memoryview | None:
        """Return memory that the model's worker can be given, for a request's large body."""
        model = header.get("model")
        if header["kind"] != "infer" or not isinstance(model, str) or nbytes <= SHARED_BYTES_MIN:
            return None
        slot = self._server.arena.take(model, nbytes) if "infer" in self.caller.roles else None
        if slot is None:
            return None
        body = slot.lease(nbytes)
        slot.release()  # the lease holds it from here on
        return body

    def _handle(self, frame: Frame) -> None:
        header, body, request_id, deadline_ms = frame
        kind = header["kind"]
        if kind == "hello":
            self._hello(header, request_id)
        elif request_id is None:
            raise FrameError(f"{kind!r} needs an 'id'")
        elif kind == "infer":
            self._infer(request_id, header, body, deadline_ms)
        elif kind == "cancel":
            self._cancel(request_id)
        elif kind in ("pause", "resume"):
            if self._streams is not None:
                self._streams.hold(request_id, held=kind == "pause")
        elif kind == "call":
            self._call(request_id, header)
        elif kind in ("attach", "detach"):
            self._attach_or_detach(request_id, header)
        elif kind == "lane":
            self._open_lane(request_id, header)
        elif kind == "lend":
            self._lend(request_id, header)
        else:
            raise FrameError(f"kind {kind[:32]!r} is not for a server")

    def _infer(self, request_id: int, header: Header, body: Buffer, deadline_ms: Any) -> None:
        self._check_unused(request_id)
        serial = self._serial = self._serial + 1
        try:
            model, version = header.digest or self._target(header)
            request = InferRequest(
                model,
                version,
                header,
                body,
                self._loop.time() + _deadline_s(deadline_ms, self._server.config.deadline_ms_default),
                self.caller.key,
                partial(self._answer, request_id, serial),
                self._shared.named_in(header) if self._shared is not None else (),
                serial,
            )
        except AgentError as error:
            self._send_error(request_id, error)
            return
        self._outstanding[request_id] = request
        if header.get("stream"):
            self._take_parts(request_id, request)
        self._server.engine.submit(request)

    def _take_parts(self, request_id: int, request: InferRequest) -> None:
        """Let ``request`` be answered in parts."""
        if self._streams is None:
            self._streams = Pacing(self._server.engine)
        self._streams.add(request_id, request)
        request.part = partial(self._part, request_id, request.serial)

    def _part(self, request_id: int, serial: int, header: dict[str, Any], body: Sequence[Buffer]) -> None:
        """Pass a part of an answer on; as ``_answer``, but the request stays outstanding."""
        request = self._outstanding.get(request_id)
        if request is None or request.serial != serial or self._streams is None:
            return
        header["id"] = request_id
        self._send(encode(header, body))
        if self._closed:
            return
        if self._blocked_since:
            self._streams.set_behind(self._out.size > _PAUSE_BYTES)
        self._streams.part_queued(request_id)

    def _target(self, header: Header) -> tuple[str, str | None]:
        """Return whom a header asks for, kept with it; this caller may."""
        require(self.caller, "infer")
        target = _text(header, "model"), _text(header, "version", optional=True) or None
        header.digest = target
        return target

    def _answer(self, request_id: int, serial: int, header: Header, body: Sequence[Buffer]) -> None:
        """Pass the engine's answer on, unless nobody waits for it: withdrawn, or its id used anew since."""
        request = self._outstanding.get(request_id)
        if request is None or request.serial != serial:
            return
        del self._outstanding[request_id]
        if self._streams is not None:
            self._streams.remove(request_id)
        if header["kind"] != "result":
            self._send(encode({**header, "id": request_id}, body))
            return
        if header.pairs is None:
            header.pairs = packed_pairs(header)
        if len(body) == 1 and isinstance(body[0], bytes):  # as small ones are
            self._send((lead_frame(RESULT_LEAD, request_id, header.pairs, len(body[0])) + body[0],))
        else:
            self._send((lead_frame(RESULT_LEAD, request_id, header.pairs, sum(map(len, body))), *body))

    def _cancel(self, request_id: int) -> None:
        """Withdraw a request or call; an id that is already answered is no fault, the frames crossed."""
        request = self._outstanding.pop(request_id, None)
        task = self._calls.pop(request_id, None)
        if request is not None:
            if self._streams is not None:
                self._streams.remove(request_id)
            self._server.engine.cancel(request)
        elif task is not None:
            task.cancel()
        else:
            return
        self._send_error(request_id, CanceledError("canceled by the client"))

    def _attachments(self) -> Attachments:
        if self._shared is None:
            self._shared = Attachments(self._server.regions, self._server.shared_memory)
        return self._shared

    def _attach_or_detach(self, request_id: int, header: Header) -> None:
        self._check_unused(request_id)
        try:
            if header["kind"] == "attach":
                number = self._attachments().attach(header, self.caller)
            else:
                number = self._attachments().detach(header)
                for lane in self._lanes.values():
                    lane.unlend(number)
        except FrameError:
            raise
        except AgentError as error:
            self._send_error(request_id, error)
            return
        self._send(encode({"kind": "reply", "id": request_id, "value": {"region": number}}))

    def _open_lane(self, request_id: int, header: Header) -> None:
        """Give this client a socket to the model's worker, if it may have one."""
        self._check_unused(request_id)
        try:
            require(self.caller, "infer")
            if len(self._lanes) >= _LANES_MAX:
                raise LaneRefusedError(f"{_LANES_MAX} lanes are open on this connection")
            deadline_ms = self._server.config.deadline_ms_default
            version = _text(header, "version", optional=True) or None
            lane = self._server.engine.open_lane(
                _text(header, "model"), version, client=self.caller.key, deadline_ms=deadline_ms
            )
        except AgentError as error:
            self._send_error(request_id, error)
            return
        lane.on_end = self._lane_ended
        self._lanes[lane.number] = lane
        value = {"lane": lane.number, "model": lane.model, "version": lane.version}
        frame = b"".join(encode({"kind": "reply", "id": request_id, "value": value}))
        self._out.add_with(frame, lane.socket)
        self._schedule_flush()

    def _lend(self, request_id: int, header: Header) -> None:
        """Let a lane's worker know a region that is attached here."""
        self._check_unused(request_id)
        try:
            lane = self._lanes.get(header.get("lane", -1))
            if lane is None:
                raise InvalidInputError("no such lane")
            number, region = self._attachments().find(header)
            frame = encode({"kind": "reply", "id": request_id, "value": {"region": number, "lane": lane.number}})
            lane.lend(number, region, partial(self._send, frame))
        except AgentError as error:
            self._send_error(request_id, error)

    def _lane_ended(self, lane: Lane) -> None:
        self._lanes.pop(lane.number, None)

    def _call(self, request_id: int, header: Header) -> None:
        self._check_unused(request_id)
        try:
            method = _text(header, "method")
            args = header.get("args", {})
            if not isinstance(args, dict) or not all(isinstance(name, str) for name in args):
                raise InvalidInputError("'args' must be a map with text keys")
            if len(self._calls) >= _CALLS_MAX:
                raise OverloadedError(f"{_CALLS_MAX} calls are running on this connection")
            timeout_s = _deadline_s(header.deadline_ms, DEADLINE_MS_MAX)
        except AgentError as error:
            self._send_error(request_id, error)
            return
        work = self._run_call(request_id, method, args, timeout_s)
        self._calls[request_id] = self._server.spawn(work, f"call {method}")

    async def _run_call(self, request_id: int, method: str, args: dict[str, Any], timeout_s: float) -> None:
        reply: Sequence[Buffer]
        try:
            async with asyncio.timeout(timeout_s):
                value = await self._server.control.call(
                    method, args, self.caller.roles, self.caller.detail, self._when_closed
                )
            reply = encode({"kind": "reply", "id": request_id, "value": value})
        except AgentError as error:
            reply = _error(request_id, error)
        except TimeoutError:
            reply = _error(request_id, DeadlineError(f"{method} took longer than {timeout_s} s"))
        except Exception:  # noqa: BLE001  a fault in one verb must not end the listener with all its clients
            _log.exception("call failed", method=method, peer=self.caller.detail)
            reply = _error(request_id, AgentError(f"{method} failed; the daemon's log has the cause"))
        if self._calls.get(request_id) is asyncio.current_task():  # else withdrawn: whoever did it told the client
            del self._calls[request_id]
            self._send(reply)
            self._close_if_done()

    def _when_closed(self, act: Callable[[], None]) -> None:
        if self._closed:
            act()
        else:
            self._at_end.append(act)

    def _hello(self, header: Header, request_id: int | None) -> None:
        if header.get("protocol", PROTOCOL) != PROTOCOL:
            raise FrameError(f"this server speaks protocol {PROTOCOL}")
        limits = self._server.limits
        answer: dict[str, Any] = {
            "kind": "hello",
            "server": "inferd",
            "protocol": PROTOCOL,
            "roles": sorted(self.caller.roles),
            "limits": {
                "header_bytes_max": limits.header_bytes_max,
                "body_bytes_max": limits.body_bytes_max,
                "tensors_max": limits.tensors_max,
            },
        }
        if request_id is not None:
            answer["id"] = request_id
        self._send(encode(answer))

    def _check_unused(self, request_id: int) -> None:
        if request_id in self._outstanding or request_id in self._calls:
            raise FrameError(f"id {request_id} is still outstanding")

    # Out

    def _send_error(self, request_id: int | None, error: AgentError) -> None:
        self._send(_error(request_id, error))

    def _send(self, frame: Sequence[Buffer]) -> None:
        if self._closed or self._failing:
            return
        if self._out.size > self._server.config.output_bytes_max:
            self.close("slow_reader")
            return
        self._out.add(frame)
        self._schedule_flush()

    def _schedule_flush(self) -> None:
        if not self._outstanding and not self._flush_due and not self._blocked_since:
            self._flush()  # it is the only answer this client waits for
        elif not self._flush_due and not self._blocked_since:
            self._flush_due = True  # once per turn of the loop, so that answers of one turn leave together
            self._loop.call_soon(self._flush)

    def _flush(self) -> None:
        self._flush_due = False
        if self._closed:
            return
        try:
            sent = self._out.send(self._sock)
        except OSError:
            self.close()
            return
        if self._out.size:
            if not self._blocked_since:
                self._loop.add_writer(self._sock.fileno(), self._flush)
            if sent or not self._blocked_since:
                self._blocked_since = self._loop.time()
        elif self._blocked_since:
            self._loop.remove_writer(self._sock.fileno())
            self._blocked_since = 0.0
        self._pause_or_resume()
        if self._streams is not None:
            self._streams.set_behind(self._out.size > _PAUSE_BYTES)
        self._close_if_done()

    def _pause_or_resume(self) -> None:
        """Who does not take answers may not ask on."""
        if self._finishing or self._failing or self._paused == (self._out.size > _PAUSE_BYTES):
            return
        self._paused = not self._paused
        if self._paused:
            self._loop.remove_reader(self._sock.fileno())
        else:
            self._mid_since = self._mid_since and self._loop.time()
            self._loop.add_reader(self._sock.fileno(), self._readable)

    # The end

    def _fail(self, error: AgentError, reason: str) -> None:
        """Say what was wrong, then close; nothing else is answered on this connection."""
        if self._closed or self._failing:
            return
        _log.debug("connection failed", peer=self.caller.detail, error=str(error))
        self._mid_since = 0.0
        self._loop.remove_reader(self._sock.fileno())
        self._withdraw()
        self._send_error(None, error)
        self._failing = reason
        self._close_if_done()

    def _withdraw(self) -> None:
        outstanding, self._outstanding = self._outstanding, {}
        for request in outstanding.values():
            self._server.engine.cancel(request)
        calls, self._calls = self._calls, {}
        for task in calls.values():
            task.cancel()

    def _close_if_done(self) -> None:
        if self._closed or self._out.size:
            return
        if self._failing:
            self.close(self._failing)
        elif self._finishing and not self._outstanding and not self._calls:
            self.close()

    def _release_budget(self) -> None:
        self._server.budget.give_back(self._reserved)
        self._reserved = 0


def _error(request_id: int | None, error: AgentError) -> list[Buffer]:
    return encode(error_header(request_id, error.code, str(error), retryable=error.retryable))


def _deadline_s(value: Any, default_ms: int) -> float:
    if value is None:
        return default_ms / 1000
    if type(value) not in (int, float) or not 0 < value <= DEADLINE_MS_MAX:
        raise InvalidInputError(f"'deadline_ms' must be a number above 0, at most {DEADLINE_MS_MAX}")
    return float(value) / 1000


def _text(header: dict[str, Any], name: str, *, optional: bool = False) -> str:
    value = header.get(name)
    if value is None and optional:
        return ""
    if not isinstance(value, str) or len(value) > _NAME_CHARS_MAX or not (value or optional):
        raise InvalidInputError(f"{name!r} must be a text of 1..{_NAME_CHARS_MAX} characters")
    return value
