"""The TUF repository of a store as static files: reading what is published, and making a new store.

A ``Repository`` reads the state that ``metadata/timestamp.json`` names; changes are ``edition.py``'s.
Promises: what it returns was signed, from the newest root down; a cut ``initialise`` can be repeated.
Absent on purpose: what manifests and indexes say (``publish.py``), and the next root (``rotation.py``).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from hashlib import sha256

from securesystemslib.signer import Key, Signer
from tuf.api.exceptions import RepositoryError
from tuf.api.metadata import Metadata, Root, Snapshot, TargetFile, Targets, Timestamp
from tuf.api.serialization import DeserializationError

from agent.errors import NotFoundError
from tools.hub.edition import (
    ROOT_DAYS,
    STORE_FILE,
    TIMESTAMP,
    Edition,
    Now,
    Signed,
    State,
    delegations,
    expiry,
    metadata_object,
    require_signed,
    root_versions,
    serialise,
    sign,
    store_document,
    target_object,
    team_of,
    unsigned,
)
from tools.hub.errors import StoreStateError
from tools.hub.objects import Objects


class Repository:
    """The published side of a store."""

    def __init__(self, objects: Objects, now: Now) -> None:
        self._objects = objects
        self._now = now

    def state(self, *, root: Metadata[Root] | None = None) -> State:
        """Return what readers see now, signatures checked from the newest root down.

        Args:
            root: In place of the newest, for a rotation that was cut between its root and its timestamp.

        Raises:
            StoreStateError: there is no complete repository here, or it is damaged.
        """
        try:
            root = root or self.newest_root()
            timestamp = self._checked(root, "timestamp", TIMESTAMP, Timestamp)
            snapshot_version = timestamp.signed.snapshot_meta.version
            snapshot = self._checked(root, "snapshot", metadata_object("snapshot", snapshot_version), Snapshot)
            versions = {file.removesuffix(".json"): entry.version for file, entry in snapshot.signed.meta.items()}
            targets = self._checked(root, "targets", metadata_object("targets", versions.pop("targets")), Targets)
            teams = {
                team_of(role): self._checked(targets, role, metadata_object(role, version), Targets)
                for role, version in versions.items()
            }
        except (NotFoundError, KeyError) as error:
            raise StoreStateError(
                f"no complete store here: {error}", hint="Make one with: inferhub init DIR ..., or repeat a cut init."
            ) from error
        except (DeserializationError, RepositoryError, ValueError) as error:
            raise StoreStateError(
                f"the store's metadata is damaged: {error}",
                hint="Repeat a cut rotate-keys with its --pending file, or restore the store from a mirror.",
            ) from error
        return State(root=root, targets=targets, snapshot=snapshot, timestamp=timestamp, teams=teams)

    def read_target(self, state: State, team: str, path: str) -> bytes | None:
        """Return the bytes of a team's target, hash checked; ``None`` if the team has no such target.

        Raises:
            StoreStateError: the stored bytes are missing or differ from the signed hash.
        """
        role = state.teams.get(team)
        return self._read(path, role.signed.targets.get(path) if role else None)

    def read_top_target(self, state: State, path: str) -> bytes | None:
        """Return the bytes of a target of the top-level role; as ``read_target``."""
        return self._read(path, state.targets.signed.targets.get(path))

    def edition(self, state: State) -> Edition:
        """Return an empty next state on top of ``state``."""
        return Edition(self._objects, self._now, state)

    def initialise(
        self,
        *,
        root_keys: Sequence[Key],
        root_signers: Sequence[Signer],
        threshold: int,
        targets_signer: Signer,
        online_signer: Signer,
        teams: Mapping[str, Key],
        top_targets: Mapping[str, bytes],
    ) -> bytes:
        """Create the repository; return its first root, the anchor that devices are built with.

        A cut attempt may be repeated with the same root keys.

        Raises:
            KeyNotAllowedError: fewer root signers than the threshold.
            StoreStateError: a repository is here already, or a cut attempt with other root keys.
        """
        if self._objects.size(TIMESTAMP) is not None:
            raise StoreStateError("a store is here already", hint="Use publish, add-team or refresh-timestamp.")
        root = self._first_root(root_keys, root_signers, threshold, targets_signer, online_signer)
        nothing = State(
            root=root,
            targets=unsigned(Targets(delegations=delegations(teams))),
            snapshot=unsigned(Snapshot()),
            timestamp=unsigned(Timestamp()),
            teams={},
        )
        edition = self.edition(nothing)
        for path, data in top_targets.items():
            edition.add_top_target(path, data)
        edition.sign_top(targets_signer)
        edition.seal(online_signer)
        data = serialise(root)
        self._objects.put(metadata_object("root", 1), data)
        self._objects.put(STORE_FILE, store_document())
        edition.write()
        return data

    def _read(self, path: str, file: TargetFile | None) -> bytes | None:
        if file is None:
            return None
        name = target_object(path, file.hashes["sha256"])
        try:
            data = self._objects.read(name)
        except NotFoundError as error:
            raise StoreStateError(f"{name} is named by signed metadata and missing") from error
        if len(data) != file.length or sha256(data).hexdigest() != file.hashes["sha256"]:
            raise StoreStateError(f"{name}: stored bytes differ from the signed hash", hint="Restore it from a mirror.")
        return data

    def _first_root(
        self,
        root_keys: Sequence[Key],
        root_signers: Sequence[Signer],
        threshold: int,
        targets_signer: Signer,
        online_signer: Signer,
    ) -> Metadata[Root]:
        root = Root(version=1, expires=expiry(self._now(), ROOT_DAYS), consistent_snapshot=True)
        for key in root_keys:
            root.add_key(key, "root")
        root.roles["root"].threshold = threshold
        root.add_key(targets_signer.public_key, "targets")
        for role in ("snapshot", "timestamp"):
            root.add_key(online_signer.public_key, role)
        metadata = Metadata(root)
        sign(metadata, root_signers)
        require_signed(metadata, "root", metadata)
        try:
            earlier = Metadata[Root].from_bytes(self._objects.read(metadata_object("root", 1)))
        except NotFoundError:
            return metadata
        if earlier.signed.roles != root.roles:
            raise StoreStateError(
                "a cut attempt left a root with other keys here", hint="Use the same keys, or an empty folder."
            )
        return earlier

    def roots(self) -> list[Metadata[Root]]:
        """Return every root, the first one first; raises what tuf raises."""
        return [
            Metadata[Root].from_bytes(self._objects.read(metadata_object("root", version)))
            for version in root_versions(self._objects)
        ]

    def newest_root(self) -> Metadata[Root]:
        """Return the root in force, checked against itself; raises what tuf raises."""
        newest = root_versions(self._objects)[-1]
        root = Metadata[Root].from_bytes(self._objects.read(metadata_object("root", newest)))
        root.signed.verify_delegate("root", root.signed_bytes, root.signatures)
        return root

    def _checked(
        self, delegator: Metadata[Root] | Metadata[Targets], role: str, name: str, kind: type[Signed]
    ) -> Metadata[Signed]:
        metadata: Metadata[Signed] = Metadata.from_bytes(self._objects.read(name))
        if not isinstance(metadata.signed, kind):
            raise RepositoryError(f"{name} is not a {kind.type}")
        delegator.signed.verify_delegate(role, metadata.signed_bytes, metadata.signatures)
        return metadata
