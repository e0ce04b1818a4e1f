"""The outbox file: numbered rows by stream, a byte cap, and a record of every number that will never arrive.

A row's id is ``stream << 48 | seq``: the table is ordered by stream and age, so appending, the oldest of a stream and
forgetting are one B-tree step each, without a second index. Promises:

- A sequence number names one payload for ever, also across power cuts (``sequences.py``).
- What is dropped (full, refused, lost by the disk) leaves a gap ``{st, ep, from, to, reason}``: of these numbers,
  those that the receiver does not have are lost. Gaps are delivered like rows, before them.
- The file with its WAL stays below the cap. Full: the oldest row of the lowest class above its floor goes.
- An unreadable file is set aside as ``.broken`` and replaced; the new file has a new epoch.

Absent on purpose: threads (``storage.py``), MQTT, time.
"""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Callable, Collection, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Final

from agent.config import OutboxConfig
from agent.durable import set_aside
from agent.telemetry.gaps import GAP_SCHEMA, GapTable
from agent.telemetry.payloads import encode
from agent.telemetry.rows import CLASSES, Draft, Receipt, Row, Stats
from agent.telemetry.sequences import SEQ_BITS, SEQ_MASK, STREAM_SCHEMA, Sequences, Stream
from agent.telemetry.storage import connect, is_corrupt, is_disk_fault
from agent.telemetry.topics import GAP_TOPIC, StreamSpec

_KEYS_KEPT: Final = 4096
_MEMORY: Final = Path(":memory:")  # SQLite's name for no file
_MEMORY_SHARE: Final = 16  # of the file's cap, what may be held without a file
_PAGE_BYTES: Final = 4096
_ROW_OVERHEAD_BYTES: Final = 64  # id, counters, cell pointer

_SCHEMA: Final = """
CREATE TABLE IF NOT EXISTS meta (name TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS rows (
    id INTEGER PRIMARY KEY,          -- stream << 48 | seq
    age INTEGER NOT NULL,            -- grows by one per row, over all streams
    refusals INTEGER NOT NULL DEFAULT 0,
    topic TEXT,                      -- full topic; NULL: the stream's own
    correlation BLOB,
    payload BLOB NOT NULL);
CREATE TABLE IF NOT EXISTS keys (number INTEGER PRIMARY KEY AUTOINCREMENT, key TEXT NOT NULL UNIQUE);
"""


@dataclass(slots=True)
class _Counts:
    """What the file holds and what became of the rest; kept in step with the file by begin, commit and rollback."""

    rows: list[int]  # per class
    bytes: list[int]
    age: int = 0
    gaps: int = 0
    appended: int = 0
    delivered: int = 0
    lost: dict[str, int] = field(default_factory=dict)

    def copy(self) -> _Counts:
        return replace(self, rows=list(self.rows), bytes=list(self.bytes), lost=dict(self.lost))


@dataclass(slots=True)
class _Memory:
    """Everything a rollback must put back."""

    streams: dict[str, Stream]
    counts: _Counts
    unwritten: list[tuple[str, int, int, str]]
    in_flight: set[int]


