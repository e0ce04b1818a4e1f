"""The reconciler under a fake clock: every wish ends in a reported final state, whatever fails on the way.

A power cut is an exception out of the journal's or the pointers' next write; the box then starts again from the
same folder with a new host, as after a reboot. The seed is in the test's name.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import sqlite3
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import pytest

from agent.config import DeployConfig
from agent.deploy.desired import Desired
from agent.deploy.journal import Journal, connect
from agent.deploy.plan import Plan
from agent.deploy.pointer import Pointer, Pointers
from agent.deploy.reconciler import Reconciler
from agent.deploy.state import FINAL, Record, State
from agent.errors import DiskFullError, OfflineError, TransientError, UntrustedError
from agent.events import EventBus
from tests.fakes.clock import FakeClock
from tests.fakes.deploy import INTERFACE, FakeHost, FakeStore, digest_of

pytestmark = pytest.mark.sim

CONFIG = DeployConfig(probation_s=2, probation_calls_min=3, probation_limit_s=20, fetch_retry_cap_s=5)


class PowerCutError(BaseException):
    """The box lost power: nothing after this line happened."""


class CutJournal(Journal):
    """Loses power at the n-th write from now, or finds no room on the disk to open the file."""

    cut_in: int | None = None
    disk_full = False

    def __init__(self, path: Path, *, device: str = "") -> None:
        super().__init__(path, device=device, connector=self._connect)

    def _connect(self, path: Path) -> sqlite3.Connection:
        if self.disk_full:
            error = sqlite3.OperationalError("database or disk is full")
            error.sqlite_errorcode = sqlite3.SQLITE_FULL
            raise error
        return connect(path)

    async def begin(self, record: Record) -> None:
        self._maybe_cut()
        await super().begin(record)

    async def save(self, record: Record, *, condemns: str = "") -> None:
        self._maybe_cut()
        await super().save(record, condemns=condemns)

    async def leave(self, slots: Iterable[str]) -> None:
        self._maybe_cut()
        await super().leave(slots)

    async def left(self, slot: str) -> None:
        self._maybe_cut()
        await super().left(slot)

    def _maybe_cut(self) -> None:
        if self.cut_in is not None:
            self.cut_in -= 1
            if self.cut_in < 0:
                raise PowerCutError


class Box:
    """A reconciler over fakes; ``start`` again after a cut."""

    def __init__(self, folder: Path, offered: list[str], *, config: DeployConfig = CONFIG) -> None:
        self.config = config
        self.folder = folder
        self.device = "one GPU"
        self.clock = FakeClock()
        self.store = FakeStore(folder, offered={"magika": offered})
        self.behaviour: dict[str, str] = {}
        self.events: list[dict[str, Any]] = []
        self.configured: tuple[Desired, ...] = ()
        self.poll_interval_s = 0.0
        self.host = FakeHost()
        self.journal = CutJournal(folder / "journal.db", device=self.device)
        self.reconciler = self._make()

    def _make(self, **more: Any) -> Reconciler:
        self.host = FakeHost(behaviour=self.behaviour)
        self.journal = CutJournal(self.folder / "journal.db", device=self.device)
        bus = EventBus(self.clock)
        self._heard = bus.subscribed(lambda event: self.events.append(event.plain()))
        self._heard.__enter__()
        return Reconciler(
            self.config,
            store=self.store,
            host=self.host,
            journal=self.journal,
            events=bus,
            clock=self.clock,
            state_dir=self.folder,
            configured=self.configured,
            poll_interval_s=self.poll_interval_s,
            **more,
        )

    async def restart(self) -> None:
        await self.journal.close()
        self.reconciler = self._make()

    async def boot(self, *, until_trial: bool = False) -> None:
        """Start as after a reboot and stop again once every pointer was tried, or what is on trial is started again."""
        await self.reconciler.open()
        running = asyncio.ensure_future(self.reconciler.run())
        async with asyncio.timeout(90):
            await self.reconciler.booted.wait()
            while until_trial and (pointer := self.pointer()) is not None and pointer.trial and not pointer.running:
                await asyncio.sleep(0)
        running.cancel()
        await asyncio.wait({running})

    async def stop(self) -> None:
        """End in order after ``boot`` and start over."""
        self.reconciler.stopped()
        await self.restart()

    async def run_until_probation(self, wish: Desired) -> None:
        """Ask, and end the process while the version is on trial, for ``stop`` or ``restart`` to say how."""
        await self.reconciler.open()
        running = asyncio.ensure_future(self.reconciler.run())
        await self.reconciler.want(wish)
        record = await self.reconciler.beyond(wish.id, (-1, -1))
        while record.state is not State.PROBATION:
            assert record.state not in FINAL, record
            record = await self.reconciler.beyond(wish.id, (record.step, record.bytes_done))
        running.cancel()
        await asyncio.wait({running})

    async def run_until_final(self, wish: Desired | None, deployment_id: str) -> Record:
        """Boot, ask, and follow to the end; a power cut passes through."""
        await self.reconciler.open()
        running = asyncio.ensure_future(self.reconciler.run())
        outcome = None
        try:
            if wish is not None:
                await self.reconciler.want(wish)
            outcome = asyncio.ensure_future(self.reconciler.outcome(deployment_id))
            done, _ = await asyncio.wait({running, outcome}, return_when=asyncio.FIRST_COMPLETED, timeout=90)
            assert done, "neither an end nor a failure"
            if outcome in done:
                return outcome.result()
            raise running.exception() or AssertionError("run() returned")
        finally:
            for task in (running, outcome):
                if task is not None:
                    task.cancel()
                    await asyncio.wait({task})

    def active(self) -> str | None:
        loaded = self.host.active.get("magika")
        return loaded.bundle.version if loaded is not None else None

    def served_at_start(self) -> str | None:
        """What answers right after a start: the version that has earned trust, or else the only one."""
        pointer = self.pointer()
        return (pointer.confirmed or pointer.active).version if pointer is not None else None

    def pointer(self) -> Pointer | None:
        return Pointers(self.folder / "active").read("magika")


def wish(version: str, wish_id: str, *, local: bool = False, force: bool = False) -> Desired:
    return Desired(id=wish_id, slot="magika", team="files", version=version, source="fleet", local=local, force=force)


async def deploy(box: Box, version: str, wish_id: str, **more: bool) -> Record:
    record = await box.run_until_final(wish(version, wish_id, **more), wish_id)
    await box.restart()
    await box.boot()
    active = box.active()
    await box.restart()
    box.host.active["after restart"] = None  # type: ignore[assignment]
    assert active == box.served_at_start()
    return record


def run(work: Any) -> Any:
    """Run a story; one that turns in circles fails instead of hanging."""
    return asyncio.run(asyncio.wait_for(work, 120))


def test_a_good_version_is_confirmed_and_survives_a_restart(tmp_path: Path) -> None:
    async def story() -> None:
        box = Box(tmp_path, ["1.0.0"])
        record = await deploy(box, "1.0.0", "a")
        assert record.state is State.CONFIRMED
        assert box.pointer().active.version == "1.0.0"
        assert not box.pointer().trial

    run(story())


@pytest.mark.parametrize(
    ("behaviour", "state"),
    [("dies", State.ROLLED_BACK), ("faulty", State.ROLLED_BACK), ("unloadable", State.FAILED)],
)
def test_a_bad_version_leaves_the_one_before_serving_and_is_not_tried_again(
    tmp_path: Path, behaviour: str, state: State
) -> None:
    async def story() -> None:
        box = Box(tmp_path, ["1.0.0", "2.0.0"])
        await deploy(box, "1.0.0", "a")
        box.behaviour["2.0.0"] = behaviour
        assert (await deploy(box, "2.0.0", "b")).state is state
        assert box.pointer().active.version == "1.0.0"
        again = await deploy(box, "2.0.0", "c")
        if state is State.ROLLED_BACK:
            assert (again.state, again.code) == (State.REJECTED, "refused_before")
        else:
            assert again.state is State.FAILED  # a load failure may have been the box's: it is tried again
        box.behaviour.clear()
        assert (await deploy(box, "2.0.0", "d", force=True)).state is State.CONFIRMED

    run(story())


def test_a_pin_whose_version_failed_is_told_of_until_something_else_is_asked_for(tmp_path: Path) -> None:
    async def story() -> None:
        box = Box(tmp_path, ["1.0.0", "2.0.0", "3.0.0"])
        await deploy(box, "1.0.0", "a")
        box.behaviour["2.0.0"] = "dies"
        pinned = replace(wish("2.0.0", "b"), source="pin")
        assert (await box.run_until_final(pinned, "b")).state is State.ROLLED_BACK
        (told,) = box.reconciler.slots()
        assert (told["wanted"], told["active"]) == ("2.0.0", "1.0.0")
        assert told["unmet"]["code"] == "probation_failed"
        assert "inferctl unpin magika" in told["unmet"]["advice"]
        await box.restart()

        async def look() -> None:  # the journal alone knows now
            while (row := box.reconciler.slots()[0])["unmet"] is None:
                await asyncio.sleep(0)
            assert row["unmet"] == told["unmet"]

        await box.reconciler.open()
        running = asyncio.ensure_future(box.reconciler.run())
        await asyncio.wait_for(look(), 20)
        running.cancel()
        await asyncio.wait({running})
        await box.restart()
        await box.run_until_final(replace(wish("3.0.0", "c"), source="pin"), "c")
        assert box.reconciler.slots()[0]["unmet"] is None
        await box.journal.close()

    run(story())


@pytest.mark.parametrize(
    ("error", "state"),
    [
        (UntrustedError("flipped byte"), State.REJECTED),
        (DiskFullError("no space"), State.FAILED),
        (OfflineError("no route"), State.CONFIRMED),
        (TransientError("503"), State.CONFIRMED),
    ],
)
def test_store_errors_end_or_wait_by_their_kind(tmp_path: Path, error: Exception, state: State) -> None:
    async def story() -> None:
        box = Box(tmp_path, ["1.0.0", "2.0.0"])
        await deploy(box, "1.0.0", "a")
        box.store.fetch_errors = [error] * 3
        record = await deploy(box, "2.0.0", "b")
        assert record.state is state
        assert box.pointer().active.version == ("2.0.0" if state is State.CONFIRMED else "1.0.0")
        if state is State.REJECTED:
            assert any(event["type"] == "bundle.refused" for event in box.events)

    run(story())


def test_rollback_needs_no_store(tmp_path: Path) -> None:
    async def story() -> None:
        box = Box(tmp_path, ["1.0.0", "2.0.0"])
        await deploy(box, "1.0.0", "a")
        await deploy(box, "2.0.0", "b")
        box.store.fetch_errors = [OfflineError("no route")] * 1000
        record = await deploy(box, "1.0.0", "c", local=True)
        assert record.state is State.CONFIRMED
        assert box.pointer().active.version == "1.0.0"
        assert box.pointer().previous.version == "2.0.0"

    run(story())


def test_a_version_that_is_damaged_on_disk_yields_to_the_one_before_at_boot(tmp_path: Path) -> None:
    async def story() -> None:
        box = Box(tmp_path, ["1.0.0", "2.0.0"])
        await deploy(box, "1.0.0", "a")
        await deploy(box, "2.0.0", "b")
        box.store.check_errors["2.0.0"] = UntrustedError("a byte differs")
        await box.boot()
        assert box.active() == "1.0.0"
        await box.journal.close()

    run(story())


def test_an_unreadable_journal_is_set_aside_and_the_box_serves(tmp_path: Path) -> None:
    async def story() -> None:
        box = Box(tmp_path, ["1.0.0"])
        await deploy(box, "1.0.0", "a")
        (tmp_path / "journal.db").write_bytes(b"not a database" * 100)
        await box.boot()
        assert box.active() == "1.0.0"
        assert any(event["type"] == "journal.broken" for event in box.events)
        assert list(tmp_path.glob("journal.db*.broken"))
        await box.journal.close()

    run(story())


def test_a_box_that_starts_with_a_full_disk_serves_and_goes_on_once_there_is_room(tmp_path: Path) -> None:
    async def story() -> None:
        box = Box(tmp_path, ["1.0.0", "2.0.0"])
        await deploy(box, "1.0.0", "a")
        box.journal.disk_full = True
        await box.boot()
        assert box.active() == "1.0.0"
        assert not list(tmp_path.glob("*.broken"))
        await box.restart()
        box.journal.disk_full = True
        await box.reconciler.open()
        with pytest.raises(DiskFullError):
            await box.reconciler.want(wish("2.0.0", "b"))
        box.journal.disk_full = False
        assert (await box.run_until_final(wish("2.0.0", "b"), "b")).state is State.CONFIRMED
        assert [record.id for record in await box.journal.history()] == ["b", "a"]
        await box.journal.close()

    run(story())


def test_a_start_on_trial_that_cannot_be_recorded_serves_the_confirmed_version(tmp_path: Path) -> None:
    async def story() -> None:
        box = Box(tmp_path, ["1.0.0", "2.0.0"])
        await deploy(box, "1.0.0", "a")
        await deploy(box, "2.0.0", "b")
        files = Pointers(tmp_path / "active")
        pointer = files.read("magika")
        assert pointer is not None
        files.write(replace(pointer, trial=True, starts_in_trial=1))
        (tmp_path / f"active/.magika.json.{os.getpid()}.tmp").mkdir()  # where the new file would be written
        await box.boot()
        assert box.active() == "1.0.0"
        found = box.pointer()
        assert found is not None
        assert (found.active.version, found.trial) == ("2.0.0", True)  # the next start with room tries it again
        await box.journal.close()

    run(story())


def test_a_fall_back_at_the_start_that_the_disk_denies_is_written_once_it_does_not(tmp_path: Path) -> None:
    async def story() -> None:
        box = Box(tmp_path, ["1.0.0", "2.0.0"])
        await deploy(box, "1.0.0", "a")
        await deploy(box, "2.0.0", "b")
        box.behaviour["2.0.0"] = "unloadable"
        await box.restart()
        obstacle = tmp_path / f"active/.magika.json.{os.getpid()}.tmp"  # where the new file would be written
        obstacle.mkdir()
        await box.reconciler.open()
        running = asyncio.ensure_future(box.reconciler.run())
        await box.reconciler.booted.wait()
        assert (box.active(), box.pointer().active.version) == ("1.0.0", "2.0.0")
        obstacle.rmdir()
        while box.pointer().active.version != "1.0.0":
            await asyncio.sleep(0)
        running.cancel()
        await asyncio.wait({running})
        await box.journal.close()

    run(story())


@pytest.mark.parametrize("damage", [b"", b"{", b"[]", b"null", b'{"slot": "other"}', b"\xff\xfe"])
def test_a_damaged_pointer_is_served_from_its_copy(tmp_path: Path, damage: bytes) -> None:
    async def story() -> None:
        box = Box(tmp_path, ["1.0.0", "2.0.0"])
        await deploy(box, "1.0.0", "a")
        await deploy(box, "2.0.0", "b")
        before = box.pointer()
        (tmp_path / "active/magika.json").write_bytes(damage)
        await box.boot()
        assert box.active() == "2.0.0"
        assert Pointers(tmp_path / "active").all() == ([before], [])
        await box.journal.close()

    run(story())


@pytest.mark.parametrize("field", ["team", "name", "version", "digest", "path"])
def test_a_pointer_and_a_copy_that_make_no_sense_are_set_aside(tmp_path: Path, field: str) -> None:
    async def story() -> None:
        box = Box(tmp_path, ["1.0.0"])
        await deploy(box, "1.0.0", "a")
        for name in ("magika.json", "magika.json.copy"):
            file = tmp_path / "active" / name
            raw = json.loads(file.read_bytes())
            raw["active"][field] = 5
            file.write_text(json.dumps(raw))
        await box.boot()
        assert box.active() is None
        assert [event["type"] for event in box.events].count("pointer.broken") == 2
        await box.journal.close()

    run(story())


def test_a_folder_in_the_place_of_a_pointer_stops_no_start_and_is_out_of_the_way(tmp_path: Path) -> None:
    async def story() -> None:
        box = Box(tmp_path, ["1.0.0", "2.0.0"])
        await deploy(box, "1.0.0", "a")
        file = tmp_path / "active/magika.json"
        file.with_name("magika.json.broken").write_bytes(b"of an earlier trouble")
        file.unlink()
        file.mkdir()
        await box.boot()
        assert box.active() == "1.0.0"
        await box.restart()
        file.with_name("magika.json.copy").unlink()
        file.with_name("magika.json.copy").mkdir()
        assert (await deploy(box, "2.0.0", "b")).state is State.CONFIRMED
        assert box.pointer().active.version == "2.0.0"
        await box.journal.close()

    run(story())


def test_a_newer_wish_ends_the_older_one(tmp_path: Path) -> None:
    async def story() -> None:
        box = Box(tmp_path, ["1.0.0", "2.0.0"])
        box.store.fetch_errors = [OfflineError("no route")] * 3
        await box.reconciler.open()
        async with asyncio.TaskGroup() as group:
            running = group.create_task(box.reconciler.run())
            await box.reconciler.want(wish("1.0.0", "a"))
            await box.reconciler.beyond("a", (0, 0))
            await box.reconciler.want(wish("2.0.0", "b"))
            first, second = await box.reconciler.outcome("a"), await box.reconciler.outcome("b")
            running.cancel()
        assert (first.state, second.state) == (State.SUPERSEDED, State.CONFIRMED)
        await box.journal.close()

    run(story())


def test_a_clock_set_back_begins_nothing_again(tmp_path: Path) -> None:
    async def story() -> None:
        box = Box(tmp_path, ["1.0.0", "2.0.0"])
        await deploy(box, "1.0.0", "a")
        box.clock.jump_wall(-400 * 86_400)
        record = await deploy(box, "2.0.0", "b")
        assert record.state is State.CONFIRMED
        await box.boot()
        begun = [event for event in box.events if event["type"] == "deployment.received"]
        assert len(begun) == 2
        await box.journal.close()

    run(story())


def test_a_newer_wish_during_a_trial_first_returns_to_what_was_confirmed(tmp_path: Path) -> None:
    async def story() -> None:
        box = Box(tmp_path, ["1.0.0", "2.0.0", "3.0.0"])
        await deploy(box, "1.0.0", "a")
        long = DeployConfig(probation_s=0, probation_calls_min=10**6, probation_limit_s=10**7)
        box.config = long  # a trial that does not end by itself
        await box.restart()
        await box.reconciler.open()
        async with asyncio.TaskGroup() as group:
            running = group.create_task(box.reconciler.run())
            await box.reconciler.want(wish("2.0.0", "b"))
            record = await box.reconciler.beyond("b", (-1, -1))
            while record.state is not State.PROBATION:
                record = await box.reconciler.beyond("b", (record.step, record.bytes_done))
            await box.reconciler.want(wish("9.9.9", "c"))
            ended, refused = await box.reconciler.outcome("b"), await box.reconciler.outcome("c")
            running.cancel()
        assert (ended.state, ended.code) == (State.ROLLED_BACK, "superseded")
        assert refused.state is State.REJECTED
        assert (box.pointer().active.version, box.pointer().trial) == ("1.0.0", False)
        box.config = CONFIG
        await box.restart()
        assert (await deploy(box, "2.0.0", "d")).state is State.CONFIRMED  # it was not its fault

    run(story())


def test_a_first_version_on_trial_that_does_not_load_again_ends_its_deployment(tmp_path: Path) -> None:
    async def story() -> None:
        box = Box(tmp_path, ["1.0.0"])
        box.journal.cut_in = 8  # in probation
        with pytest.raises((PowerCutError, BaseExceptionGroup)):
            await box.run_until_final(wish("1.0.0", "a"), "a")
        await box.restart()
        box.behaviour["1.0.0"] = "unloadable"
        record = await box.run_until_final(None, "a")
        assert record.state in FINAL
        await box.journal.close()

    run(story())


@pytest.mark.parametrize("cut_in", range(12))
def test_what_a_version_failed_at_is_its_end_wherever_the_power_goes(tmp_path: Path, cut_in: int) -> None:
    """It is remembered as bad in the write that ends its deployment: before it, that would refuse itself."""

    async def story() -> None:
        box = Box(tmp_path, ["1.0.0", "2.0.0"])
        await deploy(box, "1.0.0", "a")
        box.behaviour["2.0.0"] = "wrong"
        box.journal.cut_in = cut_in
        try:
            record = await box.run_until_final(wish("2.0.0", "b"), "b")
        except (PowerCutError, BaseExceptionGroup):
            await box.restart()
            again = None if cut_in else wish("2.0.0", "b")
            record = await box.run_until_final(again, "b")
        assert (record.state, record.code) == (State.FAILED, "selftest_failed")
        assert [reason for _, _, reason in await box.journal.all_refused()] == ["a golden output differs"]
        await box.journal.close()

    run(story())


async def on_trial(folder: Path, *, confirmed: bool) -> Box:
    """Return a box that ended without warning while 2.0.0 was on trial, after a confirmed 1.0.0 or as its first."""
    box = Box(folder, ["1.0.0", "2.0.0", "3.0.0"])
    if confirmed:
        await deploy(box, "1.0.0", "first")
    box.config = DeployConfig(probation_s=0, probation_calls_min=10**6, probation_limit_s=10**7)  # never ends by itself
    await box.restart()
    await box.run_until_probation(wish("2.0.0", "trial"))
    return box


async def boot_after(box: Box, ends: str, *, until_trial: bool = False) -> None:
    """Start after each end: ``s`` for one that was ordered, ``c`` for a crash."""
    for end in ends:
        await (box.stop() if end == "s" else box.restart())
        await box.boot(until_trial=until_trial)


@pytest.mark.parametrize("confirmed", [True, False])
@pytest.mark.parametrize("ends", ["ssssssss", "cccsssss", "scscscss"])
def test_ends_that_were_ordered_do_not_count_against_a_trial(tmp_path: Path, ends: str, confirmed: bool) -> None:
    async def story() -> None:
        box = await on_trial(tmp_path, confirmed=confirmed)
        await boot_after(box, ends, until_trial=True)
        assert confirmed or box.active() == "2.0.0"
        assert (box.pointer().running, box.pointer().starts_in_trial) == (True, ends.count("c"))
        await box.stop()
        box.config = CONFIG
        await box.restart()
        assert (await box.run_until_final(None, "trial")).state is State.CONFIRMED
        pointer = box.pointer()
        assert (pointer.trial, pointer.running, pointer.starts_in_trial) == (False, False, 0)
        await box.journal.close()

    run(story())


def test_crashes_on_trial_yield_to_the_confirmed_version(tmp_path: Path) -> None:
    async def story() -> None:
        box = await on_trial(tmp_path, confirmed=True)
        await boot_after(box, "cscscs", until_trial=True)
        assert box.pointer().trial
        await boot_after(box, "c")
        assert (box.active(), box.pointer().trial) == ("1.0.0", False)
        record = await box.run_until_final(None, "trial")
        assert record.state is State.ROLLED_BACK
        again = await deploy(box, "2.0.0", "again")
        assert again.code == "refused_before"

    run(story())


def test_crashes_before_what_is_on_trial_is_started_again_do_not_count_against_it(tmp_path: Path) -> None:
    async def story() -> None:
        box = await on_trial(tmp_path, confirmed=True)
        await boot_after(box, "cccccccc")  # the first one was in its trial
        pointer = box.pointer()
        assert (box.active(), pointer.trial, pointer.running, pointer.starts_in_trial) == ("1.0.0", True, False, 1)
        await box.journal.close()

    run(story())


async def started_again(box: Box, behaviour: str = "good") -> Record:
    """Start after a crash on trial, see the confirmed version serve, and follow the deployment to its end."""
    await boot_after(box, "c")
    assert (box.active(), box.pointer().trial) == ("1.0.0", True)
    assert [loaded.bundle.version for loaded in box.host.loaded] == ["1.0.0"], "nothing on trial before that"
    box.behaviour["2.0.0"] = behaviour
    box.config = CONFIG
    await box.restart()
    return await box.run_until_final(None, "trial")


def test_after_a_crash_on_trial_the_confirmed_version_serves_first_and_the_trial_begins_anew(tmp_path: Path) -> None:
    async def story() -> None:
        box = await on_trial(tmp_path, confirmed=True)
        record = await started_again(box)
        assert (record.state, box.active(), box.pointer().trial) == (State.CONFIRMED, "2.0.0", False)
        assert [loaded.bundle.version for loaded in box.host.loaded if not loaded.retired] == ["2.0.0"]
        await box.journal.close()

    run(story())


@pytest.mark.parametrize(
    ("behaviour", "code", "words"),
    [
        ("wrong", "boot_failed", "a golden output differs"),
        ("dies", "probation_failed", "worker death"),
        ("late", "probation_failed", "at the same time"),  # nobody knows any more what the version before took
    ],
)
def test_a_version_that_is_bad_when_its_trial_begins_anew_is_rolled_back(
    tmp_path: Path, behaviour: str, code: str, words: str
) -> None:
    async def story() -> None:
        box = await on_trial(tmp_path, confirmed=True)
        record = await started_again(box, behaviour)
        assert (record.state, record.code) == (State.ROLLED_BACK, code)
        assert words in record.message
        assert (box.active(), box.pointer().active.version, box.pointer().trial) == ("1.0.0", "1.0.0", False)
        assert [digest for _, digest, _ in await box.journal.all_refused()] == [record.digest]
        await box.journal.close()

    run(story())


@pytest.mark.parametrize(("behaviour", "code"), [("short", "overloaded"), ("unloadable", "load_failed")])
def test_a_trial_that_the_box_cannot_begin_anew_says_nothing_of_its_version(
    tmp_path: Path, behaviour: str, code: str
) -> None:
    async def story() -> None:
        box = await on_trial(tmp_path, confirmed=True)
        record = await started_again(box, behaviour)
        assert (record.state, record.code, box.active()) == (State.ROLLED_BACK, code, "1.0.0")
        assert not await box.journal.all_refused()
        await box.journal.close()

    run(story())


def test_a_version_is_not_confirmed_for_want_of_something_to_compare_its_latency_with(tmp_path: Path) -> None:
    async def story() -> None:
        box = Box(tmp_path, ["1.0.0", "2.0.0"], config=msgspec.structs.replace(CONFIG, probation_calls_min=6))
        await deploy(box, "1.0.0", "a")  # and a restart: nobody has asked 1.0.0 since
        box.behaviour["2.0.0"] = "late"
        record = await box.run_until_final(wish("2.0.0", "b"), "b")
        assert (record.state, record.code) == (State.ROLLED_BACK, "probation_failed")
        assert "at the same time" in record.message
        await box.journal.close()

    run(story())


def test_a_trial_that_another_wish_ends_does_not_begin_anew(tmp_path: Path) -> None:
    async def story() -> None:
        box = await on_trial(tmp_path, confirmed=True)
        await box.reconciler.want(wish("3.0.0", "other"))  # and the process ends before it is looked at
        box.config = CONFIG
        await box.restart()
        record = await box.run_until_final(None, "other")
        assert (record.state, box.active()) == (State.CONFIRMED, "3.0.0")
        assert "2.0.0" not in [loaded.bundle.version for loaded in box.host.loaded]
        before = await box.journal.get("trial")
        assert (before.state, before.code) == (State.ROLLED_BACK, "superseded")
        await box.journal.close()

    run(story())


def test_without_its_confirmed_version_the_one_on_trial_serves_at_once(tmp_path: Path) -> None:
    async def story() -> None:
        box = await on_trial(tmp_path, confirmed=True)
        box.store.check_errors["1.0.0"] = UntrustedError("bytes changed on disk")
        await boot_after(box, "c")
        assert (box.active(), box.pointer().trial) == ("2.0.0", True)
        box.config = CONFIG
        await box.restart()
        record = await box.run_until_final(None, "trial")
        assert (record.state, box.active()) == (State.CONFIRMED, "2.0.0")
        await box.journal.close()

    run(story())


def test_a_trial_of_which_the_journal_knows_nothing_is_over(tmp_path: Path) -> None:
    async def story() -> None:
        box = await on_trial(tmp_path, confirmed=True)
        await box.restart()
        for path in tmp_path.glob("journal.db*"):
            path.unlink()
        await box.reconciler.open()
        running = asyncio.ensure_future(box.reconciler.run())
        while box.pointer().trial:
            await asyncio.sleep(0)
        assert (box.active(), box.pointer().active.version) == ("1.0.0", "1.0.0")
        running.cancel()
        await asyncio.wait({running})
        await box.journal.close()

    run(story())


@pytest.mark.parametrize("confirmed", [True, False])
def test_a_stop_between_pointer_and_journal_does_not_begin_a_probation_anew(tmp_path: Path, confirmed: bool) -> None:
    """The pointer is what confirms: a second probation could only take back what serves, and holds up what follows."""

    async def story() -> None:
        box = await on_trial(tmp_path, confirmed=confirmed)
        Pointers(tmp_path / "active").write(replace(box.pointer(), trial=False, starts_in_trial=0, running=False))
        await box.restart()
        assert (await box.run_until_final(None, "trial")).state is State.CONFIRMED
        assert (box.active(), box.pointer().trial) == ("2.0.0", False)
        await box.journal.close()

    run(story())


def test_an_orderly_end_that_is_not_recorded_counts_like_a_crash(tmp_path: Path) -> None:
    async def story() -> None:
        box = await on_trial(tmp_path, confirmed=True)
        denied = tmp_path / f"active/.magika.json.{os.getpid()}.tmp"  # where the new file would be written
        denied.mkdir()
        box.reconciler.stopped()
        denied.rmdir()
        await boot_after(box, "c")
        assert (box.pointer().active.version, box.pointer().starts_in_trial) == ("2.0.0", 1)
        await box.journal.close()

    run(story())


def test_the_only_version_is_held_back_after_crashes_and_started_again(tmp_path: Path) -> None:
    async def story() -> None:
        box = await on_trial(tmp_path, confirmed=False)
        await boot_after(box, "cccc")
        assert box.active() is None
        assert "4 crashes on trial" in box.host.expected["magika"]
        (held,) = [event["data"] for event in box.events if event["type"] == "boot.trial_held"]
        assert (held["version"], held["retry_s"]) == ("2.0.0", 60.0)
        await boot_after(box, "c")  # it was not running: nothing to hold against it
        assert box.pointer().starts_in_trial == 4
        box.config = CONFIG
        await box.restart()
        before_s = box.clock.monotonic()
        assert (await box.run_until_final(None, "trial")).state is State.CONFIRMED
        assert box.clock.monotonic() - before_s >= 60
        assert box.active() == "2.0.0"
        await box.journal.close()

    run(story())


def test_each_further_crash_of_the_only_version_doubles_the_wait(tmp_path: Path) -> None:
    async def story() -> None:
        box = await on_trial(tmp_path, confirmed=False)
        await boot_after(box, "cccc")
        waits = []
        for _ in range(8):
            running = asyncio.ensure_future(box.reconciler.run())
            while box.active() is None:
                await asyncio.sleep(0)
            assert box.pointer().running
            running.cancel()
            await asyncio.wait({running})
            await boot_after(box, "c")
            waits.append([event["data"]["retry_s"] for event in box.events if event["type"] == "boot.trial_held"][-1])
        assert waits == [120, 240, 480, 960, 1920, 3600, 3600, 3600]
        await box.journal.close()

    run(story())


@pytest.mark.parametrize("cut_in", [None, 0, 1, 2])
def test_a_newer_wish_takes_the_place_of_a_version_that_is_held_back(tmp_path: Path, cut_in: int | None) -> None:
    async def story() -> None:
        box = await on_trial(tmp_path, confirmed=False)
        await boot_after(box, "cccc")
        box.config = CONFIG
        await box.restart()
        await box.journal.open()
        await box.journal.want(wish("3.0.0", "newer"))
        await box.restart()
        if cut_in is not None:
            box.journal.cut_in = cut_in
            with pytest.raises((PowerCutError, BaseExceptionGroup)):
                await box.run_until_final(None, "newer")
            await box.restart()
        assert (await box.run_until_final(None, "newer")).state is State.CONFIRMED
        assert box.active() == "3.0.0"
        record = await box.reconciler.find("trial")
        assert (record.state, record.code) == (State.ROLLED_BACK, "superseded")
        assert not await box.journal.refused("magika", record.digest)
        await box.journal.close()

    run(story())


def test_a_newer_version_of_the_channel_takes_the_place_of_one_that_is_held_back(tmp_path: Path) -> None:
    async def story() -> None:
        box = Box(tmp_path, ["1.0.0"])
        box.configured = (Desired(id="file", slot="magika", team="files"),)
        box.config = DeployConfig(probation_s=0, probation_calls_min=10**6, probation_limit_s=10**7)
        await box.restart()
        await box.run_until_probation(box.configured[0])
        await boot_after(box, "cccc")
        assert box.active() is None
        box.config = CONFIG
        box.store.offered["magika"].append("1.0.1")
        await box.restart()
        await box.reconciler.open()
        running = asyncio.ensure_future(box.reconciler.run())
        offered = f"file@{digest_of('magika', '1.0.1')[:12]}"
        async with asyncio.timeout(90):
            while (record := await box.reconciler.find(offered)) is None or record.state is not State.CONFIRMED:
                await asyncio.sleep(0)
        assert box.active() == "1.0.1"
        running.cancel()
        await asyncio.wait({running})
        await box.journal.close()

    run(story())


@pytest.mark.parametrize("revoked", [False, True])
def test_a_channel_that_points_to_an_older_version_is_followed_only_away_from_a_revoked_one(
    tmp_path: Path, revoked: bool
) -> None:
    async def story() -> None:
        box = Box(tmp_path, ["2.0.0"])
        box.configured = (Desired(id="file", slot="magika", team="files"),)
        await box.restart()
        await box.run_until_final(None, "file")
        box.store.offered["magika"].append("1.0.0")
        box.poll_interval_s = 1.0
        if revoked:
            box.store.revoked["2.0.0"] = "wrong"
        await box.restart()
        await box.reconciler.open()
        if revoked:
            await box.reconciler.absorb((await box.store.survey([("files", "magika")])).models)
        running = asyncio.ensure_future(box.reconciler.run())
        offered = f"file@{digest_of('magika', '1.0.0')[:12]}"
        async with asyncio.timeout(90):
            while not (await box.reconciler.find(offered) or any(e["type"] == "channel.older" for e in box.events)):
                await asyncio.sleep(0.01)
        if revoked:
            assert (await box.reconciler.outcome(offered)).state is State.CONFIRMED
        else:
            assert await box.reconciler.find(offered) is None
            await box.reconciler.want(wish("1.0.0", "back"))
            assert (await box.reconciler.outcome("back")).state is State.CONFIRMED
        assert box.active() == "1.0.0"
        running.cancel()
        await asyncio.wait({running})
        await box.journal.close()

    run(story())


def test_a_version_that_callers_would_notice_is_refused_before_it_loads_and_not_held_against(tmp_path: Path) -> None:
    async def story() -> None:
        box = Box(tmp_path, ["1.0.0", "2.0.0", "3.0.0"])
        box.store.interfaces["2.0.0"] = replace(INTERFACE, outputs={})
        await deploy(box, "1.0.0", "a")
        record = await box.run_until_final(wish("2.0.0", "b"), "b")
        assert (record.state, record.code) == (State.REJECTED, "incompatible_signature")
        assert "output 'y' is gone" in record.message
        assert [loaded.bundle.version for loaded in box.host.loaded] == ["1.0.0"]
        await box.restart()
        assert (await deploy(box, "3.0.0", "c")).state is State.CONFIRMED
        agreed = replace(wish("2.0.0", "d"), plan=Plan(allow_incompatible=True))
        assert (await box.run_until_final(agreed, "d")).state is State.CONFIRMED
        await box.restart()
        assert (await deploy(box, "3.0.0", "e", local=True)).state is State.CONFIRMED  # a rollback asks nothing
        assert box.pointer().active.version == "3.0.0"

    run(story())


def test_a_first_version_and_one_after_a_rolled_back_one_have_nothing_to_be_compared_with(tmp_path: Path) -> None:
    async def story() -> None:
        box = Box(tmp_path, ["1.0.0", "2.0.0"])
        box.store.interfaces["1.0.0"] = replace(INTERFACE, outputs={})
        box.behaviour["1.0.0"] = "dies"
        assert (await deploy(box, "1.0.0", "a")).state is State.ROLLED_BACK
        assert (await deploy(box, "2.0.0", "b")).state is State.CONFIRMED

    run(story())


@pytest.mark.parametrize("version", ["", "1.0.0"])
def test_a_confirmed_version_that_boot_could_not_load_is_loaded_later(tmp_path: Path, version: str) -> None:
    async def story() -> None:
        box = Box(tmp_path, ["1.0.0"])
        box.configured = (Desired(id="file", slot="magika", team="files", version=version),)
        await box.restart()
        await box.run_until_final(None, "file")
        box.behaviour["1.0.0"] = "unloadable"  # as when memory is short
        await box.restart()
        await box.boot()
        assert box.active() is None
        box.behaviour.clear()
        running = asyncio.ensure_future(box.reconciler.run())
        async with asyncio.timeout(90):
            while box.active() is None:
                await asyncio.sleep(0)
        running.cancel()
        await asyncio.wait({running})
        await box.journal.close()

    run(story())


def test_journal_rows_of_another_program_version_are_skipped(tmp_path: Path) -> None:
    async def story() -> None:
        box = Box(tmp_path, ["1.0.0"])
        await deploy(box, "1.0.0", "a")
        with sqlite3.connect(tmp_path / "journal.db") as database:
            database.execute('UPDATE deployment SET row = \'{"state": "unheard of"}\'')
            database.execute("INSERT INTO desired VALUES ('magika', 'pin', '{\"neither\": 1}')")
        await box.boot()
        assert box.active() == "1.0.0"
        await box.journal.close()

    run(story())


@pytest.mark.parametrize("seed", range(60))
def test_power_cuts_never_leave_the_box_without_its_confirmed_version(tmp_path: Path, seed: int) -> None:
    rng = random.Random(seed)

    async def story() -> None:
        box = Box(tmp_path, ["1.0.0", "2.0.0", "3.0.0"])
        await deploy(box, "1.0.0", "first")
        confirmed = "1.0.0"
        for round_number in range(4):
            version = rng.choice(["1.0.0", "2.0.0", "3.0.0"])
            box.behaviour.clear()
            if version != confirmed:
                box.behaviour[version] = rng.choice(["good", "good", "dies", "faulty", "unloadable"])
            box.store.fetch_errors = [OfflineError("x")] * rng.choice([0, 0, 2])
            wish_id = f"w{round_number}"
            asked: Desired | None = wish(version, wish_id, force=True)
            for _ in range(40):
                box.journal.cut_in = rng.choice([None, rng.randrange(12)])
                try:
                    record = await box.run_until_final(asked, wish_id)
                    break
                except BaseExceptionGroup as cut:
                    if cut.split(PowerCutError)[1] is not None:
                        raise
                except PowerCutError:
                    pass
                await box.restart()
                if await _known(box, wish_id):
                    asked = None
            else:
                raise AssertionError("never ended")
            assert record.state in FINAL
            assert record.step <= 64
            if record.state is State.CONFIRMED:
                confirmed = version
            pointer = box.pointer()
            assert pointer is not None
            assert pointer.active.version == confirmed, f"seed {seed}"
            assert pointer.active.digest == digest_of("magika", confirmed)
            assert not pointer.trial
            await box.restart()

    run(story())


async def _known(box: Box, wish_id: str) -> bool:
    """Whether the wish itself was durable before the cut."""
    await box.journal.open()
    wanted = await box.journal.wanted()
    await box.restart()
    return any(item.id == wish_id for item in wanted)
