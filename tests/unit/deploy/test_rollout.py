"""Who says how a version meets its first requests, and what nobody may say."""

from __future__ import annotations

from typing import Any

import pytest

from agent.config import DeployConfig
from agent.deploy.plan import Plan
from agent.deploy.rollout import Course, Rollout, course_of, rollout_of
from agent.errors import InvalidInputError

pytestmark = pytest.mark.unit


def test_nothing_is_done_that_nobody_asked_for() -> None:
    course = course_of(None, None, DeployConfig())
    assert course.shares == ()
    assert course.shadow == 0


def test_the_wish_comes_first_then_the_manifest_then_the_configuration() -> None:
    config = DeployConfig(canary=(50.0,), canary_s=7, canary_calls_min=3)
    assert course_of(None, None, config).shares == (50.0,)
    manifest = Rollout(canary=(10.0,), step_s=5)
    assert course_of(None, manifest, config).shares == (10.0,)
    wish = Rollout(canary=(5.0, 25.0), shadow=20)
    assert course_of(wish, manifest, config) == Course(
        shares=(0.0, 5.0, 25.0), shadow=20, step_s=5, calls_min=3, limit_s=86_400, agreement_min=0.95
    )
    assert course_of(Rollout(canary=()), manifest, config).shares == (), "a wish may ask for no canary"


def test_agreement_may_only_be_asked_for_above_what_the_box_asks_for() -> None:
    config = DeployConfig(agreement_min=0.9)
    assert course_of(Rollout(agreement_min=0.5), None, config).agreement_min == 0.9
    assert course_of(None, Rollout(agreement_min=0.99), config).agreement_min == 0.99


def test_a_share_has_at_least_its_own_time() -> None:
    assert course_of(Rollout(step_s=100, limit_s=10), None, DeployConfig()).limit_s == 100


@pytest.mark.parametrize(
    "value",
    [
        {"canary": [50, 5]},
        {"canary": [0]},
        {"canary": [101]},
        {"canary": list(range(1, 15))},
        {"canary": "5"},
        {"canary": [True]},
        {"canary": [float("nan")]},
        {"shadow": 101},
        {"shadow": "much"},
        {"calls_min": 1.5},
        {"calls_min": -1},
        {"step_s": -1},
        {"agreement_min": 2},
        {"unknown": 1},
        [],
        "5",
    ],
)
def test_what_makes_no_sense_is_refused_where_it_enters(value: Any) -> None:
    with pytest.raises(InvalidInputError):
        rollout_of(value)


def test_what_was_asked_is_told_again() -> None:
    asked = {"canary": [5, 25], "shadow": 20, "step_s": 1.5, "calls_min": 7}
    rollout = rollout_of(asked)
    assert rollout == Rollout(canary=(5.0, 25.0), shadow=20, step_s=1.5, calls_min=7)
    assert Plan(rollout=rollout).plain() == {"rollout": asked}
    assert rollout_of(None) is None
    assert rollout_of({}) is None
