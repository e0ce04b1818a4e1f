"""The gate: each bound alone, and what it says."""

from __future__ import annotations

from dataclasses import replace

import pytest

from agent.errors import InvalidInputError
from tools.hub.gate import Figures, Gate, judge

pytestmark = pytest.mark.unit
OPEN = Gate(min_agreement=None)
FIGURES = Figures(
    agreement=0.98, agreement_of="top1 of y", max_abs=0.2, speedup=0.5, size_ratio=0.3, memory_ratio=0.8
)  # fmt: skip


@pytest.mark.parametrize(
    ("bound", "passes", "fails", "words"),
    [
        ("min_agreement", 0.98, 0.99, "agreement 0.9800"),
        ("max_abs", 0.2, 0.1, "differ by up to 0.2"),
        ("min_speedup", 0.5, 1.0, "0.50 times as fast"),
        ("max_slowdown", 2.0, 1.5, "2.00 times as slow"),
        ("max_size_ratio", 0.3, 0.2, "0.30 times the size"),
        ("max_memory_ratio", 0.8, 0.7, "0.80 times the memory"),
    ],
)
def test_each_bound_lets_pass_and_names_what_it_does_not(bound: str, passes: float, fails: float, words: str) -> None:
    assert judge(OPEN, FIGURES) == ()
    assert judge(replace(OPEN, **{bound: passes}), FIGURES) == ()
    (reason,) = judge(replace(OPEN, **{bound: fails}), FIGURES)
    assert words in reason


def test_all_reasons_are_told() -> None:
    assert len(judge(Gate(min_agreement=0.99, max_slowdown=1.0), FIGURES)) == 2


def test_values_that_are_not_numbers_do_not_pass_a_bound_on_differences() -> None:
    (reason,) = judge(replace(OPEN, max_abs=1e9), replace(FIGURES, max_abs=None))
    assert "not a number" in reason


@pytest.mark.parametrize("wrong", [{"min_agreement": 1.5}, {"max_slowdown": 0.0}, {"max_abs": float("nan")}])
def test_bounds_that_mean_nothing_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(InvalidInputError, match="--"):
        Gate(**wrong)
