"""One connection's shared memory: descriptors on their way in, and regions by the client's own numbers.

A descriptor belongs to the ``attach`` frame it travels with; one that comes with anything else is a fault of the whole
connection. Promises: every descriptor received is either adopted by the table or closed; ``close`` lets everything go.
Leaves out: the socket, answers, and what tensors lie where (the worker checks that).
"""

from __future__ import annotations

import array
import socket
from collections import deque
from collections.abc import Iterable
from typing import Any, Final

from agent.config import SharedMemoryConfig
from agent.errors import FrameError, InvalidInputError, OverloadedError, TooLargeError
from agent.regions import Region, RegionTable, discard
from agent.serving.identity import Caller, require
from agent.wire import parse_region

_DESCRIPTORS_MAX: Final = 8  # waiting for their frames; each frame takes one
ANCILLARY_BYTES: Final = socket.CMSG_SPACE(_DESCRIPTORS_MAX * array.array("i").itemsize)

NamedRegion = tuple[int, Region]  # the client's number first


class Attachments:
    """What one client has attached."""

    __slots__ = ("_bytes", "_config", "_regions", "_table", "_waiting")

    def __init__(self, table: RegionTable, config: SharedMemoryConfig) -> None:
        self._table = table
        self._config = config
        self._regions: dict[int, Region] = {}
        self._bytes = 0
        self._waiting: deque[int] = deque()

    @property
    def descriptors_wait(self) -> bool:
        """Whether descriptors have come that no frame has claimed."""
        return bool(self._waiting)

    def receive(self, ancillary: Iterable[tuple[int, int, bytes]], flags: int) -> None:
        """Take the descriptors that came with a read.

        Raises:
            FrameError: more than a connection may send at once.
        """
        for level, kind, data in ancillary:
            if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
                numbers = array.array("i")
                numbers.frombytes(data[: len(data) - len(data) % numbers.itemsize])
                self._waiting.extend(numbers)
        if flags & socket.MSG_CTRUNC or len(self._waiting) > _DESCRIPTORS_MAX:
            raise FrameError(f"more than {_DESCRIPTORS_MAX} descriptors at once")

    def attach(self, header: dict[str, Any], caller: Caller) -> int:
        """Adopt the descriptor that came with an ``attach`` frame; return the region's number.

        Raises:
            FrameError: no descriptor came with the frame.
            AgentError: the region is refused or the caller may not; the descriptor is closed.
        """
        if not self._waiting:
            raise FrameError("'attach' needs one descriptor")
        descriptor = self._waiting.popleft()
        try:
            require(caller, "infer")
            number, nbytes = parse_region(header.get("region")), header.get("nbytes")
            if type(nbytes) is not int or nbytes < 1:
                raise InvalidInputError("'nbytes' must be an integer from 1")
            if nbytes > self._config.region_bytes_max:
                raise TooLargeError(f"region of {nbytes} bytes; the limit is {self._config.region_bytes_max}")
            if number in self._regions:
                raise InvalidInputError(f"region {number} is attached already")
            if len(self._regions) >= self._config.regions_max:
                raise OverloadedError(f"{self._config.regions_max} regions are attached on this connection")
            if self._bytes + nbytes > self._config.region_bytes_max:
                raise OverloadedError(f"a connection's regions may hold {self._config.region_bytes_max} bytes")
        except BaseException:
            discard(descriptor)
            raise
        self._regions[number] = self._table.adopt(descriptor, nbytes)
        self._bytes += nbytes
        return number

    def detach(self, header: dict[str, Any]) -> int:
        """Let a region go; requests that name it keep it until they are answered.

        Raises:
            InvalidInputError: no such region.
        """
        number = parse_region(header.get("region"))
        region = self._regions.pop(number, None)
        if region is None:
            raise InvalidInputError(f"region {number} is not attached")
        self._bytes -= region.nbytes
        region.release()
        return number

    def find(self, header: dict[str, Any]) -> NamedRegion:
        """Return the region that a header names.

        Raises:
            InvalidInputError: no such region.
        """
        number = parse_region(header.get("region"))
        region = self._regions.get(number)
        if region is None:
            raise InvalidInputError(f"region {number} is not attached")
        return number, region

    def named_in(self, header: dict[str, Any]) -> tuple[NamedRegion, ...]:
        """Return the regions an ``infer`` header names, those that are not attached left out: the worker says so."""
        if not self._regions:
            return ()
        named: dict[int, Region] = {}
        entries = header.get("tensors")
        places = [*entries, header.get("reply")] if isinstance(entries, list) else ()
        for place in places:
            number = place.get("region") if isinstance(place, dict) else None
            if type(number) is int and number in self._regions:
                named[number] = self._regions[number]
        return tuple(named.items())

    def close(self) -> None:
        """Let everything go."""
        while self._waiting:
            discard(self._waiting.popleft())
        regions, self._regions = self._regions, {}
        self._bytes = 0
        for region in regions.values():
            region.release()
