"""Models that come into memory when they are asked and leave when they are not: real zygote, real sandboxed workers."""

from __future__ import annotations

import asyncio
import os
import random
import signal
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from agent.config import VariantsConfig
from agent.engine.growth import Bounds
from agent.engine.learned import Learned
from agent.engine.memory import HOST, Need
from agent.engine.types import Keeping, VersionSpec
from agent.engine.version import ON_DEMAND, Version
from agent.errors import CommandError, OutOfMemoryError, OverloadedError
from agent.serving.ports import InferRequest
from agent.tensors import pack, unpack
from agent.wire import Header
from tests.integration.test_engine import Bench, bench, run, until
from tests.models import FEATURES, scale_version

pytestmark = pytest.mark.integration

MIB = 1 << 20
LAZY = Keeping(lazy=True)
# What a test's model is said to take. It is more than it does, so that the account does not change once it is measured.
WORKER = 64 * MIB
MODELS = int(os.environ.get("INFERD_RESIDENCY_MODELS", "50"))
REQUESTS = int(os.environ.get("INFERD_RESIDENCY_REQUESTS", "100"))


class FixedMeter:
    """Room for so many workers, each of which takes what it is said to."""

    def __init__(self, workers: int) -> None:
        self._room = workers * WORKER

    def rooms(self) -> Any:
        from agent.engine.memory import Room

        return {HOST: Room(budget_bytes=self._room, available_bytes=1 << 40)}

    def worker(self, _pid: int) -> dict[str, int]:
        return {HOST: WORKER}


def model(
    folder: Path, name: str, *, factor: float = 2.0, keeping: Keeping = LAZY, size: int = WORKER, **more: Any
) -> VersionSpec:
    spec = scale_version(folder / f"{name}-{more.get('version', '')}", factors=(factor,), **more)
    variants = tuple(replace(one, need=Need(sizes={HOST: size})) for one in spec.variants)
    digest = f"{name}{spec.version}".encode().hex()
    return replace(spec, model=name, digest=f"{digest:0<64}", variants=variants, keeping=keeping)


async def serve(box: Bench, spec: VersionSpec) -> Version:
    """Bring a confirmed version back, as at a start."""
    version = await box.engine.restore(spec)
    box.engine.activate(version)
    return version


def ask(box: Bench, name: str, value: float = 1.0, *, deadline_s: float = 90.0) -> asyncio.Future[dict[str, Any]]:
    entries, buffers = pack({"x": np.full((1, FEATURES), value, dtype=np.float32)})
    loop = asyncio.get_running_loop()
    answer: asyncio.Future[dict[str, Any]] = loop.create_future()

    def take(head: Any, parts: Sequence[Any]) -> None:
        header = dict(head)
        if header["kind"] == "result":
            header["y"] = float(unpack(header["tensors"], b"".join(map(bytes, parts)))["y"][0, 0])
        answer.set_result(header)

    body = b"".join(bytes(buffer) for buffer in buffers)
    box.engine.submit(
        InferRequest(
            model=name,
            version=None,
            header=Header({"kind": "infer", "tensors": entries}),
            body=body,
            deadline=loop.time() + deadline_s,
            client="test",
            answer=take,
        )
    )
    return answer


def loads(box: Bench, name: str = "inferd_model_loads") -> Counter[str]:
    counted: Counter[str] = Counter()
    for row in box.metrics.snapshot()[name]:
        counted[row["model"]] += int(row["value"])
    return counted


def limited(tmp_path: Path, workers: int, **options: Any) -> Any:
    return bench(tmp_path, meter=FixedMeter(workers), **{"memory_wait_s": 90.0, **options})


