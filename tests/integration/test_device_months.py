"""Months in the life of a box: a real store, real metadata, and a calendar of the test's.

What runs is what the daemon runs: reconciler, journal, watcher, and the trust child's code (in this process, because
a child has the real clock). Only the engine is a fake.
"""

from __future__ import annotations

import asyncio
import random
import shutil
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any, Literal

import pytest

from agent.adapters import BundleStore, TrustRecord
from agent.config import DeployConfig
from agent.deploy.desired import Desired
from agent.deploy.journal import Journal
from agent.deploy.reconciler import Reconciler
from agent.deploy.refusals import Refusals
from agent.deploy.sideload import Sideload
from agent.deploy.watch import Watch
from agent.errors import AgentError, ExpiredError, RollbackDetectedError, UntrustedError
from agent.events import Event, EventBus
from agent.metrics import Metrics
from tests.fakes import bundles
from tests.fakes.clock import Calendar
from tests.fakes.deploy import FakeHost
from tests.fakes.device import DeviceWorld
from tests.fakes.store import StoreWorld

pytestmark = pytest.mark.integration

START = 1_795_000_000.0  # 2026-11-18
DAY = 86_400
CONFIG = DeployConfig(probation_s=1, probation_calls_min=2, probation_limit_s=60)


class Box:
    """A box that follows the stable channel of ``vision/tiny``."""

    def __init__(self, folder: Path, *, on_long_offline: Literal["continue", "stop"] = "continue") -> None:
        self.clock = Calendar(START)
        self.world = StoreWorld(folder, now=self.clock.wall)
        self.folder = folder
        self.device = DeviceWorld(folder / "state", self.world)
        self.on_long_offline: Literal["continue", "stop"] = on_long_offline
        self.slots = ["tiny"]
        self.host = FakeHost()
        self.metrics = Metrics()
        self.seen: list[dict[str, Any]] = []
        self.publish("1.0.0")

    def publish(self, version: str) -> None:
        self.world.publish(version, bundles.plain_files(weights_seed=int(version[0]), rows=64))

    @asynccontextmanager
    async def alive(self) -> AsyncIterator[None]:
        """The box is on as long as the body runs."""
        self.host = FakeHost()
        events = self.events = EventBus(self.clock)
        refusals = Refusals(events, self.clock)
        journal = Journal(self.device.state / "journal.db")
        store = BundleStore(self.device.near_puller(self.clock.wall), self.device.state, keep_versions=2)
        self.reconciler = Reconciler(
            CONFIG,
            store=store,
            host=self.host,
            journal=journal,
            events=events,
            clock=self.clock,
            state_dir=self.device.state,
            configured=[Desired(id=f"file:vision/{slot}:stable", slot=slot, team="vision") for slot in self.slots],
            poll_interval_s=0.1,  # of real time
            refusals=refusals,
        )
        self.watch = Watch(
            store=store,
            reconciler=self.reconciler,
            standing=TrustRecord(self.device.state, self.clock),
            on_long_offline=self.on_long_offline,
            poll_interval_s=0,
            events=events,
            refusals=refusals,
            clock=self.clock,
            metrics=self.metrics,
            rng=random.Random(1),
        )
        self.sideload = Sideload(self.reconciler, self.watch, refusals, events)
        with events.subscribed(lambda event: self.seen.append(event.plain())):
            await self.reconciler.open()
            self.watch.look()
            running = asyncio.ensure_future(self.reconciler.run())
            try:
                await asyncio.wait_for(self.reconciler.booted.wait(), 60)
                yield
            finally:
                running.cancel()
                await asyncio.wait({running})
                await journal.close()

    def active(self) -> str | None:
        loaded = self.host.active.get("tiny")
        return loaded.bundle.version if loaded is not None else None

    async def serves(self, version: str | None) -> None:
        """Wait until it does, for good."""
        await until(lambda: self.active() == version, f"{version} serves")
        if version is not None:
            await until(
                lambda: any(row["active"] == version and not row["trial"] for row in self.reconciler.slots()),
                f"{version} is confirmed",
            )

    async def refresh(self) -> None:
        await self.watch.refresh()

    def states(self) -> list[str]:
        return [event["data"]["state"] for event in self.seen if event["type"] == "trust.changed"]

    def refusals(self, code: str) -> list[dict[str, Any]]:
        return [event for event in self.seen if event["type"] == "bundle.refused" and event["data"]["code"] == code]

    def cut_off(self) -> None:
        self.world.root.rename(self.folder / "away")

    def connect(self) -> None:
        (self.folder / "away").rename(self.world.root)

    def stick(self, name: str) -> str:
        return str(self.world.copy(name))


