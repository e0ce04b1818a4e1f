"""Metadata that waits for signatures, as one file that travels between the machines of its signers.

It holds every root so far, the metadata in force that decides who must sign, the next versions with the signatures
collected so far, and new target files. Whoever signs needs nothing else, no store and no network, but for a root that
this machine trusts: ``changes`` says, from the metadata itself, what a signature would put into force, and
``follows`` that what it is compared with is really in force.

Promises: a signature is taken only from a key that may give it; what is missing is named key by key; a file whose
roots do not follow one another, whose metadata in force is not signed, or that changes what ``changes`` does not
show, is refused.
Absent on purpose: how next versions are made and published (``rotation.py``).
"""

from __future__ import annotations

import base64
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from hashlib import sha256
from itertools import pairwise
from pathlib import Path
from typing import Any, Final

from securesystemslib.formats import encode_canonical
from securesystemslib.signer import Key, Signer
from tuf.api.exceptions import RepositoryError
from tuf.api.metadata import Metadata, Role, Root, Targets
from tuf.api.serialization import DeserializationError

from agent.durable import write_file
from agent.errors import InvalidInputError, UntrustedError
from tools.hub.edition import add_signature, serialise, team_of
from tools.hub.errors import StoreStateError

SCHEMA: Final = "inferhub-pending/1"
_SIZE_BYTES_MAX: Final = 64 << 20
_SHORT: Final = 12  # digits of a key id that people compare

Document = Metadata[Root] | Metadata[Targets]


@dataclass(frozen=True, slots=True, kw_only=True)
class Need:
    """Who must sign a document, by one of the roots or lists that decide about it."""

    document: str  # root, targets or a team's role
    decided_by: str
    threshold: int
    signed: tuple[str, ...]  # key ids
    unsigned: tuple[str, ...]

    @property
    def met(self) -> bool:
        """Whether there are enough signatures."""
        return len(self.signed) >= self.threshold

    def __str__(self) -> str:
        told = f"{self.document}: {len(self.signed)} of {self.threshold} signatures by the keys of {self.decided_by}"
        if self.met:
            return told
        keys = ", ".join(keyid[:_SHORT] for keyid in self.unsigned)
        return f"{told}, still needed: {self.threshold - len(self.signed)} of {keys}"


