"""Quantiles of any span of time, from counts that only grow."""

from __future__ import annotations

import random

import pytest

from agent.spread import NOTHING, Counts, Spread, counts_of

pytestmark = pytest.mark.unit


@pytest.mark.parametrize("scale_s", [1e-4, 0.02, 3.0])
@pytest.mark.parametrize("q", [0.5, 0.95, 0.99])
def test_a_quantile_is_within_three_percent(scale_s: float, q: float) -> None:
    rng = random.Random(5)
    durations = sorted(rng.lognormvariate(0.0, 0.7) * scale_s for _ in range(2000))
    wanted = durations[int(q * len(durations)) - 1]
    assert counts_of(durations).quantile_s(q) == pytest.approx(wanted, rel=0.03)


def test_what_lies_beyond_the_buckets_counts_in_the_outermost() -> None:
    assert counts_of([0.0, 1e-9]).quantile_s(1.0) <= 1e-5
    assert 900 < counts_of([1e9]).quantile_s(0.5) < 1000
    assert NOTHING.quantile_s(0.95) == 0.0


def test_a_span_is_the_difference_of_two_counts() -> None:
    spread = Spread(0.0)
    for _ in range(100):
        spread.observe(1.0, 0.0)
    earlier = spread.counts()
    for _ in range(20):
        spread.observe(0.001, 1.0)
    span = spread.counts().since(earlier)
    assert span.total == 20
    assert span.quantile_s(0.95) == pytest.approx(0.001, rel=0.03)
    assert earlier.since(NOTHING).total == 100
    assert Counts().since(earlier).total == 0


def test_recent_leaves_out_what_is_long_past() -> None:
    spread = Spread(0.0)
    spread.observe(9.0, 0.0)
    for minute in range(1, 7):
        spread.observe(0.001, 60.0 * minute)
    assert spread.recent(370.0).total == 7, "the last five to ten minutes"
    spread.observe(0.002, 700.0)
    assert spread.recent(700.0).quantile_s(1.0) < 1.0
    assert spread.recent(5000.0).total == 0, "nothing was asked for an hour"
    assert spread.counts().total == 8
