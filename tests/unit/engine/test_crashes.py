"""Crash loops: so many deaths within so long."""

from __future__ import annotations

import pytest

from agent.engine.crashes import Crashes

pytestmark = pytest.mark.unit


@pytest.mark.parametrize(
    ("deaths", "loops"),
    [([0.0, 1.0], False), ([0.0, 1.0, 59.9], True), ([0.0, 1.0, 60.0], False), ([0.0, 50.0, 60.0, 70.0], True)],
)
def test_so_many_deaths_within_the_window_are_a_crash_loop(deaths: list[float], loops: bool) -> None:
    crashes = Crashes(deaths_max=3, window_s=60.0)
    assert [crashes.note(at) for at in deaths][-1] is loops


def test_what_was_found_is_told_and_then_forgotten() -> None:
    crashes = Crashes(deaths_max=1, window_s=60.0)
    assert crashes.note(0.0)
    assert str(crashes) == "1 deaths within 60 s"
    crashes = Crashes(deaths_max=2, window_s=60.0)
    crashes.note(0.0)
    crashes.forget()
    assert not crashes.note(1.0)
