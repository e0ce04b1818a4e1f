"""The versions and unfinished pulls on this box: listing and discarding them.

A version directory appears whole by one rename and leaves whole by another (into ``trash/``), so a reader never meets
half of one. What may go is decided elsewhere (``collection.py``).
"""

from __future__ import annotations

import fcntl
import os
import re
import shutil
import stat
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from agent.bundles.layout import MANIFEST_FILE, Layout
from agent.bundles.manifest import Manifest, parse_manifest
from agent.bundles.names import version_key
from agent.durable import sync_directory
from agent.errors import AgentError

STAGING_AGE_S_MAX: Final = 7 * 86_400  # an unfinished pull nobody has touched for so long
_FOLDER: Final = re.compile(r"(?P<version>[0-9A-Za-z.-]{5,64})~(?P<digest>[0-9a-f]{12})", re.ASCII)


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredVersion:
    """One version directory, by its name alone; ``digest`` is the first 12 digits of the manifest's sha256."""

    team: str
    name: str
    version: str
    digest: str
    path: Path


def list_versions(layout: Layout) -> list[StoredVersion]:
    """Return all version directories, by team and model, the newest version first."""
    models = [(team.name, name) for team in _folders(layout.versions) for name in _folders(team)]
    found = [
        StoredVersion(team=team, name=name.name, version=match["version"], digest=match["digest"], path=path)
        for team, name in models
        for path in _folders(name)
        if (match := _FOLDER.fullmatch(path.name))
    ]
    found.sort(key=lambda item: _order(item.version), reverse=True)
    found.sort(key=lambda item: (item.team, item.name))
    return found


def local_manifests(layout: Layout, *, team: str, name: str) -> Iterator[tuple[Path, Manifest]]:
    """Yield the version directories with readable manifests, those of the named model first, newest first."""
    versions = list_versions(layout)
    versions.sort(key=lambda item: (item.team, item.name) != (team, name))
    for item in versions:
        try:
            yield item.path, parse_manifest((item.path / MANIFEST_FILE).read_bytes())
        except (OSError, AgentError):
            continue  # a damaged version is no source; ``check`` reports it


def collect_staging(layout: Layout, *, now: float, age_s_max: float = STAGING_AGE_S_MAX) -> list[Path]:
    """Remove unfinished pulls that were last touched more than ``age_s_max`` before ``now`` and that nobody holds."""
    removed = []
    for path in _folders(layout.staging):
        with suppress(FileNotFoundError):  # another pull ends without asking
            newest = max((entry.stat().st_mtime for entry in (path, *path.iterdir())), default=0.0)
            if now - newest > age_s_max and unheld(path):
                discard(layout, path)
                removed.append(path)
    empty_trash(layout)
    return removed


def discard(layout: Layout, path: Path) -> None:
    """Move ``path`` to the trash in one durable step; ``empty_trash`` deletes it."""
    layout.trash.mkdir(parents=True, exist_ok=True, mode=0o700)
    number = 0
    while (target := layout.trash / f"{path.name}.{number}").exists():
        number += 1
    os.chmod(path, 0o700)  # a directory that cannot be written cannot change its parent
    os.rename(path, target)
    sync_directory(path.parent)
    sync_directory(layout.trash)


def empty_trash(layout: Layout) -> None:
    """Delete what was discarded, now or before a cut."""
    for path in _folders(layout.trash):
        remove_tree(path)


def remove_tree(path: Path) -> None:
    """Delete a directory whose files and folders may be read-only; what another process deletes meanwhile is fine."""
    with suppress(FileNotFoundError):
        for folder, folders, _ in os.walk(path):
            for name in (".", *folders):
                child = os.path.join(folder, name)
                if not os.path.islink(child):
                    os.chmod(child, stat.S_IRWXU)
        shutil.rmtree(path)


def collect_manifests(layout: Layout) -> None:
    """Delete cached manifests of versions that are neither here nor on their way."""
    needed = {item.digest for item in list_versions(layout)} | {path.name[:12] for path in _folders(layout.staging)}
    for path in layout.root.glob("manifests/*.json"):
        if path.name[:12] not in needed:
            path.unlink(missing_ok=True)


def unheld(path: Path) -> bool:
    """Say whether no process holds the staging folder ``path``."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    else:
        return True
    finally:
        os.close(descriptor)


def _folders(path: Path) -> list[Path]:
    try:
        with os.scandir(path) as entries:
            return sorted(Path(entry.path) for entry in entries if entry.is_dir(follow_symlinks=False))
    except (FileNotFoundError, NotADirectoryError):
        return []


def _order(version: str) -> tuple[bool, object]:
    try:
        return True, version_key(version)
    except ValueError:
        return False, version
