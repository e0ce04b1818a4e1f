"""A request that does not fit runs in halves of halves."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pytest

from agent.errors import InferenceError, OutOfMemoryError
from agent.tensors import Array
from agent.worker.pieces import in_halves

pytestmark = pytest.mark.unit


class Model:
    """Doubles; has memory for so many rows."""

    def __init__(self, fits: int) -> None:
        self.fits = fits
        self.ran: list[int] = []

    def __call__(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        rows = len(inputs["x"])
        if rows > self.fits:
            raise OutOfMemoryError("too many")
        self.ran.append(rows)
        return {"y": inputs["x"] * 2}


@pytest.mark.parametrize(
    ("rows", "fits", "ran"),
    [(2, 1, [1, 1]), (8, 4, [4, 4]), (8, 3, [2, 2, 2, 2]), (7, 4, [3, 4]), (7, 3, [3, 2, 2]), (5, 1, [1] * 5)],
)
def test_the_outputs_are_those_of_the_whole(rows: int, fits: int, ran: list[int]) -> None:
    model, x = Model(fits), np.arange(rows * 3, dtype=np.float32).reshape(rows, 3)
    outputs, fitted = in_halves({"x": x}, rows, model)
    np.testing.assert_array_equal(outputs["y"], x * 2)
    assert model.ran == ran
    assert fitted == min(ran)


def test_a_row_that_does_not_fit_alone_is_the_end() -> None:
    with pytest.raises(OutOfMemoryError, match="one of 4 rows"):
        in_halves({"x": np.zeros((4, 1))}, 4, Model(0))


def test_outputs_that_do_not_come_by_rows_cannot_be_joined() -> None:
    with pytest.raises(OutOfMemoryError, match="by rows"):
        in_halves({"x": np.zeros((4, 1))}, 4, lambda inputs: {"y": np.zeros(1)})


def test_another_failure_is_not_hidden() -> None:
    def run(inputs: Mapping[str, Array]) -> Mapping[str, Array]:
        raise InferenceError("no")

    with pytest.raises(InferenceError):
        in_halves({"x": np.zeros((4, 1))}, 4, run)