async def until(condition: Callable[[], Any], what: str) -> None:
    deadline = asyncio.get_running_loop().time() + 90
    while not condition():
        assert asyncio.get_running_loop().time() < deadline, f"not in time: {what}"
        await asyncio.sleep(0.01)


async def refused(work: Any, kind: type[AgentError]) -> None:
    with pytest.raises(kind):
        await work


def test_a_box_that_is_offline_for_400_days_serves_and_comes_back(tmp_path: Path) -> None:
    box = Box(tmp_path)

    async def story() -> None:
        async with box.alive():
            await box.serves("1.0.0")
            assert box.watch.look().freshness == "fresh"
        box.publish("2.0.0")
        old_stick = box.stick("old")
        box.cut_off()
        box.clock.pass_days(8)
        async with box.alive():
            assert box.watch.look().freshness == "stale"
            box.clock.pass_days(24)
            assert box.watch.look().freshness == "long_offline"
            await box.serves("1.0.0")
            numbers = box.metrics.snapshot()
            assert {"state": "long_offline", "value": 1.0} in numbers["inferd_trust_state"]
            assert numbers["inferd_trust_age_seconds"][0]["value"] >= 31 * DAY
            # What was newer than the box once has expired: a stick is no way around the signers.
            await refused(box.sideload.take(old_stick), ExpiredError)
            assert box.active() == "1.0.0"
        box.clock.pass_days(368)
        async with box.alive():  # after a reboot
            await box.serves("1.0.0")
        assert box.states() == ["fresh", "stale", "long_offline", "long_offline"]
        box.connect()
        box.world.maintain()  # as its people did all the time
        box.publish("3.0.0")
        async with box.alive():
            await box.refresh()
            assert box.watch.look().freshness == "fresh"
            await box.serves("3.0.0")

    asyncio.run(story())


def test_policy_may_stop_a_box_that_is_offline_for_too_long(tmp_path: Path) -> None:
    box = Box(tmp_path, on_long_offline="stop")

    async def story() -> None:
        async with box.alive():
            await box.serves("1.0.0")
            box.cut_off()
            box.clock.pass_days(29)
            box.watch.look()
            await box.serves("1.0.0")
            box.clock.pass_days(2)
            box.watch.look()
            await box.serves(None)
        async with box.alive():
            await box.serves(None)
            box.connect()
            box.world.stamp()
            await box.refresh()
            await box.serves("1.0.0")

    asyncio.run(story())


def test_a_clock_in_1970_serves_updates_and_believes_no_replay(tmp_path: Path) -> None:
    box = Box(tmp_path)

    async def story() -> None:
        async with box.alive():
            await box.serves("1.0.0")
        replay = box.world.copy("replay")
        box.clock.pass_days(20)
        box.publish("2.0.0")
        box.world.stamp()
        async with box.alive():
            await box.serves("2.0.0")
        now = box.clock.wall()
        box.clock.set_wall(0.0)
        async with box.alive():
            standing = box.watch.look()
            assert (standing.clock_trusted, standing.freshness) == (False, "fresh")
            await box.serves("2.0.0")
            shutil.move(box.world.root, box.folder / "true")
            shutil.move(replay, box.world.root)
            await refused(box.refresh(), RollbackDetectedError)
            await box.serves("2.0.0")
            shutil.rmtree(box.world.root)
            shutil.move(box.folder / "true", box.world.root)
            box.clock.set_wall(now)
            box.publish("3.0.0")
            box.clock.set_wall(0.0)
            await box.serves("3.0.0")
            box.clock.set_wall(now + DAY)
            assert box.watch.look().clock_trusted
        kinds = [event["type"] for event in box.seen if event["stream"] == "clock"]
        assert kinds == ["clock.untrusted", "clock.trusted"]

    asyncio.run(story())


