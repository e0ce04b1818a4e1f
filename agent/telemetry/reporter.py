"""What the device tells without being asked: every event, and its metrics at an interval.

Events are handed to the outbox from inside the event bus, without waiting; metrics are a periodic component. When the
wall clock is set, a ``clock`` event says by how much, so that a receiver can date what came before.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Final

from agent.clock import Clock
from agent.config import KIB, TelemetryConfig
from agent.events import Event, EventBus, Stream
from agent.metrics import Metrics
from agent.telemetry import payloads
from agent.telemetry.outbox import Outbox
from agent.telemetry.payloads import Stamper
from agent.telemetry.topics import AUDIT, CLOCK, DEPLOY, HEALTH, METRICS, SECURITY, StreamSpec

_STEP_S: Final = 1.0  # a clock that moved by more was set, not adjusted
_HEAD_ROOM_BYTES: Final = KIB  # stamp and numbers
_SPECS: Final[dict[Stream, StreamSpec]] = {
    Stream.DEPLOY: DEPLOY,
    Stream.HEALTH: HEALTH,
    Stream.SECURITY: SECURITY,
    Stream.AUDIT: AUDIT,
    Stream.CLOCK: CLOCK,
}


class Reporter:
    """The supervised reporter.

    Args:
        config: The metrics interval and the size of a message.
        events: Every event goes to the outbox while ``listening``.
        outbox: Takes the messages.
        metrics: Read at each interval.
        stamper: Stamps messages; knows the clock's quality.
        clock: Sleeps.
        rng: Spreads the first snapshot, so that a fleet started together does not report together.
        facts: Further values of each snapshot, JSON-able, e.g. memory of the processes.
    """

    name = "telemetry.reporter"

    def __init__(
        self,
        config: TelemetryConfig,
        *,
        events: EventBus,
        outbox: Outbox,
        metrics: Metrics,
        stamper: Stamper,
        clock: Clock,
        rng: random.Random,
        facts: Callable[[], dict[str, Any]] = dict,
    ) -> None:
        self._config = config
        self._events = events
        self._outbox = outbox
        self._metrics = metrics
        self._stamper = stamper
        self._clock = clock
        self._rng = rng
        self._facts = facts

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Events reach the outbox as long as the body runs."""
        with self._events.subscribed(self._hear):
            yield

    async def run(self) -> None:
        """Tell of files that were set aside, then report until cancelled."""
        for incident in self._outbox.stats.incidents:
            await self._outbox.append(HEALTH, self._incident(incident), key=f"{self._stamper.boot_id}:{incident}")
        interval = self._config.metrics_interval_s
        offset, synchronized = self._stamper.offset_s(), self._stamper.now()[1] == "ntp"
        await self._clock.sleep(self._rng.uniform(0.0, min(interval, 5.0)))
        while True:
            await self._outbox.append(METRICS, self._snapshot())
            await self._clock.sleep(interval)
            offset, synchronized = self._watch_clock(offset, synchronized)

    def _hear(self, happened: Event) -> None:
        fields = payloads.event(self._stamper.stamp(), happened)
        self._outbox.post(_SPECS[happened.stream], fields, key=happened.key)

    def _snapshot(self) -> dict[str, Any]:
        bound = self._config.outbox.message_bytes_max - _HEAD_ROOM_BYTES
        facts = self._facts()
        condensed = payloads.condense(self._metrics.snapshot(), bytes_max=bound - len(payloads.encode(facts)))
        return {**self._stamper.stamp(), **facts, **condensed}

    def _watch_clock(self, offset: float, synchronized: bool) -> tuple[float, bool]:
        now_offset, now_synchronized = self._stamper.offset_s(), self._stamper.now()[1] == "ntp"
        stepped = abs(now_offset - offset) > _STEP_S
        if stepped or now_synchronized != synchronized:
            self._events.emit(
                Stream.CLOCK,
                "clock.stepped" if stepped else ("clock.synchronized" if now_synchronized else "clock.unsynchronized"),
                boot=self._stamper.boot_id,
                offset_s=round(now_offset, 3),  # wall = mono + offset, for this boot
                step_s=round(now_offset - offset, 3),
                synchronized=now_synchronized,
            )
        return now_offset, now_synchronized

    def _incident(self, reason: str) -> dict[str, Any]:
        return {
            **self._stamper.stamp(),
            "type": "outbox.replaced",
            "sev": "error",
            "data": {"reason": reason, "epoch": self._outbox.stats.epoch},
        }
