"""Open Inference Protocol v2 bodies, JSON and binary tensors, to arrays and back. Pure; knows no HTTP, no model.

A body is JSON, or JSON followed by the binary tensors back to back in the order of ``inputs``; the JSON part's length
travels beside the body. Length 0 means a raw request: the whole body is the one input of a one-input model.

Promises: every fault is an ``InvalidInputError`` that names the tensor and what was expected; nothing is allocated
beyond what the body's own size justifies; values that do not fit a dtype are refused, never wrapped or cut; an answer
that JSON cannot carry (NaN, infinity, half precision, bytes that are not text) is refused with the advice to ask for
binary.
Leaves out: the classification extension and shared-memory references (both refused by name), compression (the edge's
work), and the check against a model's signature (``requests.py``).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Any, Final

import numpy as np

from agent.errors import InvalidInputError, TensorError
from agent.tensors import Array, as_array, dtype_name, pack_bytes
from agent.wire import DTYPES, Buffer, Tensor
from agent.worker.signature import Signature, TensorSpec

_TENSORS_MAX: Final = 64
_RANK_MAX: Final = 16
_ELEMENTS_MAX: Final = 1 << 40
_OF_OIP: Final[Mapping[str, str]] = {
    "BOOL": "bool", "UINT8": "uint8", "INT8": "int8", "UINT16": "uint16", "INT16": "int16", "UINT32": "uint32",
    "INT32": "int32", "UINT64": "uint64", "INT64": "int64", "FP16": "float16", "BF16": "bfloat16", "FP32": "float32",
    "FP64": "float64", "BYTES": "bytes",
}  # fmt: skip
_NUMBERS: Final = frozenset({int, float, bool})
TO_OIP: Final[Mapping[str, str]] = {ours: theirs for theirs, ours in _OF_OIP.items()}


@dataclass(slots=True)
class OipRequest:
    """One decoded request."""

    inputs: dict[str, tuple[str, Array]]  # name: (wire dtype, array)
    id: str | None
    outputs: list[tuple[str, bool]] | None  # (name, as binary) in the order asked for; None: all
    binary: bool  # for outputs not asked for by name
    timeout_s: float | None  # the request's own ``timeout`` parameter


def decode(body: Buffer, json_bytes: int | None, signature: Signature) -> OipRequest:
    """Return the request in ``body``.

    Args:
        body: JSON, then binary tensors.
        json_bytes: Length of the JSON part; ``None``: all of it; 0: a raw request.
        signature: Names and shapes for a raw request; known outputs.

    Raises:
        InvalidInputError: not a request of this protocol.
        TensorError: a tensor that contradicts itself; the message names it.
    """
    view = memoryview(body)
    if json_bytes == 0:
        return OipRequest(_raw_input(view, signature), None, None, True, None)
    length = len(view) if json_bytes is None else json_bytes
    if type(length) is not int or not 0 <= length <= len(view):
        raise InvalidInputError(f"JSON part of {length!r} bytes in a body of {len(view)}")
    document = _json(bytes(view[:length]))
    request_id = document.get("id")
    if request_id is not None and not isinstance(request_id, str):
        raise InvalidInputError("'id' must be a text")
    parameters = _parameters(document, "the request")
    binary = _flag(parameters, "binary_data_output", "the request") or False
    return OipRequest(
        inputs=_inputs(document, view[length:]),
        id=request_id,
        outputs=_outputs(document, signature, binary),
        binary=binary,
        timeout_s=_timeout(parameters),
    )


def encode(
    request: OipRequest, outputs: Mapping[str, Array], *, model: str, version: str
) -> tuple[int | None, list[Buffer]]:
    """Return the length of the answer's JSON part (``None``: no binary tensors) and the body's buffers.

    Raises:
        InvalidInputError: an output that JSON cannot carry was asked for as JSON.
    """
    asked = request.outputs if request.outputs is not None else [(name, request.binary) for name in outputs]
    entries: list[dict[str, Any]] = []
    buffers: list[Buffer] = []
    for name, binary in asked:
        array = outputs[name]
        dtype = dtype_name(array)
        entry: dict[str, Any] = {"name": name, "datatype": TO_OIP[dtype], "shape": list(array.shape)}
        if binary:
            data = _binary(array, dtype)
            entry["parameters"] = {"binary_data_size": len(data)}
            buffers.append(data)
        else:
            entry["data"] = _listed(name, array, dtype)
        entries.append(entry)
    document: dict[str, Any] = {"model_name": model, "model_version": version, "outputs": entries}
    if request.id is not None:
        document["id"] = request.id
    head = json.dumps(document, separators=(",", ":"), allow_nan=False).encode()
    return (len(head) if buffers else None), [head, *buffers]


def as_json(request: OipRequest) -> OipRequest:
    """Return the request with no output asked for as binary."""
    outputs = None if request.outputs is None else [(name, False) for name, _ in request.outputs]
    return replace(request, outputs=outputs, binary=False)


def _json(text: bytes) -> dict[str, Any]:
    try:
        document = json.loads(text, object_pairs_hook=_unique, parse_constant=_no_constant)
    except RecursionError as error:
        raise InvalidInputError("JSON is nested too deeply") from error
    except ValueError as error:  # bad syntax, bad UTF-8, numbers of thousands of digits
        raise InvalidInputError(f"not JSON: {str(error)[:200]}") from error
    if not isinstance(document, dict):
        raise InvalidInputError("the request must be a JSON object")
    return document


def _unique(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("an object has the same key twice")
    return found


def _no_constant(text: str) -> float:
    raise ValueError(f"{text} is not a JSON number")


def _parameters(entry: Mapping[str, Any], where: str) -> Mapping[str, Any]:
    parameters = entry.get("parameters")
    if parameters is None:
        return {}
    if not isinstance(parameters, dict):
        raise InvalidInputError(f"'parameters' of {where} must be an object")
    return parameters


def _flag(parameters: Mapping[str, Any], name: str, where: str) -> bool | None:
    value = parameters.get(name)
    if value is not None and not isinstance(value, bool):
        raise InvalidInputError(f"{name!r} of {where} must be true or false")
    return value


def _timeout(parameters: Mapping[str, Any]) -> float | None:
    micros = parameters.get("timeout")
    if micros is None or micros == 0:
        return None
    if type(micros) is not int or not 0 < micros < 1 << 53:
        raise InvalidInputError("'timeout' must be a number of microseconds")
    return micros / 1e6


def _entries(document: Mapping[str, Any], key: str, kind: str) -> list[dict[str, Any]]:
    entries = document.get(key)
    if not isinstance(entries, list) or len(entries) > _TENSORS_MAX:
        raise InvalidInputError(f"'{key}' must be a list of at most {_TENSORS_MAX}")
    names = set()
    for entry in entries:
        if not isinstance(entry, dict) or not isinstance(entry.get("name"), str):
            raise InvalidInputError(f"each of '{key}' must be an object with a 'name'")
        if entry["name"] in names:
            raise InvalidInputError(f"{kind} {entry['name']!r} is given twice")
        names.add(entry["name"])
    return entries


def _inputs(document: Mapping[str, Any], rest: memoryview) -> dict[str, tuple[str, Array]]:
    inputs: dict[str, tuple[str, Array]] = {}
    offset = 0
    for entry in _entries(document, "inputs", "input"):
        name = entry["name"]
        dtype, shape = _header(entry)
        parameters = _parameters(entry, f"input {name!r}")
        if any(key.startswith("shared_memory_") for key in parameters):
            raise InvalidInputError(f"input {name!r}: shared memory is not offered here")
        size = parameters.get("binary_data_size")
        if size is None:
            inputs[name] = dtype, _from_list(name, dtype, shape, entry.get("data"))
            continue
        if type(size) is not int or size < 0:
            raise TensorError(f"input {name!r}: binary_data_size must be an integer from 0")
        if "data" in entry:
            raise TensorError(f"input {name!r} has both 'data' and binary_data_size")
        if size > len(rest) - offset:
            raise TensorError(f"input {name!r}: {size} binary bytes, the body has {len(rest) - offset} left")
        inputs[name] = dtype, _from_binary(name, dtype, shape, rest[offset : offset + size])
        offset += size
    if offset != len(rest):
        raise InvalidInputError(f"{len(rest) - offset} bytes behind the last binary tensor")
    return inputs


def _header(entry: Mapping[str, Any]) -> tuple[str, tuple[int, ...]]:
    name, datatype, shape = entry["name"], entry.get("datatype"), entry.get("shape")
    dtype = _OF_OIP.get(datatype) if isinstance(datatype, str) else None
    if dtype is None:
        raise TensorError(f"input {name!r}: unknown datatype {datatype!r}; known: {', '.join(_OF_OIP)}")
    if not isinstance(shape, list) or len(shape) > _RANK_MAX or not all(type(n) is int and n >= 0 for n in shape):
        raise TensorError(f"input {name!r}: shape must be a list of at most {_RANK_MAX} integers from 0")
    if prod(filter(None, shape)) > _ELEMENTS_MAX:  # NumPy bounds the dimensions of empty arrays too
        raise TensorError(f"input {name!r}: shape {shape} is too large")
    return dtype, tuple(shape)


def _from_binary(name: str, dtype: str, shape: tuple[int, ...], data: memoryview) -> Array:
    width = DTYPES[dtype]
    if width is not None and prod(shape) * width != len(data):
        raise TensorError(f"input {name!r}: {dtype}{list(shape)} takes {prod(shape) * width} bytes, not {len(data)}")
    try:
        return as_array(Tensor(name, dtype, shape, 0, len(data)), data)
    except TensorError as error:
        raise TensorError(f"input {name!r}: {error}") from error


def _from_list(name: str, dtype: str, shape: tuple[int, ...], data: object) -> Array:
    if not isinstance(data, list):
        raise TensorError(f"input {name!r} needs 'data', a list, or binary_data_size")
    if dtype in ("float16", "bfloat16"):
        raise TensorError(f"input {name!r}: {TO_OIP[dtype]} travels as binary only")
    array = _texts(name, data) if dtype == "bytes" else _numbers(name, dtype, data)
    if array.size != prod(shape) or (array.ndim > 1 and array.shape != shape):
        raise TensorError(f"input {name!r}: data of shape {list(array.shape)}, 'shape' says {list(shape)}")
    return array.reshape(shape)


def _texts(name: str, data: list[Any]) -> Array:
    flat: list[bytes] = []
    pending: list[Any] = [data]
    while pending:
        item = pending.pop()
        if isinstance(item, list):
            pending += reversed(item)
        elif isinstance(item, str):
            try:
                flat.append(item.encode())
            except UnicodeEncodeError as error:
                raise TensorError(f"input {name!r}: a text holds half of a surrogate pair") from error
        else:
            raise TensorError(f"input {name!r}: BYTES data must be texts, got {type(item).__name__}")
    array = np.empty(len(flat), dtype=object)
    array[:] = flat
    return array


def _numbers(name: str, dtype: str, data: list[Any]) -> Array:
    wanted = np.dtype(dtype)
    if not _leaf_types(data) <= _NUMBERS:  # before NumPy sees it: it gives every text the room of the longest
        raise TensorError(f"input {name!r}: data is not all {TO_OIP[dtype]}")
    try:
        # NumPy takes a mix of small and large unsigned integers for floats, so those stay Python integers.
        array = np.array(data, dtype=object if wanted == np.uint64 else None)
    except (ValueError, OverflowError) as error:
        raise TensorError(f"input {name!r}: data is ragged or not numbers") from error
    if not array.size:
        return array.astype(wanted)
    kind = array.dtype.kind
    if kind == "O" and wanted == np.uint64 and all(type(item) is int for item in array.reshape(-1)):
        kind = "u"
    if kind not in {"b": "b", "u": "iu", "i": "iu", "f": "iuf"}[wanted.kind]:
        raise TensorError(f"input {name!r}: data is not all {TO_OIP[dtype]}")
    if wanted.kind in "iu":
        bounds = np.iinfo(wanted)
        low, high = int(array.min()), int(array.max())
        if low < bounds.min or high > bounds.max:
            raise TensorError(f"input {name!r}: values from {low} to {high} do not fit {TO_OIP[dtype]}")
    if wanted == np.float32 and float(np.abs(array).max()) > float(np.finfo(wanted).max):
        raise TensorError(f"input {name!r}: a value does not fit {TO_OIP[dtype]}")
    return array.astype(wanted, copy=False)


def _leaf_types(data: list[Any]) -> set[type]:
    """Return the types of what is no list in nested lists; linear in time and room."""
    found: set[type] = set()
    pending = [data]
    while pending:
        items = pending.pop()
        types = set(map(type, items))
        if list in types:
            types.discard(list)
            pending += [item for item in items if type(item) is list]
        found |= types
    return found


def _outputs(document: Mapping[str, Any], signature: Signature, binary: bool) -> list[tuple[str, bool]] | None:
    if not document.get("outputs"):
        return None
    asked = []
    for entry in _entries(document, "outputs", "output"):
        name = entry["name"]
        if name not in signature.output_names:
            raise InvalidInputError(f"unknown output {name!r}; the model gives {', '.join(signature.output_names)}")
        parameters = _parameters(entry, f"output {name!r}")
        if parameters.get("classification"):
            raise InvalidInputError(f"output {name!r}: the classification extension is not offered here")
        if any(key.startswith("shared_memory_") for key in parameters):
            raise InvalidInputError(f"output {name!r}: shared memory is not offered here")
        own = _flag(parameters, "binary_data", f"output {name!r}")
        asked.append((name, binary if own is None else own))
    return asked


def _raw_input(body: memoryview, signature: Signature) -> dict[str, tuple[str, Array]]:
    if len(signature.inputs) != 1:
        raise InvalidInputError(f"a raw request needs a model of one input; this one takes {signature.takes()}")
    spec = signature.inputs[0]
    shape = _raw_shape(spec, len(body))
    if spec.dtype == "bytes":
        array = np.empty(1, dtype=object)
        array[0] = bytes(body)
        return {spec.name: (spec.dtype, array.reshape(shape))}
    return {spec.name: (spec.dtype, _from_binary(spec.name, spec.dtype, shape, body))}


def _raw_shape(spec: TensorSpec, nbytes: int) -> tuple[int, ...]:
    """Return the shape a raw body has: its size settles one open dimension."""
    opened = [index for index, size in enumerate(spec.shape) if not isinstance(size, int)]
    fixed = prod(size for size in spec.shape if isinstance(size, int))
    if len(opened) > 1 or (spec.dtype == "bytes" and fixed != 1):
        raise InvalidInputError(f"input {spec.name!r} {spec} cannot be sent raw: its shape does not follow from a size")
    shape = [size if isinstance(size, int) else 1 for size in spec.shape]
    width = DTYPES[spec.dtype]
    if opened and width is not None:
        row = fixed * width
        if not row or nbytes % row:
            raise TensorError(f"input {spec.name!r}: {nbytes} bytes are not a whole number of {spec}")
        shape[opened[0]] = nbytes // row
    return tuple(shape)


def _binary(array: Array, dtype: str) -> Buffer:
    if dtype == "bytes":
        return pack_bytes(array)
    plain = np.ascontiguousarray(array, dtype=np.dtype(dtype).newbyteorder("<"))
    return plain.reshape(-1).view(np.uint8).data


def _listed(name: str, array: Array, dtype: str) -> list[Any]:
    if dtype == "float16":
        raise InvalidInputError(f"output {name!r} is FP16, which travels as binary only: ask for binary_data")
    if dtype == "bytes":
        try:
            return [item if isinstance(item, str) else bytes(item).decode() for item in array.reshape(-1)]
        except UnicodeDecodeError as error:
            raise InvalidInputError(f"output {name!r} holds bytes that are not text: ask for binary_data") from error
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        raise InvalidInputError(f"output {name!r} holds NaN or infinity, which JSON cannot carry: ask for binary_data")
    listed: list[Any] = array.reshape(-1).tolist()
    return listed