@dataclass(slots=True, kw_only=True)
class Pending:
    """Next versions that collect signatures.

    ``roots`` are all so far, the last in force; ``base`` holds the metadata in force, ``root`` always and ``targets``
    where its keys decide; ``next`` the versions to come, by role; ``files`` the targets that are new in
    ``next["targets"]``; ``request`` what was asked for.
    """

    request: dict[str, Any]
    roots: list[Metadata[Root]]
    base: dict[str, Document]
    next: dict[str, Document]
    files: dict[str, bytes] = field(default_factory=dict)

    def needs(self) -> list[Need]:
        """Return all that has to be signed, met or not."""
        return [
            _need(name, decided_by, delegator, metadata)
            for name, metadata in self.next.items()
            for decided_by, delegator in self._deciders(name)
        ]

    @property
    def complete(self) -> bool:
        """Whether every document has its signatures."""
        return all(need.met for need in self.needs())

    def sign(self, signers: Iterable[Signer]) -> list[Signer]:
        """Let each signer sign what it may, once; return those that had nothing to sign here."""
        idle = []
        for signer in signers:
            keyid, used = signer.public_key.keyid, False
            for name, metadata in self.next.items():
                if keyid in self._allowed(name):
                    used = True
                    if not self._holds(name, keyid):
                        add_signature(metadata, signer)
            if not used:
                idle.append(signer)
        return idle

    def follows(self, trusted: bytes) -> None:
        """Raise unless the roots lead from the root ``trusted`` to the one in force.

        Raises:
            UntrustedError: none of the roots is that one.
            InvalidInputError: it is no root.
        """
        try:
            root = Metadata[Root].from_bytes(trusted)
        except (DeserializationError, RepositoryError) as error:
            raise InvalidInputError(f"not a root: {error}") from error
        if not any(serialise(root) == serialise(known) for known in self.roots):
            raise UntrustedError(f"root {root.signed.version} that is trusted here is none of this store's")

    def changes(self) -> list[str]:
        """Return what would come into force, one line per fact, from the metadata itself."""
        return [line for name in self.next for line in self._changes_of(name)]

    def save(self, path: Path) -> None:
        """Write the file, atomically."""
        value = {
            "schema": SCHEMA,
            "request": self.request,
            "roots": [root.to_dict() for root in self.roots],
            "base": {name: metadata.to_dict() for name, metadata in self.base.items()},
            "next": {name: metadata.to_dict() for name, metadata in self.next.items()},
            "files": {name: base64.b64encode(data).decode() for name, data in self.files.items()},
        }
        write_file(path, json.dumps(value, indent=1, sort_keys=True).encode() + b"\n", mode=0o644)

    def _deciders(self, name: str) -> Iterator[tuple[str, Document]]:
        base, root = self.base["root"], self.next.get("root")
        if name == Root.type:
            yield f"root {base.signed.version}", base
            yield f"root {self.next[name].signed.version}", self.next[name]
        elif name == Targets.type:
            held = root or base
            yield f"root {held.signed.version}", held
        else:
            targets = self.next.get(Targets.type) or self.base[Targets.type]
            yield f"targets {targets.signed.version}", targets

    def _allowed(self, name: str) -> set[str]:
        """Return the keys whose signature is of use: those that decide, and those that did until now."""
        deciders = [delegator for _, delegator in self._deciders(name)]
        if name == Targets.type:
            deciders.append(self.base["root"])
        return {keyid for delegator in deciders for keyid in _role(delegator, name).keyids}

    def _holds(self, name: str, keyid: str) -> bool:
        return any(keyid in need.signed for need in self.needs() if need.document == name)

    def _changes_of(self, name: str) -> Iterator[str]:
        before, after = self.base.get(name), self.next[name]
        since = f" after {before.signed.version}" if before else ""
        yield f"{name} {after.signed.version}{since}, valid until {after.signed.expires:%Y-%m-%d}"
        old, new = _roles(before), _roles(after)
        for role in sorted({*old, *new}):
            yield from _role_changes(role, old.get(role), new.get(role))
        if isinstance(after.signed, Targets):
            held = before.signed.targets if before is not None and isinstance(before.signed, Targets) else {}
            changed = [path for path, file in after.signed.targets.items() if before and held.get(path) != file]
            yield from (f"  {path}: {'replaced' if path in held else 'added'}" for path in sorted(changed))
            yield from (f"  {path}: removed" for path in sorted(set(held) - set(after.signed.targets)))


def load(path: Path) -> Pending:
    """Return the pending metadata in ``path``.

    Raises:
        InvalidInputError: it cannot be read, or is no such file.
        StoreStateError: its next root does not follow the root in force.
    """
    try:
        with path.open("rb") as file:
            value = json.loads(file.read(_SIZE_BYTES_MAX))
        if value["schema"] != SCHEMA:
            raise InvalidInputError(f"{path}: schema {value['schema']!r}, expected {SCHEMA!r}")
        pending = Pending(
            request=dict(value["request"]),
            roots=[Metadata.from_dict(item) for item in value["roots"]],
            base={str(name): Metadata.from_dict(item) for name, item in value["base"].items()},
            next={str(name): Metadata.from_dict(item) for name, item in value["next"].items()},
            files={str(name): base64.b64decode(data, validate=True) for name, data in value["files"].items()},
        )
        _check(pending)
        pending.needs()
    except OSError as error:
        raise InvalidInputError(f"{path}: {error.strerror}") from error
    except (ValueError, KeyError, TypeError, AttributeError, DeserializationError, RepositoryError) as error:
        raise InvalidInputError(f"{path}: no file that collects signatures: {error}") from error
    return pending


