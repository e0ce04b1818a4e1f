"""What follows from self-tests, and how little a worker may say of them."""

from __future__ import annotations

import asyncio
import math
from typing import Any

import pytest

from agent.engine.claims import selftest_of
from agent.engine.selftest import Act, Report, SelfTestRecord, SelfTests, act_after, examine
from agent.engine.types import VariantSpec
from agent.errors import WorkerDiedError

pytestmark = pytest.mark.unit


@pytest.mark.parametrize(
    ("earlier", "act"),
    [([], Act.RESTART), ([100.0], Act.RESTART), ([400.1], Act.LEAVE), ([100.0, 999.0], Act.LEAVE)],
)
def test_a_second_failure_soon_after_the_first_leaves_the_variant(earlier: list[float], act: Act) -> None:
    assert act_after(earlier, 1000.0, healthy_s=600.0) is act


def test_each_variant_is_judged_by_its_own_failures() -> None:
    tests = SelfTestRecord()
    assert tests.fails("first", 0.0, healthy_s=600.0) is Act.RESTART
    assert tests.fails("second", 1.0, healthy_s=600.0) is Act.RESTART
    assert tests.fails("first", 2.0, healthy_s=600.0) is Act.LEAVE
    assert tests.fails("second", 700.0, healthy_s=600.0) is Act.RESTART


def entry(**changes: Any) -> dict[str, Any]:
    check = {"output": "y", "metric": "cosine", "ok": True, "found": 1.0, "bound": "at least 0.9"}
    return {"id": "g", "ok": True, "ms": 1.5, "ms_max": 5000, "checks": [check], "reason": "", **changes}


def test_what_a_worker_tells_is_taken() -> None:
    found = selftest_of({"ok": True, "golden": [entry()]})
    assert (found.ok, found.code, found.golden[0].checks[0].found) == (True, "", 1.0)
    assert selftest_of({"ok": True}).ok  # a bundle without golden inputs


@pytest.mark.parametrize(
    ("value", "code", "words"),
    [
        (None, "worker_failed", "malformed"),
        ({"ok": "yes"}, "worker_failed", "malformed"),
        ({"ok": True, "golden": [entry(ms=math.nan)]}, "worker_failed", "no number"),
        ({"ok": True, "golden": [entry(ok=False)]}, "worker_failed", ""),
        ({"ok": False, "code": "selftest_failed", "message": "x" * 9000}, "selftest_failed", "x"),
        ({"ok": False, "code": "made up", "message": "m"}, "internal", "m"),
    ],
)
def test_nonsense_is_a_test_that_was_not_passed(value: object, code: str, words: str) -> None:
    found = selftest_of(value)
    assert (found.ok, found.code) == (False, code)
    assert words in found.message
    assert len(found.message) <= 500


class FakePool:
    """Workers that pass; somebody waits for the model after so many calls."""

    closed = False

    def __init__(self, *, inputs: int, workers: int, quiet_calls: int = 1000, takes_s: float = 0.0) -> None:
        self.spec = VariantSpec(
            id="v", runtime="onnx", precision="fp32", device="cpu", worker={"golden": [{}] * inputs}
        )
        self.links = [object() for _ in range(workers)]
        self.calls: list[int] = []
        self._quiet_calls = quiet_calls
        self._takes_s = takes_s

    def quiet(self, _now: float) -> bool:
        return len(self.calls) < self._quiet_calls

    async def call(self, method: str, **arguments: Any) -> Any:
        assert method == "selftest"
        await asyncio.sleep(self._takes_s)
        self.calls.append(arguments["entry"])
        return {"ok": True, "golden": [entry(id=f"g{arguments['entry']}", ms=float(len(self.calls)))]}


class FakeVersion:
    """What a version is to its tests."""

    name, used_at, examinable, ready = "m 1", -1e9, True, True

    def __init__(self, pool: FakePool) -> None:
        self.tests = SelfTestRecord()
        self.pool: Any = pool
        self.ended: list[Report] = []

    def tested(self, _pool: Any, link: Any, report: Report) -> Report:
        assert link is None
        self.ended.append(report)
        return report


def test_every_input_runs_in_every_worker_and_the_worst_of_each_is_told() -> None:
    version = FakeVersion(pool := FakePool(inputs=2, workers=3))
    report = asyncio.run(examine(version, version.pool, timeout_s=1, patient=True))
    assert pool.calls == [0, 1] * 3
    assert (report.ok, report.complete, report.workers) == (True, True, 3)
    assert [(row.id, row.ms) for row in report.golden] == [("g0", 5.0), ("g1", 6.0)]
    assert version.ended == [report]


def test_a_test_gives_way_to_requests_after_the_input_that_runs() -> None:
    version = FakeVersion(pool := FakePool(inputs=9, workers=2, quiet_calls=1))
    report = asyncio.run(examine(version, version.pool, timeout_s=1, patient=True))
    assert (pool.calls, report.complete, version.ended) == ([0], False, [])
    report = asyncio.run(examine(version, version.pool, timeout_s=1, patient=False))  # somebody asked for it
    assert report.complete
    assert pool.calls == [0, *[1, 2, 3, 4, 5, 6, 7, 8, 0] * 2]  # what had no turn comes first
    assert version.tests.resume_at == 0


def test_what_is_unloaded_during_its_test_has_neither_passed_nor_failed() -> None:
    class Closing(FakePool):
        async def call(self, method: str, **arguments: Any) -> Any:
            self.closed = True
            raise WorkerDiedError("the model was unloaded before it answered")

    version = FakeVersion(Closing(inputs=1, workers=1))
    report = asyncio.run(examine(version, version.pool, timeout_s=1, patient=False))
    assert (report.complete, version.ended) == (False, [])


@pytest.mark.parametrize("quiet_calls", [1000, 1])
def test_long_tests_run_more_seldom_than_the_interval_says(quiet_calls: int) -> None:
    async def story() -> None:
        version = FakeVersion(FakePool(inputs=2, workers=1, quiet_calls=quiet_calls, takes_s=0.02))
        tests = SelfTests(lambda: [version], interval_s=0.01, idle_s=0, timeout_s=1, share_max=0.001)
        task = asyncio.ensure_future(tests.run())
        now = asyncio.get_running_loop().time()
        while version.tests.due_at < now + 15:  # 20 ms or more, a thousand times
            assert not task.done()
            await asyncio.sleep(0.001)
        task.cancel()

    asyncio.run(asyncio.wait_for(story(), 90))
