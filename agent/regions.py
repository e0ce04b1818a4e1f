"""Shared memory as the daemon knows it: sealed files, counted holders, bounds. The daemon maps no client's memory.

A region is a memfd whose size is sealed, so that no one who maps it can be made to fault. It lives as long as somebody
holds it: the connection that attached it, each request that names it, each worker that may still touch it. When the
last holder lets go, its users (workers that have it mapped) are told, and the descriptor is closed.

Promises: a descriptor handed to ``adopt`` is closed exactly once, whatever happens; the bounds in count and bytes hold
over all regions that still exist, not only those still attached. Single-threaded, but for closing what is refused.
Leaves out: whose region it is and under which number (``serving/attachments.py``), mapping (``worker/regions.py``).
"""

from __future__ import annotations

import fcntl
import itertools
import os
import threading
from typing import Final, Protocol

from agent.errors import InvalidInputError, OverloadedError

_SEALS: Final = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW


class RegionOwner(Protocol):
    """Who made a region."""

    def end(self, region: Region) -> None:
        """Nobody holds the region any more."""


class RegionUser(Protocol):
    """Who has a region mapped beyond its requests: a worker's link."""

    def region_gone(self, region: Region) -> None:
        """The region ends; let go of it."""


class Region:
    """One sealed memfd. Born with one holder."""

    __slots__ = ("_holders", "_owner", "descriptor", "nbytes", "number", "users")

    def __init__(self, owner: RegionOwner, number: int, descriptor: int, nbytes: int) -> None:
        self.number = number  # unique in the daemon's life
        self.descriptor = descriptor
        self.nbytes = nbytes
        self.users: set[RegionUser] = set()
        self._owner = owner
        self._holders = 1

    def hold(self) -> None:
        """Keep the region alive until a matching ``release``."""
        self._holders += 1

    def release(self) -> None:
        """Let go; the last one ends the region."""
        self._holders -= 1
        if not self._holders:
            self._owner.end(self)

    def close(self) -> None:
        """Tell the users that it is gone, and close the descriptor."""
        for user in tuple(self.users):
            user.region_gone(self)
        self.users.clear()
        os.close(self.descriptor)
        self.descriptor = -1


class RegionTable:
    """All regions that clients attached, under the daemon's own numbers.

    Args:
        count_max: Regions that may exist at once.
        bytes_max: Bytes of them together.
    """

    def __init__(self, *, count_max: int, bytes_max: int) -> None:
        self.count = 0
        self.held_bytes = 0
        self._count_max = count_max
        self._bytes_max = bytes_max
        self._numbers = itertools.count(1, 2)  # odd; the daemon's own slots have even numbers
        self._device: int | None = None  # of the kernel's own shared-memory mount; huge-page files have another

    def adopt(self, descriptor: int, nbytes: int) -> Region:
        """Return a region over ``descriptor``, which is ours from here on, also on failure.

        Raises:
            InvalidInputError: not a memfd sealed against shrinking and growing, or not of that size.
            OverloadedError: the bound of all regions is reached.
        """
        if not is_sealed(descriptor):  # nothing else may be asked of a foreign file: its owner may let us wait
            discard(descriptor)
            raise InvalidInputError("the descriptor must be a memfd sealed against shrinking and growing")
        try:
            self._check(descriptor, nbytes)
        except BaseException:
            os.close(descriptor)
            raise
        self.count += 1
        self.held_bytes += nbytes
        return Region(self, next(self._numbers), descriptor, nbytes)

    def end(self, region: Region) -> None:
        """Close and stop counting; called by the last ``release``."""
        region.close()
        self.count -= 1
        self.held_bytes -= region.nbytes

    def _check(self, descriptor: int, nbytes: int) -> None:
        status = os.fstat(descriptor)
        if self._device is None:
            self._device = _shared_memory_device()
        if status.st_dev != self._device:
            raise InvalidInputError("the descriptor must be a memfd of ordinary pages")
        if status.st_size != nbytes:
            raise InvalidInputError(f"the region has {status.st_size} bytes, not {nbytes}")
        if self.count >= self._count_max:
            raise OverloadedError(f"{self._count_max} regions are attached")
        if self.held_bytes + nbytes > self._bytes_max:
            raise OverloadedError(f"all regions together may hold {self._bytes_max} bytes")


def is_sealed(descriptor: int) -> bool:
    """Whether this is a memfd that can neither shrink nor grow. Never blocks."""
    try:
        return fcntl.fcntl(descriptor, fcntl.F_GET_SEALS) & _SEALS == _SEALS
    except OSError:
        return False


def discard(descriptor: int) -> None:
    """Close a descriptor of unknown kind beside the loop: closing may wait for whoever serves that file."""
    threading.Thread(target=os.close, args=(descriptor,), name="discard", daemon=True).start()


def _shared_memory_device() -> int:
    descriptor = os.memfd_create("inferd-probe", os.MFD_CLOEXEC)
    try:
        return os.fstat(descriptor).st_dev
    finally:
        os.close(descriptor)
