"""Deployments that take long: waiting for a byte budget, telling how far a download is, being cancelled."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable
from contextlib import asynccontextmanager
from itertools import pairwise
from pathlib import Path

import pytest

from agent.config import DeployConfig
from agent.deploy.desired import Action, Desired, decide
from agent.deploy.ports import Bundle, Progress
from agent.deploy.state import TRANSITIONS_MAX, Record, State
from agent.errors import BudgetError, NotFoundError, OfflineError
from tests.fakes.clock import Calendar
from tests.fakes.deploy import FakeStore, digest_of
from tests.sim.test_deployments import Box

pytestmark = pytest.mark.sim

WINDOW_S = 900.0


class SlowStore(FakeStore):
    """A download that tells its progress once a second of the box's clock, ``steps`` times."""

    steps = 1_000_000

    async def fetch(
        self,
        *,
        team: str,
        name: str,
        version: str,
        channel: str,
        medium: str = "",
        on_progress: Callable[[Progress], None],
    ) -> Bundle:
        on_progress(Progress(phase="resolved", version=version, digest=digest_of(name, version), bytes_total=1000))
        for step in range(self.steps):
            await self.clock.sleep(1.0)
            on_progress(Progress(phase="progress", bytes_done=step, bytes_total=1000, rate_bps=10))
        return await super().fetch(
            team=team, name=name, version=version, channel=channel, medium=medium, on_progress=on_progress
        )


def slow_box(folder: Path, *, steps: int) -> Box:
    box = Box(folder, ["1.0.0", "2.0.0"])
    box.store = SlowStore(folder, offered={"magika": ["1.0.0", "2.0.0"]})
    box.store.steps, box.store.clock = steps, box.clock
    box.reconciler = box._make()
    return box


def wish(version: str, *, source: str = "pin") -> Desired:
    return Desired(id=f"{source}-{version}", slot="magika", team="files", version=version, source=source)


@asynccontextmanager
async def running(box: Box):
    await box.reconciler.open()
    task = asyncio.ensure_future(box.reconciler.run())
    try:
        yield
    finally:
        task.cancel()
        await asyncio.wait({task})
        await box.journal.close()


async def until(box: Box, deployment: str, wanted: Callable[[Record], bool]) -> Record:
    """Return the first record that is ``wanted``."""
    seen = (-1, -1)
    while True:
        record = await asyncio.wait_for(box.reconciler.beyond(deployment, seen), 60)
        if wanted(record):
            return record
        seen = (record.step, record.bytes_done)


def test_a_pull_over_its_budget_says_so_waits_for_the_next_window_and_ends_well(tmp_path: Path) -> None:
    box = Box(tmp_path, ["1.0.0"])
    box.store.fetch_errors = [BudgetError("all spent", retry_after_s=WINDOW_S) for _ in range(3)]

    async def main() -> Record:
        async with running(box):
            await box.reconciler.want(wish("1.0.0"))
            return await asyncio.wait_for(box.reconciler.outcome("pin-1.0.0"), 60)

    record = asyncio.run(asyncio.wait_for(main(), 60))
    assert record.state is State.CONFIRMED
    assert box.clock.monotonic() >= 3 * WINDOW_S
    waits = [event["data"] for event in box.events if event["type"] == "deployment.fetch_wait"]
    assert [wait["code"] for wait in waits] == ["budget_spent"] * 3
    assert waits[0]["message"] == "all spent"


def test_a_pull_that_needs_many_windows_is_tried_again_rather_than_given_up(tmp_path: Path) -> None:
    box = Box(tmp_path, ["1.0.0"])
    box.store.fetch_errors = [BudgetError("all spent", retry_after_s=WINDOW_S) for _ in range(TRANSITIONS_MAX)]

    async def main() -> Record:
        async with running(box):
            await box.reconciler.want(wish("1.0.0"))
            return await asyncio.wait_for(box.reconciler.outcome("pin-1.0.0"), 60)

    record = asyncio.run(asyncio.wait_for(main(), 60))
    assert (record.state, record.code) == (State.FAILED, "budget_spent")
    assert decide(wish("1.0.0"), None, record) is Action.POLL