def test_a_lazy_model_is_loaded_by_its_first_requests_together(tmp_path: Path) -> None:
    async def story() -> None:
        async with bench(tmp_path) as box:
            version = await serve(box, model(tmp_path, "a", factor=3.0))
            state = box.engine.model_state("a")
            assert (state.ready, state.reason, version.ready) == (True, ON_DEMAND, False)
            assert box.engine.describe("a")["inputs"] == [{"name": "x", "datatype": "FP32", "shape": [-1, 4]}]
            answers = await asyncio.gather(*(ask(box, "a", float(number)) for number in range(20)))
            assert [answer["y"] for answer in answers] == [3.0 * number for number in range(20)]
            assert loads(box) == {"a": 1}
            assert len(version.pool.links) == 1
            assert box.engine.model_state("a").reason == ""

    run(story)


def test_an_idle_model_leaves_after_its_keep_alive_and_comes_back(tmp_path: Path) -> None:
    async def story() -> None:
        async with bench(tmp_path) as box:
            version = await serve(box, model(tmp_path, "a", keeping=Keeping(lazy=True, keep_alive_s=0.2)))
            for turn in range(1, 3):
                assert (await ask(box, "a"))["y"] == 2.0
                await until(lambda turn=turn: loads(box, "inferd_model_unloads")["a"] == turn, turns=9000)
                assert (version.asleep, version.ready) == (True, False)
            told = [event for event in box.events.recent() if event.type == "model.unloaded"]
            assert told[0].data["reason"] == "idle for 0.2 s"
            assert box.engine.status()[0]["residency"]["held_bytes"] == {}

    run(story)


def test_the_model_that_was_used_the_longest_ago_leaves_for_another(tmp_path: Path) -> None:
    async def story() -> None:
        async with limited(tmp_path, 2) as box:
            versions = {name: await serve(box, model(tmp_path, name)) for name in "abc"}
            for name in ("a", "b", "a", "c"):
                assert (await ask(box, name))["y"] == 2.0
                await asyncio.sleep(0.01)  # the loop's clock counts in milliseconds
            assert [name for name in "abc" if versions[name].ready] == ["a", "c"]
            told = [event for event in box.events.recent() if event.type == "model.unloaded"]
            assert [(event.data["model"], event.data["reason"]) for event in told] == [("b", "room for c 1.0.0")]

    run(story)


def test_eager_models_that_do_not_fit_at_the_start_wait_for_a_request(tmp_path: Path) -> None:
    async def story() -> None:
        async with limited(tmp_path, 2) as box:
            versions = [await serve(box, model(tmp_path, name, keeping=Keeping())) for name in "abc"]
            assert [version.ready for version in versions] == [True, True, False]
            assert (await ask(box, "c"))["y"] == 2.0

    run(story)


def test_a_model_that_may_not_be_unloaded_keeps_another_out_with_a_reason(tmp_path: Path) -> None:
    async def story() -> None:
        async with limited(tmp_path, 1) as box:
            await serve(box, model(tmp_path, "a", keeping=Keeping(pinned=True, keep_alive_s=0.0)))
            await serve(box, model(tmp_path, "b"))
            refused = await ask(box, "b")
            assert (refused["code"], refused["retryable"]) == ("overloaded", True)
            assert refused["retry_after_s"] > 0
            assert "a 1.0.0 (pinned)" in refused["message"]
            with pytest.raises(CommandError, match="pinned"):
                await box.engine.unload_now("a")
            with pytest.raises(OverloadedError):
                await box.engine.load_now("b")
            assert (await ask(box, "a"))["kind"] == "result"

    run(story)


def test_a_model_that_is_being_asked_does_not_leave_for_a_deployment_of_another(tmp_path: Path) -> None:
    async def story() -> None:
        async with limited(tmp_path, 1) as box:
            await serve(box, model(tmp_path, "a", keeping=Keeping()))
            assert (await ask(box, "a"))["kind"] == "result"
            with pytest.raises(OverloadedError, match=r"a 1\.0\.0 \(in use\)"):
                await box.engine.load(model(tmp_path, "b"))
            assert (await ask(box, "a"))["kind"] == "result"
            assert loads(box)["a"] == 1

    run(story)


