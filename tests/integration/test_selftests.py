"""Self-tests of what serves: real workers whose model drifts, freezes or dies after it has been loaded."""

from __future__ import annotations

import asyncio
import os
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from agent.adapters import LoadedVersion
from agent.config import VariantsConfig
from agent.engine.growth import Bounds
from agent.engine.types import Keeping, VersionSpec
from agent.engine.version import Version
from agent.errors import WorkerDiedError
from tests.integration.test_engine import Bench, bench, run
from tests.integration.test_ladder import until
from tests.models import FEATURES, scale_version
from tools.hub import safetensors

pytestmark = pytest.mark.integration
OFTEN = {"selftest_interval_s": 0.05, "selftest_share_max": 1.0, "deaths_max": 1000}
LADDER = VariantsConfig(restart_first_s=0.05, retry_first_s=3000, idle_s=0.0)
NEVER = VariantsConfig(restart_first_s=3000, retry_first_s=3000, idle_s=0.0)
LOADS = 2  # runs that each load makes: one to warm up, one golden input


def fickle(folder: Path, *, variants: int = 2, bounds: Bounds | None = None, **compare: Any) -> VersionSpec:
    """Return a version whose variants go wrong when ``tell`` says so; both give the same answers."""
    spec = scale_version(folder, factors=(2.0,) * variants, handler="fickle", bounds=bounds)
    x = np.arange(2 * FEATURES, dtype=np.float32).reshape(2, FEATURES)
    (folder / "in").write_bytes(safetensors.dump({"x": x}))
    (folder / "out").write_bytes(safetensors.dump({"y": x * 2}))
    rule = {"output": "y", "metric": "max_abs", "atol": 1e-3, **compare}
    golden = [{"id": "g", "inputs": "in", "outputs": "out", "compare": [rule], "timeout_ms": 60_000}]
    return replace(spec, variants=tuple(replace(one, worker={**one.worker, "golden": golden}) for one in spec.variants))


def tell(folder: Path, kind: str, variant: str, *, runs: int = 0) -> Path:
    """Let a variant go wrong after so many good runs of a worker."""
    path = folder / f"{kind}-{variant}"
    path.write_text(str(runs))
    return path


async def serve(box: Bench, spec: VersionSpec) -> Version:
    version = await box.engine.load(spec)
    box.engine.activate(version)
    box.engine.confirm(version)
    return version


def happened(box: Bench, kind: str) -> list[dict[str, Any]]:
    return [event.data for event in box.events.recent() if event.type == kind]


def serving(version: Version) -> str:
    return version.pool.spec.id if version.pool is not None and version.ready else ""


def counted(box: Bench) -> dict[str, float]:
    return {row["result"]: row["value"] for row in box.metrics.snapshot()["inferd_selftests"]}


def test_an_idle_model_is_tested_and_that_is_no_traffic(tmp_path: Path) -> None:
    async def story() -> None:
        async with bench(tmp_path, variants=LADDER, **OFTEN) as box:
            version = await serve(box, fickle(tmp_path / "b", bounds=Bounds(least=2, most=2)))
            assert version.pool is not None
            await until(lambda: version.pool is not None and len(version.pool.links) == 2)
            used_at, pids = version.used_at, set(version.pool.pids)
            await until(lambda: bool(box.metrics.snapshot()["inferd_selftests"]) and counted(box)["ok"] >= 3)
            assert (version.good, version.faults, version.used_at) == (0, 0, used_at)
            assert set(version.pool.pids) == pids
            row = version.status()["selftest"]
            assert (row["ok"], row["variant"], row["message"]) == (True, "v0", "")
            assert version.tests.last is not None
            assert version.tests.last.workers == 2
            assert not happened(box, "selftest.failed")

    run(story)


@pytest.mark.parametrize(
    ("kind", "code", "words"),
    [
        ("drift", "selftest_failed", "golden 'g', output 'y', max_abs: differs by up to 1, allowed is 0.001"),
        ("freeze", "worker_died", "the worker did not answer selftest within"),
        ("crash", "worker_died", "the worker died"),
    ],
)
def test_what_does_not_pass_is_restarted_then_left_then_unready_and_comes_back(
    tmp_path: Path, kind: str, code: str, words: str
) -> None:
    async def story() -> None:
        async with bench(tmp_path, variants=LADDER, hang_timeout_s=1.5, **OFTEN) as box:
            version = await serve(box, fickle(tmp_path / "b"))
            assert version.pool is not None
            (first,) = version.pool.pids
            told = tell(tmp_path / "b", kind, "v0", runs=LOADS)
            await until(lambda: bool(happened(box, "selftest.failed")))
            failed = happened(box, "selftest.failed")[0]
            assert (failed["variant"], failed["code"], failed["act"]) == ("v0", code, "restart")
            assert words in failed["reason"]
            await until(lambda: serving(version) == "v1")  # the next one passed its load, and failed then, too
            assert first not in version.pool.pids
            assert [one["act"] for one in happened(box, "selftest.failed")][:2] == ["restart", "leave"]
            (skip,) = [one for one in version.skipped if one["variant"] == "v0"]
            assert (skip["code"], words in skip["reason"]) == (code, True)
            assert (await box.ask())["y"] == 2.0

            also = [tell(tmp_path / "b", kind, "v1", runs=LOADS), tell(tmp_path / "b", "drift", "v0")]  # at its load
            await until(lambda: not box.engine.model_state("scale").ready and "no variant loads" in version.reason)
            for path in (told, *also):
                path.unlink(missing_ok=True)
            await until(lambda: bool(serving(version)))
            assert (await box.ask())["y"] == 2.0

    run(story)


