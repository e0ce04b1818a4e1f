"""One lane's deployments, state by state: what holds for every state, and the way to the bytes on disk.

What only prepares ends there (``stager.py``), what serves goes on (``performer.py``). Every state is journaled before
its work begins, and the work of a state may run twice: after a restart the stored state alone says where to go on.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from typing import Final

from agent.deploy.desired import Overtaken, record_of
from agent.deploy.gates import Judge, before_fetch
from agent.deploy.means import Means
from agent.deploy.obtain import Obtainer
from agent.deploy.pointer import Pointer
from agent.deploy.ports import Bundle, Loaded
from agent.deploy.slots import model_of
from agent.deploy.state import BEFORE_CUTOVER, FINAL, STEPS_BEFORE_CUTOVER_MAX, TABLE, Event, Record, State
from agent.deploy.waiting import Waiting
from agent.errors import TooManyStepsError

TOO_MANY_STEPS: Final = TooManyStepsError.code
Work = Mapping[State, Callable[[Record], Awaitable[Record]]]


class Lane:
    """Deployments of one slot, one after the other."""

    def __init__(self, slot: str, means: Means) -> None:
        self.slot = slot
        self.model = model_of(slot)  # what failed or served anywhere on this box is remembered by model
        self.pointer: Pointer | None = None
        self.active: Loaded | None = None
        self.busy = False  # a deployment is under way and does not only wait
        self._means = means
        self._bundle: Bundle | None = None
        self._steps = means.make_steps()
        self._waiting = Waiting(means, self._steps, offered=lambda: self._obtainer.offered)
        self._obtainer = Obtainer(slot, means, self._steps, closed=self._closed)
        self._work: Work = {
            State.RECEIVED: self._received,
            State.QUEUED: self._queued,
            State.VALIDATING: self._obtain,
            State.FETCHING: self._obtain,
            State.VERIFYING: self._obtain,
            State.FETCH_WAIT: self._obtainer.wait,
        }

    async def close(self, overtaken: Overtaken) -> None:
        """Record and tell the end of a wish whose deployment never began."""
        record = record_of(overtaken.wish, overtaken.wish.id, now_s=self._means.clock.wall())
        record = await self._steps.begin(record)
        await self._steps.step(record, overtaken.event, message=overtaken.message)

    def nudge(self) -> None:
        """Let a deployment that waits look again now."""
        self._waiting.nudge()

    async def perform(self, record: Record) -> None:
        """Do the work of each state until a final one."""
        self.busy = True
        try:
            while record.state not in FINAL:
                record = await self._go_on(record)
        finally:
            self.busy = False

    async def _go_on(self, record: Record) -> Record:
        before_cutover = record.state in BEFORE_CUTOVER
        end = self._means.ending(record) if before_cutover else None
        if end is not None and (record.state, end.event) in TABLE:
            return await self._steps.step(record, end.event, code=end.code, message=end.message)
        if before_cutover and record.step >= STEPS_BEFORE_CUTOVER_MAX:
            message = "the deployment went in circles"
            return await self._steps.step(record, Event.FAIL, code=TOO_MANY_STEPS, message=message)
        return await self._work[record.state](record)

    async def _wait(self, record: Record, judge: Judge) -> tuple[Record, bool]:
        self.busy = False
        try:
            return await self._waiting.until_open(record, judge)
        finally:
            self.busy = True

    def _closed(self, record: Record) -> str:
        """Return why no bytes may be fetched now, empty if they may."""
        return self._waiting.reason(record, before_fetch) if self._means.config.fetch_windows else ""

    # The work of each state

    async def _received(self, record: Record) -> Record:
        self._obtainer.reset()
        if reason := self._waiting.reason(record, before_fetch):
            return await self._steps.step(record, Event.WAIT, message=reason)
        return await self._steps.step(record, Event.DONE)

    async def _queued(self, record: Record) -> Record:
        record, is_open = await self._wait(record, before_fetch)
        return await self._steps.step(record, Event.DONE, message="") if is_open else record

    async def _obtain(self, record: Record) -> Record:
        record, self._bundle = await self._obtainer.obtain(record, self.pointer, serves=self.active is not None)
        return record
