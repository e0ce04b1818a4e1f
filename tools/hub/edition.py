"""One state of the TUF repository, and the next one, staged in memory until it is written.

``Edition.write`` stores what was staged in the one order that keeps every reader right at every moment::

    targets, team roles, the targets role, snapshot, and last of all timestamp.json

A new root is in force as soon as it is there, whatever the timestamp says. So it comes last if all before it is signed
for the old root as well as for the new one; else just before the timestamp, and between the two readers wait.

Promises: nothing but timestamp.json is ever replaced; a cut before the timestamp leaves the old state in force, and
doing the same again succeeds (a number taken by a file of the cut attempt is skipped); each signature is checked
against its delegator before anything is written; ``timestamp.version`` is Unix seconds and only grows.
Absent on purpose: what goes into a root (``rotation.py``), and blobs, which are no TUF targets.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from copy import deepcopy
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from itertools import pairwise
from typing import Any, Final, TypeVar

from securesystemslib.signer import Key, Signer
from tuf.api.exceptions import UnsignedMetadataError
from tuf.api.metadata import (
    DelegatedRole,
    Delegations,
    Metadata,
    MetaFile,
    Root,
    Snapshot,
    TargetFile,
    Targets,
    Timestamp,
)
from tuf.api.serialization.json import JSONSerializer

from tools.hub.errors import ConflictError, KeyNotAllowedError, SigningKeyError, StoreStateError
from tools.hub.objects import Objects

Now = Callable[[], float]  # Unix seconds
Signed = TypeVar("Signed", Root, Targets, Snapshot, Timestamp)

# Days until each role has to be signed again.
ROOT_DAYS: Final = 365
TARGETS_DAYS: Final = 365
TEAM_DAYS: Final = 180
SNAPSHOT_DAYS: Final = 90
TIMESTAMP_DAYS: Final = 7
SNAPSHOT_RENEW_DAYS: Final = 30  # with so much left the snapshot is signed again, by the key that signs timestamps
ALERT_DAYS: Final = 30  # roles that need an offline key are named this long before they expire
ROOT_ALERT_DAYS: Final = 90  # a ceremony takes several people
TIMESTAMP_ALERT_S: Final = 48 * 3600  # it is signed every day

TIMESTAMP: Final = "metadata/timestamp.json"
STORE_FILE: Final = "store.json"  # tells whoever looks what is here; never trusted
_CLOCK_TOLERANCE_S: Final = 3600
_ROLE_PREFIX: Final = "team-"


def team_role(team: str) -> str:
    """Return the name of the role that signs for ``team``."""
    return _ROLE_PREFIX + team


def team_of(role: str) -> str:
    """Return the team that ``team_role`` made ``role`` from."""
    return role.removeprefix(_ROLE_PREFIX)


def target_object(path: str, data_sha256: str) -> str:
    """Return where the target ``path`` is stored: its file name carries its hash (consistent snapshots)."""
    folder, _, name = path.rpartition("/")
    return f"targets/{folder}/{data_sha256}.{name}" if folder else f"targets/{data_sha256}.{name}"


def expiring(dates: Mapping[str, datetime], now: float) -> dict[str, datetime]:
    """Return those of ``dates`` (role to expiry) that are to be renewed at ``now``: root early, the others later."""
    return {
        role: date
        for role, date in dates.items()
        if date < expiry(now, ROOT_ALERT_DAYS if role == Root.type else ALERT_DAYS)
    }


def store_document(**more: Any) -> bytes:
    """Return what ``STORE_FILE`` says, with ``more`` beside the layout."""
    layout = {"format": "inferd-store/1", "metadata": "metadata", "targets": "targets", "blobs": "blobs"}
    return json.dumps(layout | more, indent=1).encode() + b"\n"


@dataclass(frozen=True, slots=True, kw_only=True)
class State:
    """One published state. ``teams`` holds the roles that have been published, by team."""

    root: Metadata[Root]
    targets: Metadata[Targets]
    snapshot: Metadata[Snapshot]
    timestamp: Metadata[Timestamp]
    teams: Mapping[str, Metadata[Targets]]

    def team_names(self) -> list[str]:
        """Return every team that holds a delegation, published or not."""
        held = self.targets.signed.delegations
        return sorted(team_of(name) for name in (held.roles if held else None) or {})


@dataclass(slots=True)
class Edition:
    """The next state of a repository. Use once: add, sign what was added to, seal, write."""

    _objects: Objects
    _now: Now
    _state: State
    _root: Metadata[Root] | None = None
    _target_objects: dict[str, bytes] = field(default_factory=dict)
    _team_roles: dict[str, Metadata[Targets]] = field(default_factory=dict)
    _top: Metadata[Targets] | None = None
    _snapshot: Metadata[Snapshot] | None = None
    _timestamp: Metadata[Timestamp] | None = None

    def add_team_target(self, team: str, path: str, data: bytes) -> None:
        """Stage ``data`` as the target ``path`` of ``team``.

        Raises:
            KeyNotAllowedError: the team has no delegation, or it does not cover ``path``.
        """
        delegation = _delegation(self._top or self._state.targets, team)
        if not delegation.is_delegated_path(path):
            raise KeyNotAllowedError(f"team {team} may not sign {path}")
        self._stage(self._editable_team(team), path, data)

    def add_top_target(self, path: str, data: bytes) -> None:
        """Stage ``data`` as a target of the top-level role."""
        self._stage(self._editable_top(), path, data)

    def add_team(self, team: str, key: Key) -> None:
        """Delegate ``models/<team>/*/*`` to ``key``.

        Raises:
            ConflictError: the team has a delegation already.
        """
        top = self._editable_top().signed
        held, fresh = top.delegations or delegations({}), delegations({team: key})
        roles = held.roles or {}
        if team_role(team) in roles:
            raise ConflictError(f"team {team} exists already")
        top.delegations = Delegations(held.keys | fresh.keys, roles | (fresh.roles or {}))

    def take_root(self, root: Metadata[Root]) -> None:
        """Stage the next root, signed; from here on everything is checked against it."""
        self._root = root

    def take_top(self, targets: Metadata[Targets], files: Mapping[str, bytes]) -> None:
        """Stage a signed next version of the top-level role, with the targets that are new in it.

        Raises:
            KeyNotAllowedError: the root does not accept its signatures.
        """
        require_signed(self._root or self._state.root, Targets.type, targets)
        self._top = targets
        for path, data in files.items():
            self._target_objects[target_object(path, targets.signed.targets[path].hashes["sha256"])] = data

    def take_team(self, team: str, metadata: Metadata[Targets]) -> None:
        """Stage a signed next version of a team's role; raises as ``take_top``."""
        require_signed(self._top or self._state.targets, team_role(team), metadata)
        self._team_roles[team] = metadata

    def retire_team(self, team: str, signer: Signer) -> None:
        """Empty a team's role and give it to ``signer``, so that the team's own keys are worth nothing any more.

        The role itself stays for ever: devices refuse a store in which one has vanished.

        Raises:
            KeyNotAllowedError: the store has no such team.
        """
        top, role = self._editable_top().signed, team_role(team)
        for keyid in list(_delegation(self._editable_top(), team).keyids):
            top.revoke_key(keyid, role)
        top.add_key(signer.public_key, role)
        self._editable_team(team).signed.targets.clear()
        self.sign_team(team, signer)

    def sign_team(self, team: str, signer: Signer) -> None:
        """Sign the team's role as a new version.

        Raises:
            KeyNotAllowedError: the team has no delegation, or ``signer`` is not its key.
        """
        delegator, role = self._top or self._state.targets, team_role(team)
        _delegation(delegator, team)
        metadata = self._editable_team(team)
        self._renew(metadata, role, TEAM_DAYS, signer)
        require_signed(delegator, role, metadata)

    def sign_top(self, signer: Signer) -> None:
        """Sign the top-level targets role as a new version; raises ``KeyNotAllowedError`` for another key."""
        top = self._editable_top()
        self._renew(top, "targets", TARGETS_DAYS, signer)
        require_signed(self._in_force, "targets", top)

    def seal(self, *signers: Signer, covers_days: int = SNAPSHOT_RENEW_DAYS, later_s: int = 0) -> None:
        """Sign the timestamp, and before it the snapshot if a role changed or it expires within ``covers_days``.

        ``later_s`` dates the timestamp so many seconds later, which leaves versions before it for ``aside``.

        Raises:
            KeyNotAllowedError: none of ``signers`` is the online key.
            StoreStateError: the store's timestamp is far ahead of this machine's clock.
        """
        changed = {team_role(team): metadata for team, metadata in self._team_roles.items()}
        if self._top is not None:
            changed["targets"] = self._top
        timestamp = deepcopy(self._state.timestamp)
        stale = self._state.snapshot.signed.expires < expiry(self._now(), covers_days)
        if changed or stale or not accepts(self._in_force, "snapshot", self._state.snapshot):
            self._snapshot = deepcopy(self._state.snapshot)
            for role, metadata in changed.items():
                self._snapshot.signed.meta[f"{role}.json"] = _meta(metadata)
            self._renew(self._snapshot, "snapshot", SNAPSHOT_DAYS, *signers)
            require_signed(self._in_force, "snapshot", self._snapshot)
            timestamp.signed.snapshot_meta = _meta(self._snapshot)
        timestamp.signed.version = self._timestamp_version(timestamp.signed.version) + later_s
        timestamp.signed.expires = expiry(self._now(), TIMESTAMP_DAYS)
        sign(timestamp, signers)
        require_signed(self._in_force, "timestamp", timestamp)
        self._timestamp = timestamp

    def aside(self, signer: Signer, *, valid_days: int) -> Metadata[Timestamp]:
        """Return a timestamp for a copy of the sealed state: one second older than its own, valid for other days.

        A box that has seen the copy takes the store's own timestamp as newer, never the other way round.
        """
        if self._timestamp is None:
            raise AssertionError("an edition is sealed before it is copied")
        timestamp = deepcopy(self._timestamp)
        timestamp.signed.version -= 1
        timestamp.signed.expires = expiry(self._now(), valid_days)
        sign(timestamp, [signer])
        return timestamp

    def write(self) -> int:
        """Store everything, the timestamp last; return its version.

        Raises:
            ConflictError: an object of that name exists with other content.
            KeyNotAllowedError: a device could not get from an older root to the staged one, or not on from there.
        """
        self._require_walk()
        if self._timestamp is None:
            if self._root is None:
                raise AssertionError("an edition is sealed before it is written")
            self._put_root()
            return self._state.timestamp.signed.version
        for name, data in self._target_objects.items():
            self._objects.put(name, data)
        for team, metadata in self._team_roles.items():
            self._put(team_role(team), metadata)
        if self._top is not None:
            self._put("targets", self._top)
        if self._snapshot is not None:
            self._put("snapshot", self._snapshot)
        root_last = self._is_good_for(self._state.root)
        if not root_last:
            self._put_root()
        self._objects.replace(TIMESTAMP, serialise(self._timestamp))
        if root_last:
            self._put_root()
        return self._timestamp.signed.version

    @property
    def _in_force(self) -> Metadata[Root]:
        return self._root or self._state.root

    def _is_good_for(self, root: Metadata[Root]) -> bool:
        staged = {"targets": self._top, "snapshot": self._snapshot, "timestamp": self._timestamp}
        return all(accepts(root, role, metadata) for role, metadata in staged.items() if metadata is not None)

    def _require_walk(self) -> None:
        """Raise unless a device with any published root gets to the staged one, and from it to all metadata."""
        if self._root is None:
            return
        newest = self._root.signed.version
        chain = [
            Metadata[Root].from_bytes(self._objects.read(metadata_object("root", version)))
            for version in range(1, newest)
        ]
        for before, after in pairwise((*chain, self._root)):
            require_signed(before, "root", after)
            require_signed(after, "root", after)
        require_signed(self._root, "targets", self._top or self._state.targets)
        require_signed(self._root, "snapshot", self._snapshot or self._state.snapshot)
        require_signed(self._root, "timestamp", self._timestamp or self._state.timestamp)

    def _put_root(self) -> None:
        if self._root is not None:
            self._objects.put(metadata_object("root", self._root.signed.version), serialise(self._root))

    def _editable_top(self) -> Metadata[Targets]:
        if self._top is None:
            self._top = deepcopy(self._state.targets)
        return self._top

    def _editable_team(self, team: str) -> Metadata[Targets]:
        if team not in self._team_roles:
            published = self._state.teams.get(team)
            self._team_roles[team] = deepcopy(published) if published else unsigned(Targets())
        return self._team_roles[team]

    def _stage(self, role: Metadata[Targets], path: str, data: bytes) -> None:
        file = TargetFile.from_data(path, data, ["sha256"])
        role.signed.targets[path] = file
        self._target_objects[target_object(path, file.hashes["sha256"])] = data

    def _renew(self, metadata: Metadata[Targets] | Metadata[Snapshot], role: str, days: int, *signers: Signer) -> None:
        metadata.signed.version = free_version(self._objects, role, metadata.signed.version + 1)
        metadata.signed.expires = expiry(self._now(), days)
        sign(metadata, signers)

    def _timestamp_version(self, previous: int) -> int:
        now = int(self._now())
        if previous > now + _CLOCK_TOLERANCE_S:
            if not accepts(self._in_force, "timestamp", self._state.timestamp):
                return now  # devices drop what a key signed that the new root does not name
            raise StoreStateError(
                f"the store was signed {previous - now} s in the future of this machine's clock",
                hint="Set this machine's clock; if the store is wrong, rotate the online key.",
            )
        return max(now, previous + 1)

    def _put(self, role: str, metadata: Metadata[Targets] | Metadata[Snapshot]) -> None:
        self._objects.put(metadata_object(role, metadata.signed.version), serialise(metadata))


def free_version(objects: Objects, role: str, version: int) -> int:
    """Return the first version from ``version`` on that no file has: a cut attempt's were never in force."""
    while objects.size(metadata_object(role, version)) is not None:
        version += 1
    return version


def unsigned(signed: Signed) -> Metadata[Signed]:
    """Return metadata that was never published; its first signature makes it version 1."""
    signed.version = 0  # not valid in a file
    return Metadata(signed)


def metadata_object(role: str, version: int) -> str:
    """Return where a version of a role is stored (the timestamp has a place of its own)."""
    return f"metadata/{version}.{role}.json"


def root_versions(objects: Objects) -> range:
    """Return the versions of the root that the store holds, the first to the newest."""
    version = 1
    while objects.size(metadata_object("root", version + 1)) is not None:
        version += 1
    return range(1, version + 1)


def delegations(teams: Mapping[str, Key]) -> Delegations:
    """Return one terminating role per team, each for ``models/<team>/*/*``."""
    roles = {
        team_role(team): DelegatedRole(
            team_role(team), [key.keyid], threshold=1, terminating=True, paths=[f"models/{team}/*/*"]
        )
        for team, key in teams.items()
    }
    return Delegations(keys={key.keyid: key for key in teams.values()}, roles=roles)


def _delegation(targets: Metadata[Targets], team: str) -> DelegatedRole:
    held = targets.signed.delegations
    role = ((held.roles if held else None) or {}).get(team_role(team))
    if role is None:
        raise KeyNotAllowedError(
            f"the store has no team {team}",
            hint=f"The holder of the targets key adds it with: inferhub add-team {team} KEY.pub ...",
        )
    return role


def expiry(now: float, days: int) -> datetime:
    """Return the time ``days`` after ``now`` (Unix seconds)."""
    return datetime.fromtimestamp(int(now), UTC) + timedelta(days=days)


def _meta(metadata: Metadata[Targets] | Metadata[Snapshot]) -> MetaFile:
    return MetaFile.from_data(metadata.signed.version, serialise(metadata), ["sha256"])


def serialise(metadata: Metadata[Any]) -> bytes:
    """Return the bytes that are stored and hashed."""
    return metadata.to_bytes(JSONSerializer(compact=True))


def sign(metadata: Metadata[Any], signers: Iterable[Signer]) -> None:
    """Replace all signatures."""
    metadata.signatures.clear()
    for signer in signers:
        add_signature(metadata, signer)


def add_signature(metadata: Metadata[Any], signer: Signer) -> None:
    """Add one signature; ``SigningKeyError`` if the key cannot sign, as one in a service may."""
    try:
        metadata.sign(signer, append=True)
    except UnsignedMetadataError as error:
        if isinstance(error.__cause__, SigningKeyError):
            raise error.__cause__ from error
        raise SigningKeyError(f"key {signer.public_key.keyid[:12]}: {error}") from error


def accepts(delegator: Metadata[Root] | Metadata[Targets], role: str, metadata: Metadata[Any]) -> bool:
    """Tell whether ``metadata`` is signed as ``delegator`` demands of ``role``."""
    result = delegator.signed.get_verification_result(role, metadata.signed_bytes, metadata.signatures)
    return bool(result)


def require_signed(delegator: Metadata[Root] | Metadata[Targets], role: str, metadata: Metadata[Any]) -> None:
    """Raise ``KeyNotAllowedError`` unless ``metadata`` is signed as ``delegator`` demands of ``role``."""
    try:
        delegator.signed.verify_delegate(role, metadata.signed_bytes, metadata.signatures)
    except UnsignedMetadataError as error:
        given = ", ".join(keyid[:12] for keyid in metadata.signatures) or "no key"
        raise KeyNotAllowedError(
            f"{role}: {given} does not fulfil what this role demands: {error}",
            hint="Give the private key file whose public half the store names for this role.",
        ) from error
