"""Version directories: listing, collecting, deleting, and telling a changed one."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path

import pytest
import zstandard

from agent.bundles import versions, zstd
from agent.bundles.layout import Layout
from agent.bundles.pace import Pace
from agent.bundles.verify import check_tree
from agent.errors import ChunkMismatchError, TransientError, UnsafeBundleError

pytestmark = pytest.mark.unit


@pytest.fixture
def layout(tmp_path: Path) -> Layout:
    return Layout(tmp_path)


def stored(layout: Layout, version: str, *, name: str = "tiny") -> Path:
    path = layout.version("vision", name, version, "ab" * 32)
    (path / "fp32").mkdir(parents=True)
    (path / "fp32" / "model").write_bytes(b"x")
    for folder in (path / "fp32", path):
        folder.chmod(0o555)
    return path


def test_versions_are_listed_newest_first(layout: Layout) -> None:
    for version in ("1.9.0", "1.10.0", "1.10.0-rc.1"):
        stored(layout, version)
    (layout.versions / "vision" / "tiny" / "stray").mkdir()
    assert [item.version for item in versions.list_versions(layout)] == ["1.10.0", "1.10.0-rc.1", "1.9.0"]


def test_old_staging_goes_and_held_staging_stays(layout: Layout) -> None:
    for name in ("old", "held", "new"):
        (layout.staging / name).mkdir(parents=True)
        (layout.staging / name / "0.part").write_bytes(b"x")
    for name in ("old", "held"):
        for path in (layout.staging / name / "0.part", layout.staging / name):
            os.utime(path, (1000, 1000))
    descriptor = os.open(layout.staging / "held", os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    now = (layout.staging / "new").stat().st_mtime
    assert versions.collect_staging(layout, now=now) == [layout.staging / "old"]
    os.close(descriptor)
    assert sorted(path.name for path in layout.staging.iterdir()) == ["held", "new"]


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    (tmp_path / "tree" / "a").mkdir(parents=True)
    (tmp_path / "tree" / "a" / "b").write_bytes(b"1")
    (tmp_path / "tree" / "c").write_bytes(b"2")
    return tmp_path / "tree"


def test_the_exact_tree_is_accepted(tree: Path) -> None:
    check_tree(tree, {"a/b", "c"})


def test_a_missing_file_is_noticed(tree: Path) -> None:
    with pytest.raises(UnsafeBundleError, match="missing"):
        check_tree(tree, {"a/b", "c", "d"})


def test_an_extra_file_is_noticed(tree: Path) -> None:
    with pytest.raises(UnsafeBundleError, match="does not belong"):
        check_tree(tree, {"a/b"})


def test_an_extra_folder_is_noticed(tree: Path) -> None:
    (tree / "empty").mkdir()
    with pytest.raises(UnsafeBundleError, match="not a regular file"):
        check_tree(tree, {"a/b", "c"})


def test_a_symbolic_link_is_noticed(tree: Path) -> None:
    (tree / "c").unlink()
    (tree / "c").symlink_to("a/b")
    with pytest.raises(UnsafeBundleError, match="not a regular file"):
        check_tree(tree, {"a/b", "c"})


def test_a_second_name_of_a_file_is_noticed(tree: Path) -> None:
    os.link(tree / "c", tree.parent / "elsewhere")
    with pytest.raises(UnsafeBundleError, match="2 names"):
        check_tree(tree, {"a/b", "c"})


def test_a_pipe_is_noticed(tree: Path) -> None:
    (tree / "c").unlink()
    os.mkfifo(tree / "c")
    with pytest.raises(UnsafeBundleError, match="not a regular file"):
        check_tree(tree, {"a/b", "c"})


def test_unpacking_is_bounded_by_the_signed_size() -> None:
    packed = zstandard.ZstdCompressor().compress(b"\x00" * 100_000_000)
    assert len(packed) < 20_000
    with pytest.raises(ChunkMismatchError, match="more"):
        list(zstd.pieces(packed, size=1000))


@pytest.mark.parametrize("data", [b"", b"junk", b"\x28\xb5\x2f\xfd"])
def test_what_is_no_zstd_frame_is_refused(data: bytes) -> None:
    with pytest.raises(ChunkMismatchError):
        list(zstd.pieces(data, size=10))


def test_a_dripping_source_is_a_stall_and_a_slow_one_is_not() -> None:
    slow = Pace("slow", 10.0)
    for _ in range(30):
        slow.add(2048, 1.0)
    dripping = Pace("drip", 10.0)
    with pytest.raises(TransientError, match="stalled"):
        dripping.add(10, 10.0)


def test_a_pull_that_ends_meanwhile_is_not_collected(layout: Layout, monkeypatch: pytest.MonkeyPatch) -> None:
    for digest in ("aa", "bb"):
        (layout.staging / digest).mkdir(parents=True)

    def end_first(path: Path) -> bool:
        if path.name == "aa":
            path.rmdir()
        return True

    monkeypatch.setattr(versions, "unheld", end_first)
    assert versions.collect_staging(layout, now=1e12) == [layout.staging / "bb"]
