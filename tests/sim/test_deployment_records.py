"""What a deployment's record says of its own making, over restarts: attempts, boot, clock, time without the store."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from agent.config import DeployConfig
from agent.deploy.state import FINAL, Record, State
from agent.errors import OfflineError, StateError
from tests.fakes.clock import FakeClock
from tests.sim.test_deployment_waits import wish
from tests.sim.test_deployments import Box, CutJournal, PowerCutError

pytestmark = pytest.mark.sim

HOUR_S = 3600.0


class Dated(Box):
    """A box that knows its boot and how good its clock is."""

    boot_id = "boot-1"
    quality = "rtc"

    def _make(self, **more: Any) -> Any:
        return super()._make(boot_id=self.boot_id, clock_quality=lambda: self.quality, **more)

    async def reboot(self, boot_id: str, quality: str = "rtc") -> None:
        self.boot_id, self.quality = boot_id, quality
        await self.restart()


def test_fetches_are_counted_until_one_succeeds(tmp_path: Path) -> None:
    async def story() -> Record:
        box = Dated(tmp_path, ["1.0.0"])
        box.store.fetch_errors = [OfflineError("no route") for _ in range(4)]
        record = await box.run_until_final(wish("1.0.0"), "pin-1.0.0")
        told = [event["data"] for event in box.events if event["type"] == "deployment.confirmed"]
        await box.journal.close()
        assert [(data["attempts"], data["boot_id"], data["clock_quality"]) for data in told] == [
            (record.plain()["attempts"], "boot-1", "rtc")
        ]
        return record

    record = asyncio.run(asyncio.wait_for(story(), 60))
    assert record.attempts == {
        State.RECEIVED: 1,
        State.VALIDATING: 2,  # the first found no store
        State.FETCH_WAIT: 4,  # the last was answered
        State.FETCHING: 1,
        State.VERIFYING: 1,
        State.STAGED: 1,
        State.LOADING: 1,
        State.CUTOVER: 1,
        State.PROBATION: 1,
    }


def test_loads_that_power_cuts_ended_are_counted_with_the_boot_that_changed_them_last(tmp_path: Path) -> None:
    async def story() -> Record:
        box = Dated(tmp_path, ["1.0.0"])
        for life in range(3):
            await box.reboot(f"boot-{life}", "floor")
            box.journal.cut_in = 6  # all up to loading is written, cutover is not
            with pytest.raises(BaseExceptionGroup) as cut:
                await box.run_until_final(wish("1.0.0") if life == 0 else None, "pin-1.0.0")
            assert cut.group_contains(PowerCutError)
            box.journal.cut_in = None
            interrupted = await box.journal.get("pin-1.0.0")
            assert interrupted is not None
            assert (interrupted.state, interrupted.attempts[State.LOADING]) == (State.LOADING, life + 1)
            assert (interrupted.boot_id, interrupted.clock_quality) == (f"boot-{life}", "floor")
        await box.reboot("boot-3", "ntp")
        record = await box.run_until_final(None, "pin-1.0.0")
        await box.journal.close()
        return record

    record = asyncio.run(asyncio.wait_for(story(), 60))
    assert record.state is State.CONFIRMED
    assert (record.attempts[State.RECEIVED], record.attempts[State.LOADING]) == (4, 4)
    assert (record.boot_id, record.clock_quality) == ("boot-3", "ntp")


def test_a_wait_that_a_restart_finds_is_begun_again_and_its_date_keeps_its_clock(tmp_path: Path) -> None:
    async def story() -> None:
        box = Dated(tmp_path, ["1.0.0"])
        box.store.offline = True
        waiting = await left_while(box, State.FETCH_WAIT, wish("1.0.0"))
        await box.reboot("boot-2", "ntp")
        again = await left_while(box, State.FETCH_WAIT)
        assert (again.step, again.updated) == (waiting.step, waiting.updated)
        assert (again.boot_id, again.clock_quality) == ("boot-2", "rtc")
        assert again.attempts[State.FETCH_WAIT] > waiting.attempts[State.FETCH_WAIT]

    asyncio.run(asyncio.wait_for(story(), 60))


def test_a_count_that_the_disk_denies_keeps_no_trial_from_going_on(tmp_path: Path) -> None:
    class Denying(CutJournal):
        denied = False

        async def save(self, record: Record, *, condemns: str = "") -> None:
            if record.state is State.PROBATION and self.denied:
                type(self).denied = False
                raise StateError("no room")
            await super().save(record, condemns=condemns)

    async def story() -> Record:
        box = Dated(tmp_path, ["1.0.0"])
        await box.run_until_probation(wish("1.0.0"))
        await box.stop()
        box.journal.__class__ = Denying
        Denying.denied = True
        record = await box.run_until_final(None, "pin-1.0.0")
        await box.journal.close()
        assert not Denying.denied, "the count was written at the start"
        assert not [event for event in box.events if event["type"] == "deployment.stuck"]
        return record

    record = asyncio.run(asyncio.wait_for(story(), 60))
    assert record.state is State.CONFIRMED
    assert record.attempts[State.PROBATION] == 2


def test_a_box_that_restarts_every_hour_ends_a_deployment_whose_store_stays_out_of_reach(tmp_path: Path) -> None:
    async def life(box: Dated, hour: int) -> None:
        box.clock = FakeClock(wall_s=1_760_000_000.0 + hour * HOUR_S)  # monotonic time begins anew
        await box.reboot(f"boot-{hour}")
        await box.reconciler.open()
        running = asyncio.ensure_future(box.reconciler.run())
        if hour == 0:
            await box.reconciler.want(wish("1.0.0"))
        ended = asyncio.ensure_future(box.reconciler.outcome("pin-1.0.0"))
        while box.clock.monotonic() < HOUR_S and not ended.done():
            await asyncio.sleep(0)
        for task in (ended, running):
            task.cancel()
            await asyncio.wait({task})

    async def story() -> tuple[Record, int]:
        box = Dated(tmp_path, ["1.0.0"], config=DeployConfig(fetch_limit_s=6 * HOUR_S))
        box.store.offline = True
        for hour in range(10):
            await life(box, hour)
            record = await box.journal.get("pin-1.0.0")
            assert record is not None
            if record.state in FINAL:
                break
        await box.journal.close()
        return record, hour

    record, hours = asyncio.run(asyncio.wait_for(story(), 60))
    assert (record.state, record.code) == (State.FAILED, "offline")
    assert 6 * HOUR_S <= record.offline_s < 6.2 * HOUR_S
    assert 6 <= hours < 8  # each restart forgets the wait that it ends


def test_what_was_waited_for_the_store_counts_on_in_one_deployment_and_not_in_the_next(tmp_path: Path) -> None:
    async def story() -> list[Record]:
        box = Dated(tmp_path, ["1.0.0"], config=DeployConfig(fetch_limit_s=HOUR_S, fetch_retry_cap_s=HOUR_S / 4))
        records = []
        for name in ("first", "second"):
            box.store.offline = True
            records.append(await box.run_until_final(replace(wish("1.0.0"), id=name), name))
            await box.restart()
        await box.journal.close()
        return records

    records = asyncio.run(asyncio.wait_for(story(), 60))
    assert [record.code for record in records] == ["offline", "offline"]
    assert all(HOUR_S <= record.offline_s < 1.3 * HOUR_S for record in records)


async def left_while(box: Dated, state: State, wanted: Any = None) -> Record:
    """Run until the deployment of 1.0.0 was changed in this boot and is in ``state``; return it as it is left."""
    await box.reconciler.open()
    running = asyncio.ensure_future(box.reconciler.run())
    if wanted is not None:
        await box.reconciler.want(wanted)
    record = await box.journal.get("pin-1.0.0")
    while record is None or (record.state, record.boot_id) != (state, box.boot_id):
        await asyncio.sleep(0)
        record = await box.journal.get("pin-1.0.0")
    running.cancel()
    await asyncio.wait({running})
    record = await box.journal.get("pin-1.0.0")
    assert record is not None
    return record
