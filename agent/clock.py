"""Time as a port: components take a ``Clock``, so that tests own it.

Absent on purpose: trusted time. The signed clock floor belongs to ``bundles/``.
"""

from __future__ import annotations

import asyncio
import time
from typing import Protocol


class Clock(Protocol):
    """What a component may ask about time."""

    def monotonic(self) -> float:
        """Seconds from an arbitrary start; never steps back."""

    def wall(self) -> float:
        """Unix seconds as the system believes them; may be wrong or jump."""

    async def sleep(self, seconds: float) -> None:
        """Return after ``seconds``."""


async def wait_up_to(event: asyncio.Event, limit_s: float, clock: Clock) -> bool:
    """Return once ``event`` is set or after ``limit_s`` seconds of ``clock``; say whether it is set."""
    async with asyncio.TaskGroup() as group:
        waits = [group.create_task(event.wait()), group.create_task(clock.sleep(limit_s))]
        await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        for wait in waits:
            wait.cancel()
    return event.is_set()


class SystemClock:
    """The kernel's clocks."""

    def monotonic(self) -> float:
        return time.monotonic()

    def wall(self) -> float:
        return time.time()

    async def sleep(self, seconds: float) -> None:
        await asyncio.sleep(seconds)
