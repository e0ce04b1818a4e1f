"""Who is bound to which cores."""

from __future__ import annotations

import pytest

from agent.engine.cores import Cores

pytestmark = pytest.mark.unit


def test_each_worker_gets_the_cores_that_the_fewest_hold() -> None:
    cores = Cores([3, 0, 2, 1])
    assert [cores.take(2) for _ in range(3)] == [(0, 1), (2, 3), (0, 1)]
    cores.give_back((2, 3))
    assert cores.take(1) == (2,)
    assert cores.take(1) == (3,)


def test_a_worker_gets_at_most_all_there_are() -> None:
    assert Cores([0, 1]).take(8) == (0, 1)


def test_without_cores_nobody_is_bound() -> None:
    cores = Cores()
    assert cores.take(2) == ()
    cores.give_back(())
