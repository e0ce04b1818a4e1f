"""One store, one thread: order, shared transactions, and each caller's own outcome."""

from __future__ import annotations

import asyncio
import sqlite3
from typing import Any, NoReturn

import pytest

from agent.errors import InvalidInputError, StateError
from agent.telemetry.storage import StoreThread

pytestmark = pytest.mark.unit


class ListStore:
    """A store in memory that keeps what was committed, transaction by transaction."""

    full = False

    def __init__(self) -> None:
        self.commits: list[list[Any]] = []
        self.durable: list[bool] = []
        self.pending: list[Any] = []
        self.repaired = 0

    def begin(self, *, durable: bool) -> None:
        self.pending = []
        self.durable.append(durable)

    def commit(self) -> None:
        self.commits.append(self.pending)

    def rollback(self) -> None:
        self.pending = []

    def repair(self, error: sqlite3.Error) -> bool:
        self.repaired += 1
        return str(error) == "damaged"

    def close(self) -> None:
        self.commits.append(["closed"])

    def add(self, value: Any) -> Any:
        self.pending.append(value)
        return value


def broken(store: ListStore) -> None:
    store.add("half done")
    raise sqlite3.OperationalError("disk full")


def test_calls_that_wait_together_share_a_transaction_and_stop_writes_what_waits() -> None:
    store = ListStore()

    async def main() -> None:
        thread = StoreThread("test", lambda: store)
        await thread.start()
        for number in range(100):
            assert thread.post(lambda s, n=number: s.add(n))
        assert await thread.call(lambda s: s.add("last"), durable=True) == "last"
        await thread.stop()
        assert not thread.post(lambda s: s.add("late"))

    asyncio.run(main())
    assert [value for batch in store.commits for value in batch] == [*range(100), "last", "closed"]
    assert len(store.commits) < 50


def test_one_failing_call_hurts_nobody_else() -> None:
    store = ListStore()

    async def main() -> list[Any]:
        thread = StoreThread("test", lambda: store)
        await thread.start()
        outcomes = [
            asyncio.ensure_future(call)
            for call in (
                thread.call(lambda s: s.add(1)),
                thread.call(broken),
                thread.call(broken, otherwise=lambda s, error: f"instead: {error}"),
                thread.call(lambda s: _raise(InvalidInputError("mine"))),
                thread.call(lambda s: s.add(2)),
            )
        ]
        await asyncio.wait(outcomes)
        await thread.stop()
        return [outcome.exception() or outcome.result() for outcome in outcomes]

    first, failed, replaced, refused, second = asyncio.run(main())
    assert (first, second, replaced) == (1, 2, "instead: disk full")
    assert isinstance(failed, StateError)
    assert isinstance(refused, InvalidInputError)
    assert [value for batch in store.commits for value in batch] == [1, 2, "closed"]


def test_a_call_is_repeated_after_a_repair() -> None:
    store = ListStore()
    failures = iter([True, True, False])  # in the batch, alone, after the repair

    def damaged_once(s: ListStore) -> Any:
        if next(failures):
            raise sqlite3.DatabaseError("damaged")
        return s.add("kept")

    async def main() -> Any:
        thread = StoreThread("test", lambda: store)
        await thread.start()
        kept = await thread.call(damaged_once)
        await thread.stop()
        return kept

    assert asyncio.run(main()) == "kept"
    assert store.repaired == 1


@pytest.mark.parametrize(
    ("fault", "told"), [(sqlite3.OperationalError("unable to open"), StateError), (TypeError("a bug"), TypeError)]
)
def test_a_store_that_cannot_be_opened_says_so(fault: Exception, told: type[Exception]) -> None:
    async def main() -> None:
        thread = StoreThread("test", lambda: _raise(fault))
        with pytest.raises(told, match=str(fault)):
            await thread.start()
        await thread.stop()

    asyncio.run(main())


def test_a_store_that_can_be_neither_used_nor_replaced_refuses_and_stops() -> None:
    class Irreparable(ListStore):
        def repair(self, error: sqlite3.Error) -> bool:
            raise sqlite3.OperationalError("unable to open database file")

    async def main() -> None:
        thread = StoreThread("test", Irreparable)
        await thread.start()
        with pytest.raises(StateError, match="disk full"):
            await thread.call(broken)
        assert await thread.call(lambda s: s.add("next")) == "next"
        await thread.stop()

    asyncio.run(main())


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_store_that_breaks_its_thread_holds_up_neither_callers_nor_the_stop() -> None:
    class Broken(ListStore):
        def rollback(self) -> None:
            raise RuntimeError("a bug")

    async def main() -> None:
        thread = StoreThread("test", Broken)
        await thread.start()
        calls = [asyncio.create_task(thread.call(broken)), asyncio.create_task(thread.call(lambda s: s.add(1)))]
        await asyncio.wait(calls, timeout=90)
        assert [type(call.exception()) for call in calls] == [StateError, StateError]
        with pytest.raises(StateError, match="not open"):
            await thread.call(lambda s: s.add(2))
        assert not thread.post(lambda s: s.add(3))
        stop = asyncio.create_task(thread.stop())
        await asyncio.wait({stop}, timeout=90)
        assert stop.done()

    asyncio.run(main())


def _raise(error: Exception) -> NoReturn:
    raise error
