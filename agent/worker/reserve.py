"""Address space kept back, so that a worker at its memory limit can still say so.

A runtime that has used up the limit leaves nothing for packing the answer. The reserve costs no memory: its pages are
never touched.
"""

from __future__ import annotations

import mmap
from typing import Final

_BYTES: Final = 16 * 1024 * 1024


class Reserve:
    """So many bytes of address space, unless there is no limit (``wanted``)."""

    def __init__(self, *, wanted: bool) -> None:
        self._wanted = wanted
        self._held: mmap.mmap | None = None
        self.keep()

    def give(self) -> None:
        """Give it up: memory has run out."""
        if self._held is not None:
            self._held.close()
            self._held = None

    def keep(self) -> None:
        """Take it back if that is possible again."""
        if self._wanted and self._held is None:
            try:
                self._held = mmap.mmap(-1, _BYTES)
            except (OSError, ValueError, MemoryError):
                self._held = None
