"""Thousands of seeded histories of a box under faults; ``make histories N=20000``, ``SEED=n`` repeats one.

A history that breaks what must hold is made as short as it gets and printed with its seed.
"""

from __future__ import annotations

import logging
import os
import time
from collections import Counter

import pytest

from tests.sim import histories
from tests.sim.histories import BrokenError, History, draw, run, shortened, told

pytestmark = pytest.mark.sim

COUNT = int(os.environ.get("INFERD_HISTORIES", 60))
SEED = os.environ.get("INFERD_SEED", "")


@pytest.fixture(autouse=True)
def quiet(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.CRITICAL + 1, logger="inferd")  # thousands of lives have much to log


def test_whatever_happens_a_box_serves_what_earned_trust_and_every_wish_ends_and_is_told() -> None:
    seeds = [int(SEED)] if SEED else range(COUNT)
    began, lives, wishes, ends = time.monotonic(), 0, 0, Counter[str]()
    for seed in seeds:
        counts = alive(draw(seed))
        lives += counts.lives
        wishes += counts.wishes
        ends.update(counts.ends)
    took_s = time.monotonic() - began
    print(f"{'histories':>12} {'lives':>8} {'wishes':>8} {'seconds':>8}  ends")
    shown = ", ".join(f"{state} {count}" for state, count in ends.most_common())
    print(f"{len(seeds):12} {lives:8} {wishes:8} {took_s:8.1f}  {shown}")


def alive(history: History) -> histories.Counts:
    """Live through ``history``; fail with the shortest one that breaks likewise."""
    try:
        return run(history)
    except BrokenError as error:
        first = error
    short = shortened(history, breaks)
    try:
        run(short)
    except BrokenError as error:
        first = error
    raise AssertionError(f"{first}\n{told(short)}")


def breaks(history: History) -> bool:
    try:
        run(history)
    except BrokenError:
        return True
    return False


def test_a_seed_always_gives_the_same_history_and_the_same_end() -> None:
    assert draw(7) == draw(7)
    assert run(draw(7)) == run(draw(7))


def test_a_history_that_breaks_is_made_shorter() -> None:
    found = shortened(draw(11), lambda history: any(step.what == "want" for step in history.steps))
    assert [step.what for step in found.steps] == ["want"]
