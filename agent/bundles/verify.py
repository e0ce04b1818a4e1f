"""Check a version directory against its manifest: the exact files, their kind, size, hash and content.

Used on a pull just before activation and at each start afterwards (without network, without expiry: what was activated
once stays usable). Child process only, because it parses files that nobody has trusted yet.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Collection, Mapping
from hashlib import sha256
from pathlib import Path
from typing import Final

import msgspec

from agent.bundles import names, strictjson
from agent.bundles.content import check_content
from agent.bundles.layout import MANIFEST_FILE, VERIFIED_FILE
from agent.bundles.manifest import Manifest, parse_manifest
from agent.errors import StateError, UnsafeBundleError, UntrustedError

VERIFIED_SCHEMA: Final = "inferd-verified/1"
_READ_BYTES: Final = 1 << 20

Report = Callable[[int], None]  # bytes hashed since the last call


class Verified(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The record a pull leaves beside the files. ``files`` are the manifest's paths that are on this box."""

    schema: str
    team: str
    name: str
    version: str
    seq: int
    manifest_sha256: str
    files: tuple[str, ...]
    timestamp: int  # version of the timestamp that vouched, Unix seconds
    verified: int  # Unix seconds, trusted time
    approved_until: int = 0  # Unix seconds: until when it may be activated without asking a store again


def check_version_directory(path: Path, report: Report = lambda size: None) -> tuple[Manifest, Verified]:
    """Check every byte in ``path``; return its manifest and record.

    Raises:
        StateError: there is no version, or its record cannot be read.
        UntrustedError: bytes differ from the manifest, or the manifest from its record.
        UnsafeBundleError: extra, missing or linked entries, or content that is never accepted.
    """
    verified = _read_record(path / VERIFIED_FILE)
    data = _read_small(path / MANIFEST_FILE)
    digest = sha256(data).hexdigest()
    if digest != verified.manifest_sha256 or path.name != f"{verified.version}~{digest[:12]}":
        raise UntrustedError(f"{path}: the manifest is not the one that was verified")
    manifest = parse_manifest(data)
    if (manifest.team, manifest.name, manifest.version) != (verified.team, verified.name, verified.version):
        raise UntrustedError(f"{path}: the manifest is another model's")
    listed = {item.path for item in manifest.files}
    if unknown := sorted(set(verified.files) - listed):
        raise UntrustedError(f"{path}: the record lists {unknown[0]!r}, the manifest does not")
    check_tree(path, {MANIFEST_FILE, VERIFIED_FILE, *verified.files})
    check_files(path, manifest, verified.files, report)
    return manifest, verified


def read_record(path: Path) -> Verified:
    """Return the record of the version directory ``path``; ``StateError`` if it cannot be read."""
    return _read_record(path / VERIFIED_FILE)


def check_tree(folder: Path, expected: Collection[str]) -> None:
    """Check that ``folder`` holds exactly the files ``expected`` (relative) and the directories they need.

    Raises:
        UnsafeBundleError: extra or missing entries, links of either kind, devices.
    """
    directories = {str(parent) for path in expected for parent in Path(path).parents if str(parent) != "."}
    found: set[str] = set()
    for path, entry in _entries(folder, ""):
        info = entry.stat(follow_symlinks=False)
        if stat.S_ISDIR(info.st_mode) and path in directories:
            continue
        if not stat.S_ISREG(info.st_mode):
            raise UnsafeBundleError(f"{folder}: {path!r} is not a regular file")
        if path not in expected:
            raise UnsafeBundleError(f"{folder}: {path!r} does not belong to the bundle")
        if info.st_nlink != 1:
            raise UnsafeBundleError(f"{folder}: {path!r} has {info.st_nlink} names")
        found.add(path)
    if missing := sorted(set(expected) - found):
        raise UnsafeBundleError(f"{folder}: {missing[0]!r} is missing")


def check_files(
    folder: Path,
    manifest: Manifest,
    paths: Collection[str],
    report: Report,
    *,
    hashes: Mapping[str, str] | None = None,
) -> None:
    """Check size, sha256 and content of ``paths``.

    Args:
        hashes: Digests computed a moment ago by the caller, which need no second reading.

    Raises:
        UntrustedError: size or hash differ.
        UnsafeBundleError: content that is never accepted.
    """
    for item in manifest.files:
        if item.path not in paths:
            continue
        path = folder / item.path
        size = path.stat().st_size
        if size != item.size:
            raise UntrustedError(f"{path}: {size} bytes, {item.size} were signed")
        known = hashes.get(item.path) if hashes else None
        if (known or hash_file(path, report)) != item.sha256:
            raise UntrustedError(f"{path}: the bytes differ from the signed hash")
        check_content(path, item, manifest, paths)


def hash_file(path: Path, report: Report = lambda size: None) -> str:
    """Return the file's sha256 as lower-case hex, reading it once."""
    hasher = sha256()
    with path.open("rb", buffering=0) as file:
        while data := file.read(_READ_BYTES):
            hasher.update(data)
            report(len(data))
    return hasher.hexdigest()


def _entries(folder: Path, prefix: str) -> list[tuple[str, os.DirEntry[str]]]:
    found: list[tuple[str, os.DirEntry[str]]] = []
    if prefix.count("/") > names.PATH_PARTS_MAX:
        raise UnsafeBundleError(f"{folder}: nested too deeply")
    with os.scandir(folder / prefix) as entries:
        for entry in entries:
            path = f"{prefix}{entry.name}"
            found.append((path, entry))
            if entry.is_dir(follow_symlinks=False):
                found += _entries(folder, f"{path}/")
    return found


def _read_record(path: Path) -> Verified:
    try:
        record = strictjson.convert(_read_small(path), Verified, what=VERIFIED_FILE)
    except UnsafeBundleError as error:
        raise StateError(f"{path}: {error}") from error
    if record.schema != VERIFIED_SCHEMA:
        raise StateError(f"{path}: unknown schema {record.schema[:40]!r}")
    return record


def _read_small(path: Path) -> bytes:
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
        with os.fdopen(descriptor, "rb") as file:
            return file.read(strictjson.SIZE_BYTES_MAX + 1)
    except OSError as error:
        raise StateError(f"{path}: {error.strerror}") from error
