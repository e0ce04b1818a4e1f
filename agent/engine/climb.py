"""Sees to it that something better than what serves is tried in time, while the model is idle.

Leaves out: what is tried next (``ladder.py``), and trying it (``version.py``).
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Coroutine
from typing import Any, Final, Protocol

from agent.config import VariantsConfig
from agent.engine.ladder import Try
from agent.engine.pool import Pool
from agent.engine.standing import Standing
from agent.engine.types import VersionSpec

_ROUTED_ELSEWHERE_S: Final = 3600.0  # between two looks of a version that nothing is asked


class Climber(Protocol):
    """What is asked of the version."""

    spec: VersionSpec
    pool: Pool | None
    used_at: float  # loop seconds
    routed: bool  # whether requests come: otherwise nothing better is looked for

    @property
    def moving(self) -> bool:
        """Whether something else changes what serves, or it sleeps."""

    @property
    def closed(self) -> bool: ...

    async def challenge(self, step: Try, current: Pool) -> None:
        """Try a rung beside ``current``, which serves."""

    async def revive(self) -> None:
        """Try again to load what could not be loaded."""


class Climb:
    """The way up of one version."""

    def __init__(
        self,
        version: Climber,
        standing: Standing,
        config: VariantsConfig,
        *,
        spawn: Callable[[Coroutine[Any, Any, None], str], None],
        now: Callable[[], float],
    ) -> None:
        self._version = version
        self._standing = standing
        self._config = config
        self._spawn = spawn
        self._now = now
        self._climbing = False
        self._news = asyncio.Event()

    def look(self) -> None:
        """Something has changed."""
        self._news.set()

    def up(self) -> None:
        """See to it that what is better is tried in time."""
        self._news.set()
        if not self._climbing and not self._version.closed:
            self._climbing = True
            self._spawn(self._climb(), f"better variants of {self._version.spec.model}")

    async def _climb(self) -> None:
        version = self._version
        try:
            while not version.closed and (step := self._next()) is not None:
                self._news.clear()
                if await self._time_for(step):
                    if version.pool is None:
                        await version.revive()
                    else:
                        await version.challenge(step, version.pool)
        finally:
            self._climbing = False

    def _next(self) -> Try | None:
        version = self._version
        if version.moving:
            return None  # whoever moves it looks up in the end
        return self._standing.next_try(version.pool.spec.id if version.pool is not None else None)

    async def _time_for(self, step: Try) -> bool:
        """Wait until ``step`` may be done; ``False``: something changed before."""
        version, config = self._version, self._config
        first = max(step.at, self._now())
        while True:
            now = self._now()
            if version.pool is None or not version.routed:
                wait_s = step.at - now if version.pool is None else _ROUTED_ELSEWHERE_S
            else:
                quiet_from = version.used_at + config.idle_s if version.pool.quiet(now) else now + config.idle_s
                wait_s = max(step.at, min(quiet_from, first + config.patience_s)) - now
            if wait_s <= 0:
                return True
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(wait_s):
                    await self._news.wait()
                return False
