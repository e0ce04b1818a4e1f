"""Down the ladder and up again: real workers that crash, run out of memory, lose their device or are slow."""

from __future__ import annotations

import asyncio
import os
import signal
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from agent.config import VariantsConfig
from agent.engine.book import VariantBook
from agent.engine.types import Keeping, VersionSpec
from agent.engine.version import Version
from agent.errors import LoadError, UnloadableError, WorkerDiedError
from agent.tensors import pack, unpack
from tests.integration.test_engine import Bench, bench, run
from tests.models import scale_version
from tools.hub import safetensors

pytestmark = pytest.mark.integration
PATIENCE_S = 90.0
LIMIT_BYTES = 400 << 20
EAGER = VariantsConfig(restart_first_s=0.05, retry_first_s=0.05, retry_cap_s=3600, idle_s=0.0)
NEVER = VariantsConfig(restart_first_s=3000, retry_first_s=3000, idle_s=0.0)


async def until(condition: Any) -> None:
    deadline = asyncio.get_running_loop().time() + PATIENCE_S
    while not condition():
        assert asyncio.get_running_loop().time() < deadline, "it never happened"
        await asyncio.sleep(0.01)


def write_hungry_model(path: Path, *, factor: float, copies: int) -> None:
    """Write ``y = factor * x``, ``[N, L]``, that takes ``4 * copies`` bytes of memory for each number."""
    path.parent.mkdir(parents=True, exist_ok=True)
    shape = ["N", "L"]
    graph = helper.make_graph(
        [
            helper.make_node("Unsqueeze", ["x", "last"], ["deep"]),
            helper.make_node("Expand", ["deep", "copies"], ["many"]),
            helper.make_node("ReduceMean", ["many"], ["mean"], axes=[2], keepdims=0),
            helper.make_node("Mul", ["mean", "factor"], ["y"]),
        ],
        "hungry",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, shape)],
        [
            numpy_helper.from_array(np.array([2], dtype=np.int64), "last"),
            numpy_helper.from_array(np.array([1, 1, copies], dtype=np.int64), "copies"),
            numpy_helper.from_array(np.array(factor, dtype=np.float32), "factor"),
        ],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=10), str(path))


def hungry_version(folder: Path, *variants: tuple[float, int] | None, version: str = "1.0.0") -> VersionSpec:
    """Return a version of hungry models, each ``(factor, copies)``, under a limit of their address space."""
    spec = scale_version(folder, version=version, factors=tuple(None if one is None else one[0] for one in variants))
    changed = []
    for variant, one in zip(spec.variants, variants, strict=True):
        if one is not None:
            write_hungry_model(folder / variant.worker["entry"], factor=one[0], copies=one[1])
        signature = {
            "inputs": [{"name": "x", "dtype": "float32", "shape": ["N", "L"]}],
            "outputs": [{"name": "y", "dtype": "float32", "shape": ["N", "L"]}],
            "dims": {"L": {"min": 1, "max": 4096}},
        }
        worker = {
            **variant.worker,
            "signature": signature,
            "batching": {"max_batch": 16, "max_delay_ms": 0, "axis": "N"},
            "limits": {"memory_bytes": LIMIT_BYTES, "open_files": 256},
        }
        changed.append(replace(variant, worker=worker))
    return replace(spec, variants=tuple(changed))


async def send(box: Bench, rows: int, length: int) -> dict[str, Any]:
    """Ask with ones; ``y`` is the first output, which all must equal."""
    entries, buffers = pack({"x": np.ones((rows, length), dtype=np.float32)})
    _, answer = box.request(
        b"".join(bytes(buffer) for buffer in buffers), {"tensors": entries}, deadline_s=PATIENCE_S, version=None
    )
    header, raw = await answer
    if header["kind"] == "result":
        y = unpack(header["tensors"], raw)["y"]
        assert y.shape == (rows, length)
        assert len(np.unique(y)) == 1
        header["y"] = float(y[0, 0])
    return header


