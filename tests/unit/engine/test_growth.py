"""When a pool grows and shrinks, by a clock that the test turns."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.engine.growth import Bounds, Move, Seen, Trend, step

pytestmark = pytest.mark.unit
LOOK_S = 0.05


@dataclass
class World:
    """A pool whose worker count follows the decisions at once, looked at every 50 ms."""

    bounds: Bounds
    workers: int = 1
    now: float = 1000.0
    trend: Trend = field(default_factory=Trend)
    moves: list[tuple[float, Move]] = field(default_factory=list)

    def look(self, busy: int, delay_s: float, *, ready: int | None = None, held: bool = False) -> Move:
        self.now += LOOK_S
        ready = self.workers if ready is None else ready
        busy = min(busy, ready)
        seen = Seen(now=self.now, ready=ready, wanted=self.workers, busy=busy, delay_s=delay_s, held=held)
        self.trend, move = step(self.trend, seen, self.bounds)
        if move is not Move.STAY:
            self.moves.append((self.now, move))
            self.workers += 1 if move is Move.GROW else -1
        return move

    def spend(self, seconds: float, busy: Callable[[int], int], delay_s: Callable[[int], float]) -> None:
        for turn in range(round(seconds / LOOK_S)):
            self.look(busy(turn), delay_s(turn))


BOUNDS = Bounds(least=1, most=4, grow_delay_s=0.1, shrink_idle_s=10.0)


@pytest.mark.parametrize(
    ("what", "busy", "delay_s", "workers"),
    [
        ("a queue that stays long", lambda _: 4, lambda _: 0.1, 4),
        ("a queue just short of the bound", lambda _: 4, lambda _: 0.099, 1),
        ("a queue that is long at every second look", lambda _: 4, lambda turn: 0.5 * (turn % 2), 1),
        ("bursts of four looks, then none", lambda _: 4, lambda turn: 0.5 * (turn % 5 != 0), 1),
        ("no queue, one busy worker", lambda _: 1, lambda _: 0.0, 1),
        ("nothing", lambda _: 0, lambda _: 0.0, 1),
    ],
)
def test_a_pool_grows_on_a_queue_that_stays(
    what: str, busy: Callable[[int], int], delay_s: Callable[[int], float], workers: int
) -> None:
    world = World(BOUNDS)
    world.spend(5.0, busy, delay_s)
    assert world.workers == workers, what


def test_growth_waits_for_a_worker_that_is_still_starting() -> None:
    world = World(BOUNDS)
    world.spend(1.0, lambda _: 1, lambda _: 0.5)
    grown = world.workers
    for _ in range(100):
        assert world.look(1, 0.5, ready=grown - 1) is Move.STAY


def test_a_growth_that_failed_is_tried_again_when_its_time_has_come() -> None:
    world = World(BOUNDS)
    for _ in range(100):
        assert world.look(1, 0.5, held=True) is Move.STAY
    assert world.look(1, 0.5) is Move.GROW


def test_a_queue_before_a_pause_does_not_count_after_it() -> None:
    world = World(BOUNDS)
    for _ in range(3):
        world.look(1, 0.5)
    world.now += 60.0
    assert world.look(1, 0.5) is Move.STAY


@pytest.mark.parametrize(
    ("what", "busy", "delay_s", "workers"),
    [
        ("nothing to do", lambda _: 0, lambda _: 0.0, 1),
        ("two clients that ask again at once", lambda _: 2, lambda _: 0.0, 2),
        ("all four busy now and then", lambda turn: 4 if turn % 8 == 0 else 0, lambda _: 0.0, 1),
        ("all four busy all the time", lambda _: 4, lambda _: 0.0, 4),
        ("all four busy most of the time", lambda turn: 4 if turn % 10 else 1, lambda _: 0.0, 4),
        ("one idle, and still a queue", lambda _: 1, lambda _: 0.5, 4),
    ],
)
def test_a_pool_keeps_the_workers_it_needs(
    what: str, busy: Callable[[int], int], delay_s: Callable[[int], float], workers: int
) -> None:
    world = World(BOUNDS, workers=4)
    world.spend(120.0, busy, delay_s)
    assert world.workers == workers, what


def test_one_worker_leaves_at_a_time() -> None:
    world = World(BOUNDS, workers=4)
    world.spend(120.0, lambda _: 0, lambda _: 0.0)
    times = [when for when, _ in world.moves]
    assert [move for _, move in world.moves] == [Move.SHRINK] * 3
    assert min(later - earlier for earlier, later in pairwise(times)) >= BOUNDS.shrink_idle_s


def test_a_load_between_two_sizes_makes_a_pool_swing_less_and_less() -> None:
    """With one worker requests queue; with two there is always one idle."""
    world = World(Bounds(least=1, most=2, grow_delay_s=0.1, shrink_idle_s=10.0))
    for _ in range(round(2000.0 / LOOK_S)):
        world.look(1, 0.5 if world.workers == 1 else 0.0)
    went = [when for when, move in world.moves if move is Move.SHRINK]
    waits = [later - earlier for earlier, later in pairwise(went)]
    assert waits[:4] == sorted(waits[:4])
    assert 16 * BOUNDS.shrink_idle_s <= waits[-1] < 17 * BOUNDS.shrink_idle_s


def test_the_last_idle_worker_is_waited_for() -> None:
    """Only a worker that owes nothing can go at once."""
    world = World(BOUNDS, workers=2)
    world.spend(9.9, lambda _: 0, lambda _: 0.0)
    for _ in range(20):
        assert world.look(2, 0.0) is Move.STAY
    assert world.look(1, 0.0) is Move.SHRINK


@given(
    least=st.integers(1, 4),
    more=st.integers(0, 4),
    looks=st.lists(st.tuples(st.integers(0, 8), st.floats(0, 10)), max_size=400),
)
def test_the_bounds_hold_whatever_is_seen(least: int, more: int, looks: list[tuple[int, float]]) -> None:
    world = World(Bounds(least=least, most=least + more, grow_delay_s=0.1, shrink_idle_s=0.5), workers=least)
    for busy, delay_s in looks:
        world.look(busy, delay_s)
        assert least <= world.workers <= least + more
