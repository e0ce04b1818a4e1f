"""Numbers of a model on its golden inputs."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from agent.worker.golden import Golden
from agent.worker.measure import measure

pytestmark = pytest.mark.unit
SCORES = np.array([[0.1, 0.9, 0.0], [0.8, 0.1, 0.1]], dtype=np.float32)


def golden(outputs: Any) -> Golden:
    return Golden(id="g", inputs={"x": SCORES}, outputs={"y": np.asarray(outputs)}, compare=(), timeout_ms=1e3)


@pytest.mark.parametrize(
    ("answer", "cosine", "top1"),
    [
        (SCORES, 1.0, 1.0),
        (SCORES * 3, 1.0, 1.0),
        (SCORES[:, ::-1], 0.2576, 0.5),
        (np.full_like(SCORES, np.nan), -1.0, None),
        (SCORES[:1], -1.0, None),
        (np.zeros_like(SCORES), 0.0, None),
    ],
)
def test_agreement_is_with_what_was_recorded(answer: Any, cosine: float, top1: float | None) -> None:
    found = measure([golden(SCORES)], lambda inputs: {"y": answer}, budget_s=0)
    assert found["cosine"] == pytest.approx(cosine, abs=1e-3)
    assert top1 is None or found["top1"] == top1


def test_there_are_always_a_few_rounds_and_never_too_many() -> None:
    ran: list[int] = []

    def run(inputs: Any) -> dict[str, Any]:
        ran.append(1)
        return {"y": SCORES}

    assert measure([golden(SCORES)], run, budget_s=0)["rounds"] == 3
    assert measure([golden(SCORES)], run, budget_s=3600)["rounds"] == 200
    assert len(ran) == 205


def test_outputs_that_are_no_classes_have_no_best_one() -> None:
    found = measure([golden(np.ones((2, 3, 4)))], lambda inputs: {"y": np.ones((2, 3, 4))}, budget_s=0)
    assert (found["cosine"], found["top1"]) == (1.0, None)
