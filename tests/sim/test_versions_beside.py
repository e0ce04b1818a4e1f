"""Versions beside a default, and their removal, under a fake clock: all of it or nothing, whatever cuts in between."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import msgspec
import pytest

from agent.config import WindowConfig
from agent.deploy.desired import Desired
from agent.deploy.plan import Plan
from agent.deploy.pointer import Pointers
from agent.deploy.ports import Bundle, Mark, News
from agent.deploy.slots import slot_of
from agent.deploy.state import FINAL, State
from agent.errors import CommandError, NotFoundError, OfflineError
from tests.fakes.deploy import INTERFACE, FakeLoaded, digest_of
from tests.sim.test_canaries import in_canary
from tests.sim.test_deployments import CONFIG, Box, PowerCutError, deploy, run, wish

pytestmark = pytest.mark.sim

BESIDE = slot_of("magika", "2.0.0")


def beside(version: str = "2.0.0", **more: bool) -> Desired:
    return Desired(
        id=f"beside-{version}", slot=slot_of("magika", version), team="files", version=version, source="pin", **more
    )


async def whole(box: Box) -> None:
    """Wait until every slot with a pointer serves, or was found not to: versions beside come after the defaults."""

    async def tried() -> None:
        await box.reconciler.booted.wait()
        while any(
            slot not in box.host.active and box.host.expected.get(slot) == "it is being loaded"
            for slot in pointers(box)
        ):
            await asyncio.sleep(0)

    await asyncio.wait_for(tried(), 60)


@asynccontextmanager
async def living(box: Box) -> AsyncIterator[None]:
    """The box is on as long as the body runs, then it starts over as after a power cut."""
    await box.reconciler.open()
    running = asyncio.ensure_future(box.reconciler.run())
    try:
        await whole(box)
        yield
    finally:
        running.cancel()
        await asyncio.wait({running})
        await box.restart()


async def two_versions(folder: Path) -> Box:
    """Return a box with 1.0.0 as the default and 2.0.0 beside it."""
    box = Box(folder, ["1.0.0", "2.0.0", "3.0.0"])
    await deploy(box, "1.0.0", "first")
    record = await box.run_until_final(beside(), beside().id)
    assert record.state is State.CONFIRMED
    await box.restart()
    return box


def pointers(box: Box) -> dict[str, str]:
    found, broken = Pointers(box.folder / "active").all()
    assert not broken
    return {pointer.slot: pointer.active.version for pointer in found}


def serving(box: Box) -> dict[str, str]:
    return {slot: loaded.bundle.version for slot, loaded in box.host.active.items() if slot.startswith("magika")}


def test_a_version_beside_has_its_own_deployment_and_boots_with_the_default(tmp_path: Path) -> None:
    async def story() -> None:
        box = await two_versions(tmp_path)
        box.store.offline = True
        async with living(box):
            assert serving(box) == {"magika": "1.0.0", BESIDE: "2.0.0"}
            assert [(row["slot"], row["beside"]) for row in box.reconciler.slots()] == [
                ("magika", False),
                (BESIDE, True),
            ]
            in_use = {path.name.partition("~")[0]: roles for path, roles in box.reconciler.retention.in_use().items()}
            assert in_use == {"1.0.0": ["active"], "2.0.0": ["beside"]}

    run(story())


def test_a_bad_version_beside_leaves_the_default_alone_and_is_not_tried_as_the_default_either(tmp_path: Path) -> None:
    async def story() -> None:
        box = Box(tmp_path, ["1.0.0", "2.0.0"])
        await deploy(box, "1.0.0", "first")
        box.behaviour["2.0.0"] = "faulty"
        record = await box.run_until_final(beside(), beside().id)
        assert record.state is State.ROLLED_BACK
        assert serving(box) == {"magika": "1.0.0"}
        await box.restart()
        record = await deploy(box, "2.0.0", "second")
        assert (record.state, record.code) == (State.REJECTED, "refused_before")

    run(story())


def test_a_window_counts_also_while_the_default_is_still_loading_after_a_restart(tmp_path: Path) -> None:
    async def story() -> None:
        box = Box(tmp_path, ["1.0.0", "2.0.0"])
        await deploy(box, "1.0.0", "first")
        opens = datetime.fromtimestamp(box.clock.wall(), UTC) + timedelta(hours=12)
        window = WindowConfig(start=f"{opens:%H:%M}", end=f"{opens + timedelta(hours=1):%H:%M}", timezone="UTC")
        box.config = msgspec.structs.replace(CONFIG, windows=(window,))
        await box.restart()
        async with living(box):
            await box.reconciler.want(beside())
            while (record := await box.reconciler.find(beside().id)) is None or record.state is not waiting:
                await asyncio.sleep(0)
        restore, loads, may_load = box.host.restore, asyncio.Event(), asyncio.Event()

        async def slow(slot: str, bundle: Bundle) -> FakeLoaded:
            loads.set()
            await may_load.wait()
            return await restore(slot, bundle)

        box.host.restore = slow  # type: ignore[method-assign]
        began_s = box.clock.wall()
        await box.reconciler.open()
        running = asyncio.ensure_future(box.reconciler.run())
        await loads.wait()
        while box.clock.wall() - began_s < 3600:  # it looks at its window again and again meanwhile
            assert (await box.reconciler.find(beside().id)).state is waiting
        may_load.set()
        await box.reconciler.booted.wait()
        running.cancel()
        await asyncio.wait({running})
        await box.journal.close()

    waiting = State.WAITING_WINDOW
    run(story())


def test_a_version_on_its_way_is_cancelled_by_its_slots_name(tmp_path: Path) -> None:
    async def story() -> None:
        box = Box(tmp_path, ["1.0.0", "2.0.0"])
        await deploy(box, "1.0.0", "first")
        box.store.offline = True
        async with living(box):
            await box.reconciler.want(beside())
            record = await box.reconciler.beyond(beside().id, (-1, -1))
            while record.state is not State.FETCH_WAIT:
                record = await box.reconciler.beyond(record.id, (record.step, record.bytes_done))
            await box.reconciler.cancel(BESIDE)
            assert (await box.reconciler.outcome(record.id)).state is State.CANCELED
            assert serving(box) == {"magika": "1.0.0"}
            assert [row["slot"] for row in box.reconciler.slots()] == ["magika"]

    run(story())


def test_nothing_is_kept_beside_a_model_without_a_default(tmp_path: Path) -> None:
    async def story() -> None:
        box = Box(tmp_path, ["1.0.0", "2.0.0"])
        async with living(box):
            with pytest.raises(CommandError, match="no default version"):
                await box.reconciler.want(beside())

    run(story())


def test_only_what_was_confirmed_here_becomes_the_default_at_once(tmp_path: Path) -> None:
    async def story() -> None:
        box = await two_versions(tmp_path)
        box.store.offline = True
        async with living(box):
            assert await box.reconciler.earned_trust("magika", "2.0.0") == "files"
            with pytest.raises(NotFoundError, match="not on this box"):
                await box.reconciler.earned_trust("magika", "3.0.0")
            default = wish("2.0.0", "default", local=True)
            await box.reconciler.want(default)
            record = await box.reconciler.outcome("default")
            assert (record.state, record.message) == (State.CONFIRMED, "it was confirmed before")
            assert serving(box) == {"magika": "2.0.0", BESIDE: "2.0.0"}
        box.store.offline = False
        box.behaviour["3.0.0"] = "dies"
        await deploy(box, "3.0.0", "third")
        async with living(box):
            with pytest.raises(CommandError, match=r"failed here: 1 worker death.*--force"):
                await box.reconciler.earned_trust("magika", "3.0.0")

    run(story())


def test_a_version_confirmed_with_a_former_device_is_no_default_at_once_unless_it_was_started_with_this_one(
    tmp_path: Path,
) -> None:
    async def story() -> None:
        box = Box(tmp_path, ["1.0.0", "2.0.0", "3.0.0"])
        for version in ("1.0.0", "2.0.0"):
            await deploy(box, version, version)
        box.device = "the GPU is gone"
        await box.restart()
        await deploy(box, "3.0.0", "3.0.0")
        async with living(box):
            assert await box.reconciler.earned_trust("magika", "2.0.0") == "files"  # it was what the start brought up
            with pytest.raises(CommandError, match=r"confirmed with other hardware.*inferctl deploy magika@1\.0\.0"):
                await box.reconciler.earned_trust("magika", "1.0.0")
        box.device = "one GPU"
        await box.restart()
        async with living(box):
            assert await box.reconciler.earned_trust("magika", "1.0.0") == "files"

    run(story())


def test_a_version_beside_that_was_never_loaded_with_this_device_is_no_default_at_once(tmp_path: Path) -> None:
    async def story() -> None:
        box = await two_versions(tmp_path)
        box.device = "the GPU is gone"
        box.behaviour["2.0.0"] = "crowded"  # not ready as long as another is loaded
        await box.restart()
        async with living(box):
            with pytest.raises(CommandError, match="confirmed with other hardware"):
                await box.reconciler.earned_trust("magika", "2.0.0")
            box.behaviour.clear()
            assert await box.reconciler.earned_trust("magika", "2.0.0") == "files"

    run(story())


def test_a_default_that_callers_would_notice_needs_their_word_and_the_way_back_does_not(tmp_path: Path) -> None:
    async def story() -> None:
        box = Box(tmp_path, ["1.0.0", "2.0.0"])
        box.store.interfaces["2.0.0"] = replace(INTERFACE, outputs={})
        await deploy(box, "1.0.0", "first")
        assert (await box.run_until_final(beside(), beside().id)).state is State.CONFIRMED
        await box.restart()
        default = wish("2.0.0", "default", local=True)
        record = await box.run_until_final(default, "default")
        assert (record.state, record.code) == (State.REJECTED, "incompatible_signature")
        assert serving(box) == {"magika": "1.0.0", BESIDE: "2.0.0"}
        await box.restart()
        agreed = replace(default, id="agreed", plan=Plan(allow_incompatible=True))
        assert (await box.run_until_final(agreed, "agreed")).state is State.CONFIRMED
        await box.restart()
        back = await box.run_until_final(wish("1.0.0", "back", local=True), "back")
        assert back.state is State.CONFIRMED

    run(story())


def test_a_revoked_version_beside_stops_and_nothing_takes_its_place(tmp_path: Path) -> None:
    async def story() -> None:
        box = await two_versions(tmp_path)
        mark = Mark(version="2.0.0", digest=digest_of("magika", "2.0.0"), reason="leaks")
        news = News(team="files", name="magika", channels={}, newest=None, revoked=(mark,), deprecated=())
        async with living(box):
            await box.reconciler.absorb([news])
            while BESIDE in box.host.active:
                await asyncio.sleep(0.001)
            assert serving(box) == {"magika": "1.0.0"}
            assert "revoked" in box.host.expected[BESIDE]
        async with living(box):
            assert serving(box) == {"magika": "1.0.0"}

    run(story())


@pytest.mark.parametrize("when", [State.FETCH_WAIT, State.LOADING, State.PROBATION, State.CONFIRMED])
@pytest.mark.parametrize("cut", [False, True])
def test_a_removal_ends_what_is_under_way_and_holds_it_against_nobody(tmp_path: Path, when: State, cut: bool) -> None:
    async def story() -> None:
        box = Box(tmp_path, ["1.0.0", "2.0.0"])
        await deploy(box, "1.0.0", "first")
        box.store.offline = when is State.FETCH_WAIT
        async with living(box):
            await box.reconciler.want(beside())
            record = await box.reconciler.beyond(beside().id, (-1, -1))
            while record.state is not when:
                assert record.state not in FINAL
                record = await box.reconciler.beyond(record.id, (record.step, record.bytes_done))
            slots = await box.reconciler.remove("magika", "2.0.0")
            assert slots == [BESIDE]
            with pytest.raises(CommandError, match="is being removed"):
                await box.reconciler.want(beside())
            if not cut:
                await box.reconciler.removed(slots)
        async with living(box):
            await box.reconciler.removed([BESIDE])
            record = await box.reconciler.outcome(beside().id)
            assert record.state in {State.SUPERSEDED, State.ROLLED_BACK, State.CONFIRMED}
            assert await box.reconciler.quarantine() == []
            assert serving(box) == {"magika": "1.0.0"}
            assert [row["slot"] for row in box.reconciler.slots()] == ["magika"]
        assert pointers(box) == {"magika": "1.0.0"}
        # It may come back at any time.
        box.store.offline = False
        again = await box.run_until_final(replace(beside(), id="again"), "again")
        assert again.state is State.CONFIRMED

    run(story())


def test_a_model_goes_while_its_candidate_has_a_share(tmp_path: Path) -> None:
    async def story() -> None:
        box = Box(tmp_path, ["1.0.0", "2.0.0"])

        async def act() -> None:
            await box.reconciler.removed(await box.reconciler.remove("magika"))

        record = await in_canary(box, act)
        assert record.state in {State.SUPERSEDED, State.CANCELED, State.ROLLED_BACK}
        assert (serving(box), box.host.tried, await box.reconciler.quarantine()) == ({}, {}, [])
        assert pointers(box) == {}

    run(story())


def test_a_model_goes_as_a_whole_and_may_come_back(tmp_path: Path) -> None:
    async def story() -> None:
        box = await two_versions(tmp_path)
        async with living(box):
            with pytest.raises(CommandError, match="is the default of magika"):
                await box.reconciler.remove("magika", "1.0.0")
            slots = await box.reconciler.remove("magika")
            await box.reconciler.removed(slots)
            assert (slots, serving(box), box.host.expected) == ([BESIDE, "magika"], {}, {})
            with pytest.raises(NotFoundError):
                await box.reconciler.remove("magika")
        assert pointers(box) == {}
        record = await box.run_until_final(wish("1.0.0", "again"), "again")
        assert record.state is State.CONFIRMED

    run(story())


@pytest.mark.parametrize("writes", range(4))
def test_a_cut_at_each_write_of_a_removal_leaves_all_of_it_or_nothing(tmp_path: Path, writes: int) -> None:
    async def story() -> None:
        box = await two_versions(tmp_path)
        box.store.fetch_errors = [OfflineError("x")] * 50  # nothing is fetched again on the way
        await box.reconciler.open()
        running = asyncio.ensure_future(box.reconciler.run())
        await whole(box)
        box.journal.cut_in = writes
        cut = False
        try:
            slots = await box.reconciler.remove("magika")
            gone = asyncio.ensure_future(box.reconciler.removed(slots))
            await asyncio.wait({running, gone}, return_when=asyncio.FIRST_COMPLETED, timeout=60)
            cut = not gone.done()
            gone.cancel()
        except PowerCutError:
            cut = True
        running.cancel()
        await asyncio.wait({running})
        assert cut == (writes < 3), "one write that says so, and one for each slot that is gone"
        await box.restart()
        async with living(box):
            await box.reconciler.removed([BESIDE, "magika"])
            assert serving(box) == ({"magika": "1.0.0", BESIDE: "2.0.0"} if writes == 0 else {})
        assert bool(pointers(box)) == (writes == 0)

    run(story())


def test_a_model_that_is_wanted_again_comes_back_once_its_removal_is_finished(tmp_path: Path) -> None:
    async def story() -> None:
        box = Box(tmp_path, ["1.0.0"])
        await deploy(box, "1.0.0", "first")
        await box.journal.open()
        await box.journal.leave(["magika"])  # a cut came in between, and the configuration names it again
        box.configured = (Desired(id="file", slot="magika", team="files", version="1.0.0"),)
        await box.restart()
        async with living(box):
            record = await asyncio.wait_for(box.reconciler.outcome("file"), 90)
            assert record.state is State.CONFIRMED
            assert serving(box) == {"magika": "1.0.0"}

    run(story())
