"""What the outbox file keeps, drops and says about it."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agent.config import KIB, MIB, OutboxConfig
from agent.telemetry.rows import Draft, Row
from agent.telemetry.storage import connect
from agent.telemetry.store import OutboxStore
from agent.telemetry.topics import AUDIT, DEPLOY, GAP_TOPIC, HEALTH, METRICS, REPLY, SAMPLES, STREAMS, StreamSpec

pytestmark = pytest.mark.unit

DEFAULT = OutboxConfig()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "outbox.db"


def opened(
    path: Path,
    config: OutboxConfig = DEFAULT,
    *,
    boot: str = "boot-1",
    connector: Callable[[Path], sqlite3.Connection] = connect,
) -> OutboxStore:
    numbers = iter(range(1, 100))
    return OutboxStore(
        path, config, STREAMS, boot_id=boot, new_epoch=lambda: f"epoch-{next(numbers)}", connector=connector
    )


def append(store: OutboxStore, spec: StreamSpec, **fields: Any) -> int:
    """Append one message in its own transaction; return its number."""
    draft = {name: fields.pop(name) for name in ("key", "topic", "correlation") if name in fields}
    store.begin(durable=spec.priority == 0)
    receipt = store.append(Draft(spec.name, fields, **draft))
    store.commit()
    return receipt.seq if receipt.stored else -receipt.seq


def take(store: OutboxStore, limit: int = 100, held: frozenset[str] = frozenset()) -> list[Row]:
    store.begin(durable=False)
    rows = store.take(limit, held)
    store.commit()
    return rows


def settle(store: OutboxStore, rows: list[Row]) -> None:
    store.begin(durable=False)
    store.forget(store.epoch, [row.id for row in rows])
    store.commit()


def gaps(store: OutboxStore) -> list[tuple[str, int, int, str]]:
    """Take all gap records; return ``(stream, from, to, reason)``."""
    values = [json.loads(row.payload) for row in take(store, 1000) if row.stream == GAP_TOPIC]
    store.give_back(store.epoch)
    return [(value["st"], value["from"], value["to"], value["reason"]) for value in values]


def test_rows_are_numbered_by_stream_and_carry_their_key(path: Path) -> None:
    store = opened(path)
    assert [append(store, DEPLOY, n=1), append(store, DEPLOY, n=2), append(store, HEALTH, n=3)] == [1, 2, 1]
    first = json.loads(take(store)[0].payload)
    assert (first["st"], first["ep"], first["seq"], first["n"]) == ("evt/deploy", "epoch-1", 1, 1)


def test_numbers_and_rows_survive_a_restart_in_the_same_epoch(path: Path) -> None:
    store = opened(path)
    append(store, METRICS, n=1)
    store.close()
    again = opened(path, boot="boot-2")
    assert append(again, METRICS, n=2) == 2
    assert [(row.epoch, row.seq) for row in take(again)] == [("epoch-1", 2), ("epoch-1", 1)]


def test_drain_order_is_class_then_events_oldest_first_and_measurements_newest_first(path: Path) -> None:
    store = opened(path)
    for spec in (SAMPLES, METRICS, HEALTH, DEPLOY, AUDIT, METRICS, SAMPLES, DEPLOY, HEALTH):
        append(store, spec)
    assert [(row.stream, row.seq) for row in take(store)] == [
        ("evt/deploy", 1), ("evt/audit", 1), ("evt/deploy", 2), ("evt/health", 1), ("evt/health", 2),
        ("tel/metrics", 2), ("tel/metrics", 1), ("tel/infer", 2), ("tel/infer", 1),
    ]  # fmt: skip


def test_a_taken_row_is_not_taken_again_until_it_is_given_back(path: Path) -> None:
    store = opened(path)
    append(store, DEPLOY)
    assert len(take(store)) == 1
    assert take(store) == []
    store.give_back(store.epoch)
    (row,) = take(store)
    settle(store, [row])
    store.give_back(store.epoch)
    assert take(store) == []


def test_held_topics_are_left_alone(path: Path) -> None:
    store = opened(path)
    append(store, REPLY, topic="t/one")
    append(store, REPLY, topic="t/two")
    append(store, DEPLOY)
    assert [(row.stream, row.topic) for row in take(store, held=frozenset({"t/one", "evt/deploy"}))] == [
        ("res", "t/two")
    ]


def test_a_repeated_key_keeps_one_row_even_after_delivery_and_restart(path: Path) -> None:
    store = opened(path)
    assert append(store, DEPLOY, key="d1:CONFIRMED") == 1
    settle(store, take(store))
    store.close()
    store = opened(path)
    assert append(store, DEPLOY, key="d1:CONFIRMED") == 0
    assert append(store, DEPLOY, key="d2:CONFIRMED") == 2
    assert append(store, AUDIT, key="d1:CONFIRMED") == 1, "keys are per stream"


def test_when_full_the_oldest_of_the_lowest_class_above_its_floor_goes(path: Path) -> None:
    store = opened(path, OutboxConfig(size_bytes_max=MIB, floors_percent=(25, 10, 30, 25)))
    for _ in range(700):
        append(store, SAMPLES, fill="x" * 900)
    before = store.stats().rows[3]
    for number in range(450):
        assert append(store, DEPLOY, fill="x" * 900, n=number) == number + 1
    stats = store.stats()
    assert stats.rows[0] == 450, "the important class pushed the other back"
    assert before > stats.rows[3]
    assert stats.bytes[3] >= MIB * 3 // 4 * 25 // 100 - 1100, "and not below its floor"
    ((stream, first, last, reason),) = gaps(store)
    assert (stream, first, reason) == ("tel/infer", 1, "full")
    assert last == 700 - stats.rows[3]
    assert dict(stats.lost) == {"full": last}


def test_a_class_at_its_floor_is_not_pushed_out_by_a_lower_one(path: Path) -> None:
    store = opened(path, OutboxConfig(size_bytes_max=256 * KIB, floors_percent=(25, 10, 30, 25)))
    for _ in range(10):
        append(store, DEPLOY, fill="x" * 2000)
    for _ in range(400):
        append(store, SAMPLES, fill="x" * 2000)
    assert store.stats().rows[0] == 10


def test_rows_in_flight_are_not_evicted(path: Path) -> None:
    store = opened(path, OutboxConfig(size_bytes_max=256 * KIB))
    for _ in range(20):
        append(store, HEALTH, fill="x" * 2000)
    taken = take(store, 4)
    for _ in range(200):
        append(store, HEALTH, fill="x" * 2000)
    settle(store, taken)
    assert store.stats().delivered == 4
    assert all(first > 4 for _, first, _, _ in gaps(store))


@settings(max_examples=25, deadline=None)
@given(st.lists(st.tuples(st.sampled_from([DEPLOY, HEALTH, METRICS, SAMPLES]), st.integers(0, 15_000)), max_size=120))
def test_the_file_with_its_log_never_exceeds_the_cap(
    tmp_path_factory: pytest.TempPathFactory, messages: list[tuple[StreamSpec, int]]
) -> None:
    path = tmp_path_factory.mktemp("cap") / "outbox.db"
    config = OutboxConfig(size_bytes_max=256 * KIB)
    store = opened(path, config)
    for spec, size in messages:
        append(store, spec, fill="x" * size)
        assert store.stats().file_bytes <= config.size_bytes_max
    assert {file.name for file in path.parent.iterdir()} <= {"outbox.db", "outbox.db-wal"}


def test_a_cap_lowered_by_configuration_is_obeyed_at_the_next_start(path: Path) -> None:
    store = opened(path, OutboxConfig(size_bytes_max=2 * MIB))
    for _ in range(500):
        append(store, METRICS, fill="x" * 2000)
    store.close()
    store = opened(path, OutboxConfig(size_bytes_max=256 * KIB))
    assert store.stats().file_bytes <= 256 * KIB
    assert store.stats().rows[2] > 0


def test_an_oversized_message_is_dropped_with_a_gap(path: Path) -> None:
    store = opened(path)
    assert append(store, METRICS, fill="x" * 100_000) == -1
    assert append(store, METRICS) == 2
    assert gaps(store) == [("tel/metrics", 1, 1, "too_large")]


def test_a_message_refused_too_often_is_dropped_with_a_gap(path: Path) -> None:
    store = opened(path)
    append(store, DEPLOY)
    append(store, DEPLOY)
    for attempt in range(3):
        row = take(store, 1)[0]
        store.begin(durable=False)
        dropped = store.refuse(store.epoch, row.id, refusals_max=3, reason="refused")
        store.commit()
        assert (row.seq, dropped) == (1, attempt == 2)
    assert gaps(store) == [("evt/deploy", 1, 1, "refused")]
    assert [row.seq for row in take(store) if row.stream == "evt/deploy"] == [2]


def test_a_refusal_that_is_not_the_messages_fault_is_not_counted(path: Path) -> None:
    store = opened(path)
    append(store, DEPLOY)
    for _ in range(50):
        (row,) = take(store)
        store.begin(durable=False)
        assert not store.refuse(store.epoch, row.id, refusals_max=0, reason="")
        store.commit()
    assert len(take(store)) == 1


def test_a_delivered_gap_is_forgotten_and_one_in_flight_is_not_changed(path: Path) -> None:
    store = opened(path)
    append(store, METRICS, fill="x" * 100_000)
    (gap,) = take(store)
    append(store, METRICS, fill="x" * 100_000)
    settle(store, [gap])
    store.give_back(store.epoch)
    assert gaps(store) == [("tel/metrics", 2, 2, "too_large")]


def test_gap_records_stay_few(path: Path) -> None:
    store = opened(path)
    for _ in range(600):  # every other message is lost: no two gaps touch
        append(store, METRICS, fill="x" * 100_000)
        settle(store, _take_one(store))
    assert store.stats().gaps <= 256
    assert {number for _, first, last, _ in gaps(store) for number in range(first, last + 1, 2)} >= set(
        range(1, 1200, 2)
    )


def _take_one(store: OutboxStore) -> list[Row]:
    append(store, METRICS)
    return take(store, 1, held=frozenset({GAP_TOPIC}))


def test_ids_of_a_replaced_file_delete_nothing_in_the_new_one(path: Path) -> None:
    store = opened(path)
    append(store, DEPLOY)
    (old,) = take(store)
    store.close()
    path.unlink()
    store = OutboxStore(path, OutboxConfig(), STREAMS, boot_id="b", new_epoch=lambda: "other")
    append(store, DEPLOY)
    store.begin(durable=False)
    store.forget(old.epoch, [old.id])
    store.commit()
    assert len(take(store)) == 1


@pytest.mark.parametrize("damage", [b"this is no database" * 100, b""], ids=["garbage", "empty"])
def test_an_unreadable_file_is_set_aside_and_a_new_epoch_begins(path: Path, damage: bytes) -> None:
    store = opened(path)
    append(store, DEPLOY)
    store.close()
    path.write_bytes(damage)
    store = OutboxStore(path, OutboxConfig(), STREAMS, boot_id="boot-1", new_epoch=lambda: "second")
    assert store.epoch == "second"
    assert append(store, DEPLOY) == 1
    if damage:
        assert path.with_name("outbox.db.broken").read_bytes() == damage
        assert "unreadable" in store.stats().incidents[0]


def test_damage_while_running_starts_a_new_file_and_loses_no_later_message(path: Path) -> None:
    store = opened(path)
    for _ in range(200):
        append(store, METRICS, fill="x" * 1000)
    store.close()
    data = bytearray(path.read_bytes())
    for page in range(3, len(data) // 4096):
        data[page * 4096 : page * 4096 + 100] = b"\xff" * 100
    path.write_bytes(data)
    numbers = iter(range(2, 100))
    store = OutboxStore(path, OutboxConfig(), STREAMS, boot_id="boot-1", new_epoch=lambda: f"epoch-{next(numbers)}")
    for _ in range(300):
        try:
            append(store, METRICS, fill="x" * 1000)
            take(store)
        except sqlite3.DatabaseError as error:  # what the thread does then:
            store.rollback()
            store.repair(error)
    assert store.epoch == "epoch-2"
    assert path.with_name("outbox.db.broken").exists()
    assert append(store, METRICS) > 1


class FullDisk:
    """A connector whose databases cannot grow while ``full``."""

    def __init__(self) -> None:
        self.connection: sqlite3.Connection | None = None

    def __call__(self, path: Path) -> sqlite3.Connection:
        self.connection = connect(path)
        return self.connection

    def fill(self) -> None:
        assert self.connection is not None
        self.connection.execute("PRAGMA max_page_count=1")  # SQLite then uses the present size as the limit

    def empty(self) -> None:
        assert self.connection is not None
        self.connection.execute("PRAGMA max_page_count=1000000")


def test_a_full_disk_loses_visibly_and_the_numbers_go_on(path: Path) -> None:
    disk = FullDisk()
    store = opened(path, connector=disk)
    append(store, METRICS)
    disk.fill()
    lost = 0
    for _ in range(30):
        try:
            append(store, METRICS, fill="x" * 3000)
        except sqlite3.OperationalError:  # what the thread does then:
            store.rollback()
            store.lose(METRICS.name, 1, "disk")
            lost += 1
    assert lost > 0
    disk.empty()
    kept = [row.seq for row in take(store) if row.stream == "tel/metrics"]
    store.give_back(store.epoch)
    ((stream, first, last, reason),) = gaps(store)
    assert (stream, last - first + 1, reason) == ("tel/metrics", lost, "disk")
    assert append(store, METRICS) == last + 1
    assert sorted([*kept, *range(first, last + 1)]) == list(range(1, last + 1))


@pytest.mark.parametrize("code", [sqlite3.SQLITE_FULL, sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_IOERR])
def test_a_disk_that_denies_the_file_leaves_it_alone_and_messages_in_memory(path: Path, code: int) -> None:
    before = opened(path)
    append(before, DEPLOY, n=1)
    before.close()

    def denied(place: Path) -> sqlite3.Connection:
        if place == path:
            error = sqlite3.OperationalError("database or disk is full")
            error.sqlite_errorcode = code
            raise error
        return connect(place)

    store = opened(path, connector=denied)
    assert append(store, DEPLOY, n=2) == 1
    assert [json.loads(row.payload)["n"] for row in take(store)] == [2]
    assert "memory" in store.stats().incidents[0]
    store.close()
    again = opened(path)
    assert [json.loads(row.payload)["n"] for row in take(again)] == [1]
    assert [place.name for place in path.parent.iterdir() if "broken" in place.name] == []
    again.close()