def test_another_wish_ends_the_wait_for_a_budget(tmp_path: Path) -> None:
    box = Box(tmp_path, ["1.0.0", "2.0.0"])
    box.store.fetch_errors = [BudgetError("all spent", retry_after_s=86_400.0)]

    async def main() -> tuple[Record, Record]:
        async with running(box):
            await box.reconciler.want(wish("1.0.0"))
            await until(box, "pin-1.0.0", lambda record: record.state is State.FETCH_WAIT)
            await box.reconciler.want(Desired(id="again", slot="magika", team="files", version="2.0.0", source="pin"))
            return await box.reconciler.outcome("pin-1.0.0"), await box.reconciler.outcome("again")

    given_up, done = asyncio.run(asyncio.wait_for(main(), 60))
    assert given_up.state is State.SUPERSEDED
    assert done.state is State.CONFIRMED
    assert box.clock.monotonic() < 86_400.0


def test_a_download_can_be_cancelled_and_its_pin_goes_with_it(tmp_path: Path) -> None:
    box = slow_box(tmp_path, steps=1_000_000)

    async def main() -> Record:
        async with running(box):
            await box.reconciler.want(wish("2.0.0"))
            await until(box, "pin-2.0.0", lambda record: record.bytes_done > 3)
            assert await box.reconciler.cancel("magika") == "pin-2.0.0"
            record = await asyncio.wait_for(box.reconciler.outcome("pin-2.0.0"), 60)
            with pytest.raises(NotFoundError, match="nothing is being deployed"):
                await box.reconciler.cancel("magika")
            assert not await box.journal.wanted()
            return record

    record = asyncio.run(asyncio.wait_for(main(), 60))
    assert (record.state, record.message) == (State.CANCELED, "it was cancelled")
    assert not box.store.fetched


def test_waiting_for_the_store_can_be_cancelled(tmp_path: Path) -> None:
    box = Box(tmp_path, ["1.0.0"])
    box.store.fetch_errors = [OfflineError("away") for _ in range(10_000)]

    async def main() -> Record:
        async with running(box):
            await box.reconciler.want(wish("1.0.0", source="fleet"))
            await until(box, "fleet-1.0.0", lambda record: record.state is State.FETCH_WAIT)
            await box.reconciler.cancel("magika")
            return await asyncio.wait_for(box.reconciler.outcome("fleet-1.0.0"), 60)

    assert asyncio.run(asyncio.wait_for(main(), 60)).state is State.CANCELED


def test_the_fleet_hears_of_a_long_download_at_most_every_ten_seconds(tmp_path: Path) -> None:
    box = slow_box(tmp_path, steps=60)

    async def main() -> list[Record]:
        seen: list[Record] = []
        async with running(box):
            await box.reconciler.want(wish("1.0.0"))
            await asyncio.wait_for(box.reconciler.outcome("pin-1.0.0", seen.append), 60)
        return seen

    seen = asyncio.run(asyncio.wait_for(main(), 60))
    events = [event for event in box.events if event["type"] == "deployment.progress"]
    assert 1 <= len(events) <= 6
    assert all(after["wall_s"] - before["wall_s"] >= 10 for before, after in pairwise(events))
    told = [event["data"] for event in events]
    assert told[0].keys() == {
        "id", "slot", "version", "state", "bytes_done", "bytes_total", "rate_bps", "eta_s",
    }  # fmt: skip
    assert told[0]["eta_s"] == math.ceil((1000 - told[0]["bytes_done"]) / 10)
    assert told[0]["rate_bps"] == 10
    assert seen[-1].rate_bps == 0
    assert seen[-1].eta_s is None


def test_a_cancel_ends_a_wait_for_the_store_however_long_that_would_last(tmp_path: Path) -> None:
    box = Box(tmp_path, ["1.0.0"], config=DeployConfig(fetch_retry_cap_s=1e6))
    box.clock, box.store.offline = Calendar(1_760_000_000.0), True
    box.reconciler = box._make()

    async def main() -> Record:
        async with running(box):
            await box.reconciler.want(wish("1.0.0"))
            waiting = await until(box, "pin-1.0.0", lambda record: record.state is State.FETCH_WAIT)
            while waiting.attempts[State.FETCH_WAIT] < 8:  # by then a wait may take two minutes
                await asyncio.sleep(0.001)
                waiting = await box.journal.get("pin-1.0.0")
            await box.reconciler.cancel("magika")
            return await box.reconciler.outcome("pin-1.0.0")

    assert asyncio.run(asyncio.wait_for(main(), 60)).state is State.CANCELED