def test_a_model_that_passes_again_says_so_and_keeps_its_variant(tmp_path: Path) -> None:
    async def story() -> None:
        async with bench(tmp_path, variants=NEVER, **OFTEN) as box:
            version = await serve(box, fickle(tmp_path / "b"))
            assert version.pool is not None
            (pid,) = version.pool.pids
            os.kill(pid, signal.SIGKILL)
            told = tell(tmp_path / "b", "drift", "v0", runs=LOADS)
            await until(lambda: bool(happened(box, "selftest.failed")))
            told.unlink()
            await until(lambda: bool(happened(box, "selftest.passed")))
            assert serving(version) == "v0"
            assert version.status()["selftest"]["ok"]

    run(story)


def test_wrong_answers_of_a_fresh_worker_leave_the_variant_at_once(tmp_path: Path) -> None:
    async def story() -> None:
        async with bench(tmp_path, variants=NEVER, deaths_max=1000) as box:
            version = await serve(box, fickle(tmp_path / "b"))
            assert version.pool is not None
            tell(tmp_path / "b", "drift", "v0")
            os.kill(version.pool.pids[0], signal.SIGKILL)
            await until(lambda: serving(version) == "v1")
            assert version.skipped[0]["code"] == "selftest_failed"
            assert version.deaths == 1

    run(story)


def test_a_test_on_demand_tells_figures_and_acts_like_the_others(tmp_path: Path) -> None:
    async def story() -> None:
        async with bench(tmp_path, variants=NEVER) as box:
            version = await serve(box, fickle(tmp_path / "b", metric="cosine", min=0.9))
            value = await box.engine.self_test("scale")
            assert (value["ok"], value["variant"], value["workers"], value["act"]) == (True, "v0", 1, "")
            (row,) = value["golden"]
            assert (row["id"], row["ok"], row["ms_max"]) == ("g", True, 60_000)
            assert row["checks"] == [
                {"output": "y", "metric": "cosine", "ok": True, "found": 1.0, "bound": "at least 0.9"}
            ]
            tell(tmp_path / "b", "drift", "v0", runs=LOADS)
            assert (await box.engine.self_test("scale"))["golden"][0]["checks"][0]["found"] < 1  # and near enough
            for act in ("restart", "leave"):
                await until(lambda: version.ready)
                tell(tmp_path / "b", "crash", "v0", runs=LOADS)
                value = await box.engine.self_test("scale")
                assert (value["ok"], value["act"], value["code"]) == (False, act, "worker_died")
            await until(lambda: serving(version) == "v1")

    run(story)


def test_a_sleeping_model_is_not_woken_but_by_name(tmp_path: Path) -> None:
    async def story() -> None:
        async with bench(tmp_path, variants=LADDER, **OFTEN) as box:
            spec = replace(fickle(tmp_path / "b"), keeping=Keeping(lazy=True))
            version = await box.engine.restore(spec)
            box.engine.activate(version)
            awake = await serve(box, replace(fickle(tmp_path / "c"), model="awake"))
            for _ in range(3):
                before = awake.tests.tested_at
                await until(lambda: awake.tests.tested_at > before)  # noqa: B023
            assert version.asleep
            told = await box.engine.self_test("scale", wake=False)
            assert (told["ok"], told["message"]) == (True, "not loaded, loads on demand")
            assert (await box.engine.self_test("scale"))["ok"]
            assert version.ready

    run(story)


def test_a_version_on_trial_is_not_restarted_by_its_tests(tmp_path: Path) -> None:
    """Its deployment judges it: each failure is evidence, and a restart would hide it."""

    async def story() -> None:
        async with bench(tmp_path, variants=LADDER, **OFTEN) as box:
            version = await box.engine.load(fickle(tmp_path / "b"))
            box.engine.activate(version)
            assert version.pool is not None
            (pid,) = version.pool.pids
            tell(tmp_path / "b", "drift", "v0", runs=LOADS)
            value = await box.engine.self_test("scale")
            assert (value["ok"], value["act"]) == (False, "")
            assert version.pool.pids == [pid]

    run(story)


def test_an_engine_that_is_stopped_as_a_worker_answers_its_test_stops(tmp_path: Path) -> None:
    async def story() -> None:
        async with bench(tmp_path, variants=NEVER, **OFTEN) as box:
            version = await serve(box, fickle(tmp_path / "b"))
            assert version.pool is not None
            calls = version.pool._calls
            await until(lambda: any(not answer.done() for _, answer in calls.values()))
            for _, answer in calls.values():
                answer.set_result({"ok": True, "golden": []})  # and the end of the bench stops it in the same step

    run(story)


def test_what_hangs_on_trial_is_waited_for_as_long_as_any_worker(tmp_path: Path) -> None:
    async def story() -> None:
        async with bench(tmp_path, variants=NEVER, hang_timeout_s=1.5) as box:
            version = await serve(box, fickle(tmp_path / "b"))
            tell(tmp_path / "b", "freeze", "v0", runs=LOADS)
            with pytest.raises(WorkerDiedError, match=r"within 1\.5 s"):
                await LoadedVersion(box.engine, version, beside=False).self_test()

    run(story)


def test_the_others_are_served_while_one_hangs_in_its_test(tmp_path: Path) -> None:
    async def story() -> None:
        async with bench(tmp_path, variants=NEVER, hang_timeout_s=1.5, **OFTEN) as box:
            frozen = await serve(box, replace(fickle(tmp_path / "a"), model="frozen"))
            await serve(box, scale_version(tmp_path / "b", version="2.0.0"))
            assert frozen.pool is not None
            tell(tmp_path / "a", "freeze", "v0", runs=LOADS)
            answers = 0
            while not happened(box, "selftest.failed"):
                assert (await box.ask())["kind"] == "result"
                answers += 1
                await asyncio.sleep(0)
            assert answers > 5

    run(story)
