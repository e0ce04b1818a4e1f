"""One SQLite store, one thread: the event loop never waits for a disk.

Calls run in the order they were made. Those that wait at the same time share one transaction, so that one fsync serves
them all; when it fails they run again one by one, and each caller gets its own outcome.

Absent on purpose: SQL. A store (``store.py``, ``journal.py``) is synchronous and knows nothing of threads.
"""

from __future__ import annotations

import asyncio
import sqlite3
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any, Final, Generic, Protocol, TypeVar

from agent.errors import StateError

BATCH_MAX: Final = 64  # calls in one transaction

# Primary result codes (the low byte of sqlite_errorcode); Source: sqlite.org/rescode.html.
_CORRUPT: Final = frozenset({sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB})
_NO_SPACE: Final = frozenset(
    {sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR, sqlite3.SQLITE_READONLY, sqlite3.SQLITE_CANTOPEN}
)

T = TypeVar("T")


class Store(Protocol):
    """What the thread asks of a store."""

    def begin(self, *, durable: bool) -> None:
        """Start a transaction; ``durable``: on disk before ``commit`` returns."""

    @property
    def full(self) -> bool:
        """Tell whether the transaction holds enough; what waits goes into the next one."""

    def commit(self) -> None: ...

    def rollback(self) -> None:
        """End the transaction as if it had not been begun."""

    def repair(self, error: sqlite3.Error) -> bool:
        """After ``rollback``: try to make the store usable again; ``True`` if the calls should be repeated."""

    def close(self) -> None: ...


S = TypeVar("S", bound=Store)


@dataclass(slots=True)
class _Call(Generic[S]):
    act: Callable[[S], Any]
    durable: bool
    otherwise: Callable[[S, sqlite3.Error], Any] | None
    answer: asyncio.Future[Any] | None
    result: Any = None
    error: BaseException | None = None


class StoreThread(Generic[S]):
    """Runs calls on a store in a thread of its own.

    Args:
        name: Of the thread.
        open_store: Opens the store; called in the thread.
        observe: Reads what interests ``noticed``; called in the thread after each transaction.
        noticed: Hears what ``observe`` returned; called on the loop, after the callers have their answers.
        pending_max: Calls that may wait before ``post`` refuses more. Callers of ``call`` wait, so they are few.
    """

    def __init__(
        self,
        name: str,
        open_store: Callable[[], S],
        *,
        observe: Callable[[S], Any] = lambda store: None,
        noticed: Callable[[Any], None] = lambda observed: None,
        pending_max: int = 4096,
    ) -> None:
        self._name = name
        self._open = open_store
        self._observe = observe
        self._noticed = noticed
        self._pending_max = pending_max
        self._queue: SimpleQueue[_Call[S] | None] = SimpleQueue()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._ended: asyncio.Future[None] | None = None
        self._stopping = False

    async def start(self) -> None:
        """Open the store.

        Raises:
            StateError: it cannot be opened, nor replaced.
        """
        self._loop = asyncio.get_running_loop()
        opened = self._loop.create_future()
        self._ended = self._loop.create_future()
        # A daemon thread: an exit that skipped stop() must not hang on it; each commit is safe against a cut anyway.
        threading.Thread(target=self._work, args=(opened,), name=self._name, daemon=True).start()
        await opened

    async def call(
        self,
        act: Callable[[S], T],
        durable: bool = False,
        otherwise: Callable[[S, sqlite3.Error], T] | None = None,
    ) -> T:
        """Run ``act`` in a transaction and return its result once that is committed.

        Args:
            act: Works on the store; may run twice, its effects are rolled back in between.
            durable: Wait until the disk has it, not only the kernel.
            otherwise: Gives the result when the database refused ``act``; runs outside any transaction, must not raise.

        Raises:
            StateError: the database refused and there is no ``otherwise``; or the store is not open.
        """
        if self._ended is None or self._stopping:
            raise StateError(f"{self._name}: not open")
        answer: asyncio.Future[T] = asyncio.get_running_loop().create_future()
        self._queue.put(_Call(act, durable, otherwise, answer))
        return await answer

    def post(
        self,
        act: Callable[[S], Any],
        durable: bool = False,
        otherwise: Callable[[S, sqlite3.Error], Any] | None = None,
    ) -> bool:
        """Run ``act`` as ``call`` does, without waiting; ``False``: too much waits already, it will not run."""
        if self.accepts:
            self._queue.put(_Call(act, durable, otherwise, None))
            return True
        return False

    async def stop(self) -> None:
        """Finish what waits, close the store, end the thread."""
        if self._ended is not None:
            self._stopping = True
            self._queue.put(None)
            await self._ended

    @property
    def accepts(self) -> bool:
        """Tell whether ``post`` takes a call now: started, not stopped, not overrun."""
        return self._ended is not None and not self._stopping and self._queue.qsize() < self._pending_max

    # Everything below runs in the thread.

    def _work(self, opened: asyncio.Future[None]) -> None:
        try:
            store = self._open()
            self._tell(self._noticed, self._observe(store))
        except Exception as error:  # noqa: BLE001 (it belongs to whoever starts us, on the other thread)
            known = isinstance(error, sqlite3.Error | OSError)
            self._tell(_resolve, opened, None, StateError(f"{self._name}: {error}") if known else error)
            self._tell(_resolve, self._ended, None, None)
            return
        self._tell(_resolve, opened, None, None)
        calls: list[_Call[S]] = []
        try:
            more = True
            while more:
                calls, more = self._gather()
                while calls:
                    count = _attempt(store, calls)
                    if not count:
                        count = 1
                        _alone(store, calls[0], self._name)
                    self._tell(self._deliver, calls[:count], self._observe(store))
                    calls = calls[count:]
            store.close()
        finally:
            self._tell(self._end, calls)

    def _gather(self) -> tuple[list[_Call[S]], bool]:
        """Wait for one call, take what else is there; ``False``: the thread is to end after these."""
        first = self._queue.get()
        if first is None:
            return [], False
        calls = [first]
        with suppress(Empty):
            while len(calls) < BATCH_MAX:
                following = self._queue.get_nowait()
                if following is None:
                    return calls, False
                calls.append(following)
        return calls, True

    def _deliver(self, calls: list[_Call[S]], observed: Any) -> None:
        """Answer the callers; on the loop."""
        for call in calls:
            if call.answer is not None:
                _resolve(call.answer, call.result, call.error)
            elif call.error is not None:
                asyncio.get_running_loop().call_exception_handler(
                    {"message": f"{self._name}: a posted call failed", "exception": call.error}
                )
        self._noticed(observed)

    def _end(self, undone: list[_Call[S]]) -> None:
        """The thread has ended, or broke on a fault of the store: nobody waits for it any more; on the loop."""
        self._stopping = True
        with suppress(Empty):
            while True:
                call = self._queue.get_nowait()
                undone += [call] if call is not None else []
        for call in undone:
            if call.answer is not None:
                _resolve(call.answer, None, StateError(f"{self._name}: not open"))
        assert self._ended is not None
        _resolve(self._ended, None, None)

    def _tell(self, receive: Callable[..., None], *args: Any) -> None:
        assert self._loop is not None
        with suppress(RuntimeError):  # the loop is closed: nobody listens any more
            self._loop.call_soon_threadsafe(receive, *args)


