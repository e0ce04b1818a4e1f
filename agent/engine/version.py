"""One loaded version of a model: the ladder of its variants, one of them serving.

Loading walks the variants best first; each that cannot load or fails its self-test is skipped with its reason kept.
A variant that keeps dying while it serves is left for the next one, and its waiting jobs move along.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Sequence
from typing import Any

from agent.engine.claims import answer_of
from agent.engine.job import Job, error_of
from agent.engine.lanes import LaneCounts
from agent.engine.pool import Pool, PoolOwner
from agent.engine.streams import StreamCounts
from agent.engine.types import OIP_DATATYPES, VariantSpec, VersionSpec
from agent.errors import AgentError, LoadError, UnavailableError, WorkerError, by_code
from agent.events import EventBus, Severity, Stream
from agent.log import get_logger
from agent.metrics import Counter, HistogramSeries
from agent.shares import Shares
from agent.wire import Buffer, Header

_log = get_logger("version")
# Faults of the model, not of the caller: what probation counts.
_FAULTS = frozenset(
    {"worker_died", "handler_failed", "inference_failed", "out_of_memory", "device_lost", "worker_failed", "internal"}
)

PoolMaker = Callable[[VariantSpec, PoolOwner], Pool]
Spawn = Callable[[Coroutine[Any, Any, None], str], None]


class Version:
    """A version that can answer. Made by ``Engine.load``; closed by ``Engine.retire``."""

    def __init__(
        self,
        spec: VersionSpec,
        *,
        make_pool: PoolMaker,
        spawn: Spawn,
        events: EventBus,
        latency: HistogramSeries,
        answers: Counter,
        streams: StreamCounts,
        now: Callable[[], float],
        revive_s: float,
    ) -> None:
        self.spec = spec
        self.pool: Pool | None = None
        self.reason = "loading"  # why it cannot serve; empty while it can
        self.skipped: list[dict[str, str]] = []
        self.deaths = 0
        self.good = 0
        self.faults = 0
        self._closing = asyncio.Event()
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
    def ready(self) -> bool:
        """Whether a request would be dispatched now."""
        return self.pool is not None and bool(self.pool.links)

    async def load(self, carried: Sequence[Job] = ()) -> None:
        """Start the best variant that loads and passes its self-test; ``carried`` jobs are its first.

        Raises:
            WorkerError: none did; its class is that of the last failure, its message lists all.
        """
        last: WorkerError | None = None
        jobs = list(carried)
        while self._rung < len(self.spec.variants) and not self._closing.is_set():
            variant = self.spec.variants[self._rung]
            pool = self._make_pool(variant, self)
            for job in jobs:  # they wait in the new pool, where deadlines and cancels find them
                pool.adopt(job)
            self.pool = pool
            try:
                await pool.start()
            except WorkerError as error:
                jobs = pool.take_waiting()
                self.pool = None
                await pool.close(timeout_s=0)
                self._skip(variant.id, error.code, str(error))
                last = error
                self._rung += 1
                continue
            if self._closing.is_set():
                await pool.close(timeout_s=0)
                return
            self.reason = ""
            if self.skipped:
                _log.warning("serving a fallback", model=self.spec.model, variant=variant.id, skipped=self.skipped)
            return
        reasons = "; ".join(f"{skip['variant']}: {skip['reason']}" for skip in self.skipped)
        self.reason = "unloaded" if self._closing.is_set() else f"no variant loads: {reasons}"
        for job in jobs:
            self._fail(job, UnavailableError(self.reason))
        raise type(last or LoadError(""))(self.reason) from last

    def submit(self, job: Job) -> None:
        """Take one job.

        Raises:
            UnavailableError: no variant is serving.
            OverloadedError: the queue is full, or crowded and this client holds its part.
        """
        if self.pool is None or self._closing.is_set():
            raise UnavailableError(f"{self.spec.model} {self.spec.version}: {self.reason or 'unloaded'}")
        client = job.request.client
        self._shares.check(client, outstanding=self.pool.outstanding, bound=self.pool.queue_requests_max)
        self.pool.submit(job)
        if not job.settled:
            self._shares.add(client)
            job.shares = self._shares

    async def close(self, *, timeout_s: float) -> None:
        """Answer what is held, then end the workers."""
        self._closing.set()
        if self.pool is not None:
            await self.pool.close(timeout_s=timeout_s)

    async def self_test(self, *, timeout_s: float) -> dict[str, Any]:
        """Run the golden inputs again in the serving worker.

        Raises:
            WorkerDiedError: no worker answered in time.
        """
        if self.pool is None:
            raise UnavailableError(self.reason)
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
        hello = self.pool.hello if self.pool is not None else {}
        signature = hello.get("signature", {})
        return {
            "name": self.spec.model,
            "versions": [self.spec.version],
            "platform": hello.get("runtime", self.spec.platform),
            "inputs": [_oip_tensor(tensor) for tensor in signature.get("inputs", [])],
            "outputs": [_oip_tensor(tensor) for tensor in signature.get("outputs", [])],
            "variant": hello.get("variant"),
            "device": hello.get("device"),
            "max_batch": hello.get("max_batch", 1),
            "streams": hello.get("streams", False),
        }

    def status(self) -> dict[str, Any]:
        """Return what an operator wants to see."""
        pool = self.pool
        hello = pool.hello if pool is not None else {}
        return {
            "version": self.spec.version,
            "digest": self.spec.digest,
            "ready": self.ready,
            "reason": self.reason,
            "variant": hello.get("variant"),
            "precision": hello.get("precision"),
            "device": hello.get("device"),
            "provider": hello.get("provider"),
            "sandbox": hello.get("sandbox"),
            "golden": hello.get("golden"),
            "load_ms": hello.get("load_ms"),
            "placement": hello.get("placement"),
            "memory": hello.get("memory"),
            "resident_bytes_max": pool.resident_bytes_max if pool is not None else 0,
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

    # PoolOwner

    def answered(self, job: Job, header: Header, body: Sequence[Buffer]) -> None:
        """Count the answer, name who gave it, pass it on."""
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
                self._latency.observe(self._now() - job.arrived)
            self._answers.add(self._ok)
        job.answer(answer, body)

    def lanes_counted(self, counts: LaneCounts) -> None:
        """Count what was answered without us."""
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

    async def _step_down(self, lost: Pool) -> None:
        jobs = lost.take_waiting()
        self._rung += 1
        self.reason = "its variant kept failing; the next one is starting"
        try:
            await self.load(jobs)
        except WorkerError as error:
            _log.error("no variant is left", model=self.spec.model, version=self.spec.version, error=str(error))
            self._events.emit(
                Stream.HEALTH,
                "model.failed",
                Severity.ERROR,
                model=self.spec.model,
                version=self.spec.version,
                reason=self.reason,
            )
        await lost.close(timeout_s=0)
        if self.pool is None:
            await self._revive()

    async def _revive(self) -> None:
        """Try the whole ladder again now and then: what failed may have been the box."""
        while True:
            await asyncio.sleep(self._revive_s)
            if self._closing.is_set():
                return
            self._rung = 0
            del self.skipped[len(self.spec.dropped) :]
            try:
                await self.load()
            except WorkerError as error:
                _log.warning("still no variant loads", model=self.spec.model, error=str(error))
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
        header["variant"] = self.pool.spec.id if self.pool is not None else ""

    def _fail(self, job: Job, error: AgentError) -> None:
        self.answered(job, Header(error_of(error, None)), ())

    def _skip(self, variant: str, code: str, reason: str) -> None:
        skip = {"variant": variant, "code": code, "reason": reason}
        self.skipped.append(skip)
        data: dict[str, Any] = {"model": self.spec.model, "version": self.spec.version, **skip}
        _log.warning("variant skipped", **data)
        self._events.emit(Stream.HEALTH, "variant.skipped", Severity.WARNING, **data)


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
