"""Which models have a direct lane, and when to ask for one: the decisions both clients share. No I/O.

A lane is a socket of its own to one model's worker. It may end at any time: its model changed, its worker died, the
daemon restarts. Requests then go through the daemon, and after a while, or at once if the lane said farewell, a new
one is asked for.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final, Generic, TypeVar

REFUSED_PAUSE_S: Final = 5.0  # after the daemon gave no lane, and after one broke without a farewell
_REFUSED_MAX: Final = 256  # models remembered

L = TypeVar("L")
Target = tuple[str, str | None]  # model and version; no version: its default, whichever that is


class Lanes(Generic[L]):
    """The lanes of one client, by model.

    Args:
        enabled: Whether any are wanted.
    """

    def __init__(self, *, enabled: bool) -> None:
        self._enabled = enabled
        self._lanes: dict[Target, L] = {}
        self._not_before: dict[Target, float] = {}  # when a model may be asked again (seconds)

    def __iter__(self) -> Iterator[L]:
        return iter(tuple(self._lanes.values()))

    def get(self, target: Target) -> L | None:
        """Return the model's lane, if it has one."""
        return self._lanes.get(target)

    def wanted(self, target: Target, now: float) -> bool:
        """Whether to ask the daemon for one now."""
        return self._enabled and target not in self._lanes and now >= self._not_before.get(target, 0.0)

    def add(self, target: Target, lane: L) -> None:
        """Use ``lane`` for the model."""
        self._lanes[target] = lane
        self._not_before.pop(target, None)

    def drop(self, target: Target, lane: L, now: float, *, farewell: bool) -> None:
        """Stop using a lane that ended; without a farewell no new one is wanted for a while."""
        if self._lanes.get(target) is lane:
            del self._lanes[target]
        if not farewell:
            self.refused(target, now)

    def refused(self, target: Target, now: float) -> None:
        """Note that the daemon gave none."""
        if len(self._not_before) >= _REFUSED_MAX:
            self._not_before.clear()
        self._not_before[target] = now + REFUSED_PAUSE_S

    def clear(self) -> None:
        """Forget all lanes: the connection that they hang on is gone."""
        self._lanes.clear()
