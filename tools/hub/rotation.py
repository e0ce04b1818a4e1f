"""Change who may sign, or renew what expires: make the next versions, and publish them once they are signed.

The root names the keys of itself, of targets and of the online role, the targets role those of teams, one of its
targets those of operators. So a change makes a next root or a next targets role, and a next version of whatever it
leaves without a good signature. These wait in a ``Pending`` until enough people have signed.

Promises: a change that is in force already is none; nothing is published that a device with any older root could not
follow to its end; publishing can be cut and repeated at any write.
Absent on purpose: where key files are, and how the pending file travels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import Any, Final

import msgspec
from securesystemslib.signer import Key, Signer
from tuf.api.metadata import Metadata, Root, TargetFile, Targets

from agent.bundles.manifest import OPERATORS_TARGET, OperatorKey, Operators, encode, parse_operators
from agent.errors import InvalidInputError, NotFoundError, TargetNotFoundError
from tools.hub.edition import (
    ROOT_DAYS,
    TARGETS_DAYS,
    TEAM_DAYS,
    Now,
    Signed,
    State,
    accepts,
    expiry,
    free_version,
    metadata_object,
    team_of,
    team_role,
)
from tools.hub.errors import ConflictError, KeyNotAllowedError, StoreStateError
from tools.hub.objects import Objects
from tools.hub.pending import Document, Pending
from tools.hub.repository import Repository

TEAM_PREFIX: Final = "team:"
ROLES: Final[Mapping[str, tuple[str, ...]]] = {
    "root": ("root",),
    "targets": ("targets",),
    "online": ("snapshot", "timestamp"),
}  # what a person calls the roles that the root names -> their names in the metadata
_OPERATOR: Final = "operator"


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """What somebody wants: other keys for ``role``, or with ``renew`` its metadata signed again.

    ``role`` is ``root``, ``targets``, ``online``, ``operator`` or ``team:NAME``; ``remove`` holds key ids.
    """

    role: str
    add: tuple[Key, ...] = ()
    remove: tuple[str, ...] = ()
    threshold: int = 0  # 0: as it is
    renew: bool = False

    def as_dict(self) -> dict[str, Any]:
        """Return the change as it is kept in a pending file, to tell whether a repeated command means the same."""
        return {
            "role": self.role,
            "add": sorted(key.keyid for key in self.add),
            "remove": sorted(self.remove),
            "threshold": self.threshold,
            "renew": self.renew,
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Rotated:
    """What was published. ``changed`` is false if all of it was there already."""

    versions: dict[str, int]  # role to version
    changed: bool
    timestamp_version: int


def keys_of(repository: Repository, state: State, role: str) -> list[Key]:
    """Return the keys that may act as ``role`` now.

    Raises:
        InvalidInputError, TargetNotFoundError: there is no such role or team.
    """
    if role == _OPERATOR:
        return [_operator_key(key) for key in _operators(repository, state).keys]
    delegator, name = _home(state, role)
    held = delegator.signed.get_delegated_role(name)
    return [delegator.signed.get_key(keyid) for keyid in held.keyids]


def require_possible(role: str, *, threshold: int = 0, renew: bool = False) -> None:
    """Refuse what could be done to no store's ``role``.

    Raises:
        InvalidInputError: there is no such role, it has no threshold, or nothing in it can be renewed.
    """
    if role not in (*ROLES, _OPERATOR) and not role.startswith(TEAM_PREFIX):
        raise InvalidInputError(f"--role {role}: one of {', '.join(ROLES)}, {_OPERATOR} and {TEAM_PREFIX}NAME")
    if threshold and role != "root":
        raise InvalidInputError("--threshold: only the root has one")
    if renew and role in ("online", _OPERATOR):
        raise InvalidInputError("what can be renewed is root, targets and team:NAME, with the keys they have")


def begin(objects: Objects, repository: Repository, state: State, change: Change, now: Now) -> Pending | None:
    """Return the next versions for ``change``, unsigned, or ``None`` if it is in force already.

    Raises:
        InvalidInputError, TargetNotFoundError: there is no such role or team, or nothing to renew in it.
        ConflictError: a key to remove is none of the role's.
        KeyNotAllowedError: too few keys would be left.
    """
    present = [key.keyid for key in keys_of(repository, state, change.role)]
    wanted = _wanted_keys(present, change)
    if not change.renew and wanted == set(present) and change.threshold in (0, _threshold(state, change.role)):
        return None
    missing = sorted(set(change.remove) - set(present))
    if missing:
        raise ConflictError(f"{change.role}: {missing[0][:12]} is none of its keys", hint="See: inferhub show-keys")
    needed = change.threshold or _threshold(state, change.role)
    if len(wanted) < needed:
        raise KeyNotAllowedError(f"{change.role}: {needed} signatures needed and {len(wanted)} keys left to give them")

    draft = _Draft(objects, state, change, now)
    if change.role == _OPERATOR:
        document = _operators(repository, state)
        kept = tuple(key for key in document.keys if key.keyid not in change.remove)
        new = tuple(_operator_entry(key) for key in change.add if key.keyid not in present)
        draft.replace_operators(encode(msgspec.structs.replace(document, keys=kept + new)))
    elif change.role.startswith(TEAM_PREFIX):
        draft.rotate_team(change.role.removeprefix(TEAM_PREFIX))
    else:
        draft.rotate_in_root(ROLES[change.role])
    return Pending(
        request=change.as_dict(), roots=repository.roots(), base=draft.base, next=draft.next, files=draft.files
    )


def publish(pending: Pending, objects: Objects, repository: Repository, signers: Sequence[Signer], now: Now) -> Rotated:
    """Publish what has been signed; ``signers`` sign snapshot and timestamp where those change.

    With the old and the new key among ``signers`` the switch is one write for readers. With the new key alone they
    cannot refresh between two writes, and go on with what they have.

    Raises:
        KeyNotAllowedError: signatures are missing, or the online key is; nothing was written.
        StoreStateError: the store has moved on since the change was begun, or is another store.
    """
    short = [need for need in pending.needs() if not need.met]
    if short:
        raise KeyNotAllowedError("; ".join(map(str, short)))
    next_root = _root(pending.next.get(Root.type))
    root = _as_stored(objects, Root.type, next_root) if next_root else None
    state = _state(pending, repository, root)
    edition = repository.edition(state)
    staged = False
    rest = {role: metadata for role, metadata in pending.next.items() if role != Root.type}
    if root is not None:
        edition.take_root(root)
    for role in sorted(rest, key=lambda name: name != Targets.type):  # the targets role decides about the teams
        metadata = _as_stored(objects, role, _targets(rest[role]))
        published = state.targets if role == Targets.type else state.teams.get(team_of(role))
        if _same(published, metadata):
            continue
        _require_base(pending, role, published)
        staged = True
        if role == Targets.type:
            edition.take_top(metadata, pending.files)
        else:
            edition.take_team(team_of(role), metadata)
    in_force = root or state.root
    known = accepts(in_force, "snapshot", state.snapshot) and accepts(in_force, "timestamp", state.timestamp)
    sealed = staged or not known
    if sealed:
        edition.seal(*signers)
    changed = sealed or (root is not None and not _same(repository.newest_root(), root))
    return Rotated(
        versions={role: metadata.signed.version for role, metadata in pending.next.items()},
        changed=changed,
        timestamp_version=edition.write() if changed else state.timestamp.signed.version,
    )


class _Draft:
    """The next versions in the making."""

    def __init__(self, objects: Objects, state: State, change: Change, now: Now) -> None:
        self._objects = objects
        self._state = state
        self._change = change
        self._now = now
        self.base: dict[str, Document] = {"root": state.root}
        self.next: dict[str, Document] = {}
        self.files: dict[str, bytes] = {}

    def rotate_in_root(self, roles: Sequence[str]) -> None:
        if self._change.renew and roles != ("root",):
            self._next_targets()
            return
        root = deepcopy(self._state.root)
        for role in roles:
            self._exchange(root.signed, role)
            root.signed.roles[role].threshold = self._change.threshold or root.signed.roles[role].threshold
        root.signed.version += 1
        root.signed.expires = expiry(self._now(), ROOT_DAYS)
        root.signatures.clear()
        self.next["root"] = root
        if not accepts(root, Targets.type, self._state.targets):
            self._next_targets()

    def rotate_team(self, team: str) -> None:
        role = team_role(team)
        published = self._state.teams.get(team)
        if self._change.renew:
            self.base[Targets.type] = self._state.targets
            self._next_team(role, published)
            return
        targets = self._next_targets()
        self._exchange(targets.signed, role)
        if published is not None and not accepts(targets, role, published):
            self._next_team(role, published)

    def replace_operators(self, document: bytes) -> None:
        parse_operators(document)
        targets = self._next_targets()
        targets.signed.targets[OPERATORS_TARGET] = TargetFile.from_data(OPERATORS_TARGET, document, ["sha256"])
        self.files[OPERATORS_TARGET] = document

    def _next_targets(self) -> Metadata[Targets]:
        return self._add(Targets.type, self._state.targets, TARGETS_DAYS)

    def _next_team(self, role: str, published: Metadata[Targets] | None) -> None:
        if published is None:
            raise InvalidInputError(f"{role} has published nothing that could expire")
        self._add(role, published, TEAM_DAYS)

    def _add(self, role: str, published: Metadata[Targets], days: int) -> Metadata[Targets]:
        metadata = deepcopy(published)
        metadata.signed.version = free_version(self._objects, role, metadata.signed.version + 1)
        metadata.signed.expires = expiry(self._now(), days)
        metadata.signatures.clear()
        self.base[role] = published
        self.next[role] = metadata
        return metadata

    def _exchange(self, delegator: Root | Targets, role: str) -> None:
        held = delegator.get_delegated_role(role).keyids
        for key in self._change.add:
            delegator.add_key(key, role)
        for keyid in self._change.remove:
            if keyid in held:
                delegator.revoke_key(keyid, role)


def _home(state: State, role: str) -> tuple[Metadata[Root] | Metadata[Targets], str]:
    if role in ROLES:
        return state.root, ROLES[role][-1]
    require_possible(role)
    team = role.removeprefix(TEAM_PREFIX)
    if team not in state.team_names():
        raise TargetNotFoundError(f"the store has no team {team}; it has: {', '.join(state.team_names()) or 'none'}")
    return state.targets, team_role(team)


def _threshold(state: State, role: str) -> int:
    if role == _OPERATOR:
        return 0
    delegator, name = _home(state, role)
    return delegator.signed.get_delegated_role(name).threshold


def _wanted_keys(present: Sequence[str], change: Change) -> set[str]:
    require_possible(change.role, threshold=change.threshold, renew=change.renew)
    if change.renew and (change.add or change.remove):
        raise InvalidInputError("a renewal keeps the keys: add and remove some in a change of its own")
    added = {key.keyid for key in change.add}
    both = added & set(change.remove)
    if both:
        raise InvalidInputError(f"{min(both)[:12]} is to be added and removed")
    return (set(present) | added) - set(change.remove)


def _operators(repository: Repository, state: State) -> Operators:
    data = repository.read_top_target(state, OPERATORS_TARGET)
    if data is None:
        raise TargetNotFoundError(f"the store has no {OPERATORS_TARGET}")
    return parse_operators(data)


def _operator_entry(key: Key) -> OperatorKey:
    return OperatorKey(keyid=key.keyid, keytype=key.keytype, scheme=key.scheme, keyval=dict(key.keyval))


def _operator_key(entry: OperatorKey) -> Key:
    return Key.from_dict(entry.keyid, {"keytype": entry.keytype, "scheme": entry.scheme, "keyval": dict(entry.keyval)})


def _root(metadata: Document | None) -> Metadata[Root] | None:
    assert metadata is None or isinstance(metadata.signed, Root)  # ``pending.load`` and ``begin`` see to it
    return metadata


def _targets(metadata: Document) -> Metadata[Targets]:
    assert isinstance(metadata.signed, Targets)
    return metadata


def _state(pending: Pending, repository: Repository, root: Metadata[Root] | None) -> State:
    base = _root(pending.base[Root.type])
    newest = repository.newest_root()
    if base is not None and _same(newest, base):
        return repository.state()
    if root is None or not _same(newest, root):
        raise StoreStateError(
            f"the store's root is version {newest.signed.version}, and this change was made for another",
            hint="Begin the change again: give another --pending file.",
        )
    try:
        return repository.state()
    except StoreStateError:
        return repository.state(root=base)  # cut between the root and the timestamp


def _require_base(pending: Pending, role: str, published: Metadata[Targets] | None) -> None:
    base = pending.base.get(role)
    if published is None or base is None or not _same(published, base):
        raise StoreStateError(
            f"{role} was published anew since this change was begun",
            hint="Begin the change again: give another --pending file.",
        )


def _same(one: Metadata[Any] | None, other: Metadata[Any]) -> bool:
    return one is not None and one.signed_bytes == other.signed_bytes


def _as_stored(objects: Objects, role: str, metadata: Metadata[Signed]) -> Metadata[Signed]:
    """Return what a cut attempt stored of ``metadata``, since more may have signed it meanwhile; else itself."""
    try:
        stored = Metadata[Signed].from_bytes(objects.read(metadata_object(role, metadata.signed.version)))
    except NotFoundError:
        return metadata
    return stored if _same(stored, metadata) else metadata
