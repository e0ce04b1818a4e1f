"""Running batches: at once while that is quick, beside the loop when it is slow.

A slow model would keep the loop from receiving, decoding and answering, so its batches run in a thread of their own
while the next one is received and decoded and the last one's answers are made and leave. Runtimes let go of the
interpreter's lock while they compute. For a quick model the two hand-overs would cost more than they save.

Promises: one batch runs at a time, in the order given; its outcomes come back once. Leaves out: what a batch is.
"""

from __future__ import annotations

import math
import os
import sys
import threading
import time
from collections.abc import Callable
from queue import SimpleQueue
from typing import Final, Generic, TypeVar

SLOW_S: Final = 0.002  # a batch that takes longer is worth two hand-overs between threads (about 0.1 ms)
_WEIGHT: Final = 0.25  # of the newest measurement
_SWITCH_S: Final = 0.0005  # how long the loop may keep the interpreter's lock from a batch that is done

B = TypeVar("B")
R = TypeVar("R")


class Execution(Generic[B, R]):
    """The one place where batches run.

    Args:
        work: Runs a batch and returns its outcomes; called from one thread at a time.
        slow_s: From which typical duration on it runs beside the loop (seconds).
    """

    def __init__(self, work: Callable[[B], R], *, slow_s: float = SLOW_S) -> None:
        self.descriptor = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)  # readable when a batch is done
        self.running: B | None = None
        self.since = 0.0  # when it began (seconds, monotonic)
        self._work = work
        self._slow_s = slow_s
        self._typical_s = 0.0
        self._took_s = math.inf  # the last run
        self._orders: SimpleQueue[B] = SimpleQueue()
        self._done: tuple[R] | BaseException | None = None  # set before the descriptor becomes readable
        self._thread: threading.Thread | None = None

    def start(self, batch: B) -> R | None:
        """Run ``batch``; return its outcomes, or ``None`` if ``finish`` will when ``descriptor`` is readable."""
        self.since = time.monotonic()
        if self._typical_s < self._slow_s:
            outcome = self._work(batch)
            self._learn(time.monotonic() - self.since)
            return outcome
        if self._thread is None:
            sys.setswitchinterval(_SWITCH_S)
            self._thread = threading.Thread(target=self._serve, name="batches", daemon=True)
            self._thread.start()
        self.running = batch
        self._orders.put(batch)
        return None

    def finish(self) -> tuple[B, R]:
        """Return the batch that is done and its outcomes; what its work raised is raised here."""
        os.eventfd_read(self.descriptor)
        batch, done = self.running, self._done
        assert batch is not None
        assert done is not None
        self.running = self._done = None
        if isinstance(done, BaseException):
            raise done
        self._learn(time.monotonic() - self.since)
        return batch, done[0]

    def _learn(self, took_s: float) -> None:
        """Follow the typical duration. Of two runs the shorter counts: one that was interrupted tells nothing."""
        self._typical_s += _WEIGHT * (min(took_s, self._took_s) - self._typical_s)
        self._took_s = took_s

    def _serve(self) -> None:
        while True:
            batch = self._orders.get()
            try:
                self._done = (self._work(batch),)
            except BaseException as error:  # noqa: BLE001  the loop raises it
                self._done = error
            os.eventfd_write(self.descriptor, 1)
