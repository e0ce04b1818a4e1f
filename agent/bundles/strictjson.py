"""JSON that two parsers cannot read differently, and that cannot exhaust this one.

Refused: more bytes than asked for, invalid UTF-8, halves of surrogate pairs, duplicate keys, NaN and infinities (also
by overflow), deep nesting.
Absent on purpose: schemas, which are msgspec structs, and trust, which comes from hashes checked before.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from typing import Any, Final, TypeVar

import msgspec

from agent.errors import UnsafeBundleError

DEPTH_MAX: Final = 16
SIZE_BYTES_MAX: Final = 4 * 1024 * 1024

T = TypeVar("T")


def loads(data: bytes, *, what: str, size_bytes_max: int = SIZE_BYTES_MAX, depth_max: int = DEPTH_MAX) -> Any:
    """Return the parsed value; ``what`` names the document in messages.

    Raises:
        UnsafeBundleError: not such JSON, or over a bound.
    """
    if len(data) > size_bytes_max:
        raise UnsafeBundleError(f"{what}: {len(data)} bytes, at most {size_bytes_max} are allowed")
    try:
        value = json.loads(
            data.decode("utf-8"),
            object_pairs_hook=_unique,
            parse_constant=_refuse_constant,
            parse_float=_finite,
        )
        if b"\\ud" in data.lower():
            json.dumps(value, ensure_ascii=False).encode()  # half of a pair is no character, and has no UTF-8
    except (ValueError, RecursionError) as error:
        raise UnsafeBundleError(f"{what}: not strict JSON: {error}") from error
    _check_depth(value, depth_max, what)
    return value


def convert(data: bytes, schema: type[T], *, what: str, size_bytes_max: int = SIZE_BYTES_MAX) -> T:
    """Return ``loads(data)`` as ``schema``.

    Raises:
        UnsafeBundleError: not strict JSON, an unknown key, a missing key, a wrong type; the message names the place.
    """
    value = loads(data, what=what, size_bytes_max=size_bytes_max)
    try:
        return msgspec.convert(value, schema)
    except msgspec.ValidationError as error:
        raise UnsafeBundleError(f"{what}: {error}") from error


def _unique(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise ValueError(f"the key {key[:80]!r} appears twice")
            seen.add(key)
    return found


def _refuse_constant(text: str) -> float:
    raise ValueError(f"{text} is not a number")


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text[:40]} is too large a number")
    return value


def _check_depth(value: Any, depth_max: int, what: str) -> None:
    level = [value]
    depth = 0
    while level := [item for item in level if isinstance(item, dict | list)]:
        depth += 1
        if depth > depth_max:
            raise UnsafeBundleError(f"{what}: nested deeper than {depth_max}")
        level = [inner for item in level for inner in (item.values() if isinstance(item, dict) else item)]
