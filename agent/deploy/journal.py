"""The deployment journal: SQLite, written before each effect, read once at start.

A row per deployment, one per desired slot, and what is known of versions: failed here, served here, revoked. An
unreadable file is set aside and reported; the pointers, which live elsewhere, keep the box serving. All calls run on
the journal's own thread, so that the loop never waits for a disk.
"""

from __future__ import annotations

import asyncio
import json
import sqlite3
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Final, TypeVar

import msgspec

from agent.deploy.desired import Desired, Overtaken
from agent.deploy.revocation import Revoked
from agent.deploy.state import FINAL, Event, Record
from agent.durable import set_aside
from agent.errors import DiskFullError, StateError
from agent.log import get_logger

_KEEP_FINISHED: Final = 200  # per box, beside each lane's newest: that one decides what is done next
# Rows are numbered in the order deployments began: the wall clock may jump and must not decide which is the newest.
_SCHEMA: Final = """
CREATE TABLE IF NOT EXISTS deployment (
    number INTEGER PRIMARY KEY AUTOINCREMENT, id TEXT NOT NULL UNIQUE, slot TEXT NOT NULL, row TEXT NOT NULL
);
CREATE INDEX IF NOT EXISTS deployment_slot ON deployment (slot, number);
CREATE TABLE IF NOT EXISTS desired (slot TEXT, source TEXT, row TEXT NOT NULL, PRIMARY KEY (slot, source));
CREATE TABLE IF NOT EXISTS leaving (slot TEXT PRIMARY KEY);
CREATE TABLE IF NOT EXISTS failed (
    model TEXT, digest TEXT, device TEXT, reason TEXT NOT NULL, PRIMARY KEY (model, digest, device)
);
CREATE TABLE IF NOT EXISTS revoked (digest TEXT PRIMARY KEY, row TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS overtaken (id TEXT PRIMARY KEY, row TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS cancelled (id TEXT PRIMARY KEY);
CREATE TABLE IF NOT EXISTS untold (id TEXT PRIMARY KEY, lane TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS trusted (model TEXT, digest TEXT, device TEXT, PRIMARY KEY (model, digest, device));
"""
# Journals of before kept what failed and what served without the device: it counts on any. By the old table's name.
_FROM_BEFORE: Final[Mapping[str, str]] = {
    "refused": """
BEGIN;
INSERT OR IGNORE INTO failed SELECT slot, digest, '', reason FROM refused;
DROP TABLE refused;
COMMIT;
""",
    "served": """
BEGIN;
INSERT OR IGNORE INTO trusted SELECT slot, digest, '' FROM served;
DROP TABLE served;
COMMIT;
""",
}
_REFUSE: Final = "INSERT OR REPLACE INTO failed VALUES (?, ?, ?, ?)"
# The disk's fault, not the file's; source: sqlite.org/rescode.html.
_DISK_FAULTS: Final = frozenset(
    {sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR, sqlite3.SQLITE_READONLY, sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_BUSY}
)
_T = TypeVar("_T")
_log = get_logger("journal")


