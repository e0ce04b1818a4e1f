"""Golden self-tests of models that serve, and what follows when one differs, fails or is not answered.

Every worker of a model that has been idle runs the bundle's golden inputs from time to time, one input after the other,
so that a request that comes meanwhile waits for one of them at most. A worker that does not pass is ended, and another
one starts in its place with a self-test of its own. If that fails, or the variant does not pass again before it has
served well for ``healthy_s``, it is left for the next one; with none left the model is not ready and says why, until a
later try passes.
Promises: a test is no traffic: it wakes nothing, keeps nothing in memory and counts as nobody's answer. One model is
tested at a time, and no test holds up anything else.
Leaves out: comparing (``worker/golden.py``), ending and falling back (``version.py``).
"""

from __future__ import annotations

import asyncio
import math
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Final, Protocol

import msgspec

from agent.engine.claims import GoldenResult, Tested, selftest_of
from agent.engine.link import WorkerLink
from agent.engine.pool import Pool
from agent.errors import AgentError, WorkerDiedError
from agent.log import get_logger

_log = get_logger("selftest")
_LOOK_S: Final = 1.0  # between two looks whether a model is due and idle, at most
_AGAIN_S: Final = 30.0  # after a test that was not passed, at most


class Act(StrEnum):
    """What follows from a test that was not passed."""

    RESTART = "restart"  # another worker in its place
    LEAVE = "leave"  # the next variant


def act_after(earlier: Iterable[float], now: float, *, healthy_s: float) -> Act:
    """Return what follows from a failed test.

    Args:
        earlier: When tests of the same variant failed before.
        now: Monotonic seconds, as all times here.
        healthy_s: After so long without a failure, a variant's earlier ones are forgotten.
    """
    return Act.LEAVE if any(now - at < healthy_s for at in earlier) else Act.RESTART


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """One self-test of all workers of a version. ``golden`` holds the worst of each input."""

    variant: str
    ok: bool
    golden: Sequence[GoldenResult]
    workers: int
    code: str = ""
    message: str = ""
    act: Act | None = None
    complete: bool = True  # otherwise requests came, and what was not tried yet waits for the next time

    def plain(self) -> dict[str, Any]:
        """Return it for people and programs."""
        return {
            "ok": self.ok,
            "variant": self.variant,
            "workers": self.workers,
            "golden": [msgspec.to_builtins(row) for row in self.golden],
            "code": self.code,
            "message": self.message,
            "act": self.act or "",
        }


@dataclass(slots=True)
class SelfTestRecord:
    """What the tests of one version have shown."""

    due_at: float = 0.0  # loop seconds
    tested_at: float = -math.inf  # loop seconds
    resume_at: int = 0  # the input at which the last test gave way to requests: the next one begins there
    last: Report | None = None
    failed_at: dict[str, deque[float]] = field(default_factory=dict)  # by variant

    def fails(self, variant: str, now: float, *, healthy_s: float) -> Act:
        """Note that a variant did not pass; return what follows."""
        earlier = self.failed_at.setdefault(variant, deque(maxlen=1))
        act = act_after(earlier, now, healthy_s=healthy_s)
        earlier.append(now)
        return act

    def row(self, now: float) -> dict[str, Any] | None:
        """Return what status tells; ``None`` before the first test since the load."""
        if self.last is None:
            return None
        return {
            "ok": self.last.ok,
            "variant": self.last.variant,
            "age_s": round(now - self.tested_at, 1),
            "ms": max((row.ms for row in self.last.golden), default=0.0),
            "code": self.last.code,
            "message": self.last.message,
            "act": self.last.act or "",
        }


class Examined(Protocol):
    """What is asked of a version."""

    tests: SelfTestRecord
    pool: Pool | None
    used_at: float  # loop seconds

    @property
    def name(self) -> str: ...

    @property
    def examinable(self) -> bool:
        """Whether it serves on its own account: not asleep, not on trial, nothing else being tried."""

    @property
    def ready(self) -> bool: ...

    def tested(self, pool: Pool, link: WorkerLink | None, report: Report) -> Report:
        """Note the end of a test and do what follows; return it with what was done. ``link`` did not pass."""


