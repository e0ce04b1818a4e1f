"""The engine with a real zygote and real sandboxed workers."""

from __future__ import annotations

import asyncio
import json
import os
import signal
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from agent.clock import SystemClock
from agent.config import EngineConfig
from agent.engine.book import VariantBook
from agent.engine.engine import Engine
from agent.engine.learned import Learned
from agent.engine.meter import Meter, SystemMeter
from agent.engine.zygote import become_subreaper
from agent.errors import LoadError
from agent.events import EventBus
from agent.metrics import Metrics
from agent.nvml import GpuMemory
from agent.serving.ports import InferRequest
from agent.tensors import pack, unpack
from agent.wire import Header, Limits
from tests import shared
from tests.models import FEATURES, scale_version

pytestmark = pytest.mark.integration
STOP_TIMEOUT_S = 60.0


@dataclass
class Bench:
    """An engine and the means to ask it."""

    engine: Engine
    events: EventBus
    sweeper: asyncio.Task[None]
    metrics: Metrics

    def request(
        self, body: bytes, header: dict[str, Any], *, deadline_s: float, version: str | None
    ) -> tuple[Any, Any]:
        loop = asyncio.get_running_loop()
        answer: asyncio.Future[tuple[dict[str, Any], bytes]] = loop.create_future()

        def take(head: dict[str, Any], buffers: Any) -> None:
            assert not answer.done(), "answered twice"
            answer.set_result((dict(head), b"".join(bytes(buffer) for buffer in buffers)))

        request = InferRequest(
            model="scale",
            version=version,
            header=Header({"kind": "infer", **header}),
            body=body,
            deadline=loop.time() + deadline_s,
            client="test",
            answer=take,
        )
        self.engine.submit(request)
        return request, answer

    async def ask(self, value: float = 1.0, *, version: str | None = None, deadline_s: float = 90.0) -> dict[str, Any]:
        entries, buffers = pack({"x": np.full((1, FEATURES), value, dtype=np.float32)})
        body = b"".join(bytes(buffer) for buffer in buffers)
        _, answer = self.request(body, {"tensors": entries}, deadline_s=deadline_s, version=version)
        header, raw = await answer
        if header["kind"] == "result":
            header["y"] = float(unpack(header["tensors"], raw)["y"][0, 0])
        return header

    async def say(self, text: str, *, deadline_s: float = 90.0) -> dict[str, Any]:
        _, answer = self.request(text.encode(), {"content_type": "text/plain"}, deadline_s=deadline_s, version=None)
        header, raw = await answer
        if header["kind"] == "result":
            header["value"] = json.loads(raw)
        return header


@asynccontextmanager
async def bench(
    folder: Path,
    *,
    cores: Iterable[int] = (),
    memory_bytes_max: int = 0,
    meter: Meter | None = None,
    learned: Learned | None = None,
    gpus: Callable[[], Sequence[GpuMemory]] = tuple,
    book: VariantBook | None = None,
    **options: Any,
) -> AsyncIterator[Bench]:
    become_subreaper()
    events = EventBus(SystemClock())
    config = EngineConfig(**{"restart_first_s": 0.001, "start_timeout_s": 60.0, **options})
    metrics = Metrics()
    engine = Engine(
        config,
        scratch=folder / "scratch",
        wire=Limits(body_bytes_max=1 << 22),
        events=events,
        metrics=metrics,
        cores=cores,
        meter=meter or SystemMeter(budget_bytes=memory_bytes_max),
        learned=learned,
        gpus=gpus,
        book=book,
    )
    async with engine.running():
        sweeper = asyncio.ensure_future(engine.run())
        try:
            yield Bench(engine, events, sweeper, metrics)
        finally:
            sweeper.cancel()
            await asyncio.wait({sweeper}, timeout=STOP_TIMEOUT_S)
            assert sweeper.done(), "the engine does not stop"
    assert not list((folder / "scratch").iterdir()), "a worker's scratch folder is left"