def happened(box: Bench, kind: str) -> list[dict[str, Any]]:
    return [event.data for event in box.events.recent() if event.type == kind]


async def serve(box: Bench, spec: VersionSpec) -> Version:
    version = await box.engine.load(spec)
    box.engine.activate(version)
    return version


def variant_row(version: Version, name: str) -> dict[str, Any]:
    return next(row for row in version.status()["variants"] if row["variant"] == name)


COPIES = 1 << 20  # 4 MiB for each number


def test_a_request_whose_rows_do_not_fit_together_runs_in_pieces(tmp_path: Path) -> None:
    async def story() -> None:
        async with bench(tmp_path, variants=NEVER) as box:
            version = await serve(box, hungry_version(tmp_path / "b", (2.0, COPIES), (3.0, 1)))
            answer = await send(box, 16, 16)  # a gigabyte
            assert (answer["kind"], answer.get("y"), answer["variant"]) == ("result", 2.0, "v0")
            (told,) = happened(box, "batch.shrunk")[-1:]
            assert 1 <= told["rows_max"] < 16
            assert version.status()["max_batch"] == told["rows_max"]
            answers = await asyncio.gather(*(send(box, 2, 8) for _ in range(16)))
            assert {(one["kind"], one.get("y")) for one in answers} == {("result", 2.0)}
            assert not version.skipped
            assert not version.deaths

    run(story)


def test_a_request_that_does_not_fit_at_all_is_answered_by_the_next_variant(tmp_path: Path) -> None:
    async def story() -> None:
        async with bench(tmp_path, variants=NEVER) as box:
            version = await serve(box, hungry_version(tmp_path / "b", (2.0, COPIES), None, (3.0, 1)))
            asked = [asyncio.ensure_future(send(box, 1, 512)) for _ in range(3)]
            assert (await send(box, 1, 1))["y"] == 2.0  # v0 serves on until another can
            answers = await asyncio.gather(*asked)  # v1 is no model
            assert {(answer["kind"], answer.get("y"), answer["variant"]) for answer in answers} == {
                ("result", 3.0, "v2")
            }
            assert (await send(box, 1, 600))["y"] == 3.0
            assert [row["code"] for row in version.skipped] == ["out_of_memory", "unloadable"]
            assert happened(box, "variant.changed")[-1]["before"] == "v0"

    run(story)


def test_a_request_too_large_for_every_variant_is_refused_and_moves_nothing_twice(tmp_path: Path) -> None:
    async def story() -> None:
        async with bench(tmp_path, variants=EAGER) as box:
            version = await serve(box, hungry_version(tmp_path / "b", (2.0, COPIES), (3.0, COPIES)))
            assert (await send(box, 1, 512))["code"] == "out_of_memory"
            await until(lambda: version.pool is not None and version.pool.spec.id == "v0" and version.ready)
            assert (await send(box, 1, 1))["y"] == 2.0
            changes = len(happened(box, "variant.changed"))
            assert changes == 2  # down, and up again
            for length in (512, 600):
                refused = await send(box, 1, length)
                assert (refused["code"], refused["kind"]) == ("out_of_memory", "error")
            assert len(happened(box, "variant.changed")) == changes
            assert variant_row(version, "v0")["state"] == "serving"

    run(story)


def on_device(spec: VersionSpec, *devices: str) -> VersionSpec:
    """Return the version as if its variants were pinned to these devices; their workers stay on the CPU."""
    variants = [
        replace(variant, device=device, pinned_device="" if device == "cpu" else device)
        for variant, device in zip(spec.variants, devices, strict=True)
    ]
    return replace(spec, variants=tuple(variants))


