"""Give back to the system what the heap holds and nobody uses.

glibc keeps the memory of freed large bodies for the next ones, which then cost a third; up to twice the largest, and
for ever. A box that is idle again should not pay for the largest request it ever saw.
"""

from __future__ import annotations

import ctypes
from typing import Final

from agent.clock import Clock

_INTERVAL_S: Final = 30.0  # long against a burst of requests, which is to find the memory warm
_KEPT_BYTES: Final = 1 << 20  # at the heap's end


class HeapTrimmer:
    """Trims the heap now and then; with another C library than glibc it does nothing."""

    name = "heap"

    def __init__(self, clock: Clock, *, interval_s: float = _INTERVAL_S) -> None:
        self._clock = clock
        self._interval_s = interval_s

    async def run(self) -> None:
        """Trim until cancelled."""
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        while True:
            await self._clock.sleep(self._interval_s)
            if trim is not None:
                trim(ctypes.c_size_t(_KEPT_BYTES))
