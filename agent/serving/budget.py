"""How many bytes of half-received bodies the edges may hold together.

One per daemon, shared by all listeners: many clients that each announce a large body cannot exhaust the box. What has
arrived whole is the engine's to bound.
"""

from __future__ import annotations


class ReceiveBudget:
    """A counter with a ceiling. Single-threaded."""

    __slots__ = ("_bytes_max", "held")

    def __init__(self, bytes_max: int) -> None:
        self._bytes_max = bytes_max
        self.held = 0  # bytes

    def take(self, count: int) -> bool:
        """Reserve ``count`` bytes; ``False``, and nothing reserved, if they do not fit."""
        if self.held + count > self._bytes_max:
            return False
        self.held += count
        return True

    def give_back(self, count: int) -> None:
        """Release what ``take`` reserved."""
        self.held -= count
