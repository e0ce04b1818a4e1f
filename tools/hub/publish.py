"""Make a packed bundle visible to the fleet: blobs, manifest, index, team role, snapshot, timestamp, in this order.

Promises: a published version never changes, ``seq`` only grows, and doing the same again changes nothing. Until the
timestamp is replaced every reader sees the state before; see ``repository.py``.
Absent on purpose: who is asked for keys, and the look of progress (``cli_bundle.py``).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime

import msgspec
from securesystemslib.signer import Key, Signer

from agent.bundles.manifest import (
    INDEX_SCHEMA,
    OPERATORS_SCHEMA,
    Index,
    IndexEntry,
    OperatorKey,
    Operators,
    encode,
    parse_index,
    parse_operators,
)
from agent.bundles.names import check_name, index_target, manifest_target
from agent.errors import TargetNotFoundError
from tools.hub import indexes, oms
from tools.hub.bundle import Bundle, check_blob, distinct_chunks
from tools.hub.chunks import blob_name
from tools.hub.edition import Edition, Now, State
from tools.hub.errors import ConflictError
from tools.hub.listener import Listener
from tools.hub.objects import Objects
from tools.hub.repository import Repository


@dataclass(frozen=True, slots=True, kw_only=True)
class Published:
    """What a publishing verb did. ``changed`` is false if the store said so already."""

    team: str
    name: str
    version: str
    seq: int
    manifest_sha256: str
    status: str
    channels: tuple[str, ...]  # those that point to this version now
    changed: bool
    blobs: int  # distinct chunks, and how many of them the store lacked
    blobs_new: int
    bytes: int  # as stored
    bytes_new: int
    timestamp_version: int  # 0 if nothing changed


@dataclass(frozen=True, slots=True, kw_only=True)
class Marked:
    """What became of a published version. ``changed`` is false if the store said so already."""

    team: str
    name: str
    version: str
    status: str
    reason: str
    channels: dict[str, str]  # all of the model's, as they are now
    changed: bool
    timestamp_version: int  # 0 if nothing changed


@dataclass(slots=True)
class Uploaded:
    """Running totals of one upload."""

    blobs: int = 0
    blobs_new: int = 0
    bytes: int = 0
    bytes_new: int = 0


class Publisher:
    """Changes what a store offers. One instance per locked store."""

    def __init__(self, objects: Objects, repository: Repository, now: Now) -> None:
        self._objects = objects
        self._repository = repository
        self._now = now

    def publish(
        self,
        bundle: Bundle,
        *,
        team_signer: Signer,
        online_signer: Signer,
        oms_signer: Signer | None = None,
        channels: Sequence[str] = (),
        listener: Listener | None = None,
    ) -> Published:
        """Publish ``bundle`` and point ``channels`` to it.

        With ``oms_signer`` its files also get an OpenSSF model signature, which the manifest then names.

        Raises:
            KeyNotAllowedError: a key may not sign its role; nothing was uploaded.
            ConflictError: this version is published with other content, ``seq`` does not grow, or it is revoked.
            SourceError: a blob of the bundle is damaged.
            StoreStateError: see ``Repository.state``.
        """
        bundle = _naming_signature(bundle, oms_signer)
        manifest = bundle.manifest
        state = self._repository.state()
        index = read_index(self._repository, state, manifest.team, manifest.name) or Index(
            schema=INDEX_SCHEMA, team=manifest.team, name=manifest.name, generated=""
        )
        known = next((entry for entry in index.versions if entry.version == manifest.version), None)
        if known is None:
            _require_growth(index, bundle)
        elif known.manifest_sha256 != bundle.sha256:
            raise ConflictError(
                f"{bundle.title} is published with another manifest ({known.manifest_sha256[:12]})",
                hint="A published version never changes: raise the version and pack again, or if it was published with "
                "--oms-key give the same one.",
            )
        changed = index if known else indexes.added(index, self._entry(bundle))
        changed = indexes.pointed(changed, channels, manifest.version)
        if changed == index:
            return _report(index, manifest.version)
        changed = msgspec.structs.replace(changed, generated=self._time())
        edition = self._repository.edition(state)
        target = manifest_target(manifest.team, manifest.name, manifest.version)
        edition.add_team_target(manifest.team, target, bundle.manifest_bytes)
        if oms_signer is not None:
            edition.add_team_target(manifest.team, oms.target_path(manifest), oms.sign(manifest, oms_signer))
        self._seal(edition, changed, team_signer, online_signer)
        uploaded = self._upload(bundle, listener or Listener())  # after signing: a wrong key costs no upload
        return _report(changed, manifest.version, uploaded, timestamp=edition.write())

    def promote(
        self, team: str, name: str, version: str, channel: str, *, team_signer: Signer, online_signer: Signer
    ) -> Published:
        """Point ``channel`` to a published version.

        Raises:
            TargetNotFoundError: the store has no such model or version.
            KeyNotAllowedError: a key may not sign its role.
            ConflictError: the version is revoked.
        """
        state = self._repository.state()
        index = self.index(state, team, name)
        changed = indexes.pointed(index, [channel], version)
        if changed == index:
            return _report(index, version)
        return _report(changed, version, timestamp=self._replace(state, changed, team_signer, online_signer))

    def deprecate(
        self, team: str, name: str, version: str, *, reason: str, team_signer: Signer, online_signer: Signer
    ) -> Marked:
        """Mark a version as one that nobody should choose any more; boxes that run it go on.

        Raises:
            TargetNotFoundError, ConflictError, InvalidInputError: see ``indexes.deprecated``.
            KeyNotAllowedError: a key may not sign its role.
        """
        state = self._repository.state()
        index = self.index(state, team, name)
        return self._mark(state, index, indexes.deprecated(index, version, reason), version, team_signer, online_signer)

    def reinstate(self, team: str, name: str, version: str, *, team_signer: Signer, online_signer: Signer) -> Marked:
        """Take a deprecation back; raises as ``deprecate``."""
        state = self._repository.state()
        index = self.index(state, team, name)
        return self._mark(state, index, indexes.reinstated(index, version), version, team_signer, online_signer)

    def revoke(
        self,
        team: str,
        name: str,
        version: str,
        *,
        reason: str,
        replacement: str = "",
        drop_channels: bool = False,
        team_signer: Signer,
        online_signer: Signer,
    ) -> Marked:
        """Withdraw a version for good: no box loads it any more once it has heard of this.

        Raises:
            TargetNotFoundError, ConflictError, InvalidInputError: see ``indexes.revoked``.
            KeyNotAllowedError: a key may not sign its role.
        """
        state = self._repository.state()
        index = self.index(state, team, name)
        changed = indexes.revoked(index, version, reason, replacement=replacement, drop_channels=drop_channels)
        return self._mark(state, index, changed, version, team_signer, online_signer)

    def index(self, state: State, team: str, name: str) -> Index:
        """Return a published model's index; raises ``TargetNotFoundError``."""
        index = read_index(self._repository, state, team, name)
        if index is None:
            raise TargetNotFoundError(f"the store has no model {team}/{name}; see: inferhub ls")
        return index

    def _mark(
        self, state: State, index: Index, changed: Index, version: str, team_signer: Signer, online_signer: Signer
    ) -> Marked:
        timestamp = self._replace(state, changed, team_signer, online_signer) if changed != index else 0
        entry = indexes.entry_of(changed, version)
        return Marked(
            team=index.team,
            name=index.name,
            version=version,
            status=entry.status,
            reason=entry.reason,
            channels=dict(changed.channels),
            changed=timestamp > 0,
            timestamp_version=timestamp,
        )

    def _replace(self, state: State, index: Index, team_signer: Signer, online_signer: Signer) -> int:
        edition = self._repository.edition(state)
        index = msgspec.structs.replace(index, generated=self._time())
        self._seal(edition, index, team_signer, online_signer)
        return edition.write()

    def _seal(self, edition: Edition, index: Index, team_signer: Signer, online_signer: Signer) -> None:
        data = encode(index)
        parse_index(data)
        edition.add_team_target(index.team, index_target(index.team, index.name), data)
        edition.sign_team(index.team, team_signer)
        edition.seal(online_signer)

    def _entry(self, bundle: Bundle) -> IndexEntry:
        manifest = bundle.manifest
        return IndexEntry(
            version=manifest.version,
            seq=manifest.seq,
            manifest_sha256=bundle.sha256,
            bytes=manifest.total_size,
            created=manifest.created,
            min_agent=manifest.requires.agent,
        )

    def _upload(self, bundle: Bundle, listener: Listener) -> Uploaded:
        uploaded = Uploaded()
        listener.stage("upload", sum(chunk.blob_size for chunk in distinct_chunks(bundle.manifest)), "bytes")
        for chunk in distinct_chunks(bundle.manifest):
            name, path = blob_name(chunk.blob), bundle.blob_path(chunk)
            uploaded.blobs += 1
            uploaded.bytes += chunk.blob_size
            if self._objects.size(name) != chunk.blob_size:
                check_blob(path, chunk)
                self._objects.put_file(name, path)
                uploaded.blobs_new += 1
                uploaded.bytes_new += chunk.blob_size
            listener.advance(chunk.blob_size)
        return uploaded

    def _time(self) -> str:
        return rfc3339(self._now())