class Journal:
    """Deployments, desired versions and refused digests. Open with ``open``, then ``close``.

    A disk that denies the file (full, failing) is no reason to doubt it: it stays, each call raises, and the first call
    that finds the disk well again opens it.

    Args:
        path: Of the file.
        device: Hardware, driver, runtimes and agent: what a version did with others says nothing of it with these.
        connector: Opens the file.
    """

    def __init__(
        self, path: Path, *, device: str = "", connector: Callable[[Path], sqlite3.Connection] | None = None
    ) -> None:
        self._path = path
        self._device = device
        self._connector = connector or connect
        self._closed = False
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="journal")
        self._database: sqlite3.Connection | None = None

    async def open(self) -> str:
        """Open or create the file; return what was wrong with one that was set aside, else an empty text.

        Raises:
            StateError, DiskFullError: the disk denies it now.
        """
        return await self._do(self._open)

    async def close(self) -> None:
        """Flush and close."""
        await self._do(self._close)
        self._thread.shutdown(wait=False)

    async def begin(self, record: Record) -> None:
        """Make a new deployment durable, as the newest of its slot; an older one of the same id is replaced."""
        await self._do(lambda: self._begin(record))

    async def save(self, record: Record, *, condemns: str = "") -> None:
        """Make a later state of a deployment durable, together with why its version failed here, if it did."""
        await self._do(lambda: self._save(record, condemns))

    async def untold(self) -> list[Record]:
        """Return the ends that nobody may have heard of: in each lane, that since its last deployment began."""
        query = "SELECT row FROM deployment WHERE id IN (SELECT id FROM untold) ORDER BY number"
        return list(_decoded(await self._do(lambda: self._query(query)), Record))

    async def heard(self, deployment_id: str) -> None:
        """Note that the end of a deployment was told in a later life than its own."""
        await self._do(lambda: self._execute("DELETE FROM untold WHERE id = ?", deployment_id))

    async def get(self, deployment_id: str) -> Record | None:
        """Return one deployment."""
        rows = await self._do(lambda: self._query("SELECT row FROM deployment WHERE id = ?", deployment_id))
        return next(_decoded(rows, Record), None)

    async def latest(self, lane: str) -> Record | None:
        """Return the newest deployment of a slot, or of its staging lane."""
        query = "SELECT row FROM deployment WHERE slot = ? ORDER BY number DESC LIMIT 1"
        rows = await self._do(lambda: self._query(query, lane))
        return next(_decoded(rows, Record), None)

    async def history(self, *, limit: int = 50) -> list[Record]:
        """Return the newest deployments, newest first."""
        query = "SELECT row FROM deployment ORDER BY number DESC LIMIT ?"
        rows = await self._do(lambda: self._query(query, limit))
        return list(_decoded(rows, Record))

    async def unfinished(self) -> list[Record]:
        """Return the deployments that are under way, however many began after them, newest first."""
        rows = await self._do(lambda: self._query("SELECT row FROM deployment ORDER BY number DESC"))
        return [record for record in _decoded(rows, Record) if record.state not in FINAL]

    async def want(self, desired: Desired) -> None:
        """Record what a source wants of a slot; a wish that it replaces and that never began is overtaken by it."""
        await self._do(lambda: self._want(desired.slot, desired.place, desired, "something else was asked for"))

    async def unwant(self, slot: str, place: str) -> None:
        """Forget what is wanted of a slot; a wish that never began is overtaken."""
        await self._do(lambda: self._want(slot, place, None, "it was withdrawn"))

    async def overtake(self, overtaken: Overtaken) -> None:
        """Remember the end of a wish that never began, until it is told."""
        row = json.dumps(asdict(overtaken))
        await self._do(lambda: self._execute("INSERT OR REPLACE INTO overtaken VALUES (?, ?)", overtaken.wish.id, row))

    async def overtaken(self) -> list[Overtaken]:
        """Return the wishes that ended before they began and were not told yet."""
        return list(_decoded(await self._do(lambda: self._query("SELECT row FROM overtaken")), Overtaken))

    async def told(self, wish_id: str) -> None:
        """Forget an overtaken wish: its end is recorded as a deployment's."""
        await self._do(lambda: self._execute("DELETE FROM overtaken WHERE id = ?", wish_id))

    async def cancel(self, deployment_id: str) -> None:
        """Remember that a deployment is to be given up."""
        await self._do(lambda: self._execute("INSERT OR IGNORE INTO cancelled VALUES (?)", deployment_id))

    async def cancelled(self) -> frozenset[str]:
        """Return the deployments that are to be given up."""
        rows = await self._do(lambda: self._query("SELECT id FROM cancelled"))
        return frozenset(deployment_id for (deployment_id,) in rows)

    async def wanted(self) -> list[Desired]:
        """Return everything any source wants."""
        rows = await self._do(lambda: self._query("SELECT row FROM desired"))
        return list(_decoded(rows, Desired))

    async def leave(self, slots: Iterable[str]) -> None:
        """Forget what anybody wants of these slots, and remember, until ``left``, that they are to be removed."""
        await self._do(lambda: self._leave(list(slots)))

    async def leaving(self) -> list[str]:
        """Return the slots that are to be removed."""
        return [slot for (slot,) in await self._do(lambda: self._query("SELECT slot FROM leaving"))]

    async def left(self, slot: str) -> None:
        """Note that the slot is removed."""
        await self._do(lambda: self._execute("DELETE FROM leaving WHERE slot = ?", slot))

    async def refuse(self, model: str, digest: str, reason: str) -> None:
        """Remember a version that failed here."""
        await self._do(lambda: self._execute(_REFUSE, model, digest, self._device, reason))

    async def forgive(self, model: str, digest: str) -> None:
        """Forget that a version failed here."""
        await self._do(lambda: self._execute("DELETE FROM failed WHERE model = ? AND digest = ?", model, digest))

    async def refused(self, model: str, digest: str) -> str:
        """Return why the version failed here, or an empty text."""
        query = "SELECT reason FROM failed WHERE model = ? AND digest = ? AND device IN (?, '')"
        rows = await self._do(lambda: self._query(query, model, digest, self._device))
        return str(rows[0][0]) if rows else ""

    async def all_refused(self) -> list[tuple[str, str, str]]:
        """Return model, digest and reason of every version that failed here."""
        query = "SELECT model, digest, reason FROM failed WHERE device IN (?, '') ORDER BY model, digest"
        rows = await self._do(lambda: self._query(query, self._device))
        return [(model, digest, reason) for model, digest, reason in rows]

    async def revoke(self, revoked: Revoked) -> None:
        """Remember, for good, that a version was revoked."""
        row = json.dumps(asdict(revoked))
        await self._do(lambda: self._execute("INSERT OR REPLACE INTO revoked VALUES (?, ?)", revoked.digest, row))

    async def revoked(self) -> list[Revoked]:
        """Return every version that is known to be revoked."""
        return list(_decoded(await self._do(lambda: self._query("SELECT row FROM revoked")), Revoked))

    async def note_served(self, model: str, digest: str) -> None:
        """Remember that a version of the model earned trust here."""
        row = (model, digest, self._device)
        await self._do(lambda: self._execute("INSERT OR IGNORE INTO trusted VALUES (?, ?, ?)", *row))

    async def served(self, model: str) -> frozenset[str]:
        """Return the digests of the model's versions that earned trust here."""
        query = "SELECT digest FROM trusted WHERE model = ? AND device IN (?, '')"
        rows = await self._do(lambda: self._query(query, model, self._device))
        return frozenset(digest for (digest,) in rows)

    async def ever_served(self, model: str) -> frozenset[str]:
        """Return the same, those that earned it with a former device included."""
        rows = await self._do(lambda: self._query("SELECT digest FROM trusted WHERE model = ?", model))
        return frozenset(digest for (digest,) in rows)

    async def _do(self, work: Callable[[], _T]) -> _T:
        try:
            return await asyncio.get_running_loop().run_in_executor(self._thread, work)
        except sqlite3.Error as error:
            full = _code(error) == sqlite3.SQLITE_FULL
            raise (DiskFullError if full else StateError)(f"{self._path.name}: {error}") from error
        except OSError as error:
            raise StateError(f"{self._path.name}: {error.strerror}") from error

    def _open(self) -> str:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        try:
            self._database = self._connector(self._path)
        except sqlite3.DatabaseError as error:
            if _code(error) in _DISK_FAULTS and not self._path.is_dir():
                raise
            for suffix in ("", "-wal", "-shm"):
                set_aside(self._path.with_name(self._path.name + suffix))
            self._database = self._connector(self._path)
            return f"{self._path.name}: {error}"
        return ""

    def _close(self) -> None:
        self._closed = True
        if self._database is not None:
            self._database.close()
            self._database = None

    def _begin(self, record: Record) -> None:
        database = self._open_database()
        with database:
            database.execute("DELETE FROM deployment WHERE id = ?", (record.id,))
            database.execute(
                "INSERT INTO deployment (id, slot, row) VALUES (?, ?, ?)",
                (record.id, record.lane, json.dumps(record.plain())),
            )
            database.execute("DELETE FROM cancelled WHERE id = ?", (record.id,))
            database.execute("DELETE FROM untold WHERE lane = ?", (record.lane,))
            database.execute(
                "DELETE FROM deployment WHERE number <= (SELECT max(number) FROM deployment) - ?"
                " AND number NOT IN (SELECT max(number) FROM deployment GROUP BY slot)",
                (_KEEP_FINISHED,),
            )

    def _save(self, record: Record, condemns: str) -> None:
        database = self._open_database()
        with database:
            if condemns:
                database.execute(_REFUSE, (record.model, record.digest, self._device, condemns))
            database.execute("UPDATE deployment SET row = ? WHERE id = ?", (json.dumps(record.plain()), record.id))
            if record.state in FINAL:
                database.execute("INSERT OR REPLACE INTO untold VALUES (?, ?)", (record.id, record.lane))

    def _leave(self, slots: list[str]) -> None:
        database = self._open_database()
        with database:
            for slot in slots:
                database.execute("INSERT OR IGNORE INTO leaving VALUES (?)", (slot,))
                places = database.execute("SELECT source FROM desired WHERE slot = ?", (slot,)).fetchall()
                for (place,) in places:
                    _replace_wish(database, slot, place, None, "its slot is removed")

    def _want(self, slot: str, place: str, wish: Desired | None, reason: str) -> None:
        database = self._open_database()
        with database:
            _replace_wish(database, slot, place, wish, reason)

    def _execute(self, statement: str, *values: object) -> None:
        with self._open_database():
            self._open_database().execute(statement, values)

    def _query(self, statement: str, *values: object) -> list[tuple[str, ...]]:
        return self._open_database().execute(statement, values).fetchall()

    def _open_database(self) -> sqlite3.Connection:
        if self._database is None:
            if self._closed:
                raise StateError(f"{self._path.name}: not open")
            self._open()
        assert self._database is not None
        return self._database


