"""Read a safetensors file with every check of the format made before a byte of data is used.

Promises: header bounded, no duplicate keys, ranges in order without hole or overlap, each range exactly
dtype x shape, and nothing behind the last one.
Leaves out: writing, and memory-mapping (golden samples are small).
"""

from __future__ import annotations

import json
import struct
from collections.abc import Sequence
from math import prod
from pathlib import Path
from typing import Any, Final

import numpy as np

from agent.errors import UnsafeBundleError
from agent.tensors import Array, as_array
from agent.wire import DTYPES, Tensor

FILE_BYTES_MAX: Final = 256 * 1024 * 1024
_HEADER_BYTES_MAX: Final = 16 * 1024 * 1024
_TENSORS_MAX: Final = 4096
_ELEMENTS_MAX: Final = 1 << 40
_LENGTH: Final = struct.Struct("<Q")
_DTYPES: Final = {
    "BOOL": "bool", "U8": "uint8", "I8": "int8", "U16": "uint16", "I16": "int16", "U32": "uint32", "I32": "int32",
    "U64": "uint64", "I64": "int64", "F16": "float16", "BF16": "bfloat16", "F32": "float32", "F64": "float64",
}  # fmt: skip


def read(path: Path) -> dict[str, Array]:
    """Return the file's arrays by name; ``BF16`` widens to float32.

    Raises:
        UnsafeBundleError: unreadable, too large, or not exactly the format.
    """
    try:
        with path.open("rb") as file:
            data = file.read(FILE_BYTES_MAX + 1)
    except OSError as error:
        raise UnsafeBundleError(f"{path.name}: {error.strerror}") from error
    if len(data) > FILE_BYTES_MAX:
        raise UnsafeBundleError(f"{path.name}: larger than {FILE_BYTES_MAX} bytes")
    try:
        return parse(data)
    except UnsafeBundleError as error:
        raise UnsafeBundleError(f"{path.name}: {error}") from error


def parse(data: bytes) -> dict[str, Array]:
    """Return the arrays of a file's bytes; see ``read``."""
    if len(data) < _LENGTH.size:
        raise UnsafeBundleError("safetensors: shorter than its length field")
    (header_bytes,) = _LENGTH.unpack_from(data)
    start = _LENGTH.size + header_bytes
    if header_bytes > _HEADER_BYTES_MAX or start > len(data):
        raise UnsafeBundleError(f"safetensors: header of {header_bytes} bytes")
    entries = _header(data[_LENGTH.size : start])
    body = memoryview(data)[start:]
    arrays: dict[str, Array] = {}
    end = 0
    for name, entry in sorted(entries.items(), key=lambda item: _offsets(*item)):
        tensor = _tensor(name, entry)
        if tensor.offset != end:
            raise UnsafeBundleError(f"safetensors: {name!r} begins at {tensor.offset}, expected {end}")
        end += tensor.nbytes
        if end > len(body):
            raise UnsafeBundleError(f"safetensors: {name!r} runs past the file")
        arrays[name] = np.array(as_array(tensor, body))
    if end != len(body):
        raise UnsafeBundleError(f"safetensors: {len(body) - end} bytes behind the last tensor")
    return arrays


def _header(packed: bytes) -> dict[str, Any]:
    try:
        header = json.loads(packed, object_pairs_hook=_unique, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise UnsafeBundleError(f"safetensors: header is not plain JSON: {error}") from error
    if not isinstance(header, dict) or len(header) > _TENSORS_MAX:
        raise UnsafeBundleError(f"safetensors: header must be a map of at most {_TENSORS_MAX} tensors")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise UnsafeBundleError("safetensors: __metadata__ must map texts to texts")
    return header


def _offsets(name: str, entry: object) -> tuple[int, int]:
    offsets = entry.get("data_offsets") if isinstance(entry, dict) else None
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(type(n) is int and n >= 0 for n in offsets):
        raise UnsafeBundleError(f"safetensors: {name!r} needs data_offsets of two integers from 0")
    return offsets[0], offsets[1]


def _tensor(name: str, entry: dict[str, Any]) -> Tensor:
    begin, end = _offsets(name, entry)
    dtype, shape = _DTYPES.get(str(entry.get("dtype"))), entry.get("shape")
    if dtype is None:
        raise UnsafeBundleError(f"safetensors: {name!r} has unknown dtype {entry.get('dtype')!r}")
    if not isinstance(shape, list) or len(shape) > 16 or not all(type(n) is int and n >= 0 for n in shape):
        raise UnsafeBundleError(f"safetensors: {name!r} has shape {shape!r}")
    elements = prod(shape)
    width = DTYPES[dtype]
    assert width is not None
    if elements > _ELEMENTS_MAX or elements * width != end - begin:
        raise UnsafeBundleError(f"safetensors: {name!r}: {dtype}{shape} does not take {end - begin} bytes")
    return Tensor(name, dtype, tuple(shape), begin, end - begin)


def _unique(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("duplicate key")
    return found


def _no_constant(text: str) -> float:
    raise ValueError(f"{text} is not JSON")
