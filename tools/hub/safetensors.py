"""Write safetensors files: golden inputs and outputs as the device reads them.

The format: a little-endian u64, that many bytes of JSON ``{name: {dtype, shape, data_offsets}}`` padded with spaces to
a multiple of eight, then the tensors' bytes back to back. Reading, which has to distrust its bytes, is the agent's.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from tools.hub.errors import SourceError

_DTYPES: Final[Mapping[str, str]] = {
    "bool": "BOOL", "uint8": "U8", "int8": "I8", "uint16": "U16", "int16": "I16", "uint32": "U32", "int32": "I32",
    "uint64": "U64", "int64": "I64", "float16": "F16", "float32": "F32", "float64": "F64",
}  # fmt: skip


def dump(tensors: Mapping[str, npt.NDArray[Any]]) -> bytes:
    """Return ``tensors`` as the bytes of one safetensors file, in the order of their names.

    Raises:
        SourceError: a dtype the format does not have.
    """
    header: dict[str, Any] = {}
    parts: list[bytes] = []
    offset = 0
    for name in sorted(tensors):
        array = tensors[name]
        kind = array.dtype.newbyteorder("=").name
        if kind not in _DTYPES:
            raise SourceError(f"tensor {name}: {array.dtype} cannot be stored in safetensors")
        data = np.ascontiguousarray(array, dtype=array.dtype.newbyteorder("<")).tobytes()
        header[name] = {
            "dtype": _DTYPES[kind],
            "shape": list(array.shape),
            "data_offsets": [offset, offset + len(data)],
        }
        parts.append(data)
        offset += len(data)
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return b"".join((struct.pack("<Q", len(text)), text, *parts))
