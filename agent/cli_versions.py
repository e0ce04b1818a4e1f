"""``inferctl default``, ``remove`` and ``scale``: which of a model's versions answers, which are here, with what."""

from __future__ import annotations

import sys
from typing import Any, Final

import click
from rich.console import Console

from agent.cli_session import change, connected, json_option, print_json
from agent.cli_text import shown
from agent.client import Client
from agent.errors import NotFoundError

_WAIT_S: Final = 20.0


@click.command()
@click.argument("model")
@click.argument("version")
@click.option("--keep", is_flag=True, help="Keep the version that was the default until now beside it.")
@click.option("--allow-incompatible", is_flag=True, help="Although it takes, gives or means something else.")
@click.option("--no-wait", is_flag=True, help="Return at once instead of following the change.")
@json_option
@click.pass_obj
def default(
    socket_path: str, model: str, version: str, keep: bool, allow_incompatible: bool, no_wait: bool, as_json: bool
) -> None:
    """Let VERSION answer the requests to MODEL that name no version, and pin it.

    VERSION is on this box and was confirmed before; one that is loaded beside the default is not loaded again. A
    version that is not here, or was never confirmed, is for ``inferctl deploy MODEL@VERSION``.

    \b
    Examples:
      inferctl default magika 2.0.0
      inferctl default magika 1.0.0 --keep
    """
    args = {"model": model, "version": version, "keep": keep, "allow_incompatible": allow_incompatible}
    change(socket_path, "default", args, no_wait=no_wait, as_json=as_json)


@click.command()
@click.argument("target", metavar="MODEL[@VERSION]")
@click.option("--no-wait", is_flag=True, help="Return at once instead of waiting until it is gone.")
@json_option
@click.pass_obj
def remove(socket_path: str, target: str, no_wait: bool, as_json: bool) -> None:
    """Stop keeping MODEL@VERSION beside MODEL's default, or let the whole of MODEL go.

    What it holds is answered first, and what is being deployed to it is given up. Its pins and what the fleet wanted of
    it are forgotten. Refused for what the configuration file names, and for the default as long as MODEL is here.

    \b
    Examples:
      inferctl remove magika@1.0.0
      inferctl remove magika
    """
    model, _, version = target.partition("@")
    args: dict[str, Any] = {"model": model, "version": version, "wait_s": 0.0 if no_wait else _WAIT_S}
    with connected(socket_path) as client, Console(stderr=True).status(f"removing {shown(target)}"):
        value = client.call("remove", args)
        while not value["removed"] and not no_wait:
            value = _ask_again(client, args, value)
    if as_json:
        print_json(value)
    elif value["removed"]:
        click.echo(f"removed {', '.join(map(shown, value['slots']))}")
    else:
        click.echo(f"{', '.join(map(shown, value['slots']))} will be gone once what is under way has ended")
    sys.exit(0)


@click.command()
@click.argument("model")
@click.option("--min", "least", type=click.IntRange(1, 64), help="So many workers at any time; default: 1.")
@click.option(
    "--max", "most", type=click.IntRange(1, 64), help="So many at most, as requests queue; default: as --min."
)
@click.option("--reset", is_flag=True, help="As configured again.")
@json_option
@click.pass_obj
def scale(socket_path: str, model: str, least: int | None, most: int | None, reset: bool, as_json: bool) -> None:
    """Let MODEL have more workers, or fewer: each of its versions, from now on and after a restart, until --reset.

    New workers start at once as far as memory allows; those that are too many leave once they owe nothing.

    \b
    Examples:
      inferctl scale magika --min 2 --max 4
      inferctl scale magika --reset
    """
    if reset == (least is not None or most is not None):
        raise click.UsageError("name --min, --max or both, or --reset alone")
    bounds = {name: bound for name, bound in (("min", least), ("max", most)) if bound is not None}
    with connected(socket_path) as client:
        value = client.call("scale", {"model": model, "reset": reset, **bounds})
    if as_json:
        print_json(value)
        return
    now = ", ".join(f"{shown(version)} has {count}" for version, count in value["workers"].items()) or "none is loaded"
    said = "as configured" if value["configured"] else "until inferctl scale --reset"
    least, most = value["min"], value["max"]
    workers = f"{least} to {most} workers" if most > least else f"{least} worker{'s' * (least > 1)}"
    click.echo(f"{shown(model)}: {workers}, {said}; now {now}")


def _ask_again(client: Client, args: dict[str, Any], before: dict[str, Any]) -> dict[str, Any]:
    """Return how far the removal is, which may have ended between two questions."""
    try:
        again: dict[str, Any] = client.call("remove", args)
    except NotFoundError:
        return {**before, "removed": True}
    return again
