"""Deployments that end with the bytes on disk: fetched and verified now, loaded by a later wish without network.

They stand in a lane of their own, so that nothing of what serves, or is being deployed, notices them.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from pathlib import Path

from agent.clock import Clock
from agent.config import DeployConfig
from agent.deploy import lane
from agent.deploy.desired import Desired, Ending, Overtaken, record_of
from agent.deploy.gates import Situation, before_fetch
from agent.deploy.journal import Journal
from agent.deploy.obtain import Obtainer
from agent.deploy.pointer import Pointer
from agent.deploy.ports import Store
from agent.deploy.refusals import Refusals
from agent.deploy.state import WAITING, Event, Record, State
from agent.deploy.steps import Steps
from agent.deploy.waiting import Waiting


class Stager:
    """Prepares one slot's versions."""

    pointer: Pointer | None = None  # it serves nothing

    def __init__(
        self,
        slot: str,
        *,
        config: DeployConfig,
        store: Store,
        journal: Journal,
        refusals: Refusals,
        clock: Clock,
        state_dir: Path,
        ending: Callable[[Record], Ending | None],
        situation: Callable[[Record], Situation],
        revoked: Callable[[str], str],
        make_room: Callable[[frozenset[str]], Awaitable[bool]],
        steps: Steps,
    ) -> None:
        self.slot = slot
        self.busy = False  # a deployment is under way and does not only wait
        self._ending = ending
        self._clock = clock
        self._steps = steps
        self._waiting = Waiting(config=config, steps=steps, clock=clock, situation=situation, ending=ending)
        self._obtainer = Obtainer(
            slot,
            config=config,
            store=store,
            journal=journal,
            steps=steps,
            refusals=refusals,
            clock=clock,
            state_dir=state_dir,
            ending=ending,
            closed=lambda record: self._waiting.reason(record, before_fetch) if config.fetch_windows else "",
            revoked=revoked,
            make_room=make_room,
        )
        self._work: lane.Work = {
            State.RECEIVED: self._received,
            State.QUEUED: self._queued,
            State.VALIDATING: self._obtain,
            State.FETCHING: self._obtain,
            State.VERIFYING: self._obtain,
            State.FETCH_WAIT: self._obtainer.wait,
            State.STAGED: self._staged,
        }

    async def begin(self, wish: Desired) -> None:
        """Perform a new deployment for ``wish`` to its end."""
        await self._perform(await self._steps.begin(record_of(wish, wish.id, now_s=self._clock.wall())))

    async def resume(self, record: Record) -> None:
        """Go on with a deployment that a restart interrupted."""
        if record.state in WAITING | {State.RECEIVED}:
            record = await self._steps.again(record)
        else:
            record = await self._steps.step(record, Event.RESUME)
        await self._perform(record)

    async def close(self, overtaken: Overtaken) -> None:
        """Record and tell the end of a wish whose deployment never began."""
        await lane.close(overtaken, self._steps, now_s=self._clock.wall())

    def nudge(self) -> None:
        """Let a deployment that waits look again now."""
        self._waiting.nudge()

    async def _perform(self, record: Record) -> None:
        self.busy = True
        try:
            await lane.perform(record, self._work, self._steps, self._ending)
        finally:
            self.busy = False

    async def _received(self, record: Record) -> Record:
        self._obtainer.reset()
        if reason := self._waiting.reason(record, before_fetch):
            return await self._steps.step(record, Event.WAIT, message=reason)
        return await self._steps.step(record, Event.DONE)

    async def _queued(self, record: Record) -> Record:
        self.busy = False
        try:
            record, is_open = await self._waiting.until_open(record, before_fetch)
        finally:
            self.busy = True
        return await self._steps.step(record, Event.DONE, message="") if is_open else record

    async def _obtain(self, record: Record) -> Record:
        record, _ = await self._obtainer.obtain(record, None, serves=False)
        return record

    async def _staged(self, record: Record) -> Record:
        message = f"on disk; deploy {record.slot}@{record.version} to load it"
        return await self._steps.step(record, Event.PREPARE, message=message)
