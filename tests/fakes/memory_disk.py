"""The durable part of a box in memory, for thousands of lives: journal, pointers, versions, and where the power goes.

The journal is the real one with its SQL, on a database in memory and without its thread. A cut comes before a write or
after it; from then on nothing is written any more until the box starts again.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Callable
from pathlib import Path
from typing import Any, Self

from agent.deploy.journal import Journal, connect
from agent.deploy.pointer import Pointer, Pointers
from agent.errors import DiskFullError


class PowerCutError(BaseException):
    """The box lost power: nothing after this line happened."""


class _Kept(sqlite3.Connection):
    """A database that outlives its processes; each transaction is a write of its disk."""

    disk: Disk

    def close(self) -> None:
        """Leave it to the next life."""

    def __enter__(self) -> Self:
        self.disk.before_write()
        return super().__enter__()

    def __exit__(self, *error: Any) -> Any:
        result = super().__exit__(*error)
        if error[0] is None:
            self.disk.after_write()
        return result


_EMPTY = connect(Path(":memory:"))


class Disk:
    """What a power cut leaves. ``writes_left``: how many writes there still are before the cut.

    ``written`` hears of each pointer that became durable, with the one before.
    """

    def __init__(self, written: Callable[[Pointer | None, Pointer | None], None]) -> None:
        self.writes_left: int | None = None
        self.after = False  # the cut comes after its write
        self.dead = False
        self._cuts = False  # at the write that is under way
        self.full = 0  # writes that find no room
        self.pointers: dict[str, Pointer] = {}
        self.versions: dict[str, set[str]] = {}  # by model, complete and verified once
        self.damaged: set[tuple[str, str]] = set()
        self.written = written
        self.database = sqlite3.connect(":memory:", check_same_thread=False, factory=_Kept)
        self.database.disk = self
        _EMPTY.backup(self.database)

    def before_write(self) -> None:
        """Begin a durable write."""
        if self.dead:
            raise PowerCutError
        if self.full:
            self.full -= 1
            raise DiskFullError("no space")
        self._cuts = self.writes_left is not None and self.writes_left <= 0
        if self.writes_left is not None:
            self.writes_left -= 1
        if self._cuts and not self.after:
            self.dead = True
            raise PowerCutError

    def after_write(self) -> None:
        """End a durable write."""
        if self._cuts:
            self.dead = True
            raise PowerCutError

    def restart(self) -> None:
        """The power is back."""
        self.dead, self.writes_left = False, None


class MemoryJournal(Journal):
    """The journal on a ``Disk``."""

    def __init__(self, disk: Disk) -> None:
        super().__init__(Path("/nowhere/journal.db"), connector=lambda _: disk.database)
        self._thread.shutdown(wait=False)
        self._disk = disk

    async def _do(self, work: Callable[[], Any]) -> Any:
        return work()

    def _open(self) -> str:
        self._database = self._disk.database
        return ""


class MemoryPointers(Pointers):
    """The pointers on a ``Disk``."""

    def __init__(self, disk: Disk) -> None:
        super().__init__(Path("/nowhere/active"))
        self._disk = disk

    def all(self) -> tuple[list[Pointer], list[str]]:
        return [self._disk.pointers[slot] for slot in sorted(self._disk.pointers)], []

    def read(self, slot: str) -> Pointer | None:
        return self._disk.pointers.get(slot)

    def write(self, pointer: Pointer) -> None:
        self._disk.before_write()
        before = self._disk.pointers.get(pointer.slot)
        self._disk.pointers[pointer.slot] = pointer
        self._disk.written(before, pointer)
        self._disk.after_write()

    def remove(self, slot: str) -> None:
        self._disk.before_write()
        before = self._disk.pointers.pop(slot, None)
        self._disk.written(before, None)
        self._disk.after_write()
