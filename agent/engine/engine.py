"""Slots of models, and the one door every request goes through.

``submit`` is synchronous integer work: find the slot, find the version, hand the job to its pool. Every request gets
exactly one answer: from a worker, from a bound that was reached, from its deadline, or from shutdown.
Leaves out: where versions come from (``deploy``) and how requests arrive (``serving``).
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import shutil
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any, Final
from weakref import WeakValueDictionary

import psutil

from agent.arena import Arena
from agent.config import ClientLimitConfig, EngineConfig
from agent.engine.admission import Admission
from agent.engine.book import VariantBook
from agent.engine.canary import Canary
from agent.engine.cgroups import Groups
from agent.engine.cores import Cores
from agent.engine.crashes import Crashes
from agent.engine.growth import Bounds
from agent.engine.job import Job, error_of
from agent.engine.lanes import Lane, Terms
from agent.engine.learned import Learned
from agent.engine.meter import Meter, SystemMeter
from agent.engine.orphans import kill_left
from agent.engine.placement import needs_gpu, placed
from agent.engine.pool import Pool
from agent.engine.residency import Residency, Seat
from agent.engine.routes import Route
from agent.engine.selftest import SelfTests
from agent.engine.shadow import Copy, Shadow, Tally
from agent.engine.spawn import Spawned
from agent.engine.streams import StreamCounts
from agent.engine.types import InferRequest, VariantSpec, VersionSpec
from agent.engine.version import ON_DEMAND, OPERATOR, RESTORED, Stage, Version
from agent.engine.zygote import Zygote
from agent.errors import (
    AgentError,
    CommandError,
    LaneRefusedError,
    LoadError,
    OverloadedError,
    UnavailableError,
    UnknownModelError,
)
from agent.events import EventBus
from agent.log import get_logger
from agent.metrics import LATENCY_BUCKETS_S, Metrics
from agent.nvml import GpuMemory
from agent.question import Question
from agent.wire import FIRST_ID, Header, Limits

_SWEEP_S: Final = 0.05
_DRIVER_TIMEOUT_S: Final = 30.0  # for the GPUs' free memory
_log = get_logger("engine")


class ModelState:
    """Whether requests to a model or version are answered, and why not, or that the first of them loads it."""

    __slots__ = ("ready", "reason")

    def __init__(self, *, ready: bool, reason: str) -> None:
        self.ready = ready
        self.reason = reason


class Engine:
    """All models of this box. Use inside ``running()``."""

    name = "engine.sweeper"

    def __init__(
        self,
        config: EngineConfig,
        *,
        scratch: Path,
        wire: Limits,
        events: EventBus,
        metrics: Metrics,
        arena: Arena | None = None,
        limits: Iterable[ClientLimitConfig] = (),
        spawned: Mapping[str, Spawned] | None = None,
        cores: Iterable[int] = (),
        meter: Meter | None = None,
        learned: Learned | None = None,
        gpus: Callable[[], Sequence[GpuMemory]] = tuple,
        book: VariantBook | None = None,
    ) -> None:
        """Workers are bound to ``cores``, if any; memory is bounded by what ``meter`` says."""
        self._admission = Admission(limits)
        self._book = book or VariantBook()
        self._config = config
        self._scratch = scratch
        self._cores = Cores(cores)
        self._groups = Groups(config.memory_cgroup)
        self._gpus = Question(gpus, name="nvml")
        self._lost: dict[str, str] = {}  # devices, and why
        self._wire = wire
        self._arena = arena or Arena(bytes_max=0, idle_bytes_max=0)
        self._events = events
        self._metrics = metrics
        self._zygotes = {runtime: Zygote(runtime, spawned=one) for runtime, one in (spawned or {}).items()}
        self._routes: dict[str, Route[Version]] = {}
        self._loaded: set[Version] = set()
        self._loading: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()  # by digest
        self._numbers = itertools.count(FIRST_ID)
        self._work = asyncio.Event()
        self._awaited: set[asyncio.Event] = set()  # set once the sweeper has been round
        self._group: asyncio.TaskGroup | None = None
        self._now: Callable[[], float] = time.monotonic  # the loop's once it runs; to find the loop costs a system call
        self._tasks: set[asyncio.Task[None]] = set()
        self._residency = Residency(
            meter or SystemMeter(),
            learned or Learned(None, ""),
            now=lambda: self._now(),
            events=events,
            metrics=metrics,
        )
        self._latency = metrics.histogram(
            "inferd_request_duration_seconds", "Arrival to answer of successful requests", ("model", "version")
        )
        self._handed = metrics.counter(
            "inferd_requests_handed_over",
            "Requests that the version before answered because the one on trial failed",
            ("model", "version", "code"),
        )
        self._copies = metrics.counter(
            "inferd_shadow_requests", "Copies for a candidate by outcome", ("model", "version", "outcome")
        )
        self._copy_latency = metrics.histogram(
            "inferd_shadow_duration_seconds", "A candidate's answers to copies", ("model", "version")
        )
        self._answers = metrics.counter("inferd_requests", "Answers by code", ("model", "version", "code"))
        self._tested = metrics.counter(
            "inferd_selftests", "Self-tests of what serves, by how they ended", ("model", "version", "result")
        )
        self._tests = SelfTests(
            lambda: self._loaded,
            interval_s=config.selftest_interval_s,
            idle_s=config.variants.idle_s,
            timeout_s=config.hang_timeout_s,
            share_max=config.selftest_share_max,
        )
        self._add_gauges(metrics)

    def _add_gauges(self, metrics: Metrics) -> None:
        gauges: dict[str, tuple[str, Callable[[Version], float]]] = {
            "inferd_queue_requests": ("Requests admitted and not answered", _queue_length),
            "inferd_lanes": ("Direct lanes that are open", lambda one: one.pool.lanes if one.pool else 0),
            "inferd_model_ready": ("1 while requests are answered", lambda one: one.ready or one.on_demand),
            "inferd_model_default": ("1 for what answers requests that name no version", self._is_default),
            "inferd_model_loaded": ("1 while the model is in memory", lambda one: one.ready),
            "inferd_variants_failed": ("Variants of the version that failed", lambda one: one.fallen),
            "inferd_workers": ("Workers that serve", lambda one: len(one.pool.links) if one.pool else 0),
            "inferd_worker_deaths": ("Deaths of the version's workers", lambda one: one.deaths),
        }
        for name, (text, of) in gauges.items():
            metrics.gauge(name, text, ("model", "version"), self._gauge(of))
        labels = ("model", "version")
        metrics.gauge("inferd_canary_percent", "Of the routing keys that a candidate answers", labels, self._shares)
        metrics.gauge(
            "inferd_shadow_latency_delta_seconds",
            "By how much a candidate's answers to copies took longer than the originals",
            (*labels, "quantile"),
            self._deltas,
        )
        metrics.gauge("inferd_shadow_agreement", "Of a candidate's copies, 0..1", labels, self._agreements)

    @property
    def hang_timeout_s(self) -> float:
        """After which a worker that does not answer is killed (seconds)."""
        return self._config.hang_timeout_s

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """The engine lives as long as the body; afterwards no worker and no zygote is left."""
        if self._groups.reason:
            _log.info("workers have no memory control group", reason=self._groups.reason)
        self._scratch.mkdir(parents=True, exist_ok=True)
        left = list(self._scratch.iterdir())  # of a daemon that was killed
        if left and (killed := kill_left(self._scratch.resolve())):
            _log.warning("workers of a killed daemon were left; killed them", pids=killed)
        for folder in left:
            shutil.rmtree(folder, ignore_errors=True)
        self._now = asyncio.get_running_loop().time
        async with asyncio.TaskGroup() as group:
            self._group = group
            try:
                yield
            finally:
                self._group = None
                for task in self._tasks:
                    task.cancel()
                await _side_by_side([version.close(timeout_s=0) for version in self._loaded], "close")
                await _side_by_side([zygote.stop() for zygote in self._zygotes.values()], "stop a zygote")
                with contextlib.suppress(OSError):  # who removed it all has done our work
                    for folder in self._scratch.iterdir():  # of workers that wrote while they were killed
                        shutil.rmtree(folder, ignore_errors=True)
                await self._residency.save()

    async def run(self) -> None:
        """Component: answer requests whose deadline passed, kill workers that hang, unload what is idle."""
        async with asyncio.TaskGroup() as group:
            group.create_task(self._sweep(), name="sweep")
            group.create_task(self._residency.run(), name="residency")
            group.create_task(self._tests.run(), name="self-tests")

    async def _sweep(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            await self._work.wait()
            now = loop.time()
            busy = watched = False
            for version in self._loaded:
                one_busy, one_watched = version.sweep(now)
                busy, watched = busy or one_busy, watched or one_watched
            for turn in self._awaited:
                turn.set()
            if not busy:
                self._work.clear()
                if watched:
                    loop.call_later(self._config.hang_timeout_s / 4, self._work.set)
                continue
            await asyncio.sleep(_SWEEP_S)

    async def progress(self) -> None:
        """Return once every model has been looked after anew; if that has stopped, never."""
        turn = asyncio.Event()
        self._awaited.add(turn)
        self._work.set()
        try:
            await turn.wait()
        finally:
            self._awaited.discard(turn)

    # Requests

    def submit(self, request: InferRequest) -> None:
        """Answer ``request`` once, sooner or later; never blocks, never raises for expected failures."""
        number = next(self._numbers)
        now = self._now()
        job = Job(request, number, now)
        try:
            job.version = self._route_for(job)
            job.client = self._admission.admit(request.client, now)
            request.handle = job
            job.version.submit(job)
        except AgentError as error:
            self._answers.add((request.model if request.model in self._routes else "", "", error.code))
            job.settle()
            request.answer(Header(error_of(error, None)), ())
            return
        if not self._work.is_set():
            self._work.set()

    def cancel(self, request: InferRequest) -> None:
        """Forget ``request``: it gets no answer any more; a worker that has not begun it never will."""
        job = request.handle
        if job is not None and job.version is not None:
            job.version.cancel(job)
            job.settle()

    def pace(self, request: InferRequest, *, paused: bool) -> None:
        """Hold the stream that answers ``request``, or let it go on; its deadline runs in any case."""
        job = request.handle
        if job is not None and job.version is not None:
            job.version.pace(job, paused=paused)

    def open_lane(self, model: str, version: str | None = None, *, client: str, deadline_ms: int) -> Lane:
        """Open a direct lane to the worker of ``model`` for ``client``.

        Args:
            model: Its name on this box.
            version: Whose worker, instead of the default's.
            client: Whom fairness goes by.
            deadline_ms: Of requests that bring none.

        Raises:
            UnknownModelError, UnavailableError: as for a request.
            LaneRefusedError: lanes are off, the client is limited, or this model gives none.
        """
        config = self._config
        if not config.lanes_max:
            raise LaneRefusedError("direct lanes are switched off here")
        found = self._choose(model, version)
        if not version and self._known(model).canary is not None:
            raise LaneRefusedError("a candidate is being tried: the daemon divides the requests")
        if self._admission.limited(client):
            raise LaneRefusedError("this client's requests are limited, so the daemon counts them")
        if found.pool is None:
            raise LaneRefusedError("no worker is ready")
        if sum(pool.lanes for one in self._loaded for pool in one.pools) >= config.lanes_max:
            raise LaneRefusedError(f"{config.lanes_max} lanes are open")
        terms = Terms(
            client=client,
            deadline_ms=deadline_ms,
            queue_requests_max=config.queue_requests_max,
            queue_bytes_max=config.queue_bytes_max,
            bounds_s=LATENCY_BUCKETS_S,
        )
        lane = found.pool.open_lane(next(self._numbers), terms)
        self._work.set()  # it is watched from now on
        return lane

    def _route_for(self, job: Job) -> Version:
        request = job.request
        route = self._known(request.model)
        version = route.choose(request.version)
        if route.canary is not None and not request.version:
            version, job.copy = route.canary.choose(request, job.arrived, version)
        return version

    def _choose(self, model: str, version: str | None = None) -> Version:
        return self._known(model).choose(version)

    def _known(self, model: str) -> Route[Version]:
        route = self._routes.get(model)
        if route is None:
            raise UnknownModelError(f"Request for unknown model: {model!r} is not found")
        return route

    # Versions

    async def load(self, spec: VersionSpec, *, beside: bool = False) -> Version:
        """Start a version beside what serves; nothing is routed to it yet. It stays in memory until ``confirm``.

        Where memory does not hold both, the version that it is to replace is unloaded meanwhile and its requests wait.
        One that another slot holds already is not loaded again.

        Args:
            spec: What to load.
            beside: It replaces nothing: it will answer requests that name it.

        Raises:
            WorkerError: no variant could be loaded or passed its self-test.
            OverloadedError: there is no room in memory now.
        """
        async with self._one_load(spec):
            version = self._same(spec)
            if version is not None:
                version.hold(beside=beside)
                try:
                    await version.ensure("deployment")
                except BaseException:
                    await self.retire(version, beside=beside, timeout_s=0)
                    raise
                version.begin_trial(beside=beside)
                return version
            version = self._make_version(spec, Stage.TRYING)
            version.trying_beside = beside
            version.hold(beside=beside)
            self._loaded.add(version)
            try:
                await version.load(cause="deployment")
            except BaseException:
                await self._drop(version)
                default = None if beside else self.active(spec.model)
                if default is not None and not default.keeping.lazy:
                    default.wake(RESTORED)
                raise
        self._route_of(spec.model).kept.append(version)
        return version

    async def restore(self, spec: VersionSpec, *, beside: bool = False) -> Version:
        """Bring a version back that was confirmed: now, or at its first request if it is lazy or memory is short.

        Raises:
            WorkerError: no variant could be loaded or passed its self-test.
        """
        async with self._one_load(spec):
            version = self._same(spec) or self._make_version(spec, Stage.SERVING)
            version.hold(beside=beside)
            if version in self._loaded:
                return version
            self._loaded.add(version)
            if spec.keeping.lazy:
                version.sleep()
                return version
            try:
                await version.load(cause="start", may_unload=False)
            except OverloadedError as error:
                _log.warning("no room in memory; loads on demand", model=spec.model, reason=str(error))
                version.sleep()
            except BaseException:
                await self._drop(version)
                raise
        return version

    def try_out(self, version: Version, *, canary_percent: float, shadow_percent: float) -> None:
        """Let a loaded candidate answer a share of the keys, and copy a share of the other requests to it.

        May be repeated with other shares; what copies have shown is kept as long as their share is. The default stands
        in for it wherever it fails. The model gives no direct lanes until ``end_try``. Copies may also go to the
        version before one on trial, to tell whether that is slow or the box.
        """
        route = self._route_of(version.model)
        default, before = route.default, route.canary
        if default is None or default is version:
            return
        same = before is not None and before.candidate is version
        shadow = before.shadow if before is not None and same else None
        if before is not None and (not same or shadow is None or shadow.percent != shadow_percent):
            before.end()
            shadow = None
        if shadow is None and shadow_percent:
            labels = (version.model, version.version)
            shadow = Shadow(
                version,
                default,
                shadow_percent,
                submit=partial(self._submit_copy, version),
                outcomes=self._copies,
                durations=self._copy_latency.series(labels),
                now=self._now,
            )
        if version.stage is Stage.TRYING:  # not one that stands in itself
            version.stand_in = default
        requests = (before.requests, before.diverted) if before is not None and same else (0, 0)
        route.canary = Canary(version, canary_percent, shadow, *requests)
        version.route(here=True)
        if default.pool is not None:
            default.pool.revoke_lanes()

    def end_try(self, version: Version) -> None:
        """Let the default answer everything again; repeating it does nothing."""
        route = self._route_of(version.model)
        if route.canary is None or route.canary.candidate is not version:
            return
        route.canary.end()
        route.canary = None
        version.route(here=version is route.default or route.beside.get(version.version) is version)

    def tried(self, version: Version) -> Tally:
        """Return what copies of requests have shown of a candidate."""
        canary = self._route_of(version.model).canary
        return canary.tally() if canary is not None and canary.candidate is version else Tally()

    def canary(self, model: str) -> dict[str, Any] | None:
        """Return what an operator wants to see of a model's candidate, if it has one."""
        route = self._routes.get(model)
        return route.canary.status() if route is not None and route.canary is not None else None

    def _submit_copy(self, version: Version, copy: Copy) -> Job:
        job = Job(copy, next(self._numbers), copy.arrived)
        job.copied, job.version, copy.handle = True, version, job
        try:
            version.submit(job)
        except AgentError:
            job.settle()
            raise
        self._work.set()
        return job

    def confirm(self, version: Version, *, beside: bool = False) -> None:
        """It has earned trust: from now on its own configuration says how long it stays in memory."""
        version.end_trial(beside=beside)
        self._residency.look_again()

    async def load_now(self, model: str, version: str | None = None) -> None:
        """Load a model that sleeps.

        Raises:
            UnknownModelError: no such model or version.
            OverloadedError, OutOfMemoryError, UnavailableError: it cannot be loaded now.
        """
        await self._choose(model, version).ensure(OPERATOR)

    async def unload_now(self, model: str, version: str | None = None) -> None:
        """Answer what a model holds, then unload it until it is asked again.

        Raises:
            UnknownModelError: no such model or version.
            CommandError: it is pinned, or a deployment needs it.
            UnavailableError: it is being loaded, or cannot be.
        """
        found = self._choose(model, version)
        if found.held_by or found.keeping.pinned:
            raise CommandError(f"{found.name} stays in memory: it is {found.held_by or 'pinned'}")
        if found.asleep:
            return
        if not found.ready:
            raise UnavailableError(f"{found.name}: {found.reason or 'its worker is restarting'}")
        await found.unload("operator", "unloaded by an operator")

    async def self_test(self, model: str, version: str = "", *, wake: bool = True) -> dict[str, Any]:
        """Run a version's golden inputs again in all its workers, and do what follows if they do not pass.

        One that sleeps is loaded for it, or not tested unless ``wake`` is set.

        Raises:
            UnknownModelError: no such model or version.
            UnavailableError: it does not serve.
            AgentError: it cannot be loaded now; the class says why.
        """
        found = self._choose(model, version)
        named = {"model": model, "version": found.version}
        if found.asleep and not wake:
            return {**named, "ok": found.on_demand, "message": found.reason}
        report = await found.examine(timeout_s=self._config.hang_timeout_s)
        return {**named, **report.plain()}

    def scale(self, model: str, bounds: Bounds) -> None:
        """Let the versions of a model have a number of workers within ``bounds``."""
        for version in self._loaded:
            if version.model == model:
                version.rebound(bounds)
        self._work.set()

    def warm(self, runtime: str) -> None:
        """Start a runtime's zygote now, so that the first load need not wait for it; failures show at that load."""
        self._spawn(self._warm(self._zygote(runtime)), f"warm {runtime}")

    async def _warm(self, zygote: Zygote) -> None:
        with contextlib.suppress(LoadError):
            await zygote.start()

    def activate(self, version: Version) -> Version | None:
        """Let ``version`` be its model's default from now on; return what was it before, still loaded."""
        self.end_try(version)
        route = self._route_of(version.model)
        previous, route.default = route.default, version
        route.kept = [one for one in route.kept if one is not version]
        route.expected.pop("", None)
        version.route(here=True)
        back = version.stage is Stage.BEFORE
        if back:
            version.stage = Stage.SERVING
            self._residency.look_again()
        if previous is version or previous is None:
            return None
        route.kept.append(previous)
        version.stand_in = previous if version.stage is Stage.TRYING else None
        previous.route(here=route.beside.get(previous.version) is previous)
        previous.stage = Stage.LEFT if back else Stage.BEFORE
        if previous.pool is not None:
            previous.pool.revoke_lanes()
        for job in previous.give_up_unserved():
            version.adopt(job)
        return previous

    def activate_beside(self, version: Version) -> Version | None:
        """Let ``version`` answer the requests that name it from now on; return what did before, still loaded."""
        route = self._route_of(version.model)
        previous = route.beside.get(version.version)
        route.beside[version.version] = version
        if version.holders == version.beside:  # else its model's own slot keeps it, too
            route.kept = [one for one in route.kept if one is not version]
        route.expected.pop(version.version, None)
        version.route(here=True)
        return previous if previous is not version else None

    async def retire(self, version: Version, *, beside: bool = False, timeout_s: float = 30.0) -> None:
        """Take a version from its slot; unless another slot holds it, answer what it still holds, then unload it."""
        if not beside:
            self.end_try(version)
        route = self._route_of(version.model)
        route.leave(version, beside=beside)
        version.let_go(beside=beside)
        if version.holders:
            version.route(here=version is route.default or route.beside.get(version.version) is version)
            self._residency.look_again()
            return
        self._prune(version.model)
        await version.close(timeout_s=timeout_s)
        self._loaded.discard(version)

    async def _drop(self, version: Version) -> None:
        await version.close(timeout_s=0)
        self._loaded.discard(version)

    def device_lost(self, device: str, reason: str) -> None:
        """Let every version leave the variants of a device (``cuda:0``) that is gone."""
        self._lost[device] = reason
        for version in list(self._loaded):
            version.device_lost(device)

    def device_back(self, device: str) -> None:
        """Let every version try its variants of a device again."""
        self._lost.pop(device, None)
        for version in list(self._loaded):
            version.device_back(device)

    def expect(self, model: str, reason: str, *, version: str = "") -> None:
        """Say why a known model, or the version to be beside it, does not serve yet; requests to it are told."""
        route = self._route_of(model)
        if (route.default if not version else route.beside.get(version)) is None:
            route.expected[version] = reason

    def forget(self, model: str, *, version: str = "") -> None:
        """Expect a model, or a version beside it, no longer."""
        self._route_of(model).expected.pop(version, None)
        self._prune(model)

    # Views

    def models(self) -> list[str]:
        """Return the names of all slots, serving or expected."""
        return sorted(self._routes)

    def model_state(self, name: str, version: str | None = None) -> ModelState:
        """Return whether the model serves now.

        Raises:
            UnknownModelError: no such slot or version.
        """
        route = self._known(name)
        found = route.find(version)
        if found is None:
            return ModelState(ready=False, reason=route.absence(version))
        if found.on_demand:
            return ModelState(ready=True, reason=ON_DEMAND)
        return ModelState(ready=found.ready, reason=found.why_not)

    def versions(self, name: str) -> list[str]:
        """Return the versions that requests may name, the default first; also those that do not serve yet.

        Raises:
            UnknownModelError: no such model.
        """
        return self._known(name).versions

    def describe(self, name: str, version: str | None = None) -> dict[str, Any]:
        """Return the model's metadata.

        Raises:
            UnknownModelError: no such slot or version.
            UnavailableError: known, and nothing is loaded.
        """
        return {**self._choose(name, version).describe(), "versions": self.versions(name)}

    def find(self, name: str, version: str | None = None) -> Version | None:
        """Return the version that would answer such a request."""
        route = self._routes.get(name)
        return route.find(version) if route is not None else None

    def status(self) -> list[dict[str, Any]]:
        """Return one entry per slot: each model's default, then its versions beside it."""
        return [row for _, route in sorted(self._routes.items()) for row in _status_of(route)]

    def processes(self) -> list[dict[str, Any]]:
        """Return pid, role and PSS (bytes) of the engine's processes."""
        found = [(zygote.pid, f"zygote {name}") for name, zygote in self._zygotes.items()]
        for version in self._loaded:
            links = [link for pool in version.pools for link in pool.links]
            found += [(link.process.pid, f"worker {version.spec.model} {version.spec.version}") for link in links]
        return [{"pid": pid, "role": role, "pss_bytes": pss_bytes(pid)} for pid, role in found if pid is not None]

    async def memory(self) -> dict[str, dict[str, int]]:
        """Return what models hold, may hold and have free, by place (bytes)."""
        return await self._residency.look()

    def active(self, model: str) -> Version | None:
        """Return the version that serves ``model``."""
        return self.find(model)

    # Inside

    def _one_load(self, spec: VersionSpec) -> asyncio.Lock:
        """Return the lock under which a version is looked for and loaded, so that two slots share what they load."""
        return self._loading.setdefault(spec.digest, asyncio.Lock())

    def _same(self, spec: VersionSpec) -> Version | None:
        """Return the version if another slot holds it."""
        wanted = (spec.model, spec.version, spec.digest)
        return next(
            (one for one in self._loaded if (one.model, one.version, one.digest) == wanted and not one.closed), None
        )

    def _prune(self, model: str) -> None:
        if self._route_of(model).empty:
            del self._routes[model]

    def _route_of(self, model: str) -> Route[Version]:
        return self._routes.setdefault(model, Route(model))

    def _routed(self) -> Iterator[Version]:
        return itertools.chain.from_iterable(self._routes.values())

    def _size_of(self, model: str) -> int:
        active = self.active(model)
        return active.pool.size if active is not None and active.pool is not None else 0

    def _make_version(self, spec: VersionSpec, stage: Stage) -> Version:
        return Version(
            spec,
            stage=stage,
            make_pool=partial(self._make_pool, size_before=self._size_of(spec.model)),
            residency=self._residency,
            spawn=self._spawn,
            events=self._events,
            latency=self._latency.series((spec.model, spec.version)),
            answers=self._answers,
            handed=self._handed,
            tested=self._tested,
            streams=StreamCounts(self._metrics, (spec.model, spec.version)),
            now=self._now,
            config=self._config.variants,
            book=self._book,
            memory_wait_s=self._config.memory_wait_s,
            make_crashes=partial(Crashes, deaths_max=self._config.deaths_max, window_s=self._config.deaths_window_s),
            lost=self._lost,
        )

    def _make_pool(self, variant: VariantSpec, version: Version, *, size_before: int | None = None) -> Pool:
        return Pool(
            variant,
            self._zygote(variant.runtime),
            self._config,
            owner=version,
            spawn=self._spawn,
            scratch=self._scratch,
            wire=self._wire,
            arena=self._arena,
            numbers=self._numbers,
            version=version.version,
            cores=self._cores,
            seat=Seat(self._residency, version, variant),
            crashes=version.crashes_of(variant.id),
            make_group=self._groups.make,
            place=self._placed if needs_gpu(variant) else None,
            size_before=size_before or 0,
        )

    async def _placed(self, variant: VariantSpec) -> VariantSpec:
        try:
            gpus = await self._gpus.answer(_DRIVER_TIMEOUT_S)
        except TimeoutError as error:
            raise LoadError(f"the GPU driver gave no answer in {_DRIVER_TIMEOUT_S:g} s") from error
        return placed(variant, gpus, self._lost)

    def _zygote(self, runtime: str) -> Zygote:
        zygote = self._zygotes.get(runtime)
        if zygote is None:
            zygote = self._zygotes[runtime] = Zygote(runtime)
        return zygote

    def _spawn(self, work: Coroutine[Any, Any, None], name: str) -> None:
        if self._group is None:
            work.close()
            return
        task = self._group.create_task(_contained(work, name), name=name)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _gauge(self, of: Callable[[Version], float]) -> Callable[[], list[tuple[tuple[str, ...], float]]]:
        return lambda: [((version.model, version.version), of(version)) for version in self._routed()]

    def _canaries(self) -> list[Canary]:
        return [route.canary for route in self._routes.values() if route.canary is not None]

    def _shares(self) -> list[tuple[tuple[str, ...], float]]:
        return [((one.candidate.model, one.candidate.version), one.percent) for one in self._canaries()]

    def _agreements(self) -> list[tuple[tuple[str, ...], float]]:
        tallies = [((one.candidate.model, one.candidate.version), one.tally()) for one in self._canaries()]
        return [(labels, tally.agreed / tally.compared) for labels, tally in tallies if tally.compared]

    def _deltas(self) -> list[tuple[tuple[str, ...], float]]:
        found: list[tuple[tuple[str, ...], float]] = []
        for one in self._canaries():
            tally = one.tally()
            for q in (0.5, 0.95) if tally.durations.total else ():
                delta_s = tally.durations.quantile_s(q) - tally.originals.quantile_s(q)
                found.append(((one.candidate.model, one.candidate.version, f"{q:g}"), delta_s))
        return found

    def _is_default(self, version: Version) -> bool:
        return self._routes[version.model].default is version


