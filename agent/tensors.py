"""NumPy arrays to and from the wire's tensors. For clients and workers; the daemon never imports it."""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from agent.errors import TensorError
from agent.wire import Buffer, Tensor, parse_tensors, tensor_entries

Array = npt.NDArray[Any]
_LENGTH: Final = struct.Struct("<I")
NUMPY_DTYPES: Final[Mapping[str, np.dtype[Any]]] = {
    name: np.dtype(name).newbyteorder("<")
    for name in (
        "bool",
        "uint8",
        "int8",
        "uint16",
        "int16",
        "uint32",
        "int32",
        "uint64",
        "int64",
        "float16",
        "float32",
        "float64",
    )
}
DTYPE_NAMES: Final[Mapping[np.dtype[Any], str]] = {dtype: name for name, dtype in NUMPY_DTYPES.items()}


def dtype_name(array: Array) -> str:
    """Return the wire's name of the array's dtype; text and object arrays are ``bytes``.

    Raises:
        TensorError: a dtype the wire does not carry.
    """
    known = DTYPE_NAMES.get(array.dtype)
    if known is not None:
        return known
    if array.dtype.kind in "OSU":
        return "bytes"
    name = array.dtype.newbyteorder("=").name
    if name not in NUMPY_DTYPES:
        raise TensorError(f"dtype {array.dtype} cannot be sent; use one of {', '.join(NUMPY_DTYPES)} or bytes")
    return name


def pack(arrays: Mapping[str, Array]) -> tuple[list[dict[str, Any]], list[Buffer]]:
    """Return header entries and body buffers; contiguous little-endian arrays are not copied.

    Raises:
        TensorError: a dtype the wire does not carry.
    """
    rows: list[tuple[str, str, Sequence[int], int]] = []
    buffers: list[Buffer] = []
    for name, value in arrays.items():
        array = np.asarray(value)
        dtype = dtype_name(array)
        data: Buffer
        if dtype == "bytes":
            data = pack_bytes(array)
        else:
            plain = np.ascontiguousarray(array, dtype=NUMPY_DTYPES[dtype])
            data = plain.data.cast("B") if plain.size else b""
        rows.append((name, dtype, array.shape, len(data)))
        buffers.append(data)
    return tensor_entries(rows), buffers


def unpack(entries: object, body: Buffer, *, tensors_max: int = 64) -> dict[str, Array]:
    """Return read-only views into ``body`` by name (``bytes`` tensors are copied into object arrays).

    Raises:
        TensorError: see ``wire.parse_tensors``; malformed ``bytes`` elements; a tensor that lies in shared memory.
    """
    view = memoryview(body)
    tensors = parse_tensors(entries, len(view), tensors_max=tensors_max)
    for tensor in tensors:
        if tensor.region is not None:
            raise TensorError(f"tensor {tensor.name!r} lies in shared memory that was not offered")
    return {tensor.name: as_array(tensor, view) for tensor in tensors}


def as_array(tensor: Tensor, body: memoryview) -> Array:
    """Return ``tensor`` of shape ``tensor.shape`` as a view into ``body``."""
    part = body[tensor.offset : tensor.offset + tensor.nbytes]
    if tensor.dtype == "bytes":
        return unpack_bytes(part, tensor.shape)
    if tensor.dtype == "bfloat16":
        wide = np.frombuffer(part, dtype="<u2").astype(np.uint32) << 16
        return wide.view(np.float32).reshape(tensor.shape)
    return np.ndarray(tensor.shape, NUMPY_DTYPES[tensor.dtype], part)


def pack_bytes(array: Array) -> bytes:
    """Return the elements in row-major order, each with its little-endian u32 length before it; text is UTF-8."""
    parts: list[bytes] = []
    for element in array.reshape(-1):
        raw = element.encode() if isinstance(element, str) else bytes(element)
        parts += (_LENGTH.pack(len(raw)), raw)
    return b"".join(parts)


def unpack_bytes(data: Buffer, shape: Sequence[int]) -> Array:
    """Return an object array ``[*shape]`` of ``bytes``.

    Raises:
        TensorError: the lengths do not add up to the data, or their number differs from the shape.
    """
    view, offset, elements = memoryview(data), 0, []
    while offset < len(view):
        if len(view) - offset < _LENGTH.size:
            raise TensorError("bytes tensor: truncated length")
        (length,) = _LENGTH.unpack_from(view, offset)
        offset += _LENGTH.size
        if length > len(view) - offset:
            raise TensorError("bytes tensor: element runs past the end")
        elements.append(bytes(view[offset : offset + length]))
        offset += length
    array = np.empty(len(elements), dtype=object)
    array[:] = elements
    try:
        return array.reshape(tuple(shape))
    except ValueError as error:
        raise TensorError(f"bytes tensor: {len(elements)} elements for shape {list(shape)}") from error