def rfc3339(unix: float) -> str:
    """Return ``unix`` seconds as ``2026-11-21T08:00:00Z``."""
    return datetime.fromtimestamp(int(unix), UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def read_index(repository: Repository, state: State, team: str, name: str) -> Index | None:
    """Return a model's index as signed; ``None`` if there is none."""
    data = repository.read_target(state, team, index_target(check_name(team, "team"), check_name(name, "name")))
    return parse_index(data) if data is not None else None


def operators_document(tenant: str, keys: Sequence[Key]) -> bytes:
    """Return the target that names the keys allowed to command ``tenant``'s fleet."""
    document = Operators(
        schema=OPERATORS_SCHEMA,
        tenant=check_name(tenant, "tenant"),
        keys=tuple(
            OperatorKey(keyid=key.keyid, keytype=key.keytype, scheme=key.scheme, keyval=dict(key.keyval))
            for key in keys
        ),
    )
    data = encode(document)
    parse_operators(data)
    return data


def _naming_signature(bundle: Bundle, oms_signer: Signer | None) -> Bundle:
    """Return ``bundle`` with the signature that is made beside it named in its manifest."""
    if oms_signer is None:
        return bundle
    named = {"target": oms.target_path(bundle.manifest), "key_id": oms.key_id(oms_signer)}
    provenance = msgspec.structs.replace(bundle.manifest.provenance, oms=named)
    manifest = msgspec.structs.replace(bundle.manifest, provenance=provenance)
    return replace(bundle, manifest=manifest, manifest_bytes=encode(manifest))


def _require_growth(index: Index, bundle: Bundle) -> None:
    newest = max((entry.seq for entry in index.versions), default=0)
    if bundle.manifest.seq <= newest:
        raise ConflictError(
            f"{bundle.title}: seq {bundle.manifest.seq} does not exceed {newest}, the newest published",
            hint="Pack again; without --seq it is the time of packing.",
        )


def _report(index: Index, version: str, uploaded: Uploaded | None = None, *, timestamp: int = 0) -> Published:
    entry = indexes.entry_of(index, version)
    uploaded = uploaded or Uploaded()
    return Published(
        team=index.team,
        name=index.name,
        version=version,
        seq=entry.seq,
        manifest_sha256=entry.manifest_sha256,
        status=entry.status,
        channels=indexes.channels_of(index, version),
        changed=timestamp > 0,
        blobs=uploaded.blobs,
        blobs_new=uploaded.blobs_new,
        bytes=uploaded.bytes,
        bytes_new=uploaded.bytes_new,
        timestamp_version=timestamp,
    )