def run(story: Callable[[], Awaitable[None]]) -> None:
    before = {child.pid for child in psutil.Process().children(recursive=True)}
    shared.run(story)
    left = [child for child in psutil.Process().children(recursive=True) if child.pid not in before]
    assert not [child for child in left if child.status() != psutil.STATUS_ZOMBIE], "a process is left"


async def until(condition: Callable[[], bool], *, turns: int = 9000) -> None:
    for _ in range(turns):
        if condition():
            return
        await asyncio.sleep(0.01)
    raise AssertionError("it never happened")


def test_a_loaded_version_answers_and_says_who_it_is(tmp_path: Path) -> None:
    async def story() -> None:
        async with bench(tmp_path) as box:
            box.engine.activate(await box.engine.load(scale_version(tmp_path / "b")))
            answer = await box.ask(3.0)
            assert (answer["y"], answer["version"], answer["variant"]) == (6.0, "1.0.0", "v0")
            status = box.engine.status()[0]
            assert status["sandbox"]["level"] == "full"
            assert box.engine.describe("scale")["inputs"] == [{"name": "x", "datatype": "FP32", "shape": [-1, 4]}]

    run(story)


def test_a_variant_that_cannot_load_is_skipped_with_its_reason(tmp_path: Path) -> None:
    async def story() -> None:
        async with bench(tmp_path) as box:
            version = await box.engine.load(scale_version(tmp_path / "b", factors=(None, 5.0)))
            box.engine.activate(version)
            assert (await box.ask())["y"] == 5.0
            fallback = version.status()["fallbacks"][0]
            assert (fallback["variant"], fallback["code"]) == ("v0", "unloadable")
            assert any(event.type == "variant.skipped" for event in box.events.recent())

    run(story)


def test_no_variant_left_is_an_error_that_names_each(tmp_path: Path) -> None:
    async def story() -> None:
        async with bench(tmp_path) as box:
            with pytest.raises(LoadError, match=r"v0: .*v1: "):
                await box.engine.load(scale_version(tmp_path / "b", factors=(None, None)))

    run(story)


def test_killed_workers_lose_no_request(tmp_path: Path) -> None:
    async def story() -> None:
        async with bench(tmp_path, deaths_max=100) as box:
            version = await box.engine.load(scale_version(tmp_path / "b"))
            box.engine.activate(version)
            answers: list[dict[str, Any]] = []

            async def client() -> None:
                for _ in range(150):
                    answer = await box.ask()
                    answers.append(answer)

            async def killer() -> None:
                killed: set[int] = set()
                while len(killed) < 3:
                    pids = {link.process.pid for link in version.pool.links} - killed
                    if pids and len(answers) > 100 * len(killed) + 50:
                        pid = pids.pop()
                        killed.add(pid)
                        os.kill(pid, signal.SIGKILL)
                    await asyncio.sleep(0)

            async with asyncio.TaskGroup() as group:
                for _ in range(8):
                    group.create_task(client())
                group.create_task(killer())
            assert len(answers) == 8 * 150
            assert {answer.get("y") for answer in answers} == {2.0}
            await until(lambda: version.deaths == 3)
            assert all(
                event.data["cause"] == "killed by SIGKILL"
                for event in box.events.recent()
                if event.type == "worker.died"
            )

    run(story)


def test_a_lost_zygote_costs_nothing(tmp_path: Path) -> None:
    async def story() -> None:
        async with bench(tmp_path, deaths_max=100) as box:
            version = await box.engine.load(scale_version(tmp_path / "b"))
            box.engine.activate(version)
            zygote = next(row for row in box.engine.processes() if row["role"] == "zygote onnx")
            os.kill(zygote["pid"], signal.SIGKILL)
            assert (await box.ask())["y"] == 2.0
            os.kill(version.pool.links[0].process.pid, signal.SIGKILL)
            assert (await box.ask())["y"] == 2.0
            await until(lambda: version.deaths == 1)

    run(story)


