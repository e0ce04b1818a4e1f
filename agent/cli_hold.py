"""``inferctl hold``: keep a model's version as it is while a command runs."""

from __future__ import annotations

import json
import signal
import subprocess
import sys

import click

from agent.cli_session import connected, json_option
from agent.cli_text import shown
from agent.client.messages import Hold


@click.command(context_settings={"ignore_unknown_options": True})
@click.argument("model")
@click.argument("command", nargs=-1, type=click.UNPROCESSED)
@click.option("--reason", default="", help="Shown to whoever wonders why a deployment waits.")
@json_option
@click.pass_obj
def hold(socket_path: str, model: str, command: tuple[str, ...], reason: str, as_json: bool) -> None:
    """Load no new version of MODEL (``*``: of any model) while COMMAND runs, or until Ctrl-C if there is none.

    A deployment is fetched and verified meanwhile, then waits and names this hold as the reason, until [deploy]
    force_after_s or hold_limit_s have passed. What is past that point already, or rolls back, goes on. The exit status
    is the command's.

    \b
    Examples:
      inferctl hold magika -- ./run-line-3.sh
      inferctl hold '*' --reason "stocktaking"
    """
    with connected(socket_path) as client, client.hold(model, reason=reason) as held:
        _tell(held, as_json=as_json)
        if command:
            sys.exit(_run(command))
        try:
            signal.pause()
        except KeyboardInterrupt:
            return


def _tell(held: Hold, *, as_json: bool) -> None:
    if as_json:
        click.echo(json.dumps({"model": held.model, "under_way": held.under_way}))
        return
    click.echo(f"{shown(held.model)} is held", err=True)
    for row in held.under_way:
        click.echo(
            f"{shown(row['slot'])} {shown(row['version'])}: {shown(row['state'])} already, and goes on", err=True
        )


def _run(command: tuple[str, ...]) -> int:
    try:
        status = subprocess.run(command, check=False).returncode
    except OSError as error:
        click.echo(f"inferctl: {shown(command[0])}: {error.strerror}", err=True)
        return 127
    return status if status >= 0 else 128 - status