def test_a_clock_in_2090_activates_nothing_serves_and_heals(tmp_path: Path) -> None:
    box = Box(tmp_path)

    async def story() -> None:
        async with box.alive():
            await box.serves("1.0.0")
        box.publish("2.0.0")
        now = box.clock.wall()
        box.clock.set_wall(now + 64 * 365 * DAY)
        async with box.alive():
            assert box.watch.look().freshness == "long_offline"
            await refused(box.refresh(), ExpiredError)
            await box.serves("1.0.0")
            box.clock.set_wall(now)
            await box.refresh()
            assert box.watch.look().freshness == "fresh"
            await box.serves("2.0.0")

    asyncio.run(story())


def test_a_root_that_was_rotated_twice_over_is_followed(tmp_path: Path) -> None:
    box = Box(tmp_path)

    async def story() -> None:
        async with box.alive():
            await box.serves("1.0.0")
        box.clock.pass_days(60)
        first = box.world.rotate_root_key()
        box.clock.pass_days(60)
        box.world.rotate_root_key()
        box.world.maintain()
        box.publish("2.0.0")
        async with box.alive():
            await box.refresh()
            await box.serves("2.0.0")
            # The key that was taken out of root signs nothing any more.
            box.world.root_signers[0] = first
            box.world._publish_root(lambda root: None, [first])
            await refused(box.refresh(), UntrustedError)
            assert box.watch.look().freshness == "stale"
            await box.serves("2.0.0")

    asyncio.run(story())


def test_a_stolen_online_key_stops_updates_until_root_replaces_it(tmp_path: Path) -> None:
    box = Box(tmp_path)

    async def story() -> None:
        async with box.alive():
            await box.serves("1.0.0")
            box.world.fast_forward(4_133_980_800)  # 2101
            with suppress(ExpiredError):  # a poll may have been there before
                await box.refresh()
            await refused(box.refresh(), ExpiredError)  # it is 2101 now, and everything else has expired
            assert not box.watch.look().clock_trusted
            await box.serves("1.0.0")
        async with box.alive():
            await refused(box.refresh(), ExpiredError)
            await box.serves("1.0.0")
            box.world.rotate_online_key()
            await box.refresh()
            standing = box.watch.look()
            assert (standing.freshness, standing.clock_trusted) == ("fresh", True)
            box.clock.pass_days(0.01)
            box.publish("2.0.0")
            await box.serves("2.0.0")

    asyncio.run(story())


def test_an_older_stick_gives_bytes_for_what_the_box_already_knows(tmp_path: Path) -> None:
    box = Box(tmp_path)

    async def story() -> None:
        async with box.alive():
            await box.serves("1.0.0")
        box.publish("2.0.0")
        stick = box.stick("stick")
        box.clock.pass_days(1)
        box.world.stamp()
        shutil.rmtree(box.world.root / "blobs")
        async with box.alive():
            await box.refresh()
            box.cut_off()
            box.clock.pass_days(28)
            report = await box.sideload.take(stick)
            assert report.origin == "mirror"
            await box.serves("2.0.0")
            box.clock.pass_days(3)
            await refused(box.sideload.take(stick), ExpiredError)
            await box.serves("2.0.0")

    asyncio.run(story())


