"""What the kernel knows about its clock: whether a time server disciplines it, and which boot this is.

Source: adjtimex(2). Reading needs no privilege. Absent on purpose: setting the clock.
"""

from __future__ import annotations

import ctypes
import os
from pathlib import Path
from typing import Final

_TIMEX_BYTES: Final = 208  # struct timex on 64-bit Linux; modes = 0 only reads
_TIME_ERROR: Final = 5  # clock state: not synchronized
_BOOT_ID: Final = Path("/proc/sys/kernel/random/boot_id")


class KernelClock:
    """Asks the kernel whether its clock is synchronized."""

    def __init__(self) -> None:
        libc = ctypes.CDLL(None, use_errno=True)
        self._adjtimex = getattr(libc, "adjtimex", None)

    def synchronized(self) -> bool:
        """Tell whether a time server disciplines the clock; ``False`` also when the kernel does not say."""
        if self._adjtimex is None:
            return False
        state = int(self._adjtimex(ctypes.create_string_buffer(_TIMEX_BYTES)))
        return 0 <= state < _TIME_ERROR


def boot_id() -> str:
    """Return the kernel's id of this boot, or a text that names this process if there is none."""
    try:
        return _BOOT_ID.read_text().strip()
    except OSError:
        return f"pid-{os.getpid()}"
