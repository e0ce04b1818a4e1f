"""One lane's deployments, state by state: what holds for every state, whoever does its work."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from typing import Final

from agent.deploy.desired import Ending, Overtaken, record_of
from agent.deploy.state import BEFORE_CUTOVER, FINAL, STEPS_BEFORE_CUTOVER_MAX, TABLE, Event, Record, State
from agent.deploy.steps import Steps
from agent.errors import TooManyStepsError

TOO_MANY_STEPS: Final = TooManyStepsError.code
Work = Mapping[State, Callable[[Record], Awaitable[Record]]]


async def perform(record: Record, work: Work, steps: Steps, ending: Callable[[Record], Ending | None]) -> Record:
    """Do the work of each state until a final one, and return that."""
    while record.state not in FINAL:
        end = ending(record) if record.state in BEFORE_CUTOVER else None
        if end is not None and (record.state, end.event) in TABLE:
            record = await steps.step(record, end.event, code=end.code, message=end.message)
        elif record.step >= STEPS_BEFORE_CUTOVER_MAX and record.state in BEFORE_CUTOVER:
            record = await steps.step(record, Event.FAIL, code=TOO_MANY_STEPS, message="the deployment went in circles")
        else:
            record = await work[record.state](record)
    return record


async def close(overtaken: Overtaken, steps: Steps, *, now_s: float) -> None:
    """Record and tell the end of a wish whose deployment never began."""
    record = await steps.begin(record_of(overtaken.wish, overtaken.wish.id, now_s=now_s))
    await steps.step(record, overtaken.event, message=overtaken.message)
