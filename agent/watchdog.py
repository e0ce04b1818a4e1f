"""The systemd watchdog: fed as long as the loop turns and each part that all else depends on makes progress.

A part that gives no sign of life within its time lets the component fail, which names it; a part that stays stuck is
never vouched for again, so systemd ends the process and starts it anew. Models are no part of this: theirs is the
self-test.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress

from agent.errors import AgentError, UnavailableError


class Watchdog:
    """A component that tells systemd that we are alive."""

    name = "daemon.watchdog"

    def __init__(
        self,
        parts: Mapping[str, Callable[[], Awaitable[object]]],
        *,
        feed: Callable[[], object],
        interval_s: float,
        patience_s: float,
    ) -> None:
        """``parts`` return once they have made progress; each is asked in turn, before every ``feed``."""
        self._parts = parts
        self._feed = feed
        self._interval_s = interval_s
        self._patience_s = patience_s

    async def run(self) -> None:
        """Feed until cancelled.

        Raises:
            UnavailableError: a part is stuck. One that refuses is not: a refusal is an answer.
        """
        while True:
            for name, progress in self._parts.items():
                try:
                    async with asyncio.timeout(self._patience_s):
                        with suppress(AgentError):
                            await progress()
                except TimeoutError as error:
                    raise UnavailableError(f"the {name} has made no progress for {self._patience_s:g} s") from error
            self._feed()
            await asyncio.sleep(self._interval_s)
