"""What a worker says of its own measurement, reduced to numbers."""

from __future__ import annotations

import math

import pytest

from agent.engine.claims import measured_of
from agent.engine.ladder import Measured

pytestmark = pytest.mark.unit


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ({"ok": True, "rounds": 3, "p50_ms": 1.5, "cosine": 1, "top1": None}, Measured(p50_ms=1.5, cosine=1.0)),
        ({"ok": True, "p50_ms": 1.5, "cosine": 0.5, "top1": 0.25}, Measured(p50_ms=1.5, cosine=0.5, top1=0.25)),
        ({"ok": False, "message": "no golden inputs"}, "no golden inputs"),
        ({"ok": False}, "the worker could not measure"),
        ({"ok": True, "p50_ms": math.nan, "cosine": 1.0}, "the worker's measurement is no number"),
        ({"ok": True, "p50_ms": 1.0, "cosine": 1.0, "top1": math.inf}, "the worker's measurement is no number"),
    ],
)
def test_only_finite_numbers_count(value: object, expected: Measured | str) -> None:
    assert measured_of(value) == expected


@pytest.mark.parametrize("value", [None, 7, [], {"p50_ms": 1.0}, {"ok": True, "p50_ms": "fast"}])
def test_nonsense_is_named(value: object) -> None:
    found = measured_of(value)
    assert isinstance(found, str)
    assert "malformed" in found
