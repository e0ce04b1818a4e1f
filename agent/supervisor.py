"""Components that live exactly as long as a scope, restarted with back-off when they fail.

A component's ``run`` never returns and never retries by itself. A failure restarts it; past ``failures_max`` within
``window_s`` the supervisor lets the error out, which ends the process for systemd to restart.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Final, Protocol

from agent.backoff import Backoff
from agent.clock import Clock
from agent.log import get_logger

_log = get_logger("supervisor")
_TELL_AGAIN_S: Final = 10.0  # above what a component takes to end


class Component(Protocol):
    """A task with an owner."""

    name: str

    async def run(self) -> None:
        """Work until cancelled; raise when something broke."""


class Supervisor:
    """Keep components running; count their restarts."""

    def __init__(
        self,
        clock: Clock,
        *,
        first_s: float = 0.2,
        cap_s: float = 30.0,
        failures_max: int = 20,
        window_s: float = 600.0,
        on_restart: Callable[[str, BaseException], None] | None = None,
    ) -> None:
        self._clock = clock
        self._first_s = first_s
        self._cap_s = cap_s
        self._failures_max = failures_max
        self._window_s = window_s
        self._on_restart = on_restart
        self._stopping = False
        self.restarts: dict[str, int] = {}

    @asynccontextmanager
    async def running(self, *components: Component) -> AsyncIterator[None]:
        """Components live exactly as long as the body; one that gives up cancels the body."""
        self._stopping = False
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(self._keep(component), name=component.name) for component in components]
            try:
                yield
            finally:
                self._stopping = True
                late = set(tasks)
                while late:  # a TaskGroup of Python 3.11 that fails forgets that it was cancelled: it is told again
                    for task in late:
                        task.cancel()
                    _, late = await asyncio.wait(late, timeout=_TELL_AGAIN_S)

    async def _keep(self, component: Component) -> None:
        backoff = Backoff(first_s=self._first_s, cap_s=self._cap_s)
        failures: deque[float] = deque(maxlen=self._failures_max)
        while True:
            started = self._clock.monotonic()
            try:
                await component.run()
                raise RuntimeError(f"{component.name}: run() returned")
            except Exception as error:  # the one place that restarts whatever failed
                if self._stopping:
                    _log.exception("component failed as it stopped", component=component.name)
                    raise asyncio.CancelledError from error
                now = self._clock.monotonic()
                if now - started > self._cap_s * 2:
                    backoff.reset()
                failures.append(now)
                if len(failures) == self._failures_max and now - failures[0] < self._window_s:
                    _log.error("component gives up", component=component.name, failures=len(failures), error=str(error))
                    raise
                self.restarts[component.name] = self.restarts.get(component.name, 0) + 1
                delay_s = backoff.next()
                _log.exception("component failed; restarting", component=component.name, delay_s=round(delay_s, 2))
                if self._on_restart is not None:
                    self._on_restart(component.name, error)
            await self._clock.sleep(delay_s)
