"""The values that go in and out of the outbox. No behaviour."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

CLASSES: Final = 4  # priorities 0..3


@dataclass(frozen=True, slots=True)
class Receipt:
    """What became of an append. Not ``stored``: a repeated key (``seq`` 0) or lost with a gap (``seq`` above 0)."""

    stream: str
    epoch: str
    seq: int
    stored: bool


@dataclass(frozen=True, slots=True)
class Row:
    """A message to send. ``id`` below zero: a gap record."""

    id: int
    epoch: str
    stream: str
    seq: int
    topic: str | None
    correlation: bytes | None
    payload: bytes
    age: int


@dataclass(frozen=True, slots=True)
class Draft:
    """A message before it has a number. ``fields`` are JSON-able; ``topic`` full, or ``None`` for the stream's own."""

    stream: str
    fields: dict[str, Any]
    topic: str | None = None
    correlation: bytes | None = None
    key: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Stats:
    """The outbox at a moment. Counters are since this process opened it."""

    epoch: str = ""
    rows: tuple[int, ...] = (0,) * CLASSES  # per class
    bytes: tuple[int, ...] = (0,) * CLASSES
    file_bytes: int = 0
    gaps: int = 0
    appended: int = 0
    delivered: int = 0
    lost: tuple[tuple[str, int], ...] = ()  # by reason
    incidents: tuple[str, ...] = ()  # files set aside, with the reason
