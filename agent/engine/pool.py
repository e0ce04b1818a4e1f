"""The workers of one variant: admission, dispatch, restart, retry, growth.

A pool keeps ``size`` workers of one variant alive, more of them while requests queue (``growth.py``). A job waits here
only while no worker has room. When a worker dies its unanswered jobs are tried once more elsewhere, before everything
that waits; exceptions are a handler that declares itself not idempotent, and an answer of which parts are delivered.
Deaths beyond the bound end the pool: ``on_lost`` lets the version take its next variant.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import shutil
import tempfile
from collections import deque
from collections.abc import Awaitable, Callable, Coroutine, Iterator, Sequence
from pathlib import Path
from typing import Any, Final, Protocol

from agent.arena import Arena
from agent.backoff import Backoff
from agent.config import EngineConfig
from agent.engine.cgroups import Group
from agent.engine.claims import hello_of, part_of
from agent.engine.cores import Cores
from agent.engine.crashes import Crashes
from agent.engine.growth import Bounds
from agent.engine.job import Job, error_of
from agent.engine.lanes import Lane, LaneCounts, Terms, counts_of
from agent.engine.link import WorkerLink
from agent.engine.sizing import Sizing
from agent.engine.streams import check_room
from agent.engine.types import VariantSpec
from agent.engine.zygote import Exit, WorkerProcess
from agent.errors import (
    AgentError,
    BundleError,
    DeadlineError,
    DeviceLostError,
    LaneRefusedError,
    LoadError,
    OutOfMemoryError,
    OverloadedError,
    SelfTestError,
    UnloadableError,
    WorkerDiedError,
    WorkerError,
    by_code,
)
from agent.log import get_logger
from agent.wire import DEADLINE_MS_MAX, Buffer, Frame, Header, Limits

_log = get_logger("pool")
_HELD_BYTES_MAX: Final = 64 * 1024 * 1024  # bodies a worker may hold before others wait in the daemon
_ATTEMPTS_MAX: Final = 2
_LEAVE_TIMEOUT_S: Final = 5.0
_MEMORY_FOLDER: Final = Path("/dev/shm")


class Forker(Protocol):
    """What a pool needs of a zygote."""

    async def fork(self, spec: dict[str, Any], group: Group | None = None) -> WorkerProcess: ...

    async def exit_of(self, worker: WorkerProcess, *, timeout_s: float = 1.0) -> Exit: ...


class Seat(Protocol):
    """A pool's part of memory, see ``residency.py``."""

    async def take(self, pool: Pool) -> None:
        """Return when there is room for ``pool.size`` workers; raise ``WorkerError`` or ``OverloadedError``."""

    async def room(self, pool: Pool) -> str:
        """Return why there is no room for the one worker more that ``pool.size`` counts already; empty if there is."""

    def settle(self) -> None:
        """The first worker is ready."""

    async def measure(self, pid: int) -> None:
        """Learn what a worker takes."""

    def leave(self) -> None:
        """No worker is left; may be repeated."""


class PoolOwner(Protocol):
    """Who is told what happens in a pool; it may own several."""

    @property
    def version(self) -> str:
        """The version its workers serve."""

    def answered(self, pool: Pool, job: Job, header: Header, body: Sequence[Buffer]) -> None:
        """A job has its answer; pass it on and count it."""

    def part(self, pool: Pool, job: Job, header: dict[str, Any], body: Sequence[Buffer]) -> None:
        """A job has one more part of its answer; pass it on and count it."""

    def lanes_counted(self, counts: LaneCounts) -> None:
        """A worker has told what it answered on its lanes."""

    def worker_died(self, pool: Pool, pid: int, cause: str, retried: int) -> None: ...

    def worker_ready(self, pool: Pool, pid: int) -> None: ...

    def batch_shrunk(self, pool: Pool, rows_max: int) -> None:
        """A worker makes smaller batches from now on: memory did not suffice for larger ones."""

    def pool_resized(self, change: str, workers: int, reason: str) -> None:
        """The pool has ``grown`` or ``shrunk`` to so many workers, or was ``held`` where it is; the reason says why."""

    def pool_lost(self, pool: Pool, error: WorkerError) -> None:
        """The variant cannot be kept alive; its waiting jobs are in ``Pool.waiting``."""


