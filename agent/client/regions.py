"""Shared memory on the client's side: regions for arrays that are never sent, and staging for those that are large.

A ``Region`` is the application's: arrays made by it go by reference wherever they are used as inputs. Arrays that lie
elsewhere and are large are copied once into a staging region, which the client makes, keeps and reuses by itself;
large answers come back the same way once their size is known.

Promises: a staging region is reused only after the answer that used it arrived whole; after anything else (error, no
answer, a new connection in between) it is thrown away, because a worker may still write to it. Does no socket I/O.
"""

from __future__ import annotations

import fcntl
import mmap
import os
import time
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import count
from types import TracebackType
from typing import Any, Final, NamedTuple, Self

import numpy as np
import numpy.typing as npt

from agent.errors import FrameError, TensorError
from agent.tensors import Array, as_array, dtype_name, pack
from agent.wire import SHARED_ALIGN, Buffer, Tensor

STAGED_BYTES_MIN: Final = 64 * 1024  # smaller arrays are cheaper sent than named
_STAGING_BYTES_MIN: Final = 256 * 1024
_STAGING_BYTES_MAX: Final = 64 * 1024 * 1024  # of one region; above it arrays are sent
_FREE_MAX: Final = 8  # staging regions kept for reuse
_FREE_BYTES_MAX: Final = 128 * 1024 * 1024
_LEARNED_MAX: Final = 256  # models whose answer's size is remembered
_REFUSED_PAUSE_S: Final = 10.0  # after the daemon refused a staging region arrays are sent for so long


class StagingRefusedError(Exception):
    """The daemon does not take our staging region; the same request can be sent as bytes."""


