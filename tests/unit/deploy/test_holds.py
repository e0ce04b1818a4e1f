"""Holds are counted, bounded, and end once."""

import pytest

from agent.config import DeployConfig
from agent.deploy.holds import Holds
from agent.errors import NotFoundError, OverloadedError
from tests.fakes.clock import Calendar


def make(**config: float) -> tuple[Holds, Calendar, list[str]]:
    clock, changes = Calendar(0.0), []
    return Holds(DeployConfig(**config), clock, changed=lambda: changes.append("looked")), clock, changes


def test_the_longest_hold_is_named_until_the_last_is_gone() -> None:
    holds, _, changes = make()
    first, second = holds.take("m", "line 1"), holds.take("*", "stocktaking")
    assert (holds.holder("m"), holds.holder("other")) == ("line 1", "stocktaking")
    assert holds.release(first).holder == "line 1"
    assert holds.holder("m") == "stocktaking"
    holds.drop(second)
    holds.drop(second)  # its connection ended after its release
    assert holds.holder("m") == ""
    assert changes == ["looked"] * 2
    with pytest.raises(NotFoundError):
        holds.release(first)


def test_a_hold_counts_for_so_long_only_and_is_still_shown() -> None:
    holds, clock, _ = make(hold_limit_s=86_400)
    holds.take("m", "a program that hangs")
    clock.pass_days(1)
    assert holds.holder("m") == ""
    assert holds.plain() == [{"model": "m", "holder": "a program that hangs", "held_s": 86_400.0, "counts": False}]


def test_too_many_holds_are_refused() -> None:
    holds, _, _ = make(holds_max=1)
    holds.take("m", "one")
    with pytest.raises(OverloadedError, match="holds_max"):
        holds.take("m", "two")
