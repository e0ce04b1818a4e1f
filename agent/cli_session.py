"""What every verb of ``inferctl`` shares: the connection, changes that are followed to their end, and JSON.

Leaves out: which verbs there are, and tables.
"""

from __future__ import annotations

import json
import socket
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Final

import click

from agent.cli_progress import follow
from agent.cli_text import reason_text, shown
from agent.client import Client
from agent.errors import AgentError

FINAL_GOOD: Final = "confirmed"
_GOOD: Final = (FINAL_GOOD, "prepared")
_PINNED: Final = "pin"
_PIN_GONE: Final = ("canceled", "superseded")  # ends after which the pin that asked for it is there no more
_INTERRUPTED: Final = 130
_HINT_REFUSED: Final = (
    "The socket is open to root and the group inferd: sudo usermod -aG inferd $USER, then log in anew."
)
_HINT: Final = "Is it running (systemctl status inferd)? Another socket is named with --socket PATH."


def json_option(function: Callable[..., None]) -> Callable[..., None]:
    """Give a verb the flag ``--json``."""
    return click.option("--json", "as_json", is_flag=True, help="Print JSON instead of a table.")(function)


def change(socket_path: str, verb: str, args: dict[str, Any], *, no_wait: bool, as_json: bool) -> None:
    """Ask for a deployment, follow it to its end, and leave with its exit status."""
    with connected(socket_path) as client:
        begun = client.call(verb, args)
        if no_wait:
            if as_json:
                print_json(begun)
            else:
                click.echo(f"deployment {shown(begun['deployment'])} begun")
            return
        try:
            record = follow(client, begun["deployment"], as_json=as_json)
        except KeyboardInterrupt:
            click.echo(f"deployment {shown(begun['deployment'])} goes on; see inferctl deployments", err=True)
            sys.exit(_INTERRUPTED)
    good = record["state"] in _GOOD
    if not as_json:  # whose last line said it
        click.echo(end_text(record), err=not good)
        if not good and record["source"] == _PINNED and record["state"] not in _PIN_GONE:
            click.echo(_pin_text(shown(record["slot"])), err=True)
    sys.exit(0 if good else 1)


def end_text(record: dict[str, Any]) -> str:
    """Return how a deployment ended, and which version a channel stood for."""
    slot, version, reason = shown(record["slot"]), shown(record["version"]), shown(reason_text(record))
    if record["state"] == FINAL_GOOD:
        channel = "" if record["wanted"] else f", the newest of channel {shown(record['channel'])}"
        return f"{slot} serves {version}{channel} ({reason or 'confirmed'})"
    tried = version or shown(record["wanted"]) or f"channel {shown(record['channel'])}"
    return f"{slot} {tried}: {shown(record['state'])}: {reason}"


def _pin_text(slot: str) -> str:
    """Return what is to be known of a pin whose deployment did not end well."""
    if "@" in slot:
        return f"It stays wanted beside the default; inferctl remove {slot} forgets it."
    return f"It stays pinned on this box; inferctl unpin {slot} gives it back to the fleet and the configuration."


@contextmanager
def connected(socket_path: str) -> Iterator[Client]:
    """A client as long as the body runs; an error is printed with its code, and the process leaves with 1 or 3."""
    _require_daemon(socket_path)
    try:
        with Client(socket_path) as client:
            yield client
    except AgentError as error:
        click.echo(f"inferctl: {error.code}: {shown(error)}", err=True)
        sys.exit(1)


def _require_daemon(socket_path: str) -> None:
    """Leave with a hint when nobody answers at the socket: a person should not wait for the client's patience."""
    try:
        with socket.socket(socket.AF_UNIX) as probe:
            probe.connect(socket_path)
    except OSError as error:
        click.echo(
            f"inferctl: cannot reach the daemon at {socket_path}: {error.strerror or error}\n"
            f"{_HINT_REFUSED if isinstance(error, PermissionError) else _HINT}",
            err=True,
        )
        sys.exit(3)


def print_json(value: Any) -> None:
    """Print for programs."""
    click.echo(json.dumps(value, indent=1))
