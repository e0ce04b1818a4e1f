"""The verbs that make and look at a store: keygen, init, add-team, refresh-timestamp, verify, ls, show."""

from __future__ import annotations

import sys
import time
from datetime import datetime
from pathlib import Path
from typing import Any, Final

import click
import msgspec
from rich.console import Console
from rich.table import Table
from tuf.api.metadata import Metadata

from agent.bundles.manifest import OPERATORS_TARGET, Index, parse_manifest
from agent.bundles.names import check_name, manifest_target
from agent.cli_text import human_bytes
from agent.durable import write_file
from agent.errors import InvalidInputError, TargetNotFoundError
from tools.hub import keys
from tools.hub.cli import (
    Passwords,
    emit,
    json_option,
    key_option,
    open_repository,
    password_option,
    progress,
    s3_options,
    s3_settings,
    store_option,
    usage,
    wants_json,
)
from tools.hub.edition import ROOT_DAYS, TIMESTAMP_ALERT_S, TIMESTAMP_DAYS, State, expiring, team_role
from tools.hub.errors import SigningKeyError
from tools.hub.indexes import channels_of, entry_of
from tools.hub.keyservice import KNOWN_SCHEMES, is_uri
from tools.hub.objects import store_of
from tools.hub.oms import load_key
from tools.hub.publish import operators_document, read_index, rfc3339
from tools.hub.repository import Repository
from tools.hub.verify import Part, StoreFetcher, store_url
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
@click.option("--kms", "uri", metavar="URI", help="Make no key: refer to one in a service, as awskms:ID, gcpkms:NAME, "
              "azurekms://VAULT.vault.azure.net/keys/KEY/VERSION, hv:NAME/VERSION or hsm:2?label=LABEL.")  # fmt: skip
@password_option
@json_option
def keygen(role: keys.Role, out: Path, unencrypted: bool, uri: str | None, passwords: Passwords) -> None:
    """Make an ed25519 key pair (P-256 for the role oms, which signs models), or refer to a key in a KMS or HSM.

    Wherever a verb takes a private key, such a URI will do as well.

    \b
    Example: inferhub keygen --role team --out keys/vision
             inferhub keygen --role online --kms awskms:alias/inferd-online --out keys/online
    """
    if uri is not None:
        if not is_uri(uri):
            raise SigningKeyError(f"--kms {uri}: no service has this scheme", hint=KNOWN_SCHEMES)
        keyid = keys.refer(out, uri, passwords.public(uri), role=role)
        public = keys.public_path_of(out)
        emit(
            {"keyid": keyid, "role": role, "private": str(out), "public": str(public), "encrypted": False, "uri": uri},
            f"{role} key {keyid[:12]}: {out} refers to {uri}, {public}",
        )
        return
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
@click.option("--root-key", "root_keys", multiple=True, required=True, metavar="KEY",
              help="Repeat for each. A .pub file stands for a key that does not sign now.")  # fmt: skip
@click.option("--threshold", type=click.IntRange(1, 16), default=2, show_default=True, help="Root signatures needed.")
@key_option("--targets-key", "Signs the list of teams and operators. Keep it offline.")
@key_option("--online-key", "Signs snapshots and timestamps.")
@click.option(
    "--team", "teams", multiple=True, metavar="TEAM=KEY.pub", help="A team and its public key; repeat for each."
)
@click.option("--operator-key", "operators", multiple=True, metavar="KEY.pub",
              help="Public key that may command the fleet; repeat for each.")  # fmt: skip
