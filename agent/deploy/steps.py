"""Steps of deployments: through the table, into the journal, then told.

A report is the record as it was written, so nobody hears of a state that a restart would not find. What each record
says of its own making is set here alone: how often work was begun, when, in which boot, by how good a clock.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, Final

from agent.clock import Clock
from agent.deploy.journal import Journal
from agent.deploy.state import FINAL, Event, Record, State, advance
from agent.errors import AgentError
from agent.events import EventBus, Severity, Stream
from agent.log import get_logger

_PROGRESS_EVENT_S: Final = 10.0  # between two events about one download
_BAD: Final = frozenset({State.REJECTED, State.FAILED, State.ROLLED_BACK, State.INCONSISTENT, State.ROLLING_BACK})
_log = get_logger("deploy")


class Steps:
    """Writes and tells what happens to one lane's deployments.

    Args:
        journal: Where they are written.
        events: Where they are told.
        clock: Wall and monotonic seconds.
        changed: Hears of every record.
        boot_id: Of this boot.
        clock_quality: How good the wall clock is now.
    """

    def __init__(
        self,
        journal: Journal,
        events: EventBus,
        clock: Clock,
        changed: Callable[[Record], None],
        *,
        boot_id: str,
        clock_quality: Callable[[], str],
    ) -> None:
        self._journal = journal
        self._events = events
        self._clock = clock
        self._changed = changed
        self._boot_id = boot_id
        self._clock_quality = clock_quality
        self._progress_due = 0.0  # monotonic

    async def begin(self, record: Record) -> Record:
        """Return the record of a new deployment, written and told."""
        begun = self._stamped(_tried(record))
        await self._journal.begin(begun)
        self._tell(begun)
        return begun

    async def step(self, record: Record, event: Event, *, condemns: str = "", **changes: Any) -> Record:
        """Return the record after ``event``, written and told.

        ``condemns``: why its version is remembered as failed here from the same write on; empty: it is not.
        """
        after = self._stamped(_tried(advance(record, event, **changes)))
        await self._journal.save(after, condemns=condemns)
        self._tell(after)
        return after

    async def again(self, record: Record) -> Record:
        """Return the record with its state's work begun once more: after a restart, or a wait that came to nothing.

        Only a count: a disk that denies it now does not keep the work from being done.
        """
        try:
            return await self.note(_tried(record))
        except AgentError as error:
            _log.warning("an attempt is not recorded", slot=record.slot, id=record.id, reason=str(error))
            return _tried(record)

    async def tell_again(self) -> None:
        """Tell the ends that a cut may have come before, of all slots; their keys say that they are the same facts."""
        for record in await self._journal.untold():
            self._tell(record)
            await self._journal.heard(record.id)

    async def note(self, record: Record) -> Record:
        """Return the record of a deployment that stays in its state, written for whoever looks; no step, no event."""
        noted = replace(record, boot_id=self._boot_id)
        await self._journal.save(noted)
        self._changed(noted)
        return noted

    def progress(self, record: Record) -> None:
        """Tell how far a download is: who follows it always, the fleet not more often than somebody could read it."""
        self._changed(record)
        now = self._clock.monotonic()
        if now < self._progress_due:
            return
        self._progress_due = now + _PROGRESS_EVENT_S
        names = ("id", "slot", "version", "state", "bytes_done", "bytes_total", "rate_bps", "eta_s")
        fields = {name: value for name, value in record.plain().items() if name in names}
        self._events.emit(Stream.DEPLOY, "deployment.progress", key=f"{record.id}:{record.step}:{now:.0f}", **fields)

    def defer_progress(self) -> None:
        """Begin the interval between two events anew: a short download tells none."""
        self._progress_due = self._clock.monotonic() + _PROGRESS_EVENT_S

    def _stamped(self, record: Record) -> Record:
        return replace(record, updated=self._clock.wall(), boot_id=self._boot_id, clock_quality=self._clock_quality())

    def _tell(self, record: Record) -> None:
        severity = Severity.ERROR if record.state in _BAD else Severity.INFO
        plain = {name: value for name, value in record.plain().items() if name not in ("created", "updated")}
        fields = {name: value for name, value in plain.items() if value not in ("", 0, False, None, {})}
        _log.info(
            "deployment",
            **{name: fields[name] for name in ("slot", "id", "state", "version", "message") if name in fields},
        )
        self._events.emit(
            Stream.DEPLOY, f"deployment.{record.state}", severity, key=f"{record.id}:{record.step}", **fields
        )
        self._changed(record)


def _tried(record: Record) -> Record:
    """Return the record with one more attempt at the work of its state; a final one has none."""
    if record.state in FINAL:
        return record
    return replace(record, attempts={**record.attempts, record.state: record.attempts.get(record.state, 0) + 1})
