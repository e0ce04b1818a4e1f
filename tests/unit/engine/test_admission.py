"""Rates, quotas and fair shares, as pure arithmetic."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.config import ClientLimitConfig, parse
from agent.engine.admission import Admission
from agent.errors import ConfigError, OverloadedError, RateLimitedError
from agent.shares import Shares

pytestmark = pytest.mark.unit


def admission(**limit: float) -> Admission:
    return Admission([ClientLimitConfig(client="uid:7", **limit)])


def test_without_limits_everybody_is_admitted() -> None:
    gate = Admission([])
    for _ in range(1000):
        gate.admit("uid:1", 0.0)
    assert not gate.limited("uid:1")


def test_a_rate_allows_its_burst_and_then_one_per_interval() -> None:
    gate = admission(requests_per_s=10, burst=3)
    for _ in range(3):
        gate.admit("uid:7", 0.0)
    with pytest.raises(RateLimitedError) as refused:
        gate.admit("uid:7", 0.0)
    assert refused.value.retry_after_s == pytest.approx(0.1)
    gate.admit("uid:7", 0.11)
    gate.admit("uid:8", 0.0)  # somebody else's rate is their own


def test_a_quota_is_renewed_when_its_window_ends() -> None:
    gate = admission(quota_requests=2, quota_window_s=60)
    gate.admit("uid:7", 0.0)
    gate.admit("uid:7", 1.0)
    with pytest.raises(RateLimitedError) as refused:
        gate.admit("uid:7", 10.0)
    assert refused.value.retry_after_s == pytest.approx(50.0)
    gate.admit("uid:7", 60.0)


def test_outstanding_requests_are_bounded_until_they_are_settled() -> None:
    gate = admission(outstanding_max=1)
    first = gate.admit("uid:7", 0.0)
    with pytest.raises(RateLimitedError):
        gate.admit("uid:7", 0.0)
    first.outstanding -= 1
    gate.admit("uid:7", 0.0)


def test_the_star_is_for_everybody_without_a_limit_of_their_own() -> None:
    gate = Admission(
        [ClientLimitConfig(client="*", requests_per_s=1, burst=1), ClientLimitConfig(client="uid:0", burst=1)]
    )
    gate.admit("uid:5", 0.0)
    with pytest.raises(RateLimitedError):
        gate.admit("uid:5", 0.0)
    for _ in range(10):
        gate.admit("uid:0", 0.0)


@pytest.mark.parametrize(
    "text", [{"client": "5"}, {"client": "uid:5", "burst": 0}, {"client": "uid:5", "quota_window_s": 0}]
)
def test_bad_limits_are_refused_with_their_key(text: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match="limits"):
        parse({"limits": [text]})


def test_a_flood_leaves_room_for_another_client() -> None:
    shares, outstanding = Shares(), 0
    for _ in range(100):
        try:
            shares.check("flood", outstanding=outstanding, bound=10)
        except OverloadedError:
            break
        shares.add("flood")
        outstanding += 1
    assert outstanding == 10  # alone, it may take all
    shares.remove("flood")
    outstanding -= 1
    shares.check("other", outstanding=outstanding, bound=10)
    shares.add("other")
    outstanding += 1
    shares.remove("flood")
    outstanding -= 1
    with pytest.raises(OverloadedError):  # of two, none may hold more than half of a crowded queue
        shares.check("flood", outstanding=outstanding, bound=10)


@given(st.lists(st.tuples(st.sampled_from("abc"), st.booleans()), max_size=200), st.integers(1, 20))
def test_the_bound_holds_whatever_comes(steps: list[tuple[str, bool]], bound: int) -> None:
    shares, held = Shares(), dict.fromkeys("abc", 0)
    for client, arrives in steps:
        total = sum(held.values())
        if arrives:
            try:
                shares.check(client, outstanding=total, bound=bound)
            except OverloadedError:
                continue
            shares.add(client)
            held[client] += 1
        elif held[client]:
            shares.remove(client)
            held[client] -= 1
        assert sum(held.values()) <= bound
