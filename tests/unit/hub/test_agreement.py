"""What a variant's answers are worth, by the kind of output; and the tolerances that follow."""

from __future__ import annotations

import numpy as np
import pytest

from tools.hub.agreement import MARGIN, Output, compare, overall, tolerances

pytestmark = pytest.mark.unit
PROBABILITIES = np.array([[0.7, 0.2, 0.1], [0.1, 0.6, 0.3]], dtype=np.float32)
WAVES = np.random.default_rng(3).normal(size=(4, 16)).astype(np.float32)


@pytest.mark.parametrize(
    ("output", "wanted", "measure"),
    [
        (Output(name="y"), PROBABILITIES, "top1"),
        (Output(name="y"), WAVES, "cosine"),
        (Output(name="logits"), WAVES, "top1"),
        (Output(name="y", semantic="logits"), WAVES, "top1"),
        (Output(name="y", classes=16), WAVES, "top1"),
        (Output(name="scores"), WAVES[:, :1], "cosine"),
        (Output(name="scores"), WAVES.reshape(2, 2, 16), "cosine"),
        (Output(name="label"), np.array([3, 4]), "exact"),
        (Output(name="text"), np.array(["a", "b"]), "exact"),
    ],
    ids=[
        "probabilities",
        "waves",
        "by name",
        "by semantic",
        "by class file",
        "one score",
        "three axes",
        "whole",
        "text",
    ],
)
def test_the_measure_follows_from_the_output(output: Output, wanted: np.ndarray, measure: str) -> None:
    found = compare(output, [wanted], [wanted])
    assert (found.measure, found.value) == (measure, 1.0)


def test_top1_counts_rows_over_all_runs() -> None:
    other = PROBABILITIES.copy()
    other[1] = [0.5, 0.4, 0.1]
    found = compare(Output(name="y"), [PROBABILITIES, PROBABILITIES], [PROBABILITIES, other])
    assert found.rows == 4
    assert found.value == found.top1 == 0.75
    assert found.max_abs == pytest.approx(0.4)


def test_the_cosine_is_that_of_the_worst_row() -> None:
    other = WAVES.copy()
    other[2] *= -1
    assert compare(Output(name="y"), [WAVES], [other]).cosine == pytest.approx(-1.0)
    assert compare(Output(name="y"), [WAVES], [other]).value == 0.0


def test_short_rows_are_compared_together() -> None:
    series = np.abs(WAVES[:, :1])
    found = compare(Output(name="y"), [series], [series * 1.5])
    assert not found.by_row
    assert found.cosine == pytest.approx(1.0)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_values_that_are_not_finite_are_no_agreement(bad: float) -> None:
    other = WAVES.copy()
    other[0, 0] = bad
    found = compare(Output(name="y"), [WAVES], [other])
    assert (found.value, found.max_abs, found.finite) == (0.0, None, False)


def test_infinity_in_fp32_itself_is_allowed() -> None:
    masked = WAVES.copy()
    masked[0, 0] = -np.inf
    found = compare(Output(name="y"), [masked], [masked + np.float32(0.001)])
    assert found.finite
    assert found.value == pytest.approx(1.0, abs=1e-3)
    assert found.max_abs == pytest.approx(0.001, abs=1e-4)


def test_another_shape_is_no_agreement() -> None:
    assert compare(Output(name="y"), [WAVES], [WAVES[:2]]).value == 0.0


def test_the_worst_output_decides() -> None:
    good = compare(Output(name="a"), [WAVES], [WAVES])
    bad = compare(Output(name="b"), [WAVES], [WAVES[::-1]])
    assert overall([good, bad]).output == "b"


def test_tolerances_leave_a_margin_over_the_larger_difference() -> None:
    golden = compare(Output(name="y"), [WAVES], [WAVES + 0.01])
    seen = compare(Output(name="y"), [WAVES], [WAVES + 0.03])
    cosine, largest = tolerances({"y": seen}, {"y": golden})
    assert (cosine.metric, largest.metric) == ("cosine", "max_abs")
    assert 0.03 * MARGIN <= largest.atol <= 0.03 * MARGIN * 1.1
    assert seen.cosine is not None
    assert cosine.min is not None
    assert cosine.min <= 1 - MARGIN * (1 - seen.cosine)


def test_tolerances_of_classes_keep_the_best_one() -> None:
    same = compare(Output(name="y"), [PROBABILITIES], [PROBABILITIES])
    best, largest = tolerances({"y": same}, {"y": same})
    assert (best.metric, best.k, best.min) == ("topk", 1, 1.0)
    assert largest.atol > 0


def test_whole_numbers_get_no_margin() -> None:
    found = compare(Output(name="y"), [np.array([1, 2])], [np.array([1, 4])])
    (rule,) = tolerances({}, {"y": found})
    assert (rule.metric, rule.atol) == ("max_abs", 2.0)