def test_a_swap_under_load_fails_no_request(tmp_path: Path) -> None:
    async def story() -> None:
        async with bench(tmp_path) as box:
            box.engine.activate(await box.engine.load(scale_version(tmp_path / "a")))
            seen: list[tuple[str, Any]] = []
            stop = asyncio.Event()

            async def client() -> None:
                while not stop.is_set():
                    answer = await box.ask()
                    seen.append((answer["kind"], answer.get("version")))

            async with asyncio.TaskGroup() as group:
                for _ in range(4):
                    group.create_task(client())
                newer = await box.engine.load(scale_version(tmp_path / "b", version="2.0.0"))
                older = box.engine.activate(newer)
                assert older is not None
                await box.engine.retire(older)
                await until(lambda: seen[-1][1] == "2.0.0")
                stop.set()
            assert {kind for kind, _ in seen} == {"result"}
            versions = [version for _, version in seen]
            assert versions.index("2.0.0") > 0

    run(story)


def test_a_worker_that_dies_while_its_version_drains_loses_no_request(tmp_path: Path) -> None:
    async def story() -> None:
        async with bench(tmp_path) as it:
            version = await it.engine.load(scale_version(tmp_path / "one"))
            it.engine.activate(version)
            assert version.pool is not None
            (link,) = version.pool.links
            os.kill(link.process.pid, signal.SIGSTOP)
            asked = [asyncio.ensure_future(it.ask(float(number), deadline_s=600.0)) for number in range(5)]
            await until(lambda: version.pool is not None and version.pool.outstanding == 5)
            newer = scale_version(tmp_path / "two", version="2.0.0", factors=(3.0,))
            it.engine.activate(await it.engine.load(newer))
            retired = asyncio.ensure_future(it.engine.retire(version, timeout_s=600.0))
            await asyncio.sleep(0)
            os.kill(link.process.pid, signal.SIGKILL)
            async with asyncio.timeout(90):
                answers = await asyncio.gather(*asked)
                await retired
            assert [answer["y"] for answer in answers] == [0.0, 2.0, 4.0, 6.0, 8.0]
            assert {answer["version"] for answer in answers} == {"1.0.0"}

    run(story)


def test_one_failing_request_leaves_the_others_alone(tmp_path: Path) -> None:
    async def story() -> None:
        async with bench(tmp_path, deaths_max=100) as box:
            version = await box.engine.load(scale_version(tmp_path / "b", handler="odd"))
            box.engine.activate(version)
            async with asyncio.TaskGroup() as group:
                failing = group.create_task(box.say("raise"))
                refusing = group.create_task(box.say("refuse"))
                fine = [group.create_task(box.say("[1, 2, 3, 4]")) for _ in range(5)]
            assert failing.result()["code"] == "handler_failed"
            assert refusing.result()["code"] == "invalid_input"
            assert all(task.result()["value"] == {"y": [[2.0, 4.0, 6.0, 8.0]]} for task in fine)

    run(story)


def test_a_request_that_kills_its_worker_twice_is_answered_and_the_model_lives(tmp_path: Path) -> None:
    async def story() -> None:
        async with bench(tmp_path, deaths_max=100) as box:
            version = await box.engine.load(scale_version(tmp_path / "b", handler="odd"))
            box.engine.activate(version)
            assert (await box.say("die"))["code"] == "worker_died"
            assert (await box.say("[1, 1, 1, 1]"))["kind"] == "result"
            await until(lambda: version.deaths == 2)

    run(story)


