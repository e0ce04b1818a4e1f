"""What is revoked, deprecated, held or offered on a medium, through reconciler and journal, with power cuts."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import pytest

from agent.deploy.ports import Collected, Mark, News
from agent.deploy.reconciler import Reconciler
from agent.deploy.revocation import OnRevoked
from agent.deploy.state import State
from agent.errors import DiskFullError, NotFoundError, PolicyError, UntrustedError
from tests.fakes.deploy import digest_of
from tests.sim.test_deployments import CONFIG, Box, PowerCutError, deploy, run, wish

pytestmark = pytest.mark.sim

SLOT = "magika"
# Fake time runs as fast as the loop turns: no wait of the reconciler's may end by itself.
PATIENT = msgspec.structs.replace(CONFIG, fetch_limit_s=1e12)
ENDLESS_TRIAL = msgspec.structs.replace(CONFIG, probation_calls_min=1_000_000_000, probation_limit_s=1e12)


class RevokingBox(Box):
    """A box whose policy on revoked versions can be chosen."""

    on_revoked: OnRevoked = "fallback"

    def _make(self) -> Reconciler:
        return super()._make(on_revoked=self.on_revoked)


def news(*, revoked: tuple[str, ...] = (), deprecated: tuple[str, ...] = ()) -> News:
    def marks(versions: tuple[str, ...]) -> tuple[Mark, ...]:
        return tuple(Mark(version=version, digest=digest_of(SLOT, version), reason="why") for version in versions)

    return News(team="files", name=SLOT, channels={}, newest=None, revoked=marks(revoked), deprecated=marks(deprecated))


@asynccontextmanager
async def alive(box: Box) -> AsyncIterator[None]:
    """The reconciler runs as long as the body does; ends like a power cut."""
    await box.reconciler.open()
    running = asyncio.ensure_future(box.reconciler.run())
    try:
        await asyncio.wait_for(box.reconciler.booted.wait(), 90)
        yield
    finally:
        running.cancel()
        await asyncio.wait({running})
        await box.restart()


async def until(condition: Callable[[], Any], *, turns: int = 20_000) -> None:
    for _ in range(turns):
        if condition():
            return
        await asyncio.sleep(0.001)
    raise AssertionError("it did not come true")


async def serving_two(folder: Path, *, on_revoked: OnRevoked = "fallback") -> RevokingBox:
    """A box that serves 2.0.0 and served 1.0.0 before."""
    box = RevokingBox(folder, ["1.0.0", "2.0.0"])
    box.on_revoked = on_revoked
    await deploy(box, "1.0.0", "a")
    await deploy(box, "2.0.0", "b")
    await box.restart()
    return box


def kinds(box: Box, kind: str) -> list[dict[str, Any]]:
    return [event for event in box.events if event["type"] == kind]


def test_a_revoked_version_yields_to_the_newest_that_served_before(tmp_path: Path) -> None:
    async def story() -> None:
        box = await serving_two(tmp_path)
        async with alive(box):
            assert [item.version for item in await box.reconciler.absorb([news(revoked=("2.0.0",))])] == ["2.0.0"]
            await until(lambda: kinds(box, "deployment.confirmed")[-1]["data"]["source"] == "revocation")
            assert await box.reconciler.absorb([news(revoked=("2.0.0",))]) == []
        box.store.offline = True
        async with alive(box):  # offline, after a reboot: the knowledge is on disk
            assert box.active() == "1.0.0"
            with pytest.raises(PolicyError, match="revoked"):
                box.reconciler.previous_version(SLOT)
            history = await box.reconciler.history()  # the wish for 2.0.0 may have begun anew already, to be refused
            record = next(record for record in history if record.source == "revocation")
            assert (record.state, record.version) == (State.CONFIRMED, "1.0.0")
            for local in (True, False):
                with pytest.raises(PolicyError, match="revoked"):
                    await box.reconciler.want(wish("2.0.0", "again", local=local, force=True))
            assert box.active() == "1.0.0"
        assert [event["data"]["measure"] for event in kinds(box, "version.revoked")] == ["fall_back"]

    run(story())


@pytest.mark.parametrize("cut", range(10))
def test_a_power_cut_on_the_way_back_does_not_bring_the_revoked_version_back(tmp_path: Path, cut: int) -> None:
    async def story() -> None:
        box = await serving_two(tmp_path)
        await box.reconciler.open()
        running = asyncio.ensure_future(box.reconciler.run())
        await asyncio.wait_for(box.reconciler.booted.wait(), 90)
        box.journal.cut_in = cut
        await box.reconciler.absorb([news(revoked=("2.0.0",))])
        await asyncio.wait({running}, timeout=0.3)
        running.cancel()
        await asyncio.wait({running})
        if not running.cancelled():
            cause = running.exception()
            assert isinstance(cause, BaseExceptionGroup)
            assert cause.subgroup(PowerCutError) is not None
        await box.restart()
        async with alive(box):
            await until(lambda: box.active() == "1.0.0")

    run(story())


def test_with_nothing_to_fall_back_to_the_slot_stops_until_a_good_version_comes(tmp_path: Path) -> None:
    async def story() -> None:
        box = RevokingBox(tmp_path, ["1.0.0"])
        await deploy(box, "1.0.0", "a")
        await box.restart()
        async with alive(box):
            await box.reconciler.absorb([news(revoked=("1.0.0",))])
            await until(lambda: box.active() is None)
            assert "revoked" in box.host.expected[SLOT]
        async with alive(box):
            await asyncio.sleep(0.02)
            assert box.active() is None
            box.store.offered[SLOT].append("2.0.0")
            await box.reconciler.want(wish("2.0.0", "b"))
            await until(lambda: box.active() == "2.0.0")

    run(story())


@pytest.mark.parametrize("lost", ["journal.db", "revoked.json"])
def test_the_loss_of_one_copy_loses_no_revocation(tmp_path: Path, lost: str) -> None:
    async def story() -> None:
        box = RevokingBox(tmp_path, ["1.0.0"])
        await deploy(box, "1.0.0", "a")
        await box.restart()
        async with alive(box):
            await box.reconciler.absorb([news(revoked=("1.0.0",))])
            await until(lambda: box.active() is None)
        (tmp_path / lost).write_bytes(b"\x00" * 4096)
        async with alive(box):
            await asyncio.sleep(0.02)
            assert box.active() is None
            assert [item.version for item in box.reconciler.revocations.all()] == ["1.0.0"]

    run(story())


@pytest.mark.parametrize(("policy", "active"), [("stop", None), ("warn", "2.0.0")])
def test_policy_may_stop_or_only_warn(tmp_path: Path, policy: OnRevoked, active: str | None) -> None:
    async def story() -> None:
        box = await serving_two(tmp_path, on_revoked=policy)
        async with alive(box):
            await box.reconciler.absorb([news(revoked=("2.0.0",))])
            await until(lambda: kinds(box, "version.revoked"))
            await until(lambda: box.active() == active)
        async with alive(box):
            await until(lambda: box.active() == active)
        assert {event["data"]["measure"] for event in kinds(box, "version.revoked")} == {policy}

    run(story())


def test_a_version_revoked_on_trial_is_rolled_back(tmp_path: Path) -> None:
    async def story() -> None:
        box = await serving_two(tmp_path)
        box.store.offered[SLOT].append("3.0.0")
        box.config = ENDLESS_TRIAL
        await box.restart()
        async with alive(box):
            await box.reconciler.want(wish("3.0.0", "c"))
            record = await box.reconciler.beyond("c", (-1, -1))
            while record.state is not State.PROBATION:
                record = await box.reconciler.beyond("c", (record.step, record.bytes_done))
            await box.reconciler.absorb([news(revoked=("3.0.0",))])
            assert (await box.reconciler.outcome("c")).state is State.ROLLED_BACK
            await until(lambda: box.active() == "2.0.0")

    run(story())


def test_a_deprecated_version_is_told_once_and_serves_on(tmp_path: Path) -> None:
    async def story() -> None:
        box = await serving_two(tmp_path)
        async with alive(box):
            for _ in range(3):
                await box.reconciler.absorb([news(deprecated=("2.0.0", "1.0.0"))])
            assert box.active() == "2.0.0"
        (event,) = kinds(box, "version.deprecated")
        assert (event["severity"], event["data"]["version"]) == ("warning", "2.0.0")

    run(story())


def test_a_held_box_serves_nothing_until_it_is_released(tmp_path: Path) -> None:
    async def story() -> None:
        box = await serving_two(tmp_path)
        async with alive(box):
            box.reconciler.hold("offline for too long")
            await until(lambda: box.active() is None)
            assert box.host.expected[SLOT] == "offline for too long"
            box.reconciler.hold("")
            await until(lambda: box.active() == "2.0.0")
        box.reconciler.hold("offline for too long")
        async with alive(box):
            await asyncio.sleep(0.02)
            assert box.active() is None

    run(story())


# Media.


def test_a_medium_gives_what_a_waiting_deployment_waits_for(tmp_path: Path) -> None:
    async def story() -> None:
        box = await serving_two(tmp_path)
        box.store.media["/usb"] = {SLOT: ["3.0.0"]}
        box.config = PATIENT
        await box.restart()
        box.store.offline = True
        async with alive(box):
            await box.reconciler.want(wish("3.0.0", "c"))
            await until(lambda: kinds(box, "deployment.fetch_wait"))
            record = await box.reconciler.offer(SLOT, "/usb")
            assert record is not None
            assert record.id == "c"
            assert (await box.reconciler.outcome("c")).state is State.CONFIRMED
            assert box.active() == "3.0.0"

    run(story())


def test_a_medium_that_is_offered_while_the_store_is_asked_is_asked_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def story() -> None:
        box = await serving_two(tmp_path)
        box.store.media["/usb"] = {SLOT: ["3.0.0"]}
        box.config = PATIENT
        await box.restart()
        box.store.offline = True
        resolve = box.store.resolve

        async def resolve_slowly(**asked: Any) -> Mark:
            if not asked.get("medium") and kinds(box, "deployment.fetch_wait"):
                await box.reconciler.offer(SLOT, "/usb")
            return await resolve(**asked)

        monkeypatch.setattr(box.store, "resolve", resolve_slowly)
        async with alive(box):
            await box.reconciler.want(wish("3.0.0", "c"))
            assert (await box.reconciler.outcome("c")).state is State.CONFIRMED

    run(story())


def test_a_bad_medium_does_not_end_a_deployment_that_waits(tmp_path: Path) -> None:
    async def story() -> None:
        box = await serving_two(tmp_path)
        box.store.media["/usb"] = {SLOT: []}
        box.config = PATIENT
        await box.restart()
        box.store.offline = True
        async with alive(box):
            await box.reconciler.want(wish("3.0.0", "c"))
            await until(lambda: kinds(box, "deployment.fetch_wait"))
            await box.reconciler.offer(SLOT, "/usb")
            await until(lambda: kinds(box, "bundle.refused"))
            assert (await box.reconciler.history())[0].state is State.FETCH_WAIT
            box.store.offered[SLOT].append("3.0.0")
            box.store.offline = False
            assert (await box.reconciler.outcome("c")).state is State.CONFIRMED

    run(story())


def test_a_medium_brings_a_channel_forward_and_what_serves_is_not_taken_again(tmp_path: Path) -> None:
    async def story() -> None:
        box = RevokingBox(tmp_path, ["1.0.0"])
        box.configured = (replace(wish("", "file:x"), source="file"),)
        box.store.media["/usb"] = {SLOT: ["1.0.0", "2.0.0"]}
        await box.restart()
        async with alive(box):
            await until(lambda: box.active() == "1.0.0")
            await until(lambda: kinds(box, "deployment.confirmed"))
            box.store.offline = True
            record = await box.reconciler.offer(SLOT, "/usb")
            assert record is not None
            assert record.medium == "/usb"
            assert (await box.reconciler.outcome(record.id)).state is State.CONFIRMED
            assert box.active() == "2.0.0"
            assert await box.reconciler.offer(SLOT, "/usb") is None
            with pytest.raises(NotFoundError):
                await box.reconciler.offer("nobody", "/usb")

    run(story())


# Room.


@pytest.mark.parametrize(("collectable", "state"), [(True, State.CONFIRMED), (False, State.FAILED)])
def test_a_full_disk_makes_room_before_it_gives_up(tmp_path: Path, collectable: bool, state: State) -> None:
    async def story() -> None:
        box = await serving_two(tmp_path)
        box.store.offered[SLOT].append("3.0.0")
        if collectable:
            box.store.collectable = [Collected(what="x", path=tmp_path / "x", size_bytes=1, reason="superseded")]
        box.store.fetch_errors = [DiskFullError("no space")]
        async with alive(box):
            await box.reconciler.want(wish("3.0.0", "c"))
            record = await box.reconciler.outcome("c")
            assert record.state is state
        if collectable:
            assert {path.name.partition("~")[0] for path in box.store.needed.paths} >= {"2.0.0"}

    run(story())


def test_a_forged_store_at_a_poll_is_a_security_event(tmp_path: Path) -> None:
    async def story() -> None:
        box = await serving_two(tmp_path)
        async with alive(box):
            box.store.fetch_errors = [UntrustedError("forged")]
            assert await box.reconciler._offered(wish("", "b"), None) is None
            assert box.active() == "2.0.0"
        (event,) = kinds(box, "bundle.refused")
        assert (event["stream"], event["data"]["code"], event["data"]["name"]) == ("security", "untrusted", SLOT)

    run(story())
