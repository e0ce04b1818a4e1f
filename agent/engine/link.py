"""The daemon's end of one worker's channel: frames out, coalesced; frames in, matched to their requests.

Synchronous by design: every method runs on the loop's thread and returns at once. Promises: each job given to
``send`` ends in exactly one ``on_answer`` or is handed back by ``on_death``; a job that is forgotten keeps its place
until the worker has answered it, so that what waits before a slow worker stays bounded; the shared memory of a job is
held until the worker has answered it or is dead; a worker has each region attached once, at its first use. Leaves out:
what to do about a death.
"""

from __future__ import annotations

import array
import asyncio
import contextlib
import math
import socket
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple

from agent.arena import SHARED_BYTES_MIN, Arena, Slot, slot_of
from agent.engine.job import Job
from agent.engine.lanes import Lane, too_many
from agent.engine.streams import Paused
from agent.engine.zygote import WorkerProcess
from agent.errors import AgentError, CanceledError, DeadlineError, FrameError, OverloadedError, TooLargeError
from agent.log import get_logger
from agent.regions import Region
from agent.wire import (
    INFER_LEAD,
    RESULT_LEAD,
    Buffer,
    Decoder,
    Frame,
    Header,
    Limits,
    encode_head,
    lead_frame,
    packed_pairs,
)

_log = get_logger("worker")
_RECEIVE_BYTES: Final = 1 << 18
_BUFFERS_MAX: Final = 512  # below IOV_MAX
_JOIN_BYTES_MAX: Final = 1 << 16  # below it one copy is cheaper than many buffers
_REPEATS_MAX: Final = 256  # kinds of answers that come again and again
_FORWARDED: Final = ("content_type", "params", "priority", "outputs", "tensors", "reply", "stream")
# A lone request for an idle worker is sent at once. Where there are more, those of a turn of the loop leave together: a
# send costs as much as three requests, and the worker makes one batch of them.
_ALONE_MAX: Final = 1.5
_COMPANY_WEIGHT: Final = 0.1
_LANES_IN_USE_S: Final = 3.0  # a worker tells once a second while there is anything to tell
_ANSWERS: Final = frozenset({"result", "error"})
_NOT_BEGUN: Final = frozenset({CanceledError.code, DeadlineError.code})  # answers that no run of the model has given


class Passing(NamedTuple):
    """A frame that a descriptor goes with."""

    head: bytes
    descriptor: int
    release: Callable[[], None]