@pytest.mark.parametrize(
    ("how", "code"), [("raise", "handler_failed"), ("die", "worker_died"), ("hang", "worker_died")]
)
def test_what_a_version_on_trial_fails_at_is_answered_by_the_one_before(tmp_path: Path, how: str, code: str) -> None:
    async def story() -> None:
        async with bench(tmp_path, deaths_max=2, hang_timeout_s=0.3) as box:
            before = await box.engine.load(scale_version(tmp_path / "a", handler="odd"))
            box.engine.activate(before)
            box.engine.confirm(before)
            broken = scale_version(tmp_path / "b", handler="broken", version="2.0.0")
            (tmp_path / "b" / "how").write_text(how)
            trial = await box.engine.load(broken)
            box.engine.activate(trial)
            async with asyncio.TaskGroup() as group:
                asked = [group.create_task(box.say("[1, 1, 1, 1]")) for _ in range(5)]
            assert {task.result()["version"] for task in asked} == {before.version}
            assert all(task.result()["value"] == {"y": [[2.0] * 4]} for task in asked)
            assert trial.faults + trial.deaths > 0
            passed = [line for line in box.metrics.render().decode().splitlines() if "_handed_over" in line]
            assert any(code in line for line in passed)
            assert before.faults == 0
            await until(lambda: not trial.ready or how == "raise")
            assert (await box.say("[1, 1, 1, 1]"))["version"] == before.version  # also while nothing of it is left
            box.engine.confirm(trial)
            refused = await box.say("[1, 1, 1, 1]")
            assert refused["kind"] == "error", "it has earned trust: nobody stands in any more"

    run(story)


def test_who_names_a_version_on_trial_hears_what_it_says(tmp_path: Path) -> None:
    async def story() -> None:
        async with bench(tmp_path) as box:
            before = await box.engine.load(scale_version(tmp_path / "a", handler="odd"))
            box.engine.activate(before)
            trial = await box.engine.load(scale_version(tmp_path / "b", handler="broken", version="2.0.0"))
            (tmp_path / "b" / "how").write_text("raise")
            box.engine.activate(trial)
            _, named = box.request(b"[1]", {"content_type": "text/plain"}, deadline_s=30.0, version="2.0.0")
            assert (await named)[0]["code"] == "handler_failed"

    run(story)


def test_a_variant_that_keeps_dying_yields_to_the_next(tmp_path: Path) -> None:
    async def story() -> None:
        async with bench(tmp_path, deaths_max=2) as box:
            version = await box.engine.load(scale_version(tmp_path / "b", factors=(2.0, 3.0), handler="odd"))
            box.engine.activate(version)
            await box.say("die")
            await until(lambda: version.ready)
            answer = await box.say("[1, 1, 1, 1]")
            assert (answer["variant"], answer["value"]) == ("v1", {"y": [[3.0, 3.0, 3.0, 3.0]]})

    run(story)


def test_deadlines_are_answered_and_a_hung_worker_is_killed(tmp_path: Path) -> None:
    async def story() -> None:
        async with bench(tmp_path, hang_timeout_s=0.3, deaths_max=100) as box:
            version = await box.engine.load(scale_version(tmp_path / "b", handler="odd"))
            box.engine.activate(version)
            async with asyncio.TaskGroup() as group:
                late = group.create_task(box.say("hang", deadline_s=0.05))
                hung = group.create_task(box.say("hang", deadline_s=30.0))
            assert late.result()["code"] == "deadline_exceeded"
            assert hung.result()["code"] == "worker_died"
            assert (await box.say("[0, 0, 0, 0]"))["kind"] == "result"

    run(story)


def test_a_full_queue_refuses_at_once(tmp_path: Path) -> None:
    async def story() -> None:
        async with bench(tmp_path, queue_requests_max=3, hang_timeout_s=1.0, deaths_max=100) as box:
            version = await box.engine.load(scale_version(tmp_path / "b", handler="odd"))
            box.engine.activate(version)
            held = [asyncio.ensure_future(box.say("hang", deadline_s=1.0)) for _ in range(3)]
            await until(lambda: version.pool.outstanding == 3)
            refused = await box.say("[1, 1, 1, 1]")
            assert (refused["code"], refused["retryable"]) == ("overloaded", True)
            await asyncio.wait(held)

    run(story)


def test_unknown_and_expected_models_are_told_apart(tmp_path: Path) -> None:
    async def story() -> None:
        async with bench(tmp_path) as box:
            assert (await box.ask())["code"] == "unknown_model"
            box.engine.expect("scale", "its first version has not arrived yet")
            waiting = await box.ask()
            assert (waiting["code"], waiting["retryable"]) == ("unavailable", True)
            box.engine.activate(await box.engine.load(scale_version(tmp_path / "b")))
            assert (await box.ask(version="9.9.9"))["code"] == "unknown_model"

    run(story)