@click.option("--tenant", default="default", show_default=True, help="The fleet that the operators command.")
@click.option(
    "--anchor", type=_FILE, metavar="FILE", help="Also write the first root here, for devices to be built with."
)
@password_option
@json_option
def init(
    folder: str,
    root_keys: tuple[str, ...],
    threshold: int,
    targets_key: str,
    online_key: str,
    teams: tuple[str, ...],
    operators: tuple[str, ...],
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
        raise click.UsageError(f"--threshold {threshold} with {len(root_keys)} root keys could never be reached")
    with usage():
        named = dict(map(_team, teams))
    objects = store_of(folder, s3=s3_settings())
    with objects.lock(create=True):
        root = Repository(objects, time.time).initialise(
            root_keys=[passwords.public(key) for key in root_keys],
            root_signers=[passwords.signer(key) for key in root_keys if passwords.signs(key)],
            threshold=threshold,
            targets_signer=passwords.signer(targets_key),
            online_signer=passwords.signer(online_key),
            teams={team: passwords.public(path) for team, path in named.items()},
            top_targets={OPERATORS_TARGET: operators_document(tenant, [passwords.public(key) for key in operators])},
        )
    if anchor is not None:
        anchor.parent.mkdir(parents=True, exist_ok=True)
        write_file(anchor, root, mode=0o644)
    emit(
        {"store": objects.name, "threshold": threshold, "root_keys": len(root_keys), "teams": list(named),
         "operators": len(operators), "anchor": str(anchor) if anchor else ""},
        f"store {objects.name}: root {threshold} of {len(root_keys)}, valid {ROOT_DAYS} days; "
        f"teams: {', '.join(named) or 'none'}; {len(operators)} operator keys",
        f"anchor for devices: {anchor or f'{objects.name}/metadata/1.root.json'}",
        f"re-sign the timestamp every day, it expires after {TIMESTAMP_DAYS} days: inferhub refresh-timestamp",
        *(() if operators else (_NO_OPERATORS,)),
    )  # fmt: skip


@click.command("add-team")
@click.argument("team")
@click.argument("public_key", metavar="KEY.pub")
@store_option
@key_option("--targets-key", "Signs the list of teams.")
@key_option("--online-key", "Signs snapshot and timestamp.")
@password_option
@json_option
def add_team(team: str, public_key: str, store: str, targets_key: str, online_key: str, passwords: Passwords) -> None:
    """Let TEAM publish models under models/TEAM/.

    \b
    Example: inferhub add-team audio keys/audio.pub --store store --targets-key keys/targets --online-key keys/online
    """
    with usage():
        check_name(team, "team")
    objects, repository = open_repository(store)
    with objects.lock():
        edition = repository.edition(repository.state())
        edition.add_team(team, passwords.public(public_key))
        edition.sign_top(passwords.signer(targets_key))
        edition.seal(passwords.signer(online_key))
        version = edition.write()
    emit({"team": team, "timestamp_version": version}, f"team {team} may publish; signed {rfc3339(version)}")


@click.command("refresh-timestamp")
@store_option
@key_option("--online-key", "Signs the timestamp.")
@password_option
@json_option
def refresh_timestamp(store: str, online_key: str, passwords: Passwords) -> None:
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
    soon = _due(_expiries(state), version)
    emit(
        {
            "timestamp_version": version,
            "expires": rfc3339(time.time() + TIMESTAMP_DAYS * 86_400),
            "due": soon,
        },
        f"signed {rfc3339(version)} (version {version}), valid {TIMESTAMP_DAYS} days",
        *_attention(soon),
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
@click.option("--model", "models", multiple=True, metavar="TEAM/NAME[@VERSION]",
              help="Look at this only, as for a stick that holds nothing else; may be repeated.")  # fmt: skip
@click.option("--oms-key", type=_FILE, metavar="PUB", help="Whose the OpenSSF model signatures must be, in PEM.")
@json_option
def verify(store: str, anchor: Path | None, deep: bool, models: tuple[str, ...], oms_key: Path | None) -> None:
    """Check the store as a device sees it, from the anchor to every blob, and say what has to be signed again soon.

    \b
    Example: inferhub verify --store https://models.example/ --anchor anchor/root.json --deep
             inferhub verify --store /media/usb --model vision/yolo@1.4.0
    """
    parts = [Part(*parse_model(model)) for model in models]
    if anchor is not None:
        try:
            root = anchor.read_bytes()
        except OSError as error:
            raise InvalidInputError(f"--anchor {anchor}: {error.strerror}") from error
    else:
        root = StoreFetcher(s3_settings()).read(store_url(store) + "metadata/1.root.json", size_bytes_max=512_000)
    with progress() as bars:
        found = verify_store(store, root, deep=deep, parts=parts, oms_key=load_key(oms_key) if oms_key else None,
                             listener=bars, s3=s3_settings())  # fmt: skip
    dates = {role: datetime.fromisoformat(date) for role, date in found.expires_by_role.items()}
    soon = _due(dates, None if parts else found.timestamp)  # a stick is stamped once
    lines = [f"  {m['team']}/{m['name']}: {', '.join(m['versions'])}  {_channels(m['channels'])}" for m in found.models]
    emit(
        {"ok": True, "anchor": str(anchor) if anchor else "store", **found.as_dict(), "due": soon},
        f"good: root {found.root}, signed {rfc3339(found.timestamp)}, valid until {found.expires}; "
        f"{found.operators} operator keys",
        *lines,
        f"{found.manifests} manifests, {found.blobs} blobs, {human_bytes(found.bytes)}"
        f"{', every byte hashed' if deep else ' by size only (--deep hashes them)'}",
        *(
            [f"{found.model_signatures} OpenSSF model signatures{'' if oms_key else ' (--oms-key checks whose)'}"]
            if found.model_signatures
            else []
        ),
        *_attention(soon),
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
    soon = _due(_expiries(state), state.timestamp.signed.version)
    if wants_json():
        models = [msgspec.to_builtins(index) for index in indexes]
        emit({"teams": state.team_names(), "models": models, "expires": _dates(_expiries(state)), "due": soon})
        return
    table = Table(box=None, pad_edge=False)
    for column in ("model", "version", "seq", "size", "status", "channels", "created"):
        table.add_column(column)
    for index in indexes:
        for entry in index.versions:
            channels = [channel for channel, version in sorted(index.channels.items()) if version == entry.version]
            table.add_row(
                f"{index.team}/{index.name}", entry.version, str(entry.seq), human_bytes(entry.bytes),
                entry.status + (f": {entry.reason}" if entry.reason else ""), ",".join(channels), entry.created,
            )  # fmt: skip
    Console(width=None if sys.stdout.isatty() else _WIDTH).print(
        table if indexes else "no models yet; publish one with: inferhub publish"
    )
    dates = ", ".join(f"{role} {date:%Y-%m-%d}" for role, date in sorted(_expiries(state).items()))
    click.echo(f"signed {rfc3339(state.timestamp.signed.version)}; valid until: {dates}")
    for line in _attention(soon):
        click.echo(line)


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
              f"{'  ' + e.reason if e.reason else ''}" for e in index.versions),
            f"  signatures of {team} hold until {state.teams[team].signed.expires:%Y-%m-%d}",
        )  # fmt: skip
        return
    data = repository.read_target(state, team, manifest_target(team, name, version))
    if data is None:
        raise TargetNotFoundError(f"the store has no {model}; see: inferhub show {team}/{name}")
    manifest, entry = parse_manifest(data), entry_of(index, version)
    channels = channels_of(index, version)
    status = {"status": entry.status, "reason": entry.reason, "channels": channels}
    emit(
        msgspec.to_builtins(manifest) | status,
        f"{team}/{name}@{version}  seq {manifest.seq}  created {manifest.created}  {human_bytes(manifest.total_size)}",
        f"  {entry.status}{': ' + entry.reason if entry.reason else ''}; channels: {', '.join(channels) or 'none'}",
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


def parse_version(text: str) -> tuple[str, str, str]:
    """Return team, name and version of ``TEAM/NAME@VERSION``; ``InvalidInputError`` if it is not of this form."""
    team, name, version = parse_model(text)
    if not version:
        raise InvalidInputError(f"{text!r} lacks @VERSION")
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


def _expiries(state: State) -> dict[str, datetime]:
    roles: dict[str, Metadata[Any]] = {"root": state.root, "targets": state.targets}
    roles |= {"snapshot": state.snapshot, "timestamp": state.timestamp}
    roles |= {team_role(team): role for team, role in state.teams.items()}
    return {role: metadata.signed.expires for role, metadata in roles.items()}


def _dates(expiries: dict[str, datetime]) -> dict[str, str]:
    return {role: f"{date:%Y-%m-%dT%H:%M:%SZ}" for role, date in expiries.items()}


def _due(expiries: dict[str, datetime], issued: int | None) -> dict[str, str]:
    """Return the roles that have to be signed again soon, with the day they expire.

    ``issued`` is when the timestamp was signed, ``None`` if nobody is expected to sign it again.
    """
    now = time.time()
    offline = {role: date for role, date in expiries.items() if role not in ("snapshot", "timestamp")}
    due = expiring(offline, now)
    if issued is not None and now - issued > TIMESTAMP_ALERT_S:
        due["timestamp"] = expiries["timestamp"]
    return {role: f"{date:%Y-%m-%d}" for role, date in due.items()}


def _attention(due: dict[str, str]) -> list[str]:
    return [
        f"attention: the timestamp has not been signed for two days, is cron at work? It expires on {date}: "
        "inferhub refresh-timestamp"
        if role == "timestamp"
        else f"attention: {role} expires on {date}: inferhub renew --role {role.replace('team-', 'team:', 1)}"
        for role, date in due.items()
    ]


def _team(pair: str) -> tuple[str, str]:
    team, equals, path = pair.partition("=")
    if not equals:
        raise InvalidInputError(f"--team {pair}: write TEAM=KEY.pub")
    return check_name(team, "team"), path


def _channels(channels: dict[str, str]) -> str:
    return " ".join(f"{channel}={version}" for channel, version in sorted(channels.items())) or "(no channel)"
