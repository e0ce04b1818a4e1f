"""The life of a worker: load, say hello, serve until the daemon's channel closes.

One loop: receive what has arrived on any line, decide a batch, run it, answer everything in one write for each line.
Batches of a slow model run beside the loop (``execution.py``), while the next one is decoded. Once in each turn one
stream takes one step (``streams.py``).

Promises: each ``infer`` gets exactly one ``result`` or ``error``; one bad request fails alone; when the daemon closes
its side, what was received is still answered before the process leaves.
Leaves out: every decision (``batcher.py``), every byte (``channel.py``, ``requests.py``), and who may ask what
(``lines.py``).
"""

from __future__ import annotations

import ctypes
import gc
import select
import socket
import time
from collections.abc import Mapping, Sequence
from typing import Any, Final

from agent import log
from agent.errors import (
    AgentError,
    CanceledError,
    DeadlineError,
    DeviceLostError,
    FrameError,
    LoadError,
    NotFoundError,
    OutOfMemoryError,
    OverloadedError,
    SelfTestError,
    TooLargeError,
)
from agent.tensors import Array
from agent.wire import Frame, Limits, error_header
from agent.worker import golden, loading
from agent.worker import spec as specs
from agent.worker.batcher import Batcher, isolate
from agent.worker.channel import Channel
from agent.worker.execution import Execution
from agent.worker.lines import Grant, Lane, LaneBook, Line
from agent.worker.loading import Loaded
from agent.worker.measure import measure
from agent.worker.outputs import Outputs
from agent.worker.pieces import in_halves
from agent.worker.regions import Region, Regions
from agent.worker.requests import Answers, Request, budget_s, into_window, stacked
from agent.worker.reserve import Reserve
from agent.worker.streams import Streams

_log = log.get_logger("worker")
_WAITING_MAX: Final = 1024  # requests and bytes held here; the rest waits in the socket and in the daemon
_WAITING_BYTES_MAX: Final = 128 * 1024 * 1024
_REPORT_S: Final = 1.0  # how often at most the daemon is told of the lanes
_EXPIRE_S: Final = 0.05  # how often what waits on lanes behind a long batch is looked at
_BLOCKED_S_MAX: Final = 10.0  # an application that takes no answers for so long is cut
_STEPS_BESIDE_S: Final = 2.0  # how long streams go on beside one batch; longer, and nobody would notice that it hangs
_READS_MAX: Final = 32  # before a step; more than lies in the socket

Outcome = Mapping[str, Array] | AgentError
Part = tuple[Sequence[Request], Outcome]


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
    try:
        Server(loaded, channel).serve()
    except (FrameError, TooLargeError) as error:
        _log.error("the daemon broke the protocol", error=str(error))
        return 1
    except DeviceLostError as error:  # nothing this process still held would succeed: another worker answers it
        _log.error("the device is lost", error=str(error))
        return 1
    return 0