def test_a_lost_device_ends_its_variants_and_its_return_brings_them_back(tmp_path: Path) -> None:
    async def story() -> None:
        async with bench(tmp_path, variants=EAGER) as box:
            spec = scale_version(tmp_path / "b", factors=(2.0, 3.0), handler="odd")
            version = await serve(box, on_device(spec, "cuda:0", "cpu"))
            assert version.pool is not None
            (link,) = version.pool.links
            os.kill(link.process.pid, signal.SIGSTOP)  # a driver in trouble does not answer
            asked = [asyncio.ensure_future(box.say("[1, 1, 1, 1]", deadline_s=PATIENCE_S)) for _ in range(5)]
            await until(lambda: version.pool is not None and version.pool.outstanding == 5)
            box.engine.device_lost("cuda:1", "another one")
            assert not version.skipped
            box.engine.device_lost("cuda:0", "GPU is lost")
            answers = await asyncio.gather(*asked)
            assert {(answer["kind"], answer.get("variant")) for answer in answers} == {("result", "v1")}
            assert version.skipped == [
                {"variant": "v0", "code": "device_lost", "reason": "cuda:0 is lost: GPU is lost"}
            ]
            assert variant_row(version, "v0")["retry_s"] is None
            box.engine.device_back("cuda:0")
            await until(lambda: version.pool is not None and version.pool.spec.id == "v0")
            assert (await box.say("[1, 1, 1, 1]"))["variant"] == "v0"
            assert not version.skipped

    run(story)


def test_without_another_variant_the_model_waits_for_its_device_and_says_so(tmp_path: Path) -> None:
    async def story() -> None:
        async with bench(tmp_path, variants=EAGER) as box:
            version = await serve(box, on_device(scale_version(tmp_path / "b"), "cuda:0"))
            box.engine.device_lost("cuda:0", "GPU is lost")
            await until(lambda: "no variant loads" in box.engine.model_state("scale").reason)
            state = box.engine.model_state("scale")
            assert not state.ready
            assert "v0: cuda:0 is lost: GPU is lost" in state.reason
            assert (await box.ask())["code"] == "unavailable"
            box.engine.device_back("cuda:0")
            await until(lambda: version.ready)
            assert (await box.ask())["y"] == 2.0
            assert box.engine.model_state("scale").reason == ""

    run(story)


def test_a_crash_loop_is_remembered_over_a_restart_and_forgiven_in_the_end(tmp_path: Path) -> None:
    path = tmp_path / "variants.json"

    async def crash() -> None:
        async with bench(tmp_path, book=VariantBook(path, "box"), deaths_max=2, variants=NEVER) as box:
            version = await serve(box, scale_version(tmp_path / "b", factors=(2.0, 3.0), handler="odd"))
            await box.say("die")
            await until(lambda: version.ready and version.pool is not None and version.pool.spec.id == "v1")
            assert "deaths within" in version.skipped[0]["reason"]

    async def start_again() -> None:
        async with bench(tmp_path, book=VariantBook(path, "box"), variants=NEVER) as box:
            version = await serve(box, scale_version(tmp_path / "b", factors=(2.0, 3.0), handler="odd"))
            assert (await box.say("[1, 1, 1, 1]"))["variant"] == "v1"
            row = variant_row(version, "v0")
            assert (row["state"], row["kind"], row["failures"]) == ("failed", "crash", 1)

    async def come_back() -> None:
        config = replace_config(EAGER, healthy_s=0.01)
        async with bench(tmp_path, book=VariantBook(path, "box"), variants=config) as box:
            version = await serve(box, scale_version(tmp_path / "b", factors=(2.0, 3.0), handler="odd"))
            await until(lambda: version.pool is not None and version.pool.spec.id == "v0" and version.ready)
            digest = version.spec.digest
            await until(lambda: not VariantBook(path, "box").falls(digest))

    run(crash)
    run(start_again)
    run(come_back)


def test_the_only_variant_is_started_although_it_is_remembered_to_crash(tmp_path: Path) -> None:
    path = tmp_path / "variants.json"

    async def story() -> None:
        async with bench(tmp_path, book=VariantBook(path, "box"), deaths_max=2, variants=EAGER) as box:
            version = await serve(box, scale_version(tmp_path / "b", handler="odd"))
            assert (await box.say("die"))["code"] == "worker_died"
            await until(lambda: version.ready)
            assert (await box.say("[1, 1, 1, 1]"))["kind"] == "result"
        async with bench(tmp_path, book=VariantBook(path, "box"), variants=NEVER) as box:
            await serve(box, scale_version(tmp_path / "b", handler="odd"))
            assert (await box.say("[1, 1, 1, 1]"))["kind"] == "result"

    run(story)


