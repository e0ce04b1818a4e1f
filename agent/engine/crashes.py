"""How often the workers of one variant die: a crash loop is a version's variant's, however many pools it has had.

A model that sleeps between its requests has a new pool for each of them, and would otherwise crash for ever.
"""

from __future__ import annotations

from collections import deque


class Crashes:
    """Deaths of one variant's workers, and starts that failed. Times are monotonic seconds."""

    def __init__(self, *, deaths_max: int, window_s: float) -> None:
        self._at: deque[float] = deque(maxlen=deaths_max)
        self._window_s = window_s

    def note(self, now: float) -> bool:
        """Note one; return whether there are as many within the window as make a crash loop."""
        self._at.append(now)
        return len(self._at) == self._at.maxlen and now - self._at[0] < self._window_s

    def forget(self) -> None:
        """Begin anew: that the variant fell is remembered elsewhere now."""
        self._at.clear()

    def __str__(self) -> str:
        """What happened, for people."""
        return f"{len(self._at)} deaths within {self._window_s:g} s"
