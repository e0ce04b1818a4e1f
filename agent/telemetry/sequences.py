"""The numbering of streams in the outbox file: one sequence per stream, and no number is ever used twice.

Important streams (class 0) are written durably, so their stored number is exact. The others are written without
waiting for the disk: a power cut may take the last commits, among them rows the receiver has already acknowledged.
Their numbers are therefore reserved durably in blocks ahead of use, and after such a cut the rest of the block is
skipped. The caller reports what was skipped as a gap.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import Final

from agent.telemetry.rows import CLASSES
from agent.telemetry.storage import BATCH_MAX
from agent.telemetry.topics import StreamSpec

SEQ_BITS: Final = 48
SEQ_MASK: Final = (1 << SEQ_BITS) - 1
_RESERVE: Final = 256  # above BATCH_MAX: one transaction never outruns the reservation its begin made sure of

STREAM_SCHEMA: Final = """
CREATE TABLE IF NOT EXISTS streams (
    number INTEGER PRIMARY KEY, name TEXT NOT NULL UNIQUE, next_seq INTEGER NOT NULL, seq_limit INTEGER NOT NULL)
"""


@dataclass(slots=True)
class Stream:
    """One stream of the open file."""

    spec: StreamSpec
    number: int
    next_seq: int
    seq_limit: int

    @property
    def low(self) -> int:
        """The smallest row id of the stream, minus one."""
        return self.number << SEQ_BITS

    @property
    def high(self) -> int:
        """The largest row id of the stream."""
        return self.low | SEQ_MASK


class Sequences:
    """All streams of one open outbox file, in step with its transactions."""

    def __init__(self, db: sqlite3.Connection, specs: Sequence[StreamSpec]) -> None:
        self._db = db
        for spec in specs:
            db.execute(
                "INSERT OR IGNORE INTO streams (name, next_seq, seq_limit) VALUES (?, 1, ?)", (spec.name, 1 + _RESERVE)
            )
        known = {spec.name: spec for spec in specs}
        self._by_name: dict[str, Stream] = {}
        self._names: dict[int, str] = {}
        self._dirty: set[str] = set()
        for number, name, next_seq, limit in db.execute("SELECT number, name, next_seq, seq_limit FROM streams"):
            # A stream of another release is drained like the least important one.
            spec = known.get(name) or StreamSpec(name=name, priority=CLASSES - 1, expiry_s=3600)
            self._by_name[name] = Stream(spec, number, next_seq, limit)
            self._names[number] = name

    def named(self, name: str) -> Stream:
        """Return the stream called ``name``."""
        return self._by_name[name]

    def of(self, row_id: int) -> Stream:
        """Return the stream a row belongs to."""
        return self._by_name[self._names[row_id >> SEQ_BITS]]

    def name(self, number: int) -> str:
        """Return the name of the stream with this number."""
        return self._names[number]

    def of_class(self, priority: int, *, without: Collection[str] = ()) -> list[Stream]:
        """Return the streams of a priority."""
        return [s for s in self._by_name.values() if s.spec.priority == priority and s.spec.name not in without]

    def skip_reserved(self) -> list[tuple[Stream, int, int]]:
        """After a boot that may have lost commits: never use a number that may have been used; return what is skipped.

        Returns:
            ``(stream, first, last)`` of each skipped range.
        """
        skipped = []
        for stream in self._by_name.values():
            if stream.spec.priority and stream.next_seq < stream.seq_limit:
                skipped.append((stream, stream.next_seq, stream.seq_limit - 1))
                stream.next_seq = stream.seq_limit
                stream.seq_limit += _RESERVE
                self._dirty.add(stream.spec.name)
        return skipped

    def short(self) -> list[Stream]:
        """Return the streams whose reservation may not last for one more transaction."""
        return [s for s in self._by_name.values() if s.spec.priority and s.seq_limit - s.next_seq < BATCH_MAX]

    def reserve(self, stream: Stream) -> None:
        """Move the limit ahead; the transaction must be durable."""
        stream.seq_limit = stream.next_seq + _RESERVE
        self._dirty.add(stream.spec.name)

    def use(self, stream: Stream, count: int = 1) -> int:
        """Take the next ``count`` numbers; return the first."""
        first = stream.next_seq
        stream.next_seq += count
        self._dirty.add(stream.spec.name)
        return first

    def write(self) -> None:
        """Put what changed into the transaction."""
        for name in self._dirty:
            stream = self._by_name[name]
            stream.seq_limit = max(stream.seq_limit, stream.next_seq)
            self._db.execute(
                "UPDATE streams SET next_seq = ?, seq_limit = ? WHERE number = ?",
                (stream.next_seq, stream.seq_limit, stream.number),
            )
        self._dirty.clear()

    def saved(self) -> dict[str, Stream]:
        """Return a copy for ``restore``."""
        return {name: replace(stream) for name, stream in self._by_name.items()}

    def restore(self, saved: dict[str, Stream]) -> None:
        """Go back to ``saved``, after a rollback."""
        self._by_name = saved
        self._dirty.clear()