def _status_of(route: Route[Version]) -> Iterator[dict[str, Any]]:
    named = {"model": route.model, "slot": route.model, "role": "default"}
    if route.default is not None:
        trying = {"canary": route.canary.status()} if route.canary is not None else {}
        yield {**named, **route.default.status(), **trying}
    elif "" in route.expected:
        yield {**named, "ready": False, "reason": route.expected[""]}
    for version in sorted(route.beside.keys() | route.expected.keys() - {""}):
        named = {"model": route.model, "slot": f"{route.model}@{version}", "role": "beside"}
        if version in route.beside:
            yield {**named, **route.beside[version].status()}
        else:
            yield {**named, "ready": False, "reason": route.expected[version]}


def _queue_length(version: Version) -> float:
    return version.pool.outstanding + version.pool.lanes_waiting if version.pool else 0


async def _side_by_side(works: Sequence[Coroutine[Any, Any, None]], name: str) -> None:
    """Do them all, whatever comes of each: one that hangs takes its time once."""
    async with asyncio.TaskGroup() as group:
        for work in works:
            group.create_task(_contained(work, name), name=name)


async def _contained(work: Coroutine[Any, Any, None], name: str) -> None:
    """Trouble with one model's processes or with the disk must not end the others."""
    try:
        await work
    except (AgentError, OSError) as error:
        _log.error("background work failed", task=name, reason=str(error))


def pss_bytes(pid: int) -> int:
    """Return a process's proportional set size, 0 when it cannot be read."""
    try:
        return int(psutil.Process(pid).memory_full_info().pss)
    except (psutil.Error, OSError):
        return 0