def test_a_model_in_use_is_waited_for_and_no_longer_than_configured(tmp_path: Path) -> None:
    async def story() -> None:
        async with limited(tmp_path, 1, memory_wait_s=0.3) as box:
            await serve(box, model(tmp_path, "b"))
            held, go_on = await hold(box, await serve(box, model(tmp_path, "a")))
            refused = await ask(box, "b")
            assert (refused["code"], "in use: a 1.0.0" in refused["message"]) == ("overloaded", True)
            assert not held.done()
            late = await ask(box, "b", deadline_s=0.05)
            assert late["code"] == "deadline_exceeded"
            await until(lambda: box.engine.active("b").asleep, turns=9000)
            assert loads(box)["b"] == 0
            go_on()
            assert (await held)["y"] == 2.0

    run(story)


async def hold(box: Bench, version: Version) -> tuple[asyncio.Future[dict[str, Any]], Callable[[], None]]:
    """Load a model and stop its worker with a request in its hands; return the answer, and what lets it go on."""
    await ask(box, version.model)
    (pid,) = version.pool.pids
    os.kill(pid, signal.SIGSTOP)
    return ask(box, version.model, deadline_s=3600.0), partial(os.kill, pid, signal.SIGCONT)


def ask_text(box: Bench, name: str, text: str, *, deadline_s: float) -> asyncio.Future[dict[str, Any]]:
    loop = asyncio.get_running_loop()
    answer: asyncio.Future[dict[str, Any]] = loop.create_future()
    box.engine.submit(
        InferRequest(
            model=name,
            version=None,
            header=Header({"kind": "infer", "content_type": "text/plain"}),
            body=text.encode(),
            deadline=loop.time() + deadline_s,
            client="test",
            answer=lambda head, _: answer.set_result(dict(head)),
        )
    )
    return answer


def test_a_model_larger_than_all_memory_for_models_is_refused_as_such(tmp_path: Path) -> None:
    async def story() -> None:
        async with limited(tmp_path, 1) as box:
            version = await serve(box, model(tmp_path, "a", size=WORKER + 1))
            refused = await ask(box, "a")
            assert (refused["code"], refused["retryable"]) == ("out_of_memory", False)
            assert "it needs 65 MiB of memory, models may take 64" in refused["message"]
            state = box.engine.model_state("a")
            assert (state.ready, version.asleep) == (False, True)
            assert (await ask(box, "a"))["code"] == "out_of_memory"
            with pytest.raises(OutOfMemoryError):
                await box.engine.load(model(tmp_path, "a", size=WORKER + 1, version="2.0.0"))

    run(story)


def test_a_model_that_cannot_be_loaded_says_so_and_is_tried_again_later(tmp_path: Path) -> None:
    async def story() -> None:
        async with bench(tmp_path, variants=VariantsConfig(restart_first_s=0.3)) as box:
            spec = model(tmp_path, "a", handler="slow")
            await serve(box, spec)
            obstacle = Path(spec.variants[0].worker["bundle_dir"]) / "refuse"
            obstacle.touch()
            refused = await ask(box, "a")
            assert (refused["code"], "no variant loads" in refused["message"]) == ("unavailable", True)
            assert not box.engine.model_state("a").ready
            obstacle.unlink()
            answers: list[dict[str, Any]] = []
            for _ in range(900):
                answers.append(await ask(box, "a"))
                if answers[-1]["kind"] == "result":
                    break
                await asyncio.sleep(0.1)
            assert answers[-1]["y"] == 2.0
            assert box.engine.model_state("a").reason == ""

    run(story)


def test_a_version_on_trial_and_the_one_before_stay_until_it_is_confirmed(tmp_path: Path) -> None:
    async def story() -> None:
        async with limited(tmp_path, 2, memory_wait_s=0.1) as box:
            older = await serve(box, model(tmp_path, "a", factor=2.0))
            await serve(box, model(tmp_path, "b"))
            assert (await ask(box, "a"))["y"] == 2.0
            newer = await box.engine.load(model(tmp_path, "a", factor=3.0, version="2.0.0"))
            assert (newer.ready, older.ready) == (True, True)  # a lazy model is tried loaded
            assert box.engine.activate(newer) is older
            refused = await ask(box, "b")
            assert refused["code"] == "overloaded"
            assert "a 1.0.0 (kept for a rollback), a 2.0.0 (on trial)" in refused["message"]
            box.engine.confirm(newer)
            await box.engine.retire(older)
            assert [(await ask(box, name))["y"] for name in "bab"] == [2.0, 3.0, 2.0]

    run(story)


