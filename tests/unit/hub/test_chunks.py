"""Chunks add up to their file, share what two versions share, and are named by what is stored."""

from __future__ import annotations

from hashlib import sha256
from pathlib import Path
from random import Random

import pytest
import zstandard

from agent.config import MIB
from tools.hub import chunks

pytestmark = pytest.mark.unit


def cut(path: Path, *, compress: bool = True) -> list[tuple[chunks.Chunk, bytes]]:
    return list(chunks.cut(path, compress=compress))


def test_chunks_in_order_are_the_file(tmp_path: Path) -> None:
    data = Random(1).randbytes(9 * MIB) + bytes(8 * MIB)
    (tmp_path / "f").write_bytes(data)
    pieces = cut(tmp_path / "f")
    raw = [zstandard.ZstdDecompressor().decompress(b) if c.compressed else b for c, b in pieces]
    assert b"".join(raw) == data
    assert len(pieces) > 1
    for (chunk, stored), part in zip(pieces, raw, strict=True):
        assert (chunk.raw_sha256, chunk.raw_size) == (sha256(part).hexdigest(), len(part))
        assert (chunk.stored_sha256, chunk.stored_size) == (sha256(stored).hexdigest(), len(stored))
        assert chunk.raw_size <= chunks.MAX


def test_compression_is_used_only_where_it_saves_a_tenth(tmp_path: Path) -> None:
    (tmp_path / "noise").write_bytes(Random(1).randbytes(MIB))
    (tmp_path / "zeros").write_bytes(bytes(MIB))
    assert [c.compressed for c, _ in cut(tmp_path / "noise")] == [False]
    assert [c.compressed for c, _ in cut(tmp_path / "zeros")] == [True]
    assert [c.compressed for c, _ in cut(tmp_path / "zeros", compress=False)] == [False]


def test_bytes_inserted_in_front_leave_most_chunks_as_they_were(tmp_path: Path) -> None:
    weights = Random(1).randbytes(40 * MIB)
    (tmp_path / "old").write_bytes(weights)
    (tmp_path / "new").write_bytes(b"a longer header" + weights)
    old = {c.raw_sha256 for c, _ in cut(tmp_path / "old")}
    fresh = [c.raw_size for c, _ in cut(tmp_path / "new") if c.raw_sha256 not in old]
    assert sum(fresh) < len(weights) / 2


def test_an_empty_file_has_no_chunks(tmp_path: Path) -> None:
    (tmp_path / "f").touch()
    assert cut(tmp_path / "f") == []
