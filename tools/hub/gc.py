"""What a store no longer needs: decided from signed metadata, removed on demand.

A role's file stays while it is in force and for a grace time after the next version took its place, and with it every
target it names and every blob that those manifests name. So whoever began a pull before a change can end it after.

Promises: roots are never removed, signed metadata not within 90 days; nothing that the state in force names is touched,
revoked versions included; a cut run can be repeated. Absent on purpose: bundles on the publisher's own disk.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from typing import Final

from tuf.api.exceptions import RepositoryError
from tuf.api.metadata import Metadata, Targets
from tuf.api.serialization import DeserializationError

from agent.bundles.manifest import parse_manifest
from agent.errors import NotFoundError, UnsafeBundleError
from tools.hub.bundle import distinct_chunks
from tools.hub.chunks import blob_name
from tools.hub.edition import State, metadata_object, target_object, team_role
from tools.hub.errors import StoreStateError
from tools.hub.listener import Listener
from tools.hub.objects import Objects, Stored

METADATA_DAYS_MIN: Final = 90
_DAY_S: Final = 86_400
_METADATA: Final = re.compile(r"metadata/(\d+)\.([a-z0-9._-]+)\.json")
_RESTORE: Final = "Restore it from a mirror."
_NO_MANIFEST: Final = ("/index.json", ".oms.json")


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What may go. Everything else stays."""

    blobs: tuple[Stored, ...]
    targets: tuple[Stored, ...]
    metadata: tuple[Stored, ...]
    cut: tuple[Stored, ...]  # written half by a cut, in no one's way
    blobs_kept: int
    bytes_kept: int

    def all(self) -> tuple[Stored, ...]:
        """Return what goes, in the order in which it goes."""
        return (*self.blobs, *self.targets, *self.metadata, *self.cut)

    @property
    def bytes(self) -> int:
        """How many bytes become free."""
        return sum(item.size for item in self.all())


@dataclass(frozen=True, slots=True)
class _RoleFile:
    stored: Stored
    role: str
    version: int
    superseded: float | None  # Unix seconds; ``None`` while it is in force


def plan(objects: Objects, state: State, *, now: float, grace_days: int, listener: Listener | None = None) -> Plan:
    """Return what nothing has needed for ``grace_days``; metadata and manifests stay for at least 90.

    Raises:
        StoreStateError: metadata or a manifest that is still needed cannot be read, so what it names is not known.
    """
    listener = listener or Listener()
    files = list(_role_files(objects, state))
    metadata_s = max(grace_days, METADATA_DAYS_MIN) * _DAY_S
    kept_files = [file for file in files if _alive(file, now, metadata_s)]
    lasting = [file for file in files if _alive(file, now, grace_days * _DAY_S)]
    targets = _targets_of(objects, kept_files)
    blobs = _blobs_of(objects, _targets_of(objects, lasting), listener)
    kept_names = {file.stored.name for file in kept_files}

    def gone(folder: str, kept: Collection[str], grace_s: float) -> tuple[Stored, ...]:
        found = (item for item in objects.stored(folder) if item.name not in kept and not _is_cut(item))
        return tuple(sorted((item for item in found if now - item.modified > grace_s), key=lambda item: item.name))

    stored = [item for item in objects.stored("blobs") if not _is_cut(item)]
    return Plan(
        blobs=gone("blobs", blobs, grace_days * _DAY_S),
        targets=gone("targets", set(targets), metadata_s),
        metadata=tuple(file.stored for file in files if file.stored.name not in kept_names),
        cut=tuple(
            item
            for folder in ("blobs", "targets", "metadata")
            for item in objects.stored(folder)
            if _is_cut(item) and now - item.modified > _DAY_S
        ),
        blobs_kept=sum(item.name in blobs for item in stored),
        bytes_kept=sum(item.size for item in stored if item.name in blobs),
    )


def collect(objects: Objects, doomed: Plan, listener: Listener | None = None) -> None:
    """Remove what ``doomed`` says."""
    listener = listener or Listener()
    listener.stage("remove", len(doomed.all()), "steps")
    for item in doomed.all():
        objects.remove(item.name)
        listener.advance(1)


def _role_files(objects: Objects, state: State) -> Iterator[_RoleFile]:
    in_force = {"targets": state.targets.signed.version, "snapshot": state.snapshot.signed.version}
    in_force |= {team_role(team): role.signed.version for team, role in state.teams.items()}
    found: dict[str, dict[int, Stored]] = {}
    for item in objects.stored("metadata"):
        match = _METADATA.fullmatch(item.name)
        if match and match[2] != "root":
            found.setdefault(match[2], {})[int(match[1])] = item
    for role, versions in found.items():
        for version, item in versions.items():
            newer = [other for number, other in versions.items() if number > version]
            superseded: float | None = min((other.modified for other in newer), default=item.modified)
            if version == in_force.get(role):
                superseded = None
            elif version > in_force.get(role, 0):
                superseded = item.modified  # a cut attempt's, never in force
            yield _RoleFile(item, role, version, superseded)


def _alive(file: _RoleFile, now: float, grace_s: float) -> bool:
    return file.superseded is None or now - file.superseded <= grace_s


def _targets_of(objects: Objects, files: Iterable[_RoleFile]) -> dict[str, str]:
    """Return every target that ``files`` name: where it is stored, and its path."""
    named = {}
    for file in files:
        if file.role == "snapshot":
            continue
        try:
            role = Metadata[Targets].from_bytes(objects.read(metadata_object(file.role, file.version)))
        except (NotFoundError, DeserializationError, RepositoryError) as error:
            raise StoreStateError(
                f"{file.stored.name}: {error}", hint="Restore it from a mirror, or remove it."
            ) from error
        for path, target in role.signed.targets.items():
            named[target_object(path, target.hashes["sha256"])] = path
    return named


def _blobs_of(objects: Objects, targets: dict[str, str], listener: Listener) -> set[str]:
    manifests = sorted(
        name for name, path in targets.items() if path.startswith("models/") and not path.endswith(_NO_MANIFEST)
    )
    listener.stage("read manifests", len(manifests), "steps")
    named: set[str] = set()
    for name in manifests:
        try:
            manifest = parse_manifest(objects.read(name))
        except (NotFoundError, UnsafeBundleError) as error:
            raise StoreStateError(f"{name}: {error}", hint=_RESTORE) from error
        named |= {blob_name(chunk.blob) for chunk in distinct_chunks(manifest)}
        listener.advance(1)
    return named


def _is_cut(item: Stored) -> bool:
    name = item.name.rpartition("/")[2]
    return name.startswith(".") and name.endswith(".tmp")
