"""Callers who wait for news: each as long as it asked for, and none longer than the daemon lives.

A stop answers what was accepted first; a caller who follows a deployment would hold it up for as long as it waits.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager


class Waits:
    """All that are under way; ``end`` ends them."""

    def __init__(self) -> None:
        self._under_way: set[asyncio.Timeout] = set()
        self._ended = False

    @asynccontextmanager
    async def up_to(self, limit_s: float) -> AsyncIterator[None]:
        """The body waits for so long at most.

        Raises:
            TimeoutError: it did not end by itself.
        """
        async with asyncio.timeout(0.0 if self._ended else limit_s) as patience:
            self._under_way.add(patience)
            try:
                yield
            finally:
                self._under_way.discard(patience)

    def end(self) -> None:
        """Let nobody wait any more, from now on."""
        self._ended = True
        now = asyncio.get_running_loop().time()
        for patience in self._under_way:
            if not patience.expired():
                patience.reschedule(now)
