"""How old the signers' word is, and what follows: tables over values."""

from __future__ import annotations

import pytest

from agent.bundles.freshness import DAY_S, Freshness, Origin, Standing, approved_until, judge, obstacle

pytestmark = pytest.mark.unit

NOW = 1_795_000_000
BUILD = NOW - 100 * DAY_S


@pytest.mark.parametrize(
    ("age_days", "refused", "expected"),
    [
        (0, False, Freshness.FRESH),
        (7, False, Freshness.FRESH),
        (7.1, False, Freshness.STALE),
        (0, True, Freshness.STALE),
        (30, False, Freshness.STALE),
        (30.1, False, Freshness.LONG_OFFLINE),
        (30.1, True, Freshness.LONG_OFFLINE),
        (400, False, Freshness.LONG_OFFLINE),
    ],
)
def test_age_and_the_last_answer_make_the_state(age_days: float, refused: bool, expected: Freshness) -> None:
    standing = judge(issued=NOW - int(age_days * DAY_S), wall=NOW, floor=BUILD, refused=refused)
    assert standing.freshness is expected
    assert standing.clock_trusted


def test_a_box_that_never_heard_anything_is_not_fresh() -> None:
    standing = judge(issued=0, wall=NOW, floor=BUILD, refused=False)
    assert (standing.freshness, standing.age_s) == (Freshness.UNKNOWN, 0)


@pytest.mark.parametrize(
    ("wall", "trusted", "time"), [(0, False, NOW), (NOW - 1, False, NOW), (NOW, True, NOW), (NOW + 5, True, NOW + 5)]
)
def test_time_is_never_before_the_newest_signature(wall: int, trusted: bool, time: int) -> None:
    standing = judge(issued=NOW, wall=wall, floor=BUILD, refused=False)
    assert (standing.clock_trusted, standing.trusted_time) == (trusted, time)


def test_time_is_never_before_the_build() -> None:
    assert judge(issued=0, wall=0.0, floor=BUILD, refused=False).trusted_time == BUILD


def standing(days: float, *, refused: bool = False) -> Standing:
    return judge(issued=NOW - int(days * DAY_S), wall=NOW, floor=BUILD, refused=refused)


@pytest.mark.parametrize(
    ("origin", "days", "allowed"),
    [
        (Origin.NETWORK, 7, True),
        (Origin.NETWORK, 8, False),
        (Origin.STICK, 8, True),
        (Origin.STICK, 90, True),
        (Origin.STICK, 91, False),
        (Origin.MIRROR, 30, True),
        (Origin.MIRROR, 31, False),
        (Origin.KEPT, 0, True),
        (Origin.KEPT, 4000, True),
    ],
)
def test_what_may_be_activated_at_which_age(origin: Origin, days: float, allowed: bool) -> None:
    assert (obstacle(origin, standing(days)) == "") is allowed


def test_a_refused_answer_stops_the_network_alone() -> None:
    assert obstacle(Origin.NETWORK, standing(0, refused=True))
    assert not obstacle(Origin.KEPT, standing(0, refused=True))


@pytest.mark.parametrize(("origin", "days"), [(Origin.NETWORK, 7), (Origin.STICK, 30), (Origin.MIRROR, 30)])
def test_what_was_fetched_is_approved_for_a_time(origin: Origin, days: int) -> None:
    until = approved_until(origin, NOW - days * DAY_S)
    assert until == NOW
    assert not obstacle(Origin.APPROVED, standing(days), approved=until)
    assert obstacle(Origin.APPROVED, standing(days), approved=until - 1)
