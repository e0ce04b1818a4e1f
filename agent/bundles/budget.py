"""How many bytes a metered link may still bring, remembered across restarts.

A window begins with its first byte and lasts a fixed time; what is spent is written down before it is fetched, so that
a kill or power cut never makes a box spend twice. Metadata is not counted: it is small, and a box must hear of
revocations. Several pulls share the counter.
"""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from agent.durable import read_json, write_json
from agent.errors import BudgetError, StateError


@dataclass(frozen=True, slots=True, kw_only=True)
class Window:
    """What was spent since when (Unix seconds)."""

    since: float = 0.0
    spent: int = 0

    def at(self, now: float, window_s: float) -> Window:
        """Return the window that holds at ``now``; a clock that was set back makes it longer, never anew."""
        if self.spent == 0 or now >= self.since + window_s:
            return Window(since=now)
        return Window(since=min(self.since, now), spent=self.spent)


class Budget:
    """The counter in ``path``.

    Args:
        size_bytes: Per window; 0: no limit, and nothing is counted.
        wall: Unix seconds.
    """

    def __init__(self, path: Path, *, size_bytes: int, window_s: float, wall: Callable[[], float] = time.time) -> None:
        self._path = path
        self._size_bytes = size_bytes
        self._window_s = window_s
        self._wall = wall

    def charge(self, size: int) -> None:
        """Spend ``size`` bytes, durably, before they are fetched.

        Raises:
            BudgetError: fewer are left; ``retry_after_s`` says when the next window begins.
            DiskFullError: the counter cannot be written, so nothing may be fetched.
        """
        if not self._size_bytes:
            return
        with self._held():
            now = self._wall()
            window = self._read().at(now, self._window_s)
            if window.spent + size > self._size_bytes:
                wait_s = max(1.0, window.since + self._window_s - now)
                raise BudgetError(
                    f"{window.spent} of [store] budget_bytes = {self._size_bytes} are spent, {size} more are needed; "
                    f"the pull goes on in {_duration(wait_s)}",
                    retry_after_s=wait_s,
                )
            self._write(Window(since=window.since, spent=window.spent + size))

    def settle(self, charged: int, used: int) -> None:
        """Correct a charge by what was really fetched: less after a cut, more from a server that began anew."""
        if not self._size_bytes or charged == used:
            return
        with self._held():
            window = self._read()
            self._write(Window(since=window.since, spent=max(0, window.spent + used - charged)))

    def _read(self) -> Window:
        with suppress(StateError, KeyError, TypeError, ValueError):  # a broken counter must not stop a box for good
            raw = read_json(self._path)
            return Window(since=float(raw["since"]), spent=int(raw["spent"]))
        return Window()

    def _write(self, window: Window) -> None:
        write_json(self._path, {"since": window.since, "spent": window.spent})

    @contextmanager
    def _held(self) -> Iterator[None]:
        flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
        descriptor = os.open(self._path.with_suffix(".lock"), flags, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield
        finally:
            os.close(descriptor)


def _duration(seconds: float) -> str:
    hours, minutes = divmod(int(seconds // 60), 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {int(seconds % 60)} s"
