"""Deployments that wait for their time: windows, applications' holds, the box's one trial, deadlines; and staging."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from agent.config import DeployConfig, WindowConfig
from agent.deploy.desired import Desired
from agent.deploy.plan import Plan
from agent.deploy.state import FINAL, TRANSITIONS_MAX, Record, State
from agent.errors import CommandError, NotFoundError, OfflineError
from tests.fakes.deploy import digest_of
from tests.sim.test_deployment_waits import SlowStore, running, until
from tests.sim.test_deployments import Box

pytestmark = pytest.mark.sim

HOUR_S = 3600.0
LATER = WindowConfig(start="14:00", end="14:10", timezone="UTC")
NOON_S = 1_760_011_200.0  # 2025-10-09 12:00 UTC
LATER_S = NOON_S + 2 * HOUR_S
FAST: dict[str, Any] = {"probation_s": 2, "probation_calls_min": 3, "probation_limit_s": 20, "fetch_retry_cap_s": 5}


class Gated(Box):
    """A box whose clock shows noon and may be doubted; ``magika`` serves 1.0.0 unless told otherwise."""

    def __init__(self, folder: Path, *, serving: tuple[str, ...] = ("magika",), **config: Any) -> None:
        self.clock_trusted = True
        super().__init__(folder, ["1.0.0", "2.0.0", "3.0.0"], config=DeployConfig(**FAST))
        self.store.offered["other"] = ["1.0.0", "2.0.0"]
        self.clock._wall_s = NOON_S
        asyncio.run(self._serve(serving))
        self.config = DeployConfig(**FAST, **config)
        self.reconciler = self._make()

    def _make(self, **more: Any) -> Any:
        return super()._make(clock_trusted=lambda: self.clock_trusted, **more)

    async def _serve(self, slots: tuple[str, ...]) -> None:
        async with running(self):
            for slot in slots:
                await self.reconciler.want(wish("1.0.0", slot=slot))
                assert (await ended(self, f"pin-{slot}-1.0.0")).state is State.CONFIRMED

    def renew(self) -> None:
        """Start over, as after a reboot."""
        self.reconciler = self._make()

    def version(self, slot: str = "magika") -> str | None:
        loaded = self.host.active.get(slot)
        return loaded.bundle.version if loaded is not None else None


def wish(version: str, *, slot: str = "magika", source: str = "pin", **plan: Any) -> Desired:
    kind = "stage" if plan.get("stage_only") else source
    name = f"{kind}-{slot}-{version}"
    return Desired(id=name, slot=slot, team="files", version=version, source=source, plan=Plan(**plan))


async def ended(box: Box, deployment: str) -> Record:
    return await asyncio.wait_for(box.reconciler.outcome(deployment), 60)


async def reached(box: Box, deployment: str, state: State) -> Record:
    record = await until(box, deployment, lambda record: record.state is state or record.state in FINAL)
    assert record.state is state, record
    return record


def told(box: Box, deployment: str) -> list[str]:
    """Return the states of a deployment in the order they were told."""
    return [
        event["type"].removeprefix("deployment.")
        for event in box.events
        if event["data"].get("id") == deployment and event["type"] != "deployment.progress"
    ]


def test_a_version_is_fetched_at_once_and_loaded_when_the_window_opens(tmp_path: Path) -> None:
    box = Gated(tmp_path, windows=(LATER,))

    async def main() -> Record:
        async with running(box):
            await box.reconciler.want(wish("2.0.0"))
            waiting = await reached(box, "pin-magika-2.0.0", State.WAITING_WINDOW)
            assert waiting.message == "the next maintenance window opens Thu 2025-10-09 14:00 UTC"
            assert box.store.fetched[-1] == "2.0.0"
            assert box.reconciler.slots()[0]["waits"] == waiting.message
            return await ended(box, "pin-magika-2.0.0")

    record = asyncio.run(main())
    assert record.state is State.CONFIRMED
    assert box.clock.wall() >= NOON_S + 2 * HOUR_S
    assert record.waited_s == pytest.approx(2 * HOUR_S, abs=60)


def test_bytes_are_fetched_in_their_own_windows(tmp_path: Path) -> None:
    box = Gated(tmp_path, fetch_windows=(LATER,))

    async def main() -> Record:
        async with running(box):
            await box.reconciler.want(wish("2.0.0"))
            await reached(box, "pin-magika-2.0.0", State.QUEUED)
            assert "2.0.0" not in box.store.fetched
            return await ended(box, "pin-magika-2.0.0")

    assert asyncio.run(main()).state is State.CONFIRMED
    assert told(box, "pin-magika-2.0.0")[:3] == ["received", "queued", "validating"]
    assert box.clock.wall() >= NOON_S + 2 * HOUR_S


@pytest.mark.parametrize("exempt", ["first", "plan", "rollback"])
def test_no_window_holds_back_what_cannot_wait(tmp_path: Path, exempt: str) -> None:
    box = Gated(tmp_path, serving=() if exempt == "first" else ("magika",))
    asked = wish("2.0.0", ignore_window=exempt == "plan")

    async def main() -> None:
        async with running(box):
            if exempt == "rollback":
                await box.reconciler.want(asked)
                await ended(box, asked.id)
        box.config = DeployConfig(**FAST, windows=(LATER,), fetch_windows=(LATER,))
        box.renew()
        async with running(box):
            await asyncio.wait_for(box.reconciler.booted.wait(), 60)
            back = Desired(id="back", slot="magika", team="files", version="1.0.0", source="pin", local=True)
            chosen = back if exempt == "rollback" else asked
            await box.reconciler.want(chosen)
            assert (await ended(box, chosen.id)).state is State.CONFIRMED

    asyncio.run(main())
    assert box.clock.wall() < NOON_S + HOUR_S


def test_a_first_version_waits_if_the_box_is_told_so(tmp_path: Path) -> None:
    box = Gated(tmp_path, serving=(), windows=(LATER,), first_waits=True)

    async def main() -> Record:
        async with running(box):
            await box.reconciler.want(wish("1.0.0"))
            return await ended(box, "pin-magika-1.0.0")

    assert asyncio.run(main()).state is State.CONFIRMED
    assert box.clock.wall() >= NOON_S + 2 * HOUR_S


def test_with_a_clock_that_cannot_be_right_no_window_is_open_and_force_after_counts_running_time(
    tmp_path: Path,
) -> None:
    box = Gated(tmp_path, windows=(WindowConfig(timezone="UTC"),))  # always, if the time were known
    box.clock_trusted = False
    asked = wish("2.0.0", force_after_s=2 * HOUR_S)

    async def main() -> Record:
        async with running(box):
            await box.reconciler.want(asked)
            waiting = await reached(box, asked.id, State.WAITING_WINDOW)
            assert "the clock cannot be right" in waiting.message
            begun_s = box.clock.monotonic()
            await until(box, asked.id, lambda record: record.waited_s > HOUR_S or box.clock.monotonic() > begun_s + 1)
            while box.clock.monotonic() < begun_s + HOUR_S:
                await box.clock.sleep(60)
                await asyncio.sleep(0.002)  # the journal is on a real disk
        box.clock.jump_wall(-10 * 365 * 24 * HOUR_S)
        box.renew()
        restarted_s = box.clock.monotonic()
        async with running(box):
            record = await ended(box, asked.id)
            assert box.clock.monotonic() - restarted_s < 1.2 * HOUR_S  # what had been waited before counts
            return record

    record = asyncio.run(main())
    assert record.state is State.CONFIRMED
    assert 2 * HOUR_S <= record.waited_s < 2.1 * HOUR_S


def test_a_deployment_that_waits_costs_no_transition_at_a_restart_and_needs_no_store_any_more(tmp_path: Path) -> None:
    box = Gated(tmp_path, windows=(LATER,))

    async def main() -> Record:
        async with running(box):
            await box.reconciler.want(wish("2.0.0"))
            await reached(box, "pin-magika-2.0.0", State.WAITING_WINDOW)
        box.store.fetch_errors = [OfflineError("no route")] * 10_000
        for _ in range(40):
            box.renew()
            await box.boot()
            await box.journal.close()
        box.renew()
        async with running(box):
            return await ended(box, "pin-magika-2.0.0")

    record = asyncio.run(main())
    assert record.state is State.CONFIRMED
    assert record.step < 15
    assert box.version() == "2.0.0"


def test_a_window_that_never_comes_ends_the_deployment(tmp_path: Path) -> None:
    box = Gated(tmp_path, windows=(LATER,), wait_limit_s=HOUR_S)

    async def main() -> Record:
        async with running(box):
            await box.reconciler.want(wish("2.0.0"))
            return await ended(box, "pin-magika-2.0.0")

    record = asyncio.run(main())
    assert (record.state, record.code) == (State.EXPIRED, "command_expired")
    assert box.version() == "1.0.0"


def test_after_its_deadline_a_wish_is_not_carried_out(tmp_path: Path) -> None:
    box = Gated(tmp_path, windows=(LATER,))

    async def main() -> Record:
        async with running(box):
            await box.reconciler.want(wish("2.0.0", not_after=NOON_S + HOUR_S))
            return await ended(box, "pin-magika-2.0.0")

    record = asyncio.run(main())
    assert record.state is State.EXPIRED
    assert "was to be carried out until" in record.message
    assert box.version() == "1.0.0"


def test_with_a_deadline_and_a_clock_that_cannot_be_right_nothing_is_loaded_until_it_is(tmp_path: Path) -> None:
    box = Gated(tmp_path)
    box.clock_trusted = False

    async def main() -> Record:
        async with running(box):
            await box.reconciler.want(wish("2.0.0", not_after=NOON_S + 24 * HOUR_S, ignore_window=True))
            waiting = await reached(box, "pin-magika-2.0.0", State.WAITING_WINDOW)
            assert "too late cannot be told" in waiting.message
            box.clock_trusted = True
            return await ended(box, "pin-magika-2.0.0")

    assert asyncio.run(main()).state is State.CONFIRMED


@pytest.mark.parametrize("model", ["magika", "*"])
def test_an_application_that_holds_a_model_keeps_its_version_until_it_lets_go(tmp_path: Path, model: str) -> None:
    box = Gated(tmp_path)

    async def main() -> Record:
        async with running(box):
            token = box.reconciler.holds.take(model, "line 3 (uid 1000)")
            await box.reconciler.want(wish("2.0.0"))
            waiting = await reached(box, "pin-magika-2.0.0", State.WAITING_WINDOW)
            assert waiting.message == "held by line 3 (uid 1000)"
            assert box.reconciler.slots()[0]["held_by"] == "line 3 (uid 1000)"
            await box.clock.sleep(HOUR_S)
            assert box.version() == "1.0.0"
            box.reconciler.holds.release(token)
            return await ended(box, "pin-magika-2.0.0")

    assert asyncio.run(main()).state is State.CONFIRMED


@pytest.mark.parametrize("bound", [{"hold_limit_s": HOUR_S}, {"force_after_s": HOUR_S}])
def test_a_hold_that_nobody_lets_go_is_bounded(tmp_path: Path, bound: dict[str, float]) -> None:
    box = Gated(tmp_path, **bound)

    async def main() -> Record:
        async with running(box):
            box.reconciler.holds.take("magika", "a program that hangs")
            await box.reconciler.want(wish("2.0.0"))
            return await ended(box, "pin-magika-2.0.0")

    assert asyncio.run(main()).state is State.CONFIRMED
    assert HOUR_S <= box.clock.monotonic() < 1.5 * HOUR_S


def test_one_model_is_on_trial_at_a_time_over_restarts_too(tmp_path: Path) -> None:
    box = Gated(tmp_path, serving=("magika", "other"))
    box.config = DeployConfig(probation_s=0, probation_calls_min=10**6, probation_limit_s=10**7)  # never ends by itself
    box.renew()
    trials: list[set[str]] = []

    def look(_: Record) -> None:
        pointers = {name: performer.pointer for name, performer in box.reconciler._performers.items()}
        trials.append({name for name, pointer in pointers.items() if pointer is not None and pointer.trial})

    async def main() -> tuple[Record, Record]:
        async with running(box):
            await box.reconciler.want(wish("2.0.0"))
            await reached(box, "pin-magika-2.0.0", State.PROBATION)
            (late,) = box.reconciler.past_gate("*")  # what an application that holds now is told
            assert (late["slot"], late["version"], late["state"]) == ("magika", "2.0.0", "probation")
            await box.reconciler.want(wish("2.0.0", slot="other"))
            waiting = await reached(box, "pin-other-2.0.0", State.WAITING_WINDOW)
            assert waiting.message == "magika is on trial, and only one model is at a time"
        box.config = DeployConfig(**FAST)
        box.renew()
        async with running(box):
            return (
                await asyncio.wait_for(box.reconciler.outcome("pin-magika-2.0.0", look), 60),
                await asyncio.wait_for(box.reconciler.outcome("pin-other-2.0.0", look), 60),
            )

    assert [record.state for record in asyncio.run(main())] == [State.CONFIRMED] * 2
    assert max(map(len, trials)) == 1


def test_first_versions_wait_for_nobody(tmp_path: Path) -> None:
    box = Gated(tmp_path, serving=())

    async def main() -> None:
        async with running(box):
            for slot in ("magika", "other"):
                await box.reconciler.want(wish("1.0.0", slot=slot))
            for slot in ("magika", "other"):
                assert (await ended(box, f"pin-{slot}-1.0.0")).state is State.CONFIRMED

    asyncio.run(main())
    assert not any(event["type"] == "deployment.waiting_window" for event in box.events)


@pytest.mark.parametrize("waits_in", [State.QUEUED, State.WAITING_WINDOW])
def test_what_waits_can_be_cancelled_also_over_a_power_cut(tmp_path: Path, waits_in: State) -> None:
    windows = {"fetch_windows" if waits_in is State.QUEUED else "windows": (LATER,)}
    box = Gated(tmp_path, **windows)

    async def main() -> Record:
        async with running(box):
            await box.reconciler.want(wish("2.0.0"))
            await reached(box, "pin-magika-2.0.0", waits_in)
            box.journal.cut_in = 0  # the cancellation is on disk, the end of the deployment is not
            assert await box.reconciler.cancel("magika") == "pin-magika-2.0.0"
        box.renew()
        async with running(box):
            return await ended(box, "pin-magika-2.0.0")

    assert asyncio.run(main()).state is State.CANCELED
    assert box.clock.wall() < NOON_S + HOUR_S


def test_the_fleet_cannot_cancel_what_a_pin_asked_for(tmp_path: Path) -> None:
    box = Gated(tmp_path, windows=(LATER,))

    async def main() -> None:
        async with running(box):
            await box.reconciler.want(wish("2.0.0"))
            await reached(box, "pin-magika-2.0.0", State.WAITING_WINDOW)
            with pytest.raises(CommandError, match="cancel it there"):
                await box.reconciler.cancel("magika", source="fleet")
            await box.reconciler.cancel("magika")
            assert (await ended(box, "pin-magika-2.0.0")).state is State.CANCELED
            with pytest.raises(NotFoundError):
                await box.reconciler.cancel("magika")

    asyncio.run(main())


def test_every_wish_ends_also_one_that_was_overtaken_before_it_began(tmp_path: Path) -> None:
    box = Gated(tmp_path, serving=())
    overtaken = ("fleet-magika-1.0.0", "fleet-magika-2.0.0")

    async def main() -> list[Record]:
        box.renew()
        await box.reconciler.open()  # nobody performs yet
        await box.reconciler.want(wish("1.0.0", source="fleet"))
        await box.reconciler.want(wish("2.0.0", source="fleet"))
        await box.reconciler.want(wish("3.0.0"))
        await box.restart()
        async with running(box):
            return [await ended(box, name) for name in ("pin-magika-3.0.0", *overtaken)]

    states = [record.state for record in asyncio.run(main())]
    assert states == [State.CONFIRMED, State.SUPERSEDED, State.SUPERSEDED]
    assert all(told(box, name)[-1] == "superseded" for name in overtaken)


def test_a_wish_comes_back_once_the_one_that_won_is_withdrawn(tmp_path: Path) -> None:
    box = Gated(tmp_path, windows=(LATER,))

    async def main() -> Record:
        async with running(box):
            await box.reconciler.unpin("magika")
            await box.reconciler.want(wish("2.0.0", source="fleet"))
            await reached(box, "fleet-magika-2.0.0", State.WAITING_WINDOW)
            await box.reconciler.want(wish("3.0.0"))
            await reached(box, "fleet-magika-2.0.0", State.SUPERSEDED)
            await reached(box, "pin-magika-3.0.0", State.WAITING_WINDOW)
            await box.reconciler.cancel("magika")
            await reached(box, "pin-magika-3.0.0", State.CANCELED)
            await until(box, "fleet-magika-2.0.0", lambda record: record.state not in FINAL)
            return await ended(box, "fleet-magika-2.0.0")

    assert asyncio.run(main()).state is State.CONFIRMED
    assert box.version() == "2.0.0"


def test_a_command_that_comes_again_after_another_one_changes_nothing(tmp_path: Path) -> None:
    box = Gated(tmp_path, windows=(LATER,))

    async def main() -> None:
        async with running(box):
            await box.reconciler.unpin("magika")
            for version in ("2.0.0", "3.0.0", "2.0.0"):
                await box.reconciler.want(wish(version, source="fleet"))
                await until(box, f"fleet-magika-{version}", lambda record: True)
            assert (await ended(box, "fleet-magika-3.0.0")).state is State.CONFIRMED
            assert (await ended(box, "fleet-magika-2.0.0")).state is State.SUPERSEDED

    asyncio.run(main())
    assert box.version() == "3.0.0"


def test_a_staged_version_waits_on_disk_and_is_deployed_without_the_store(tmp_path: Path) -> None:
    box = Gated(tmp_path)

    async def main() -> None:
        async with running(box):
            await box.reconciler.want(wish("2.0.0", stage_only=True))
            record = await ended(box, "stage-magika-2.0.0")
            assert (record.state, record.message) == (State.PREPARED, "on disk; deploy magika@2.0.0 to load it")
            assert (box.version(), box.pointer().active.version) == ("1.0.0", "1.0.0")
        box.renew()
        async with running(box):
            await settled(box, lambda: box.reconciler.slots()[0]["prepared"] == "2.0.0")
            await box.reconciler.retention.collect()
            assert digest_of("magika", "2.0.0") in box.store.needed.digests
            assert [wanted.version for wanted in await box.journal.wanted()] == ["1.0.0", "2.0.0"]
            await box.reconciler.want(wish("2.0.0"))
            assert (await ended(box, "pin-magika-2.0.0")).state is State.CONFIRMED
            await settled(box, lambda: box.reconciler.slots()[0]["prepared"] is None)

    asyncio.run(main())
    assert box.version() == "2.0.0"


def test_staging_disturbs_no_deployment_and_is_overtaken_by_a_newer_one_only(tmp_path: Path) -> None:
    box = Gated(tmp_path, windows=(LATER,))
    box.store.offline = False

    async def main() -> None:
        async with running(box):
            await box.reconciler.want(wish("2.0.0"))
            await reached(box, "pin-magika-2.0.0", State.WAITING_WINDOW)
            box.store.offline = True
            await box.reconciler.want(wish("3.0.0", stage_only=True, source="fleet"))
            await reached(box, "stage-magika-3.0.0", State.FETCH_WAIT)
            await box.reconciler.want(wish("1.0.0", stage_only=True))
            assert (await ended(box, "stage-magika-3.0.0")).state is State.SUPERSEDED
            box.store.offline = False
            assert (await ended(box, "stage-magika-1.0.0")).state is State.PREPARED
            assert (await ended(box, "pin-magika-2.0.0")).state is State.CONFIRMED

    asyncio.run(main())
    assert box.version() == "2.0.0"


def test_staging_survives_restarts_and_can_be_cancelled(tmp_path: Path) -> None:
    box = Gated(tmp_path)
    box.store.offline = True

    async def main() -> None:
        async with running(box):
            await box.reconciler.want(wish("2.0.0", stage_only=True))
            await reached(box, "stage-magika-2.0.0", State.FETCH_WAIT)
        box.renew()
        async with running(box):
            await reached(box, "stage-magika-2.0.0", State.FETCH_WAIT)
            assert await box.reconciler.cancel("magika") == "stage-magika-2.0.0"
            assert (await ended(box, "stage-magika-2.0.0")).state is State.CANCELED
            assert [wanted.version for wanted in await box.journal.wanted()] == ["1.0.0"]

    asyncio.run(main())


def test_a_download_pauses_when_its_window_closes_and_goes_on_in_the_next(tmp_path: Path) -> None:
    box = Gated(tmp_path, fetch_windows=(LATER,))
    box.store = SlowStore(tmp_path, offered=box.store.offered)
    box.store.steps, box.store.clock = 900, box.clock
    box.reconciler = box._make()

    async def main() -> Record:
        async with running(box):
            await box.reconciler.want(wish("2.0.0"))
            await until(box, "pin-magika-2.0.0", lambda record: record.state is State.FETCHING)
            paused = await reached(box, "pin-magika-2.0.0", State.QUEUED)
            assert "the next fetching window opens" in paused.message
            box.store.steps = 10
            return await ended(box, "pin-magika-2.0.0")

    record = asyncio.run(main())
    assert record.state is State.CONFIRMED
    assert record.step < TRANSITIONS_MAX


async def settled(box: Box, wanted: Callable[[], bool]) -> None:
    """Wait until what follows from the last change has happened."""
    async with asyncio.timeout(60):
        while not wanted():
            await asyncio.sleep(0.005)


def test_a_medium_needs_no_fetch_window(tmp_path: Path) -> None:
    box = Gated(tmp_path, fetch_windows=(LATER,))
    box.store.media["/media/stick"] = {"magika": ["2.0.0"]}

    async def main() -> Record:
        async with running(box):
            await box.reconciler.want(wish("2.0.0"))
            await reached(box, "pin-magika-2.0.0", State.QUEUED)
            assert (await box.reconciler.offer("magika", "/media/stick")).id == "pin-magika-2.0.0"  # type: ignore[union-attr]
            return await ended(box, "pin-magika-2.0.0")

    assert asyncio.run(main()).state is State.CONFIRMED
    assert box.clock.wall() < NOON_S + HOUR_S


def test_a_version_beside_the_default_waits_for_its_models_holds(tmp_path: Path) -> None:
    box = Gated(tmp_path)
    beside = Desired(id="beside", slot="magika@2.0.0", team="files", version="2.0.0", source="pin")

    async def main() -> Record:
        async with running(box):
            await settled(box, lambda: box.version() == "1.0.0")
            box.reconciler.holds.take("magika", "line 3")
            await box.reconciler.want(beside)
            assert (await reached(box, "beside", State.WAITING_WINDOW)).message == "held by line 3"
        box.renew()  # the hold ends with the process, and what was staged is found again
        async with running(box):
            return await ended(box, "beside")

    assert asyncio.run(main()).state is State.CONFIRMED


def test_a_revoked_version_is_left_at_once_while_another_waits_for_its_window(tmp_path: Path) -> None:
    box = Gated(tmp_path)

    async def main() -> None:
        async with running(box):
            await box.reconciler.want(wish("2.0.0"))
            await ended(box, "pin-magika-2.0.0")
        box.config = DeployConfig(**FAST, windows=(LATER,))
        box.renew()
        async with running(box):
            await settled(box, lambda: box.version() == "2.0.0")
            await box.reconciler.want(wish("3.0.0"))
            await reached(box, "pin-magika-3.0.0", State.WAITING_WINDOW)
            box.store.revoked["2.0.0"] = "it sees ghosts"
            await box.reconciler.absorb((await box.store.survey(box.reconciler.models())).models)
            await settled(box, lambda: box.version() == "1.0.0")
            assert box.clock.wall() < LATER_S
            await settled(box, lambda: box.version() == "3.0.0")

    asyncio.run(main())
    assert box.clock.wall() >= LATER_S