def test_a_cancelled_request_gets_no_answer(tmp_path: Path) -> None:
    async def story() -> None:
        async with bench(tmp_path, hang_timeout_s=0.5, deaths_max=100) as box:
            version = await box.engine.load(scale_version(tmp_path / "b", handler="odd"))
            box.engine.activate(version)
            request, answer = box.request(b"hang", {"content_type": "text/plain"}, deadline_s=30, version=None)
            box.engine.cancel(request)
            assert version.pool.outstanding == 0
            assert (await box.say("[1, 1, 1, 1]"))["kind"] == "result"  # the worker never began the other one
            assert not answer.done()

    run(story)


def test_a_worker_that_hangs_while_loading_is_killed_and_nothing_is_left(tmp_path: Path) -> None:
    async def story() -> None:
        async with bench(tmp_path, start_timeout_s=1.0) as box:
            with pytest.raises(LoadError, match="not ready within 1 s"):
                await box.engine.load(scale_version(tmp_path / "b", handler="stuck"))

    run(story)


def test_a_hung_worker_is_killed_although_every_request_has_met_its_deadline(tmp_path: Path) -> None:
    async def story() -> None:
        async with bench(tmp_path, hang_timeout_s=0.5, deaths_max=100) as box:
            version = await box.engine.load(scale_version(tmp_path / "b", handler="odd"))
            box.engine.activate(version)
            assert (await box.say("hang", deadline_s=0.05))["code"] == "deadline_exceeded"
            assert version.pool.outstanding == 0
            await until(lambda: version.deaths == 1)
            assert (await box.say("[1, 1, 1, 1]"))["kind"] == "result"

    run(story)


def test_room_made_by_a_cancel_is_given_to_whoever_waits(tmp_path: Path) -> None:
    async def story() -> None:
        async with bench(tmp_path, hang_timeout_s=0.5, deaths_max=100) as box:
            version = await box.engine.load(scale_version(tmp_path / "b", handler="odd", window=1))
            box.engine.activate(version)
            first, _ = box.request(b"hang", {"content_type": "text/plain"}, deadline_s=30, version=None)
            _, second = box.request(b"[1, 1, 1, 1]", {"content_type": "text/plain"}, deadline_s=30, version=None)
            assert len(version.pool.waiting) == 1
            box.engine.cancel(first)
            assert (await second)[0]["kind"] == "result"  # after the hung worker was killed

    run(story)


def test_a_folder_that_cannot_be_written_costs_a_worker_not_the_engine(tmp_path: Path) -> None:
    async def story() -> None:
        async with bench(tmp_path, deaths_max=100, restart_cap_s=0.01) as box:
            version = await box.engine.load(scale_version(tmp_path / "b"))
            box.engine.activate(version)
            (tmp_path / "scratch").rename(tmp_path / "hidden")
            os.kill(version.pool.links[0].process.pid, signal.SIGKILL)
            await until(lambda: version.deaths == 1)
            (tmp_path / "hidden").rename(tmp_path / "scratch")
            for left in (tmp_path / "scratch").iterdir():  # it could not be removed while it was hidden
                left.rmdir()
            assert (await box.ask())["y"] == 2.0

    run(story)


def test_a_version_without_a_variant_left_says_so_at_once_and_is_tried_again(tmp_path: Path) -> None:
    async def story() -> None:
        async with bench(tmp_path, deaths_max=2, restart_cap_s=1.0) as box:
            version = await box.engine.load(scale_version(tmp_path / "b", handler="odd"))
            box.engine.activate(version)
            assert (await box.say("die", deadline_s=3600.0))["code"] == "worker_died"
            await until(lambda: version.pool is None, turns=9000)
            refused = await box.say("[1, 1, 1, 1]", deadline_s=3600.0)
            assert (refused["code"], refused["retryable"]) == ("unavailable", True)
            await until(lambda: version.ready, turns=9000)
            assert (await box.say("[1, 1, 1, 1]"))["kind"] == "result"

    run(story)
