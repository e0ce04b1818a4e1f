"""What happened, told once to everyone who listens: telemetry, logs, ``inferctl events``.

A bus without queues: ``emit`` calls each listener synchronously, and a listener must not block or raise. The last
events stay readable for people on the box. Absent on purpose: delivery. The outbox makes events durable.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from typing import Any

from agent.clock import Clock


class Severity(StrEnum):
    """How much an operator should care."""

    INFO = "info"
    WARNING = "warning"
    ERROR = "error"


class Stream(StrEnum):
    """Where an event goes; the last part of its MQTT topic ``evt/{stream}``."""

    DEPLOY = "deploy"
    HEALTH = "health"
    SECURITY = "security"
    AUDIT = "audit"
    CLOCK = "clock"


@dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    """One thing that happened. ``key`` makes a repeated report of the same fact recognisable."""

    stream: Stream
    type: str  # dotted, stable: "worker.died", "deployment.confirmed"
    severity: Severity = Severity.INFO
    data: dict[str, Any] = field(default_factory=dict)  # JSON-able
    key: str | None = None
    wall_s: float = 0.0  # filled by the bus
    number: int = 0  # filled by the bus; position since the daemon's start

    def plain(self) -> dict[str, Any]:
        """Return JSON-able fields."""
        return asdict(self)


Listener = Callable[[Event], None]


class EventBus:
    """Fan-out of events and the memory of the last ``keep`` of them."""

    def __init__(self, clock: Clock, *, keep: int = 512) -> None:
        self._clock = clock
        self._listeners: list[Listener] = []
        self._recent: deque[Event] = deque(maxlen=keep)
        self._number = 0

    def emit(
        self,
        stream: Stream,
        type: str,  # noqa: A002 (the field's name on the wire)
        severity: Severity = Severity.INFO,
        *,
        key: str | None = None,
        **data: Any,
    ) -> None:
        """Tell every listener, in the order they subscribed."""
        self._number += 1
        event = Event(
            stream=stream,
            type=type,
            severity=severity,
            data=data,
            key=key,
            wall_s=self._clock.wall(),
            number=self._number,
        )
        self._recent.append(event)
        for listener in self._listeners:
            listener(event)

    @contextmanager
    def subscribed(self, listener: Listener) -> Iterator[None]:
        """``listener`` hears events as long as the body runs."""
        self._listeners.append(listener)
        try:
            yield
        finally:
            self._listeners.remove(listener)

    def recent(self, *, after: int = 0) -> list[Event]:
        """Return the remembered events numbered above ``after``, oldest first."""
        return [event for event in self._recent if event.number > after]
