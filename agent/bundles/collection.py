"""What on this box's disk is needed by nothing, and its removal.

``plan`` decides and is pure; ``inventory`` looks and ``remove`` acts. What serves, served before, is pinned, on trial
or wanted by an unfinished deployment is never collected, nor a pull that a process holds. The trust files are not
looked at: they are never collected.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Collection, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from agent.bundles.layout import VERIFIED_FILE, Layout
from agent.bundles.versions import STAGING_AGE_S_MAX, collect_manifests, discard, empty_trash, list_versions, unheld
from agent.durable import read_json
from agent.errors import StateError

PRESSURE_KEEP: Final = 2  # versions of a model that stay when room is short, those in use included


@dataclass(frozen=True, slots=True, kw_only=True)
class Stored:
    """A version directory or an unfinished pull. ``digest``: of the manifest, 12 hex digits for a version."""

    kind: str  # version, staging
    path: Path
    size_bytes: int
    digest: str
    team: str = ""
    name: str = ""
    version: str = ""
    seq: int = 0
    approved_until: int = 0
    idle_s: float = 0.0  # of staging: since it was last written
    held: bool = False  # of staging: a process is at it


@dataclass(frozen=True, slots=True, kw_only=True)
class Needed:
    """What must stay, and what must go once it is not needed."""

    paths: frozenset[Path] = frozenset()  # absolute: active, previous, pinned
    digests: frozenset[str] = frozenset()  # whole sha256, of unfinished deployments
    revoked: frozenset[str] = frozenset()  # whole sha256


@dataclass(frozen=True, slots=True, kw_only=True)
class Removal:
    """One thing to remove, and why."""

    item: Stored
    reason: str


def plan(items: Iterable[Stored], needed: Needed, *, keep: int, room_bytes: int = 0) -> list[Removal]:
    """Return what to remove, in order.

    Args:
        items: Everything there is.
        needed: What stays whatever happens.
        keep: So many of each model stay beside those, the newest.
        room_bytes: So much is to be freed beyond the ordinary: pulls nobody waits for and versions down to the
            newest two of each model go too, until that is reached. 0: only the ordinary.
    """
    items = list(items)
    wanted = {digest[:12] for digest in needed.digests}
    free = [item for item in items if item.path not in needed.paths and item.digest[:12] not in wanted]
    pulls = sorted(
        (item for item in free if item.kind == "staging" and not item.held), key=lambda item: item.idle_s, reverse=True
    )
    versions = [item for item in free if item.kind == "version"]
    revoked = {digest[:12] for digest in needed.revoked}
    found = [Removal(item=item, reason="unfinished and idle") for item in pulls if item.idle_s > STAGING_AGE_S_MAX]
    found += [Removal(item=item, reason="revoked") for item in versions if item.digest[:12] in revoked]
    found += [Removal(item=item, reason="superseded") for item in _surplus(versions, keep, gone=_paths(found))]
    freed = sum(removal.item.size_bytes for removal in found)
    if freed >= room_bytes:
        return found
    gone = _paths(found)
    waiting = [item for item in pulls if item.path not in gone]
    under_pressure = [Removal(item=item, reason="unfinished, room is needed") for item in waiting]
    everything = [item for item in items if item.kind == "version"]
    spare = {item.path for item in _surplus(everything, PRESSURE_KEEP, gone=gone)}
    oldest = sorted((item for item in versions if item.path in spare), key=lambda item: item.seq)
    under_pressure += [Removal(item=item, reason="superseded, room is needed") for item in oldest]
    for removal in under_pressure:
        if freed >= room_bytes:
            break
        found.append(removal)
        freed += removal.item.size_bytes
    return found


def inventory(layout: Layout, *, now: Callable[[], float] = time.time) -> list[Stored]:
    """Return the versions and unfinished pulls on disk, by team and model, the newest first."""
    found = []
    for item in list_versions(layout):
        record = _record(item.path)
        found.append(
            Stored(
                kind="version",
                path=item.path.absolute(),
                size_bytes=_size(item.path),
                digest=item.digest,
                team=item.team,
                name=item.name,
                version=item.version,
                seq=_whole(record, "seq"),
                approved_until=_whole(record, "approved_until"),
            )
        )
    for path in _folders(layout.staging):
        with suppress(FileNotFoundError):  # a pull ends without asking
            found.append(_staging(path, now()))
    return found


def remove(layout: Layout, removals: Collection[Removal]) -> list[Removal]:
    """Remove as planned and return what went; a pull that a process has taken up meanwhile stays.

    Raises:
        OSError: a directory cannot be renamed or deleted.
    """
    done = []
    for removal in removals:
        with suppress(FileNotFoundError):  # it went by itself
            if removal.item.kind == "staging" and not unheld(removal.item.path):
                continue
            discard(layout, removal.item.path)
            done.append(removal)
    empty_trash(layout)
    collect_manifests(layout)
    return done


def used_share(folder: Path) -> float:
    """Return how full the disk of ``folder`` is, 0..1."""
    stats = os.statvfs(folder)
    return 1.0 - stats.f_bavail / stats.f_blocks if stats.f_blocks else 0.0


def free_bytes(folder: Path) -> int:
    """Return how much this service may still write to the disk of ``folder``."""
    stats = os.statvfs(folder)
    return stats.f_bavail * stats.f_frsize


def _surplus(versions: Iterable[Stored], keep: int, *, gone: Collection[Path]) -> list[Stored]:
    """Return what is beyond the newest ``keep`` of each model; ``gone`` does not count."""
    kept: dict[tuple[str, str], int] = {}
    beyond = []
    for item in versions:  # by model, the newest first
        if item.path in gone:
            continue
        model = (item.team, item.name)
        kept[model] = kept.get(model, 0) + 1
        if kept[model] > keep:
            beyond.append(item)
    return beyond


def _paths(removals: Iterable[Removal]) -> set[Path]:
    return {removal.item.path for removal in removals}


def _staging(path: Path, now: float) -> Stored:
    newest = max((entry.stat().st_mtime for entry in (path, *path.iterdir())), default=now)
    return Stored(
        kind="staging",
        path=path.absolute(),
        size_bytes=_size(path),
        digest=path.name,
        idle_s=max(0.0, now - newest),
        held=not unheld(path),
    )


def _record(path: Path) -> Mapping[str, object]:
    try:
        raw = read_json(path / VERIFIED_FILE)
    except StateError:
        return {}
    return raw if isinstance(raw, dict) else {}


def _whole(record: Mapping[str, object], field: str) -> int:
    value = record.get(field, 0)
    return value if isinstance(value, int) else 0


def _size(path: Path) -> int:
    """Return what a folder takes on disk, in bytes."""
    total = 0
    for folder, _, files in os.walk(path):
        for name in files:
            try:
                total += os.lstat(os.path.join(folder, name)).st_blocks * 512
            except OSError:
                continue
    return total


def _folders(path: Path) -> list[Path]:
    if not path.is_dir():
        return []
    return sorted(child for child in path.iterdir() if child.is_dir() and not child.is_symlink())
