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
from collections.abc import AsyncIterator, Coroutine, Iterable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Final

import psutil

from agent.arena import Arena
from agent.config import ClientLimitConfig, EngineConfig
from agent.engine.admission import Admission
from agent.engine.job import Job, error_of
from agent.engine.pool import Pool, PoolOwner
from agent.engine.streams import StreamCounts
from agent.engine.types import InferRequest, VariantSpec, VersionSpec
from agent.engine.version import Version
from agent.engine.zygote import Zygote
from agent.errors import AgentError, LoadError, UnavailableError, UnknownModelError
from agent.events import EventBus
from agent.log import get_logger
from agent.metrics import Metrics
from agent.wire import Limits

_SWEEP_S: Final = 0.05
_log = get_logger("engine")


class ModelState:
    """Readiness of one model or version, with the reason when it is not ready."""

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
    ) -> None:
        self._admission = Admission(limits)
        self._config = config
        self._scratch = scratch
        self._wire = wire
        self._arena = arena or Arena(bytes_max=0, idle_bytes_max=0)
        self._events = events
        self._metrics = metrics
        self._zygotes: dict[str, Zygote] = {}
        self._active: dict[str, Version] = {}
        self._loaded: set[Version] = set()
        self._expected: dict[str, str] = {}  # slots that are known and have nothing to serve yet: why
        self._numbers = itertools.count(1)
        self._work = asyncio.Event()
        self._group: asyncio.TaskGroup | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._latency = metrics.histogram(
            "inferd_request_duration_seconds", "Arrival to answer of successful requests", ("model", "version")
        )
        self._answers = metrics.counter("inferd_requests", "Answers by code", ("model", "version", "code"))
        metrics.gauge("inferd_queue_requests", "Requests admitted and not answered", ("model",), self._outstanding)
        metrics.gauge("inferd_model_ready", "1 while the model serves", ("model", "version"), self._readiness)
        metrics.gauge("inferd_worker_deaths", "Deaths of the active version's workers", ("model",), self._deaths)

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """The engine lives as long as the body; afterwards no worker and no zygote is left."""
        self._scratch.mkdir(parents=True, exist_ok=True)
        for left in self._scratch.iterdir():  # of a daemon that was killed
            shutil.rmtree(left, ignore_errors=True)
        async with asyncio.TaskGroup() as group:
            self._group = group
            try:
                yield
            finally:
                self._group = None
                for task in self._tasks:
                    task.cancel()
                for version in list(self._loaded):
                    await version.close(timeout_s=0)
                for zygote in self._zygotes.values():
                    await zygote.stop()

    async def run(self) -> None:
        """Component: answer requests whose deadline passed, kill workers that hang."""
        loop = asyncio.get_running_loop()
        while True:
            await self._work.wait()
            now = loop.time()
            busy = False
            for version in self._loaded:
                pool = version.pool
                if pool is not None and pool.busy:
                    busy = True
                    pool.sweep(now)
            if not busy:
                self._work.clear()
                continue
            await asyncio.sleep(_SWEEP_S)

    # Requests

    def submit(self, request: InferRequest) -> None:
        """Answer ``request`` once, sooner or later; never blocks, never raises for expected failures."""
        number = next(self._numbers)
        now = asyncio.get_running_loop().time()
        job = Job(request, number, now)
        try:
            job.version = self._route(request)
            job.client = self._admission.admit(request.client, now)
            request.handle = job
            job.version.submit(job)
        except AgentError as error:
            self._answers.add((request.model if request.model in self._active else "", "", error.code))
            job.settle()
            request.answer(error_of(error, request.header.get("id")), ())
            return
        if not self._work.is_set():
            self._work.set()

    def cancel(self, request: InferRequest) -> None:
        """Forget ``request``: it gets no answer any more; a worker that has not begun it never will."""
        job = request.handle
        if job is not None and job.version is not None:
            if job.version.pool is not None:
                job.version.pool.cancel(job)
            job.settle()

    def pace(self, request: InferRequest, *, paused: bool) -> None:
        """Hold the stream that answers ``request``, or let it go on; its deadline runs in any case."""
        job = request.handle
        if job is not None and job.version is not None and job.version.pool is not None:
            job.version.pool.pace(job, paused=paused)

    def _route(self, request: InferRequest) -> Version:
        version = self._active.get(request.model)
        if version is None:
            if request.model in self._expected:
                raise UnavailableError(f"model {request.model!r}: {self._expected[request.model]}")
            raise UnknownModelError(f"Request for unknown model: {request.model!r} is not found")
        if request.version and request.version != version.spec.version:
            raise UnknownModelError(
                f"Request for unknown model: {request.model!r} version {request.version!r} is not found; "
                f"version {version.spec.version!r} is active"
            )
        return version

    # Versions

    async def load(self, spec: VersionSpec) -> Version:
        """Start a version beside what serves; nothing is routed to it yet.

        Raises:
            WorkerError: no variant could be loaded or passed its self-test.
        """
        version = Version(
            spec,
            make_pool=self._make_pool,
            spawn=self._spawn,
            events=self._events,
            latency=self._latency.series((spec.model, spec.version)),
            answers=self._answers,
            streams=StreamCounts(self._metrics, (spec.model, spec.version)),
            now=asyncio.get_running_loop().time,
            revive_s=self._config.restart_cap_s,
        )
        try:
            await version.load()
        except BaseException:
            await version.close(timeout_s=0)
            raise
        self._loaded.add(version)
        return version

    def warm(self, runtime: str) -> None:
        """Start a runtime's zygote now, so that the first load need not wait for it; failures show at that load."""
        self._spawn(self._warm(self._zygote(runtime)), f"warm {runtime}")

    async def _warm(self, zygote: Zygote) -> None:
        with contextlib.suppress(LoadError):
            await zygote.start()

    def activate(self, version: Version) -> Version | None:
        """Route the slot to ``version`` from now on; return what served before, still loaded."""
        previous = self._active.get(version.spec.model)
        self._active[version.spec.model] = version
        self._expected.pop(version.spec.model, None)
        return previous if previous is not version else None

    async def retire(self, version: Version, *, timeout_s: float = 30.0) -> None:
        """Answer what the version still holds, then unload it; an active version leaves its slot."""
        if self._active.get(version.spec.model) is version:
            del self._active[version.spec.model]
        await version.close(timeout_s=timeout_s)
        self._loaded.discard(version)

    def expect(self, model: str, reason: str) -> None:
        """Say why a known model does not serve yet; requests to it are told."""
        if model not in self._active:
            self._expected[model] = reason

    # Views

    def models(self) -> list[str]:
        """Return the names of all slots, serving or expected."""
        return sorted({*self._active, *self._expected})

    def model_state(self, name: str, version: str | None = None) -> ModelState:
        """Return whether the model serves now.

        Raises:
            UnknownModelError: no such slot or version.
        """
        active = self._active.get(name)
        if active is None:
            if name in self._expected and not version:
                return ModelState(ready=False, reason=self._expected[name])
            raise UnknownModelError(f"Request for unknown model: {name!r} is not found")
        if version and version != active.spec.version:
            raise UnknownModelError(f"Request for unknown model: {name!r} version {version!r} is not found")
        return ModelState(
            ready=active.ready, reason="" if active.ready else active.reason or "the worker is restarting"
        )

    def describe(self, name: str, version: str | None = None) -> dict[str, Any]:
        """Return the model's metadata.

        Raises:
            UnknownModelError: no such slot or version.
            UnavailableError: known, and nothing is loaded.
        """
        state = self.model_state(name, version)
        if name not in self._active:
            raise UnavailableError(f"model {name!r}: {state.reason}")
        return self._active[name].describe()

    def status(self) -> list[dict[str, Any]]:
        """Return one entry per slot."""
        rows = [{"model": name, **version.status()} for name, version in self._active.items()]
        rows += [{"model": name, "ready": False, "reason": reason} for name, reason in self._expected.items()]
        return sorted(rows, key=lambda row: str(row["model"]))

    def processes(self) -> list[dict[str, Any]]:
        """Return pid, role and PSS (bytes) of the engine's processes."""
        found = [(zygote.pid, f"zygote {name}") for name, zygote in self._zygotes.items()]
        for version in self._loaded:
            links = version.pool.links if version.pool is not None else []
            found += [(link.process.pid, f"worker {version.spec.model} {version.spec.version}") for link in links]
        return [{"pid": pid, "role": role, "pss_bytes": pss_bytes(pid)} for pid, role in found if pid is not None]

    def active(self, model: str) -> Version | None:
        """Return the version that serves ``model``."""
        return self._active.get(model)

    # Inside

    def _make_pool(self, variant: VariantSpec, owner: PoolOwner) -> Pool:
        return Pool(
            variant,
            self._zygote(variant.runtime),
            self._config,
            owner=owner,
            spawn=self._spawn,
            scratch=self._scratch,
            wire=self._wire,
            arena=self._arena,
            numbers=self._numbers,
        )

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

    def _outstanding(self) -> list[tuple[tuple[str, ...], float]]:
        return [((name,), version.pool.outstanding if version.pool else 0) for name, version in self._active.items()]

    def _readiness(self) -> list[tuple[tuple[str, ...], float]]:
        return [((name, version.spec.version), float(version.ready)) for name, version in self._active.items()]

    def _deaths(self) -> list[tuple[tuple[str, ...], float]]:
        return [((name,), version.deaths) for name, version in self._active.items()]


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