def _check(pending: Pending) -> None:
    base = pending.base["root"]
    for documents in (pending.base, pending.next):
        for name, metadata in documents.items():
            if not isinstance(metadata.signed, Root if name == Root.type else Targets):
                raise ValueError(f"{name} is not metadata of that role")
    for before, after in pairwise((pending.roots[0], *pending.roots)):
        before.signed.verify_delegate("root", after.signed_bytes, after.signatures)
        after.signed.verify_delegate("root", after.signed_bytes, after.signatures)
        if before is not after and after.signed.version != before.signed.version + 1:
            raise ValueError("the roots are not in order")
    if serialise(pending.roots[-1]) != serialise(base):
        raise ValueError("the root in force is not the last of the roots")
    for name, metadata in pending.base.items():
        if name != Root.type:
            delegator = base if name == Targets.type else pending.base[Targets.type]
            delegator.signed.verify_delegate(name, metadata.signed_bytes, metadata.signatures)
    root = pending.next.get("root")
    if root is not None and root.signed.version != base.signed.version + 1:
        raise StoreStateError(f"root {root.signed.version} does not follow root {base.signed.version}")
    for name, metadata in pending.next.items():
        _check_shown(name, pending.base[name], metadata)
    for path, data in pending.files.items():
        targets = pending.next[Targets.type].signed
        assert isinstance(targets, Targets)
        targets.targets[path].verify_length_and_hashes(data)


def _check_shown(name: str, before: Document, after: Document) -> None:
    """Raise ``ValueError`` for a change that ``changes`` would not show: people compare key ids and role names."""
    if after.signed.version <= before.signed.version:
        raise ValueError(f"{name} {after.signed.version} does not come after {before.signed.version}")
    held, keys = _keys(before), _keys(after)
    for keyid, key in keys.items():
        if key != held.get(keyid, key) or (keyid not in held and keyid != _content_id(key)):
            raise ValueError(f"the key {keyid[:_SHORT]} is not what its id says")
    roles = _roles(before)
    for role, demand in _roles(after).items():
        if role not in roles or _scope(demand) != _scope(roles[role]):
            raise ValueError(f"{role} may sign other paths than before")
    if isinstance(after.signed, Root) and not after.signed.consistent_snapshot:
        raise ValueError("the next root gives up consistent snapshots")


def _keys(metadata: Document) -> Mapping[str, Key]:
    if isinstance(metadata.signed, Root):
        return metadata.signed.keys
    held = metadata.signed.delegations
    return held.keys if held else {}


def _content_id(key: Key) -> str:
    value = {"keytype": key.keytype, "scheme": key.scheme, "keyval": key.keyval}
    return sha256((encode_canonical(value) or "").encode()).hexdigest()


def _scope(role: Role) -> dict[str, Any]:
    return {name: value for name, value in role.to_dict().items() if name not in ("keyids", "threshold")}


def _need(name: str, decided_by: str, delegator: Document, metadata: Document) -> Need:
    result = delegator.signed.get_verification_result(name, metadata.signed_bytes, metadata.signatures)
    return Need(
        document=name,
        decided_by=decided_by,
        threshold=result.threshold,
        signed=tuple(sorted(result.signed)),
        unsigned=tuple(sorted(result.unsigned)),
    )


def _roles(metadata: Document | None) -> Mapping[str, Role]:
    if metadata is None:
        return {}
    if isinstance(metadata.signed, Root):
        return metadata.signed.roles
    held = metadata.signed.delegations
    return (held.roles if held else None) or {}


def _role(delegator: Document, name: str) -> Role:
    return _roles(delegator)[name]


def _role_changes(name: str, old: Role | None, new: Role | None) -> Iterator[str]:
    before, after = set(old.keyids if old else ()), set(new.keyids if new else ())
    facts = [f"+ {keyid[:_SHORT]}" for keyid in sorted(after - before)]
    facts += [f"- {keyid[:_SHORT]}" for keyid in sorted(before - after)]
    if old and new and old.threshold != new.threshold:
        facts.append(f"threshold {old.threshold} to {new.threshold}")
    if facts or (old is None) != (new is None):
        subject = f"team {team_of(name)}" if name not in ("root", "targets", "snapshot", "timestamp") else name
        yield f"  keys of {subject}: {', '.join(facts) or 'changed'}"