def test_a_stick_that_lacks_a_model_updates_the_others(tmp_path: Path) -> None:
    box = Box(tmp_path)
    box.slots.append("other")
    box.world.publish("1.0.0", bundles.plain_files(rows=64), name="other")

    async def story() -> None:
        async with box.alive():
            await box.serves("1.0.0")
            await until(lambda: "other" in box.host.active, "the other model serves")
        box.clock.pass_days(1)
        box.world.publish("2.0.0", bundles.plain_files(rows=64), name="other")
        box.publish("2.0.0")
        stick = Path(box.stick("stick"))
        shutil.rmtree(stick / "targets" / "models" / "vision" / "other")
        box.cut_off()
        async with box.alive():
            report = await box.sideload.take(str(stick))
            ends = {item.slot: item.code for item in report.taken}
            assert ends == {"tiny": "", "other": "bundle_not_found"}
            await box.serves("2.0.0")
            assert box.host.active["other"].bundle.version == "1.0.0"

    asyncio.run(story())


def test_a_version_that_was_fetched_while_fresh_may_start_without_the_network_for_a_week(tmp_path: Path) -> None:
    box = Box(tmp_path)
    box.publish("2.0.0")

    async def story() -> None:
        puller = box.device.near_puller(box.clock.wall)
        await puller.fetch("vision", "tiny", "2.0.0", "")
        box.cut_off()
        box.clock.pass_days(6)
        assert (await puller.fetch("vision", "tiny", "2.0.0", "")).bytes_fetched == 0
        box.clock.pass_days(2)
        with pytest.raises(AgentError) as caught:
            await puller.fetch("vision", "tiny", "2.0.0", "")
        assert caught.value.code in ("offline", "store_failed")

    asyncio.run(story())


def spoil(store: Path) -> list[tuple[Path, bytes]]:
    """Flip a bit of every chunk of a store; return what they were."""
    chunks = [(path, path.read_bytes()) for path in store.glob("blobs/sha256/*/*")]
    for path, data in chunks:
        path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    return chunks


def test_wrong_bytes_delay_a_version_and_do_not_keep_it_away(tmp_path: Path) -> None:
    box = Box(tmp_path)

    async def story() -> None:
        async with box.alive():
            await box.serves("1.0.0")
        box.publish("2.0.0")
        chunks = spoil(box.world.root)
        async with box.alive():
            await until(lambda: box.refusals("chunk_mismatch"), "the spoiled chunks are refused")
            assert box.active() == "1.0.0"
            for path, data in chunks:
                path.write_bytes(data)
            await box.serves("2.0.0")

    asyncio.run(story())


def test_a_stick_pulled_out_half_way_does_not_keep_the_box_from_the_stores_version(tmp_path: Path) -> None:
    box = Box(tmp_path)

    async def story() -> None:
        async with box.alive():
            await box.serves("1.0.0")
        box.publish("2.0.0")
        stick = Path(box.stick("stick"))
        box.cut_off()

        def pull_out(event: Event) -> None:
            if event.type == "deployment.validating":
                stick.rename(stick.with_name("gone"))

        async with box.alive():
            with box.events.subscribed(pull_out):
                report = await box.sideload.take(str(stick))
                ended = await box.reconciler.outcome(report.taken[0].deployment)
            assert (ended.state, ended.code) == ("failed", "invalid_input")
            assert box.active() == "1.0.0"
            box.connect()
            await box.serves("2.0.0")

    asyncio.run(story())


def test_a_revocation_that_was_verified_holds_although_the_box_died_before_it_took_note(tmp_path: Path) -> None:
    box = Box(tmp_path)

    async def story() -> None:
        async with box.alive():
            await box.serves("1.0.0")
        box.publish("2.0.0")
        async with box.alive():
            await box.serves("2.0.0")
        box.world.revoke("2.0.0", "wrong labels")
        await box.device.near_puller(box.clock.wall).survey([("vision", "tiny")])  # its daemon is killed meanwhile
        box.cut_off()
        for _ in range(2):
            async with box.alive():
                await box.serves("1.0.0")

    asyncio.run(story())
