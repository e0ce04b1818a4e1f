"""The numbers that will never arrive, as a few ranges in the outbox file.

A gap says: of these numbers, those that the receiver does not have are lost. So ranges may be joined across numbers
that did arrive, and their count stays bounded. A gap that is being sent (``fixed``) is never changed.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Collection
from dataclasses import dataclass
from typing import Final

GAPS_MAX: Final = 256
GAP_SCHEMA: Final = """
CREATE TABLE IF NOT EXISTS gaps (
    id INTEGER PRIMARY KEY AUTOINCREMENT, stream INTEGER NOT NULL, first INTEGER NOT NULL, last INTEGER NOT NULL,
    reason TEXT NOT NULL)
"""


@dataclass(frozen=True, slots=True)
class Gap:
    """A range of one stream's numbers, both ends included. ``row_id`` is negative: it never equals a row's."""

    row_id: int
    stream: int
    first: int
    last: int
    reason: str


class GapTable:
    """The gaps of one open outbox file, inside its transactions."""

    def __init__(self, db: sqlite3.Connection) -> None:
        self._db = db

    def count(self) -> int:
        """Return how many gaps wait."""
        return int(self._db.execute("SELECT count(*) FROM gaps").fetchone()[0])

    def oldest(self, limit: int, *, beside: Collection[int]) -> list[Gap]:
        """Return up to ``limit`` gaps, oldest first, without those in ``beside``."""
        rows = self._db.execute(
            "SELECT -id, stream, first, last, reason FROM gaps ORDER BY id LIMIT ?", (limit + len(beside),)
        )
        return [gap for gap in (Gap(*row) for row in rows) if gap.row_id not in beside][:limit]

    def note(self, stream: int, first: int, last: int, reason: str, *, fixed: Collection[int]) -> int:
        """Record a lost range, extending the one that ends right before it; return by how many the count grew."""
        before = self._db.execute(
            "SELECT id FROM gaps WHERE stream = ? AND last = ? AND reason = ?", (stream, first - 1, reason)
        ).fetchone()
        if before is not None and -before[0] not in fixed:
            self._db.execute("UPDATE gaps SET last = ? WHERE id = ?", (last, before[0]))
            return 0
        self._db.execute(
            "INSERT INTO gaps (stream, first, last, reason) VALUES (?, ?, ?, ?)", (stream, first, last, reason)
        )
        return 1 - self._join_two(stream, fixed)

    def delete(self, row_id: int) -> int:
        """Forget a delivered gap; return 1, or 0 if it is gone already."""
        return len(self._db.execute("DELETE FROM gaps WHERE id = ? RETURNING id", (-row_id,)).fetchall())

    def _join_two(self, stream: int, fixed: Collection[int]) -> int:
        if self.count() <= GAPS_MAX:
            return 0
        rows = self._db.execute(
            "SELECT -id, stream, first, last, reason FROM gaps WHERE stream = ? ORDER BY id LIMIT ?",
            (stream, 2 + len(fixed)),
        )
        free = [gap for gap in (Gap(*row) for row in rows) if gap.row_id not in fixed][:2]
        if len(free) < 2:
            return 0
        one, two = free
        self._db.execute(
            "UPDATE gaps SET first = ?, last = ? WHERE id = ?",
            (min(one.first, two.first), max(one.last, two.last), -two.row_id),
        )
        return self.delete(one.row_id)
