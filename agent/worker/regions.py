"""Shared memory as a worker sees it: regions the daemon handed over, mapped, and looked up by the daemon's numbers.

Promises: nothing is mapped whose size is not sealed, so no access can fault; a region that could not be mapped fails
the requests that name it and nothing else; memory is unmapped once it is detached and no request looks at it any
more (its views keep it). The descriptor is not kept open by us (before Python 3.13 ``mmap`` keeps one of its own).
Leaves out: what lies in a region, and who may change it meanwhile: the client may, at any time.
"""

from __future__ import annotations

import fcntl
import mmap
import os
from collections.abc import Mapping
from typing import Any, Final

from agent.errors import AgentError, FrameError, InferenceError, OutOfMemoryError, TensorError

_SEALS: Final = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW


class Region:
    """One mapped region."""

    __slots__ = ("view", "writable")

    def __init__(self, view: memoryview, *, writable: bool) -> None:
        self.view = view
        self.writable = writable

    def part(self, offset: int, nbytes: int) -> memoryview:
        """Return some of its bytes.

        Raises:
            TensorError: they do not lie inside.
        """
        if offset + nbytes > len(self.view):
            raise TensorError(f"{nbytes} bytes at {offset} run past the region of {len(self.view)} bytes")
        return self.view[offset : offset + nbytes]


Named = Mapping[int, Region]  # by the client's numbers


class Regions:
    """Everything that is attached to this worker."""

    def __init__(self) -> None:
        self._regions: dict[int, Region | AgentError] = {}

    def __len__(self) -> int:
        return len(self._regions)

    def attach(self, header: Mapping[str, Any], descriptor: int) -> None:
        """Map a region; the descriptor is closed (-1: it was lost on its way).

        Raises:
            FrameError: the header is malformed.
        """
        try:
            number, nbytes = header.get("region"), header.get("nbytes")
            if type(number) is not int or type(nbytes) is not int:
                raise FrameError("'attach' needs region and nbytes")
            try:
                if descriptor < 0:
                    raise OutOfMemoryError("no descriptor is left for the region")
                self._regions[number] = _map(descriptor, nbytes)
            except AgentError as error:
                self._regions[number] = error
        finally:
            if descriptor >= 0:
                os.close(descriptor)

    def detach(self, header: Mapping[str, Any]) -> None:
        """Forget a region; requests that look at it keep it mapped until they end."""
        self._regions.pop(header.get("region", -1), None)

    def part(self, number: int, offset: int, nbytes: int) -> memoryview:
        """Return some bytes of a region of the daemon's own; raises as ``named``."""
        return self.find(number).part(offset, nbytes)

    def named(self, pairs: Any) -> Named:
        """Return the regions of one request.

        Args:
            pairs: The client's number and the daemon's, for each.

        Raises:
            FrameError: the daemon names what it did not attach.
            AgentError: one of them could not be mapped.
        """
        return {client_number: self.find(number) for client_number, number in pairs}

    def find(self, number: int) -> Region:
        """Return a region by the daemon's number; raises as ``named``."""
        region = self._regions.get(number)
        if region is None:
            raise FrameError(f"region {number} was not attached")
        if isinstance(region, AgentError):
            raise type(region)(str(region))
        return region


def _map(descriptor: int, nbytes: int) -> Region:
    try:
        if fcntl.fcntl(descriptor, fcntl.F_GET_SEALS) & _SEALS != _SEALS or os.fstat(descriptor).st_size != nbytes:
            raise InferenceError("the region is not sealed at its size")
        try:
            return Region(memoryview(mmap.mmap(descriptor, nbytes)), writable=True)
        except PermissionError:  # opened or sealed for reading only: good enough for inputs
            return Region(memoryview(mmap.mmap(descriptor, nbytes, access=mmap.ACCESS_READ)), writable=False)
    except OSError as error:
        raise OutOfMemoryError(f"the region of {nbytes} bytes cannot be mapped: {error.strerror}") from error
