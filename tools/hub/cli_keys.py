"""The verbs about who may sign, and for how long: show-keys, rotate-keys, renew, retire-team."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

import click
from securesystemslib.signer import Signer

from agent.errors import InvalidInputError
from tools.hub.cli import (
    STORE_HELP,
    Passwords,
    emit,
    json_option,
    key_option,
    open_repository,
    password_option,
    s3_options,
    store_option,
    usage,
)
from tools.hub.edition import State, expiring, team_role
from tools.hub.errors import KeyNotAllowedError
from tools.hub.keyservice import is_uri
from tools.hub.objects import Objects
from tools.hub.pending import Document, Pending, load
from tools.hub.publish import rfc3339
from tools.hub.repository import Repository
from tools.hub.rotation import ROLES, TEAM_PREFIX, Change, Rotated, begin, keys_of, require_possible
from tools.hub.rotation import publish as publish_rotation

_FILE: Final = click.Path(path_type=Path, dir_okay=False)
_SHORT: Final = 12
_DIGITS_MIN: Final = 8  # of a key id, to name a key whose file is gone


def _collecting(verb: Any) -> Any:
    """Add the options of verbs that collect signatures."""
    for option in (
        click.option("--store", metavar="DIR", envvar="INFERHUB_STORE", help=f"{STORE_HELP} To begin and to publish."),
        click.option("--sign-with", "signing", multiple=True, metavar="KEY",
                     help="A key that signs: root, targets, team and online keys, each where it is needed. Repeat."),
        click.option("--pending", type=_FILE, metavar="FILE", help="File that collects signatures and travels between "
                     "the signers' machines.  [default: ROLE.pending.json]"),
        click.option("--anchor", type=_FILE, metavar="FILE", help="A root that this machine trusts, for example the "
                     "boxes' anchor: what is signed must follow from it."),
        s3_options,
        password_option,
        json_option,
    ):  # fmt: skip
        verb = option(verb)
    return verb


@click.command("rotate-keys")
@click.option(
    "--role", metavar="ROLE", help="root, targets, online, operator or team:NAME. Left out on other machines."
)
@click.option("--add", "added", multiple=True, metavar="KEY.pub", help="A key it gets; may be repeated.")
@click.option("--remove", "removed", multiple=True, metavar="KEY", help="A key it loses: a file, or 8 or more "
              "digits of its id; may be repeated.")  # fmt: skip
@click.option("--threshold", type=click.IntRange(1, 16), default=None, help="Root signatures needed from now on.")
@_collecting
def rotate_keys(
    role: str | None,
    added: tuple[str, ...],
    removed: tuple[str, ...],
    threshold: int | None,
    store: str | None,
    signing: tuple[str, ...],
    pending: Path | None,
    anchor: Path | None,
    passwords: Passwords,
) -> None:
    """Change who may sign. Begins with --role, goes on with --pending until all have signed, and then publishes.

    The old root's keys and the new one's both have to sign a root. With the old and the new online (or targets) key
    among --sign-with, boxes notice nothing; with the new one alone they wait between two writes. Safe to repeat.

    \b
    Example: inferhub rotate-keys --role root --add keys/root-d.pub --remove keys/root-a.pub --store store \\
                 --sign-with keys/root-b                      (writes root.pending.json: 1 of 2 signatures)
             inferhub rotate-keys --pending root.pending.json --sign-with keys/root-c --anchor anchor/root.json
                                                              (on another machine)
             inferhub rotate-keys --pending root.pending.json --store store                (publishes)
             inferhub rotate-keys --role online --add keys/online-2.pub --remove keys/online.pub --store store \\
                 --sign-with keys/root-b --sign-with keys/root-c --sign-with keys/online --sign-with keys/online-2
    """
    if role is None and (added or removed or threshold):
        raise click.UsageError("--add, --remove and --threshold need --role")
    if role is not None and not (added or removed or threshold):
        raise click.UsageError("nothing to change: give --add, --remove or --threshold; inferhub renew keeps the keys")
    asked = _Asked(role, added, removed, threshold or 0, renew=False)
    _carry_on(asked, store, signing, pending, anchor, passwords)


@click.command()
@click.option("--role", metavar="ROLE", help="root, targets or team:NAME. Only needed to begin.")
@_collecting
def renew(
    role: str | None,
    store: str | None,
    signing: tuple[str, ...],
    pending: Path | None,
    anchor: Path | None,
    passwords: Passwords,
) -> None:
    """Sign a role again before it expires, with the keys it has. `inferhub ls` and `verify` say when.

    The snapshot is renewed by refresh-timestamp, a team's role by each of its publications.

    \b
    Example: inferhub renew --role root --store store --sign-with keys/root-a --sign-with keys/root-b
             inferhub renew --role team:vision --store store --sign-with keys/vision --sign-with keys/online
    """
    _carry_on(_Asked(role, (), (), 0, renew=True), store, signing, pending, anchor, passwords)


@click.command("retire-team")
@click.argument("team")
@store_option
@key_option("--targets-key", "Signs the list of teams, and from now on the team's empty role.")
@key_option("--online-key", "Signs snapshot and timestamp.")
@password_option
@json_option
def retire_team(team: str, store: str, targets_key: str, online_key: str, passwords: Passwords) -> None:
    """Take everything TEAM published out of the store, and its keys' power with it.

    Boxes keep what they run. The role stays, empty and signed by the targets key, for boxes refuse a store in which a
    role has vanished. `inferhub store gc` removes the blobs after its grace time.

    \b
    Example: inferhub retire-team audio --store store --targets-key keys/targets --online-key keys/online
    """
    objects, repository = open_repository(store)
    with objects.lock():
        state = repository.state()
        signer = passwords.signer(targets_key)
        held = [key.keyid for key in keys_of(repository, state, TEAM_PREFIX + team)]
        role = state.teams.get(team)
        if held == [signer.public_key.keyid] and role is not None and not role.signed.targets:
            emit({"team": team, "changed": False, "timestamp_version": 0}, f"team {team} is retired already")
            return
        edition = repository.edition(state)
        edition.retire_team(team, signer)
        edition.sign_top(signer)
        edition.seal(passwords.signer(online_key))
        version = edition.write()
    emit(
        {"team": team, "changed": True, "timestamp_version": version},
        f"team {team} is retired; signed {rfc3339(version)}",
        f"it comes back with: inferhub rotate-keys --role {TEAM_PREFIX}{team} --add KEY.pub ...",
    )


@click.command("show-keys")
@store_option
@json_option
def show_keys(store: str) -> None:
    """Show which keys may sign what, how many are needed, and until when the signatures hold.

    \b
    Example: inferhub show-keys --store store
    """
    _, repository = open_repository(store)
    state = repository.state()
    rows = _roles(repository, state)
    emit(
        {"roles": rows},
        *(
            f"{row['role']:<20} {row['threshold']} of {len(row['keys'])}  until {row['expires'] or '-':<11}"
            f"{' '.join(key[:_SHORT] for key in row['keys'])}{'  renew it now' if row['renew'] else ''}"
            for row in rows
        ),
    )


@dataclass(frozen=True, slots=True)
class _Asked:
    """The change that a command line names; ``role`` is ``None`` where it only goes on with one."""

    role: str | None
    added: tuple[str, ...]
    removed: tuple[str, ...]
    threshold: int
    renew: bool

    def change(self, role: str, present: list[str], passwords: Passwords) -> Change:
        """Return it with its keys read; ``present`` are those that ids may be short for."""
        return Change(
            role=role,
            add=tuple(passwords.public(key) for key in self.added),
            remove=tuple(_named_key(word, present, passwords) for word in self.removed),
            threshold=self.threshold,
            renew=self.renew,
        )


def _carry_on(
    asked: _Asked,
    store: str | None,
    signing: tuple[str, ...],
    path: Path | None,
    anchor: Path | None,
    passwords: Passwords,
) -> None:
    if asked.role is not None:
        with usage():
            require_possible(asked.role, threshold=asked.threshold, renew=asked.renew)
    if path is None:
        if asked.role is None:
            raise click.UsageError("give --role to begin, or --pending FILE to go on")
        path = Path(f"{asked.role.replace(':', '-')}.pending.json")
    pending = _resumed(asked, path, passwords) if asked.role is None or path.exists() else None
    if store is None:
        if pending is None:
            raise click.UsageError("beginning a change needs --store")
        _collect(pending, path, signing, anchor, passwords)
        _report(pending, path, anchor)
        return
    objects, repository = open_repository(store)
    with objects.lock():
        pending = pending or _begun(asked, objects, repository, passwords)
        if pending is None:
            emit({"complete": True, "published": True, "changed": False}, f"{asked.role} is so already")
            return
        online = _collect(pending, path, signing, anchor, passwords)
        if not pending.complete or (_needs_online(pending) and not online):
            _report(pending, path, anchor)
            return
        done = publish_rotation(pending, objects, repository, online, time.time)
        path.unlink(missing_ok=True)
    _report_published(pending, done)


def _resumed(asked: _Asked, path: Path, passwords: Passwords) -> Pending:
    """Return what ``path`` holds; if the command line names a change, it must be that one."""
    pending = load(path)
    if asked.role is not None:
        change = asked.change(asked.role, list(pending.request.get("remove", [])), passwords)
        if change.as_dict() != pending.request:
            raise InvalidInputError(f"{path} collects signatures for another change: delete it, or give --pending")
    return pending


def _begun(asked: _Asked, objects: Objects, repository: Repository, passwords: Passwords) -> Pending | None:
    assert asked.role is not None  # ``_carry_on`` loads the file otherwise
    state = repository.state()
    present = [key.keyid for key in keys_of(repository, state, asked.role)]
    return begin(objects, repository, state, asked.change(asked.role, present, passwords), time.time)


def _collect(
    pending: Pending, path: Path, signing: tuple[str, ...], anchor: Path | None, passwords: Passwords
) -> list[Signer]:
    """Let the given keys sign, save, and return those that sign snapshot and timestamp."""
    if anchor is not None:
        pending.follows(_read_anchor(anchor))
    signers = [passwords.signer(key) for key in signing]
    online = _online_keys(pending.base) | _online_keys(pending.next)
    idle = [signer for signer in pending.sign(signers) if signer.public_key.keyid not in online]
    if idle:
        allowed = "; ".join(str(need) for need in pending.needs())
        raise KeyNotAllowedError(f"key {idle[0].public_key.keyid[:_SHORT]} has nothing to sign here: {allowed}")
    path.parent.mkdir(parents=True, exist_ok=True)
    pending.save(path)
    return [signer for signer in signers if signer.public_key.keyid in online]


def _needs_online(pending: Pending) -> bool:
    return set(pending.next) != {"root"} or _online_keys(pending.base) != _online_keys(pending.next)


def _online_keys(documents: dict[str, Document]) -> set[str]:
    root = documents.get("root")
    held = [root.signed.get_delegated_role(name) for name in ROLES["online"]] if root else []
    return {keyid for role in held for keyid in role.keyids}


def _read_anchor(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise InvalidInputError(f"--anchor {path}: {error.strerror}") from error


def _named_key(word: str, present: list[str], passwords: Passwords) -> str:
    if is_uri(word) or Path(word).exists():
        return str(passwords.public(word).keyid)
    found = [keyid for keyid in present if keyid.startswith(word)]
    if len(word) >= _DIGITS_MIN and len(found) == 1:
        return found[0]
    raise InvalidInputError(
        f"--remove {word}: neither a file nor the beginning of one key's id; see: inferhub show-keys"
    )


def _report(pending: Pending, path: Path, anchor: Path | None) -> None:
    needs = pending.needs()
    if not pending.complete:
        following = f"next, where the other keys are: inferhub rotate-keys --pending {path} --sign-with KEY"
    else:
        online = " --sign-with ONLINE_KEY" if _needs_online(pending) else ""
        following = f"complete; publish it with: inferhub rotate-keys --pending {path} --store DIR{online}"
    unproven = f"attention: that root {pending.roots[-1].signed.version} is this store's was not checked (--anchor)"
    emit(
        {
            "pending": str(path),
            "complete": pending.complete,
            "published": False,
            "changed": False,
            "needs": [asdict(need) for need in needs],
            "changes": pending.changes(),
        },
        *pending.changes(),
        *map(str, needs),
        *([] if anchor else [unproven]),
        following,
    )


def _report_published(pending: Pending, done: Rotated) -> None:
    emit(
        {
            "pending": "",
            "complete": True,
            "published": True,
            "changed": done.changed,
            "versions": done.versions,
            "timestamp_version": done.timestamp_version,
            "changes": pending.changes(),
        },
        *pending.changes(),
        "published" if done.changed else "it was published already; nothing changed",
    )


def _roles(repository: Repository, state: State) -> list[dict[str, Any]]:
    expires = {
        "root": state.root.signed.expires,
        "targets": state.targets.signed.expires,
        "online": min(state.snapshot.signed.expires, state.timestamp.signed.expires),
    }
    expires |= {TEAM_PREFIX + team: role.signed.expires for team, role in state.teams.items()}
    soon = expiring({role: date for role, date in expires.items() if role != "online"}, time.time())
    rows = []
    for role in (*ROLES, *(TEAM_PREFIX + team for team in state.team_names()), "operator"):
        threshold = 1
        if role in ROLES:
            threshold = state.root.signed.roles[ROLES[role][-1]].threshold
        elif role.startswith(TEAM_PREFIX):
            threshold = state.targets.signed.get_delegated_role(team_role(role.removeprefix(TEAM_PREFIX))).threshold
        rows.append(
            {
                "role": role,
                "threshold": threshold,
                "keys": [key.keyid for key in keys_of(repository, state, role)],
                "expires": f"{expires[role]:%Y-%m-%d}" if role in expires else "",
                "renew": role in soon,
            }
        )
    return rows
