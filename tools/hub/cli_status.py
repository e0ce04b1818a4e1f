"""The verbs that withdraw a published version: deprecate, revoke."""

from __future__ import annotations

from dataclasses import asdict

import click

from tools.hub.cli import Passwords, emit, json_option, key_option, password_option, publisher, store_option
from tools.hub.cli_store import parse_version
from tools.hub.indexes import REASON_CHARS_MAX
from tools.hub.publish import Marked, rfc3339


@click.command()
@click.argument("model", metavar="TEAM/NAME@VERSION")
@store_option
@click.option("--reason", default="", metavar="TEXT", help=f"Shown beside the version, {REASON_CHARS_MAX} characters.")
@click.option("--undo", is_flag=True, help="Make it an active version again.")
@key_option("--team-key", "The team's key; signs the index.")
@key_option("--online-key", "Signs snapshot and timestamp.")
@password_option
@json_option
def deprecate(
    model: str, store: str, reason: str, undo: bool, team_key: str, online_key: str, passwords: Passwords
) -> None:
    """Mark a version as one that nobody should choose any more. Boxes that run it go on.

    \b
    Example: inferhub deprecate vision/yolo@1.3.0 --reason "use 1.4" --store store --team-key keys/vision \\
                 --online-key keys/online
    """
    if undo and reason:
        raise click.UsageError("--undo takes no --reason")
    team, name, version = parse_version(model)
    with publisher(store) as (publishing, _):
        signers = {"team_signer": passwords.signer(team_key), "online_signer": passwords.signer(online_key)}
        if undo:
            done = publishing.reinstate(team, name, version, **signers)
        else:
            done = publishing.deprecate(team, name, version, reason=reason, **signers)
    pointing = [channel for channel, target in sorted(done.channels.items()) if target == version]
    attention = f"attention: {', '.join(pointing)} still points to it; inferhub promote names another"
    emit(asdict(done), _told(model, done), *([attention] if pointing and not undo else []))


@click.command()
@click.argument("model", metavar="TEAM/NAME@VERSION")
@store_option
@click.option("--reason", required=True, metavar="TEXT", help=f"Boxes show it; {REASON_CHARS_MAX} characters.")
@click.option("--to", "replacement", default="", metavar="VERSION", help="Where its channels point from now on.")
@click.option("--drop-channels", is_flag=True, help="Remove the channels that point to it.")
@key_option("--team-key", "The team's key; signs the index.")
@key_option("--online-key", "Signs snapshot and timestamp.")
@password_option
@json_option
def revoke(
    model: str,
    store: str,
    reason: str,
    replacement: str,
    drop_channels: bool,
    team_key: str,
    online_key: str,
    passwords: Passwords,
) -> None:
    """Withdraw a version for good. Boxes leave it as soon as they hear of this, and never load it again.

    A channel that points to it needs a new version (--to), or goes (--drop-channels).

    \b
    Example: inferhub revoke vision/yolo@1.4.0 --reason "wrong labels" --to 1.3.0 --store store \\
                 --team-key keys/vision --online-key keys/online
    """
    if replacement and drop_channels:
        raise click.UsageError("--to and --drop-channels exclude each other")
    team, name, version = parse_version(model)
    if replacement == version:
        raise click.UsageError(f"--to {version} is the version that goes: name another")
    with publisher(store) as (publishing, _):
        done = publishing.revoke(
            team,
            name,
            version,
            reason=reason,
            replacement=replacement,
            drop_channels=drop_channels,
            team_signer=passwords.signer(team_key),
            online_signer=passwords.signer(online_key),
        )
    emit(asdict(done), _told(model, done))


def _told(model: str, done: Marked) -> str:
    reason = f": {done.reason}" if done.reason else ""
    ending = f"signed {rfc3339(done.timestamp_version)}" if done.changed else "it was already"
    return f"{model} is {done.status}{reason}; {ending}"
