"""How many workers a pool has, as ``growth.py`` decides: starts one more, or lets one go that owes nothing.

Promises: one change at a time; a growth that memory does not allow, or that fails, is tried again ever more seldom,
and the pool serves with what it has.
Leaves out: how a worker is started and seen off (``pool.py``).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Coroutine
from dataclasses import replace
from typing import Any, Final, Protocol

from agent.backoff import Backoff
from agent.engine.growth import Bounds, Move, Seen, Trend, step
from agent.engine.job import Job
from agent.engine.link import WorkerLink
from agent.engine.types import VariantSpec
from agent.errors import WorkerError

_GROW_AGAIN_S: Final = (2.0, 300.0)  # after a growth that failed: the first pause, and the longest


class Sized(Protocol):
    """What is asked of the pool."""

    spec: VariantSpec
    size: int  # workers there should be
    held: str  # why it could not grow when it last should have
    links: list[WorkerLink]
    waiting: deque[Job]
    resting: WorkerLink | None  # takes nothing more

    @property
    def closed(self) -> bool:
        """Whether it takes no more work."""

    @property
    def spare(self) -> list[WorkerLink]:
        """The workers that owe nothing to anybody."""

    async def start_one(self) -> None:
        """Start the worker that ``size`` already counts.

        Raises:
            WorkerError: it does not start, or there is no room for it in memory.
        """

    def let_go(self, link: WorkerLink) -> None:
        """Let a worker leave."""

    def rest(self, link: WorkerLink | None) -> None:
        """Give this worker nothing more, from now on, and no other."""

    def resized(self, change: str, reason: str) -> None:
        """Tell that the pool has ``grown`` or ``shrunk``, or was ``held`` where it is."""


class Sizing:
    """The size of one pool."""

    def __init__(
        self, pool: Sized, *, spawn: Callable[[Coroutine[Any, Any, None], str], None], now: Callable[[], float]
    ) -> None:
        self._pool = pool
        self._spawn = spawn
        self._now = now
        self._trend = Trend()
        self._grown_at = 0.0  # loop seconds
        self._grow_from = 0.0  # loop seconds
        self._backoff = Backoff(first_s=_GROW_AGAIN_S[0], cap_s=_GROW_AGAIN_S[1])

    def sweep(self, now: float) -> None:
        """Look whether the pool should have another size."""
        pool, bounds = self._pool, self._pool.spec.bounds
        if len(pool.links) > bounds.most and not pool.closed:
            self._let_surplus_go(bounds.most)
            return
        if bounds.most <= bounds.least or pool.closed:
            return
        seen = Seen(
            now=now,
            ready=len(pool.links),
            wanted=pool.size,
            busy=sum(1 for link in pool.links if link.owed or link.lanes_in_use(now)),
            delay_s=self._queued_s(now),
            held=now < self._grow_from,
        )
        self._trend, move = step(self._trend, seen, pool.spec.bounds)
        if move is Move.GROW:
            pool.size += 1
            reason = f"requests queued for {seen.delay_s * 1000:.0f} ms"
            self._spawn(self._grow(reason), f"grow {pool.spec.id}")
        elif move is Move.SHRINK:
            self._shrink()

    def rebound(self, bounds: Bounds) -> None:
        """Keep to other bounds from now on: grow to the least at once, and let those above the most go once idle."""
        pool = self._pool
        pool.spec = replace(pool.spec, bounds=bounds)
        pool.size = min(pool.size, bounds.most)
        pool.rest(None)
        self._trend = Trend()
        if pool.size < bounds.least:
            self._spawn(self._fill(), f"grow {pool.spec.id}")

    async def _fill(self) -> None:
        pool = self._pool
        pool.held = ""
        while pool.size < pool.spec.bounds.least and not pool.held and not pool.closed:
            pool.size += 1
            await self._grow(f"at least {pool.spec.bounds.least} are wanted")

    def catch_up(self, size_before: int) -> None:
        """Grow to the size of the version before, one worker at a time."""
        if min(size_before, self._pool.spec.bounds.most) > self._pool.size:
            self._spawn(self._catch_up(size_before), f"grow {self._pool.spec.id}")

    def hold(self, error: Exception) -> None:
        """Do with one worker fewer, for a while."""
        pool = self._pool
        pool.size -= 1
        self._grow_from = self._now() + _GROW_AGAIN_S[0] + self._backoff.next()
        first, pool.held = not pool.held, str(error)
        if first:  # later ones, until a worker has started, show in the status only
            pool.resized("held", pool.held)

    async def _catch_up(self, size_before: int) -> None:
        pool = self._pool
        while pool.size < min(size_before, pool.spec.bounds.most) and not pool.held and not pool.closed:
            pool.size += 1
            await self._grow(f"the version before had {size_before} workers")

    async def _grow(self, why: str) -> None:
        """Start the worker that ``size`` already counts, if memory allows it."""
        pool = self._pool
        try:
            await pool.start_one()
        except (WorkerError, OSError) as error:
            if not pool.closed:
                self.hold(error)
            return
        if pool.closed:
            return
        pool.held = ""
        self._grown_at = self._now()
        self._backoff.reset()
        pool.resized("grown", why)

    def _shrink(self) -> None:
        """Let one worker go that owes nothing; so nothing can be lost. It revokes its idle lanes as it leaves."""
        pool = self._pool
        spare = pool.spare
        if not spare:
            return
        pool.size -= 1
        pool.let_go(spare[-1])
        pool.resized("shrunk", f"not needed for {pool.spec.bounds.shrink_idle_s:g} s")

    def _let_surplus_go(self, most: int) -> None:
        """Give one worker nothing more, and let it go once it owes nothing: others are asked meanwhile."""
        pool = self._pool
        if pool.resting not in pool.links:
            pool.rest(min(pool.links, key=lambda link: len(link.owed)))
        elif pool.resting in pool.spare:
            pool.let_go(pool.resting)
            pool.rest(None)
            pool.resized("shrunk", f"no more than {most} are wanted")

    def _queued_s(self, now: float) -> float:
        """Return how long the oldest request that the last growth could have helped has queued (seconds)."""
        pool = self._pool
        if not all(link.owed for link in pool.links):
            return 0.0  # the next request finds an idle worker
        delay = max((link.queued_s(self._grown_at) for link in pool.links), default=0.0)
        if pool.waiting:
            delay = max(delay, now - max(pool.waiting[0].arrived, self._grown_at))
        return delay
