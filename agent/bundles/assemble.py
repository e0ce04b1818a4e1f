"""Turn a complete staging folder into a version directory, in one rename.

Each part file, whose whole hash was checked, is moved to its place in ``tree``, made read-only and synced; content and
the exact set of files are checked; then ``tree`` is renamed to ``versions/``. Until that rename nothing outside staging
changes, after it the version is complete.
"""

from __future__ import annotations

import ctypes
import os
from pathlib import Path

import msgspec

from agent.bundles.layout import MANIFEST_FILE, VERIFIED_FILE, Layout
from agent.bundles.staging import Staging
from agent.bundles.verify import Verified, check_files, check_tree
from agent.bundles.versions import remove_tree
from agent.durable import sync_directory, write_file, write_json
from agent.errors import StateError

_RENAME_EXCHANGE = 2
_AT_FDCWD = -100


def recover(staging: Staging) -> None:
    """Undo an ``install`` that was cut: bring its files back as parts. Call it before ``staging.open``."""
    tree = staging.folder / "tree"
    if not tree.is_dir():
        return
    for folder, _, _ in os.walk(tree):
        os.chmod(folder, 0o700)
    for number in staging.numbers:
        placed = tree / staging.manifest.files[number].path
        if placed.is_file() and not placed.is_symlink():
            os.chmod(placed, 0o600)
            os.replace(placed, staging.part(number))
    remove_tree(tree)


def install(staging: Staging, manifest_bytes: bytes, verified: Verified, layout: Layout) -> Path:
    """Move a complete staging folder, whose parts were just hashed, into place; return the version directory.

    Raises:
        UnsafeBundleError: a file's content is never accepted.
        DiskFullError, StateError: the local disk.
    """
    tree = staging.folder / "tree"
    manifest = staging.manifest
    tree.mkdir(mode=0o700)
    for number in staging.numbers:
        target = tree / manifest.files[number].path
        target.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        os.rename(staging.part(number), target)
    hashes = {manifest.files[number].path: manifest.files[number].sha256 for number in staging.numbers}
    check_files(tree, manifest, verified.files, lambda size: None, hashes=hashes)
    write_file(tree / MANIFEST_FILE, manifest_bytes, mode=0o444)
    write_json(tree / VERIFIED_FILE, msgspec.to_builtins(verified), mode=0o444)
    check_tree(tree, {MANIFEST_FILE, VERIFIED_FILE, *verified.files})
    _seal(tree)
    target = layout.version(verified.team, verified.name, verified.version, verified.manifest_sha256)
    _make_parents(target.parent, layout.root)
    _move_into_place(tree, target)
    sync_directory(target.parent)
    remove_tree(staging.folder)
    return target


def _seal(tree: Path) -> None:
    """Make all files 0444 and all directories below 0555 and sync them, leaves first."""
    for folder, _, files in os.walk(tree, topdown=False):
        for name in files:
            descriptor = os.open(Path(folder) / name, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
            try:
                os.fchmod(descriptor, 0o444)
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
        sync_directory(Path(folder))
        os.chmod(folder, 0o555)
    os.chmod(tree, 0o755)  # some systems refuse to rename a directory that cannot be written


def _make_parents(folder: Path, root: Path) -> None:
    missing = []
    while folder != root and not folder.exists():
        missing.append(folder)
        folder = folder.parent
    for path in reversed(missing):
        path.mkdir(mode=0o755, exist_ok=True)
        sync_directory(path.parent)


def _move_into_place(tree: Path, target: Path) -> None:
    if not target.exists():
        os.rename(tree, target)
    else:
        os.chmod(target, 0o755)
        _exchange(tree, target)  # the same bundle with more of its files; the old one goes with the staging folder
    os.chmod(target, 0o555)


def _exchange(one: Path, other: Path) -> None:
    """Swap two directories in one step (``renameat2``), so that a running version is never without its files."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.renameat2(_AT_FDCWD, bytes(one), _AT_FDCWD, bytes(other), _RENAME_EXCHANGE) != 0:
        raise StateError(f"{other}: cannot be replaced: {os.strerror(ctypes.get_errno())}")
