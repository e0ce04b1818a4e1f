"""Pools that grow and shrink, with real workers: no request is lost on the way, whatever happens to a worker."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import pytest

from agent.engine.growth import Bounds
from agent.engine.pool import Pool
from agent.engine.version import Version
from tests.integration.test_engine import Bench, bench, run
from tests.models import scale_version

pytestmark = pytest.mark.integration
SERVICE_S = "0.03"
PATIENCE_S = 90.0


@dataclass
class Load:
    """Clients that ask as soon as they are answered, and what they were answered."""

    box: Bench
    stop: asyncio.Event = field(default_factory=asyncio.Event)
    answers: list[dict[str, Any]] = field(default_factory=list)

    async def client(self, text: str) -> None:
        while not self.stop.is_set():
            self.answers.append(await self.box.say(text, deadline_s=PATIENCE_S))

    @property
    def failures(self) -> list[dict[str, Any]]:
        return [answer for answer in self.answers if answer["kind"] != "result"]


@asynccontextmanager
async def loaded(box: Bench, *, clients: int, text: str = SERVICE_S) -> AsyncIterator[Load]:
    """So many clients ask as long as the body runs; afterwards all they asked is answered."""
    load = Load(box)
    async with asyncio.TaskGroup() as group:
        for _ in range(clients):
            group.create_task(load.client(text))
        try:
            yield load
        finally:
            load.stop.set()


async def until(condition: Any) -> None:
    deadline = asyncio.get_running_loop().time() + PATIENCE_S
    while not condition():
        assert asyncio.get_running_loop().time() < deadline, "it never happened"
        await asyncio.sleep(0.01)


def quick(least: int, most: int) -> Bounds:
    return Bounds(least=least, most=most, grow_delay_s=0.02, shrink_idle_s=0.3)


async def serve(box: Bench, folder: Path, bounds: Bounds) -> tuple[Version, Pool]:
    version = await box.engine.load(scale_version(folder, handler="slow", bounds=bounds))
    box.engine.activate(version)
    assert version.pool is not None
    return version, version.pool


def changes(box: Bench, change: str) -> list[int]:
    return [event.data["workers"] for event in box.events.recent() if event.type == f"pool.{change}"]


def test_a_pool_grows_to_its_bound_under_load_and_shrinks_when_it_idles(tmp_path: Path) -> None:
    async def story() -> None:
        async with bench(tmp_path) as box:
            _, pool = await serve(box, tmp_path / "b", quick(1, 3))
            async with loaded(box, clients=12) as load:
                await until(lambda: len(pool.links) == 3)
                seen = len(load.answers)
                await until(lambda: len(load.answers) > seen + 36)
            assert load.failures == []
            assert box.metrics.snapshot()["inferd_workers"] == [{"model": "scale", "version": "1.0.0", "value": 3}]
            pids = [link.process.pid for link in pool.links]
            async with loaded(box, clients=1, text="0.001") as light:
                await until(lambda: len(pool.links) == 1 and sum(map(psutil.pid_exists, pids)) == 1)
            assert light.failures == []
            assert max(changes(box, "grown")) == 3
            assert changes(box, "shrunk")[-1] == 1
            status = box.engine.status()[0]["scaling"]
            assert (status["wanted"], status["min"], status["max"], status["held"]) == (1, 1, 3, "")

    run(story)


def test_a_slow_model_with_one_client_keeps_one_worker(tmp_path: Path) -> None:
    """Nothing queues: a second worker would stand idle."""

    async def story() -> None:
        async with bench(tmp_path) as box:
            _, pool = await serve(box, tmp_path / "b", quick(1, 3))
            async with loaded(box, clients=1, text="0.2") as load:
                await until(lambda: len(load.answers) == 8)
            assert (len(pool.links), changes(box, "grown"), load.failures) == (1, [], [])

    run(story)


def test_one_killed_of_several_workers_loses_nothing(tmp_path: Path) -> None:
    """A request may lose one worker, not two: the next is killed once what the last one held is answered."""

    def whole(pool: Pool) -> bool:
        held = [job for link in pool.links for job in link.jobs.values()]
        return len(pool.links) == 3 and all(link.jobs for link in pool.links) and all(job.attempts == 1 for job in held)

    async def story() -> None:
        async with bench(tmp_path, deaths_max=100) as box:
            version, pool = await serve(box, tmp_path / "b", quick(3, 3))
            async with loaded(box, clients=12) as load:
                for deaths in range(1, 4):
                    await until(lambda: whole(pool) and not pool.waiting)
                    os.kill(pool.links[deaths % 3].process.pid, signal.SIGKILL)
                    await until(lambda deaths=deaths: version.deaths == deaths)
                await until(lambda: len(pool.links) == 3)
            assert load.failures == []
            assert pool.restarts == 3

    run(story)


def test_a_model_whose_second_worker_cannot_start_serves_with_one_until_it_can(tmp_path: Path) -> None:
    async def story() -> None:
        async with bench(tmp_path) as box:
            version, pool = await serve(box, tmp_path / "b", quick(1, 2))
            refuse = tmp_path / "b/refuse"
            refuse.touch()
            async with loaded(box, clients=8) as load:
                await until(lambda: pool.held)
                assert "asked not to start" in version.status()["scaling"]["held"]
                seen = len(load.answers)
                await until(lambda: len(load.answers) > seen + 30)
                assert (pool.size, len(pool.links)) == (1, 1)
                refuse.unlink()
                await until(lambda: len(pool.links) == 2)
            assert load.failures == []
            assert (version.deaths, pool.held, changes(box, "held")) == (0, "", [1])

    run(story)


def test_a_worker_too_many_for_the_memory_is_not_started(tmp_path: Path) -> None:
    async def story() -> None:
        async with bench(tmp_path, memory_bytes_max=1 << 20) as box:
            _, pool = await serve(box, tmp_path / "b", quick(1, 2))
            async with loaded(box, clients=8) as load:
                await until(lambda: pool.held)
            assert pool.held.startswith("models may take 1 MiB of memory, they hold ")
            assert (pool.size, len(pool.links), load.failures) == (1, 1, [])

    run(story)


def test_an_unload_takes_workers_along_that_come_and_go(tmp_path: Path) -> None:
    """``bench`` and ``run`` find what is left behind."""

    async def story() -> None:
        async with bench(tmp_path) as box:
            version, pool = await serve(box, tmp_path / "a", quick(1, 3))
            async with loaded(box, clients=12):
                await until(lambda: pool.size > 1)
            await box.engine.retire(version)
            version, pool = await serve(box, tmp_path / "b", quick(1, 2))
            async with loaded(box, clients=12):
                await until(lambda: len(pool.links) == 2)
            await until(lambda: pool.size == 1)
            await box.engine.retire(version)

    run(story)


def test_a_new_version_starts_with_as_many_workers_as_it_replaces(tmp_path: Path) -> None:
    async def story() -> None:
        async with bench(tmp_path) as box:
            bounds = Bounds(least=1, most=2, grow_delay_s=0.02, shrink_idle_s=3600.0)
            older, pool = await serve(box, tmp_path / "a", bounds)
            async with loaded(box, clients=8) as load:
                await until(lambda: len(pool.links) == 2)
                _, pool = await serve(box, tmp_path / "b", bounds)
                await box.engine.retire(older)
                await until(lambda: len(pool.links) == 2)
            assert load.failures == []
            (first, second) = [event.data["reason"] for event in box.events.recent() if event.type == "pool.grown"]
            assert first.startswith("requests queued for ")
            assert second == "the version before had 2 workers"

    run(story)


def test_other_bounds_hold_at_once_and_cost_no_request(tmp_path: Path) -> None:
    async def story() -> None:
        async with bench(tmp_path) as box:
            _, pool = await serve(box, tmp_path / "b", Bounds(least=1, most=1, shrink_idle_s=3600.0))
            box.engine.scale("scale", Bounds(least=3, most=3))
            await until(lambda: len(pool.links) == 3)
            async with loaded(box, clients=8) as load:
                box.engine.scale("scale", Bounds(least=1, most=2))
                await until(lambda: len(pool.links) == 2)
            assert load.failures == []
            reasons = [(event.type, event.data["reason"]) for event in box.events.recent() if "pool." in event.type]
            assert reasons == [
                ("pool.grown", "at least 3 are wanted"),
                ("pool.grown", "at least 3 are wanted"),
                ("pool.shrunk", "no more than 2 are wanted"),
            ]

    run(story)


def test_an_engine_that_stops_while_a_pool_grows_leaves_nothing(tmp_path: Path) -> None:
    async def story() -> None:
        async with bench(tmp_path) as box:
            _, pool = await serve(box, tmp_path / "b", quick(1, 2))
            asks = [asyncio.ensure_future(box.say(SERVICE_S)) for _ in range(100)]
            await until(lambda: pool.size == 2)
        answers = await asyncio.gather(*asks)
        assert {answer["kind"] for answer in answers} <= {"result", "error"}

    run(story)


def test_bound_workers_run_on_cores_of_their_own(tmp_path: Path) -> None:
    async def story() -> None:
        cores = os.sched_getaffinity(0)
        async with bench(tmp_path, cores=cores) as box:
            version, pool = await serve(box, tmp_path / "b", Bounds(least=2, most=2))
            await until(lambda: len(pool.links) == 2)
            told = [set(cores) for cores in version.status()["scaling"]["cores"]]
            assert told == [os.sched_getaffinity(link.process.pid) for link in pool.links]
            assert {len(own) for own in told} == {1}
            assert len(set.union(*told)) == min(2, len(cores))
            assert os.sched_getaffinity(0) == cores

    run(story)
