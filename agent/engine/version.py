"""One version of a model: the ladder of its variants, one of them serving, or asleep until it is asked.

Loading walks the variants best first; each that cannot load or fails its self-test is skipped with its reason kept.
A variant that keeps dying while it serves is left for the next one, and its waiting jobs move along.
A version that sleeps has no worker. Its first request wakes it and waits in the new pool with all that follow, where
deadlines and cancels find them; there is one load for all of them.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Coroutine, Iterable, Sequence
from enum import StrEnum
from typing import Any, Final

from agent.engine.claims import answer_of
from agent.engine.job import Job, error_of
from agent.engine.lanes import LaneCounts
from agent.engine.pool import Pool
from agent.engine.residency import Residency
from agent.engine.streams import StreamCounts
from agent.engine.types import OIP_DATATYPES, Keeping, VariantSpec, VersionSpec
from agent.errors import (
    AgentError,
    LoadError,
    OutOfMemoryError,
    OverloadedError,
    UnavailableError,
    WorkerError,
    by_code,
)
from agent.events import EventBus, Severity, Stream
from agent.log import get_logger
from agent.metrics import Counter, HistogramSeries
from agent.shares import Shares
from agent.wire import Buffer, Header

_log = get_logger("version")
# Faults of the model, not of the caller: what probation counts.
_FAULTS = frozenset({"worker_died", "handler_failed", "inference_failed", "out_of_memory", "worker_failed", "internal"})

_DRAIN_S: Final = 30.0
RESTORED: Final = "restored"  # the cause of a load that nobody needs to wait for
ON_DEMAND: Final = "not loaded, loads on demand"

Spawn = Callable[[Coroutine[Any, Any, None], str], None]


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
        make_pool: Callable[[VariantSpec, Version], Pool],
        residency: Residency,
        spawn: Spawn,
        events: EventBus,
        latency: HistogramSeries,
        answers: Counter,
        streams: StreamCounts,
        now: Callable[[], float],
        revive_s: float,
        memory_wait_s: float,
    ) -> None:
        self.spec = spec
        self.stage = stage
        self.asleep = False
        self.used_at = now()
        self.may_unload = True
        self.load_until = 0.0
        self.pool: Pool | None = None
        self.reason = "loading"  # why it cannot serve; empty while it can
        self.skipped: list[dict[str, str]] = []
        self.deaths = 0
        self.good = 0
        self.faults = 0
        self._closing = asyncio.Event()
        self._residency = residency
        self._memory_wait_s = memory_wait_s
        self._opened: Pool | None = None  # made ahead of its load, so that jobs can wait in it
        self._draining: list[Pool] = []  # unloaded, and still with answers to give
        self._on_demand = False  # what loads it now are requests and calls, which may be withdrawn
        self._woken = False  # it slept before it was loaded, and may sleep again if that fails
        self._calls = 0  # that wait for it to be loaded
        self._settled = asyncio.Event()  # no wake is under way
        self._settled.set()
        self._refusal: AgentError | None = None  # why the last load failed
        self._trouble: AgentError | None = None  # the same, if it sleeps and another try would hardly end otherwise
        self._wake_from = 0.0  # loop seconds
        self._hello: dict[str, Any] = {}  # the last worker's
        self._variant = ""
        self._make_pool = make_pool
        self._spawn = spawn
        self._events = events
        self._latency = latency
        self._answers = answers
        self._streams = streams
        self._now = now
        self._revive_s = revive_s
        self._shares = Shares()
        self._ok = (spec.model, spec.version, "ok")
        self._rung = 0  # the variant in use or tried next
        for name, reason in spec.dropped:
            self._skip(name, "no_variant", reason)

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
    def ready(self) -> bool:
        """Whether a request would be dispatched now."""
        return self.pool is not None and bool(self.pool.links)

    @property
    def on_demand(self) -> bool:
        """Whether it sleeps, and nothing is known that would keep a request from waking it."""
        return self.asleep and self._trouble is None

    @property
    def pools(self) -> tuple[Pool, ...]:
        """All that may hold jobs."""
        return (*self._draining, self.pool) if self.pool is not None else tuple(self._draining)

    # Loading

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
        began = self._now()
        self.may_unload, self.load_until = may_unload, began + (self._memory_wait_s if may_unload else 0.0)
        pool, self._opened = self._opened or self._open(carried), None
        failed: list[tuple[str, AgentError]] = []
        while pool is not None:
            try:
                await pool.start()
                break
            except (WorkerError, OverloadedError) as error:
                failed.append((pool.spec.id, error))
                if isinstance(error, WorkerError) and not self._closing.is_set():
                    self._skip(pool.spec.id, error.code, str(error))
                self._rung += 1
                waiting, left = pool.take_waiting(), pool
                pool = self._open(waiting)
                if pool is None:
                    refusal = self._fail_load(waiting, failed)
                    await left.close(timeout_s=0)
                    raise refusal from error
                await left.close(timeout_s=0)
        if pool is None:
            raise self._fail_load(carried, failed)
        if self._closing.is_set():
            await pool.close(timeout_s=0)
            return
        self._come_up(pool, failed, cause, self._now() - began)

    def sleep(self) -> None:
        """Be without workers until a request comes."""
        self.asleep, self.reason = True, ON_DEMAND

    def wake(self, cause: str) -> None:
        """Begin to load, if it sleeps; requests wait in its pool from now on."""
        if not self.asleep or self._closing.is_set():
            return
        self.asleep, self.reason, self._woken = False, "it is being loaded", True
        self._on_demand = cause != RESTORED
        exhausted = self._rung >= len(self.spec.variants)
        if exhausted or any(skip["code"] == OverloadedError.code for skip in self.skipped):
            self._restart_ladder()
        self._settled.clear()
        self._opened = self._open(())
        self._spawn(self._wake(cause), f"load {self.spec.model}")

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
            raise _told(self._refusal or UnavailableError(self.reason or "its worker is restarting"))

    def wanted(self) -> bool:
        """Whether anybody still waits for what it loads."""
        return not self._on_demand or self._calls > 0 or (self.pool is not None and bool(self.pool.waiting))

    async def unload(self, cause: str, reason: str) -> None:
        """Answer what its workers hold, let them go, and sleep; what waits for them waits for the next load."""
        pool = self.pool
        if pool is None or not self.ready or self._closing.is_set():
            return
        waiting = pool.take_waiting()
        self.pool = None
        self.sleep()
        self._draining.append(pool)
        if waiting:
            self.wake("request")
            for job in waiting:
                self.adopt(job)
        await pool.close(timeout_s=_DRAIN_S)
        self._draining.remove(pool)
        self._residency.tell_unloaded(self, cause, reason)

    # Work

    def submit(self, job: Job) -> None:
        """Take one job; one that sleeps wakes up.

        Raises:
            UnavailableError: no variant is serving.
            OverloadedError: the queue is full, or crowded and this client holds its part.
        """
        pool = self.pool
        if pool is None or self._closing.is_set():
            pool = self._awakened()
        client = job.request.client
        self._shares.check(client, outstanding=pool.outstanding, bound=pool.queue_requests_max)
        pool.submit(job)
        self.used_at = job.arrived
        if not job.settled:
            self._shares.add(client)
            job.shares = self._shares

    def adopt(self, job: Job) -> None:
        """Take a job that is already admitted."""
        job.version = self
        try:
            (self.pool or self._awakened()).adopt(job)
        except AgentError as error:
            self._fail(job, error)

    def cancel(self, job: Job) -> None:
        """Forget ``job``."""
        with_worker = job.link is not None and job.number in job.link.jobs
        for pool in self.pools:
            if (not with_worker or job.link in pool.links) and pool.cancel(job):
                return

    def give_up_unserved(self) -> list[Job]:
        """Remove and return the jobs that wait for it to be loaded and would as well be answered by another version."""
        if self.pool is None or self.ready:
            return []
        waiting = self.pool.take_waiting()
        for job in waiting:
            if job.request.version:
                self.pool.adopt(job)
        return [job for job in waiting if not job.request.version]

    async def close(self, *, timeout_s: float) -> None:
        """Answer what is held, then end the workers."""
        self._closing.set()
        for pool in self.pools:
            await pool.close(timeout_s=timeout_s)

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

    def describe(self) -> dict[str, Any]:
        """Return the model's metadata in the Open Inference Protocol's terms, plus what serves it."""
        hello = self._last_hello()
        told = self.spec.variants[0].worker if self.spec.variants else {}
        signature = hello.get("signature") or told.get("signature", {})
        return {
            "name": self.spec.model,
            "versions": [self.spec.version],
            "platform": self.spec.platform,
            "inputs": [_oip_tensor(tensor) for tensor in signature.get("inputs", [])],
            "outputs": [_oip_tensor(tensor) for tensor in signature.get("outputs", [])],
            "variant": hello.get("variant"),
            "device": hello.get("device"),
            "max_batch": hello.get("max_batch", told.get("batching", {}).get("max_batch", 1)),
            "streams": hello.get("streams", False),
        }

    def status(self) -> dict[str, Any]:
        """Return what an operator wants to see."""
        pool = self.pool
        hello = self._last_hello()
        return {
            "version": self.spec.version,
            "digest": self.spec.digest,
            "ready": self.ready or self.on_demand,
            "reason": self.reason,
            "residency": self.residency(),
            "variant": hello.get("variant"),
            "precision": hello.get("precision"),
            "device": hello.get("device"),
            "provider": hello.get("provider"),
            "sandbox": hello.get("sandbox"),
            "golden": hello.get("golden"),
            "load_ms": hello.get("load_ms"),
            "memory": hello.get("memory"),
            "fallbacks": self.skipped,
            "workers": [link.process.pid for link in pool.links] if pool is not None else [],
            "scaling": _scaling(pool) if pool is not None else None,
            "outstanding": pool.outstanding if pool is not None else 0,
            "lanes": pool.lanes if pool is not None else 0,
            "restarts": pool.restarts if pool is not None else 0,
            "deaths": self.deaths,
            "answers": {"good": self.good, "faults": self.faults},
            "latency_s": {"p50": self._latency.quantile(0.5), "p99": self._latency.quantile(0.99)},
        }

    def residency(self) -> dict[str, Any]:
        """Return whether it is in memory and why, and what it takes there."""
        keeping, pool = self.spec.keeping, self.pool
        variants = self.spec.variants
        need = self._residency.need_of(self.spec.digest, pool.spec if pool else variants[0]) if variants else None
        return {
            "loaded": self.ready,
            "load": "lazy" if keeping.lazy else "eager",
            "keep_alive_s": keeping.keep_alive_s if keeping.keep_alive_s < math.inf else None,
            "pinned": keeping.pinned,
            "held_by": self.held_by,
            "worker_bytes": dict(need.sizes) if need is not None else {},
            "source": need.source.value if need is not None else None,
            "held_bytes": self._residency.holding(self),
        }

    # PoolOwner

    def answered(self, job: Job, header: Header, body: Sequence[Buffer]) -> None:
        """Count the answer, name who gave it, pass it on."""
        self.used_at = now = self._now()
        answer = header.digest
        if answer is None:
            answer = header.digest = self._named(header)
        if answer["kind"] == "error":
            code = answer["code"]
            if code in _FAULTS:
                self.faults += 1
            self._answers.add((self.spec.model, self.spec.version, code))
        else:
            self.good += 1
            if not job.parts:  # a stream's duration says nothing about how fast the model answers
                self._latency.observe(now - job.arrived)
            self._answers.add(self._ok)
        job.answer(answer, body)

    def lanes_counted(self, counts: LaneCounts) -> None:
        """Count what was answered without us."""
        self.used_at = self._now()
        for code, amount in counts.codes.items():
            known = "ok" if code == "ok" else by_code(code, "").code
            self._answers.add((self.spec.model, self.spec.version, known), amount)
            if known == "ok":
                self.good += amount
            elif known in _FAULTS:
                self.faults += amount
        self._latency.merge(counts.buckets, counts.sum_s)

    def part(self, job: Job, header: dict[str, Any], body: Sequence[Buffer]) -> None:
        """Count a part of an answer, number it, pass it on; the first names who gives it."""
        header["seq"] = job.parts
        if not job.parts:
            self._sign(header)
        self._streams.count(job, self._now())
        job.part(header, body)

    def worker_died(self, pid: int, cause: str, retried: int) -> None:
        """Report a death the pool is already repairing."""
        self.deaths += 1
        data: dict[str, Any] = {
            "model": self.spec.model,
            "version": self.spec.version,
            "pid": pid,
            "cause": cause,
            "retried": retried,
        }
        _log.warning("worker died", **data)
        self._events.emit(Stream.HEALTH, "worker.died", Severity.WARNING, **data)

    def worker_ready(self, pid: int) -> None:
        """Note a worker that serves."""
        self.reason = ""
        data: dict[str, Any] = {"model": self.spec.model, "version": self.spec.version, "pid": pid}
        _log.info("worker ready", **data)
        self._events.emit(Stream.HEALTH, "worker.ready", **data)

    def pool_resized(self, change: str, workers: int, reason: str) -> None:
        """Report another number of workers, or why there is none."""
        data: dict[str, Any] = {
            "model": self.spec.model,
            "version": self.spec.version,
            "workers": workers,
            "reason": reason,
        }
        severity = Severity.WARNING if change == "held" else Severity.INFO
        (_log.warning if change == "held" else _log.info)(f"pool {change}", **data)
        self._events.emit(Stream.HEALTH, f"pool.{change}", severity, **data)

    def pool_lost(self, error: WorkerError) -> None:
        """Leave a variant that cannot be kept alive."""
        lost = self.pool
        if lost is None or self._closing.is_set():
            return
        self._skip(lost.spec.id, error.code, str(error))
        self._spawn(self._step_down(lost), f"fallback {self.spec.model}")

    # Inside

    def _last_hello(self) -> dict[str, Any]:
        """Return what its worker has said of itself, or the last one it had."""
        return self.pool.hello if self.pool is not None and self.pool.hello else self._hello

    def _open(self, jobs: Iterable[Job]) -> Pool | None:
        """Make the pool of the next variant, if there is one, and let the jobs wait in it."""
        if self._rung >= len(self.spec.variants) or self._closing.is_set():
            self.pool = None
            return None
        pool = self.pool = self._make_pool(self.spec.variants[self._rung], self)
        for job in jobs:
            pool.adopt(job)
        return pool

    def _come_up(self, pool: Pool, failed: Sequence[tuple[str, AgentError]], cause: str, elapsed_s: float) -> None:
        for variant, error in failed:
            if isinstance(error, OverloadedError):
                self._skip(variant, error.code, str(error))
        self.reason, self._refusal, self._trouble = "", None, None
        self._on_demand = self._woken = False
        self._variant, self._hello = pool.spec.id, pool.hello
        self.used_at = self._now()
        if self.skipped:
            _log.warning("serving a fallback", model=self.spec.model, variant=pool.spec.id, skipped=self.skipped)
        self._residency.tell_loaded(self, cause, variant=pool.spec.id, load_ms=round(elapsed_s * 1000, 1))

    def _fail_load(self, waiting: Iterable[Job], failed: Sequence[tuple[str, AgentError]]) -> AgentError:
        """Note that no variant is left, tell those who wait, and return the error to raise."""
        short = next((error for _, error in failed if isinstance(error, OverloadedError)), None)
        last = failed[-1][1] if failed else LoadError("")
        reasons = "; ".join(f"{skip['variant']}: {skip['reason']}" for skip in self.skipped)
        self.pool = None
        self.reason = "unloaded" if self._closing.is_set() else f"no variant loads: {reasons}"
        refusal = self._refusal = short or type(last)(self.reason)
        if self.stage is not Stage.TRYING and (self._woken or self.spec.keeping.lazy or short is not None):
            self.sleep()
            if short is None:
                self._trouble, self.reason = refusal, str(refusal)
                self._wake_from = self._now() + self._revive_s
        for job in waiting:
            self._fail(job, _told(refusal))
        return refusal

    def _awakened(self) -> Pool:
        """Return the pool of a version that wakes up.

        Raises:
            UnavailableError: it does not sleep, or could not be loaded a moment ago.
            OutOfMemoryError: likewise, for want of memory.
        """
        if self.asleep and not self._closing.is_set():
            wait_s = self._wake_from - self._now()
            if wait_s > 0 and self._trouble is not None:
                error = _told(self._trouble)
                error.retry_after_s = wait_s
                raise error
            self.wake("request")
        if self.pool is None or self._closing.is_set():
            raise UnavailableError(f"{self.name}: {self.reason or 'unloaded'}")
        return self.pool

    def _restart_ladder(self) -> None:
        self._rung = 0
        del self.skipped[len(self.spec.dropped) :]

    async def _wake(self, cause: str) -> None:
        try:
            await self.load(cause=cause)
        except (WorkerError, OverloadedError) as error:
            _log.warning("not loaded", model=self.spec.model, version=self.spec.version, reason=str(error))
        finally:
            self._settled.set()

    async def _step_down(self, lost: Pool) -> None:
        jobs = lost.take_waiting()
        self._rung += 1
        self.reason = "its variant kept failing; the next one is starting"
        self._opened = self._open(jobs)
        await lost.close(timeout_s=0)
        try:
            await self.load(() if self._opened is not None else jobs, cause="fallback")
        except (WorkerError, OverloadedError) as error:
            _log.error("no variant is left", model=self.spec.model, version=self.spec.version, error=str(error))
            self._events.emit(
                Stream.HEALTH,
                "model.failed",
                Severity.ERROR,
                model=self.spec.model,
                version=self.spec.version,
                reason=self.reason,
            )
            if not self.asleep:
                await self._revive()

    async def _revive(self) -> None:
        """Try the whole ladder again now and then: what failed may have been the box."""
        while True:
            await asyncio.sleep(self._revive_s)
            if self._closing.is_set():
                return
            self._restart_ladder()
            try:
                await self.load(cause="revival")
            except (WorkerError, OverloadedError) as error:
                _log.warning("still no variant loads", model=self.spec.model, error=str(error))
                if self.asleep:
                    return
            else:
                return

    def _named(self, header: Header) -> Header:
        """Return what a worker may say in its answer, and whose it is."""
        answer = answer_of(header)
        if answer["kind"] == "result":
            self._sign(answer)
        return Header(answer)

    def _sign(self, header: dict[str, Any]) -> None:
        header["model"], header["version"] = self.spec.model, self.spec.version
        header["variant"] = self._variant

    def _fail(self, job: Job, error: AgentError) -> None:
        header = Header(error_of(error, None))
        header.digest = Header(header)  # ours, not a worker's: it may say when to come back
        self.answered(job, header, ())

    def _skip(self, variant: str, code: str, reason: str) -> None:
        skip = {"variant": variant, "code": code, "reason": reason}
        self.skipped.append(skip)
        data: dict[str, Any] = {"model": self.spec.model, "version": self.spec.version, **skip}
        _log.warning("variant skipped", **data)
        self._events.emit(Stream.HEALTH, "variant.skipped", Severity.WARNING, **data)


def _told(refusal: AgentError) -> AgentError:
    """Return what a caller is told of a failed load, each time anew: an error keeps the traces of all who raise it."""
    kind = type(refusal) if isinstance(refusal, OverloadedError | OutOfMemoryError) else UnavailableError
    told = kind(str(refusal))
    told.retry_after_s = refusal.retry_after_s
    return told


def _scaling(pool: Pool) -> dict[str, Any]:
    return {
        "wanted": pool.size,
        "min": pool.spec.bounds.least,
        "max": pool.spec.bounds.most,
        "held": pool.held,
        "cores": [link.hello.get("cores", []) for link in pool.links],
    }


def _oip_tensor(tensor: dict[str, Any]) -> dict[str, Any]:
    shape = [size if isinstance(size, int) else -1 for size in tensor.get("shape", [])]
    return {
        "name": tensor.get("name"),
        "datatype": OIP_DATATYPES.get(str(tensor.get("dtype")), "BYTES"),
        "shape": shape,
    }