def test_a_crash_loop_is_found_although_the_model_sleeps_between_its_requests(tmp_path: Path) -> None:
    async def story() -> None:
        async with bench(tmp_path, deaths_max=4, variants=NEVER) as box:
            spec = scale_version(tmp_path / "b", factors=(2.0, 3.0), handler="odd")
            version = await box.engine.restore(replace(spec, keeping=Keeping(lazy=True, keep_alive_s=0.0)))
            box.engine.activate(version)
            for _ in range(2):  # each is tried twice
                assert (await box.say("die"))["code"] == "worker_died"
                await until(lambda: version.asleep or bool(version.skipped))
            assert version.skipped[0]["code"] == "worker_died"
            assert "4 deaths within 60 s" in version.skipped[0]["reason"]
            assert (await box.say("[1, 1, 1, 1]"))["variant"] == "v1"

    run(story)


def test_what_fails_the_same_way_each_time_is_not_tried_again(tmp_path: Path) -> None:
    async def story() -> None:
        async with bench(tmp_path, deaths_max=100, variants=EAGER) as box:
            version = await serve(box, scale_version(tmp_path / "b", factors=(2.0, 3.0)))
            (tmp_path / "b/v0/model.onnx").write_bytes(b"no model any more")
            os.kill(version.pool.links[0].process.pid, signal.SIGKILL)  # type: ignore[union-attr]
            await until(lambda: version.ready and version.pool.spec.id == "v1")  # type: ignore[union-attr]
            row = variant_row(version, "v0")
            assert (row["kind"], row["retry_s"]) == ("permanent", None)
            with pytest.raises(UnloadableError):
                await box.engine.load(scale_version(tmp_path / "c", factors=(None,)))

    run(story)


def test_nothing_left_is_said_with_the_time_of_the_next_try(tmp_path: Path) -> None:
    async def story() -> None:
        async with bench(tmp_path, deaths_max=1, variants=replace_config(NEVER, restart_first_s=600)) as box:
            await serve(box, scale_version(tmp_path / "b", handler="odd"))
            await box.say("die")
            await until(lambda: "tried again in" in box.engine.model_state("scale").reason)
            first = box.engine.model_state("scale").reason
            assert "1 deaths within" in first
            await until(lambda: box.engine.model_state("scale").reason != first)  # a second later it is one fewer
            row = box.engine.status()[0]
            assert row["lasting"] == first.partition("; tried again")[0]

    run(story)


def test_a_worker_that_does_not_answer_its_self_test_is_killed(tmp_path: Path) -> None:
    async def story() -> None:
        async with bench(tmp_path, deaths_max=100) as box:
            version = await serve(box, scale_version(tmp_path / "b"))
            assert version.pool is not None
            os.kill(version.pool.links[0].process.pid, signal.SIGSTOP)
            with pytest.raises(WorkerDiedError, match="did not answer selftest"):
                await version.self_test(timeout_s=0.2)
            await until(lambda: version.deaths == 1 and version.ready)
            assert (await version.self_test(timeout_s=PATIENCE_S))["ok"]

    run(story)


@dataclass(frozen=True)
class Contest:
    """An int8 variant, ranked first, against an exact one: ``(factor, copies)`` of each, and who is to win."""

    version: str
    int8: tuple[float, int]
    exact: tuple[float, int]
    serving: str
    reason: str

    def spec(self, folder: Path) -> VersionSpec:
        """Write the bundle."""
        spec = hungry_version(folder, self.int8, self.exact, version=self.version)
        x = np.arange(1, 17, dtype=np.float32).reshape(4, 4)
        (folder / "golden").mkdir()
        (folder / "golden/in").write_bytes(safetensors.dump({"x": x}))
        (folder / "golden/out").write_bytes(safetensors.dump({"y": x * np.float32(self.exact[0])}))
        compare = [{"output": "y", "metric": "max_abs", "atol": 1000.0}]  # what the publisher lets pass
        golden = [{"id": "g", "inputs": "golden/in", "outputs": "golden/out", "compare": compare, "timeout_ms": 60000}]
        variants = [
            replace(variant, precision=precision, worker={**variant.worker, "golden": golden})
            for variant, precision in zip(spec.variants, ("int8", "fp32"), strict=True)
        ]
        return replace(spec, variants=tuple(variants))


