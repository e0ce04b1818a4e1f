"""Canaries under a fake clock: shares grow by evidence, and whatever happens, what served goes on serving."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import replace
from pathlib import Path

import msgspec
import pytest

from agent.deploy.desired import Desired
from agent.deploy.plan import Plan
from agent.deploy.rollout import Rollout
from agent.deploy.state import FINAL, Record, State
from tests.sim.test_deployments import CONFIG, Box, PowerCutError, deploy, run, wish

pytestmark = pytest.mark.sim

CANARY = Rollout(canary=(5.0, 25.0, 50.0), step_s=10, calls_min=4, limit_s=100)
SHADOW = Rollout(canary=(), shadow=20, step_s=10, calls_min=4, limit_s=100)


def asked(version: str, wish_id: str, rollout: Rollout = CANARY) -> Desired:
    return replace(wish(version, wish_id), plan=Plan(rollout=rollout))


async def tried(box: Box, rollout: Rollout = CANARY) -> Record:
    """Deploy 2.0.0 after a confirmed 1.0.0."""
    await deploy(box, "1.0.0", "a")
    return await box.run_until_final(asked("2.0.0", "b", rollout), "b")


def states(box: Box) -> list[str]:
    return [event["type"].removeprefix("deployment.") for event in box.events if event["data"].get("id") == "b"]


async def in_canary(box: Box, act: Callable[[], Awaitable[object]], *, percent: float = 5.0) -> Record:
    """Do something while 2.0.0 has its share, and return how its deployment ended."""
    await deploy(box, "1.0.0", "a")
    await box.reconciler.open()
    async with asyncio.TaskGroup() as group:
        running = group.create_task(box.reconciler.run())
        await box.reconciler.booted.wait()
        await box.reconciler.want(asked("2.0.0", "b", replace(CANARY, step_s=1000, limit_s=5000)))
        record = await box.reconciler.beyond("b", (-1, -1))
        while record.state is not State.CANARY or record.percent != percent:
            assert record.state not in FINAL, record
            record = await box.reconciler.beyond("b", (record.step, record.bytes_done))
        await act()
        record = await box.reconciler.outcome("b")
        running.cancel()
    return record


def test_a_slot_tells_its_candidate_and_the_share_it_has(tmp_path: Path) -> None:
    async def story() -> None:
        box = Box(tmp_path, ["1.0.0", "2.0.0"])
        told: list[object] = []

        async def look_and_end() -> None:
            told.extend(row["candidate"] for row in box.reconciler.slots())
            await box.reconciler.cancel("magika", source="fleet")

        await in_canary(box, look_and_end, percent=25.0)
        told.extend(row["candidate"] for row in box.reconciler.slots())
        assert told == [{"deployment": "b", "version": "2.0.0", "percent": 25.0}, None]
        await box.journal.close()

    run(story())


def test_each_share_is_held_until_the_next_then_the_version_goes_on_trial(tmp_path: Path) -> None:
    async def story() -> None:
        box = Box(tmp_path, ["1.0.0", "2.0.0"])
        record = await tried(box)
        assert record.state is State.CONFIRMED
        assert [share for _, share, _ in box.host.shares] == [5.0, 25.0, 50.0]
        assert states(box)[-6:] == ["canary", "canary", "canary", "cutover", "probation", "confirmed"]
        assert [found["percent"] for found in record.evidence] == [5.0, 25.0, 50.0, 100.0]
        assert all(found["elapsed_s"] >= 10 for found in record.evidence[:3])
        assert "good answers" in record.evidence[0]["verdict"]
        assert not box.host.tried
        assert box.pointer().active.version == "2.0.0"
        await box.journal.close()

    run(story())


@pytest.mark.parametrize("behaviour", ["dies", "faulty"])
def test_a_bad_candidate_goes_with_its_reason_and_is_remembered(tmp_path: Path, behaviour: str) -> None:
    async def story() -> None:
        box = Box(tmp_path, ["1.0.0", "2.0.0"])
        await deploy(box, "1.0.0", "a")
        before = box.pointer()
        box.behaviour["2.0.0"] = behaviour
        record = await box.run_until_final(asked("2.0.0", "b"), "b")
        assert (record.state, record.code) == (State.ROLLED_BACK, "canary_failed")
        assert record.evidence[-1]["verdict"] == record.message
        assert box.active() == "1.0.0"
        assert box.pointer() == before, "the pointer was never touched"
        assert not box.host.tried
        assert next(loaded for loaded in box.host.loaded if loaded.bundle.version == "2.0.0").retired
        assert (await box.run_until_final(asked("2.0.0", "c"), "c")).code == "refused_before"
        await box.journal.close()

    run(story())


def test_without_enough_comparisons_a_version_is_given_up_but_not_held_to_blame(tmp_path: Path) -> None:
    async def story() -> None:
        box = Box(tmp_path, ["1.0.0", "2.0.0"])
        record = await tried(box, SHADOW)
        assert (record.state, record.code) == (State.ROLLED_BACK, "canary_undecided")
        assert "0 of 4 comparisons" in record.message
        assert box.host.shares == [("2.0.0", 0.0, 20)]
        assert (await deploy(box, "2.0.0", "c")).state is State.CONFIRMED
        await box.journal.close()

    run(story())


def test_where_memory_holds_one_version_only_there_is_no_canary(tmp_path: Path) -> None:
    async def story() -> None:
        box = Box(tmp_path, ["1.0.0", "2.0.0"])
        await deploy(box, "1.0.0", "a")
        box.behaviour["1.0.0"] = "crowded"
        record = await box.run_until_final(asked("2.0.0", "b"), "b")
        assert (record.state, record.code) == (State.FAILED, "canary_impossible")
        assert not box.host.shares
        assert (await deploy(box, "2.0.0", "c")).state is State.CONFIRMED
        await box.journal.close()

    run(story())


def test_the_first_version_of_a_model_and_a_rollback_meet_everybody_at_once(tmp_path: Path) -> None:
    async def story() -> None:
        box = Box(tmp_path, ["1.0.0", "2.0.0"])
        record = await box.run_until_final(asked("1.0.0", "a"), "a")
        assert record.state is State.CONFIRMED
        assert not box.host.shares
        await box.restart()
        await deploy(box, "2.0.0", "b")
        back = replace(asked("1.0.0", "c"), local=True)
        assert (await box.run_until_final(back, "c")).state is State.CONFIRMED
        assert not box.host.shares
        await box.journal.close()

    run(story())


def test_the_configuration_gives_every_version_its_canary(tmp_path: Path) -> None:
    async def story() -> None:
        config = msgspec.structs.replace(CONFIG, canary=(10.0,), canary_s=5.0, canary_calls_min=2)
        box = Box(tmp_path, ["1.0.0", "2.0.0"], config=config)
        await deploy(box, "1.0.0", "a")
        assert (await box.run_until_final(wish("2.0.0", "b"), "b")).state is State.CONFIRMED
        assert box.host.shares == [("2.0.0", 10.0, 0.0)]
        await box.restart()
        at_once = asked("1.0.0", "c", Rollout(canary=()))
        assert (await box.run_until_final(at_once, "c")).state is State.CONFIRMED
        assert not box.host.shares
        await box.journal.close()

    run(story())


def test_another_wish_ends_a_canary(tmp_path: Path) -> None:
    async def story() -> None:
        box = Box(tmp_path, ["1.0.0", "2.0.0", "3.0.0"])
        record = await in_canary(box, lambda: box.reconciler.want(wish("3.0.0", "c")))
        assert record.state is State.SUPERSEDED
        assert record.evidence[-1]["verdict"] == "something else was asked for"
        assert not box.host.tried
        assert (await deploy(box, "2.0.0", "d")).state is State.CONFIRMED
        await box.journal.close()

    run(story())


def test_a_cancel_ends_a_canary(tmp_path: Path) -> None:
    async def story() -> None:
        box = Box(tmp_path, ["1.0.0", "2.0.0"])
        record = await in_canary(box, lambda: box.reconciler.cancel("magika"))
        assert record.state in FINAL - {State.CONFIRMED, State.ROLLED_BACK}
        assert box.active() == "1.0.0"
        assert not box.host.tried
        await box.journal.close()

    run(story())


def test_a_rollback_ends_a_canary_and_leaves_what_serves(tmp_path: Path) -> None:
    async def story() -> None:
        box = Box(tmp_path, ["1.0.0", "2.0.0"])

        async def roll_back() -> None:
            team, version = box.reconciler.previous_version("magika")
            assert version == "1.0.0", "what serves beside the candidate"
            back = Desired(id="back", slot="magika", team=team, version=version, source="pin", local=True)
            box.store.fetch_errors = [AssertionError("no network is needed")]
            await box.reconciler.want(back)
            assert (await box.reconciler.outcome("back")).state is State.CONFIRMED

        record = await in_canary(box, roll_back)
        assert record.state is State.SUPERSEDED
        assert box.active() == "1.0.0"
        assert not box.host.tried
        await box.journal.close()

    run(story())


def test_a_restart_takes_up_the_share_that_was_held(tmp_path: Path) -> None:
    async def story() -> None:
        box = Box(tmp_path, ["1.0.0", "2.0.0"])

        async def lose_power() -> None:
            raise PowerCutError

        with pytest.raises(BaseExceptionGroup):
            await in_canary(box, lose_power, percent=25.0)
        await box.restart()
        record = await box.run_until_final(None, "b")
        assert record.state is State.CONFIRMED
        assert [share for _, share, _ in box.host.shares] == [25.0, 50.0]
        assert [found["percent"] for found in record.evidence] == [5.0, 25.0, 50.0, 100.0]
        await box.journal.close()

    run(story())


def test_a_box_that_is_restarted_all_the_time_ends_the_deployment_without_blame(tmp_path: Path) -> None:
    async def story() -> None:
        box = Box(tmp_path, ["1.0.0", "2.0.0"])

        async def lose_power() -> None:
            raise PowerCutError

        with pytest.raises(BaseExceptionGroup):
            await in_canary(box, lose_power)
        for _ in range(20):
            await box.restart()
            record = await until_canary_or_end(box)
            if record.state in FINAL:
                break
        assert record.code == "too_many_steps"
        assert record.step <= 64
        assert (await deploy(box, "2.0.0", "c")).state is State.CONFIRMED
        await box.journal.close()

    run(story())


async def until_canary_or_end(box: Box) -> Record:
    """Start the box, and lose power once the candidate has a share."""
    await box.reconciler.open()
    running = asyncio.ensure_future(box.reconciler.run())
    before = await box.reconciler.find("b")
    assert before is not None
    record = await box.reconciler.beyond("b", (before.step, before.bytes_done))
    while record.state is not State.CANARY and record.state not in FINAL:
        record = await box.reconciler.beyond("b", (record.step, record.bytes_done))
    running.cancel()
    await asyncio.wait({running})
    return record


@pytest.mark.parametrize("cut_in", range(14))
def test_a_power_cut_at_any_write_leaves_one_servable_version_and_an_end(tmp_path: Path, cut_in: int) -> None:
    async def story() -> None:
        box = Box(tmp_path, ["1.0.0", "2.0.0"])
        await deploy(box, "1.0.0", "a")
        box.journal.cut_in = cut_in
        try:
            await box.run_until_final(asked("2.0.0", "b"), "b")
        except (PowerCutError, BaseExceptionGroup):
            await box.restart()
            await box.boot()
            assert box.active() == box.served_at_start()
            await box.restart()
        record = await box.run_until_final(None, "b")
        assert record.state is State.CONFIRMED
        assert record.step <= 64
        assert box.active() == "2.0.0"
        await box.journal.close()

    run(story())


@pytest.mark.parametrize(
    ("behaviour", "state", "code"),
    [("late", State.ROLLED_BACK, "probation_failed"), ("busy", State.CONFIRMED, "")],
)
def test_a_version_that_is_late_goes_unless_the_whole_box_is(
    tmp_path: Path, behaviour: str, state: State, code: str
) -> None:
    async def story() -> None:
        box = Box(tmp_path, ["1.0.0", "2.0.0"], config=msgspec.structs.replace(CONFIG, probation_calls_min=6))
        await box.run_until_final(wish("1.0.0", "a"), "a")
        box.behaviour["2.0.0"] = behaviour
        await box.restart()
        await box.reconciler.open()
        async with asyncio.TaskGroup() as group:
            running = group.create_task(box.reconciler.run())
            await box.reconciler.booted.wait()
            box.host.active["magika"].good = 40  # it has answered for a while
            await box.reconciler.want(wish("2.0.0", "b"))
            record = await box.reconciler.outcome("b")
            running.cancel()
        assert (record.state, record.code) == (state, code), record
        assert ("1.0.0", 0.0, 100.0) in box.host.shares, "the version before was asked the same"
        assert not box.host.tried
        if state is State.ROLLED_BACK:
            assert record.message.endswith("at the same time")
        await box.journal.close()

    run(story())
