"""Steps of deployments: through the table, into the journal, then told.

A report is the record as it was written, so nobody hears of a state that a restart would not find.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

from agent.clock import Clock
from agent.deploy.journal import Journal
from agent.deploy.state import Event, Record, State, advance
from agent.events import EventBus, Severity, Stream
from agent.log import get_logger

_PROGRESS_EVENT_S: Final = 10.0  # between two events about one download
_BAD: Final = frozenset({State.REJECTED, State.FAILED, State.ROLLED_BACK, State.INCONSISTENT, State.ROLLING_BACK})
_log = get_logger("deploy")


class Steps:
    """Writes and tells what happens to one slot's deployments; ``changed`` hears of every record."""

    def __init__(self, journal: Journal, events: EventBus, clock: Clock, changed: Callable[[Record], None]) -> None:
        self._journal = journal
        self._events = events
        self._clock = clock
        self._changed = changed
        self._progress_due = 0.0  # monotonic

    async def begin(self, record: Record) -> None:
        """Record a new deployment."""
        await self._journal.begin(record)
        self._tell(record)

    async def step(self, record: Record, event: Event, *, condemns: str = "", **changes: Any) -> Record:
        """Return the record after ``event``, written and told.

        ``condemns``: why its version is remembered as failed here from the same write on; empty: it is not.
        """
        after = advance(record, event, updated=self._clock.wall(), **changes)
        await self._journal.save(after, condemns=condemns)
        self._tell(after)
        return after

    async def tell_again(self) -> None:
        """Tell the ends that a cut may have come before, of all slots; their keys say that they are the same facts."""
        for record in await self._journal.untold():
            self._tell(record)
            await self._journal.heard(record.id)

    async def note(self, record: Record) -> None:
        """Write what changed while a deployment stays in its state, for whoever looks; no step, no event."""
        await self._journal.save(record)
        self._changed(record)

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
