"""Unpack zstd chunks, with the output bounded by the signed size. The ``zstandard`` package is optional.

Only bytes whose hash was checked come here.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from agent.errors import ChunkMismatchError, PolicyError

try:
    import zstandard
except ImportError:  # pragma: no cover - depends on the installation
    zstandard = None  # type: ignore[assignment]

_WINDOW_BYTES_MAX: Final = 1 << 25
_PIECE_BYTES: Final = 1 << 20


def available() -> bool:
    """Say whether compressed chunks can be unpacked here."""
    return zstandard is not None


def pieces(data: bytes | bytearray, *, size: int) -> Iterator[bytes]:
    """Yield the ``size`` raw bytes packed in ``data``, a megabyte at a time.

    Raises:
        ChunkMismatchError: not one zstd frame of exactly ``size`` bytes.
        PolicyError: the ``zstandard`` package is not installed.
    """
    if zstandard is None:
        raise PolicyError("the bundle has zstd chunks and the zstandard package is not installed")
    found = 0
    try:
        with zstandard.ZstdDecompressor(max_window_size=_WINDOW_BYTES_MAX).stream_reader(data) as reader:
            while piece := reader.read(min(_PIECE_BYTES, size + 1 - found)):
                found += len(piece)
                if found > size:
                    break
                yield piece
    except zstandard.ZstdError as error:
        raise ChunkMismatchError(f"not a zstd frame: {error}") from error
    if found != size:
        raise ChunkMismatchError(f"unpacks to {'more' if found > size else found} bytes, {size} were signed")