def connect(path: Path) -> sqlite3.Connection:
    """Open or create the file.

    Raises:
        sqlite3.Error: the disk denies it, or it is no sound database.
    """
    database = sqlite3.connect(path, check_same_thread=False)
    try:
        database.execute("PRAGMA journal_mode = WAL")
        database.execute("PRAGMA synchronous = FULL")
        if database.execute("PRAGMA quick_check").fetchone() != ("ok",):
            raise sqlite3.DatabaseError("quick_check failed")
        database.executescript(_SCHEMA)
        for table, script in _FROM_BEFORE.items():
            if database.execute("SELECT 1 FROM sqlite_schema WHERE name = ?", (table,)).fetchone():
                database.executescript(script)
    except sqlite3.Error:
        database.close()
        raise
    return database


def _code(error: sqlite3.Error) -> int:
    """Return the primary result code, 0 if there is none."""
    return int(getattr(error, "sqlite_errorcode", 0)) & 0xFF


def _decoded(rows: list[tuple[str, ...]], kind: type[_T]) -> Iterator[_T]:
    """Yield the rows that can be read; one of another program version is skipped and logged, not guessed at."""
    for (row,) in rows:
        try:
            yield msgspec.json.decode(row, type=kind)
        except (msgspec.DecodeError, UnicodeEncodeError) as error:
            _log.error("journal row cannot be read", kind=kind.__name__, reason=str(error))


def _replace_wish(database: sqlite3.Connection, slot: str, place: str, wish: Desired | None, reason: str) -> None:
    """Put ``wish`` in its place; what stood there and never began is overtaken, for ``reason``."""
    rows = database.execute("SELECT row FROM desired WHERE slot = ? AND source = ?", (slot, place)).fetchall()
    for old in _decoded(rows, Desired):
        begun = database.execute(
            "SELECT 1 FROM deployment WHERE id = ? OR substr(id, 1, ?) = ?",
            (old.id, len(old.id) + 1, f"{old.id}@"),
        ).fetchone()
        if begun is None and (wish is None or wish.id != old.id):
            row = json.dumps(asdict(Overtaken(wish=old, event=Event.SUPERSEDE, message=reason)))
            database.execute("INSERT OR IGNORE INTO overtaken VALUES (?, ?)", (old.id, row))
    database.execute("DELETE FROM desired WHERE slot = ? AND source = ?", (slot, place))
    if wish is not None:
        database.execute("INSERT INTO desired VALUES (?, ?, ?)", (slot, place, json.dumps(asdict(wish))))
