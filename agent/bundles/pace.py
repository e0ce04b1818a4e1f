"""How fast bytes may come, and how slowly: a limit that several threads share, and what counts as a stall."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Final

from agent.bundles.bodies import READ_BYTES
from agent.errors import TransientError

RATE_BYTES_PER_S_MIN: Final = 1024  # averaged over one stall timeout; slower is a stall
_SLICES_PER_S: Final = 4  # a limited reader takes a quarter of a second's bytes at a time


class Throttle:
    """Lets ``rate`` bytes per second through, for all threads together; 0: any number.

    Bytes are paid for after they came: a reader that waits here reads no more, and the sender fills its window and
    waits as well.
    """

    def __init__(
        self,
        rate_bytes_per_s: int,
        *,
        now: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._rate = rate_bytes_per_s
        self._now = now
        self._sleep = sleep
        self._free_at = 0.0  # when the bytes let through so far will have been paid for
        self._lock = threading.Lock()

    @property
    def read_bytes(self) -> int:
        """At most so many bytes may be read at once."""
        return min(READ_BYTES, max(1024, self._rate // _SLICES_PER_S)) if self._rate else READ_BYTES

    def spend(self, size: int) -> None:
        """Return once ``size`` more bytes are within the rate."""
        if not self._rate:
            return
        with self._lock:
            now = self._now()
            self._free_at = max(self._free_at, now) + size / self._rate
            wait_s = self._free_at - now
        self._sleep(wait_s)


class Pace:
    """Tells a slow link from a server that drips bytes to hold us.

    Args:
        stall_timeout_s: Seconds of waiting after which the bytes that came are weighed.
    """

    def __init__(self, what: str, stall_timeout_s: float) -> None:
        self._what = what
        self._stall_timeout_s = stall_timeout_s
        self._waited_s = 0.0
        self._received = 0

    def add(self, size: int, waited_s: float) -> None:
        """Count ``size`` bytes that were waited for; time spent otherwise is not the server's.

        Raises:
            TransientError: the last stall timeout brought less than the minimum rate.
        """
        self._received += size
        self._waited_s += waited_s
        if self._waited_s < self._stall_timeout_s:
            return
        if self._received < self._waited_s * RATE_BYTES_PER_S_MIN:
            raise TransientError(f"{self._what}: {self._received} bytes in {self._waited_s:.0f} s: stalled")
        self._waited_s, self._received = 0.0, 0
