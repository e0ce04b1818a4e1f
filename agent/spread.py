"""Durations counted in buckets that grow by a twentieth: quantiles of any span of time in bounded memory.

Counts only grow, so what happened since a moment is the difference of two of them: whoever compares two versions over
the same time keeps the counts from its beginning. What a version did lately, before anybody asked, is the difference
from counts that are kept every few minutes. Promises: one observation costs one bisection; a quantile is within three
percent, from 10 µs to a quarter of an hour.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import Final

_GROWTH: Final = 1.05
_BOUNDS: Final = tuple(1e-5 * _GROWTH**step for step in range(378))  # seconds; the last is 970
_MIDDLE: Final = _GROWTH**-0.5
_RECENT_S: Final = 300.0


@dataclass(frozen=True, slots=True)
class Counts:
    """How many durations each bucket holds."""

    buckets: tuple[int, ...] = ()

    @property
    def total(self) -> int:
        """All of them."""
        return sum(self.buckets)

    def since(self, earlier: Counts) -> Counts:
        """Return what was added after ``earlier``, counts of the same durations."""
        pairs = zip_longest(self.buckets, earlier.buckets, fillvalue=0)
        return Counts(tuple(max(0, now - before) for now, before in pairs))

    def quantile_s(self, q: float) -> float:
        """Return quantile ``q`` (0..1) in seconds; 0.0 if there is nothing."""
        rank, seen = q * self.total, 0
        for index, amount in enumerate(self.buckets):
            seen += amount
            if seen >= rank and seen:
                return _BOUNDS[min(index, len(_BOUNDS) - 1)] * _MIDDLE
        return 0.0


NOTHING: Final = Counts()


def counts_of(durations_s: Sequence[float]) -> Counts:
    """Return the counts of these durations (seconds)."""
    spread = Spread(0.0)
    for duration_s in durations_s:
        spread.observe(duration_s, 0.0)
    return spread.counts()


class Spread:
    """The durations of one version's answers. ``now`` is always the same monotonic clock (seconds)."""

    __slots__ = ("_before", "_buckets", "_marked", "_turn_at")

    def __init__(self, now: float) -> None:
        self._buckets = [0] * (len(_BOUNDS) + 1)
        self._before = NOTHING  # counts of one to two spans ago
        self._marked = NOTHING  # counts of the last turn
        self._turn_at = now + _RECENT_S

    def observe(self, duration_s: float, now: float) -> None:
        """Count one duration (seconds)."""
        if now >= self._turn_at:
            self._turn(now)
        self._buckets[bisect_left(_BOUNDS, duration_s)] += 1

    def counts(self) -> Counts:
        """Return all that was counted."""
        return Counts(tuple(self._buckets))

    def recent(self, now: float) -> Counts:
        """Return what was counted within the last five to ten minutes."""
        if now >= self._turn_at:
            self._turn(now)
        return self.counts().since(self._before)

    def _turn(self, now: float) -> None:
        missed = now - self._turn_at >= _RECENT_S  # nothing was counted for a whole span
        counts = self.counts()
        self._before, self._marked = (counts if missed else self._marked), counts
        self._turn_at = now + _RECENT_S
