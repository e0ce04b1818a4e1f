"""Which outputs are what a signature declares."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest

from agent.errors import OutputError, SelfTestError
from agent.tensors import Array
from agent.worker import signature
from agent.worker.golden import Golden, check, verify
from agent.worker.outputs import Outputs

pytestmark = pytest.mark.unit

DECLARED = {
    "inputs": [{"name": "x", "dtype": "float32", "shape": ["N", "T"]}],
    "outputs": [
        {"name": "y", "dtype": "float32", "shape": ["N", 3]},
        {"name": "boxes", "dtype": "float32", "shape": ["N", "K", None]},
        {"name": "labels", "dtype": "bytes", "shape": ["N", "K"]},
        {"name": "steps", "dtype": "int64", "shape": ["N", "T"]},
    ],
    "dims": {"N": {"min": 1, "max": 8}, "K": {"min": 0, "max": 5}, "T": {"min": 1, "max": 64}},
}
X = np.zeros((2, 7), np.float32)


def outputs() -> Outputs:
    return Outputs(signature.parse(DECLARED, batch_axis="N", rows_max=4))


def given(**changes: Array) -> dict[str, Array]:
    return {
        "y": np.zeros((2, 3), np.float32),
        "boxes": np.zeros((2, 5, 4), np.float32),
        "labels": np.full((2, 5), "", dtype=object),
        "steps": np.zeros((2, 7), np.int64),
    } | changes


def without(name: str) -> dict[str, Array]:
    return {known: array for known, array in given().items() if known != name}


@pytest.mark.parametrize(
    "found",
    [
        given(),
        given(boxes=np.zeros((2, 0, 4), np.float32), labels=np.full((2, 0), "", dtype=object)),
        given(boxes=np.zeros((2, 5, 99), np.float32)),
        given(boxes=np.zeros((0, 0, 4), np.float32), labels=np.full((0, 0), "", dtype=object)),  # nothing was found
        given(boxes=np.zeros((9, 6, 4), np.float32), steps=np.zeros((2, 9), np.int64)),
        given(labels=np.full((2, 5), b"a")),
        given(y=np.zeros((2, 3), ">f4")),
    ],
)
def test_what_is_declared_passes(found: dict[str, Array]) -> None:
    made = outputs()
    made.checked_run(lambda _: found)({"x": X})
    for _ in range(2):
        made.check(found)


WRONG: list[tuple[dict[str, Array], str]] = [
    (without("y"), "the model returned 'boxes', 'labels', 'steps'; declared are 'y', 'boxes', 'labels', 'steps'"),
    (given(z=X), "'steps', 'z'; declared are 'y', 'boxes', 'labels', 'steps'"),
    (given(y=np.zeros((2, 4), np.float32)), "output 'y': the model returned float32[2, 4], declared is float32[N, 3]"),
    (given(y=np.zeros((2, 3), np.float64)), "output 'y': the model returned float64[2, 3], declared is float32[N, 3]"),
    (given(y=np.zeros((2, 3), np.complex64)), "the model returned complex64[2, 3], declared is float32[N, 3]"),
    (given(y=np.zeros((2, 3, 1), np.float32)), "the model returned float32[2, 3, 1], declared is float32[N, 3]"),
    (given(y=np.zeros((), np.float32)), "the model returned float32[], declared is float32[N, 3]"),
]


@pytest.mark.parametrize(("found", "words"), WRONG)
def test_what_is_not_declared_is_named_with_what_was_found(found: dict[str, Array], words: str) -> None:
    made = outputs()
    with pytest.raises(OutputError) as caught:
        made.checked_run(lambda _: found)({"x": X})
    assert words in str(caught.value)
    for _ in range(2):
        with pytest.raises(OutputError) as caught:
            made.check(found)
        assert words in str(caught.value)


def test_a_part_may_leave_outputs_out_and_have_rows_of_its_own() -> None:
    made = outputs()
    for rows in (0, 1, 99):
        made.check_part({"y": np.zeros((rows, 3), np.float32)})
    with pytest.raises(OutputError, match="the handler's stream returned 'z'; declared"):
        made.check_part({"z": X})
    with pytest.raises(OutputError, match=r"the handler's stream returned float32\[1, 2\], declared"):
        made.check_part({"y": np.zeros((1, 2), np.float32)})


def test_a_golden_sample_that_agrees_with_an_undeclared_output_does_not_pass() -> None:
    wrong = np.zeros((2, 4), np.float32)
    golden = Golden(id="g", inputs={"x": X}, outputs={"y": wrong}, compare=[{"output": "y"}], timeout_ms=60_000)

    def run(_: Mapping[str, Array]) -> dict[str, Any]:
        return given(y=wrong)

    assert check(golden, run)["ok"]
    report = check(golden, outputs().checked_run(run))
    assert (report["ok"], report["checks"]) == (False, [])
    assert report["reason"].startswith("golden 'g', output 'y': the model returned float32[2, 4]")
    with pytest.raises(SelfTestError, match="declared is"):
        verify([golden], outputs().checked_run(run))
