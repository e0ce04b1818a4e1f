"""Waits between tries: they grow, they have a cap, and they begin anew."""

from __future__ import annotations

import random

import pytest

from agent.backoff import Backoff

pytestmark = pytest.mark.unit


class Highest(random.Random):
    """Draws the longest wait."""

    def uniform(self, a: float, b: float) -> float:
        return max(a, b)


def test_waits_double_up_to_the_cap_and_begin_anew_after_a_reset() -> None:
    backoff = Backoff(first_s=0.5, cap_s=3.0, rng=Highest())
    assert [backoff.next() for _ in range(5)] == [0.5, 1.0, 2.0, 3.0, 3.0]
    for _ in range(5000):
        assert backoff.next() == 3.0  # no overflow, however long it goes on
    backoff.reset()
    assert (backoff.failures, backoff.next()) == (0, 0.5)


def test_waits_are_spread_below_the_ceiling() -> None:
    backoff = Backoff(first_s=1.0, cap_s=1.0, rng=random.Random(1))
    waits = [backoff.next() for _ in range(200)]
    assert min(waits) < 0.1
    assert 0.9 < max(waits) <= 1.0