def test_a_new_version_takes_the_place_of_the_old_where_memory_holds_only_one(tmp_path: Path) -> None:
    """Requests wait meanwhile; a version that fails gives the place back."""

    async def story() -> None:
        async with limited(tmp_path, 1) as box:
            older = await serve(box, model(tmp_path, "a", keeping=Keeping()))
            answers: list[dict[str, Any]] = []
            stop = asyncio.Event()

            async def client() -> None:
                while not stop.is_set():
                    answers.append(await ask(box, "a"))

            async with asyncio.TaskGroup() as group:
                for _ in range(3):
                    group.create_task(client())
                await until(lambda: len(answers) > 10, turns=9000)
                broken = replace(model(tmp_path, "a", version="1.5.0"), variants=())
                with pytest.raises(Exception, match="no variant"):
                    await box.engine.load(broken)
                newer = await box.engine.load(model(tmp_path, "a", factor=3.0, version="2.0.0"))
                assert not older.ready
                assert box.engine.activate(newer) is older
                box.engine.confirm(newer)
                await box.engine.retire(older)
                await until(lambda: answers[-1].get("version") == "2.0.0", turns=9000)
                stop.set()
            assert {answer["kind"] for answer in answers} == {"result"}
            assert {(answer["version"], answer["y"]) for answer in answers} == {("1.0.0", 2.0), ("2.0.0", 3.0)}

    run(story)


def test_a_failed_trial_in_place_of_the_old_version_brings_it_back(tmp_path: Path) -> None:
    async def story() -> None:
        async with limited(tmp_path, 1) as box:
            older = await serve(box, model(tmp_path, "a", keeping=Keeping()))
            spec = model(tmp_path, "a", version="2.0.0")
            damaged = Path(spec.variants[0].worker["bundle_dir"]) / spec.variants[0].worker["entry"]
            damaged.write_bytes(b"damaged")
            with pytest.raises(Exception, match="no variant loads"):
                await box.engine.load(spec)
            await until(lambda: older.ready, turns=9000)
            assert (await ask(box, "a"))["version"] == "1.0.0"

    run(story)


def test_a_rollback_to_a_version_that_was_unloaded_answers_what_waits(tmp_path: Path) -> None:
    async def story() -> None:
        async with limited(tmp_path, 1) as box:
            older = await serve(box, model(tmp_path, "a", keeping=Keeping()))
            newer = await box.engine.load(model(tmp_path, "a", factor=3.0, version="2.0.0"))
            box.engine.activate(newer)
            assert (await ask(box, "a"))["y"] == 3.0
            box.engine.activate(older)
            waiting = ask(box, "a")
            await box.engine.retire(newer)
            assert (await waiting)["version"] == "1.0.0"

    run(story)


def test_a_lazy_model_grows_and_leaves_with_all_its_workers(tmp_path: Path) -> None:
    async def story() -> None:
        async with limited(tmp_path, 3) as box:
            bounds = Bounds(least=2, most=3, grow_delay_s=0.02, shrink_idle_s=3600.0)
            grown = await serve(box, model(tmp_path, "a", handler="slow", version="1.0.0", bounds=bounds))
            await serve(box, model(tmp_path, "b", size=2 * WORKER))
            asked = [ask_text(box, "a", "0.02", deadline_s=90.0) for _ in range(100)]
            await until(lambda: grown.pool is not None and len(grown.pool.links) == 3, turns=9000)
            assert {answer["kind"] for answer in await asyncio.gather(*asked)} == {"result"}
            assert (await box.engine.memory())[HOST]["held_bytes"] == 3 * WORKER
            assert (await ask(box, "b"))["y"] == 2.0
            assert not grown.ready
            assert (await box.engine.memory())[HOST]["held_bytes"] == WORKER  # once it was measured

    run(story)


