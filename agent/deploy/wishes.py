"""What is wanted of this box, by whom, what was given up, and how a wish ends that never began.

A copy of the journal's rows, refreshed after each change. A wish ends in a record of its own even if another overtook
it before its deployment began: whoever asked hears of an end.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

from agent.deploy.desired import Desired, Ending, Overtaken, effective, ending
from agent.deploy.journal import Journal
from agent.deploy.state import FINAL, Event, Record


class Wishes:
    """The wishes of all slots.

    Args:
        configured: The configuration file's.
        now_s: Unix seconds; ``None`` if the clock cannot be right.
    """

    def __init__(self, journal: Journal, configured: Iterable[Desired], now_s: Callable[[], float | None]) -> None:
        self._journal = journal
        self._configured = tuple(configured)
        self._now_s = now_s
        self._asked: list[Desired] = []  # of the journal
        self._overtaken: dict[str, Overtaken] = {}  # by wish id
        self._cancelled: set[str] = set()  # deployments
        self.known = False  # the journal could be read
        self.strongest: Mapping[str, Desired] = {}  # by slot
        self.staged: Mapping[str, Desired] = {}  # by slot: what is only to be prepared

    async def refresh(self) -> None:
        """Read what the journal holds.

        Raises:
            StateError, DiskFullError: it cannot be read now; what was known stands.
        """
        asked, overtaken = await self._journal.wanted(), await self._journal.overtaken()
        cancelled = await self._journal.cancelled()
        # All at once: who looks in between must not see a wish and miss that it is the strongest.
        self._asked, self._cancelled = asked, set(cancelled)
        self._overtaken = {item.wish.id: item for item in overtaken}
        self.strongest = effective([*self._asked, *self._configured])
        self.staged = {wish.slot: wish for wish in self._asked if wish.plan.stage_only}
        self.known = True

    @property
    def configured(self) -> set[str]:
        """The slots that the configuration file names."""
        return {wish.slot for wish in self._configured}

    def slots(self) -> set[str]:
        """Return every slot of which something is wanted to serve; before the journal is read, the configured ones.

        A wish whose end is still to be told counts.
        """
        ended = {item.wish.slot for item in self._overtaken.values() if not item.wish.plan.stage_only}
        return (set(self.strongest) or self.configured) | ended

    def staging_slots(self) -> set[str]:
        """Return every slot of which something is to be prepared, or was and its end is still to be told."""
        ended = {item.wish.slot for item in self._overtaken.values() if item.wish.plan.stage_only}
        return set(self.staged) | ended

    async def want(self, wish: Desired) -> None:
        """Record a wish. One that was made before, and lost since, is not revived: a command may come twice."""
        known = await self._journal.get(wish.id) is not None or wish.id in self._overtaken
        if known and all(wish.id != asked.id for asked in self._asked):
            return
        await self._journal.want(wish)
        await self.refresh()

    async def withdraw(self, slot: str, place: str) -> None:
        """Forget what is wanted of a slot."""
        await self._journal.unwant(slot, place)
        await self.refresh()

    async def cancel(self, wish: Desired | None, deployment_id: str = "") -> None:
        """Let a deployment be given up, or a wish that has not begun, and forget a pin."""
        if deployment_id:
            await self._journal.cancel(deployment_id)
        elif wish is not None:
            await self._journal.overtake(Overtaken(wish=wish, event=Event.CANCEL, message="it was cancelled"))
        if wish is not None and wish.place != "fleet" and wish.source != "file":
            await self._journal.unwant(wish.slot, wish.place)
        await self.refresh()

    def ending(self, record: Record) -> Ending | None:
        """Return why a deployment is to be given up; ``None``: it is not."""
        lane = self.staged if record.plan.stage_only else self.strongest
        wish = lane.get(record.slot)
        return ending(record, wish, cancelled=record.id in self._cancelled, now_s=self._now_s())

    def may_come(self, deployment_id: str) -> bool:
        """Return whether a deployment that is not recorded yet will be."""
        return deployment_id in self._overtaken or any(wish.id == deployment_id for wish in self._every())

    async def unbegun(self, slot: str, *, staging: bool) -> list[Overtaken]:
        """Return the wishes of a lane that ended, or do not count now, and never began."""
        found = [item for item in self._overtaken.values() if _in_lane(item.wish, slot, staging)]
        strongest = None if staging else self.strongest.get(slot)
        for wish in self._asked:
            if strongest is None or wish.place == strongest.place or not _in_lane(wish, slot, staging):
                continue
            if wish.id not in self._overtaken and await self._journal.get(wish.id) is None:
                reason = f"the wish of the {strongest.source} is stronger"
                found.append(Overtaken(wish=wish, event=Event.SUPERSEDE, message=reason))
        return found

    async def told(self, overtaken: Overtaken) -> None:
        """Forget an overtaken wish whose end is recorded."""
        self._overtaken.pop(overtaken.wish.id, None)
        await self._journal.told(overtaken.wish.id)

    def note(self, record: Record) -> None:
        """Hear of a deployment's step."""
        if record.state in FINAL:
            self._cancelled.discard(record.id)

    def _every(self) -> list[Desired]:
        return [*self._asked, *self._configured]


def _in_lane(wish: Desired, slot: str, staging: bool) -> bool:
    return wish.slot == slot and wish.plan.stage_only == staging
