"""What the journal keeps of a box's deployments, however many there were."""

from __future__ import annotations

import asyncio
import json
import sqlite3
from collections.abc import Awaitable, Callable
from pathlib import Path

from agent.deploy.journal import Journal
from agent.deploy.plan import Plan
from agent.deploy.state import Record, State


def _record(name: str, slot: str, state: State, plan: Plan | None = None) -> Record:
    return Record(id=name, slot=slot, team="files", wanted="1.0.0", state=state, plan=plan or Plan())


def test_the_newest_deployment_of_a_slot_outlives_any_number_of_other_slots(tmp_path: Path) -> None:
    async def story() -> None:
        journal = Journal(tmp_path / "journal.db")
        await journal.open()
        await journal.begin(_record("older", "quiet", State.CONFIRMED))
        await journal.begin(_record("waits", "quiet", State.FETCH_WAIT))
        await journal.begin(_record("prepared", "quiet", State.PREPARED, Plan(stage_only=True)))
        for number in range(250):
            await journal.begin(_record(f"busy-{number}", "busy", State.REJECTED))
        latest = await journal.latest("quiet")
        assert latest is not None
        assert (latest.id, latest.state) == ("waits", State.FETCH_WAIT)
        assert [record.id for record in await journal.unfinished()] == ["waits"]
        await journal.save(_record("waits", "quiet", State.CONFIRMED))
        kept = {record.id: record.state for record in await journal.history(limit=1000)}
        assert kept.pop("waits") is State.CONFIRMED
        assert kept.pop("prepared") is State.PREPARED
        assert len(kept) == 200
        assert "older" not in kept
        await journal.close()

    asyncio.run(story())


def test_what_failed_with_other_hardware_driver_or_agent_may_be_tried_again(tmp_path: Path) -> None:
    async def life(device: str, story: Callable[[Journal], Awaitable[None]]) -> None:
        journal = Journal(tmp_path / "journal.db", device=device)
        await journal.open()
        await story(journal)
        await journal.close()

    async def fails(journal: Journal) -> None:
        await journal.refuse("magika", "d" * 64, "wrong answers")

    async def is_refused(journal: Journal) -> None:
        assert await journal.refused("magika", "d" * 64) == "wrong answers"
        assert await journal.all_refused() == [("magika", "d" * 64, "wrong answers")]

    async def is_not_refused(journal: Journal) -> None:
        assert not await journal.refused("magika", "d" * 64)
        assert not await journal.all_refused()

    async def is_forgiven(journal: Journal) -> None:
        await journal.forgive("magika", "d" * 64)

    async def stories() -> None:
        await life("driver 1", fails)
        await life("driver 2", is_not_refused)
        await life("driver 1", is_refused)
        await life("driver 2", is_forgiven)
        await life("driver 1", is_not_refused)

    asyncio.run(stories())


def test_what_failed_before_devices_were_told_apart_stays_refused_until_it_is_forgiven(tmp_path: Path) -> None:
    async def story() -> None:
        old = sqlite3.connect(tmp_path / "journal.db")
        old.execute("CREATE TABLE refused (slot TEXT, digest TEXT, reason TEXT NOT NULL, PRIMARY KEY (slot, digest))")
        old.execute("INSERT INTO refused VALUES ('magika', 'd', 'wrong answers')")
        old.commit()
        old.close()
        for _ in range(2):
            journal = Journal(tmp_path / "journal.db", device="driver 1")
            assert not await journal.open()
            assert await journal.all_refused() == [("magika", "d", "wrong answers")]
            await journal.close()
        journal = Journal(tmp_path / "journal.db", device="driver 2")
        await journal.open()
        await journal.forgive("magika", "d")
        assert not await journal.refused("magika", "d")
        await journal.close()

    asyncio.run(story())


def test_what_served_with_another_device_has_served_but_not_with_this_one(tmp_path: Path) -> None:
    async def story() -> None:
        for device in ("driver 1", "driver 2"):
            journal = Journal(tmp_path / "journal.db", device=device)
            await journal.open()
            await journal.note_served("magika", device)
            assert await journal.served("magika") == {device}
            await journal.close()
        journal = Journal(tmp_path / "journal.db", device="driver 3")
        await journal.open()
        assert not await journal.served("magika")
        assert await journal.ever_served("magika") == {"driver 1", "driver 2"}
        assert not await journal.ever_served("detector")
        await journal.close()

    asyncio.run(story())


def test_what_served_before_devices_were_told_apart_counts_on_any(tmp_path: Path) -> None:
    async def story() -> None:
        old = sqlite3.connect(tmp_path / "journal.db")
        old.execute("CREATE TABLE served (slot TEXT, digest TEXT, PRIMARY KEY (slot, digest))")
        old.execute("INSERT INTO served VALUES ('magika', 'd')")
        old.execute("CREATE TABLE refused (slot TEXT, digest TEXT, reason TEXT NOT NULL, PRIMARY KEY (slot, digest))")
        old.execute("INSERT INTO refused VALUES ('magika', 'e', 'wrong answers')")
        old.commit()
        old.close()
        for device in ("driver 1", "driver 1", "driver 2"):
            journal = Journal(tmp_path / "journal.db", device=device)
            assert not await journal.open()
            assert await journal.served("magika") == await journal.ever_served("magika") == {"d"}
            assert await journal.all_refused() == [("magika", "e", "wrong answers")]
            await journal.close()

    asyncio.run(story())


def test_what_served_while_an_older_program_ran_again_counts_on_any_device_too(tmp_path: Path) -> None:
    async def story() -> None:
        journal = Journal(tmp_path / "journal.db", device="driver 1")
        await journal.open()
        await journal.note_served("magika", "d")
        await journal.close()
        older = sqlite3.connect(tmp_path / "journal.db")
        older.execute("CREATE TABLE IF NOT EXISTS served (slot TEXT, digest TEXT, PRIMARY KEY (slot, digest))")
        older.executemany("INSERT INTO served VALUES ('magika', ?)", [("d",), ("e",)])
        older.commit()
        older.close()
        journal = Journal(tmp_path / "journal.db", device="driver 2")
        assert not await journal.open()
        assert await journal.served("magika") == {"d", "e"}
        await journal.close()

    asyncio.run(story())


def test_a_deployment_of_a_journal_that_knew_no_attempts_boots_or_clocks_is_read(tmp_path: Path) -> None:
    new = {"attempts", "boot_id", "clock_quality", "offline_s"}
    row = {name: value for name, value in _record("older", "m", State.FETCH_WAIT).plain().items() if name not in new}

    async def story() -> None:
        journal = Journal(tmp_path / "journal.db")
        await journal.open()
        await journal.begin(_record("older", "m", State.RECEIVED))
        with sqlite3.connect(tmp_path / "journal.db") as database:
            database.execute("UPDATE deployment SET row = ?", (json.dumps(row),))
        assert await journal.get("older") == _record("older", "m", State.FETCH_WAIT)
        await journal.close()

    asyncio.run(story())