async def examine(version: Examined, pool: Pool, *, timeout_s: float, patient: bool) -> Report:
    """Run every golden input in every worker of ``pool``, until one is not passed.

    Args:
        version: Told of the end.
        pool: Which serves it.
        timeout_s: Within which each input must be answered; otherwise its worker hangs and is ended.
        patient: Whether to stop when requests come.
    """
    worst: dict[str, GoldenResult] = {}
    count = max(1, len(pool.spec.worker.get("golden", ())))  # without any it shows that the worker answers
    start, tried = version.tests.resume_at % count, 0
    for link in list(pool.links):
        tried += 1
        for entry in (*range(start, count), *range(start)):
            if patient and not pool.quiet(asyncio.get_running_loop().time()):
                version.tests.resume_at = entry
                return _report(pool, worst, tried, complete=False)
            if link not in pool.links:
                break  # it left, or died of something else: there is another one, tested by its load
            try:
                found = selftest_of(await pool.call("selftest", timeout_s=timeout_s, link=link, entry=entry))
            except WorkerDiedError as error:
                found = Tested(ok=False, code=error.code, message=str(error))
                if pool.closed:
                    return _report(pool, worst, tried, complete=False)
            for row in found.golden:
                before = worst.get(row.id)
                if before is None or (not row.ok, row.ms) > (not before.ok, before.ms):
                    worst[row.id] = row
            if not found.ok:
                report = _report(pool, worst, tried, code=found.code, message=found.message)
                return version.tested(pool, link, report)
    version.tests.resume_at = 0
    return version.tested(pool, None, _report(pool, worst, tried))


class SelfTests:
    """Tests what serves while it is idle; a part of the engine's component."""

    def __init__(
        self,
        versions: Callable[[], Iterable[Examined]],
        *,
        interval_s: float,
        idle_s: float,
        timeout_s: float,
        share_max: float,
    ) -> None:
        """``share_max``: how much of the time may go into the tests of one version."""
        self._share_max = share_max
        self._versions = versions
        self._interval_s = interval_s
        self._idle_s = idle_s
        self._timeout_s = timeout_s

    async def run(self) -> None:
        """Test whoever is due, until cancelled."""
        loop = asyncio.get_running_loop()
        look_s = min(_LOOK_S, self._interval_s / 4) if self._interval_s else 3600.0
        while True:
            await asyncio.sleep(look_s)
            for version in list(self._versions()) if self._interval_s else ():
                await self._visit(version, loop.time())

    async def _visit(self, version: Examined, now: float) -> None:
        pool = version.pool
        if pool is None or not version.examinable or not version.ready:
            version.tests.due_at = 0.0
            return
        if not version.tests.due_at:  # its load has just tested it
            version.tests.due_at = now + self._interval_s
        if now < version.tests.due_at or not pool.quiet(now) or now - version.used_at < self._idle_s:
            return
        try:
            report = await examine(version, pool, timeout_s=self._timeout_s, patient=True)
        except (AgentError, OSError) as error:
            _log.warning("a self-test could not be made", name=version.name, reason=str(error))
            return
        ended = asyncio.get_running_loop().time()
        wait_s = (ended - now) / self._share_max
        if report.complete:
            wait_s = max(wait_s, self._interval_s) if report.ok else min(self._interval_s, _AGAIN_S)
        version.tests.due_at = ended + wait_s


def _report(
    pool: Pool,
    worst: Mapping[str, GoldenResult],
    workers: int,
    *,
    code: str = "",
    message: str = "",
    complete: bool = True,
) -> Report:
    return Report(
        variant=pool.spec.id,
        ok=not code,
        golden=tuple(worst.values()),
        workers=workers,
        code=code,
        message=message,
        complete=complete,
    )
