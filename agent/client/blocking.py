"""The blocking client: one connection, one request at a time, reconnecting by itself."""

from __future__ import annotations

import array
import socket
import struct
import threading
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from itertools import count
from os import PathLike
from types import TracebackType
from typing import Any, Final, Self

from agent.client.bounds import READ_BYTES, SEND_BUFFER_BYTES, lane_wait_s, reconnects, restarting, wait_s
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
from agent.errors import AgentError, DeadlineError, FrameError, UnavailableError
from agent.tensors import Array
from agent.wire import FIRST_ID, RESULT_LEAD, Buffer, Decoder, Frame

_TIMEVAL: Final = struct.Struct("ll")


class Client:
    """A connection to ``inferd``, opened at the first request and again when it broke.

    Threads may share a client: their requests go one after the other. For parallel requests take one client per
    thread, or ``AsyncClient``. After ``os.fork`` the child needs a client of its own.

    A request whose connection breaks before it is answered is sent again, at most ``retries`` times: it may then run
    twice. Set ``retries=0`` for a model where that matters.

    Large arrays go through shared memory by themselves, copied once; arrays over a ``region`` are not copied at all.

    With ``lanes`` the client asks the daemon for a socket straight to each model's worker. Requests go through the
    daemon wherever it gives none (it says why in its log), and whenever a lane ends.

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
        self._lock = threading.Lock()
        self._ids = count(FIRST_ID)
        self._frames = InferFrames()
        self._lanes: Lanes[_Lane] = Lanes(enabled=lanes)
        self._sock: socket.socket | None = None
        self._decoder = Decoder(ANSWER_LIMITS, repeats=RESULT_LEAD)
        self._wait_s = 0.0  # the socket's present timeout
        self._memory = SharedMemory(self._detach)

    def infer(
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
        """Run ``model`` on tensors.

        Args:
            model: Its name on this box.
            inputs: Arrays by input name; the worker checks them against the model's signature.
            version: Only this version may answer; by default the active one does.
            deadline_ms: Until the answer, queue time included (milliseconds); default: the daemon's.
            outputs: Which outputs to return; default: all.
            priority: Passed on to the model's queue.
            params: Passed on to the model's handler.
            reply: Where outputs are written if they fit; the result's arrays then lie there, valid until the region's
                next use.

        Raises:
            AgentError: the class of the daemon's error code, e.g. ``UnknownModelError``, ``TensorError``,
                ``OverloadedError``.
            UnavailableError: no daemon there, or the connection broke more than ``retries`` times.
            DeadlineError: no answer in time.
        """

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
            frame = self._ask(build, deadline_ms, self._retries, plan, (model, version or None))
            if plan is None and len(frame.body) <= STAGED_BYTES_MIN:
                return result_of(frame)
            return tensors_of(frame, model, plan, self._memory)
        except StagingRefusedError:
            self._memory.refused()
        except BaseException:
            self._memory.failed(plan)
            raise
        self._memory.failed(plan)
        return self.infer(
            model,
            inputs,
            version=version,
            deadline_ms=deadline_ms,
            outputs=outputs,
            priority=priority,
            params=params,
            reply=reply,
        )

    def region(self, nbytes: int) -> Region:
        """Return memory shared with the models' workers; close it, or use it in a ``with`` block.

        Raises:
            AgentError: the daemon does not take it, e.g. ``OverloadedError`` above its bounds.
            UnavailableError: no daemon there.
        """
        region = self._memory.region(nbytes)
        try:
            with self._lock:
                self._attach_first(region)
        except BaseException:
            region.close()
            raise
        return region

    def predict(
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
        """Let the model's handler decode ``body`` (a file, a text, …) and answer; raises as ``infer``."""

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

        return result_of(self._ask(build, deadline_ms, self._retries, None, (model, version or None)))

    def stream(
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
    ) -> Generator[Part, None, None]:
        """Yield the parts of an answer as they come; of a model whose handler streams.

        The request leaves when the first part is asked for, on a connection of its own, so other requests can be made
        meanwhile. Leaving the loop early, or ``close()``, ends the work at the daemon. It is asked again when the
        connection breaks before the first part, and never after it.

        Args:
            model: Its name on this box.
            inputs: Tensors by input name, or a body that the model's handler decodes.
            content_type: Of such a body.
            version: Only this version may answer; by default the active one does.
            deadline_ms: Until the last part, queue time included (milliseconds); default: the daemon's.
            outputs: Which outputs to return, of parts that are tensors; default: all.
            priority: Passed on to the model's queue.
            params: Passed on to the model's handler.

        Raises:
            StreamUnsupportedError: the model answers whole.
            AgentError: as ``infer``, also after some parts.
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
        own = Client(self._path, connect_timeout_s=self._connect_timeout_s, retries=self._retries)
        return own._parts(frame, request_id, wait_s(deadline_ms, self._timeout_s))

    def call(self, method: str, args: Mapping[str, Any] | None = None, *, deadline_ms: float | None = None) -> Any:
        """Return the value of a management verb. It is not repeated when the connection breaks.

        Raises:
            AgentError: as ``infer``; ``ForbiddenError`` without the role the verb needs.
        """
        return value_of(self._ask(lambda request_id: call_frame(request_id, method, args, deadline_ms), deadline_ms, 0))

    @contextmanager
    def hold(self, model: str = "*", *, reason: str = "") -> Iterator[Hold]:
        """Keep new versions of ``model`` (``*``: of any) from being loaded as long as the body runs.

        On a connection of its own. Deployments wait no longer than the daemon's [deploy] force_after_s and
        hold_limit_s; ``reason`` tells people why. It ends with the daemon, too: ``Hold.lasts``.

        Raises:
            NotFoundError: no such model.
            OverloadedError: too many applications hold models.
            UnavailableError: no daemon there.
        """
        with Client(self._path, connect_timeout_s=self._connect_timeout_s, retries=0) as own:
            value = own.call("hold", {"model": model, "reason": reason})
            yield Hold(value["model"], value["under_way"], own._is_open)

    def _is_open(self) -> bool:
        """Whether the connection stands; only for one that nothing is asked on."""
        try:
            return self._sock is not None and bool(self._sock.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT))
        except BlockingIOError:
            return True
        except OSError:
            return False

    def status(self) -> Any:
        """Return the daemon's status."""
        return value_of(self._ask(lambda request_id: call_frame(request_id, "status", None, None), None, self._retries))

    def close(self) -> None:
        """Close the connection; the next request opens a new one."""
        with self._lock:
            self._disconnect()
        self._memory.close_staging()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # Inside

    def _ask(
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
        with self._lock:
            lane = self._lane(target) if target is not None else None
            if lane is not None:
                lane_patience_s = lane_wait_s(deadline_ms, self._timeout_s)
                answer = self._ask_on_lane(lane, frame, request_id, lane_patience_s, plan)
                if answer is not None:
                    return answer
                if not lane.unsent:
                    if not retries:
                        raise UnavailableError(f"the direct lane to {lane.target[0]} broke")
                    retries -= 1
            while True:
                reused = self._sock is not None
                sock = self._connected(patience_s)
                try:
                    if plan is not None:
                        self._attach_all(sock, plan)
                    return self._exchange(sock, frame, request_id)
                except BlockingIOError as error:  # the socket's timeout
                    self._disconnect()
                    raise DeadlineError(f"no answer within {patience_s} s") from error
                except OSError as error:
                    self._disconnect()
                    if reused and isinstance(error, _UnsentError):
                        continue  # it ended while it idled, and nothing ran: no retry is used up
                    if not retries:
                        raise UnavailableError(f"the connection to {self._path} broke: {error}") from error
                    retries -= 1
                except BaseException:  # also an interrupt: what arrives next would belong to this request
                    self._disconnect()
                    raise

    def _parts(self, request: list[Buffer], request_id: int, patience_s: float) -> Generator[Part, None, None]:
        """Yield the parts of one answer; the connection belongs to it alone, and its end withdraws the request."""
        part: Part | None = None
        retries = self._retries
        try:
            while True:
                try:
                    for frame in self._answers(self._connected(patience_s), request, request_id):
                        part = part_of(frame, part)
                        if part is None:
                            return
                        yield part
                except BlockingIOError as error:  # the socket's timeout
                    raise DeadlineError(f"nothing came for {patience_s} s") from error
                except OSError as error:
                    self._disconnect()
                    if part is not None or not retries:
                        raise UnavailableError(f"the connection to {self._path} broke: {error}") from error
                    retries -= 1
        finally:
            self._disconnect()

    def _answers(self, sock: socket.socket, request: list[Buffer], request_id: int) -> Iterator[Frame]:
        """Send a request and yield what answers it."""
        with suppress(ConnectionError):  # the daemon closed on us: it may have said why
            _send_all(sock, request)
        while True:
            for frame in _read(sock, self._decoder):
                if frame.id == request_id:
                    yield frame
                elif frame.header["kind"] == "error" and frame.id is None:
                    raise error_of(frame)

    def _lane(self, target: Target) -> _Lane | None:
        """Return the model's lane, asking for one if it is time to."""
        lane = self._lanes.get(target)
        if lane is not None or not self._lanes.wanted(target, time.monotonic()):
            return lane
        request_id = next(self._ids)
        try:
            sock = self._connected(self._timeout_s)
            _send_all(sock, lane_frame(request_id, *target))
            value, passed = self._receive_with_socket(sock, request_id)
        except AgentError:  # refused; or no daemon, which the request itself will find out
            self._lanes.refused(target, time.monotonic())
            return None
        except OSError as error:
            self._disconnect()
            if isinstance(error, BlockingIOError):  # the socket's timeout
                self._lanes.refused(target, time.monotonic())
            return None
        except BaseException:
            self._disconnect()
            raise
        lane = _Lane(passed, target, int(value["lane"]))
        self._lanes.add(target, lane)
        return lane

    def _receive_with_socket(self, sock: socket.socket, request_id: int) -> tuple[Any, socket.socket]:
        """Return the value of a reply and the socket that came with it."""
        passed: list[int] = []
        while True:
            data, descriptors, _, _ = socket.recv_fds(sock, READ_BYTES, 1, socket.MSG_CMSG_CLOEXEC)
            passed += descriptors
            if not data:
                raise ConnectionResetError("closed by the daemon")
            for frame in self._decoder.feed(data):
                if frame.id != request_id:
                    continue
                value = value_of(frame)
                if len(passed) != 1:
                    raise FrameError("a lane came without its socket")
                return value, socket.socket(fileno=passed[0])

    def _ask_on_lane(
        self, lane: _Lane, frame: list[Buffer], request_id: int, patience_s: float, plan: Plan | None
    ) -> Frame | None:
        """Return the answer of a model's worker; ``None`` if the lane has ended, ``lane.unsent`` says how."""
        try:
            if plan is not None:
                self._lend_all(lane, plan)
            return lane.ask(frame, request_id, patience_s)
        except BlockingIOError as error:  # the socket's timeout
            self._drop_lane(lane)
            raise DeadlineError(f"no answer within {patience_s} s") from error
        except OSError:
            self._drop_lane(lane)
            return None
        except BaseException:
            self._drop_lane(lane)
            raise

    def _drop_lane(self, lane: _Lane) -> None:
        lane.close()
        self._lanes.drop(lane.target, lane, time.monotonic(), farewell=lane.farewell or lane.unsent)

    def _lend_all(self, lane: _Lane, plan: Plan) -> None:
        """Let the lane's worker know the regions of a request."""
        unknown = [region for number, region in plan.regions.items() if number not in lane.known]
        if not unknown:
            return
        lane.unsent = True
        try:
            sock = self._connected(self._timeout_s)
            self._attach_all(sock, plan)
            for region in unknown:
                request_id = next(self._ids)
                value_of(self._exchange(sock, lend_frame(request_id, lane.number, region), request_id))
                lane.known.add(region.number)
        except AgentError as error:  # this worker cannot have them: no lane to it for a while
            self._lanes.refused(lane.target, time.monotonic())
            raise _UnsentError(str(error)) from error
        except OSError:
            self._disconnect()
            raise

    def _attach_all(self, sock: socket.socket, plan: Plan) -> None:
        """Let this connection know the regions of a request."""
        for region in plan.regions.values():
            try:
                self._attach(sock, region)
            except AgentError as error:
                if region is plan.staging:
                    raise StagingRefusedError from error
                raise

    def _attach_first(self, region: Region) -> None:
        """Attach a new region, on a new connection if the present one ended while it idled."""
        while True:
            reused = self._sock is not None
            try:
                self._attach(self._connected(self._timeout_s), region)
            except AgentError:
                raise
            except OSError as error:
                self._disconnect()
                if not reused:
                    raise UnavailableError(f"the connection to {self._path} broke: {error}") from error
            except BaseException:
                self._disconnect()
                raise
            else:
                return

    def _attach(self, sock: socket.socket, region: Region) -> None:
        if region.attached_to is not sock:
            request_id = next(self._ids)
            value_of(self._exchange(sock, attach_frame(request_id, region), request_id, region.descriptor))
            region.note_attached(sock)

    def _detach(self, region: Region) -> None:
        with self._lock:
            sock = self._sock
            if sock is None or region.attached_to is not sock:
                return
            request_id = next(self._ids)
            try:
                self._exchange(sock, detach_frame(request_id, region), request_id)
            except OSError:
                self._disconnect()  # which detaches too

    def _exchange(
        self, sock: socket.socket, frame: list[Buffer], request_id: int, descriptor: int | None = None
    ) -> Frame:
        try:
            if descriptor is not None:
                rights = array.array("i", [descriptor])
                sock.sendmsg(frame, [(socket.SOL_SOCKET, socket.SCM_RIGHTS, rights)])
            else:
                _send_all(sock, frame)
        except BlockingIOError:
            raise
        except OSError as error:  # the daemon closed on us: it may have said why
            with suppress(OSError):
                return self._receive(sock, request_id)
            raise _UnsentError(*error.args) from error
        return self._receive(sock, request_id)

    def _receive(self, sock: socket.socket, request_id: int) -> Frame:
        """Return the answer to ``request_id``; ``OSError`` if the connection ends before it is complete."""
        while True:
            for frame in _read(sock, self._decoder):
                if frame.id == request_id:
                    return frame
                if frame.header["kind"] == "error" and frame.id is None:
                    self._disconnect()
                    raise error_of(frame)

    def _connected(self, patience_s: float) -> socket.socket:
        if self._sock is None:
            self._sock = _connect(self._path, self._connect_timeout_s)
            self._decoder = Decoder(ANSWER_LIMITS, repeats=RESULT_LEAD)
            self._wait_s = 0.0
        if patience_s != self._wait_s:
            _set_timeout(self._sock, patience_s)
            self._wait_s = patience_s
        return self._sock

    def _disconnect(self) -> None:
        for lane in self._lanes:
            lane.close()
        self._lanes.clear()
        if self._sock is not None:
            self._sock.close()
            self._sock = None


class _Lane:
    """A socket straight to a model's worker."""

    def __init__(self, sock: socket.socket, target: Target, number: int) -> None:
        self.target = target
        self.number = number
        self.known: set[int] = set()  # regions the worker knows
        self.farewell = False  # the worker takes nothing more
        self.unsent = False  # the last request certainly did not arrive
        self._sock = sock
        self._decoder = Decoder(ANSWER_LIMITS, repeats=RESULT_LEAD)
        self._wait_s = 0.0

    def ask(self, frame: list[Buffer], request_id: int, patience_s: float) -> Frame:
        """Return the answer; ``OSError`` if the lane has ended, and ``unsent`` is set if nobody took the request."""
        if patience_s != self._wait_s:
            _set_timeout(self._sock, patience_s)
            self._wait_s = patience_s
        self.unsent = True
        try:
            _send_all(self._sock, frame)
        except BlockingIOError:
            raise
        except OSError as error:  # a worker that takes nothing more makes the send fail: no part of it will be run
            raise _UnsentError(*error.args) from error
        self.unsent = False
        while True:
            for answer in _read(self._sock, self._decoder):
                if answer.id == request_id:
                    return answer
                if answer.header["kind"] == "bye":
                    self.farewell = True
                elif answer.header["kind"] == "error" and answer.id is None:
                    raise error_of(answer)

    def close(self) -> None:
        """Close the socket; the worker forgets what was asked."""
        self._sock.close()


class _UnsentError(OSError):
    """The connection ended before the whole request had left: the daemon never saw it."""


def _read(sock: socket.socket, decoder: Decoder) -> Sequence[Frame]:
    """Return the frames that one read completed; ``OSError`` if the other side has closed."""
    body = decoder.body_buffer()
    if body is not None:
        received = sock.recv_into(body)
        if not received:
            raise ConnectionResetError("closed by the daemon")
        frame = decoder.body_filled(received)
        return () if frame is None else (frame,)
    data = sock.recv(READ_BYTES)
    if not data:
        raise ConnectionResetError("closed by the daemon")
    return decoder.feed(data)


def _connect(path: str, timeout_s: float) -> socket.socket:
    """Return a connected socket, waiting for a daemon that is (re)starting."""
    give_up = time.monotonic() + timeout_s
    backoff = reconnects()
    while True:
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER_BYTES)
            _set_timeout(sock, max(0.001, timeout_s))
            sock.connect(path)
        except OSError as error:
            sock.close()
            if not restarting(error) or time.monotonic() >= give_up:
                raise UnavailableError(f"cannot reach inferd at {path}: {error.strerror or error}") from error
        else:
            return sock
        time.sleep(backoff.next())


def _set_timeout(sock: socket.socket, seconds: float) -> None:
    """Bound each send and receive in the kernel: Python's own timeouts cost a poll() before every call."""
    value = _TIMEVAL.pack(int(seconds), int(seconds % 1 * 1e6))
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, value)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, value)


def _send_all(sock: socket.socket, parts: Sequence[Buffer]) -> None:
    views = [memoryview(part).cast("B") for part in parts if len(part)]
    while views:
        sent = sock.sendmsg(views)
        while views and sent >= len(views[0]):
            sent -= len(views.pop(0))
        if sent:
            views[0] = views[0][sent:]
