"""The comparisons of golden self-tests."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import pytest

from agent.errors import SelfTestError
from agent.worker.golden import Golden, check, verify

ROWS = np.array([[0.1, 0.7, 0.2], [0.6, 0.3, 0.1]], np.float32)


def run(found: Any, rule: dict[str, Any], wanted: Any = ROWS, timeout_ms: float = 60_000) -> list[dict[str, Any]]:
    golden = Golden(
        id="g", inputs={}, outputs={"y": np.asarray(wanted)}, compare=[{"output": "y"} | rule], timeout_ms=timeout_ms
    )
    return verify([golden], lambda _: {"y": np.asarray(found)})


@pytest.mark.parametrize(
    ("found", "rule"),
    [
        (ROWS, {"metric": "allclose"}),
        (ROWS * 1.005, {"metric": "allclose", "rtol": 0.01, "atol": 0}),
        (ROWS + 0.01, {"metric": "max_abs", "atol": 0.02}),
        (ROWS * 3, {"metric": "cosine", "min": 0.9999}),
        (ROWS * 0.5 + 0.1, {"metric": "topk"}),
        (ROWS[:, [0, 1, 2]], {"metric": "topk", "k": 2}),
        (ROWS, {"metric": "topk", "k": 99}),
    ],
)
def test_what_is_near_enough_passes(found: Any, rule: dict[str, Any]) -> None:
    (report,) = run(found, rule)
    assert (report["id"], report["ok"]) == ("g", True)
    assert report["ms"] >= 0


@pytest.mark.parametrize(
    ("found", "rule", "words"),
    [
        (ROWS + 1, {"metric": "allclose", "rtol": 0.1, "atol": 0.1}, "differs by up to 1"),
        (ROWS + 0.5, {"metric": "max_abs", "atol": 0.4}, "differs by up to 0.5, allowed is 0.4"),
        (np.full_like(ROWS, np.nan), {"metric": "max_abs", "atol": 1e9}, "differs by up to nan"),
        (np.full_like(ROWS, np.nan), {"metric": "allclose"}, "differs by up to nan"),
        (np.full_like(ROWS, np.nan), {"metric": "cosine"}, "the worst row has nan"),
        (np.full_like(ROWS, np.nan), {"metric": "topk"}, "holds NaN"),
        (np.zeros_like(ROWS), {"metric": "cosine"}, "the worst row has 0"),
        (-ROWS, {"metric": "cosine"}, "the worst row has -1, required is 0.999"),
        (ROWS[::-1], {"metric": "topk"}, "0 of the 1 best agree"),
        (ROWS[:, ::-1], {"metric": "topk", "k": 2, "min": 0.9}, "of the 2 best agree, required is 0.9"),
        (ROWS[:1], {"metric": "allclose"}, "shape [1, 3], expected [2, 3]"),
        (ROWS, {"metric": "iou"}, "no such metric"),
        (ROWS, {"metric": "allclose", "output": "z"}, "output is missing in the model"),
    ],
)
def test_what_differs_is_named(found: Any, rule: dict[str, Any], words: str) -> None:
    with pytest.raises(SelfTestError) as caught:
        run(found, rule)
    assert "golden 'g', output " in str(caught.value)
    assert words in str(caught.value)


def test_equal_zero_rows_are_equal() -> None:
    zeros = np.zeros((2, 3))
    assert run(zeros, {"metric": "cosine"}, zeros)


def test_a_late_answer_fails() -> None:
    with pytest.raises(SelfTestError, match="allowed are 0"):
        run(ROWS, {"metric": "allclose"}, timeout_ms=0)


def test_a_check_tells_what_was_measured_and_what_it_is_held_against() -> None:
    rules = [{"output": "y", "metric": "max_abs", "atol": 0.6}, {"output": "y", "metric": "topk", "k": 1, "min": 0.9}]
    golden = Golden(id="g", inputs={}, outputs={"y": ROWS}, compare=rules, timeout_ms=60_000)
    report = check(golden, lambda _: {"y": ROWS[::-1]})
    assert (report["id"], report["ok"], report["ms_max"]) == ("g", False, 60_000)
    assert report["reason"] == "golden 'g', output 'y', topk: 0 of the 1 best agree, required is 0.9"
    assert report["checks"] == [
        {"output": "y", "metric": "max_abs", "ok": True, "found": 0.5, "bound": "at most 0.6"},
        {"output": "y", "metric": "topk", "ok": False, "found": 0.0, "bound": "at least 0.9 of the 1 best"},
    ]


def test_what_cannot_be_measured_has_no_figure() -> None:
    golden = Golden(id="g", inputs={}, outputs={"y": ROWS}, compare=[{"output": "y"}], timeout_ms=60_000)
    (found,) = check(golden, lambda _: {"y": np.full_like(ROWS, np.nan)})["checks"]
    assert (found["ok"], found["found"]) == (False, None)


def test_a_moment_in_which_the_box_is_busy_is_forgiven_and_a_slow_model_is_not() -> None:
    pauses = iter([0.05, 0.0])

    def busy(_: Any) -> dict[str, Any]:
        time.sleep(next(pauses))
        return {"y": ROWS}

    golden = Golden(id="g", inputs={}, outputs={"y": ROWS}, compare=[{"output": "y"}], timeout_ms=40)
    assert check(golden, busy)["ok"]

    def slow(_: Any) -> dict[str, Any]:
        time.sleep(0.05)
        return {"y": ROWS}

    report = check(golden, slow)
    assert (report["ok"], report["checks"][0]["ok"]) == (False, True)
    assert "allowed are 40" in report["reason"]