class Server:
    """The loop around one loaded model."""

    def __init__(self, loaded: Loaded, channel: Channel) -> None:
        spec = loaded.spec
        self._loaded = loaded
        self._signature = loaded.signature
        self._runtime = loaded.runtime
        self._outputs = Outputs(loaded.signature)
        self._forms = loaded.forms
        self._names = {"model": spec.model, "version": spec.version, "variant": spec.variant}
        self._answers = Answers(self._names, loaded.forms)
        self._regions = Regions()
        self._held_bytes = 0
        self._batcher: Batcher[Request] = Batcher(rows_max=loaded.signature.rows_max, delay_max_s=spec.batch_delay_s)
        self._reserve = Reserve(wanted=bool(spec.memory_bytes))
        self._rows_fit = loaded.signature.rows_max  # at once, as far as memory has shown; set where batches run
        self._wait_s = 0.0  # how long the batcher wants to wait for company
        self._undecoded = False  # there may be more to decode while a batch runs
        self._streams = Streams(loaded.handler, loaded.signature, loaded.runtime.run)
        self._execution: Execution[list[Request], list[Part]] = Execution(self._run)
        self._home = Line(channel)
        self._lanes: dict[int, Lane] = {}
        self._book: LaneBook | None = None
        self._report_at = 0.0
        self._expire_at = 0.0
        self._posted: set[Line] = set()  # with something to send
        self._poll = select.epoll()
        self._lines: dict[int, Line] = {}
        self._poll.register(self._execution.descriptor, select.EPOLLIN)
        self._add(self._home)
        channel.post(loaded.hello)
        self._posted.add(self._home)

    def serve(self) -> None:
        """Answer until the daemon has closed its side and nothing is left.

        Raises:
            FrameError: the daemon broke the protocol.
        """
        home, batcher, execution, lines = self._home, self._batcher, self._execution, self._lines
        while True:
            self._flush()
            if home.channel.closed and not batcher and execution.running is None and not self._lanes:
                self._streams.end(home, CanceledError("the worker leaves"))
                if self._book is not None and self._book.changed:
                    home.channel.post(self._book.report())
                _flush_all(home.channel)
                return
            if execution.running is not None and self._full():
                select.select((execution.descriptor,), (), ())  # the rest would be told again and again
            for descriptor, events in self._poll.poll(self._pause_s()):
                line = lines.get(descriptor)
                if descriptor == execution.descriptor:
                    self._finish_batch()
                elif line is None:
                    continue  # it was closed in this very turn
                elif events & ~select.EPOLLOUT:
                    self._receive(line)
                else:
                    self._posted.add(line)
            if batcher and execution.running is None and not home.channel.congested:
                self._turn()
            elif self._lanes and (batcher or self._streams.count):
                self._expire()
            if execution.running is not None:
                self._undecoded = batcher.prepare_next(time.monotonic(), self._prepare)
            if self._may_step():
                self._step()

    def _pause_s(self) -> float:
        """Return how long there is nothing to do but wait for something to arrive; -1: for ever."""
        wait_s = -1.0
        if self._batcher and self._execution.running is None and not self._home.channel.congested:
            wait_s, self._wait_s = self._wait_s, 0.0
        if self._lanes and (self._batcher or self._streams.count) and self._execution.running is not None:
            wait_s = _EXPIRE_S
        if self._may_step() or (self._undecoded and self._execution.running is not None):
            wait_s = 0.0
        if self._book is not None and (self._book.changed or self._blocked()):
            now = time.monotonic()
            if now >= self._report_at:
                self._report(now)
            until_report_s = max(0.0, self._report_at - now)
            wait_s = until_report_s if wait_s < 0 else min(wait_s, until_report_s)
        return 0.0 if self._posted else wait_s

    def _full(self) -> bool:
        """Whether nothing more is taken until a batch has been."""
        return len(self._batcher) >= _WAITING_MAX or self._held_bytes > _WAITING_BYTES_MAX

    def _may_step(self) -> bool:
        """Whether a stream may go on now."""
        streams, execution = self._streams, self._execution
        if not streams.count or not streams.ready:
            return False
        return execution.running is None or time.monotonic() - execution.since < _STEPS_BESIDE_S

    def _step(self) -> None:
        """Let one stream take one step, once all is known that the daemon has said of it."""
        for _ in range(_READS_MAX):
            if self._home.channel.closed or not self._receive(self._home):
                break
        line = self._streams.step()
        if line is not None:
            self._posted.add(line)

    # Lines

    def _add(self, line: Line) -> None:
        self._lines[line.channel.descriptor_number] = line
        line.interest = select.EPOLLIN
        self._poll.register(line.channel.descriptor_number, line.interest)

    def _flush(self) -> None:
        """Send what waits; listen to each line as far as it takes its answers."""
        posted, self._posted = self._posted, set()
        for line in posted:
            if line.gone:
                continue
            channel = line.channel
            channel.flush()
            interest = 0 if channel.closed or channel.congested else select.EPOLLIN
            if channel.pending:
                interest |= select.EPOLLOUT
            if interest != line.interest:
                self._listen(line, interest)
            if isinstance(line, Lane):
                self._look_after(line)

    def _listen(self, line: Line, interest: int) -> None:
        number = line.channel.descriptor_number
        if not interest:  # an end of stream cannot be masked
            self._poll.unregister(number)
        elif not line.interest:
            self._poll.register(number, interest)
        else:
            self._poll.modify(number, interest)
        line.interest = interest

    def _receive(self, line: Line) -> bool:
        """Take what has arrived with one read; return whether there may be more.

        The daemon is always heard: it bounds what it hands over, and what it says of lanes may not wait for them.
        Handling one frame may receive more of them; each line's are handled in their order all the same.
        """
        if line is not self._home and self._full():
            return False
        arrived = line.arrived
        try:
            arrived.extend(line.channel.receive())
            now = time.monotonic()
            if isinstance(line, Lane):
                if not line.channel.filling:
                    line.forget_arriving()
                while arrived:
                    self._take_from_lane(line, arrived.popleft(), now)
            else:
                while arrived:
                    self._take(arrived.popleft(), now)
        except (FrameError, TooLargeError, OverloadedError, MemoryError) as error:
            if not isinstance(line, Lane):
                raise
            line.post_error(None, error if isinstance(error, AgentError) else OutOfMemoryError("no memory for this"))
            self._drop(line)
            return False
        if line.channel.closed:
            self._posted.add(line)  # to stop listening
            if line is self._home:
                for lane in list(self._lanes.values()):
                    self._revoke(lane)
        return not line.channel.drained and not line.channel.closed

    # Lanes

    def _grant(self, header: Mapping[str, Any]) -> None:
        descriptor = self._home.channel.descriptor()
        if descriptor < 0:
            self._home.channel.post({"kind": "lane_closed", "lane": header.get("lane")})
            self._posted.add(self._home)
            return
        sock = socket.socket(fileno=descriptor)
        try:
            grant = Grant.parse(header)
            bounds_s = [float(bound) for bound in header["bounds_s"]]
        except (KeyError, TypeError, ValueError) as error:
            sock.close()
            raise FrameError(f"a lane's grant is malformed: {error}") from error
        if self._book is None:
            self._book = LaneBook(bounds_s)
        lane = Lane(grant, sock, self._loaded.spec.wire, self._book, self._names)
        self._lanes[lane.number] = lane
        self._add(lane)

    def _revoke(self, lane: Lane) -> None:
        """Let nothing more arrive; what had arrived is answered."""
        if lane.leaving:
            return
        lane.leaving = True
        lane.channel.post({"kind": "bye"})
        lane.channel.refuse_more()
        while not lane.gone and not lane.channel.closed and not self._full():
            self._receive(lane)
        self._posted.add(lane)

    def _look_after(self, lane: Lane) -> None:
        """Close a lane that is done with; note one that takes no answers."""
        lane.watch(time.monotonic())
        if lane.channel.pending:
            return
        if lane.channel.closed and not (lane.leaving and lane.outstanding):
            self._drop(lane)

    def _blocked(self) -> bool:
        return any(lane.blocked_since for lane in self._lanes.values())

    def _drop(self, lane: Lane) -> None:
        """End a lane: what it still wanted is withdrawn."""
        if lane.gone:
            return
        lane.channel.flush()
        lane.forget_arriving()
        lane.arrived.clear()
        lane.regions.clear()
        lane.gone = True
        now = time.monotonic()
        for request in self._batcher.withdraw(lambda request: request.line is lane):
            self._held_bytes -= len(request.body)
            lane.settled(request, CanceledError.code, now)
        self._streams.end(lane, CanceledError("nobody waits for it"))
        del self._lanes[lane.number]
        del self._lines[lane.channel.descriptor_number]
        if lane.interest:
            self._poll.unregister(lane.channel.descriptor_number)
        lane.channel.close()
        self._home.channel.post({"kind": "lane_closed", "lane": lane.number})
        self._posted.add(self._home)

    def _report(self, now: float) -> None:
        """Tell the daemon what the lanes did; end those that take nothing."""
        assert self._book is not None
        self._report_at = now + _REPORT_S
        for lane in list(self._lanes.values()):
            if lane.blocked_since and now - lane.blocked_since > _BLOCKED_S_MAX:
                self._drop(lane)
        if self._book.changed:
            self._home.channel.post(self._book.report())
            self._posted.add(self._home)
            self._flush()

    def _take_from_lane(self, lane: Lane, frame: Frame, now: float) -> None:
        header, kind = frame.header, frame.header["kind"]
        if frame.id is None:
            raise FrameError(f"{kind[:32]!r} needs an 'id'")
        if kind == "infer":
            request = self._request(lane, frame, now)
            if request is not None and (request.layout is None and _names_regions(header)):
                try:
                    request.regions = self._named_in(lane, header)
                except AgentError as error:
                    self._finish_request(request, error)
                    return
            if request is not None:
                self._queue(request)
        elif kind == "cancel":
            self._cancel(lane, frame.id)
        else:
            raise FrameError(f"kind {kind[:32]!r} is not for a lane")

    def _named_in(self, lane: Lane, header: Mapping[str, Any]) -> dict[int, Region]:
        """Return the regions a lane's request names, those that are not lent left out: decoding tells of them."""
        entries = header.get("tensors")
        places = (*(entries if isinstance(entries, list) else ()), header.get("reply"))
        numbers = {
            place.get("region") for place in places if isinstance(place, dict) and type(place.get("region")) is int
        }
        while not numbers <= lane.regions.keys() and self._receive(self._home):
            pass  # the daemon said so before its client asked, on another socket
        return {number: lane.regions[number] for number in numbers if number in lane.regions}

    # Requests

    def _take(self, frame: Frame, now: float) -> None:
        """Handle one frame of the daemon."""
        header, kind = frame.header, frame.header["kind"]
        if kind == "infer":
            request = self._request(self._home, frame, now)
            if request is None:
                return
            shared = header.get("shared")
            if shared is not None:
                try:
                    self._share(request, shared)
                except FrameError:
                    raise
                except AgentError as error:
                    self._finish_request(request, error)
                    return
            self._queue(request)
        elif kind == "attach":
            self._regions.attach(header, self._home.channel.descriptor())
        elif kind == "detach":
            self._regions.detach(header)
        elif kind == "lane":
            self._grant(header)
        elif kind in ("lend", "unlend", "revoke"):
            self._change_lane(kind, header)
        elif frame.id is None:
            raise FrameError(f"a frame of kind {kind!r} without an id")
        elif kind == "cancel":
            self._cancel(self._home, frame.id)
        elif kind in ("pause", "resume"):
            self._streams.pace(frame.id, self._home, paused=kind == "pause")
        elif kind == "call":
            self._call(frame.id, header)
        else:
            raise FrameError(f"a worker takes no frame of kind {kind!r}")

    def _change_lane(self, kind: str, header: Mapping[str, Any]) -> None:
        lane = self._lanes.get(header.get("lane", -1))
        if lane is None:  # it has left
            return
        if kind == "lend":
            try:
                region = self._regions.find(header["region"])
            except FrameError:
                raise
            except AgentError:  # it could not be mapped: who names it is refused
                return
            lane.name(int(header["as"]), region)
        elif kind == "unlend":
            lane.regions.pop(header.get("as", -1), None)
        else:
            self._revoke(lane)

    def _request(self, line: Line, frame: Frame, now: float) -> Request | None:
        """Return an admitted request; a bad one is answered here."""
        header, request_id = frame.header, frame.id
        if request_id is None:
            raise FrameError("'infer' needs an 'id'")
        try:
            asked = header.digest or self._forms.asked(header)
            deadline_s = budget_s(frame.deadline_ms, line.default_s)
            request = Request(header, frame.body, request_id, deadline_s, now, asked=asked, line=line)
            line.admit(request)
        except AgentError as error:
            line.refused(error.code)
            line.post_error(request_id, error)
            self._posted.add(line)
            return None
        self._held_bytes += len(request.body)
        return request

    def _queue(self, request: Request) -> None:
        """Let an admitted request wait for its batch, or for the steps of its stream."""
        if not request.streamed:
            self._batcher.add(request)
            return
        try:
            self._streams.add(request)
        except AgentError as error:
            self._finish_request(request, error)
        else:
            self._held_bytes -= len(request.body)  # it counts there

    def _cancel(self, line: Line, request_id: int) -> None:
        """Withdraw what has not begun; a stream ends where it stands."""
        if self._streams.count and self._streams.cancel(request_id, line):
            self._posted.add(line)
            return
        for request in self._batcher.withdraw(lambda one: one.line is line and one.id == request_id):
            self._finish_request(request, CanceledError("withdrawn before it started"))

    def _share(self, request: Request, shared: Mapping[str, Any]) -> None:
        """Give the request the shared memory that the daemon named for it."""
        regions = self._regions
        if "regions" in shared:
            request.regions = regions.named(shared["regions"])
        if "body" in shared:
            request.body = regions.part(*shared["body"])
            self._held_bytes += len(request.body)
        if "answer" in shared:
            request.window = regions.part(*shared["answer"])

    def _turn(self) -> None:
        """Begin one batch, or note how long the batcher wants to wait for company."""
        batcher, now = self._batcher, time.monotonic()
        batch, expired = batcher.take(now, self._prepare, closing=self._home.channel.closed)
        for request in expired:
            self._finish_request(request, DeadlineError("the deadline passed while it waited in the worker"))
        if not batch:
            due = batcher.due()
            self._wait_s = max(0.0, due - now) if due is not None else 0.0
            return
        outcomes = self._execution.start(batch)
        if outcomes is not None:
            self._adapt()
            self._answer_all(outcomes)

    def _finish_batch(self) -> None:
        """Begin the next batch, then answer the one that is done."""
        _, outcomes = self._execution.finish()
        self._adapt()
        if self._batcher and not self._home.channel.congested:
            self._turn()
        self._answer_all(outcomes)

    def _expire(self) -> None:
        """Answer what expires while a long batch runs. For its own requests the daemon does that itself."""
        now = time.monotonic()
        if now < self._expire_at:
            return
        self._expire_at = now + _EXPIRE_S
        for request in self._batcher.withdraw(lambda one: one.deadline <= now and one.line is not self._home):
            self._finish_request(request, DeadlineError("the deadline passed while it waited in the worker"))
        self._posted.update(self._streams.expire(now))

    def _prepare(self, request: Request) -> bool:
        """Decode one request; a bad one is answered here."""
        try:
            request.prepare(self._signature)
            if request.deadline <= time.monotonic():
                raise DeadlineError("the deadline passed while it was decoded")
        except Exception as error:  # noqa: BLE001  a request may fail, the worker may not
            self._finish_request(request, _failure(error))
            return False
        return True

    def _run(self, batch: list[Request]) -> list[Part]:
        return list(isolate(batch, self._attempt))

    def _attempt(self, part: Sequence[Request]) -> Outcome | None:
        """Run requests together; ``None`` asks for halves."""
        try:
            if len(part) == 1:
                outputs = self._runtime.run(part[0].arrays())
                self._outputs.check(outputs)
                return outputs
            rows = sum(request.rows for request in part)
            outputs = self._runtime.run(stacked(part, rows))
            self._outputs.check(outputs)
            return outputs if all(len(array) == rows for array in outputs.values()) else None
        except DeviceLostError:
            raise
        except (OutOfMemoryError, MemoryError) as error:
            self._reserve.give()
            rows = sum(request.rows for request in part)
            self._rows_fit = min(self._rows_fit, max(1, rows // 2))
            if len(part) > 1:
                return None
            return self._in_halves(part[0], rows) if rows > 1 else _failure(error)
        except Exception as error:  # noqa: BLE001  as above
            return None if len(part) > 1 else _failure(error)

    def _in_halves(self, request: Request, rows: int) -> Outcome:
        try:
            outputs, fitted = in_halves(request.arrays(), rows, self._runtime.run)
            self._outputs.check(outputs)
        except DeviceLostError:
            raise
        except Exception as error:  # noqa: BLE001  as above
            return _failure(error)
        self._rows_fit = min(self._rows_fit, fitted)
        return outputs

    def _adapt(self) -> None:
        """Make no batch again of a size that memory did not suffice for; tell the daemon."""
        self._reserve.keep()
        if self._rows_fit < self._batcher.rows_max:
            self._batcher.shrink(self._rows_fit)
            self._home.channel.post({"kind": "shrunk", "rows_max": self._rows_fit})
            self._posted.add(self._home)

    # Answers

    def _answer_all(self, parts: Sequence[Part]) -> None:
        for part, outcome in parts:
            self._answer(part, outcome)

    def _answer(self, part: Sequence[Request], outcome: Outcome) -> None:
        if isinstance(outcome, AgentError):
            for request in part:
                self._finish_request(request, outcome)
            return
        frames = self._packed(part, outcome)
        if frames is None:
            self._answer_each(part, outcome)
            return
        now = time.monotonic() if self._lanes else 0.0
        for request, frame in zip(part, frames, strict=True):
            line = request.line
            self._held_bytes -= len(request.body)
            line.settled(request, "ok", now)
            if not line.gone:
                line.channel.post_whole(frame)
                self._posted.add(line)

    def _packed(self, part: Sequence[Request], outcome: Mapping[str, Array]) -> list[bytes] | None:
        if any(request.layout is None for request in part):
            return None
        return self._answers.frames(part, outcome)

    def _answer_each(self, part: Sequence[Request], outcome: Mapping[str, Array]) -> None:
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
                if not request.line.gone:
                    request.line.post_result(request.id, fields, body)
            except Exception as error:  # noqa: BLE001  as above
                self._finish_request(request, _failure(error))
            else:
                self._held_bytes -= len(request.body)
                request.line.settled(request, "ok", time.monotonic())
                self._posted.add(request.line)

    def _finish_request(self, request: Request, error: AgentError) -> None:
        """Refuse a request that was admitted."""
        line = request.line
        self._held_bytes -= len(request.body)
        line.settled(request, error.code, time.monotonic())
        if not line.gone:
            line.post_error(request.id, error)
            self._posted.add(line)

    def _call(self, request_id: int, header: Mapping[str, Any]) -> None:
        method = header.get("method")
        running = self._execution.running is not None
        value: dict[str, Any] = {"ok": True, "running_s": time.monotonic() - self._execution.since if running else 0.0}
        if method == "selftest":
            value = self._self_test(header.get("entry"))
        elif method == "measure":
            value = self._measure(header.get("budget_ms"))
        elif method != "ping":
            self._home.post_error(request_id, NotFoundError(f"a worker has no method {method!r}"))
            self._posted.add(self._home)
            return
        self._home.channel.post({"kind": "reply", "id": request_id, "value": value})
        self._posted.add(self._home)

    def _self_test(self, entry: object) -> dict[str, Any]:
        """Run the golden inputs, or only the one in the place ``entry``, so that a request need not wait for all."""
        goldens = self._loaded.goldens
        chosen = goldens[entry : entry + 1] if isinstance(entry, int) and entry >= 0 else goldens
        try:
            reports = [golden.check(one, self._outputs.checked_run(self._runtime.run)) for one in chosen]
        except DeviceLostError:
            raise
        except Exception as error:  # noqa: BLE001  as above
            failure = _failure(error)
            return {"ok": False, "golden": [], "code": failure.code, "message": str(failure)}
        value: dict[str, Any] = {"ok": True, "golden": reports}
        bad = next((report for report in reports if not report["ok"]), None)
        if bad is not None:
            value |= {"ok": False, "code": SelfTestError.code, "message": bad["reason"]}
        return value

    def _measure(self, budget_ms: object) -> dict[str, Any]:
        goldens = self._loaded.goldens
        if not goldens:
            return {"ok": False, "message": "the bundle has no golden inputs to measure with"}
        budget_s = min(10.0, float(budget_ms) / 1000) if isinstance(budget_ms, int | float) else 0.0
        try:
            return {"ok": True, **measure(goldens, self._runtime.run, budget_s=budget_s)}
        except DeviceLostError:
            raise
        except Exception as error:  # noqa: BLE001  as above
            failure = _failure(error)
            return {"ok": False, "code": failure.code, "message": str(failure)}


def _names_regions(header: Mapping[str, Any]) -> bool:
    """Whether a lane's request wants shared memory; of a malformed header its decoding will tell."""
    entries = header.get("tensors")
    return "reply" in header or (
        isinstance(entries, list) and any(isinstance(entry, dict) and "region" in entry for entry in entries)
    )


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
            select.select((), (channel.descriptor_number,), ())