class Pool:
    """Workers of one variant. All methods run on the loop's thread."""

    def __init__(
        self,
        spec: VariantSpec,
        forker: Forker,
        config: EngineConfig,
        *,
        owner: PoolOwner,
        spawn: Callable[[Coroutine[Any, Any, None], str], None],
        scratch: Path,
        wire: Limits,
        arena: Arena,
        numbers: itertools.count[int],
        version: str,
        cores: Cores,
        seat: Seat,
        crashes: Crashes,
        make_group: Callable[[int], Group | None] = lambda limit_bytes: None,
        place: Callable[[VariantSpec], Awaitable[VariantSpec]] | None = None,
        size_before: int = 0,
    ) -> None:
        """``size_before`` is how many workers the version had that this one is to replace: it will need as many."""
        self.spec = spec
        self.version = version
        self.size = spec.bounds.least  # workers there should be
        self.held = ""  # why it could not grow when it last should have
        self.links: list[WorkerLink] = []
        self.waiting: deque[Job] = deque()
        self.resting: WorkerLink | None = None  # takes nothing more: it is to leave
        self.hello: dict[str, Any] = {}
        self.restarts = 0
        self.cause = ""  # how its last worker that died ended, or why none starts
        self._forker = forker
        self._config = config
        self._owner = owner
        self._spawn = spawn
        self._scratch = scratch
        self._wire = wire
        self._arena = arena
        self._numbers = numbers
        self._loop = asyncio.get_running_loop()
        self._crashes = crashes
        self._backoff = Backoff(first_s=config.restart_first_s, cap_s=config.restart_cap_s)
        self._starting: dict[WorkerLink, asyncio.Future[None]] = {}
        self._calls: dict[int, tuple[WorkerLink, asyncio.Future[Any]]] = {}
        self._waiting_bytes = 0
        self._leaving: set[WorkerLink] = set()
        self._closed = asyncio.Event()
        self._idempotent = True
        self._drained = asyncio.Event()
        self._cores = cores
        self._seat = seat
        self._make_group = make_group
        self._place = place
        self._size_before = size_before
        self._sizing = Sizing(self, spawn=spawn, now=self._loop.time)

    def rebound(self, bounds: Bounds) -> None:
        """Have a number of workers within other bounds from now on."""
        self._sizing.rebound(bounds)

    @property
    def resident_bytes_max(self) -> int:
        """The memory that control groups let a worker use, 0 where they do not limit it."""
        groups = [link.process.group for link in self.links]
        return min((group.limit_bytes for group in groups if group is not None), default=0)

    # Life

    async def start(self) -> None:
        """Wait for memory and start the first worker; the others follow in the background.

        Raises:
            WorkerError: it did not load, failed its self-test, or died; the class says which.
            OverloadedError: there is no room in memory now.
        """
        if self._place is not None:
            self.spec = await self._place(self.spec)
        await self._seat.take(self)
        await self._start_worker()
        self._seat.settle()
        for _ in range(1, self.size):
            self._spawn(self._restart(0.0, replaces=False), f"start {self.spec.id}")
        self._sizing.catch_up(self._size_before)

    async def close(self, *, timeout_s: float) -> None:
        """Answer what is held, then let the workers go; jobs over the time are failed."""
        self._closed.set()
        self.revoke_lanes()
        if self.outstanding or self.lanes:
            self._drained.clear()
            try:
                async with asyncio.timeout(timeout_s):
                    await self._drained.wait()
            except TimeoutError:
                _log.warning("drain timed out", variant=self.spec.id, outstanding=self.outstanding)
        self.abandon(WorkerDiedError("the model was unloaded before it answered"))
        self._leaving.update(self.links)  # beside those that a smaller pool has let go and that are not gone yet
        self.links = []
        for link, started in self._starting.items():
            link.kill()
            if not started.done():
                started.set_exception(LoadError("the model was unloaded while it started"))
        async with asyncio.TaskGroup() as group:
            for link in self._leaving:
                group.create_task(self._see_off(link))
        self._seat.leave()

    def abandon(self, error: AgentError) -> None:
        """Fail every job of the pool with ``error``."""
        for link in self.links:
            for job in list(link.jobs.values()):
                link.forget(job)
                self._finish_failed(job, error)
        for job in self.take_waiting():
            self._finish_failed(job, error)
        for _, future in self._calls.values():
            if not future.done():
                future.set_exception(error)

    def take_waiting(self) -> list[Job]:
        """Remove and return the jobs no worker holds, oldest first."""
        jobs = list(self.waiting)
        self.waiting.clear()
        self._waiting_bytes = 0
        self._check_drained()
        return jobs

    def evacuate(self) -> list[Job]:
        """End every worker at once; return the jobs that another pool may answer, the others are failed."""
        self._closed.set()
        self.revoke_lanes()
        jobs = []
        for link in self.links:
            for job in list(link.jobs.values()):
                link.forget(job)
                if self._may_retry(job):
                    jobs.append(job)
                else:
                    self._finish_failed(job, WorkerDiedError("the worker was ended while it held this request"))
            link.kill()
        self._leaving.update(self.links)
        self.links = []
        self._seat.leave()
        return [*jobs, *self.take_waiting()]

    # Lanes

    def open_lane(self, number: int, terms: Terms) -> Lane:
        """Open a lane to the worker that has the fewest.

        Raises:
            LaneRefusedError: no worker is ready, or its bundle's own code runs there.
        """
        if not self.spec.lanes:
            raise LaneRefusedError("the bundle's own code runs in its worker")
        if not self.links or self._closed.is_set():
            raise LaneRefusedError("no worker is ready")
        link = min(self.links, key=lambda link: (link is self.resting, len(link.lanes)))
        try:
            return Lane(number, link, terms, model=str(self.spec.worker["model"]), version=self.version)
        except OSError as error:
            raise LaneRefusedError(f"no socket: {error.strerror}") from error

    def revoke_lanes(self) -> None:
        """End all lanes: what has arrived on them is answered, nothing more is taken."""
        for link in self.links:
            for lane in link.lanes.values():
                lane.revoke()

    @property
    def lanes(self) -> int:
        """How many are open."""
        return sum(len(link.lanes) for link in self.links)

    @property
    def lanes_waiting(self) -> int:
        """How many requests waited on them when the workers last told."""
        return sum(link.lanes_waiting for link in self.links)

    # Memory

    @property
    def closed(self) -> bool:
        """Whether it takes no more work."""
        return self._closed.is_set()

    @property
    def pids(self) -> list[int]:
        """The workers that serve."""
        return [link.process.pid for link in self.links]

    def in_use(self, now: float) -> bool:
        """Whether it restarts, owes an answer, also to a withdrawn request, or has just given one on a lane."""
        if self.waiting or self._calls or not self.links:
            return True
        return any(link.owed or link.lanes_in_use(now) for link in self.links)

    # Work

    @property
    def outstanding(self) -> int:
        """Jobs admitted and not answered."""
        count = len(self.waiting)
        for link in self.links:  # a loop: a generator costs more than the sum, once a request
            count += len(link.jobs)
        return count

    @property
    def queue_requests_max(self) -> int:
        """The most requests the pool admits at once."""
        return self._config.queue_requests_max

    @property
    def busy(self) -> bool:
        """Whether there is anything to sweep: a job, an answer that nobody waits for any more, or a worker to spare."""
        return bool(self.waiting) or len(self.links) > self.spec.bounds.least or any(link.owed for link in self.links)

    @property
    def idempotent(self) -> bool:
        """Whether a request may be tried again."""
        return self._idempotent

    def quiet(self, now: float) -> bool:
        """Whether nobody waits for an answer, here or on a lane."""
        return not self.outstanding and not any(link.lanes_in_use(now) for link in self.links)

    @property
    def held_bytes(self) -> int:
        """Body bytes of all outstanding jobs."""
        held = self._waiting_bytes
        for link in self.links:
            held += link.held_bytes
        return held

    def submit(self, job: Job) -> None:
        """Take one job: to a worker at once if one has room, else into the queue.

        Its bound in requests is the caller's to check, together with the client's part of it.

        Raises:
            OverloadedError: the queue's bound in bytes is reached.
        """
        config = self._config
        if self.held_bytes + job.body_bytes > config.queue_bytes_max:
            raise OverloadedError(f"waiting requests hold {config.queue_bytes_max} bytes; try again later")
        if job.request.part is not None and self.hello.get("streams"):
            check_room(self._held(), window=self.spec.window * max(1, len(self.links)))
        self.adopt(job)

    def adopt(self, job: Job, *, first: bool = False) -> None:
        """Take a job that is already admitted; ``first`` puts it before all that wait."""
        if job.settled:  # withdrawn while it was carried from one pool or worker to the next
            return
        link = self._roomiest() if not self.waiting or first else None
        if link is not None:
            self._dispatch(link, job)
            return
        self._waiting_bytes += job.body_bytes
        if first:
            self.waiting.appendleft(job)
        else:
            self.waiting.append(job)

    def cancel(self, job: Job) -> bool:
        """Forget ``job`` and tell its worker; ``False`` if it is not here."""
        link = job.link
        if link in self.links and job.number in link.jobs:
            link.forget(job)
            link.post({"kind": "cancel", "id": job.number})  # its place is free once the worker has answered that
            self._check_drained()
            return True
        try:
            self.waiting.remove(job)
        except ValueError:
            return False
        self._waiting_bytes -= job.body_bytes
        self._check_drained()
        return True

    def pace(self, job: Job, *, paused: bool) -> None:
        """Hold the stream of ``job``, or let it go on; before its first part it may turn out to be none."""
        link = job.link
        if job.parts and link in self.links and job.number in link.jobs:
            link.pace(job, paused=paused)

    def sweep(self, now: float) -> None:
        """Answer jobs past their deadline; kill a worker that has held one job too long; adapt the pool's size."""
        for job in [job for job in self.waiting if job.request.deadline <= now]:
            self.cancel(job)
            self._finish_failed(job, DeadlineError("the deadline passed while the request waited"))
        for link in self.links:
            for job in [job for job in link.jobs.values() if job.request.deadline <= now]:
                self.cancel(job)
                self._finish_failed(job, DeadlineError("the deadline passed before the model answered"))
            if link.lanes:
                link.ping(next(self._numbers), every_s=self._config.hang_timeout_s / 4)
            if max(link.silent_s(now), link.running_s) > self._config.hang_timeout_s:
                _log.error("worker hangs; killing it", variant=self.spec.id, pid=link.process.pid)
                link.kill()
        self._sizing.sweep(now)

    async def call(self, method: str, *, timeout_s: float, link: WorkerLink | None = None, **arguments: Any) -> Any:
        """Call ``selftest``, ``measure`` or ``ping`` on a worker, ``link`` if given, and return its value.

        A worker that does not answer in time hangs in native code, which nothing else could end: it is killed.

        Raises:
            WorkerDiedError: no worker, it died, or it did not answer in time.
        """
        if not self.links or (link is not None and link not in self.links):
            raise WorkerDiedError("no worker is running")
        number, future = next(self._numbers), self._loop.create_future()
        link = link or self.links[number % len(self.links)]
        self._calls[number] = (link, future)
        link.post({"kind": "call", "id": number, "method": method, **arguments})
        try:
            async with asyncio.timeout(timeout_s):
                return await future
        except TimeoutError as error:
            _log.error("worker hangs; killing it", variant=self.spec.id, pid=link.process.pid, method=method)
            link.kill()
            raise WorkerDiedError(f"the worker did not answer {method} within {timeout_s:g} s") from error
        finally:
            self._calls.pop(number, None)

    # Size, see ``sizing.py``

    @property
    def spare(self) -> list[WorkerLink]:
        """The workers that owe nothing to anybody."""
        called = {link for link, _ in self._calls.values()}
        now = self._loop.time()
        return [link for link in self.links if not link.owed and link not in called and not link.lanes_in_use(now)]

    async def start_one(self) -> None:
        """Start the worker that ``size`` already counts.

        Raises:
            WorkerError: it does not start, or there is no room for it in memory.
        """
        reason = await self._seat.room(self)
        if reason:
            raise OutOfMemoryError(reason)
        await self._start_worker()

    def let_go(self, link: WorkerLink) -> None:
        """Let a worker that owes nothing leave."""
        self.links.remove(link)
        self._leaving.add(link)
        self._spawn(self._see_off(link), f"see off {link.process.pid}")

    def rest(self, link: WorkerLink | None) -> None:
        """Give this worker nothing more, from now on, and no other; its lanes end once they are answered."""
        self.resting = link
        for lane in list(link.lanes.values()) if link is not None else ():
            lane.revoke()

    def resized(self, change: str, reason: str) -> None:
        """Tell that the pool has ``grown`` or ``shrunk``, or was ``held`` where it is."""
        self._owner.pool_resized(change, self.size, reason)

    # Inside

    def _may_retry(self, job: Job) -> bool:
        """Whether a job whose worker is gone may be answered by another."""
        return self._idempotent and job.attempts < _ATTEMPTS_MAX and not job.parts

    def _held(self) -> Iterator[Job]:
        """All jobs admitted and not answered."""
        return itertools.chain(self.waiting, *(link.jobs.values() for link in self.links))

    def _roomiest(self) -> WorkerLink | None:
        """The worker with the fewest jobs, if it has room."""
        best = None
        for link in self.links:
            if link is self.resting:
                continue
            if len(link.owed) < self.spec.window and link.held_bytes < _HELD_BYTES_MAX:
                if not link.owed:
                    return link
                if best is None or len(link.owed) < len(best.owed):
                    best = link
        return best

    def _dispatch(self, link: WorkerLink, job: Job) -> None:
        request = job.request
        now = self._loop.time()
        job.link = link
        job.dispatched = now
        job.attempts += 1
        link.send(job, min(DEADLINE_MS_MAX, max(1, int((request.deadline - now) * 1000))))

    def _refill(self) -> None:
        while self.waiting:
            link = self._roomiest()
            if link is None:
                return
            job = self.waiting.popleft()
            self._waiting_bytes -= job.body_bytes
            self._dispatch(link, job)

    def _on_answer(self, job: Job | None, header: Header, body: Buffer) -> None:
        """Pass on the answer of ``job``, or of one nobody waits for; either way there is room for another."""
        if job is not None:
            self._owner.answered(self, job, header, (body,) if len(body) else ())
        if self.waiting:
            self._refill()
        elif self._closed.is_set():
            self._check_drained()

    def _on_part(self, job: Job, header: Header, body: Buffer) -> None:
        self._owner.part(self, job, part_of(header), (body,) if len(body) else ())

    def _finish_failed(self, job: Job, error: AgentError) -> None:
        self._owner.answered(self, job, Header(error_of(error, None)), ())

    def _check_drained(self) -> None:
        if self._closed.is_set() and not self.outstanding and not self.lanes:
            self._drained.set()

    async def _start_worker(self) -> None:
        """Fork a worker and wait until it is ready.

        Raises:
            WorkerError: it is not; the worker is killed and its scratch folder removed.
        """
        scratch = self._make_scratch()
        cores = self._cores.take(self.spec.threads)
        try:
            order = {**self.spec.worker, "scratch_dir": str(scratch), "cores": list(cores)}
            group = self._make_group(self.spec.resident_bytes_max)
            try:
                process = await self._forker.fork(order, group)
            except BaseException:
                if group is not None:
                    group.remove()
                raise
            link = WorkerLink(
                process,
                limits=self._wire,
                arena=self._arena,
                regions_max=self._config.open_files_max // 2,
                on_answer=self._on_answer,
                on_part=self._on_part,
                on_frame=self._on_frame,
                on_death=self._on_death,
            )
            ready: asyncio.Future[None] = self._loop.create_future()
            self._starting[link] = ready
            try:
                async with asyncio.timeout(self._config.start_timeout_s):
                    await ready
                if not link.alive:
                    raise LoadError("the worker died as soon as it was ready")
            except BaseException as error:
                link.kill()
                if isinstance(error, TimeoutError):
                    raise LoadError(f"not ready within {self._config.start_timeout_s:g} s") from error
                raise
            finally:
                self._starting.pop(link, None)
        except BaseException:
            shutil.rmtree(scratch, ignore_errors=True)
            self._cores.give_back(cores)
            raise
        link.scratch, link.cores = scratch, cores
        if not self._needed():
            self._leaving.add(link)
            await self._see_off(link)
            return
        self.hello = link.hello
        self._idempotent = bool(link.hello.get("idempotent", True))
        link.ready_at = self._loop.time()
        self.links.append(link)
        self._owner.worker_ready(self, process.pid)
        self._spawn(self._seat.measure(process.pid), f"measure {process.pid}")
        self._refill()

    def _make_scratch(self) -> Path:
        """Return a new scratch folder; in memory when the disk has no room even for that."""
        reason: object = None
        for parent in (self._scratch, _MEMORY_FOLDER):
            try:
                return Path(tempfile.mkdtemp(prefix=f"{self.spec.id}-", dir=parent))
            except OSError as error:
                reason = reason or error.strerror
        raise LoadError(f"no scratch folder: {reason}")

    def _on_frame(self, link: WorkerLink, frame: Frame) -> None:
        header, kind = frame.header, frame.header["kind"]
        started = self._starting.get(link)
        if kind == "reply":
            _, future = self._calls.get(-1 if frame.id is None else frame.id, (link, None))
            if future is not None and not future.done():
                future.set_result(header.get("value"))
        elif started is not None and not started.done():
            if kind == "hello":
                try:
                    link.hello = hello_of(header)
                except LoadError as malformed:
                    started.set_exception(malformed)
                else:
                    started.set_result(None)
            elif kind == "error":
                error = by_code(str(header.get("code")), str(header.get("message")))
                started.set_exception(_start_failure(error))
        elif kind == "shrunk":
            rows_max = header.get("rows_max")
            if type(rows_max) is int and rows_max > 0:
                link.hello["max_batch"] = rows_max
                self._owner.batch_shrunk(self, rows_max)
        elif kind == "lane_closed":
            self._check_drained()
        elif kind == "lanes":
            counts = counts_of(header)
            if counts is not None:
                link.lanes_told_at = self._loop.time()
                link.lanes_waiting = counts.waiting
                self._owner.lanes_counted(counts)
        elif kind == "error":
            _log.warning("worker reports an error", pid=link.process.pid, error=header.get("message"))

    def _on_death(self, link: WorkerLink) -> None:
        started = self._starting.get(link)
        if started is not None:
            self._spawn(self._explain_failed_start(link, started), f"reap {link.process.pid}")
            return
        if link in self._leaving:
            return
        if link not in self.links:
            self._spawn(self._explain_failed_start(link, None), f"reap {link.process.pid}")
            return
        self.links.remove(link)
        jobs = list(link.jobs.values())
        link.jobs.clear()
        retried = 0
        for job in reversed(jobs):
            if self._may_retry(job):
                retried += 1
                self.adopt(job, first=True)
            else:
                self._finish_failed(job, WorkerDiedError("the worker died while it held this request"))
        for owner, future in self._calls.values():
            if owner is link and not future.done():
                future.set_exception(WorkerDiedError("the worker died"))
        self._spawn(self._bury(link, retried), f"reap {link.process.pid}")
        if self._closed.is_set() and (self.links or not self.waiting):
            self._check_drained()
            return
        now = self._loop.time()
        if now - link.ready_at > self._config.deaths_window_s:
            self._backoff.reset()
        if self._crashes.note(now) and not self.links:
            last = f", the last: {self.cause}" if self.cause else ""
            self._lose(WorkerDiedError(f"{self._crashes}{last}"))
        else:
            self._spawn(self._restart(self._backoff.next()), f"restart {self.spec.id}")

    async def _see_off(self, link: WorkerLink) -> None:
        """Let a worker finish and leave; kill it when it does not."""
        link.hang_up()
        if not await _has_gone(link):
            link.kill()
            if not await _has_gone(link):
                _log.error("worker cannot be killed; it is left to the kernel", pid=link.process.pid)
                link.give_up()
        await self._forker.exit_of(link.process)
        if link in self._leaving:  # else the end of the pool has seen it off as well
            self._discard(link)

    def _discard(self, link: WorkerLink) -> None:
        self._leaving.discard(link)
        self._cores.give_back(link.cores)
        link.process.close()
        if link.scratch is not None:
            shutil.rmtree(link.scratch, ignore_errors=True)

    async def _explain_failed_start(self, link: WorkerLink, started: asyncio.Future[None] | None) -> None:
        try:
            ended = await self._forker.exit_of(link.process)
        finally:
            self._discard(link)
        if started is not None and not started.done():
            kind = OutOfMemoryError if ended.over_bytes else LoadError
            started.set_exception(kind(f"the worker died while it loaded: {ended}"))

    async def _bury(self, link: WorkerLink, retried: int) -> None:
        try:
            ended = await self._forker.exit_of(link.process)
        finally:
            self._discard(link)
        self.cause = str(ended)
        self._owner.worker_died(self, link.process.pid, self.cause, retried)

    async def _restart(self, delay_s: float, *, replaces: bool = True) -> None:
        while self._needed():
            await asyncio.sleep(delay_s)
            if not self._needed():
                return
            try:
                await self._start_worker()
            except WorkerError as error:
                if not self._needed():
                    return
                _log.error("worker does not start", variant=self.spec.id, code=error.code, error=str(error))
                self.cause = str(error)
                # What fails the same way each time is not tried again, nor are wrong answers of a fresh worker.
                hopeless = isinstance(error, UnloadableError | SelfTestError)
                if (self._crashes.note(self._loop.time()) or hopeless) and not self.links:
                    self._lose(error)
                    return
                if self.links and self.size > self.spec.bounds.least:
                    self._sizing.hold(error)
                    return
                delay_s = self._backoff.next()
            else:
                self.restarts += replaces
                return

    def _needed(self) -> bool:
        """Whether workers are wanted: also while the pool drains, if the last died and left jobs behind."""
        return not self._closed.is_set() or bool(self.waiting)

    def _lose(self, error: WorkerError) -> None:
        if not self._closed.is_set():
            self._closed.set()
            self._crashes.forget()
            self._seat.leave()
            self._owner.pool_lost(self, error)


async def _has_gone(link: WorkerLink) -> bool:
    """Whether a worker goes in time."""
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(_LEAVE_TIMEOUT_S):
            await link.gone.wait()
    return link.gone.is_set()


def _start_failure(error: AgentError) -> WorkerError:
    """Return what a worker said of its failed start as one of ours; a refused bundle is refused each time.

    That a device is lost is NVML's to say: a worker knows of its own hold on it only, and the next try may get another.
    """
    if isinstance(error, WorkerError) and not isinstance(error, DeviceLostError):
        return error
    kind = UnloadableError if isinstance(error, BundleError) else LoadError
    return kind(f"{error.code}: {error}")
