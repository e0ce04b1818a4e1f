"""What follows from self-tests, and how little a worker may say of them."""

from __future__ import annotations

import math
from typing import Any

import pytest

from agent.engine.claims import selftest_of
from agent.engine.selftest import Act, SelfTestRecord, act_after

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
