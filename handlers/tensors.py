"""``tensors/v1``: JSON lists in, JSON lists out, for models that need no decoding of their own.

Takes ``application/json``: ``{"inputs": {"name": nested lists}}``, or the bare nested lists of a one-input model.
Gives ``{"outputs": {"name": nested lists}}``.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, Final

import numpy as np

from handlers.base import Array, Handler, InputError, Json, Reply

_JSON: Final = "application/json"


class TensorsHandler(Handler):
    """See the module."""

    def preprocess(self, body: bytes, content_type: str) -> Mapping[str, Array]:
        """Return the arrays of the JSON document, in the dtypes of the signature."""
        if content_type.partition(";")[0].strip().lower() != _JSON:
            raise InputError(f"this model takes {_JSON}, not {content_type!r}")
        try:
            document = json.loads(body, parse_constant=_no_constant)
        except (ValueError, RecursionError) as error:
            raise InputError(f"not JSON: {str(error)[:200]}") from error
        declared = {entry["name"]: entry for entry in self.context.signature["inputs"]}
        given = document.get("inputs") if isinstance(document, dict) else document
        if isinstance(given, list) and len(declared) == 1:
            given = {next(iter(declared)): given}
        if not isinstance(given, dict):
            raise InputError(f'expected {{"inputs": {{{", ".join(map(repr, declared))}: lists}}}}')
        if set(given) != set(declared):
            raise InputError(f"inputs {sorted(given)} given, the model takes {sorted(declared)}")
        return {name: _array(declared[name], value) for name, value in given.items()}

    def postprocess(self, outputs: Mapping[str, Array], rows: int) -> Json | Reply:
        """Return the outputs as nested lists; NaN and infinity become ``null``."""
        del rows
        return {"outputs": {name: listed(array) for name, array in outputs.items()}}


def listed(array: Array) -> list[Any]:
    """Return nested lists with ``None`` for what JSON cannot carry."""
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        array = np.where(np.isfinite(array), array, None)  # type: ignore[call-overload]
    listed: list[Any] = array.tolist()
    return listed


def _array(declared: Mapping[str, Any], value: object) -> Array:
    name, dtype, shape = declared["name"], declared["dtype"], declared["shape"]
    try:
        array = np.array(value, dtype=object if dtype == "bytes" else None)
    except ValueError as error:
        raise InputError(f"input {name!r}: lists of unequal length") from error
    fits = array.ndim == len(shape) and all(
        size == given for size, given in zip(shape, array.shape, strict=True) if isinstance(size, int)
    )
    if not fits:
        raise InputError(f"input {name!r}: shape {list(array.shape)}, expected {shape}")
    if dtype == "bytes":
        if not all(isinstance(item, str) for item in array.reshape(-1)):
            raise InputError(f"input {name!r}: expected texts")
        return array
    wanted = np.dtype(dtype)
    allowed = {"b": "b", "u": "iu", "i": "iu", "f": "iuf"}[wanted.kind]
    if array.size and array.dtype.kind not in allowed:
        raise InputError(f"input {name!r}: expected {dtype}")
    if array.size and wanted.kind in "iu":
        bounds = np.iinfo(wanted)
        if int(array.min()) < bounds.min or int(array.max()) > bounds.max:
            raise InputError(f"input {name!r}: a value does not fit {dtype}")
    with np.errstate(over="ignore"):
        return array.astype(wanted, copy=False)


def _no_constant(text: str) -> float:
    raise ValueError(f"{text} is not a JSON number")
