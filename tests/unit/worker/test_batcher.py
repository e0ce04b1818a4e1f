"""The batcher's decisions, as properties over whole histories and as single rules."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.worker.batcher import LEVEL_DEFAULT, Batcher, isolate

INFINITY = float("inf")


@dataclass
class Ask:
    id: int
    rows_made: int = 1
    key_made: Any = None
    level: int = LEVEL_DEFAULT
    arrived: float = 0.0
    deadline: float = INFINITY
    bad: bool = False
    rows: int = 0
    key: Any = None
    prepared: int = field(default=0, compare=False)


def prepare(ask: Ask) -> bool:
    ask.prepared += 1
    ask.rows, ask.key = ask.rows_made, ask.key_made
    return not ask.bad


def batcher(*asks: Ask, rows_max: int = 4, delay_max_s: float = 0.0) -> Batcher[Ask]:
    made: Batcher[Ask] = Batcher(rows_max=rows_max, delay_max_s=delay_max_s)
    for ask in asks:
        made.add(ask)
    return made


def ids(asks: Any) -> list[int]:
    return [ask.id for ask in asks]


def test_a_lone_request_runs_at_once_whatever_the_delay() -> None:
    assert ids(batcher(Ask(1), delay_max_s=10).take(0.0, prepare).batch) == [1]


def test_everything_that_waited_runs_together_up_to_the_rows() -> None:
    queue = batcher(Ask(1), Ask(2, rows_made=2), Ask(3), Ask(4))
    assert ids(queue.take(0.0, prepare).batch) == [1, 2, 3]
    assert ids(queue.take(0.0, prepare).batch) == [4]


def test_a_request_that_does_not_fit_is_not_overtaken_by_its_own_kind() -> None:
    queue = batcher(Ask(1), Ask(2, rows_made=4), Ask(3))
    assert [ids(queue.take(0.0, prepare).batch) for _ in range(3)] == [[1], [2], [3]]


def test_other_shapes_are_passed_over() -> None:
    queue = batcher(Ask(1, key_made="a"), Ask(2, key_made="b"), Ask(3, key_made="a"), Ask(4, key_made="b"))
    assert ids(queue.take(0.0, prepare).batch) == [1, 3]
    assert ids(queue.take(0.0, prepare).batch) == [2, 4]


def test_a_busy_worker_waits_for_company_until_the_oldest_has_waited_enough() -> None:
    queue = batcher(Ask(1), delay_max_s=1.0)
    assert ids(queue.take(0.0, prepare).batch) == [1]  # idle before
    queue.add(Ask(2, arrived=5.0))
    assert ids(queue.take(5.0, prepare).batch) == []
    assert queue.due() == 6.0
    queue.add(Ask(3, arrived=5.5))
    assert ids(queue.take(5.9, prepare).batch) == []
    assert ids(queue.take(6.0, prepare).batch) == [2, 3]


def test_waiting_ends_when_the_batch_is_full_or_nothing_more_can_come() -> None:
    queue = batcher(Ask(1), delay_max_s=1.0, rows_max=2)
    queue.take(0.0, prepare)
    queue.add(Ask(2, arrived=0.0))
    assert not queue.take(0.0, prepare).batch
    queue.add(Ask(3, arrived=0.0))
    assert ids(queue.take(0.0, prepare).batch) == [2, 3]
    queue.add(Ask(4, arrived=0.0))
    assert ids(queue.take(0.0, prepare, closing=True).batch) == [4]


def test_a_worker_that_found_nothing_is_idle_again() -> None:
    queue = batcher(Ask(1), delay_max_s=1.0)
    queue.take(0.0, prepare)
    assert queue.take(0.0, prepare) == ([], [])
    queue.add(Ask(2))
    assert ids(queue.take(0.0, prepare).batch) == [2]


def test_expired_requests_are_handed_back_undecoded() -> None:
    late, good = Ask(1, deadline=1.0), Ask(2, deadline=3.0)
    turn = batcher(late, good).take(1.0, prepare)
    assert (ids(turn.batch), ids(turn.expired)) == ([2], [1])
    assert late.prepared == 0


def test_priority_goes_before_arrival() -> None:
    queue = batcher(Ask(1), Ask(2, level=1), Ask(3, level=15), Ask(4, level=1), rows_max=2)
    assert ids(queue.take(0.0, prepare).batch) == [2, 4]
    assert ids(queue.take(0.0, prepare).batch) == [1, 3]


def test_cancel_withdraws_only_what_waits() -> None:
    queue = batcher(Ask(1), Ask(2), rows_max=1)
    assert ids(queue.withdraw(lambda ask: ask.id == 2)) == [2]
    assert queue.withdraw(lambda ask: ask.id == 2) == []
    assert ids(queue.take(0.0, prepare).batch) == [1]
    assert queue.withdraw(lambda ask: ask.id == 1) == []
    assert len(queue) == 0


def test_requests_are_decoded_only_as_far_as_a_batch_needs() -> None:
    asks = [Ask(n) for n in range(10)]
    batcher(*asks, rows_max=3).take(0.0, prepare)
    assert [ask.prepared for ask in asks] == [1] * 3 + [0] * 7


ASKS = st.builds(
    Ask,
    id=st.just(0),
    rows_made=st.integers(1, 5),
    key_made=st.sampled_from("ab"),
    level=st.integers(1, 3),
    deadline=st.sampled_from([INFINITY, 0.5, 3.0]),
    bad=st.sampled_from([False, False, False, True]),
)


@given(
    steps=st.lists(st.one_of(st.lists(ASKS, max_size=6), st.integers(0, 20), st.just("turn")), max_size=30),
    rows_max=st.integers(5, 9),
    delay=st.sampled_from([0.0, 2.0]),
)
def test_each_request_ends_exactly_once_and_no_batch_is_too_large(
    steps: list[Any], rows_max: int, delay: float
) -> None:
    queue: Batcher[Ask] = Batcher(rows_max=rows_max, delay_max_s=delay)
    added: dict[int, Ask] = {}
    ended: list[int] = []
    batches: list[list[Ask]] = []
    now = 0.0

    def checked(ask: Ask) -> bool:
        good = prepare(ask)
        if not good:
            ended.append(ask.id)
        return good

    def turn(*, closing: bool = False) -> None:
        decided = queue.take(now, checked, closing=closing)
        assert all(ask.deadline <= now for ask in decided.expired)
        assert all(ask.deadline > now for ask in decided.batch)
        batches.append(decided.batch)
        ended.extend(ids(decided.batch) + ids(decided.expired))

    for step in steps:
        now += 0.25
        if step == "turn":
            turn()
        elif isinstance(step, int):
            ended += ids(queue.withdraw(lambda ask, number=step: ask.id == number))  # type: ignore[misc]
        else:
            for ask in step:
                ask.id, ask.arrived = len(added), now
                added[ask.id] = ask
                queue.add(ask)
    while len(queue):
        turn(closing=True)
    assert sorted(ended) == sorted(added)
    assert all(ask.prepared <= 1 for ask in added.values())
    for batch in batches:
        assert sum(ask.rows for ask in batch) <= rows_max
        assert len({ask.key for ask in batch}) <= 1
        assert [(ask.level, ask.id) for ask in batch] == sorted((ask.level, ask.id) for ask in batch)


@given(st.lists(st.tuples(st.integers(1, 4), st.sampled_from("ab")), max_size=40))
def test_equal_requests_leave_in_the_order_they_came(shapes: list[tuple[int, str]]) -> None:
    queue = batcher(*(Ask(n, rows_made=rows, key_made=key) for n, (rows, key) in enumerate(shapes)))
    left: dict[str, list[int]] = {"a": [], "b": []}
    while len(queue):
        for ask in queue.take(0.0, prepare).batch:
            left[ask.key].append(ask.id)
    assert all(order == sorted(order) for order in left.values())


@given(st.lists(st.booleans(), min_size=1, max_size=40))
def test_isolation_fails_exactly_the_poisoned(poisoned: list[bool]) -> None:
    runs = 0

    def attempt(part: Any) -> str | None:
        nonlocal runs
        runs += 1
        if not any(poisoned[n] for n in part):
            return "good"
        return "bad" if len(part) == 1 else None

    ended = [(n, result) for part, result in isolate(range(len(poisoned)), attempt) for n in part]
    assert [n for n, _ in ended] == list(range(len(poisoned)))
    assert [result == "bad" for _, result in ended] == poisoned
    assert runs <= 2 * len(poisoned) - 1


@pytest.mark.parametrize("size", [1, 2, 8, 31])
def test_one_poisoned_request_costs_a_logarithm_of_runs(size: int) -> None:
    runs = 0

    def attempt(part: Any) -> str | None:
        nonlocal runs
        runs += 1
        return None if 0 in part and len(part) > 1 else "done"

    list(isolate(range(size), attempt))
    assert runs <= 2 * size.bit_length() + 1


def test_one_batch_ahead_is_prepared_and_no_more() -> None:
    asks = [Ask(1, rows_made=2), Ask(2, deadline=0.5), Ask(3, bad=True), Ask(4, rows_made=2), Ask(5)]
    queue = batcher(*asks)
    assert [queue.prepare_next(1.0, prepare) for _ in range(4)] == [True, True, True, False]
    assert [ask.prepared for ask in asks] == [1, 0, 1, 1, 0]
    turn = queue.take(1.0, prepare)
    assert (ids(turn.batch), ids(turn.expired)) == ([1, 4], [2])
    assert ids(queue.take(1.0, prepare).batch) == [5]
    assert all(ask.prepared <= 1 for ask in asks)
