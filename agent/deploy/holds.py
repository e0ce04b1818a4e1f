"""Applications' holds: "the line is running now", so no new version is loaded meanwhile.

A hold lasts until it is released or its connection ends, and counts for so long only as the configuration allows. It
is in memory alone: a restart ends every connection anyway. What it keeps from happening is decided in ``gates.py``.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

from agent.clock import Clock
from agent.config import DeployConfig
from agent.errors import NotFoundError, OverloadedError

EVERY_MODEL: Final = "*"


@dataclass(frozen=True, slots=True, kw_only=True)
class Hold:
    """One application's."""

    model: str  # or EVERY_MODEL
    holder: str  # as people are told
    since: float  # monotonic


class Holds:
    """All holds of the box. ``changed`` is called when one ends."""

    def __init__(self, config: DeployConfig, clock: Clock, *, changed: Callable[[], None]) -> None:
        self._config = config
        self._clock = clock
        self._changed = changed
        self._holds: dict[str, Hold] = {}  # by a token that only the holder knows

    def take(self, model: str, holder: str) -> str:
        """Hold ``model``; return the token to release it with.

        Raises:
            OverloadedError: there are too many.
        """
        if len(self._holds) >= self._config.holds_max:
            raise OverloadedError(f"{len(self._holds)} holds are taken, [deploy] holds_max allows no more")
        token = secrets.token_hex(8)
        self._holds[token] = Hold(model=model, holder=holder, since=self._clock.monotonic())
        return token

    def release(self, token: str) -> Hold:
        """End a hold and return it.

        Raises:
            NotFoundError: there is none.
        """
        hold = self._holds.pop(token, None)
        if hold is None:
            raise NotFoundError("no such hold: it was released, or its connection ended")
        self._changed()
        return hold

    def drop(self, token: str) -> None:
        """End a hold if it still lasts."""
        if self._holds.pop(token, None) is not None:
            self._changed()

    def holder(self, model: str) -> str:
        """Return who has held ``model`` the longest, as people are told; empty: nobody."""
        return next((hold.holder for hold in self._holds.values() if self._counts(hold, model)), "")

    def plain(self) -> list[dict[str, Any]]:
        """Return all of them, for people and programs."""
        now = self._clock.monotonic()
        return [
            {
                "model": hold.model,
                "holder": hold.holder,
                "held_s": round(now - hold.since, 1),
                "counts": self._counts(hold, hold.model),
            }
            for hold in self._holds.values()
        ]

    def _counts(self, hold: Hold, model: str) -> bool:
        fresh = self._clock.monotonic() - hold.since < self._config.hold_limit_s
        return fresh and hold.model in (model, EVERY_MODEL)
