"""One version of a model: the ladder of its variants, one of them serving, or asleep until it is asked.

Loading walks the ladder down; each variant that cannot load or fails its self-test is left with its reason kept. A
variant that keeps dying, loses its device or runs out of memory while it serves is left for the next one, and its jobs
move along. While a lesser variant serves, a better one is tried again beside it, when the model is idle: it takes over
only once it has loaded and passed its self-test, and an approximate one only if it was measured to be faster and to
agree. A version that sleeps has no worker and tries nothing. Its first request wakes it and waits in the new pool with
all that follow, where deadlines and cancels find them; there is one load for all of them.
Leaves out: every decision (``ladder.py``, ``memory.py``).
"""

from __future__ import annotations

import asyncio
import contextlib
import math
from collections.abc import Callable, Coroutine, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from enum import StrEnum
from typing import Any, Final, Protocol

from agent.config import VariantsConfig
from agent.engine import views
from agent.engine.book import VariantBook
from agent.engine.claims import answer_of
from agent.engine.climb import Climb
from agent.engine.contest import contest
from agent.engine.crashes import Crashes
from agent.engine.growth import Bounds
from agent.engine.job import Job, error_of
from agent.engine.ladder import Purpose, Try, Verdict
from agent.engine.lanes import LaneCounts
from agent.engine.link import WorkerLink
from agent.engine.memory import Need
from agent.engine.pool import Pool
from agent.engine.residency import Residency
from agent.engine.selftest import Act, Report, SelfTestRecord, examine
from agent.engine.standing import Standing
from agent.engine.streams import StreamCounts
from agent.engine.types import Keeping, VariantSpec, VersionSpec
from agent.errors import (
    AgentError,
    DeadlineError,
    DeviceLostError,
    LoadError,
    OutOfMemoryError,
    OverloadedError,
    UnavailableError,
    WorkerDiedError,
    WorkerError,
    by_code,
)
from agent.events import EventBus, Severity, Stream
from agent.log import get_logger
from agent.metrics import Counter, HistogramSeries
from agent.shares import Shares
from agent.spread import Counts, Spread
from agent.wire import Buffer, Header

_log = get_logger("version")
# Faults of the model, not of the caller: what probation counts.
_FAULTS = frozenset(
    {"worker_died", "handler_failed", "inference_failed", "output_mismatch", "out_of_memory", "device_lost",
     "worker_failed", "internal"}
)  # fmt: skip
_OWN_FAILURES = _FAULTS | {UnavailableError.code}  # another version might do better
_DRAIN_TIMEOUT_S: Final = 30.0
_RESCUES_MAX: Final = 3  # variants that one request may run out of memory on
_SHORT: Final = "memory did not suffice for a request"
RESTORED: Final = "restored"  # the cause of a load that nobody needs to wait for
OPERATOR: Final = "operator"  # the cause of a load that waits for no time of the ladder
ON_DEMAND: Final = "not loaded, loads on demand"

Spawn = Callable[[Coroutine[Any, Any, None], str], None]


class PoolMaker(Protocol):
    """Makes the pool of one variant."""

    def __call__(self, variant: VariantSpec, version: Version, *, size_before: int | None = None) -> Pool: ...


class Stage(StrEnum):
    """Where a version stands in its slot."""

    TRYING = "on trial"
    SERVING = "serving"
    BEFORE = "kept for a rollback"
    LEFT = "left"  # by a rollback


_HELD: Final = frozenset({Stage.TRYING, Stage.BEFORE})


