"""The outbox as the daemon sees it: append and forget, never waiting for a disk on the event loop.

Telemetry is a witness, not a dependency: a full or failing disk costs messages, visibly (a gap record, a counter, an
incident), and raises nothing at whoever had something to say. What the file promises is in ``store.py``.
"""

from __future__ import annotations

import secrets
import sqlite3
from collections.abc import AsyncIterator, Callable, Collection, Iterable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager, suppress
from pathlib import Path
from typing import Any

from agent.config import OutboxConfig
from agent.log import get_logger
from agent.metrics import Metrics
from agent.telemetry.rows import Draft, Receipt, Row, Stats
from agent.telemetry.storage import StoreThread, connect
from agent.telemetry.store import OutboxStore
from agent.telemetry.topics import STREAMS, StreamSpec

_log = get_logger("telemetry.outbox")


class Outbox:
    """Durable messages by stream, in a thread of their own.

    Args:
        path: The database file; its folder exists.
        config: Caps, floors and bounds.
        boot_id: The kernel's id of this boot.
        metrics: Depth, losses and deliveries are reported here.
        streams: All streams ever appended to.
        new_epoch: Names a new file; must not repeat on this device.
        connector: Opens the database file.
    """

    def __init__(
        self,
        path: Path,
        config: OutboxConfig,
        *,
        boot_id: str,
        metrics: Metrics,
        streams: Sequence[StreamSpec] = STREAMS,
        new_epoch: Callable[[], str] = lambda: secrets.token_hex(6),
        connector: Callable[[Path], sqlite3.Connection] = connect,
    ) -> None:
        self.stats = Stats()  # replaced after each transaction
        self._faulty = False
        self._specs = {spec.name: spec for spec in streams}
        self._listeners: list[Callable[[], None]] = []
        self._backlog: dict[str, int] = {}  # messages that found the thread overrun, by stream
        self._thread = StoreThread(
            "telemetry.outbox",
            lambda: OutboxStore(path, config, streams, boot_id=boot_id, new_epoch=new_epoch, connector=connector),
            observe=OutboxStore.stats,
            noticed=self._notice,
        )
        self._register(metrics)

    @asynccontextmanager
    async def opened(self) -> AsyncIterator[Outbox]:
        """The outbox works as long as the body runs; what was appended by then is written.

        Raises:
            StateError: the file can be neither opened nor replaced.
        """
        await self._thread.start()
        try:
            yield self
        finally:
            await self._thread.stop()

    async def append(
        self,
        spec: StreamSpec,
        fields: dict[str, Any],
        *,
        key: str | None = None,
        topic: str | None = None,
        correlation: bytes | None = None,
    ) -> Receipt:
        """Keep a message; return once it is written (class 0: on the disk, others: with the kernel).

        Args:
            spec: The stream, which gives priority and order.
            fields: JSON-able; ``st``, ``ep`` and ``seq`` are added.
            key: Names the fact; a second append of the same fact keeps nothing.
            topic: Full topic instead of the stream's own.
            correlation: MQTT correlation data of the request that this answers.

        Raises:
            StateError: the outbox is not open.
        """
        return await self._thread.call(*self._appending(spec, Draft(spec.name, fields, topic, correlation, key)))

    def post(
        self,
        spec: StreamSpec,
        fields: dict[str, Any],
        *,
        key: str | None = None,
        topic: str | None = None,
        correlation: bytes | None = None,
    ) -> None:
        """Keep a message soon, without waiting; for listeners, which must not block. See ``append``."""
        if self._thread.accepts:
            self._thread.post(*self._appending(spec, Draft(spec.name, fields, topic, correlation, key)))
        else:
            self._backlog[spec.name] = self._backlog.get(spec.name, 0) + 1

    async def exchange(
        self,
        *,
        epoch: str = "",
        delivered: Collection[int] = (),
        refused: Iterable[tuple[int, int, str]] = (),
        limit: int = 0,
        held: Collection[str] = (),
    ) -> list[Row]:
        """Settle what came back from the broker and take what goes next, in one transaction.

        Args:
            epoch: Of the ids; those of a file that was replaced since mean nothing.
            delivered: Acknowledged; they are deleted.
            refused: ``(id, refusals allowed, reason)``; given back and counted, dropped with a gap at the bound; a
                bound of 0 counts nothing.
            limit: Rows to take, oldest of the most important class first; they count as in flight from now on.
            held: Topics (full ones of rows that bring their own, else stream names) to leave alone for now.
        """
        settle = tuple(refused)

        def act(store: OutboxStore) -> list[Row]:
            store.forget(epoch, delivered)
            for row_id, refusals_max, reason in settle:
                store.refuse(epoch, row_id, refusals_max=refusals_max, reason=reason)
            return store.take(limit, held) if limit > 0 else []

        def otherwise(store: OutboxStore, error: sqlite3.Error) -> list[Row]:
            self._note_fault(error)
            store.keep_for_later(epoch, delivered)
            store.give_back(epoch, [row_id for row_id, _, _ in settle])
            with suppress(sqlite3.Error):
                return store.take(limit, held) if limit > 0 else []
            return []

        return await self._thread.call(act, otherwise=otherwise)

    def give_back(self) -> None:
        """Nothing is in flight any more: the connection ended. Unacknowledged rows will be taken again."""
        self._thread.post(lambda store: store.give_back(store.epoch), otherwise=_ignore)

    @contextmanager
    def watched(self, listener: Callable[[], None]) -> Iterator[None]:
        """``listener`` is called on the loop after something was added, as long as the body runs."""
        self._listeners.append(listener)
        try:
            yield
        finally:
            self._listeners.remove(listener)

    def _appending(
        self, spec: StreamSpec, draft: Draft
    ) -> tuple[Callable[[OutboxStore], Receipt], bool, Callable[[OutboxStore, sqlite3.Error], Receipt]]:
        """Return what to do in the transaction, whether durably, and what if the disk refuses."""
        missed, self._backlog = self._backlog, {}

        def lose_missed(store: OutboxStore) -> None:
            for name, count in missed.items():
                store.lose(name, count, "backlog")

        def act(store: OutboxStore) -> Receipt:
            lose_missed(store)
            return store.append(draft)

        def otherwise(store: OutboxStore, error: sqlite3.Error) -> Receipt:
            self._note_fault(error)
            lose_missed(store)
            return store.lose(spec.name, 1, "disk")

        return act, spec.priority == 0 or bool(missed), otherwise

    def _note_fault(self, error: sqlite3.Error) -> None:
        """In the thread: say once that messages are being lost, not once per message."""
        if not self._faulty:
            _log.error("the outbox cannot be written; what is said now is lost, and counted", error=str(error))
        self._faulty = True

    def _notice(self, stats: Stats) -> None:
        before, self.stats = self.stats, stats
        for incident in stats.incidents[len(before.incidents) :]:
            _log.error("outbox file given up", reason=incident)
        if stats.appended > before.appended and self._faulty:
            _log.warning("the outbox can be written again", lost=dict(stats.lost))
            self._faulty = False
        if stats.appended != before.appended or stats.gaps != before.gaps:
            for listener in self._listeners:
                listener()

    def _register(self, metrics: Metrics) -> None:
        metrics.gauge(
            "inferd_outbox_rows",
            "Messages waiting for the broker, by priority",
            ("priority",),
            lambda: [((str(priority),), float(rows)) for priority, rows in enumerate(self.stats.rows)],
        )
        metrics.gauge(
            "inferd_outbox_bytes", "Size of the outbox file with its log", (), lambda: [((), self.stats.file_bytes)]
        )
        metrics.gauge(
            "inferd_outbox_lost",
            "Messages dropped since the start, by reason; each is reported as a gap",
            ("reason",),
            lambda: [((reason,), float(count)) for reason, count in self.stats.lost],
        )


def _ignore(store: OutboxStore, error: sqlite3.Error) -> None:
    del store, error
