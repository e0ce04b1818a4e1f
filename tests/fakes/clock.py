"""A clock that tests own: ``sleep`` advances it at once, in the order of the deadlines."""

from __future__ import annotations

import asyncio
import heapq
import itertools


class FakeClock:
    """Meets ``agent.clock.Clock``. Sleepers wake in time order, without real time passing."""

    def __init__(self, *, wall_s: float = 1_760_000_000.0) -> None:
        self._now = 0.0
        self._wall_s = wall_s
        self._sleepers: list[tuple[float, int, asyncio.Future[None]]] = []
        self._order = itertools.count()
        self._running = False

    def monotonic(self) -> float:
        return self._now

    def wall(self) -> float:
        return self._wall_s + self._now

    def jump_wall(self, seconds: float) -> None:
        """Step the wall clock; monotonic time goes on."""
        self._wall_s += seconds

    async def sleep(self, seconds: float) -> None:
        loop = asyncio.get_running_loop()
        wake: asyncio.Future[None] = loop.create_future()
        heapq.heappush(self._sleepers, (self._now + max(0.0, seconds), next(self._order), wake))
        if not self._running:
            self._running = True
            loop.call_soon(self._advance, loop, 0)
        await wake

    def _advance(self, loop: asyncio.AbstractEventLoop, idle_turns: int) -> None:
        # Some turns of the loop, so that whatever is ready runs before time moves.
        if idle_turns < 5:
            loop.call_soon(self._advance, loop, idle_turns + 1)
            return
        self._running = False
        while self._sleepers:
            due, _, wake = heapq.heappop(self._sleepers)
            if wake.done():
                continue
            self._now = max(self._now, due)
            wake.set_result(None)
            break
        if self._sleepers:
            self._running = True
            loop.call_soon(self._advance, loop, 0)


class Calendar:
    """Meets ``agent.clock.Clock``. Its wall clock stands where the test puts it; short sleeps pass at once, long ones
    last until the test moves on."""

    _SHORT_S = 20.0

    def __init__(self, wall_s: float) -> None:
        self._wall_s = wall_s
        self._now = 0.0
        self._moved = asyncio.Event()

    def monotonic(self) -> float:
        return self._now

    def wall(self) -> float:
        return self._wall_s

    def pass_days(self, days: float) -> None:
        """Let time pass."""
        self._now += days * 86_400
        self.set_wall(self._wall_s + days * 86_400)

    def set_wall(self, wall_s: float) -> None:
        """Put the wall clock to ``wall_s``, right or wrong."""
        self._wall_s = wall_s
        self._moved.set()
        self._moved = asyncio.Event()

    async def sleep(self, seconds: float) -> None:
        if seconds > self._SHORT_S:
            await self._moved.wait()
            return
        await asyncio.sleep(0.001)
        self._now += seconds
