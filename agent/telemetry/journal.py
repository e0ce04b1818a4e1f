"""Which fleet commands this device has heard, and what became of each. SQLite, every change durable.

A command is acknowledged to the broker only after its row is here, so a redelivery finds it: the same id again is
answered from the record, and an id with other content is refused. The generation only grows: what an operator has
overtaken by a newer command can never be replayed, even after its row is gone.

Rows of ended commands are kept for a week, at most 4096. Absent on purpose: signatures, threads, execution.
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any, Final

from agent.durable import set_aside
from agent.telemetry.storage import connect, is_corrupt

KEPT_S: Final = 7 * 86_400
KEPT_MAX: Final = 4096

_SCHEMA: Final = """
CREATE TABLE IF NOT EXISTS commands (
    number INTEGER PRIMARY KEY AUTOINCREMENT,
    id TEXT NOT NULL UNIQUE,
    digest TEXT NOT NULL,            -- of the signed payload
    name TEXT NOT NULL,
    args TEXT NOT NULL,              -- JSON
    reply_topic TEXT NOT NULL,
    correlation BLOB,
    received REAL NOT NULL,          -- wall clock, for keeping only
    starts INTEGER NOT NULL DEFAULT 0,
    state TEXT NOT NULL,
    outcome TEXT NOT NULL DEFAULT '{}');
CREATE INDEX IF NOT EXISTS unfinished ON commands (number) WHERE state IN ('accepted', 'running');
CREATE TABLE IF NOT EXISTS meta (name TEXT PRIMARY KEY, value INTEGER NOT NULL) WITHOUT ROWID;
"""


class State(StrEnum):
    """Where a command is."""

    ACCEPTED = "accepted"
    RUNNING = "running"
    DONE = "done"
    FAILED = "failed"


class Verdict(StrEnum):
    """What the journal says to a command that has just arrived."""

    NEW = "new"  # recorded; carry it out
    DUPLICATE = "duplicate"  # the same command again
    REUSED = "reused"  # a known id with other content
    OVERTAKEN = "overtaken"  # its generation is not above the newest accepted one
    BUSY = "busy"  # new, and there is no room to carry it out


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """One command. ``outcome`` is JSON-able: the result, or ``{"code", "message"}``."""

    id: str
    digest: str
    name: str
    args: dict[str, Any]
    reply_topic: str
    correlation: bytes | None
    received: float
    starts: int = 0
    state: State = State.ACCEPTED
    outcome: dict[str, Any]


class CommandJournal:
    """The open journal; methods run inside ``begin`` … ``commit``. See ``storage.Store``.

    Raises:
        sqlite3.Error: the file can be neither opened nor replaced.
    """

    full = False

    def __init__(self, path: Path, *, connector: Callable[[Path], sqlite3.Connection] = connect) -> None:
        self._path = path
        self._connector = connector
        try:
            self._open()
        except sqlite3.Error as error:
            if not self.repair(error):
                raise

    def begin(self, *, durable: bool) -> None:
        """Start a transaction; it is durable in any case."""
        del durable
        self._db.execute("BEGIN IMMEDIATE")

    def commit(self) -> None:
        """End the transaction."""
        self._db.execute("COMMIT")

    def rollback(self) -> None:
        """End the transaction as if it had not been begun."""
        with suppress(sqlite3.Error):
            if self._db.in_transaction:
                self._db.execute("ROLLBACK")

    def repair(self, error: sqlite3.Error) -> bool:
        """Replace the file if it is damaged. Ids and generation are lost: expiry alone guards against replays then."""
        if not is_corrupt(error):
            return False
        with suppress(sqlite3.Error, AttributeError):
            self._db.close()
        set_aside(self._path)
        set_aside(self._path.with_name(self._path.name + "-wal"))
        self._open()
        return True

    def close(self) -> None:
        """Close the file."""
        with suppress(sqlite3.Error):
            self._db.close()

    def admit(self, entry: Entry, *, generation: int, room: bool) -> tuple[Verdict, Entry]:
        """Record a verified command if it is new and there is ``room``; return the verdict and the record."""
        known = self._find(entry.id)
        if known is not None:
            return (Verdict.DUPLICATE if known.digest == entry.digest else Verdict.REUSED), known
        if generation <= self.generation():
            return Verdict.OVERTAKEN, entry
        if not room:
            return Verdict.BUSY, entry
        self._db.execute("INSERT OR REPLACE INTO meta (name, value) VALUES ('generation', ?)", (generation,))
        self._db.execute(
            "INSERT INTO commands (id, digest, name, args, reply_topic, correlation, received, state)"
            " VALUES (?, ?, ?, ?, ?, ?, ?, 'accepted')",
            (
                entry.id,
                entry.digest,
                entry.name,
                json.dumps(entry.args),
                entry.reply_topic,
                entry.correlation,
                entry.received,
            ),
        )
        self._trim(entry.received)
        return Verdict.NEW, entry

    def start(self, command_id: str) -> int:
        """Note that the command is about to be carried out; return how often that has now happened."""
        rows = self._db.execute(
            "UPDATE commands SET state = 'running', starts = starts + 1 WHERE id = ? RETURNING starts", (command_id,)
        ).fetchall()
        return int(rows[0][0])

    def interrupted(self, command_id: str) -> None:
        """Note that an orderly stop cut the command short; that start does not count."""
        self._db.execute("UPDATE commands SET starts = starts - 1 WHERE id = ? AND state = 'running'", (command_id,))

    def finish(self, command_id: str, state: State, outcome: Mapping[str, Any]) -> None:
        """Note how the command ended."""
        self._db.execute(
            "UPDATE commands SET state = ?, outcome = ? WHERE id = ?",
            (state.value, json.dumps(outcome, default=str), command_id),
        )

    def unfinished(self) -> list[Entry]:
        """Return the commands that have not ended, oldest first."""
        rows = self._db.execute(f"{_SELECT} WHERE state IN ('accepted', 'running') ORDER BY number")
        return [_entry(row) for row in rows]

    def generation(self) -> int:
        """Return the newest accepted generation, 0 before the first."""
        row = self._db.execute("SELECT value FROM meta WHERE name = 'generation'").fetchone()
        return int(row[0]) if row else 0

    def _find(self, command_id: str) -> Entry | None:
        row = self._db.execute(f"{_SELECT} WHERE id = ?", (command_id,)).fetchone()
        return None if row is None else _entry(row)

    def _trim(self, now: float) -> None:
        ended = "state NOT IN ('accepted', 'running')"
        self._db.execute(f"DELETE FROM commands WHERE received < ? AND {ended}", (now - KEPT_S,))
        self._db.execute(
            f"DELETE FROM commands WHERE {ended} AND number <="
            " (SELECT number FROM commands ORDER BY number DESC LIMIT 1 OFFSET ?)",
            (KEPT_MAX,),
        )

    def _open(self) -> None:
        self._db = self._connector(self._path)
        self._db.execute("PRAGMA synchronous=FULL")
        self._db.executescript(_SCHEMA)


_SELECT: Final = (
    "SELECT id, digest, name, args, reply_topic, correlation, received, starts, state, outcome FROM commands"
)


def _entry(row: tuple[Any, ...]) -> Entry:
    return Entry(
        id=row[0],
        digest=row[1],
        name=row[2],
        args=json.loads(row[3]),
        reply_topic=row[4],
        correlation=row[5],
        received=row[6],
        starts=row[7],
        state=State(row[8]),
        outcome=json.loads(row[9]),
    )