CONTESTS = (
    Contest("1.0.0", int8=(2.0, 1), exact=(2.0, 1 << 18), serving="v0", reason="faster and agrees here"),
    Contest("2.0.0", int8=(2.0, 1 << 18), exact=(2.0, 1), serving="v1", reason="not faster here"),
    Contest("3.0.0", int8=(-2.0, 1), exact=(2.0, 1 << 18), serving="v1", reason="disagrees: cosine -1"),
)


def test_an_int8_variant_serves_only_once_it_is_measured_to_be_worth_it(tmp_path: Path) -> None:
    path = tmp_path / "variants.json"
    specs = [contest.spec(tmp_path / contest.version) for contest in CONTESTS]

    async def first() -> None:
        async with bench(tmp_path, book=VariantBook(path, "box"), variants=EAGER) as box:
            for number, (contest, spec) in enumerate(zip(CONTESTS, specs, strict=True)):
                version = await box.engine.load(spec)
                assert version.pool is not None
                assert version.pool.spec.id == "v1"  # nothing is known yet
                before = box.engine.activate(version)
                await until(lambda number=number: len(happened(box, "variant.measured")) == number + 1)
                await until(
                    lambda contest=contest, version=version: version.ready and version.pool.spec.id == contest.serving
                )
                measured = variant_row(version, "v0")["measured"]
                assert contest.reason in measured["reason"]
                assert min(measured["own"]["p50_ms"], measured["rival"]["p50_ms"]) > 0
                assert (await send(box, 1, 4))["variant"] == contest.serving
                assert not version.deaths
                if before is not None:
                    await box.engine.retire(before)

    async def again() -> None:
        async with bench(tmp_path, book=VariantBook(path, "box"), variants=NEVER) as box:
            for contest, spec in zip(CONTESTS, specs, strict=True):
                version = await box.engine.load(spec)
                assert version.pool is not None
                assert version.pool.spec.id == contest.serving
            assert not happened(box, "variant.measured")

    run(first)
    run(again)


def test_a_better_variant_comes_back_without_losing_a_request(tmp_path: Path) -> None:
    async def story() -> None:
        config = replace_config(EAGER, patience_s=0.05)
        async with bench(tmp_path, variants=config) as box:
            spec = scale_version(tmp_path / "b", factors=(2.0, 3.0), handler="slow")
            (tmp_path / "b/refuse").touch()
            with pytest.raises(LoadError):
                await box.engine.load(spec)
            (tmp_path / "b/refuse").unlink()
            await serve(box, on_device(spec, "cuda:0", "cpu"))
            stop, answers = asyncio.Event(), []

            async def client() -> None:
                while not stop.is_set():
                    answers.append(await box.say("0.002", deadline_s=PATIENCE_S))
                    await asyncio.sleep(0)

            async with asyncio.TaskGroup() as group:
                for _ in range(4):
                    group.create_task(client())
                for _ in range(3):
                    box.engine.device_lost("cuda:0", "lost")
                    await until(lambda: answers and answers[-1].get("variant") == "v1")
                    box.engine.device_back("cuda:0")
                    await until(lambda: answers[-1].get("variant") == "v0")
                stop.set()
            assert {answer["kind"] for answer in answers} == {"result"}
            assert {answer["variant"] for answer in answers} == {"v0", "v1"}

    run(story)


def replace_config(config: VariantsConfig, **changes: Any) -> VariantsConfig:
    return VariantsConfig(**{name: getattr(config, name) for name in config.__struct_fields__} | changes)
