"""Exponential back-off with full jitter.

Source: "Exponential Backoff And Jitter", AWS Architecture Blog (2015): a delay drawn uniformly from zero to the
current ceiling spreads a fleet's retries better than any fixed fraction.
"""

from __future__ import annotations

import random


class Backoff:
    """A growing ceiling of seconds; ``next()`` draws a delay below it."""

    def __init__(self, *, first_s: float, cap_s: float, rng: random.Random | None = None) -> None:
        self._first_s = first_s
        self._cap_s = cap_s
        self._rng = rng or random.Random()
        self._failures = 0

    @property
    def failures(self) -> int:
        """Calls of ``next()`` since the last ``reset()``."""
        return self._failures

    def next(self) -> float:
        """Return the seconds to wait before the next try."""
        ceiling = min(self._cap_s, self._first_s * 2.0**self._failures)
        self._failures = min(self._failures + 1, 63)
        return self._rng.uniform(0.0, ceiling)

    def reset(self) -> None:
        """Forget past failures."""
        self._failures = 0