def connect(path: Path) -> sqlite3.Connection:
    """Open ``path`` for one thread of one process, transactions by hand."""
    connection = sqlite3.connect(path, isolation_level=None, check_same_thread=False, timeout=1.0)
    # Exclusive: no shared-memory file, no lock calls, and a second daemon on the same file is refused.
    connection.execute("PRAGMA locking_mode=EXCLUSIVE")
    connection.execute("PRAGMA journal_mode=WAL")
    return connection


def is_corrupt(error: sqlite3.Error) -> bool:
    """Tell whether the file itself is damaged or no database."""
    return getattr(error, "sqlite_errorcode", 0) & 0xFF in _CORRUPT


def is_disk_fault(error: sqlite3.Error) -> bool:
    """Tell whether the disk is full, failing, read-only or denies the file."""
    return getattr(error, "sqlite_errorcode", 0) & 0xFF in _NO_SPACE


def _attempt(store: Store, calls: list[_Call[Any]]) -> int:
    """Run calls in one transaction until the store calls it full; return how many, 0: nothing has happened."""
    count = 0
    try:
        store.begin(durable=any(call.durable for call in calls))
        for call in calls:
            call.result = call.act(store)
            count += 1
            if store.full:
                break
        store.commit()
    except Exception:  # noqa: BLE001 (whatever one call raises, it is run again alone and gets its error there)
        store.rollback()
        return 0
    return count


def _alone(store: Store, call: _Call[Any], name: str) -> None:
    """Run one call in its own transaction, once more if the store could be repaired."""
    for repaired in (False, True):
        try:
            store.begin(durable=call.durable)
            call.result = call.act(store)
            store.commit()
            return
        except sqlite3.Error as error:
            store.rollback()
            if not repaired and _repaired(store, error):
                continue
            if call.otherwise is not None:
                call.result = call.otherwise(store, error)
            else:
                call.error = StateError(f"{name}: {error}")
            return
        except Exception as error:  # noqa: BLE001 (it belongs to the caller, on the other thread)
            store.rollback()
            call.error = error
            return


def _repaired(store: Store, error: sqlite3.Error) -> bool:
    try:
        return store.repair(error)
    except (sqlite3.Error, OSError):  # the disk denies a new file, too
        return False


def _resolve(future: asyncio.Future[Any], result: Any, error: BaseException | None) -> None:
    if future.done():
        return  # its waiter was cancelled
    if error is None:
        future.set_result(result)
    else:
        future.set_exception(error)
