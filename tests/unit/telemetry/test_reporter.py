"""Events and metrics on their way into the outbox, and an outbox that cannot take them."""

from __future__ import annotations

import asyncio
import json
import random
import sqlite3
import threading
from pathlib import Path
from typing import Any

import pytest

from agent.config import OutboxConfig, TelemetryConfig
from agent.events import EventBus, Stream
from agent.metrics import Metrics
from agent.telemetry.outbox import Outbox
from agent.telemetry.payloads import Stamper
from agent.telemetry.reporter import Reporter
from agent.telemetry.storage import connect
from agent.telemetry.topics import DEPLOY, METRICS
from tests.fakes.clock import FakeClock

pytestmark = pytest.mark.unit


class World:
    def __init__(self, path: Path, *, connector: Any = connect) -> None:
        self.clock = FakeClock()
        self.synchronized = False
        self.metrics = Metrics()
        self.events = EventBus(self.clock)
        self.outbox = Outbox(path, OutboxConfig(), boot_id="b", metrics=self.metrics, connector=connector)
        stamper = Stamper(self.clock, boot_id="b", synchronized=lambda: self.synchronized)
        self.reporter = Reporter(
            TelemetryConfig(metrics_interval_s=60),
            events=self.events,
            outbox=self.outbox,
            metrics=self.metrics,
            stamper=stamper,
            clock=self.clock,
            rng=random.Random(1),
            facts=lambda: {"memory": {"daemon": 1}},
        )

    async def stored(self) -> list[dict[str, Any]]:
        return [json.loads(row.payload) for row in await self.outbox.exchange(limit=100)]


def test_an_event_reaches_the_outbox_once_per_fact(tmp_path: Path) -> None:
    async def main() -> None:
        world = World(tmp_path / "o.db")
        async with world.outbox.opened():
            with world.reporter.listening():
                world.events.emit(Stream.DEPLOY, "deployment.confirmed", key="d1:7", model="m")
                world.events.emit(Stream.DEPLOY, "deployment.confirmed", key="d1:7", model="m")
            world.events.emit(Stream.DEPLOY, "unheard")
            (row,) = await world.stored()
        assert (row["st"], row["seq"], row["type"], row["data"]) == (
            "evt/deploy",
            1,
            "deployment.confirmed",
            {"model": "m"},
        )
        assert row["tq"] == "rtc"

    asyncio.run(main())


def test_metrics_are_reported_and_a_set_clock_is_told(tmp_path: Path) -> None:
    async def main() -> None:
        world = World(tmp_path / "o.db")
        world.metrics.counter("requests", "").add((), 3)
        async with world.outbox.opened():
            with world.reporter.listening():
                task = asyncio.create_task(world.reporter.run())
                rows: list[dict[str, Any]] = []

                async def until(kind: str) -> None:
                    async with asyncio.timeout(90):
                        while not any(kind in (row["st"], row.get("type")) for row in rows):
                            rows.extend(await world.stored())

                await until("tel/metrics")
                world.clock.jump_wall(3600)
                await until("clock.stepped")
                world.synchronized = True
                await until("clock.synchronized")
                task.cancel()
        snapshot = next(row for row in rows if row["st"] == "tel/metrics")
        assert snapshot["metrics"]["requests"] == [{"value": 3.0}]
        assert snapshot["memory"] == {"daemon": 1}
        stepped = next(row for row in rows if row.get("type") == "clock.stepped")
        assert stepped["data"]["step_s"] >= 3600
        assert stepped["data"]["boot"] == "b"

    asyncio.run(main())


def test_a_full_disk_raises_nothing_and_is_told_afterwards(tmp_path: Path) -> None:
    limits: list[sqlite3.Connection] = []

    def small(path: Path) -> sqlite3.Connection:
        limits.append(connect(path))
        return limits[0]

    async def main() -> None:
        world = World(tmp_path / "o.db", connector=small)
        async with world.outbox.opened():
            await world.outbox.append(METRICS, {})
            limits[0].execute("PRAGMA max_page_count=1")
            receipts = [await world.outbox.append(DEPLOY, {"fill": "x" * 3000}) for _ in range(20)]
            lost = [receipt.seq for receipt in receipts if not receipt.stored]
            assert lost
            limits[0].execute("PRAGMA max_page_count=1000000")
            assert (await world.outbox.append(DEPLOY, {})).seq == 21
            rows = await world.stored()
            assert {row["seq"] for row in rows if row["st"] == "evt/deploy" and "seq" in row} == {*range(1, 22)} - set(
                lost
            )
            gap = next(row for row in rows if "from" in row)
            assert (gap["from"], gap["to"], gap["reason"]) == (lost[0], lost[-1], "disk")

    asyncio.run(main())


def test_messages_that_overrun_the_thread_are_named(tmp_path: Path) -> None:
    stalled, go = threading.Event(), threading.Event()

    class Stalling(sqlite3.Connection):
        def execute(self, sql: str, *args: Any) -> sqlite3.Cursor:
            if sql == "COMMIT" and stalled.is_set():
                go.wait()
            return super().execute(sql, *args)

    async def main() -> None:
        world = World(
            tmp_path / "o.db",
            connector=lambda path: sqlite3.connect(path, isolation_level=None, factory=Stalling),
        )
        async with world.outbox.opened():
            stalled.set()
            for number in range(6000):
                world.outbox.post(DEPLOY, {"n": number})
            go.set()
            receipt = await world.outbox.append(DEPLOY, {})
            stats = world.outbox.stats
        missed = dict(stats.lost)["backlog"]
        assert receipt.stored
        assert missed > 1000
        assert (stats.appended + missed, receipt.seq) == (6001, 6001)

    asyncio.run(main())
