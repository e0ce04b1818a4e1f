"""A part of a store as a complete small one on a stick, for boxes without a network.

The stick holds every root, the metadata in force, the operator keys, the chosen versions with their blobs, and a
timestamp of its own with a longer life. That one is dated a second before the timestamp which the store gets in the
same breath, so a box that was fed by the stick takes the store as newer the next time it reaches it.

Promises: the store is stamped before the stick, and the stick's timestamp is its last write. A cut leaves a stick that
holds what it held before, or nothing a box accepts; doing the same again finishes. Nothing that a box needs to check
signatures is left out, whatever it holds already.
Absent on purpose: other models' indexes and manifests, and old metadata but for roots.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from hashlib import sha256
from pathlib import Path
from typing import Any, Final

from securesystemslib.signer import Signer

from agent.bundles import strictjson
from agent.bundles.layout import MANIFEST_FILE, VERIFIED_FILE
from agent.bundles.manifest import Chunk, Index, IndexEntry, Manifest, parse_index, parse_manifest
from agent.bundles.names import index_target, manifest_target
from agent.bundles.verify import Verified as InstalledRecord
from agent.errors import InvalidInputError, NotFoundError, TargetNotFoundError
from tools.hub import indexes
from tools.hub.bundle import distinct_chunks
from tools.hub.chunks import blob_name
from tools.hub.edition import (
    STORE_FILE,
    TIMESTAMP,
    Now,
    State,
    metadata_object,
    root_versions,
    serialise,
    store_document,
    target_object,
    team_role,
)
from tools.hub.errors import ConflictError, StoreStateError
from tools.hub.listener import Listener
from tools.hub.objects import Objects
from tools.hub.repository import Repository

VALID_DAYS: Final = 30
VALID_DAYS_MAX: Final = 90


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """A version to export; ``version`` is empty for the one that ``channel`` points to."""

    team: str
    name: str
    version: str = ""
    channel: str = "stable"


@dataclass(frozen=True, slots=True, kw_only=True)
class Exported:
    """What the stick holds now. Blobs and bytes count what the versions need."""

    models: tuple[dict[str, str], ...]  # team, name, version, manifest_sha256
    issued: int  # the stick's timestamp, Unix seconds; the store's is one second later
    expires: datetime  # of what expires first
    expires_role: str
    blobs: int
    bytes: int
    blobs_new: int  # written by this run
    bytes_new: int
    blobs_left_out: int  # the box holds them
    bytes_left_out: int


@dataclass(frozen=True, slots=True)
class _Choice:
    index: Index
    entry: IndexEntry
    manifest: Manifest


class Exporter:
    """Copies from one store to one stick. Both are locked by the caller."""

    def __init__(self, objects: Objects, repository: Repository, stick: Objects, now: Now) -> None:
        self._objects = objects
        self._repository = repository
        self._stick = stick
        self._now = now

    def export(
        self,
        wanted: Sequence[Wanted],
        *,
        online_signer: Signer,
        valid_days: int = VALID_DAYS,
        held: Collection[str] = frozenset(),
        listener: Listener | None = None,
    ) -> Exported:
        """Make the stick hold ``wanted`` and stamp both it and the store.

        Args:
            valid_days: How long boxes accept the stick, 1 to 90.
            held: Hashes of raw chunks that the boxes hold already; see ``held_chunks``.

        Raises:
            InvalidInputError: ``valid_days`` is out of range.
            TargetNotFoundError: no such model, version or channel.
            ConflictError: a version is revoked, or the stick holds another store.
            KeyNotAllowedError: ``online_signer`` is not the online key; nothing was written.
            StoreStateError: a stored object is missing or damaged.
        """
        if not 1 <= valid_days <= VALID_DAYS_MAX:
            raise InvalidInputError(f"a stick is valid for 1 to {VALID_DAYS_MAX} days, not {valid_days}")
        listener = listener or Listener()
        state = self._repository.state()
        choices = [self._choose(state, item) for item in wanted]
        self._require_same_store()
        edition = self._repository.edition(state)
        edition.seal(online_signer, covers_days=valid_days, later_s=1)
        timestamp = edition.aside(online_signer, valid_days=valid_days)

        needed = {chunk.blob: chunk for choice in choices for chunk in distinct_chunks(choice.manifest)}
        taken = {blob: chunk for blob, chunk in needed.items() if chunk.sha256 not in held}
        new = self._copy_blobs(taken, listener)
        for name in self._target_objects(state, choices):
            self._copy(name)
        edition.write()
        state = self._repository.state()
        for name in self._metadata_objects(state):
            self._copy(name)
        expires, role = _first_to_expire(state, choices, timestamp.signed.expires)
        exported = Exported(
            models=tuple(_facts(choice) for choice in choices),
            issued=timestamp.signed.version,
            expires=expires,
            expires_role=role,
            blobs=len(needed),
            bytes=_bytes(needed.values()),
            blobs_new=len(new),
            bytes_new=_bytes(new),
            blobs_left_out=len(needed) - len(taken),
            bytes_left_out=_bytes(needed.values()) - _bytes(taken.values()),
        )
        self._stick.replace(STORE_FILE, _store_file(exported))
        self._stick.replace(TIMESTAMP, serialise(timestamp))
        return exported

    def _choose(self, state: State, wanted: Wanted) -> _Choice:
        path = index_target(wanted.team, wanted.name)
        data = self._repository.read_target(state, wanted.team, path)
        if data is None:
            raise TargetNotFoundError(f"the store has no model {wanted.team}/{wanted.name}; see: inferhub ls")
        index = parse_index(data)
        version = wanted.version or index.channels.get(wanted.channel, "")
        if not version:
            raise TargetNotFoundError(f"{indexes.title(index)} has no channel {wanted.channel!r}: name a version")
        entry = indexes.entry_of(index, version)
        if entry.status == "revoked":
            raise ConflictError(f"{indexes.title(index, version)} is revoked: {entry.reason}")
        data = self._repository.read_target(state, index.team, manifest_target(index.team, index.name, version))
        if data is None or sha256(data).hexdigest() != entry.manifest_sha256:
            raise StoreStateError(f"{indexes.title(index, version)}: the index names a manifest that is not signed")
        return _Choice(index, entry, parse_manifest(data))

    def _require_same_store(self) -> None:
        first = metadata_object("root", 1)
        try:
            there = self._stick.read(first)
        except NotFoundError:
            return
        if there != self._objects.read(first):
            raise ConflictError("the folder holds another store", hint="Use an empty folder or another stick.")

    def _target_objects(self, state: State, choices: Sequence[_Choice]) -> Iterator[str]:
        for path, file in state.targets.signed.targets.items():
            yield target_object(path, file.hashes["sha256"])
        for choice in choices:
            signed = state.teams[choice.index.team].signed.targets
            stem = manifest_target(choice.index.team, choice.index.name, choice.entry.version).removesuffix(".json")
            index = index_target(choice.index.team, choice.index.name)
            for path in (index, f"{stem}.json", f"{stem}.oms.json"):
                if path in signed:
                    yield target_object(path, signed[path].hashes["sha256"])

    def _metadata_objects(self, state: State) -> Iterator[str]:
        for version in root_versions(self._objects):
            yield metadata_object("root", version)
        yield metadata_object("targets", state.targets.signed.version)
        for team, role in state.teams.items():
            yield metadata_object(team_role(team), role.signed.version)
        yield metadata_object("snapshot", state.snapshot.signed.version)

    def _copy(self, name: str) -> None:
        try:
            self._stick.put(name, self._objects.read(name))
        except NotFoundError as error:
            raise StoreStateError(f"{name} is named by signed metadata and missing") from error

    def _copy_blobs(self, chunks: dict[str, Chunk], listener: Listener) -> list[Chunk]:
        listener.stage("copy", _bytes(chunks.values()), "bytes")
        copied = []
        for blob, chunk in chunks.items():
            name = blob_name(blob)
            if self._stick.size(name) != chunk.blob_size:
                self._stick.replace(name, self._read_blob(name, chunk))  # heals a stick with a torn file
                copied.append(chunk)
            listener.advance(chunk.blob_size)
        return copied

    def _read_blob(self, name: str, chunk: Chunk) -> bytes:
        try:
            data = self._objects.read(name)
        except NotFoundError as error:
            raise StoreStateError(f"{name} is missing from the store", hint="Publish the version again.") from error
        if len(data) != chunk.blob_size or sha256(data).hexdigest() != chunk.blob:
            raise StoreStateError(f"{name} is damaged in the store", hint="See: inferhub verify --deep")
        return data


def held_chunks(path: Path) -> frozenset[str]:
    """Return the hashes of the raw chunks that a box holds, by its version folder or a manifest alone.

    A box keeps the files of one variant only. Its ``VERIFIED.json`` says which; for a manifest alone all are meant.

    Raises:
        InvalidInputError: there is no manifest, or it cannot be read.
        UnsafeBundleError: it is refused.
    """
    file = path / MANIFEST_FILE if path.is_dir() else path
    try:
        manifest = parse_manifest(file.read_bytes())
        record = file.with_name(VERIFIED_FILE)
        files = _installed_files(record.read_bytes()) if record.is_file() else None
    except OSError as error:
        raise InvalidInputError(f"--have {file}: {error.strerror}") from error
    return frozenset(
        chunk.sha256 for item in manifest.files if files is None or item.path in files for chunk in item.chunks
    )


def _installed_files(data: bytes) -> Collection[str]:
    return strictjson.convert(data, InstalledRecord, what=VERIFIED_FILE).files


def _first_to_expire(state: State, choices: Sequence[_Choice], timestamp: datetime) -> tuple[datetime, str]:
    roles: dict[str, Any] = {"root": state.root, "targets": state.targets, "snapshot": state.snapshot}
    roles |= {team_role(team): state.teams[team] for team in {choice.index.team for choice in choices}}
    dates = [(metadata.signed.expires, role) for role, metadata in roles.items()]
    return min([(timestamp, "timestamp"), *dates])


def _facts(choice: _Choice) -> dict[str, str]:
    return {
        "team": choice.index.team,
        "name": choice.index.name,
        "version": choice.entry.version,
        "manifest_sha256": choice.entry.manifest_sha256,
    }


def _store_file(exported: Exported) -> bytes:
    return store_document(
        export={
            "issued": exported.issued,
            "expires": f"{exported.expires:%Y-%m-%dT%H:%M:%SZ}",
            "models": exported.models,
            "complete": exported.blobs_left_out == 0,
        }
    )


def _bytes(chunks: Iterable[Chunk]) -> int:
    return sum(chunk.blob_size for chunk in chunks)
