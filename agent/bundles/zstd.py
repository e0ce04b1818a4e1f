"""Unpack zstd chunks, with the output bounded by the signed size. The ``zstandard`` package is optional.

Only bytes whose hash was checked come here.
"""

from __future__ import annotations

from agent.errors import ChunkMismatchError, PolicyError

try:
    import zstandard
except ImportError:  # pragma: no cover - depends on the installation
    zstandard = None  # type: ignore[assignment]


def available() -> bool:
    """Say whether compressed chunks can be unpacked here."""
    return zstandard is not None


def decompress(data: bytes, *, size: int) -> bytes:
    """Return the ``size`` raw bytes packed in ``data``.

    Raises:
        ChunkMismatchError: not one zstd frame of exactly ``size`` bytes.
        PolicyError: the ``zstandard`` package is not installed.
    """
    if zstandard is None:
        raise PolicyError("the bundle has zstd chunks and the zstandard package is not installed")
    try:
        with zstandard.ZstdDecompressor(max_window_size=1 << 25).stream_reader(data) as reader:
            raw = bytes(reader.read(size + 1))
    except zstandard.ZstdError as error:
        raise ChunkMismatchError(f"not a zstd frame: {error}") from error
    if len(raw) != size:
        found = "more" if len(raw) > size else str(len(raw))
        raise ChunkMismatchError(f"unpacks to {found} bytes, {size} were signed")
    return raw
