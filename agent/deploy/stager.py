"""Deployments that end with the bytes on disk: fetched and verified now, loaded by a later wish without network.

They stand in a lane of their own, so that nothing of what serves, or is being deployed, notices them.
"""

from __future__ import annotations

from agent.deploy.desired import Desired, record_of
from agent.deploy.lane import Lane
from agent.deploy.means import Means
from agent.deploy.state import WAITING, Event, Record, State


class Stager(Lane):
    """Prepares one slot's versions."""

    def __init__(self, slot: str, means: Means) -> None:
        super().__init__(slot, means)
        self._work = {**self._work, State.STAGED: self._staged}

    async def begin(self, wish: Desired) -> None:
        """Perform a new deployment for ``wish`` to its end."""
        record = record_of(wish, wish.id, now_s=self._means.clock.wall())
        await self.perform(await self._steps.begin(record))

    async def resume(self, record: Record) -> None:
        """Go on with a deployment that a restart interrupted."""
        if record.state in WAITING | {State.RECEIVED}:
            record = await self._steps.again(record)
        else:
            record = await self._steps.step(record, Event.RESUME)
        await self.perform(record)

    async def _staged(self, record: Record) -> Record:
        message = f"on disk; deploy {record.slot}@{record.version} to load it"
        return await self._steps.step(record, Event.PREPARE, message=message)
