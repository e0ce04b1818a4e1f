"""Walk protobuf bytes field by field without a schema compiler, bounded in depth and count.

Just enough to look into an ONNX file that nobody trusts yet. Length-delimited fields and varints are handed out, fixed
width numbers skipped. Groups, which proto3 does not have, are refused.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from agent.errors import UnsafeBundleError

_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
_VARINT_BYTES_MAX: Final = 10
_TAG_END: Final = 1 << 32  # a reader that cuts off what lies above would see another field than we do


class Budget:
    """How many fields may still be visited in one file."""

    def __init__(self, fields: int) -> None:
        self._left = fields

    def spend(self) -> None:
        """Count one field; ``UnsafeBundleError`` when there were too many."""
        self._left -= 1
        if self._left < 0:
            raise UnsafeBundleError("protobuf: too many fields")


def fields(message: memoryview, budget: Budget) -> Iterator[tuple[int, memoryview | int]]:
    """Yield ``(field number, value)`` in order: bytes for length-delimited fields, a number for varints.

    Raises:
        UnsafeBundleError: truncated, a group, an unknown wire type, a field number that no writer uses, or over budget.
    """
    position, end = 0, len(message)
    while position < end:
        budget.spend()
        tag, position = _varint(message, position)
        number, kind = tag >> 3, tag & 7
        if number == 0 or tag >= _TAG_END:
            raise UnsafeBundleError(f"protobuf: field number {number}")
        if kind == _BYTES:
            size, position = _varint(message, position)
            if size > end - position:
                raise UnsafeBundleError("protobuf: a field ends behind its message")
            yield number, message[position : position + size]
            position += size
        elif kind == _VARINT:
            value, position = _varint(message, position)
            yield number, value
        elif kind in (_FIXED64, _FIXED32):
            position += 8 if kind == _FIXED64 else 4
            if position > end:
                raise UnsafeBundleError("protobuf: a field ends behind its message")
        else:
            raise UnsafeBundleError(f"protobuf: wire type {kind}")


def text(value: memoryview) -> str:
    """Return a string field; ``UnsafeBundleError`` if it is not UTF-8 or longer than 64 KiB."""
    if len(value) > 65536:
        raise UnsafeBundleError("protobuf: a text of more than 64 KiB")
    try:
        return str(value, "utf-8")
    except UnicodeDecodeError as error:
        raise UnsafeBundleError("protobuf: a text that is not UTF-8") from error


def _varint(message: memoryview, position: int) -> tuple[int, int]:
    value = shift = 0
    for count in range(_VARINT_BYTES_MAX):
        if position + count >= len(message):
            raise UnsafeBundleError("protobuf: truncated")
        byte = message[position + count]
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, position + count + 1
        shift += 7
    raise UnsafeBundleError("protobuf: a number of more than ten bytes")
