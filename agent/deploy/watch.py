"""Ask the store now and then what became of the versions here, and watch how old its word gets.

Levels, not edges: each look compares what is on disk with what was told before, and tells the difference once. The
reconciler keeps what was learned; this only learns it. Losing a look costs time, never correctness.
"""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Final, Literal

from agent.clock import Clock
from agent.deploy.ports import Standing, Store, Survey
from agent.deploy.reconciler import Reconciler
from agent.deploy.refusals import Refusals
from agent.deploy.revocation import Revoked
from agent.errors import AgentError, BundleError
from agent.events import EventBus, Severity, Stream
from agent.log import get_logger
from agent.metrics import Metrics

_log = get_logger("deploy.watch")
_LOOK_S: Final = 30.0
_FIRST_SURVEY_S: Final = 60.0
_TIDY_S: Final = 600.0
_DAY_S: Final = 86_400
FRESHNESS: Final = ("fresh", "stale", "long_offline", "unknown")
_SEVERITIES: Final = {"fresh": Severity.INFO, "stale": Severity.WARNING, "long_offline": Severity.ERROR}
_HELD: Final = "the store was not heard for more than 30 days, and [policy] on_long_offline is 'stop'"


@dataclass(frozen=True, slots=True, kw_only=True)
class Refresh:
    """What one refresh brought."""

    survey: Survey
    revoked: tuple[Revoked, ...]  # not known before


class Watch:
    """The supervised watcher.

    Args:
        standing: Where the box stands now, from its disk.
        on_long_offline: What becomes of the slots then.
        poll_interval_s: Between two refreshes; 0: only when asked.
        rng: Spreads the first refresh of a fleet that started together.
    """

    name = "deploy.watch"

    def __init__(
        self,
        *,
        store: Store,
        reconciler: Reconciler,
        standing: Callable[[], Standing],
        on_long_offline: Literal["continue", "stop"],
        poll_interval_s: float,
        events: EventBus,
        refusals: Refusals,
        clock: Clock,
        metrics: Metrics,
        rng: random.Random,
    ) -> None:
        self._store = store
        self._reconciler = reconciler
        self._standing = standing
        self._on_long_offline = on_long_offline
        self._poll_interval_s = poll_interval_s
        self._events = events
        self._refusals = refusals
        self._clock = clock
        self._rng = rng
        self._told: Standing | None = None
        self._one_at_a_time = asyncio.Lock()
        metrics.gauge("inferd_trust_age_seconds", "Age of the newest signature of the store", (), self._age)
        metrics.gauge("inferd_trust_state", "1 for the state the box is in", ("state",), self._states)
        metrics.gauge("inferd_deployment_waiting", "1 while a deployment waits", ("model", "state"), self._waiting)
        metrics.gauge("inferd_model_holds", "Applications that hold a model", ("model",), self._holds)
        metrics.gauge("inferd_clock_trusted", "0: the clock is before a signature", (), self._clock_state)

    async def run(self) -> None:
        """Look every half minute, tidy up every ten, and refresh at the poll interval, until cancelled."""
        due = self._clock.monotonic() + _FIRST_SURVEY_S * (1 + self._rng.random())
        tidy_due = self._clock.monotonic() + _TIDY_S
        while True:
            self.look()
            if self._clock.monotonic() >= tidy_due:
                await self._reconciler.retention.tidy()  # others may fill the disk, too
                tidy_due = self._clock.monotonic() + _TIDY_S
            if self._poll_interval_s and self._clock.monotonic() >= due:
                await self._refresh_quietly()
                due = self._clock.monotonic() + self._poll_interval_s
            await self._clock.sleep(_LOOK_S)

    def look(self) -> Standing:
        """Return where the box stands; tell what changed, and hold or release the slots."""
        now, before = self._standing(), self._told
        self._told = now
        held = now.freshness == "long_offline" and self._on_long_offline == "stop"
        self._reconciler.hold(_HELD if held else "")
        if before is None or before.freshness != now.freshness:
            quiet = before is None and now.freshness in ("fresh", "unknown")
            if not quiet:
                self._tell_freshness(now, before)
        if (before is None or before.clock_trusted) != now.clock_trusted:
            kind = "clock.trusted" if now.clock_trusted else "clock.untrusted"
            severity = Severity.INFO if now.clock_trusted else Severity.WARNING
            self._events.emit(Stream.CLOCK, kind, severity, age_s=now.age_s)
        return now

    async def refresh(self, *, medium: str = "") -> Refresh:
        """Ask the store, or the folder ``medium``, now, and act on what it says.

        Raises:
            BundleError, StoreError, StateError: nobody gave an answer that holds.
        """
        async with self._one_at_a_time:
            try:
                survey = await self._store.survey(self._reconciler.models(), medium=medium)
            except AgentError:
                with suppress(AgentError):  # one model's trouble does not hide what was verified of another
                    await self._reconciler.absorb(await self._store.heard())
                raise
            finally:
                self.look()
            revoked = await self._reconciler.absorb(survey.models)
            return Refresh(survey=survey, revoked=tuple(revoked))

    async def _refresh_quietly(self) -> None:
        try:
            await self.refresh()
        except AgentError as error:
            if isinstance(error, BundleError):
                self._refusals.bundle(error, team="", name="", version="", polled=True)
            _log.info("refresh failed", code=error.code, reason=str(error))

    def _tell_freshness(self, now: Standing, before: Standing | None) -> None:
        severity = _SEVERITIES.get(now.freshness, Severity.WARNING)
        data: dict[str, Any] = {
            "state": now.freshness,
            "before": before.freshness if before is not None else "",
            "age_s": now.age_s,
        }
        _log.info("trust", age_days=round(now.age_s / _DAY_S, 1), **data)
        self._events.emit(Stream.HEALTH, "trust.changed", severity, **data)

    # Metrics

    def _age(self) -> list[tuple[tuple[str, ...], float]]:
        return [((), float(self._told.age_s))] if self._told is not None else []

    def _states(self) -> list[tuple[tuple[str, ...], float]]:
        now = self._told.freshness if self._told is not None else "unknown"
        return [((state,), float(state == now)) for state in FRESHNESS]

    def _waiting(self) -> list[tuple[tuple[str, ...], float]]:
        return [((record.slot, str(record.state)), 1.0) for record in self._reconciler.waiting()]

    def _holds(self) -> list[tuple[tuple[str, ...], float]]:
        counts = Counter(row["model"] for row in self._reconciler.holds.plain() if row["counts"])
        return [((model,), float(count)) for model, count in counts.items()]

    def _clock_state(self) -> list[tuple[tuple[str, ...], float]]:
        return [((), float(self._told.clock_trusted))] if self._told is not None else []