class Region:
    """Memory that this process and the daemon's workers share. Made by ``Client.region``.

    Arrays from ``array``, and contiguous views of them, are passed to models without being copied or sent. A model may
    read them until its answer has arrived; change them only between requests.
    """

    __slots__ = (
        "__weakref__", "_close_descriptor", "_closed", "_forget", "_memory", "address", "attached_to", "attachments",
        "descriptor", "nbytes", "number",
    )  # fmt: skip

    def __init__(self, number: int, nbytes: int, forget: Callable[[Region], None]) -> None:
        if nbytes < 1:
            raise TensorError(f"a region needs at least one byte, not {nbytes}")
        self.number = number
        self.nbytes = nbytes
        self.attached_to: object = None  # the connection that knows it
        self.attachments = 0  # how many connections have known it
        self._forget = forget
        self._closed = False
        self.descriptor = os.memfd_create("inferd-region", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        self._close_descriptor = weakref.finalize(self, os.close, self.descriptor)  # also if it is never closed
        os.ftruncate(self.descriptor, nbytes)
        fcntl.fcntl(self.descriptor, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL)
        self._memory = memoryview(mmap.mmap(self.descriptor, nbytes))
        self.address = int(np.frombuffer(self._memory, np.uint8).__array_interface__["data"][0])

    def array(self, shape: int | Sequence[int], dtype: npt.DTypeLike = np.float32, offset: int = 0) -> Array:
        """Return a writable array over the region's bytes from ``offset``; multiples of 64 are fastest.

        Raises:
            TensorError: it does not lie inside, or the dtype has no fixed size.
        """
        if self._closed:
            raise TensorError("the region is closed")
        kind = np.dtype(dtype)
        if kind.hasobject:
            raise TensorError("objects cannot lie in shared memory")
        try:
            return np.ndarray(shape, kind, self._memory, offset)
        except (TypeError, ValueError) as error:
            raise TensorError(f"{kind}{shape} at {offset} does not fit a region of {self.nbytes} bytes") from error

    def part(self, offset: int, nbytes: int) -> memoryview:
        """Return some of its bytes."""
        if offset < 0 or offset + nbytes > self.nbytes:
            raise FrameError(f"{nbytes} bytes at {offset} are outside the region of {self.nbytes} bytes")
        return self._memory[offset : offset + nbytes]

    def note_attached(self, connection: object) -> None:
        """Record that ``connection`` knows the region."""
        self.attached_to = connection
        self.attachments += 1

    def close(self) -> None:
        """Detach it from the daemon. Arrays over it stay valid in this process; the memory goes with the last."""
        if not self._closed:
            self._closed = True
            self._forget(self)
            self._close_descriptor()
            self._memory = memoryview(b"")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class Plan(NamedTuple):
    """How one request's tensors travel."""

    entries: list[dict[str, Any]]
    buffers: list[Buffer]
    reply: dict[str, int] | None
    regions: Mapping[int, Region]  # everything the request names
    staging: Region | None  # the one of them that is ours to reuse


class SharedMemory:
    """The regions of one client, and the decisions which tensors go through them.

    Args:
        forget: Called when a region is closed: tell the daemon, if it knows the region.
    """

    def __init__(self, forget: Callable[[Region], None]) -> None:
        self._tell = forget
        self._numbers = count()
        self._own: dict[int, Region] = {}  # the application's
        self._free: list[Region] = []
        self._learned: dict[str, int] = {}  # by model: bytes that a window needs for its last large answer
        self._paused_until = 0.0

    def region(self, nbytes: int) -> Region:
        """Return a new region for the application."""
        region = Region(next(self._numbers), nbytes, self._forget)
        self._own[region.number] = region
        return region

    def plan(self, model: str, inputs: Mapping[str, Array], reply: Region | None = None) -> Plan | None:
        """Decide for one request; ``None`` if nothing of it goes through shared memory.

        Raises:
            TensorError: a dtype the wire does not carry.
        """
        window_bytes = self._learned.get(model, 0) if reply is None else 0
        if not self._own and reply is None and not window_bytes:
            for value in inputs.values():
                if getattr(value, "nbytes", 0) > STAGED_BYTES_MIN:
                    break
            else:
                return None
        arrays = {name: np.asarray(value) for name, value in inputs.items()}
        entries: dict[str, dict[str, Any]] = {}
        regions: dict[int, Region] = {}
        staged: dict[str, Array] = {}
        for name, array in arrays.items():
            place = self._place_of(array)
            if place is not None:
                region, offset = place
                regions[region.number] = region
                entries[name] = _entry(name, array, region, offset)
            elif _is_large(array) and dtype_name(array) != "bytes":
                staged[name] = array
        staging = self._take_staging([array.nbytes for array in staged.values()], window_bytes)
        window: dict[str, int] | None = None
        if staging is not None:
            regions[staging.number] = staging
            end = self._copy_in(staging, staged, entries)
            if window_bytes:
                window = {"region": staging.number, "offset": end, "nbytes": staging.nbytes - end}
        if reply is not None:
            regions[reply.number] = reply
            window = {"region": reply.number, "offset": 0, "nbytes": reply.nbytes}
        if not regions:
            return None
        sent, buffers = pack({name: array for name, array in arrays.items() if name not in entries})
        entries |= {entry["name"]: entry for entry in sent}
        return Plan([entries[name] for name in arrays], buffers, window, regions, staging)

    def output(self, plan: Plan, tensor: Tensor) -> Array:
        """Return a result's tensor that lies in shared memory: a copy if that memory is used again by us.

        Raises:
            FrameError: it lies where this request offered no memory.
        """
        region = plan.regions.get(-1 if tensor.region is None else tensor.region)
        if region is None:
            raise FrameError(f"tensor {tensor.name!r} lies in a region the request did not name")
        array = as_array(tensor._replace(offset=0), region.part(tensor.offset, tensor.nbytes))
        return array.copy() if region is plan.staging else array

    def learn(self, model: str, outputs: Iterable[Array]) -> None:
        """Note how large the window for the model's next answer must be, if it is worth one."""
        needed = sum(-(-array.nbytes // SHARED_ALIGN) * SHARED_ALIGN for array in outputs if not array.dtype.hasobject)
        if needed <= STAGED_BYTES_MIN:
            self._learned.pop(model, None)
        elif len(self._learned) < _LEARNED_MAX or model in self._learned:
            self._learned[model] = needed

    def answered(self, plan: Plan) -> None:
        """The whole answer has been taken: keep the staging region for reuse."""
        if plan.staging is None:
            return
        if plan.staging.attachments > 1:  # maybe asked twice: the other worker may still write
            plan.staging.close()
            return
        free = self._free
        free.append(plan.staging)
        while len(free) > _FREE_MAX or sum(region.nbytes for region in free) > _FREE_BYTES_MAX:
            smallest = min(free, key=lambda region: region.nbytes)  # large ones serve small requests too
            free.remove(smallest)
            smallest.close()

    def failed(self, plan: Plan | None) -> None:
        """There was no whole answer: a worker may still write to the staging region, so it is not used again."""
        if plan is not None and plan.staging is not None:
            plan.staging.close()

    def refused(self) -> None:
        """The daemon does not take a staging region now: send arrays for a while."""
        self._paused_until = time.monotonic() + _REFUSED_PAUSE_S

    def close_staging(self) -> None:
        """Throw away what is kept for reuse."""
        free, self._free = self._free, []
        for region in free:
            region.close()

    def _forget(self, region: Region) -> None:
        self._own.pop(region.number, None)
        self._tell(region)

    def _place_of(self, array: Array) -> tuple[Region, int] | None:
        """Return the application's region that holds the array as the wire wants it, and the offset."""
        if not self._own or not array.nbytes or not array.flags.c_contiguous:
            return None
        if array.dtype.kind not in "biuf" or not array.dtype.isnative:
            return None
        address = int(array.__array_interface__["data"][0])
        for region in tuple(self._own.values()):
            offset = address - region.address
            if 0 <= offset <= region.nbytes - array.nbytes:
                return region, offset
        return None

    def _take_staging(self, sizes: Sequence[int], window_bytes: int) -> Region | None:
        """Return a region for arrays of these sizes and a window, if there is anything to stage and it may be."""
        needed = sum(-(-size // SHARED_ALIGN) * SHARED_ALIGN for size in sizes) + window_bytes
        if not needed or needed > _STAGING_BYTES_MAX or time.monotonic() < self._paused_until:
            return None
        for index, region in enumerate(self._free):
            if region.nbytes >= needed:
                return self._free.pop(index)
        size = max(_STAGING_BYTES_MIN, 1 << (needed - 1).bit_length())
        try:
            return Region(next(self._numbers), size, self._forget)
        except OSError:  # out of descriptors or memory: the arrays can still be sent
            return None

    @staticmethod
    def _copy_in(staging: Region, arrays: Mapping[str, Array], entries: dict[str, dict[str, Any]]) -> int:
        """Copy ``arrays`` to the region's start and describe them; return where they end."""
        end = 0
        for name, array in arrays.items():
            kind = np.dtype(dtype_name(array)).newbyteorder("<")
            np.copyto(staging.array(array.shape, kind, end), array)
            entries[name] = _entry(name, array, staging, end)
            end += -(-array.nbytes // SHARED_ALIGN) * SHARED_ALIGN
        return end


def _is_large(value: Array) -> bool:
    return getattr(value, "nbytes", 0) > STAGED_BYTES_MIN


def _entry(name: str, array: Array, region: Region, offset: int) -> dict[str, Any]:
    return {
        "name": name,
        "dtype": dtype_name(array),
        "shape": list(array.shape),
        "nbytes": array.nbytes,
        "region": region.number,
        "offset": offset,
    }
