"""Waiting at a gate: QUEUED before bytes are fetched, WAITING_WINDOW before anything is loaded.

The time waited is in the record, counted while the box runs and written now and then, so that neither a restart nor a
clock that jumps begins the wait anew. Leaves out: what opens a gate (``gates.py``).
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import replace
from typing import Final

from agent.clock import wait_up_to
from agent.deploy.gates import Judge, Situation
from agent.deploy.means import Means
from agent.deploy.state import Event, Record
from agent.deploy.steps import Steps
from agent.errors import CommandExpiredError

_WRITE_S: Final = 60.0  # of waiting that a power cut may forget
_LOOK_S_MIN: Final = 0.05


class Waiting:
    """Waits for one lane's deployments.

    Args:
        offered: Whether the bytes can be taken from a medium.
    """

    def __init__(self, means: Means, steps: Steps, *, offered: Callable[[], bool]) -> None:
        self._config, self._clock = means.config, means.clock
        self._ending, self._know = means.ending, means.situation
        self._steps = steps
        self._offered = offered
        self._nudged = asyncio.Event()

    def nudge(self) -> None:
        """Let a deployment that waits look again now."""
        self._nudged.set()

    def reason(self, record: Record, judge: Judge) -> str:
        """Return why ``record`` may not go on now; empty if it may."""
        return judge(record, self._situation(record), self._config).reason

    def _situation(self, record: Record) -> Situation:
        return replace(self._know(record), medium=self._offered())

    async def until_open(self, record: Record, judge: Judge) -> tuple[Record, bool]:
        """Wait until the gate is open or the deployment is to be given up.

        Returns:
            The record, ended if it waited too long, and whether the gate is open. Nothing is awaited between the last
            look and the return.
        """
        since, before_s, written_s = self._clock.monotonic(), record.waited_s, record.waited_s
        while True:
            self._nudged.clear()
            record = replace(record, waited_s=before_s + self._clock.monotonic() - since)
            if self._ending(record) is not None:
                return record, False
            if record.waited_s >= self._config.wait_limit_s:
                message = f"given up after {record.waited_s:.0f} s of waiting: {record.message}"
                return await self._steps.step(
                    record, Event.EXPIRE, code=CommandExpiredError.code, message=message
                ), False
            gate = judge(record, self._situation(record), self._config)
            if gate.open:
                return record, True
            if gate.reason != record.message or record.waited_s - written_s >= _WRITE_S:
                record, written_s = await self._steps.note(replace(record, message=gate.reason)), record.waited_s
            left_s = self._config.wait_limit_s - record.waited_s
            await wait_up_to(self._nudged, max(_LOOK_S_MIN, min(gate.look_s, left_s)), self._clock)
