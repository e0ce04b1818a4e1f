"""Which waiting requests run next, together: pure decisions over values, no clock, no I/O.

The rules:

- An idle worker dispatches at once: a lone request never waits for company.
- A worker that comes back from a batch takes everything that waited, up to ``rows_max`` rows of equal key (shapes
  that stack). If that does not fill the batch it may hold on until ``delay_max_s`` after the oldest arrival.
- Order: priority level first (1 before 2 …), then arrival; none overtakes another of its level and key.
- Deadlines are looked at when a batch is made: a request whose time has passed is handed back, not run.
- Requests are decoded when a batch needs them (``prepare``), so what expires or is withdrawn costs nothing. While a
  batch runs elsewhere the next one may be decoded (``prepare_next``), and no more than that.

Promises: a request added is handed out exactly once: in a batch, as expired, by ``withdraw``, or dropped because
``prepare`` refused it (and answered it). No batch exceeds ``rows_max`` rows.
Leaves out: running and answering (``main.py``).
"""

from __future__ import annotations

from bisect import insort
from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import Final, Generic, NamedTuple, Protocol, TypeVar

LEVEL_FIRST: Final = 1
LEVEL_DEFAULT: Final = 8
LEVEL_LAST: Final = 15


class Waiting(Protocol):
    """What the batcher reads of a request. ``rows`` is 0 until ``prepare`` has set it together with ``key``."""

    level: int
    arrived: float  # seconds of the caller's monotonic clock
    deadline: float  # same clock; infinity for none
    rows: int
    key: Hashable


W = TypeVar("W", bound=Waiting)
R = TypeVar("R")


class Turn(NamedTuple, Generic[W]):
    """One decision: run ``batch`` (maybe empty), answer ``expired``."""

    batch: list[W]
    expired: list[W]


class Batcher(Generic[W]):
    """The queue of one worker."""

    def __init__(self, *, rows_max: int, delay_max_s: float = 0.0) -> None:
        self._rows_max = rows_max
        self._delay_max_s = delay_max_s
        self._waiting: list[W] = []  # by level, then arrival
        self._idle = True  # the last look found nothing waiting

    def __len__(self) -> int:
        return len(self._waiting)

    @property
    def rows_max(self) -> int:
        """Upper bound on a batch's rows."""
        return self._rows_max

    def shrink(self, rows_max: int) -> None:
        """Make smaller batches from now on; a request of more rows runs alone."""
        self._rows_max = max(1, min(self._rows_max, rows_max))

    def add(self, request: W) -> None:
        """Queue a request behind those of its level."""
        waiting = self._waiting
        if not waiting or waiting[-1].level <= request.level:
            waiting.append(request)
        else:
            insort(waiting, request, key=_level)

    def withdraw(self, unwanted: Callable[[W], bool]) -> list[W]:
        """Take out and return the requests that are not handed out yet and that ``unwanted`` picks."""
        withdrawn = [request for request in self._waiting if unwanted(request)]
        if withdrawn:
            self._waiting = [request for request in self._waiting if not unwanted(request)]
        return withdrawn

    def take(self, now: float, prepare: Callable[[W], bool], *, closing: bool = False) -> Turn[W]:
        """Decide the next batch.

        Args:
            now: The caller's monotonic clock, seconds.
            prepare: Sets ``rows`` and ``key`` of a request; ``False``: it was refused and is already answered.
            closing: Nothing more will arrive, so do not wait for company.
        """
        waiting = self._waiting
        if not waiting:
            self._idle = True
            return Turn([], [])
        batch: list[W] = []
        expired: list[W] = []
        alive: list[W] = []  # the queue without what is expired or refused
        passed: list[W] = []  # alive without the batch
        rows, rows_max = 0, self._rows_max
        for index, request in enumerate(waiting):
            if request.deadline <= now:
                expired.append(request)
                continue
            if not request.rows and not prepare(request):
                continue
            if batch and request.key != batch[0].key:
                passed.append(request)
            elif batch and rows + request.rows > rows_max:  # it leads a later batch: none of its key overtakes it
                rows = rows_max
            else:
                batch.append(request)
                rows += request.rows
            if rows >= rows_max:
                rest = waiting[index + 1 :] if request is batch[-1] else waiting[index:]
                passed += rest
                break
            alive.append(request)
        if batch and rows < rows_max and not closing and self._may_wait(batch, now):
            self._waiting = alive
            return Turn([], expired)
        self._waiting = passed
        self._idle = False
        return Turn(batch, expired)

    def prepare_next(self, now: float, prepare: Callable[[W], bool]) -> bool:
        """Prepare one request that the next batch may take; ``False`` if there is none left to prepare.

        Args:
            now: The caller's monotonic clock, seconds; what has expired is left to ``take``.
            prepare: As for ``take``.
        """
        rows = 0
        for index, request in enumerate(self._waiting):
            if rows >= self._rows_max:
                return False
            if not request.rows and request.deadline > now:
                if not prepare(request):
                    del self._waiting[index]
                return True
            rows += request.rows
        return False

    def due(self) -> float | None:
        """Return when the next ``take`` is wanted if nothing arrives (same clock); ``None`` if nothing waits."""
        if not self._waiting:
            return None
        oldest = min(request.arrived for request in self._waiting) + self._delay_max_s
        return min(oldest, min(request.deadline for request in self._waiting))

    def _may_wait(self, batch: Sequence[W], now: float) -> bool:
        if self._idle or not self._delay_max_s:
            return False
        return now < min(request.arrived for request in batch) + self._delay_max_s


def isolate(batch: Sequence[W], attempt: Callable[[Sequence[W]], R | None]) -> Iterator[tuple[Sequence[W], R]]:
    """Run ``batch``, halving what fails, until only requests that fail alone have failed.

    Args:
        batch: Not empty.
        attempt: Runs requests together; ``None`` means that several failed together and halves are to be tried.
            For a single request it always returns its result, good or bad.

    Yields:
        Parts of the batch in order, each with its result.
    """
    pending = [batch]
    while pending:
        part = pending.pop()
        result = attempt(part)
        if result is not None:
            yield part, result
            continue
        middle = len(part) // 2
        pending += (part[middle:], part[:middle])


def _level(request: Waiting) -> int:
    return request.level
