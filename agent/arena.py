"""The daemon's own shared memory: pooled slots for large bodies and answers that are not in a client's region.

A body is received straight into a slot, and the worker gets a reference instead of bytes; a large answer is written by
the worker into a slot, and sent from there. Slots are kept per model: a worker keeps what it was given mapped, so what
was lent to one model's workers never holds another model's data.

A slot goes back when its last holder lets go: each ``lease`` (a memoryview and all its slices) until it is collected,
and each worker that may still touch it until it has answered or died. Promises: that happens exactly once per use; the
bounds hold; running out is no error, the caller then copies as if there were no arena; what is not used for a while is
given back to the kernel, because its pages count as the daemon's own. Single-threaded.
"""

from __future__ import annotations

import ctypes
import fcntl
import itertools
import mmap
import os
import weakref
from collections import OrderedDict
from typing import Any, Final

from agent.clock import Clock
from agent.regions import Region

SHARED_BYTES_MIN: Final = 64 * 1024  # smaller bodies are cheaper sent
_SLOT_BYTES_MIN: Final = 128 * 1024
_SEALS: Final = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL


class Slot(Region):
    """One piece of memory of the daemon's own, for one model. Made by ``Arena.take``, with one holder."""

    __slots__ = ("memory", "model")

    def __init__(self, arena: Arena, number: int, nbytes: int, model: str) -> None:
        descriptor = os.memfd_create("inferd-arena", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        super().__init__(arena, number, descriptor, nbytes)
        self.model = model
        try:
            os.ftruncate(descriptor, nbytes)
            fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, _SEALS)
            self.memory = mmap.mmap(descriptor, nbytes)
        except BaseException:
            os.close(descriptor)
            raise

    def lease(self, nbytes: int) -> memoryview:
        """Return the first bytes; they are held until nothing refers to them any more."""
        kind: Any = ctypes.c_ubyte * nbytes
        exporter = kind.from_buffer(self.memory)
        exporter.slot = self
        self.hold()
        weakref.finalize(exporter, self.release).atexit = False
        return memoryview(exporter).cast("B")


class Arena:
    """All slots.

    Args:
        bytes_max: Of all slots together; 0 for no arena.
        idle_bytes_max: Of those kept for reuse.
    """

    def __init__(self, *, bytes_max: int, idle_bytes_max: int) -> None:
        self.held_bytes = 0
        self.idle_bytes = 0
        self._bytes_max = bytes_max
        self._idle_bytes_max = idle_bytes_max
        self._idle: OrderedDict[Slot, int] = OrderedDict()  # the longest unused first, each since which sweep
        self._sweeps = 0
        self._numbers = itertools.count(2, 2)  # even; clients' regions have odd numbers

    def take(self, model: str, nbytes: int) -> Slot | None:
        """Return a slot of at least ``nbytes`` for ``model``; ``None`` if there is no room."""
        size = max(_SLOT_BYTES_MIN, 1 << (nbytes - 1).bit_length())
        for slot in reversed(self._idle):  # the last used is the warmest
            if slot.nbytes == size and slot.model == model:
                del self._idle[slot]
                self.idle_bytes -= size
                slot.hold()
                return slot
        while self._idle and self.held_bytes + size > self._bytes_max:
            self._destroy(next(iter(self._idle)))
        if self.held_bytes + size > self._bytes_max:
            return None
        try:
            slot = Slot(self, next(self._numbers), size, model)
        except OSError:  # out of descriptors or memory
            return None
        self.held_bytes += size
        return slot

    def end(self, region: Region) -> None:
        """Keep the slot for reuse; called when its last holder let go."""
        assert isinstance(region, Slot)
        self._idle[region] = self._sweeps
        self.idle_bytes += region.nbytes
        while self.idle_bytes > self._idle_bytes_max:
            self._destroy(next(iter(self._idle)))

    def sweep(self) -> None:
        """Give back the slots that were idle all the time since the last sweep."""
        while self._idle and next(iter(self._idle.values())) < self._sweeps:
            self._destroy(next(iter(self._idle)))
        self._sweeps += 1

    def _destroy(self, slot: Slot) -> None:
        del self._idle[slot]
        self.idle_bytes -= slot.nbytes
        self.held_bytes -= slot.nbytes
        slot.close()


class ArenaKeeper:
    """Component: after a burst, let go of what nobody used for ``idle_s`` (seconds; at most twice that)."""

    name = "arena"

    def __init__(self, arena: Arena, *, clock: Clock, idle_s: float) -> None:
        self._arena = arena
        self._clock = clock
        self._idle_s = idle_s

    async def run(self) -> None:
        """Sweep until cancelled."""
        while True:
            await self._clock.sleep(self._idle_s)
            self._arena.sweep()


def slot_of(body: object) -> Slot | None:
    """Return the slot that a body lies in, if it is a lease."""
    return getattr(body.obj, "slot", None) if isinstance(body, memoryview) else None
