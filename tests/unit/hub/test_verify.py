"""What ``verify`` finds in a store that somebody has tampered with."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from agent.errors import AgentError, ChunkMismatchError, TargetNotFoundError, UntrustedError
from tests.fakes import bundles
from tests.fakes.hub import Centre, Clock
from tools.hub.edition import TIMESTAMP
from tools.hub.verify import verify

pytestmark = pytest.mark.unit


@pytest.fixture
def centre(tmp_path: Path) -> Centre:
    centre = Centre(tmp_path / "store", Clock(time.time()))
    centre.initialise()
    centre.publish(bundles.pack(tmp_path / "b", bundles.plain_files(rows=16), zstd=True), "stable")
    return centre


def largest_blob(centre: Centre) -> Path:
    return max((path for path in (centre.root / "blobs").rglob("*") if path.is_file()), key=lambda p: p.stat().st_size)


def test_a_flipped_byte_is_found_by_a_deep_look_only(centre: Centre) -> None:
    blob = largest_blob(centre)
    data = bytearray(blob.read_bytes())
    data[len(data) // 2] ^= 1
    blob.write_bytes(data)
    verify(str(centre.root), centre.anchor, deep=False)
    with pytest.raises(ChunkMismatchError, match="differs"):
        verify(str(centre.root), centre.anchor, deep=True)


@pytest.mark.parametrize("deep", [True, False])
def test_a_longer_or_missing_blob_is_found(centre: Centre, deep: bool) -> None:
    blob = largest_blob(centre)
    data = blob.read_bytes()
    blob.write_bytes(data + b"more")
    with pytest.raises(ChunkMismatchError):
        verify(str(centre.root), centre.anchor, deep=deep)
    blob.unlink()
    with pytest.raises(TargetNotFoundError):
        verify(str(centre.root), centre.anchor, deep=deep)


@pytest.mark.parametrize("pattern", [TIMESTAMP, "metadata/*.snapshot.json", "metadata/*.team-vision.json"])
def test_altered_metadata_is_untrusted(centre: Centre, pattern: str) -> None:
    for path in centre.root.glob(pattern):
        path.write_bytes(path.read_bytes().replace(b'"version":', b'"version":1', 1))
    with pytest.raises(UntrustedError):
        verify(str(centre.root), centre.anchor, deep=False)


def test_an_altered_manifest_is_untrusted(centre: Centre) -> None:
    for path in (centre.root / "targets/models/vision").rglob("*.1.0.0.json"):
        path.write_bytes(path.read_bytes().replace(b'"seq":', b'"seq":1', 1))
    with pytest.raises(UntrustedError):
        verify(str(centre.root), centre.anchor, deep=False)


def test_another_stores_anchor_trusts_nothing_here(centre: Centre, tmp_path: Path) -> None:
    stranger = Centre(tmp_path / "other", Clock(time.time())).initialise()
    with pytest.raises(UntrustedError):
        verify(str(centre.root), stranger, deep=False)


def test_junk_for_an_anchor_is_refused(centre: Centre) -> None:
    with pytest.raises(AgentError):
        verify(str(centre.root), b"{}", deep=False)
