"""Check a safetensors header without touching the tensors.

Layout: little-endian u64 header length, that many bytes of JSON, then the data. Promises after ``check``: names are
unique, dtypes known, and the tensors' byte ranges follow each other from zero to the end without hole or overlap.
"""

from __future__ import annotations

import math
from typing import Any, Final

from agent.bundles import strictjson
from agent.errors import UnsafeBundleError

HEADER_BYTES_MAX: Final = 16 * 1024 * 1024
TENSORS_MAX: Final = 100_000
_MARKS_MAX: Final = 8 * TENSORS_MAX  # of ``{``, ``[`` and ``:``; each costs memory when the header is parsed
_BITS: Final = {
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E4M3": 8, "F8_E5M2": 8, "U16": 16, "I16": 16, "F16": 16, "BF16": 16,
    "U32": 32, "I32": 32, "F32": 32, "U64": 64, "I64": 64, "F64": 64,
}  # fmt: skip


def check(data: memoryview) -> tuple[str, ...]:
    """Return the names of the tensors in the file ``data``, in the order of their bytes.

    Raises:
        UnsafeBundleError: not a well-formed safetensors file.
    """
    if len(data) < 8:
        raise UnsafeBundleError("safetensors: shorter than its length field")
    size = int.from_bytes(data[:8], "little")
    if size > min(HEADER_BYTES_MAX, len(data) - 8):
        raise UnsafeBundleError(f"safetensors: a header of {size} bytes")
    text = bytes(data[8 : 8 + size])
    if sum(map(text.count, (b"{", b"[", b":"))) > _MARKS_MAX:
        raise UnsafeBundleError(f"safetensors: a header of more than {TENSORS_MAX} tensors")
    header = strictjson.loads(text, what="safetensors header", size_bytes_max=HEADER_BYTES_MAX, depth_max=4)
    if not isinstance(header, dict):
        raise UnsafeBundleError("safetensors: the header is not an object")
    _check_metadata(header.get("__metadata__", {}))
    ranges = sorted((*_range(name, entry), name) for name, entry in header.items() if name != "__metadata__")
    position = 0
    for begin, end, name in ranges:
        if begin != position:
            raise UnsafeBundleError(f"safetensors: {name[:80]!r} begins at {begin}, the one before ends at {position}")
        position = end
    if position != len(data) - 8 - size:
        raise UnsafeBundleError(f"safetensors: {len(data) - 8 - size} bytes of data, the header speaks of {position}")
    return tuple(name for _, _, name in ranges)


def _check_metadata(value: Any) -> None:
    if not isinstance(value, dict) or not all(isinstance(item, str) for item in value.values()):
        raise UnsafeBundleError("safetensors: __metadata__ is not a map from text to text")


def _range(name: str, entry: Any) -> tuple[int, int]:
    where = f"safetensors: {name[:80]!r}"
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise UnsafeBundleError(f"{where}: exactly dtype, shape and data_offsets are allowed")
    bits = _BITS.get(entry["dtype"]) if isinstance(entry["dtype"], str) else None
    if bits is None:
        raise UnsafeBundleError(f"{where}: unknown dtype")
    shape, offsets = entry["shape"], entry["data_offsets"]
    if not _naturals(shape) or len(shape) > 16 or not _naturals(offsets) or len(offsets) != 2:
        raise UnsafeBundleError(f"{where}: shape or data_offsets are not lists of byte counts")
    begin, end = offsets
    if end < begin or math.prod(shape) * bits != (end - begin) * 8:
        raise UnsafeBundleError(f"{where}: {end - begin} bytes do not fit its shape and dtype")
    return begin, end


def _naturals(value: Any) -> bool:
    return isinstance(value, list) and all(type(item) is int and 0 <= item < 1 << 53 for item in value)
