"""The verbs that make and look at a store: keygen, init, add-team, refresh-timestamp, verify, ls, show."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any, Final

import click
import msgspec
from rich.console import Console
from rich.table import Table

from agent.bundles.manifest import OPERATORS_TARGET, Index, parse_manifest
from agent.bundles.names import check_name, manifest_target
from agent.durable import write_file
from agent.errors import InvalidInputError, TargetNotFoundError
from tools.hub import keys
from tools.hub.cli import (
    Passwords,
    emit,
    human_bytes,
    json_option,
    key_option,
    open_repository,
    password_option,
    progress,
    s3_options,
    s3_settings,
    store_option,
    wants_json,
)
from tools.hub.edition import ROOT_DAYS, TIMESTAMP_DAYS, State
from tools.hub.errors import KeyNotAllowedError
from tools.hub.objects import store_of
from tools.hub.publish import operators_document, read_index, rfc3339
from tools.hub.repository import Repository
from tools.hub.verify import StoreFetcher, store_url
from tools.hub.verify import verify as verify_store

_WIDTH: Final = 160  # of a table that goes to a file
_NO_OPERATORS: Final = (
    "attention: no operator keys, so boxes of this store obey no fleet command (--operator-key KEY.pub names one)"
)
_FILE = click.Path(path_type=Path, dir_okay=False)


@click.command()
@click.option("--role", type=click.Choice(keys.ROLES), required=True, help="What the key will sign.")
@click.option("--out", type=_FILE, required=True, metavar="KEY", help="Private key file; the public one is KEY.pub.")
@click.option("--unencrypted", is_flag=True, help="Write the private key without a password.")
@password_option
@json_option
def keygen(role: keys.Role, out: Path, unencrypted: bool, passwords: Passwords) -> None:
    """Make an ed25519 key pair.

    \b
    Example: inferhub keygen --role team --out keys/vision
    """
    password = None if unencrypted else passwords.new(out)
    keyid = keys.generate(out, role=role, password=password)
    public = keys.public_path_of(out)
    emit(
        {"keyid": keyid, "role": role, "private": str(out), "public": str(public), "encrypted": password is not None},
        f"{role} key {keyid[:12]}: {out} (private, {'encrypted' if password else 'NOT encrypted'}), {public}",
    )


@click.command()
@click.argument("folder", metavar="DIR")
@s3_options
@click.option("--root-key", "root_keys", type=_FILE, multiple=True, required=True, metavar="KEY",
              help="Repeat for each. A .pub file stands for a key that does not sign now.")  # fmt: skip
@click.option("--threshold", type=click.IntRange(1, 16), default=2, show_default=True, help="Root signatures needed.")
@key_option("--targets-key", "Signs the list of teams and operators. Keep it offline.")
@key_option("--online-key", "Signs snapshots and timestamps.")
@click.option(
    "--team", "teams", multiple=True, metavar="TEAM=KEY.pub", help="A team and its public key; repeat for each."
)
@click.option("--operator-key", "operators", type=_FILE, multiple=True, metavar="KEY.pub",
              help="Public key that may command the fleet; repeat for each.")  # fmt: skip
@click.option("--tenant", default="default", show_default=True, help="The fleet that the operators command.")
@click.option(
    "--anchor", type=_FILE, metavar="FILE", help="Also write the first root here, for devices to be built with."
)
@password_option
@json_option
def init(
    folder: str,
    root_keys: tuple[Path, ...],
    threshold: int,
    targets_key: Path,
    online_key: Path,
    teams: tuple[str, ...],
    operators: tuple[Path, ...],
    tenant: str,
    anchor: Path | None,
    passwords: Passwords,
) -> None:
    """Create a store in DIR.

    \b
    Example: inferhub init store --root-key keys/root-a --root-key keys/root-b --root-key keys/root-c.pub \\
                 --targets-key keys/targets --online-key keys/online --team vision=keys/vision.pub \\
                 --operator-key keys/operator.pub --anchor anchor/root.json
    """
    if threshold > len(root_keys):
        raise KeyNotAllowedError(f"--threshold {threshold} with {len(root_keys)} root keys could never be reached")
    objects = store_of(folder, s3=s3_settings())
    with objects.lock(create=True):
        root = Repository(objects, time.time).initialise(
            root_keys=[keys.load_public(path) for path in root_keys],
            root_signers=[passwords.signer(path) for path in root_keys if keys.is_private(path)],
            threshold=threshold,
            targets_signer=passwords.signer(targets_key),
            online_signer=passwords.signer(online_key),
            teams=dict(_team(pair) for pair in teams),
            top_targets={OPERATORS_TARGET: operators_document(tenant, [keys.load_public(path) for path in operators])},
        )
    if anchor is not None:
        anchor.parent.mkdir(parents=True, exist_ok=True)
        write_file(anchor, root, mode=0o644)
    names = [pair.partition("=")[0] for pair in teams]
    emit(
        {"store": objects.name, "threshold": threshold, "root_keys": len(root_keys), "teams": names,
         "operators": len(operators), "anchor": str(anchor) if anchor else ""},
        f"store {objects.name}: root {threshold} of {len(root_keys)}, valid {ROOT_DAYS} days; "
        f"teams: {', '.join(names) or 'none'}; {len(operators)} operator keys",
        f"anchor for devices: {anchor or f'{objects.name}/metadata/1.root.json'}",
        f"re-sign the timestamp every day, it expires after {TIMESTAMP_DAYS} days: inferhub refresh-timestamp",
        *(() if operators else (_NO_OPERATORS,)),
    )  # fmt: skip


@click.command("add-team")
@click.argument("team")
@click.argument("public_key", metavar="KEY.pub", type=_FILE)
@store_option
@key_option("--targets-key", "Signs the list of teams.")
@key_option("--online-key", "Signs snapshot and timestamp.")
@password_option
@json_option
def add_team(
    team: str, public_key: Path, store: str, targets_key: Path, online_key: Path, passwords: Passwords
) -> None:
    """Let TEAM publish models under models/TEAM/.

    \b
    Example: inferhub add-team audio keys/audio.pub --store store --targets-key keys/targets --online-key keys/online
    """
    objects, repository = open_repository(store)
    with objects.lock():
        edition = repository.edition(repository.state())
        edition.add_team(check_name(team, "team"), keys.load_public(public_key))
        edition.sign_top(passwords.signer(targets_key))
        edition.seal(passwords.signer(online_key))
        version = edition.write()
    emit({"team": team, "timestamp_version": version}, f"team {team} may publish; signed {rfc3339(version)}")


@click.command("refresh-timestamp")
@store_option
@key_option("--online-key", "Signs the timestamp.")
@password_option
@json_option
def refresh_timestamp(store: str, online_key: Path, passwords: Passwords) -> None:
    """Sign the timestamp again, so that devices know the store is alive. Once a day.

    \b
    Example: inferhub refresh-timestamp --store store --online-key keys/online
    """
    objects, repository = open_repository(store)
    with objects.lock():
        state = repository.state()
        edition = repository.edition(state)
        edition.seal(passwords.signer(online_key))
        version = edition.write()
    soon = {role: f"{when:%Y-%m-%d}" for role, when in state.expiring(time.time()).items()}
    emit(
        {
            "timestamp_version": version,
            "expires": rfc3339(time.time() + TIMESTAMP_DAYS * 86_400),
            "expiring_roles": soon,
        },
        f"signed {rfc3339(version)} (version {version}), valid {TIMESTAMP_DAYS} days",
        *(f"attention: {role} expires on {when} and needs its own key" for role, when in soon.items()),
    )


@click.command()
@click.option(
    "--store", required=True, metavar="URL", envvar="INFERHUB_STORE", help="Folder, file://, http(s):// or s3:// URL."
)
@s3_options
@click.option(
    "--anchor", type=_FILE, metavar="FILE", help="The root devices are built with. Default: the store's own first."
)
@click.option("--deep", is_flag=True, help="Fetch and hash every blob.")
@json_option
def verify(store: str, anchor: Path | None, deep: bool) -> None:
    """Check the store as a device sees it, from the anchor to every blob.

    \b
    Example: inferhub verify --store https://models.example/ --anchor anchor/root.json --deep
    """
    if anchor is not None:
        try:
            root = anchor.read_bytes()
        except OSError as error:
            raise InvalidInputError(f"--anchor {anchor}: {error.strerror}") from error
    else:
        root = StoreFetcher(s3_settings()).read(store_url(store) + "metadata/1.root.json", size_bytes_max=512_000)
    with progress() as bars:
        found = verify_store(store, root, deep=deep, listener=bars, s3=s3_settings())
    models = [
        f"  {m['team']}/{m['name']}: {', '.join(m['versions'])}  {_channels(m['channels'])}" for m in found.models
    ]
    emit(
        {"ok": True, "anchor": str(anchor) if anchor else "store", **found.as_dict()},
        f"good: root {found.root}, signed {rfc3339(found.timestamp)}, valid until {found.expires}; "
        f"{found.operators} operator keys",
        *models,
        f"{found.manifests} manifests, {found.blobs} blobs, {human_bytes(found.bytes)}"
        f"{', every byte hashed' if deep else ' by size only (--deep hashes them)'}",
        *([] if anchor else ["the anchor came from the store itself: this proves consistency, not origin (--anchor)"]),
    )


@click.command("ls")
@store_option
@json_option
def list_models(store: str) -> None:
    """List the models of the store.

    \b
    Example: inferhub ls --store store
    """
    _, repository = open_repository(store)
    state = repository.state()
    indexes = _indexes(repository, state)
    if wants_json():
        emit({"teams": state.team_names(), "models": [msgspec.to_builtins(index) for index in indexes]})
        return
    table = Table(box=None, pad_edge=False)
    for column in ("model", "version", "seq", "size", "status", "channels", "created"):
        table.add_column(column)
    for index in indexes:
        for entry in index.versions:
            channels = [channel for channel, version in sorted(index.channels.items()) if version == entry.version]
            table.add_row(
                f"{index.team}/{index.name}", entry.version, str(entry.seq), human_bytes(entry.bytes),
                entry.status, ",".join(channels), entry.created,
            )  # fmt: skip
    Console(width=None if sys.stdout.isatty() else _WIDTH).print(
        table if indexes else "no models yet; publish one with: inferhub publish"
    )


@click.command()
@click.argument("model", metavar="TEAM/NAME[@VERSION]")
@store_option
@json_option
def show(model: str, store: str) -> None:
    """Show a model's channels and versions, or the manifest of one version.

    \b
    Example: inferhub show vision/yolo@1.4.0 --store store
    """
    team, name, version = parse_model(model)
    _, repository = open_repository(store)
    state = repository.state()
    index = read_index(repository, state, team, name)
    if index is None:
        raise TargetNotFoundError(f"the store has no model {team}/{name}; see: inferhub ls")
    if not version:
        emit(
            msgspec.to_builtins(index),
            f"{team}/{name}  {_channels(index.channels)}",
            *(f"  {e.version}  seq {e.seq}  {human_bytes(e.bytes)}  {e.status}  {e.manifest_sha256[:12]}"
              for e in index.versions),
        )  # fmt: skip
        return
    data = repository.read_target(state, team, manifest_target(team, name, version))
    if data is None:
        raise TargetNotFoundError(f"the store has no {model}; see: inferhub show {team}/{name}")
    manifest = parse_manifest(data)
    emit(
        msgspec.to_builtins(manifest),
        f"{team}/{name}@{version}  seq {manifest.seq}  created {manifest.created}  {human_bytes(manifest.total_size)}",
        *(f"  variant {v.id}: {v.precision} on {v.device.kind}, {v.memory.host_mb} MiB ({v.memory.source}), "
          f"p50 {v.perf.p50_ms:g} ms" for v in manifest.variants),
        *(f"  file {f.path}: {f.role}, {human_bytes(f.size)}, {len(f.chunks)} chunks" for f in manifest.files),
    )  # fmt: skip


def parse_model(text: str) -> tuple[str, str, str]:
    """Return team, name and version (``""`` if absent) of ``TEAM/NAME[@VERSION]``.

    Raises:
        InvalidInputError: not of this form.
    """
    path, _, version = text.partition("@")
    team, slash, name = path.partition("/")
    if not (team and slash and name):
        raise InvalidInputError(f"{text!r} is not of the form TEAM/NAME or TEAM/NAME@VERSION")
    return team, name, version


def _indexes(repository: Repository, state: State) -> list[Index]:
    found = []
    for team, role in sorted(state.teams.items()):
        for path in sorted(role.signed.targets):
            if path.endswith("/index.json"):
                index = read_index(repository, state, team, path.split("/")[2])
                assert index is not None
                found.append(index)
    return found


def _team(pair: str) -> tuple[str, Any]:
    team, equals, path = pair.partition("=")
    if not equals:
        raise InvalidInputError(f"--team {pair}: write TEAM=KEY.pub")
    return check_name(team, "team"), keys.load_public(Path(path))


def _channels(channels: dict[str, str]) -> str:
    return " ".join(f"{channel}={version}" for channel, version in sorted(channels.items())) or "(no channel)"