class WorkerLink:
    """One worker: its process, its channel and the jobs it holds."""

    def __init__(
        self,
        process: WorkerProcess,
        *,
        limits: Limits,
        arena: Arena,
        regions_max: int,
        on_answer: Callable[[Job | None, Header, Buffer], None],
        on_part: Callable[[Job, Header, Buffer], None],
        on_frame: Callable[[WorkerLink, Frame], None],
        on_death: Callable[[WorkerLink], None],
    ) -> None:
        self.process = process
        self.hello: dict[str, Any] = {}
        self.jobs: dict[int, Job] = {}
        self.held_bytes = 0  # bodies of all that is owed
        self.lanes: dict[int, Lane] = {}
        self.lanes_told_at = -math.inf  # loop seconds of when the worker last told of answers on them
        self.lanes_waiting = 0  # requests that waited on them then
        self.running_s = 0.0  # how long its batch had been running at the last ping
        self.owed: dict[int, int] = {}  # jobs handed over and not answered, forgotten ones included: their body's bytes
        self.ready_at = 0.0  # loop seconds
        self._heard_at = 0.0  # loop seconds of the last answer or part, or of the first job after a pause
        self._answered_at = 0.0  # loop seconds of the last answer to a job that waited for it whole
        self.alive = True
        self.gone = asyncio.Event()
        self.scratch: Path | None = None  # removed by whoever buries the worker
        self.cores: tuple[int, ...] = ()  # given back likewise
        self._on_answer = on_answer
        self._on_part = on_part
        self._paused = Paused()
        self._wishes: dict[int, bool] = {}  # to pause or not, by job number, until the worker takes more
        self._on_frame = on_frame
        self._on_death = on_death
        self._loop = asyncio.get_running_loop()
        self._decoder = Decoder(limits, repeats=RESULT_LEAD, repeats_max=_REPEATS_MAX)
        self._out: list[Buffer] = []
        self._out_bytes = 0
        self._passing: deque[Passing] = deque()  # the frames of ``_out`` that a descriptor goes with
        self._sent_all: list[Callable[[], None]] = []  # who waits until ``_out`` is empty
        self._pinned: dict[Region, int] = {}  # how many lanes name a region: it stays attached
        self._pinged = 0.0  # loop seconds of the last ping
        self._attached: dict[Region, None] = {}  # what the worker has mapped, the longest unused first
        self._regions_max = regions_max
        self._lent: dict[int, tuple[list[Region], Slot | None]] = {}  # by job number, until answered; and the window
        self._arena = arena
        self._answer_bytes = 0  # of the last answer, if it was large: the next one gets a window
        self._flushing = False
        self._company = 1.0  # requests that a new one finds with the worker, itself included; averaged
        self._writing = False
        self._loop.add_reader(process.channel.fileno(), self._on_readable)
        self._loop.add_reader(process.pidfd, self._on_exit)

    def send(self, job: Job, deadline_ms: int) -> None:
        """Hand ``job`` to the worker under the job's number."""
        self.jobs[job.number] = job
        idle = not self.owed
        self._expect_word()
        body, asked = job.request.body, job.request.header
        self.owed[job.number] = job.body_bytes
        self.held_bytes += job.body_bytes
        if job.regions or job.body_bytes > SHARED_BYTES_MIN or self._answer_bytes:
            header = {"kind": "infer", "id": job.number, "deadline_ms": deadline_ms}
            header.update((name, asked[name]) for name in _FORWARDED if asked.get(name) is not None)
            body = self._share(job, header)
            self.post(header, body)
            return
        if asked.pairs is None:
            asked.pairs = packed_pairs(asked, _FORWARDED)
        self._post(lead_frame(INFER_LEAD, job.number, asked.pairs, len(body), deadline_ms), body)
        self._company += (len(self.owed) - self._company) * _COMPANY_WEIGHT
        if idle and self._company < _ALONE_MAX and not self._writing:
            self._flush()

    def post(self, header: dict[str, Any], body: Buffer = b"") -> bytes:
        """Queue one frame and return its head; all frames of a loop turn leave in one system call."""
        head = encode_head(header, len(body))
        self._post(head, body)
        return head

    def _post(self, head: bytes, body: Buffer) -> None:
        self._out.append(head)
        self._out_bytes += len(head)
        if body:
            self._out.append(body)
            self._out_bytes += len(body)
        if not self._flushing and not self._writing:
            self._flushing = True
            self._loop.call_soon(self._flush)

    def forget(self, job: Job) -> None:
        """Stop waiting for ``job``: its late answer will be given to ``on_answer`` without it."""
        self.jobs.pop(job.number, None)
        if job.number in self._paused:
            self._expect_word()
            del self._paused[job.number]

    def pace(self, job: Job, *, paused: bool) -> None:
        """Ask the worker to hold a stream, or to go on with it; nothing is sent unless that is new.

        Of what is asked while the worker takes nothing only the last counts.
        """
        if not self._writing:
            self._tell_pace(job.number, paused=paused)
            return
        if not self._wishes:
            self._sent_all.append(self._tell_wishes)
        self._wishes[job.number] = paused

    def _tell_wishes(self) -> None:
        wishes, self._wishes = self._wishes, {}
        for number, paused in wishes.items():
            if number in self.jobs:
                self._tell_pace(number, paused=paused)

    def _tell_pace(self, number: int, *, paused: bool) -> None:
        if not paused:
            self._expect_word()
        if self._paused.ask(number, paused=paused):
            self.post({"kind": "pause" if paused else "resume", "id": number})

    def region_gone(self, region: Region) -> None:
        """Let the worker unmap a region that ends, see ``regions.RegionUser``."""
        if region in self._attached:
            del self._attached[region]
            self.post({"kind": "detach", "region": region.number})

    def silent_s(self, now: float) -> float:
        """Return for how long the worker has owed an answer and given none that its model made (seconds).

        Paused streams are not owed.
        """
        return now - self._heard_at if len(self.owed) > len(self._paused) and self.alive else 0.0

    def queued_s(self, since: float) -> float:
        """Return how long a job has certainly queued in the worker (seconds).

        Of the jobs handed over from ``since`` on the oldest unanswered one counts: when the worker last answered, it
        had waited for so long and was not part of what was answered. A slow model alone delays nobody by this measure,
        nor does a stream count, which takes its time.
        """
        for job in self.jobs.values():
            if job.dispatched >= since and not job.begun:
                return max(0.0, self._answered_at - job.dispatched)
        return 0.0

    @property
    def unsent_bytes(self) -> int:
        """What the worker has not taken yet."""
        return self._out_bytes

    def lanes_in_use(self, now: float) -> bool:
        """Whether the worker has just answered on its direct lanes."""
        return now - self.lanes_told_at < _LANES_IN_USE_S

    def kill(self) -> None:
        """SIGKILL the worker; ``on_death`` follows."""
        self.process.kill()

    def give_up(self) -> None:
        """Take the worker for gone although the kernel does not let it end: a driver holds it. It runs no more."""
        self._on_exit()

    def hang_up(self) -> None:
        """Close our direction of the channel: the worker finishes what it holds, then leaves; ``gone`` is set."""
        with contextlib.suppress(OSError):
            self.process.channel.shutdown(socket.SHUT_WR)

    def _expect_word(self) -> None:
        """Something is owed from now on; if nothing was until now, the worker may have been silent for long."""
        if len(self.owed) == len(self._paused):
            self._heard_at = self._loop.time()

    # Lanes

    def pass_on(self, header: dict[str, Any], descriptor: int, release: Callable[[], None]) -> None:
        """Queue one frame that a descriptor goes with; ``release`` is called when it is sent or never will be."""
        if not self.alive:
            release()
            return
        self._passing.append(Passing(self.post(header), descriptor, release))

    def when_sent(self, done: Callable[[], None]) -> None:
        """Call ``done`` when all that is queued so far is with the worker's kernel."""
        self._sent_all.append(done)
        if not self._writing:
            self._flush()

    def pin(self, region: Region) -> None:
        """Keep a region attached until a matching ``unpin``.

        Raises:
            OverloadedError: half of what may be attached is pinned; the rest is for requests of the daemon.
        """
        if region not in self._pinned and len(self._pinned) >= self._regions_max // 2:
            raise too_many(len(self._pinned))
        region.hold()
        self._pinned[region] = self._pinned.get(region, 0) + 1
        self._use(region)

    def unpin(self, region: Region) -> None:
        """See ``pin``."""
        left = self._pinned[region] - 1
        if left:
            self._pinned[region] = left
        else:
            del self._pinned[region]
        region.release()

    def ping(self, number: int, *, every_s: float) -> None:
        """Ask whether the worker is alive, at most every so often; it owes the answer like any other.

        Requests on lanes are not known here, so a worker that hangs on one is found out by this.
        """
        now = self._loop.time()
        if len(self.owed) == len(self._paused) and now - self._pinged >= every_s:
            self._pinged = self._heard_at = now
            self.owed[number] = 0
            self.post({"kind": "call", "id": number, "method": "ping"})

    def _detach(self) -> None:
        channel = self.process.channel.fileno()
        self._loop.remove_reader(channel)
        if self._writing:
            self._loop.remove_writer(channel)
        self._loop.remove_reader(self.process.pidfd)

    def _share(self, job: Job, header: dict[str, Any]) -> Buffer:
        """Name in the header what the worker gets by reference; return the body that is still to be sent."""
        request, window = job.request, None
        body: Buffer = request.body
        shared: dict[str, Any] = {}
        lent: list[Region] = []
        if job.regions:
            shared["regions"] = [(named, region.number) for named, region in job.regions]
            for _, region in job.regions:
                region.hold()
                lent.append(region)
        if job.body_bytes > SHARED_BYTES_MIN:
            slot = slot_of(body)
            if slot is not None:
                slot.hold()
            else:
                slot = self._arena.take(request.model, job.body_bytes)
                if slot is not None:
                    place = slot.lease(job.body_bytes)
                    place[:] = body
                    request.body = place  # equal bytes, for a retry
            if slot is not None:
                shared["body"] = (slot.number, 0, job.body_bytes)
                lent.append(slot)
                body = b""
        if self._answer_bytes and "reply" not in header:
            window = self._arena.take(request.model, self._answer_bytes)
            if window is not None:
                shared["answer"] = (window.number, 0, window.nbytes)
                lent.append(window)
        if lent:
            for region in lent:
                self._use(region, beside=lent)
            header["shared"] = shared
            self._lent[job.number] = (lent, window)
        return body

    def _use(self, region: Region, *, beside: Sequence[Region] = ()) -> None:
        """Make sure the worker has the region mapped, together with those ``beside`` it."""
        if region in self._attached:
            del self._attached[region]
        else:
            self._attach(region, beside)
        self._attached[region] = None

    def _attach(self, region: Region, beside: Sequence[Region]) -> None:
        if len(self._attached) >= self._regions_max:
            # requests that use it keep it mapped in the worker until they end
            kept = {*beside, *self._pinned}
            oldest = next((one for one in self._attached if one not in kept), None)  # none: one request needs so many
            if oldest is not None:
                del self._attached[oldest]
                oldest.users.discard(self)
                self.post({"kind": "detach", "region": oldest.number})
        region.users.add(self)
        region.hold()  # until its descriptor is sent
        header = {"kind": "attach", "region": region.number, "nbytes": region.nbytes}
        self.pass_on(header, region.descriptor, region.release)

    def _return_lent(self, number: int) -> None:
        regions, _ = self._lent.pop(number, ((), None))
        for region in regions:
            region.release()

    def _answer_of(self, number: int, header: Header, body: Buffer) -> Buffer:
        """Return the body of an answer, which may lie in the window that was lent for it.

        Raises:
            FrameError: it names more than it was lent.
        """
        _, window = self._lent.get(number, ((), None))
        nbytes = header.get("window_bytes")
        if nbytes is None:
            if len(body) > SHARED_BYTES_MIN:
                self._answer_bytes = len(body)
            elif window is not None and header["kind"] == "result":
                self._answer_bytes = 0
            return body
        if window is None or type(nbytes) is not int or not 0 <= nbytes <= window.nbytes or len(body):
            raise FrameError("an answer in a window that was not lent")
        self._answer_bytes = nbytes
        return window.lease(nbytes)

    def _flush(self) -> None:
        self._flushing = False
        out = self._out
        if not self.alive or not (out or self._sent_all):
            return
        try:
            while out:
                if self._passing:
                    sent = self._send_passing()
                elif self._out_bytes <= _JOIN_BYTES_MAX:
                    out[:] = (b"".join(out),)
                    sent = self.process.channel.send(out[0])
                else:
                    sent = self.process.channel.sendmsg(out[:_BUFFERS_MAX])
                self._out_bytes -= sent
                _drop_sent(out, sent)
        except BlockingIOError:
            if not self._writing:
                self._writing = True
                self._loop.add_writer(self.process.channel.fileno(), self._flush)
            return
        except OSError:
            out.clear()  # the worker is dying; its pidfd tells
            self._out_bytes = 0
            self._drop_passing()
        if self._writing:
            self._writing = False
            self._loop.remove_writer(self.process.channel.fileno())
        self._tell_sent()

    def _tell_sent(self) -> None:
        told, self._sent_all = self._sent_all, []
        for done in told:
            done()

    def _send_passing(self) -> int:
        """Send up to the next frame that a descriptor goes with, or that frame alone with it."""
        passing = self._passing[0]
        place = next(index for index, part in enumerate(self._out) if part is passing.head)
        if place:
            return self.process.channel.sendmsg(self._out[: min(place, _BUFFERS_MAX)])
        rights = array.array("i", [passing.descriptor])
        sent = self.process.channel.sendmsg([passing.head], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, rights)])
        self._passing.popleft()
        passing.release()
        return sent

    def _on_readable(self) -> None:
        place = self._decoder.body_buffer()
        try:
            if place is not None:
                count = self.process.channel.recv_into(place)
                frame = self._decoder.body_filled(count)
                frames = [frame] if frame is not None else []
                place.release()
            else:
                data = self.process.channel.recv(_RECEIVE_BYTES)
                count = len(data)
                frames = self._decoder.feed(data) if data else []
        except BlockingIOError:
            return
        except OSError:
            count, frames = 0, []
        except (FrameError, TooLargeError, OverloadedError) as error:
            self._kill_for(error)
            count, frames = 0, []
        if count == 0:
            self._loop.remove_reader(self.process.channel.fileno())  # its pidfd tells the rest
            return
        for frame in frames:
            self._take(frame)

    def _take(self, frame: Frame) -> None:
        header, body, number, _ = frame
        kind = header["kind"]
        if number is None or kind not in _ANSWERS:
            if kind == "reply" and self.owed.pop(-1 if number is None else number, None) is not None:  # of a ping
                self.running_s = _running_s(header)
            elif kind in ("part", "alive"):
                self._take_word(frame)
            else:
                if kind == "lane_closed":
                    self._lane_closed(header)
                self._on_frame(self, frame)
            return
        if self._lent or len(body) > SHARED_BYTES_MIN:
            try:
                body = self._answer_of(number, header, body)
            except FrameError as error:
                self._kill_for(error)
                return
            self._return_lent(number)
        held = self.owed.pop(number, None)
        if held is not None:
            self.held_bytes -= held
            if self._paused:
                self._paused.pop(number, None)
            job = self.jobs.pop(number, None)
            if kind == "result" or header.get("code") not in _NOT_BEGUN:
                self._heard_at = self._loop.time()
                if job is None or not job.begun:
                    self._answered_at = self._heard_at
            self._on_answer(job, header, body)

    def _lane_closed(self, header: Header) -> None:
        lane = self.lanes.get(header.get("lane", -1))
        if lane is not None:
            lane.ended()

    def _take_word(self, frame: Frame) -> None:
        """Note that a job is worked on; pass on a part of its answer, if somebody waits for it and asked for parts."""
        self._heard_at = self._loop.time()
        number = -1 if frame.id is None else frame.id
        job = self.jobs.get(number)
        if job is None:
            return
        job.begun = True
        if frame.header["kind"] != "part":
            return
        try:
            if job.request.part is None:
                raise FrameError("a part that was not asked for")
            self._paused.check(number, frame.body)
        except FrameError as error:
            self._kill_for(error)
            return
        self._on_part(job, frame.header, frame.body)

    def _kill_for(self, error: AgentError) -> None:
        _log.error("worker broke the protocol; killing it", pid=self.process.pid, error=str(error))
        self.kill()

    def _on_exit(self) -> None:
        if not self.alive:
            return
        self._drain()
        self.alive = False
        self._detach()
        self._let_go()
        self.gone.set()
        self._on_death(self)

    def _let_go(self) -> None:
        """The process is gone: nothing touches shared memory on its behalf any more."""
        for number in list(self._lent):
            self._return_lent(number)
        self._drop_passing()
        for lane in list(self.lanes.values()):
            lane.ended()
        self._tell_sent()  # that its lane has ended, who waits for this learns from the lane
        attached, self._attached = self._attached, {}
        for region in attached:
            region.users.discard(self)

    def _drop_passing(self) -> None:
        while self._passing:
            self._passing.popleft().release()

    def _drain(self) -> None:
        """Take answers the worker wrote before it died."""
        while True:
            before = len(self.jobs)
            place = self._decoder.body_buffer()
            try:
                if place is not None:
                    frame = self._decoder.body_filled(self.process.channel.recv_into(place) or -1)
                    frames: Sequence[Frame] = [frame] if frame is not None else []
                else:
                    data = self.process.channel.recv(_RECEIVE_BYTES)
                    if not data:
                        return
                    frames = self._decoder.feed(data)
            except (OSError, FrameError, TooLargeError, OverloadedError):
                return
            for frame in frames:
                self._take(frame)
            if not frames and before == len(self.jobs) and not self._decoder.mid_frame:
                return


def _running_s(header: Header) -> float:
    """Return for how long the worker's present batch has been running, as its answer to a ping says."""
    value = header.get("value")
    running_s = value.get("running_s") if isinstance(value, dict) else None
    return float(running_s) if isinstance(running_s, int | float) else 0.0


def _drop_sent(out: list[Buffer], sent: int) -> None:
    """Remove ``sent`` bytes from the front of the list."""
    index = 0
    while index < len(out) and sent >= len(out[index]):
        sent -= len(out[index])
        index += 1
    del out[:index]
    if sent:
        out[0] = memoryview(out[0])[sent:]
