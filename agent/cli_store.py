"""The verbs of ``inferctl`` about trust, store, disk and media, and what they print."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Mapping
from typing import Any, Final

import click
from rich.text import Text

from agent.cli_progress import follow
from agent.cli_session import FINAL_GOOD, connected, end_text, json_option, print_json
from agent.cli_text import age, columns, freshness_text, human_bytes, print_text, shown

_DEADLINE_MS: Final = 600_000.0  # a slow stick or several mirrors that do not answer


def add_to(group: click.Group) -> None:
    """Give ``group`` these verbs."""
    for command in (trust, store, gc, sideload):
        group.add_command(command)


@click.command()
@json_option
@click.pass_obj
def trust(socket_path: str, as_json: bool) -> None:
    """Show whom this box trusts, how fresh their word is, and how the last refresh ended.

    \b
    Example:
      inferctl trust
    """
    with connected(socket_path) as client:
        value = client.call("trust", deadline_ms=_DEADLINE_MS)
    if as_json:
        print_json(value)
    else:
        print_text(trust_text(value))


@click.group(invoke_without_command=True)
@json_option
@click.pass_context
def store(context: click.Context, as_json: bool) -> None:
    """Show what is on this box's disk: versions and what they are for, pulls, quarantine, room.

    \b
    Examples:
      inferctl store
      inferctl store refresh
      inferctl store unquarantine magika@2.0.0
    """
    if context.invoked_subcommand is not None:
        return
    with connected(context.obj) as client:
        value = client.call("store")
    if as_json:
        print_json(value)
    else:
        print_text(store_text(value))


@store.command()
@json_option
@click.pass_obj
def refresh(socket_path: str, as_json: bool) -> None:
    """Ask the store now, and say what is new for the models of this box.

    \b
    Example:
      inferctl store refresh
    """
    with connected(socket_path) as client:
        value = client.call("refresh", deadline_ms=_DEADLINE_MS)
    if as_json:
        print_json(value)
    else:
        print_text(refresh_text(value))


@store.command()
@click.argument("target", metavar="MODEL@VERSION")
@json_option
@click.pass_obj
def unquarantine(socket_path: str, target: str, as_json: bool) -> None:
    """Let a version be tried again that failed on this box; deploy it afterwards.

    \b
    Example:
      inferctl store unquarantine magika@2.0.0 && inferctl deploy magika@2.0.0
    """
    model, _, version = target.partition("@")
    if not version:
        raise click.BadParameter("the version is missing; inferctl store lists them", param_hint="MODEL@VERSION")
    with connected(socket_path) as client:
        row = client.call("unquarantine", {"model": model, "version": version})
    if as_json:
        print_json(row)
    else:
        click.echo(f"{shown(model)} {shown(version)} may be tried again; it failed with: {shown(row['reason'])}")


@click.command()
@click.option("--dry-run", is_flag=True, help="Only say what would go.")
@click.option("--room", is_flag=True, help="As if room were short: down to the newest two versions of each model.")
@json_option
@click.pass_obj
def gc(socket_path: str, dry_run: bool, room: bool, as_json: bool) -> None:
    """Remove versions and unfinished pulls that nothing needs.

    What serves, served before, is pinned, on trial or being deployed always stays.

    \b
    Examples:
      inferctl gc --dry-run
      inferctl gc --room
    """
    with connected(socket_path) as client:
        value = client.call("gc", {"dry_run": dry_run, "room": room}, deadline_ms=_DEADLINE_MS)
    if as_json:
        print_json(value)
        return
    rows = [(row["what"], human_bytes(row["size_bytes"]), row["reason"]) for row in value["removed"]]
    if rows:
        print_text(columns(("what", "size", "why"), rows))
    click.echo(f"{human_bytes(value['bytes'])} {'would be' if dry_run else 'were'} freed")


@click.command()
@click.argument("path", type=click.Path(exists=True, file_okay=False))
@click.argument("target", metavar="[MODEL[@VERSION]]", required=False)
@click.option("--team", help="Who publishes MODEL; only needed if it is new on this box.")
@click.option("--no-wait", is_flag=True, help="Return once the deployments have begun.")
@json_option
@click.pass_obj
def sideload(socket_path: str, path: str, target: str | None, team: str | None, no_wait: bool, as_json: bool) -> None:
    """Take models from a medium that ``inferhub export`` wrote: a USB stick, or any folder with a store.

    Each model of this box gets what is wanted of it (its channel, its pin). With MODEL that one is taken and pinned.
    The daemon reads PATH itself: it must be mounted where the service can see it, such as /media or /mnt.

    \b
    Examples:
      inferctl sideload /media/usb
      inferctl sideload /media/usb detector@2.0.0 --team vision
    """
    model, _, version = (target or "").partition("@")
    args = {"path": os.path.abspath(path), "model": model, "version": version, "team": team}
    with connected(socket_path) as client:
        report = client.call("sideload", args, deadline_ms=_DEADLINE_MS)
        for row in report["slots"]:
            if row["deployment"] and not no_wait:
                row["record"] = follow(client, row["deployment"], as_json=False, quiet=as_json)
    if as_json:
        print_json(report)
    else:
        print_text(sideload_text(report))
    sys.exit(0 if all(_went_well(row) for row in report["slots"]) else 1)


def trust_text(value: Mapping[str, Any]) -> Text:
    """Return the whole of ``inferctl trust``."""
    lines = [Text.assemble(("trust: ", "bold"), freshness_text(value))]
    lines.append(Text(f"clock: {_date(value['clock'])}; judged by {_date(value['trusted_time'])}"))
    lines.append(Text(f"last refresh: {_refresh_end(value['last_refresh'])}"))
    policy = ", ".join(f"{shown(name)} {shown(choice)}" for name, choice in value["policy"].items())
    lines.append(Text(f"policy: {policy}"))
    root = value["root"]
    if root is not None:
        lines.append(Text(f"root: version {root['version']}, expires {_date(root['expires'])}"))
        rows = [
            (role, f"{held['threshold']} of {len(held['keys'])}", " ".join(key[:16] for key in held["keys"]))
            for role, held in root["keys"].items()
        ]
        lines.append(columns(("signs", "needed", "keys"), rows))
    floors = value["floors"]
    roles = [
        (row["role"], row["version"], floors.get(row["role"], "-"), _date(row["expires"])) for row in value["roles"]
    ]
    if roles:
        lines.append(columns(("role", "version", "floor", "expires"), roles))
    operators = value["operators"]
    if operators is not None:
        keys = " ".join(shown(key)[:16] for key in operators["keys"]) or "none"
        lines.append(Text(f"operators of {shown(operators['tenant'])}: {keys}"))
    lines += [Text(f"problem: {shown(problem)}", style="red") for problem in value["problems"]]
    return Text("\n").join(lines)


def store_text(value: Mapping[str, Any]) -> Text:
    """Return the whole of ``inferctl store``."""
    lines = [Text(f"{human_bytes(value['free_bytes'])} free, the disk is {value['used_share']:.0%} full")]
    versions = [
        (f"{row['team']}/{row['name']}", row["version"], human_bytes(row["size_bytes"]), ", ".join(row["roles"]))
        for row in value["versions"]
    ]
    lines.append(columns(("model", "version", "size", "role"), versions) if versions else Text("no versions"))
    staging = []
    for row in value["staging"]:
        idle = "in progress" if row["in_progress"] else age(row["idle_s"])
        staging.append((row["digest"][:12], human_bytes(row["size_bytes"]), idle))
    if staging:
        lines.append(columns(("unfinished pull", "size", "idle for"), staging))
    if value["quarantined"]:
        rows = [(row["slot"], row["version"] or row["digest"][:12]) for row in value["quarantined"]]
        notes = [[row["reason"]] for row in value["quarantined"]]
        lines.append(columns(("quarantined", "version"), rows, notes, note_title="why"))
    if value["revoked"]:
        rows = [(f"{row['team']}/{row['name']}", row["version"]) for row in value["revoked"]]
        lines.append(columns(("revoked", "version"), rows, [[row["reason"]] for row in value["revoked"]]))
    return Text("\n").join(lines)


def refresh_text(value: Mapping[str, Any]) -> Text:
    """Return the whole of ``inferctl store refresh``."""
    lines = [Text(freshness_text(value))]
    rows, notes = [], []
    for row in value["models"]:
        channels = " ".join(f"{channel}={version}" for channel, version in row["channels"].items()) or "-"
        rows.append((f"{row['team']}/{row['name']}", row["serving"] or "-", row["newest"] or "-", channels))
        bad = row["status"] in ("revoked", "deprecated")
        notes.append([f"{row['serving']} is {row['status']}: {row['reason']}"] if bad else [])
    if rows:
        lines.append(columns(("model", "serves", "newest", "channels"), rows, notes))
    lines += [Text(f"{shown(model)}: {shown(reason)}") for model, reason in value["missing"].items()]
    lines += [Text(f"newly revoked: {shown(what)}", style="red") for what in value["newly_revoked"]]
    return Text("\n").join(lines)


def sideload_text(report: Mapping[str, Any]) -> Text:
    """Return the whole of ``inferctl sideload``."""
    newer = report["origin"] == "stick"
    lines = [
        Text(
            f"{shown(report['path'])}: newer than this box, signed {_date(report['issued'])}"
            if newer
            else f"{shown(report['path'])}: not newer than this box; only bytes are taken from it"
        )
    ]
    for row in report["slots"]:
        if "record" in row:
            lines.append(Text(end_text(row["record"])))
        elif row["deployment"]:
            lines.append(Text(f"{shown(row['slot'])}: deployment {shown(row['deployment'])} begun"))
        else:
            lines.append(Text(f"{shown(row['slot'])}: {shown(row['message'])}"))
    if not report["slots"]:
        lines.append(Text("this box has no model; name one: inferctl sideload PATH MODEL --team TEAM"))
    return Text("\n").join(lines)


def _went_well(row: Mapping[str, Any]) -> bool:
    if "record" in row:
        return bool(row["record"]["state"] == FINAL_GOOD)
    return bool(row["deployment"]) or row["code"] in ("nothing_new", "bundle_not_found", "queued")


def _refresh_end(attempt: Mapping[str, Any] | None) -> str:
    if attempt is None:
        return "never"
    end = f"{shown(attempt['code'])}: {shown(attempt['message'])}" if attempt["code"] else "verified"
    return f"{_date(attempt['at'])} from {shown(attempt['source'])}: {end}"


def _date(seconds: float) -> str:
    """Return a moment in UTC; clocks of boxes without a battery may say anything."""
    try:
        return time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(seconds))
    except (OverflowError, ValueError, OSError):
        return f"{seconds:.0f} s"
