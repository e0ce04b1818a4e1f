"""The names, versions, digests and paths that a bundle may use: pure checks, no disk.

Every name here later becomes part of a path or a URL, so the sets are small on purpose: ASCII, no separators, no
leading dot, nothing that another operating system reads as a device.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Final

from agent.errors import UnsafeBundleError

PATH_PARTS_MAX: Final = 8
OWN_FILES: Final = frozenset({"manifest.json", "verified.json"})  # at a version's top level the device writes these

_NAME: Final = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}", re.ASCII)
_NUMBER: Final = r"(?:0|[1-9][0-9]{0,8})"
_PRERELEASE: Final = r"(?:0|[1-9][0-9]*|[0-9]*[A-Za-z-][0-9A-Za-z-]*)"
_VERSION: Final = re.compile(rf"{_NUMBER}\.{_NUMBER}\.{_NUMBER}(?:-{_PRERELEASE}(?:\.{_PRERELEASE})*)?", re.ASCII)
_SHA256: Final = re.compile(r"[0-9a-f]{64}", re.ASCII)
_PART: Final = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,127}", re.ASCII)
_DEVICES: Final = frozenset(
    {"con", "prn", "aux", "nul"} | {f"{port}{number}" for port in ("com", "lpt") for number in range(1, 10)}
)


def check_name(value: str, what: str) -> str:
    """Return ``value``, a team's, model's, variant's or channel's name.

    Raises:
        UnsafeBundleError: not 1 to 64 of ``a-z 0-9 . _ -`` beginning with a letter or digit.
    """
    if not _NAME.fullmatch(value):
        raise UnsafeBundleError(
            f"{what}: {value[:80]!r} is not 1 to 64 of a-z 0-9 . _ - beginning with a letter or digit"
        )
    return value


def check_version(value: str) -> str:
    """Return ``value``, a semantic version without build metadata (``1.4.0``, ``2.0.0-rc.1``).

    Raises:
        UnsafeBundleError: anything else, or longer than 64 characters.
    """
    if len(value) > 64 or not _VERSION.fullmatch(value):
        raise UnsafeBundleError(f"version: {value[:80]!r} is not a semantic version such as 1.4.0 (no '+')")
    return value


def check_sha256(value: str, what: str) -> str:
    """Return ``value``, 64 lower-case hex digits; ``UnsafeBundleError`` otherwise."""
    if not _SHA256.fullmatch(value):
        raise UnsafeBundleError(f"{what}: {value[:80]!r} is not 64 lower-case hex digits")
    return value


def check_path(value: str) -> str:
    """Return ``value``, a relative file path of a bundle.

    Raises:
        UnsafeBundleError: absolute, empty, ``..`` or hidden parts, more than 8 parts, characters outside
            ``A-Z a-z 0-9 . _ -``, a trailing dot, a Windows device name, or a file the device writes itself.
    """
    parts = value.split("/")
    if len(parts) > PATH_PARTS_MAX:
        raise UnsafeBundleError(f"path {value[:80]!r}: more than {PATH_PARTS_MAX} parts")
    for part in parts:
        if not _PART.fullmatch(part):
            raise UnsafeBundleError(f"path {value[:80]!r}: the part {part[:80]!r} is not a plain file name")
        if part.endswith(".") or part.split(".", 1)[0].casefold() in _DEVICES:
            raise UnsafeBundleError(f"path {value[:80]!r}: {part!r} is not a file name on every system")
    if parts[0].casefold() in OWN_FILES:
        raise UnsafeBundleError(f"path {value!r}: this name belongs to the device")
    return value


def check_tree(paths: Iterable[str]) -> None:
    """Check that ``paths`` can be files side by side on any file system.

    Raises:
        UnsafeBundleError: two are equal but for case, or one is a directory of another.
    """
    files: dict[str, str] = {}
    for path in paths:
        key = check_path(path).casefold()
        if key in files:
            raise UnsafeBundleError(f"paths {files[key]!r} and {path!r} are the same file on some systems")
        files[key] = path
    for key, path in files.items():
        for cut, letter in enumerate(key):
            if letter == "/" and key[:cut] in files:
                raise UnsafeBundleError(f"path {files[key[:cut]]!r} is a file and a directory of {path!r}")


def manifest_target(team: str, name: str, version: str) -> str:
    """Return the TUF target path of a version's manifest."""
    return f"models/{team}/{name}/{version}.json"


def index_target(team: str, name: str) -> str:
    """Return the TUF target path of a model's index."""
    return f"models/{team}/{name}/index.json"


def version_key(version: str) -> tuple[tuple[int, int, int], bool, tuple[tuple[bool, int, str], ...]]:
    """Return a sort key with the precedence of semantic versions; ``version`` has passed ``check_version``."""
    core, _, prerelease = version.partition("-")
    major, minor, patch = (int(number) for number in core.split("."))
    parts = prerelease.split(".") if prerelease else []
    ranked = tuple((not part.isdigit(), int(part) if part.isdigit() else 0, part) for part in parts)
    return (major, minor, patch), not parts, ranked