def test_an_operator_loads_and_unloads_without_losing_requests(tmp_path: Path) -> None:
    async def story() -> None:
        async with bench(tmp_path) as box:
            version = await serve(box, model(tmp_path, "a"))
            await box.engine.load_now("a")
            assert version.ready
            for _ in range(5):
                asked = [ask(box, "a") for _ in range(300 // 5)]
                await box.engine.unload_now("a")
                assert {answer["kind"] for answer in await asyncio.gather(*asked)} == {"result"}
                await box.engine.load_now("a")
            assert loads(box, "inferd_model_unloads")["a"] == 5

    run(story)


def test_what_a_model_takes_is_learned_and_known_after_a_restart(tmp_path: Path) -> None:
    async def story() -> None:
        path = tmp_path / "memory.json"
        for known in (False, True):
            async with bench(tmp_path, learned=Learned(path, "box")) as box:
                version = await serve(box, model(tmp_path, "a", size=1 << 40 if known else WORKER))
                assert version.residency()["source"] == ("measured" if known else "estimated")
                assert (await ask(box, "a"))["y"] == 2.0
                await until(lambda: version.residency()["source"] == "measured", turns=9000)  # noqa: B023
                assert MIB < version.residency()["worker_bytes"][HOST] < 256 * MIB

    run(story)


def test_many_more_models_than_fit_are_served_in_turn(tmp_path: Path) -> None:
    """Concurrent clients over fifty models, of which five fit: each request is answered by the model it was for."""

    async def story() -> None:
        fit, clients = 5, 8
        names = [f"m{number:02}" for number in range(MODELS)]
        async with limited(tmp_path, fit) as box:
            for number, name in enumerate(names):
                await serve(box, model(tmp_path, name, factor=float(number + 1)))
            rng = random.Random(7)
            popular = rng.choices(names, weights=[1 / (rank + 1) for rank in range(MODELS)], k=REQUESTS)
            todo = [*names, *popular]
            wrong: list[dict[str, Any]] = []
            workers_most = 0

            async def client() -> None:
                nonlocal workers_most
                while todo:
                    name = todo.pop()
                    answer = await ask(box, name, 2.0)
                    if answer.get("y") != 2.0 * (names.index(name) + 1):
                        wrong.append(answer)
                    roles = [row["role"] for row in box.engine.processes()]
                    workers_most = max(workers_most, sum(role.startswith("worker") for role in roles))

            async with asyncio.TaskGroup() as group:
                for _ in range(clients):
                    group.create_task(client())
            assert wrong == []
            assert workers_most <= fit
            loaded, unloaded = loads(box), loads(box, "inferd_model_unloads")
            assert set(loaded) == set(names)
            assert loaded.total() - unloaded.total() <= fit
            assert unloaded.total() >= MODELS - fit
            assert not [event for event in box.events.recent() if event.type == "worker.died"]
            print(f"{MODELS} models, room for {fit}: {MODELS + REQUESTS} requests, {loaded.total()} loads, 0 failed")

    run(story)


def test_a_request_withdrawn_while_its_model_waits_for_memory_is_forgotten(tmp_path: Path) -> None:
    async def story() -> None:
        async with limited(tmp_path, 1) as box:
            waiting = await serve(box, model(tmp_path, "b"))
            held, go_on = await hold(box, await serve(box, model(tmp_path, "a")))
            request = InferRequest(
                model="b",
                version=None,
                header=Header({"kind": "infer", "content_type": "text/plain"}),
                body=b"",
                deadline=asyncio.get_running_loop().time() + 3600.0,
                client="test",
                answer=lambda _head, _body: pytest.fail("answered although it was withdrawn"),
            )
            box.engine.submit(request)
            assert not waiting.asleep
            box.engine.cancel(request)
            await until(lambda: waiting.asleep, turns=9000)
            assert loads(box)["b"] == 0
            go_on()
            assert (await held)["y"] == 2.0

    run(story)