class Version:
    """A version that can answer. Made by ``Engine.load`` or ``Engine.restore``; closed by ``Engine.retire``."""

    def __init__(
        self,
        spec: VersionSpec,
        *,
        stage: Stage,
        make_pool: PoolMaker,
        residency: Residency,
        spawn: Spawn,
        events: EventBus,
        latency: HistogramSeries,
        answers: Counter,
        handed: Counter,
        tested: Counter,
        streams: StreamCounts,
        now: Callable[[], float],
        config: VariantsConfig,
        book: VariantBook,
        memory_wait_s: float,
        make_crashes: Callable[[], Crashes],
        lost: Mapping[str, str],
    ) -> None:
        """``lost`` is kept current: the devices that are lost, and why."""
        self.spec = spec
        self.stage = stage
        self.asleep = False
        self.used_at = now()
        self.asked_at = -math.inf
        self.may_unload = True
        self.load_until = 0.0
        self.pool: Pool | None = None
        self._reason = "loading"  # see ``reason``
        self._retried = False  # whether when it is tried again belongs to the reason
        self.tests = SelfTestRecord()
        self.holders = 0  # slots that hold it
        self.beside = 0  # of them those beside the default
        self.trying_beside = False  # it is one of those that tries it, if it is on trial
        self.routed = False  # whether requests come: otherwise nothing better is looked for
        self.deaths = 0
        self.good = 0
        self.faults = 0
        self.late = 0  # requests whose deadline passed while they were its own
        self.short = 0  # answers that memory did not suffice for
        self.spread = Spread(now())
        self.stand_in: Version | None = None  # answers what this one fails at, while it is on trial
        self._closing = asyncio.Event()
        self._make_pool = make_pool
        self._spawn = spawn
        self._events = events
        self._latency = latency
        self._answers = answers
        self._handed = handed
        self._tested = tested
        self._streams = streams
        self._now = now
        self._config = config
        self._residency = residency
        self._memory_wait_s = memory_wait_s
        self._lost = lost
        self._shares = Shares()
        self._ok = (spec.model, spec.version, "ok")
        self._variants = {variant.id: variant for variant in spec.variants}
        self._crashes = {variant: make_crashes() for variant in self._variants}
        self._standing = Standing(spec, config, book, now=now)
        self._aside: Pool | None = None  # being started for requests that the serving one has no memory for
        self._coming: set[Pool] = set()  # not serving yet
        self._leaving: set[Pool] = set()  # not serving any more
        self._too_large: dict[str, int] = {}  # bytes of the smallest request that a variant had no memory for
        self._opened: Pool | None = None  # made ahead of its load, so that jobs can wait in it
        self._on_demand = False  # what loads it now are requests and calls, which may be withdrawn
        self._woken = False  # it slept before it was loaded, and may sleep again if that fails
        self._calls = 0  # that wait for it to be loaded
        self._settled = asyncio.Event()  # no wake is under way
        self._settled.set()
        self._refusal: AgentError | None = None  # why the last load failed
        self._trouble: AgentError | None = None  # the same, if it sleeps and another try would hardly end otherwise
        self._wake_from = 0.0  # loop seconds
        self._hello: dict[str, Any] = {}  # the last worker's
        self._walking = False  # down the ladder, or about to: nobody else may
        self._climb = Climb(self, self._standing, config, spawn=spawn, now=now)
        for name, reason in spec.dropped:
            self._tell_skipped(name, "no_variant", reason)

    @property
    def version(self) -> str:
        """The version it is."""
        return self.spec.version

    @property
    def name(self) -> str:
        """Model and version."""
        return f"{self.spec.model} {self.spec.version}"

    @property
    def model(self) -> str:
        """Its slot."""
        return self.spec.model

    @property
    def digest(self) -> str:
        """Of its manifest."""
        return self.spec.digest

    @property
    def keeping(self) -> Keeping:
        """When it is in memory, as configured."""
        return self.spec.keeping

    @property
    def held_by(self) -> str:
        """Why a deployment needs it in memory; empty if none does."""
        return self.stage.value if self.stage in _HELD else ""

    @property
    def closed(self) -> bool:
        """Whether it takes no more work."""
        return self._closing.is_set()

    @property
    def on_demand(self) -> bool:
        """Whether it sleeps, and nothing is known that would keep a request from waking it."""
        return self.asleep and self._trouble is None

    @property
    def ready(self) -> bool:
        """Whether a request would be dispatched now."""
        return self.pool is not None and bool(self.pool.links)

    @property
    def pools(self) -> Iterator[Pool]:
        """All that may hold requests: the one that serves, those on their way in, those on their way out."""
        if self.pool is not None:
            yield self.pool
        yield from self._coming
        yield from self._leaving

    @property
    def why_not(self) -> str:
        """Why it is not ready, and when it is tried again; empty if it is."""
        return self._why_not(self.reason)

    @property
    def lasting(self) -> str:
        """The same without what changes by the second."""
        return self._why_not(self._reason)

    def _why_not(self, reason: str) -> str:
        if self.ready:
            return ""
        if reason:
            return reason
        if self._walking:
            return "the next variant is starting"
        if self.pool is None:
            return "unloaded"
        return f"its worker is restarting: {self.pool.cause or 'it died'}"

    @property
    def reason(self) -> str:
        """Why it cannot serve, and where nothing loads what follows from that; empty while it can serve."""
        return f"{self._reason}{self._next_text()}" if self._retried else self._reason

    @reason.setter
    def reason(self, reason: str) -> None:
        self._reason, self._retried = reason, False

    def _say_nothing_loads(self) -> str:
        """Keep and return why nothing can be loaded."""
        reasons = "; ".join(f"{skip['variant']}: {skip['reason']}" for skip in self.skipped)
        self._reason, self._retried = f"no variant loads: {reasons}", True
        return self._reason

    @property
    def fallen(self) -> int:
        """How many variants have failed."""
        return self._standing.fallen

    def crashes_of(self, variant: str) -> Crashes:
        """Return the count of a variant's crashes, over all its pools."""
        return self._crashes[variant]

    @property
    def skipped(self) -> list[dict[str, str]]:
        """The variants that do not serve because something is wrong, with the reason."""
        return self._standing.skipped

    def hold(self, *, beside: bool) -> None:
        """Let one slot more hold it."""
        self.holders += 1
        self.beside += beside

    def begin_trial(self, *, beside: bool) -> None:
        """Let a slot try it that found it loaded; one beside takes it from no trial of its model's own slot."""
        if not beside or not self._kept_for_default:
            self.stage, self.trying_beside = Stage.TRYING, beside

    def end_trial(self, *, beside: bool) -> None:
        """Let it serve as one that is trusted, unless it was tried beside and its model's own slot still tries it."""
        if not beside or not self._kept_for_default:
            self.stand_in, self.stage = None, Stage.SERVING

    @property
    def _kept_for_default(self) -> bool:
        return self.stage is Stage.BEFORE or (self.stage is Stage.TRYING and not self.trying_beside)

    def let_go(self, *, beside: bool) -> None:
        """Let one slot hold it no longer; what that slot kept it loaded for is over for those that still do."""
        self.holders -= 1
        self.beside -= beside
        kept_for_it = self.trying_beside == beside if self.stage is Stage.TRYING else not beside
        if self.holders and kept_for_it:
            self.stand_in, self.stage = None, Stage.SERVING

    def recent(self) -> Counts:
        """Return how long its answers of the last minutes took."""
        return self.spread.recent(self._now())

    # Into memory and out of it

    async def load(self, carried: Sequence[Job] = (), *, cause: str, may_unload: bool = True) -> None:
        """Start the best variant that loads and passes its self-test.

        Args:
            carried: Jobs that wait for it.
            cause: Why it is loaded, in one word.
            may_unload: Whether other models may be unloaded for it.

        Raises:
            WorkerError: none did; its class is that of the last failure, its message lists all.
            OverloadedError: at least one was kept out only by what is in memory now.
        """
        self._walking = True
        try:
            await self._walk_down(list(carried), cause, may_unload=may_unload)
        finally:
            self._walking = False

    async def _walk_down(self, jobs: list[Job], cause: str, *, may_unload: bool) -> None:
        began = self._now()
        self._allow(may_unload=may_unload)
        last: WorkerError | None = None
        kept_out: dict[str, OverloadedError] = {}
        standing = self._standing
        opened, self._opened = self._opened, None
        for variant in standing.descent() if opened is None else _first(opened.spec.id, standing.descent()):
            if self._closing.is_set():
                break
            known = standing.fall_of(variant)
            pool, opened = opened or self._make_pool(self._variants[variant], self), None
            for job in jobs:  # they wait in the new pool, where deadlines and cancels find them
                pool.adopt(job)
            self.pool = pool
            try:
                await self._start(pool)
            except (WorkerError, OverloadedError) as error:
                jobs = pool.take_waiting()
                await pool.close(timeout_s=0)
                jobs += pool.take_waiting()  # what came meanwhile waits for the next variant too
                if isinstance(error, OverloadedError):
                    kept_out[variant] = error
                    continue
                if standing.fall_of(variant) is known and not self._closing.is_set():
                    self._fell(variant, error)
                last = error
                continue
            if self._closing.is_set():
                await pool.close(timeout_s=0)
                return
            for name, refusal in kept_out.items():
                self._fell(name, refusal)
            self._come_up(pool, cause, self._now() - began)
            return
        raise self._fail_load(jobs, last, next(iter(kept_out.values()), None)) from last

    def _allow(self, *, may_unload: bool) -> None:
        """Note how far the next load may go for memory."""
        self.may_unload = may_unload
        self.load_until = self._now() + (self._memory_wait_s if may_unload else 0.0)

    def _come_up(self, pool: Pool, cause: str, elapsed_s: float) -> None:
        self._refusal = self._trouble = None
        self._on_demand = self._woken = False
        self.used_at = max([self.used_at, *(link.ready_at for link in pool.links)])
        self._stands_on(pool)
        if self.skipped:
            _log.warning("serving a fallback", model=self.spec.model, variant=pool.spec.id, skipped=self.skipped)
        self._residency.tell_loaded(self, cause, variant=pool.spec.id, load_ms=round(elapsed_s * 1000, 1))

    def _fail_load(self, waiting: Iterable[Job], last: WorkerError | None, short: OverloadedError | None) -> AgentError:
        """Note that no variant is left, tell those who wait, and return the error to raise."""
        self.pool = None
        why = self.reason = "unloaded"
        if not self._closing.is_set():
            why = self._say_nothing_loads()
        refusal = self._refusal = short or type(last or LoadError(""))(why)
        if self.stage is not Stage.TRYING and (self._woken or self.spec.keeping.lazy or short is not None):
            self.sleep()
            if short is None:
                step = self._standing.next_try(None)
                self._trouble = refusal
                self._say_nothing_loads()
                self._wake_from = step.at if step is not None else math.inf
        for job in waiting:
            self._fail(job, _told(refusal, self.reason if short is None else str(short)))
        return refusal

    def sleep(self) -> None:
        """Be without workers until a request comes."""
        self.asleep, self.reason = True, ON_DEMAND
        self._climb.look()  # nothing better is looked for

    def wake(self, cause: str) -> None:
        """Begin to load, if it sleeps; requests wait in its pool from now on."""
        if not self.asleep or self._closing.is_set():
            return
        self.asleep, self.reason, self._woken = False, "it is being loaded", True
        self._on_demand = cause != RESTORED
        self._standing.forget_shortage()
        if cause == OPERATOR:
            self._standing.hurry()
        descent = self._standing.descent()
        self._walking = True
        self._settled.clear()
        if descent:
            self._opened = self.pool = self._make_pool(self._variants[descent[0]], self)
        else:
            self._say_nothing_loads()
        self._spawn(self._load_again(cause), f"load {self.spec.model}")

    async def _load_again(self, cause: str) -> None:
        try:
            await self.load(cause=cause)
        except (WorkerError, OverloadedError) as error:
            _log.warning("not loaded", model=self.spec.model, version=self.spec.version, reason=str(error))
        finally:
            self._settled.set()

    def _awakened(self) -> Pool:
        """Return the pool of a version that wakes up.

        Raises:
            UnavailableError: it does not sleep, or could not be loaded a moment ago.
            OutOfMemoryError: likewise, for want of memory.
        """
        if self.asleep and not self._closing.is_set():
            wait_s = self._wake_from - self._now()
            if wait_s > 0 and self._trouble is not None:
                error = _told(self._trouble, self.reason)
                error.retry_after_s = wait_s if wait_s < math.inf else 0.0
                raise error
            self.wake("request")
        if self.pool is None or self._closing.is_set():
            raise UnavailableError(f"{self.name}: {self.reason or 'unloaded'}")
        return self.pool

    async def ensure(self, cause: str) -> None:
        """Return once it is loaded.

        Raises:
            AgentError: it cannot be loaded now; the class says why.
        """
        self._calls += 1
        try:
            self.wake(cause)
            await self._settled.wait()
        finally:
            self._calls -= 1
        if not self.ready:
            refusal = self._refusal or UnavailableError(self.why_not)
            raise _told(refusal, self.reason if self._retried else str(refusal))

    def wanted(self) -> bool:
        """Whether anybody still waits for what it loads."""
        return not self._on_demand or self._calls > 0 or (self.pool is not None and bool(self.pool.waiting))

    async def unload(self, cause: str, reason: str) -> None:
        """Answer what its workers hold, let them go, and sleep; what waits for them waits for the next load.

        Nothing happens while another variant takes over, or is started for a request.
        """
        pool = self.pool
        if pool is None or not self.ready or self._walking or self._aside is not None or self._closing.is_set():
            return
        waiting = pool.take_waiting()
        self.pool = None
        self.sleep()
        self._leaving.add(pool)
        if waiting:
            self.wake("request")
            for job in waiting:
                self.adopt(job)
        async with asyncio.TaskGroup() as group:
            for tried in list(self._coming):
                group.create_task(tried.close(timeout_s=0))
            group.create_task(self._drop(pool, timeout_s=_DRAIN_TIMEOUT_S))
        self._residency.tell_unloaded(self, cause, reason)

    # Work

    def submit(self, job: Job) -> None:
        """Take one job; a version that sleeps wakes up.

        Raises:
            UnavailableError: no variant is serving.
            OutOfMemoryError: it could not be loaded a moment ago, for want of memory.
            OverloadedError: the queue is full, or crowded and this client holds its part.
        """
        if self.stand_in is not None and not self.ready and (other := self._stand_in_for(job)) is not None:
            job.version = other
            other.submit(job)
            return
        pool = self.pool
        if pool is None or self._closing.is_set():
            pool = self._awakened()
        client = job.request.client
        self._shares.check(client, outstanding=pool.outstanding, bound=pool.queue_requests_max)
        pool.submit(job)
        self.used_at = self.asked_at = job.arrived
        if not job.settled:
            self._shares.add(client)
            job.shares = self._shares

    def _stand_in_for(self, job: Job) -> Version | None:
        """Return who may answer a request instead of this version, which is on trial."""
        other = self.stand_in
        if other is None or other.closed or not other.ready or job.copied or job.settled or job.parts:
            return None
        tried_twice_is_wrong = job.attempts > 0 and self.pool is not None and not self.pool.idempotent
        return None if job.request.version or tried_twice_is_wrong else other

    def _pass_waiting(self, pool: Pool) -> None:
        """Let the version before answer what would wait until this one, on trial, has a worker again."""
        if self.stand_in is None or pool.links or pool is not self.pool:
            return
        for job in pool.take_waiting():
            other = self._stand_in_for(job)
            if other is not None:
                self._handed.add((self.spec.model, self.spec.version, WorkerDiedError.code))
                other.adopt(job)
            else:
                pool.adopt(job)

    def adopt(self, job: Job) -> None:
        """Take a job that is already admitted."""
        job.version = self
        try:
            (self.pool or self._awakened()).adopt(job)
        except AgentError as error:
            self._fail(job, error)

    def give_up_unserved(self) -> list[Job]:
        """Remove and return the jobs that wait for it to be loaded and would as well be answered by another version."""
        if self.pool is None or self.ready:
            return []
        waiting = self.pool.take_waiting()
        for job in waiting:
            if job.request.version:
                self.pool.adopt(job)
        return [job for job in waiting if not job.request.version]

    def cancel(self, job: Job) -> None:
        """Forget ``job``, wherever it is."""
        for pool in self.pools:
            if pool.cancel(job):
                return

    def pace(self, job: Job, *, paused: bool) -> None:
        """Hold the stream that answers ``job``, or let it go on."""
        for pool in self.pools:
            pool.pace(job, paused=paused)

    def sweep(self, now: float) -> tuple[bool, bool]:
        """Look after what is late; return whether there is more to look after, and whether lanes are open."""
        busy = watched = False
        for pool in list(self.pools):
            if pool.busy or pool.lanes:
                busy = busy or pool.busy
                watched = watched or pool.lanes > 0
                pool.sweep(now)
        return busy, watched

    def route(self, *, here: bool) -> None:
        """Note whether requests come to this version."""
        self.routed = here
        self._climb.up()

    def rebound(self, bounds: Bounds) -> None:
        """Have a number of workers within other bounds from now on, whichever variant serves."""
        self._variants = {name: replace(variant, bounds=bounds) for name, variant in self._variants.items()}
        for pool in list(self.pools):
            if not pool.closed:
                pool.rebound(bounds)

    def device_lost(self, device: str) -> None:
        """Leave a device that is gone: a variant that is not pinned to it finds another, if there is one."""
        for variant in self._standing.pinned_to(device):
            self._fell(variant, DeviceLostError(f"{device} is lost: {self._lost[device]}"))
        pool = self.pool
        if pool is not None and pool.spec.device == device and not self._walking and not self._closing.is_set():
            self._leave(pool, pool.evacuate(), reason="")  # no fault of the version's

    def device_back(self, device: str) -> None:
        """Try the variants of a device again that was gone."""
        self._standing.device_back(device)
        if self.asleep and self._standing.descent():
            self._trouble, self.reason = None, ON_DEMAND
        self._climb.up()

    async def close(self, *, timeout_s: float) -> None:
        """Answer what is held, then end the workers."""
        self._closing.set()
        self._climb.look()
        async with asyncio.TaskGroup() as group:
            for pool in list(self.pools):
                group.create_task(pool.close(timeout_s=timeout_s))

    async def self_test(self, *, timeout_s: float) -> dict[str, Any]:
        """Run the golden inputs again in the serving worker.

        Raises:
            WorkerDiedError: no worker answered in time.
        """
        if self.asleep:
            await self.ensure("selftest")
        if self.pool is None:
            raise UnavailableError(self.reason)
        self.used_at = self._now()
        value = await self.pool.call("selftest", timeout_s=timeout_s)
        if not isinstance(value, dict):
            raise UnavailableError("the worker's self-test answered nonsense")
        if value.get("ok"):
            self.good += 1
        else:
            self.faults += 1
        return value

    async def examine(self, *, timeout_s: float) -> Report:
        """Run the golden inputs again in every worker, because somebody asks, and do what follows.

        Raises:
            UnavailableError: it does not serve, or no longer.
            AgentError: it cannot be loaded now; the class says why.
        """
        if self.asleep:
            await self.ensure("selftest")
            self.used_at = self._now()
        if self.pool is None or not self.ready:
            raise UnavailableError(f"{self.name}: {self.why_not}")
        report = await examine(self, self.pool, timeout_s=timeout_s, patient=False)
        if not report.complete:
            raise UnavailableError(f"{self.name}: its workers left before the self-test had ended; try again")
        return report

    @property
    def examinable(self) -> bool:
        """Whether it serves on its own account: not asleep, not on trial, nothing else being tried."""
        quiet = not self._coming and self._aside is None
        return self.stage is Stage.SERVING and quiet and not self.moving and not self.closed

    def tested(self, pool: Pool, link: WorkerLink | None, report: Report) -> Report:
        """Note the end of a test and do what follows; return it with what was done. ``link`` did not pass."""
        now, tests, variant = self._now(), self.tests, pool.spec.id
        before, tests.tested_at = tests.last, now
        self._tested.add((self.spec.model, self.spec.version, report.code or "ok"))
        tests.last = report
        if link is None:
            if before is not None and not before.ok:
                self._tell("selftest.passed", variant=variant)
            return report
        act = None
        if pool is self.pool and self.stage is not Stage.TRYING and not self.moving and not self.closed:
            act = tests.fails(variant, now, healthy_s=self._config.healthy_s)
        report = tests.last = replace(report, act=act)
        what = {"variant": variant, "code": report.code, "reason": report.message, "act": act or "none"}
        self._tell("selftest.failed", Severity.WARNING, **what)
        if act is Act.RESTART:
            link.kill()
        elif act is Act.LEAVE:
            self._fell(variant, by_code(report.code, report.message))
            self._leave(pool, pool.evacuate(), reason="its variant failed its self-test; the next one is starting")
        return report

    def describe(self) -> dict[str, Any]:
        """Return the model's metadata in the Open Inference Protocol's terms, plus what serves it."""
        return views.metadata(self)

    def status(self) -> dict[str, Any]:
        """Return what an operator wants to see."""
        return views.status(self)

    def residency(self) -> dict[str, Any]:
        """Return whether it is in memory and why, and what it takes there."""
        return views.residency(self)

    @property
    def hello(self) -> Mapping[str, Any]:
        """What its worker has said of itself, or the last one it had."""
        return self.pool.hello if self.pool is not None and self.pool.hello else self._hello

    @property
    def need(self) -> Need | None:
        """What a worker of the variant that serves takes of memory, or of the first; ``None``: it has no variant."""
        variants = self.spec.variants
        if not variants:
            return None
        return self._residency.need_of(self.spec.digest, self.pool.spec if self.pool is not None else variants[0])

    @property
    def holding(self) -> dict[str, int]:
        """What it holds of memory now, by place (bytes)."""
        return self._residency.holding(self)

    @property
    def test_row(self) -> dict[str, Any] | None:
        """How its last self-test ended; ``None``: there was none but that of its load."""
        return self.tests.row(self._now())

    @property
    def variant_rows(self) -> list[dict[str, Any]]:
        """Each variant with its state."""
        return self._standing.rows(self.pool.spec.id if self.pool is not None else None)

    def latency_s(self, quantile: float) -> float:
        """Return how long successful requests took from arrival to answer."""
        return self._latency.quantile(quantile)

    # PoolOwner

    def answered(self, pool: Pool, job: Job, header: Header, body: Sequence[Buffer]) -> None:
        """Count the answer, name who gave it, pass it on; a request that memory did not suffice for moves down."""
        self.used_at = now = self._now()
        answer = header.digest
        if answer is None:
            answer = header.digest = self._named(header, pool)
        if answer["kind"] == "error":
            code = answer["code"]
            if code == OutOfMemoryError.code:
                self.short += 1
                if self._rescued(pool, job):
                    return
            if self._failed(job, code):
                return
        else:
            self.good += 1
            if not job.copied:
                self._count_good(job, now)
        job.answer(answer, body)

    def _count_good(self, job: Job, now: float) -> None:
        if not job.parts:  # a stream's duration says nothing about how fast the model answers
            self._latency.observe(now - job.arrived)
            self.spread.observe(now - job.arrived, now)
        self._answers.add(self._ok)

    def _failed(self, job: Job, code: str) -> bool:
        """Count an error; return whether another version answers the request instead."""
        if code in _FAULTS:
            self.faults += 1
        elif code == DeadlineError.code:
            self.late += 1
        if code in _OWN_FAILURES and (other := self._stand_in_for(job)) is not None:
            self._handed.add((self.spec.model, self.spec.version, code))
            other.adopt(job)
            return True
        if not job.copied:
            self._answers.add((self.spec.model, self.spec.version, code))
        return False

    def lanes_counted(self, counts: LaneCounts) -> None:
        """Count what was answered without us."""
        self.used_at = self.asked_at = self._now()
        for code, amount in counts.codes.items():
            known = "ok" if code == "ok" else by_code(code, "").code
            self._answers.add((self.spec.model, self.spec.version, known), amount)
            if known == OutOfMemoryError.code and amount and self.pool is not None:
                self.pool.revoke_lanes()  # through the daemon the next variant can answer
            if known == "ok":
                self.good += amount
            elif known in _FAULTS:
                self.faults += amount
        self._latency.merge(counts.buckets, counts.sum_s)

    def part(self, pool: Pool, job: Job, header: dict[str, Any], body: Sequence[Buffer]) -> None:
        """Count a part of an answer, number it, pass it on; the first names who gives it."""
        header["seq"] = job.parts
        if not job.parts:
            self._sign(header, pool)
        self._streams.count(job, self._now())
        job.part(header, body)

    def worker_died(self, pool: Pool, pid: int, cause: str, retried: int) -> None:
        """Report a death the pool is already repairing."""
        if pool not in self._coming:  # what is only tried is no evidence against what serves
            self.deaths += 1
        self._pass_waiting(pool)
        self._tell("worker.died", Severity.WARNING, variant=pool.spec.id, pid=pid, cause=cause, retried=retried)

    def worker_ready(self, pool: Pool, pid: int) -> None:
        """Note a worker that serves."""
        if pool is self.pool:
            self.reason = ""
        self._tell("worker.ready", variant=pool.spec.id, pid=pid)

    def batch_shrunk(self, pool: Pool, rows_max: int) -> None:
        """Report that memory bounds the batches of a variant."""
        self._tell("batch.shrunk", Severity.WARNING, variant=pool.spec.id, rows_max=rows_max)

    def pool_resized(self, change: str, workers: int, reason: str) -> None:
        """Report another number of workers, or why there is none."""
        severity = Severity.WARNING if change == "held" else Severity.INFO
        self._tell(f"pool.{change}", severity, workers=workers, reason=reason)

    def pool_lost(self, pool: Pool, error: WorkerError) -> None:
        """Leave a variant that cannot be kept alive."""
        if self._closing.is_set():
            return
        self._fell(pool.spec.id, error)
        if pool is self.pool and not self._walking:
            self._leave(pool, reason="its variant kept failing; the next one is starting")

    # Down

    def _leave(self, lost: Pool, jobs: Sequence[Job] = (), *, reason: str) -> None:
        """Let the next variant answer ``jobs`` and what waits in ``lost``."""
        self._walking = True
        self.reason = reason
        self._spawn(self._step_down(lost, jobs), f"fallback {self.spec.model}")

    async def _step_down(self, lost: Pool, carried: Sequence[Job]) -> None:
        jobs = [*carried, *lost.take_waiting()]
        self.pool = None
        self._leaving.add(lost)
        try:
            await self.load(jobs, cause="fallback")
        except (WorkerError, OverloadedError) as error:
            _log.error("no variant is left", model=self.spec.model, version=self.spec.version, error=str(error))
            self._tell("model.failed", Severity.ERROR, reason=self.reason)
        else:
            self._tell_change(lost, "the variant before was lost")
        await self._drop(lost)
        self._climb.up()

    def _rescued(self, pool: Pool, job: Job) -> bool:
        """Let the next variant answer a request that this one had no memory for; ``False``: nobody else can.

        The variant goes on serving until the next one can. A request as large as one that is known not to fit is
        answered at once, so that nobody can move a model up and down.
        """
        if self._closing.is_set() or job.settled or job.parts or job.attempts > _RESCUES_MAX or not pool.idempotent:
            return False
        if pool in self._leaving and self.pool is not None:
            self.pool.adopt(job, first=True)
            return True
        if pool is not self.pool:
            return False
        if self._aside is None:
            if 0 < self._too_large.get(pool.spec.id, 0) <= job.body_bytes:
                return False
            self._aside = self._next_below(pool)
            if self._aside is None:
                return False
            self._spawn(self._step_aside(pool, self._aside), f"fallback {self.spec.model}")
        if job.body_bytes:
            self._too_large[pool.spec.id] = min(job.body_bytes, self._too_large.get(pool.spec.id, job.body_bytes))
        self._aside.adopt(job)
        return True

    def _next_below(self, current: Pool) -> Pool | None:
        """Return a pool of the next variant down that may be tried."""
        variant = self._standing.below(current.spec.id)
        if variant is None:
            return None
        self._allow(may_unload=True)
        pool = self._make_pool(self._variants[variant], self, size_before=current.size)
        self._coming.add(pool)
        return pool

    async def _step_aside(self, current: Pool, aside: Pool) -> None:
        """Serve by ``aside``, or whatever below it loads, because ``current`` runs out of memory."""
        while not await self._starts(aside):
            jobs, failed = aside.take_waiting(), aside
            following = self._aside = self._next_below(current)
            for job in jobs:
                if following is not None:
                    following.adopt(job)
                else:
                    self._fail(job, OutOfMemoryError(f"{_SHORT}, and no further variant loads"))
            await self._drop(failed)
            if following is None:
                return
            aside = following
        self._aside = None
        if self.pool is current and not self._closing.is_set():
            self._fell(current.spec.id, OutOfMemoryError(_SHORT))
            self._take_over(aside, _SHORT)
            return
        for job in aside.take_waiting():  # something else serves meanwhile
            if self.pool is not None:
                self.pool.adopt(job)
            else:
                self._fail(job, OutOfMemoryError(_SHORT))
        await self._drop(aside, timeout_s=_DRAIN_TIMEOUT_S)

    async def _starts(self, pool: Pool) -> bool:
        try:
            await self._start(pool)
        except (WorkerError, OverloadedError) as error:
            if not self._closing.is_set():
                self._fell(pool.spec.id, error)
            return False
        return True

    async def _start(self, pool: Pool) -> None:
        """Start a pool, on a device that is there when it is done.

        Raises:
            WorkerError: it does not start.
            OverloadedError: memory does not hold it now.
        """
        await pool.start()
        self._check_device(pool)

    def _check_device(self, pool: Pool) -> None:
        if pool.spec.device in self._lost:
            raise DeviceLostError(f"{pool.spec.device} is lost: {self._lost[pool.spec.device]}")

    # Up, see ``climb.py``

    @property
    def moving(self) -> bool:
        """Whether it walks down, or about to; or sleeps: nobody else may change what serves."""
        return self._walking or self.asleep

    async def challenge(self, step: Try, current: Pool) -> None:
        """Let a better variant take over if it loads, passes its self-test and, to be compared, is better."""
        variant = self._variants[step.rung.id]
        self._allow(may_unload=False)  # no other model leaves for a better variant of this one
        pool = self._make_pool(variant, self, size_before=current.size)
        self._coming.add(pool)
        try:
            await self._let_compete(pool, current, step.purpose)
        except OverloadedError as error:
            self._standing.fell(variant.id, error.code, str(error))  # no news: memory is short now and then
        except WorkerError as error:
            if not pool.closed or pool.spec.device in self._lost:  # else it was ended: nothing is wrong with it
                self._fell(variant.id, error)
        if pool in self._coming:
            await self._drop(pool)

    async def _let_compete(self, pool: Pool, current: Pool, purpose: Purpose) -> None:
        why = "it loads again and passed its self-test"
        await self._start(pool)
        if purpose is Purpose.COMPARE:
            verdict = await contest(pool, current, self._config)
            self._note(pool.spec.id, verdict)
            why = verdict.reason
            if not verdict.preferred:
                return
            self._check_device(pool)
        if self.pool is current and not self._closing.is_set():
            self._take_over(pool, why)

    async def revive(self) -> None:
        """Try again to load what could not be loaded."""
        try:
            await self.load(cause="revival")
        except (WorkerError, OverloadedError) as error:
            _log.warning("still no variant loads", model=self.spec.model, error=str(error))

    def _note(self, variant: str, verdict: Verdict) -> None:
        self._standing.measured(variant, verdict)
        self._tell("variant.measured", variant=variant, preferred=verdict.preferred, reason=verdict.reason)

    # Changing over

    def _take_over(self, pool: Pool, why: str) -> None:
        """Route requests to a pool that has passed its self-test; the one before answers what it holds."""
        before, self.pool = self.pool, pool
        self._coming.discard(pool)
        if before is not None:
            for job in before.take_waiting():
                pool.adopt(job)
            self._leaving.add(before)
            self._spawn(self._drop(before, timeout_s=_DRAIN_TIMEOUT_S), f"drain {before.spec.id}")
        self._stands_on(pool)
        self._tell_change(before, why)

    def _stands_on(self, pool: Pool) -> None:
        """Note what serves from now on."""
        variant = pool.spec.id
        self.reason, self._hello = "", pool.hello
        if self._standing.serves(variant):
            self._spawn(self._forgive(pool), f"forgive {variant}")
        self._climb.up()

    async def _forgive(self, pool: Pool) -> None:
        """Forget earlier failures once the variant has served well for long enough."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self._config.healthy_s):
                await self._closing.wait()
        if self.pool is pool and not self._closing.is_set():
            self._standing.served_well(pool.spec.id)

    async def _drop(self, pool: Pool, *, timeout_s: float = 0.0) -> None:
        """End a pool; ``close`` does if this is canceled."""
        await pool.close(timeout_s=timeout_s)
        self._coming.discard(pool)
        self._leaving.discard(pool)

    def _fell(self, variant: str, error: AgentError) -> None:
        """Keep why a variant does not serve."""
        self._standing.fell(variant, error.code, str(error))
        self._tell_skipped(variant, error.code, str(error))

    # Telling

    def _next_text(self) -> str:
        step = self._standing.next_try(None)
        if step is None:
            return "; it is not tried again by itself, because each try would fail the same way"
        wait_s = max(0.0, step.at - self._now())
        if not self.asleep:
            return f"; tried again in {wait_s:.0f} s" if wait_s else "; it is tried again now"
        return f"; tried again by a request in {wait_s:.0f} s" if wait_s else "; the next request tries it again"

    def _tell_change(self, before: Pool | None, why: str) -> None:
        now = self.pool.spec.id if self.pool is not None else ""
        self._tell("variant.changed", variant=now, before=before.spec.id if before is not None else "", reason=why)

    def _tell(self, event: str, severity: Severity = Severity.INFO, **data: Any) -> None:
        """Say it to the log and to everybody who listens."""
        data = {"model": self.spec.model, "version": self.spec.version, **data}
        log = {Severity.INFO: _log.info, Severity.WARNING: _log.warning, Severity.ERROR: _log.error}[severity]
        log(event.replace(".", " "), **data)
        self._events.emit(Stream.HEALTH, event, severity, **data)

    def _named(self, header: Header, pool: Pool) -> Header:
        """Return what a worker may say in its answer, and whose it is."""
        answer = answer_of(header)
        if answer["kind"] == "result":
            self._sign(answer, pool)
        return Header(answer)

    def _sign(self, header: dict[str, Any], pool: Pool) -> None:
        header["model"], header["version"] = self.spec.model, self.spec.version
        header["variant"] = pool.spec.id

    def _fail(self, job: Job, error: AgentError) -> None:
        """Answer a job that no pool holds."""
        if not self._failed(job, error.code):
            job.answer(Header(error_of(error, None)), ())

    def _tell_skipped(self, variant: str, code: str, reason: str) -> None:
        self._tell("variant.skipped", Severity.WARNING, variant=variant, code=code, reason=reason)


def _first(variant: str, order: Sequence[str]) -> tuple[str, ...]:
    return (variant, *(other for other in order if other != variant))


def _told(refusal: AgentError, text: str) -> AgentError:
    """Return what a caller is told of a failed load, each time anew: an error keeps the traces of all who raise it."""
    kind = type(refusal) if isinstance(refusal, OverloadedError | OutOfMemoryError) else UnavailableError
    told = kind(text)
    told.retry_after_s = refusal.retry_after_s
    return told