class OutboxStore:
    """The synchronous outbox; every method runs inside ``begin`` … ``commit`` unless it says otherwise.

    Args:
        path: The database file; its folder exists.
        config: Caps and floors.
        streams: All streams, known in advance so that their numbers are on disk before the first row.
        boot_id: Of the kernel. A file left by this same boot lost no commit, even if the process was killed.
        new_epoch: Names a new file; must not repeat on this device.
        connector: Opens the file.

    A disk that denies the file costs durability, not the daemon: messages then live in memory, under an epoch of their
    own, until the next start.

    Raises:
        sqlite3.Error: the file cannot be opened, nor a new one made.
    """

    def __init__(
        self,
        path: Path,
        config: OutboxConfig,
        streams: Sequence[StreamSpec],
        *,
        boot_id: str,
        new_epoch: Callable[[], str],
        connector: Callable[[Path], sqlite3.Connection] = connect,
    ) -> None:
        self._path = path
        self._config = config
        self._specs = tuple(streams)
        self._boot_id = boot_id
        self._new_epoch = new_epoch
        self._connector = connector
        # Room: three quarters for the file; a WAL is folded in at a sixteenth and grows by at most one batch more.
        self._pages_max = config.size_bytes_max * 3 // 4 // _PAGE_BYTES
        self._wal_pages = max(4, min(256, config.size_bytes_max // 16 // _PAGE_BYTES))
        self._row_bytes_max = config.message_bytes_max
        self._floors = [self._pages_max * _PAGE_BYTES * percent // 100 for percent in config.floors_percent]
        self._in_flight: set[int] = set()
        self._delivered_ids: set[int] = set()  # acknowledged, and the disk refused to delete them so far
        self._unwritten: list[tuple[str, int, int, str]] = []  # gaps the disk refused: stream, first, last, reason
        self._counts = _Counts([0] * CLASSES, [0] * CLASSES)
        self._incidents: list[str] = []
        self._open_or_replace()

    # The transaction.

    def begin(self, *, durable: bool) -> None:
        """Start a transaction; rows, sequence numbers and counters change together or not at all."""
        short = self._streams.short()
        durable = durable or bool(short) or bool(self._unwritten)
        self._saved = self._memory()
        self._batch_bytes = 0
        self._db.execute(f"PRAGMA synchronous={'FULL' if durable else 'NORMAL'}")
        self._db.execute("BEGIN IMMEDIATE")
        for stream in short:
            self._streams.reserve(stream)
        self._write_unwritten()
        if self._delivered_ids:
            self._delete(self._delivered_ids)

    @property
    def full(self) -> bool:
        """Tell whether the transaction has as many bytes as the WAL should take at once."""
        return self._batch_bytes >= self._wal_pages * _PAGE_BYTES

    def commit(self) -> None:
        """End the transaction; ``begin`` decided how durably."""
        self._streams.write()
        self._db.execute("COMMIT")
        self._delivered_ids.clear()

    def rollback(self) -> None:
        """End the transaction as if it had not been begun; numbers it used are used again."""
        with suppress(sqlite3.Error):  # SQLite may have ended it by itself
            if self._db.in_transaction:
                self._db.execute("ROLLBACK")
        memory = self._saved
        self._streams.restore(memory.streams)
        self._counts, self._unwritten, self._in_flight = memory.counts, memory.unwritten, memory.in_flight

    def repair(self, error: sqlite3.Error) -> bool:
        """Replace the file if it is damaged; see ``storage.Store``."""
        if not is_corrupt(error):
            return False
        with suppress(sqlite3.Error):
            self._db.close()
        self._set_aside(str(error))
        try:
            self._open()
        except (sqlite3.Error, OSError):
            return False
        return True

    def close(self) -> None:
        """Note that nothing was lost, and close; outside any transaction."""
        with suppress(sqlite3.Error):
            self.begin(durable=True)
            self._db.execute("UPDATE meta SET value='1' WHERE name='clean'")
            self.commit()
        with suppress(sqlite3.Error):
            self._db.close()

    # Rows.

    def append(self, draft: Draft) -> Receipt:
        """Number and keep a message; a key seen among the last 4096 means that it was kept before."""
        stream = self._streams.named(draft.stream)
        if draft.key is not None and not self._remember(f"{draft.stream}:{draft.key}"):
            return Receipt(draft.stream, self.epoch, 0, stored=False)
        seq = self._streams.use(stream)
        payload = encode({"st": draft.stream, "ep": self.epoch, "seq": seq, **draft.fields})
        if len(payload) > self._row_bytes_max:
            self._note_gap(stream, seq, seq, "too_large")
            return Receipt(draft.stream, self.epoch, seq, stored=False)
        self._make_room(len(payload))
        self._counts.age += 1
        self._db.execute(
            "INSERT INTO rows (id, age, topic, correlation, payload) VALUES (?, ?, ?, ?, ?)",
            (stream.low | seq, self._counts.age, draft.topic, draft.correlation, payload),
        )
        self._counts.rows[stream.spec.priority] += 1
        self._counts.bytes[stream.spec.priority] += len(payload) + _ROW_OVERHEAD_BYTES
        self._counts.appended += 1
        self._batch_bytes += len(payload)
        return Receipt(draft.stream, self.epoch, seq, stored=True)

    def lose(self, name: str, count: int, reason: str) -> Receipt:
        """Number messages that could not be kept, so that their loss shows; needs no disk and no transaction."""
        first = self._streams.use(self._streams.named(name), count)
        last = first + count - 1
        self._count_lost(reason, count)
        if self._unwritten and self._unwritten[-1][0] == name and self._unwritten[-1][3] == reason:
            first = self._unwritten.pop()[1]
        self._unwritten.append((name, first, last, reason))
        return Receipt(name, self.epoch, last, stored=False)

    def take(self, limit: int, held: Collection[str]) -> list[Row]:
        """Return the next messages and mark them in flight: gaps, then by class, each in its stream's order.

        Args:
            limit: At most so many.
            held: Topics to leave alone for now: full ones of rows that bring their own, else stream names.
        """
        rows = [] if GAP_TOPIC in held or not self._counts.gaps else self._take_gaps(limit)
        for priority in range(CLASSES):
            if len(rows) < limit and self._counts.rows[priority]:
                rows += self._heads(priority, limit - len(rows), held)
        self._in_flight.update(row.id for row in rows)
        return rows

    def forget(self, epoch: str, ids: Iterable[int]) -> None:
        """Delete acknowledged messages. Ids of an older epoch name nothing any more."""
        wanted = set(ids)
        if epoch != self.epoch or not wanted:
            return
        self._in_flight -= wanted
        self._delete(wanted)
        self._counts.delivered += len(wanted)

    def keep_for_later(self, epoch: str, ids: Iterable[int]) -> None:
        """Remember acknowledged messages that the disk would not delete; needs no transaction."""
        if epoch == self.epoch:
            self._delivered_ids.update(ids)

    def refuse(self, epoch: str, row_id: int, *, refusals_max: int, reason: str) -> bool:
        """A message came back; at its ``refusals_max``-th time it is dropped, with a gap: ``True``. 0: not counted."""
        if epoch != self.epoch:
            return True
        self._in_flight.discard(row_id)
        if row_id < 0 or refusals_max <= 0:
            return False
        found = self._db.execute(
            "UPDATE rows SET refusals = refusals + 1 WHERE id = ? RETURNING refusals", (row_id,)
        ).fetchall()
        if found and found[0][0] >= refusals_max:
            self._drop(row_id, reason)
            return True
        return not found

    def give_back(self, epoch: str, ids: Iterable[int] | None = None) -> None:
        """Messages are no longer in flight (``None``: any), and will be taken again."""
        if ids is None:
            self._in_flight.clear()
        elif epoch == self.epoch:
            self._in_flight.difference_update(ids)

    def stats(self) -> Stats:
        """Return counters and depths; needs no transaction."""
        return Stats(
            epoch=self.epoch,
            rows=tuple(self._counts.rows),
            bytes=tuple(self._counts.bytes),
            file_bytes=_size(self._path) + _size(_beside(self._path, "-wal")),
            gaps=self._counts.gaps + len(self._unwritten),
            appended=self._counts.appended,
            delivered=self._counts.delivered,
            lost=tuple(sorted(self._counts.lost.items())),
            incidents=tuple(self._incidents),
        )

    # Reading in order.

    def _heads(self, priority: int, limit: int, held: Collection[str]) -> list[Row]:
        streams = self._streams.of_class(priority, without=held)
        topics = list(held)
        marks = ",".join("?" * len(topics))
        found: list[Row] = []
        for stream in streams:
            order = "DESC" if stream.spec.newest_first else "ASC"
            busy = sum(1 for i in self._in_flight | self._delivered_ids if stream.low <= i <= stream.high)
            rows = self._db.execute(
                f"SELECT id, topic, correlation, payload, age FROM rows WHERE id BETWEEN ? AND ?"
                f" AND (topic IS NULL OR topic NOT IN ({marks})) ORDER BY id {order} LIMIT ?",
                (stream.low, stream.high, *topics, limit + busy),
            )
            found += [
                Row(i, self.epoch, stream.spec.name, i & SEQ_MASK, topic, correlation, payload, age)
                for i, topic, correlation, payload, age in rows
                if i not in self._in_flight and i not in self._delivered_ids
            ]
        newest_first = any(stream.spec.newest_first for stream in streams)
        return sorted(found, key=lambda row: row.age, reverse=newest_first)[:limit]

    def _take_gaps(self, limit: int) -> list[Row]:
        found = self._gaps.oldest(limit, beside=self._in_flight)
        return [
            Row(
                id=gap.row_id,
                epoch=self.epoch,
                stream=GAP_TOPIC,
                seq=0,
                topic=None,
                correlation=None,
                payload=encode(
                    {
                        "st": self._streams.name(gap.stream),
                        "ep": self.epoch,
                        "from": gap.first,
                        "to": gap.last,
                        "reason": gap.reason,
                    }
                ),
                age=0,
            )
            for gap in found
        ]

    # Room and gaps.

    def _make_room(self, payload_bytes: int) -> None:
        """Drop rows until ``payload_bytes`` more fit: the oldest of the lowest class above its floor."""
        pages = payload_bytes // (_PAGE_BYTES - 64) + 3
        while self._used_pages() + pages > self._pages_max:
            victim = self._victim()
            if victim is None:
                return  # nothing left but what is in flight; the WAL's head room takes the rest
            self._drop(victim, "full")

    def _victim(self) -> int | None:
        above = [c for c in reversed(range(CLASSES)) if self._counts.bytes[c] > self._floors[c]]
        for priority in (*above, *reversed(range(CLASSES))):
            oldest: tuple[int, int] | None = None
            for stream in self._streams.of_class(priority):
                for row_id, age in self._db.execute(
                    "SELECT id, age FROM rows WHERE id BETWEEN ? AND ? ORDER BY id LIMIT ?",
                    (stream.low, stream.high, 1 + len(self._in_flight)),
                ):
                    if row_id not in self._in_flight:
                        oldest = min(oldest or (age, row_id), (age, row_id))
                        break
            if oldest is not None:
                return oldest[1]
        return None

    def _drop(self, row_id: int, reason: str) -> None:
        self._delete({row_id})
        self._note_gap(self._streams.of(row_id), row_id & SEQ_MASK, row_id & SEQ_MASK, reason)

    def _delete(self, ids: Iterable[int]) -> None:
        for row_id in ids:
            if row_id < 0:
                self._counts.gaps -= self._gaps.delete(row_id)
                continue
            sizes = self._db.execute("DELETE FROM rows WHERE id = ? RETURNING length(payload)", (row_id,)).fetchall()
            priority = self._streams.of(row_id).spec.priority
            for (size,) in sizes:
                self._counts.rows[priority] -= 1
                self._counts.bytes[priority] -= size + _ROW_OVERHEAD_BYTES

    def _note_gap(self, stream: Stream, first: int, last: int, reason: str, *, counted: bool = True) -> None:
        if counted:
            self._count_lost(reason, last - first + 1)
        self._counts.gaps += self._gaps.note(stream.number, first, last, reason, fixed=self._in_flight)

    def _write_unwritten(self) -> None:
        for name, first, last, reason in self._unwritten:
            self._note_gap(self._streams.named(name), first, last, reason, counted=False)
            self._streams.use(self._streams.named(name), 0)  # its number was used in memory only
        self._unwritten = []

    def _count_lost(self, reason: str, count: int) -> None:
        self._counts.lost[reason] = self._counts.lost.get(reason, 0) + count

    # Numbers and keys.

    def _remember(self, key: str) -> bool:
        added = self._db.execute("INSERT OR IGNORE INTO keys (key) VALUES (?) RETURNING number", (key,)).fetchall()
        if added:
            self._db.execute("DELETE FROM keys WHERE number <= ?", (added[0][0] - _KEYS_KEPT,))
        return bool(added)

    def _memory(self) -> _Memory:
        return _Memory(self._streams.saved(), self._counts.copy(), list(self._unwritten), set(self._in_flight))

    def _used_pages(self) -> int:
        count: int = self._db.execute("PRAGMA page_count").fetchone()[0]
        free: int = self._db.execute("PRAGMA freelist_count").fetchone()[0]
        return count - free

    # Opening.

    def _open_or_replace(self) -> None:
        try:
            self._open()
        except sqlite3.Error as error:
            with suppress(sqlite3.Error, AttributeError):
                self._db.close()
            if is_corrupt(error):
                self._set_aside(str(error))
                self._open()
            elif is_disk_fault(error):
                self._incidents.append(f"{self._path.name} cannot be used ({error}); messages are kept in memory only")
                self._path = _MEMORY
                self._pages_max //= _MEMORY_SHARE
                self._open()
            else:
                raise

    def _set_aside(self, reason: str) -> None:
        wal = _beside(self._path, "-wal")
        target = set_aside(self._path)
        if target is not None and wal.exists():
            os.replace(wal, _beside(target, "-wal"))  # the name under which SQLite finds it again
        self._incidents.append(f"{self._path.name} was unreadable ({reason}) and is now {self._path.name}.broken")

    def _open(self) -> None:
        self._db = self._connector(self._path)
        self._in_flight.clear()
        self._delivered_ids.clear()
        self._unwritten.clear()
        self._db.execute(f"PRAGMA wal_autocheckpoint={self._wal_pages}")
        self._db.execute(f"PRAGMA journal_size_limit={self._wal_pages * 2 * _PAGE_BYTES}")
        self._db.execute("PRAGMA synchronous=FULL")
        self._db.execute("BEGIN IMMEDIATE")
        for statement in (*_SCHEMA.split(";\n"), STREAM_SCHEMA, GAP_SCHEMA):
            self._db.execute(statement)
        meta = dict(self._db.execute("SELECT name, value FROM meta"))
        self.epoch = meta.get("epoch") or self._new_epoch()
        kept_all = meta.get("clean") == "1" or meta.get("boot") in (None, self._boot_id)
        self._db.executemany(
            "INSERT OR REPLACE INTO meta (name, value) VALUES (?, ?)",
            [("epoch", self.epoch), ("boot", self._boot_id), ("clean", "0"), ("schema", "1")],
        )
        self._gaps = GapTable(self._db)
        self._counts.gaps = self._gaps.count()
        self._streams = Sequences(self._db, self._specs)
        if not kept_all:
            for stream, first, last in self._streams.skip_reserved():
                self._note_gap(stream, first, last, "power_cut", counted=False)
        self._streams.write()
        self._count_rows()
        self._db.execute("COMMIT")
        self._shrink()

    def _count_rows(self) -> None:
        self._counts.rows, self._counts.bytes, self._counts.age = [0] * CLASSES, [0] * CLASSES, 0
        for number, rows, size, age in self._db.execute(
            f"SELECT id >> {SEQ_BITS}, count(*), sum(length(payload)), max(age) FROM rows GROUP BY 1"
        ):
            priority = self._streams.of(number << SEQ_BITS).spec.priority
            self._counts.rows[priority] += rows
            self._counts.bytes[priority] += size + rows * _ROW_OVERHEAD_BYTES
            self._counts.age = max(self._counts.age, age)

    def _shrink(self) -> None:
        """Obey a cap that is lower than the file's size, after a change of the configuration."""
        if self._db.execute("PRAGMA page_count").fetchone()[0] <= self._pages_max:
            return
        self.begin(durable=True)
        self._make_room(0)
        self.commit()
        with suppress(sqlite3.Error):  # needs room for a copy; without it the file stays as large as it is
            self._db.execute("VACUUM")
            self._db.execute("PRAGMA wal_checkpoint(TRUNCATE)")


def _beside(path: Path, suffix: str) -> Path:
    return path.with_name(path.name + suffix)


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0
