"""inferctl selftest: the golden inputs of what serves, run now, with what was measured."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from typing import Any, Final

import click

from agent.cli_session import connected, json_option, print_json
from agent.cli_text import shown
from agent.client import Client
from agent.errors import AgentError

_ACTS: Final[Mapping[str, str]] = {
    "restart": "; the worker is replaced",
    "leave": "; the variant is left for the next one",
}


@click.command("selftest")
@click.argument("target", metavar="[MODEL[@VERSION]]", default="")
@click.option("--all", "everything", is_flag=True, help="Every model in memory; what sleeps is left alone.")
@json_option
@click.pass_obj
def selftest_command(socket_path: str, target: str, everything: bool, as_json: bool) -> None:
    """Run MODEL's golden inputs now, in each worker that serves it, and show what was measured.

    A model that sleeps is loaded for it. A worker that does not pass is replaced; a variant that does not pass again is
    left for the next one. The exit status is 1 if anything was not passed.

    \b
    Examples:
      inferctl selftest magika
      inferctl selftest magika@1.0.0
      inferctl selftest --all --json
    """
    if bool(target) == everything:
        raise click.UsageError("name a MODEL, or --all")
    values = []
    with connected(socket_path) as client:
        for value in _all(client) if everything else (client.call("selftest", _named(target)),):
            values.append(value)
            if not as_json:
                click.echo("\n".join(report_lines(value)))
    if as_json:
        print_json(values if everything else values[0])
    elif not values:
        click.echo("no model serves here")
    sys.exit(0 if all(value["ok"] for value in values) else 1)


def report_lines(value: Mapping[str, Any]) -> list[str]:
    """Return how one model's self-test ended, as lines for people."""
    name = f"{shown(value['model'])} {shown(value.get('version', ''))}".rstrip()
    if "golden" not in value:  # it could not be tested
        return [f"{name}: {'not tested' if value['ok'] else 'FAILED'}: {shown(value['message'])}"]
    workers = f", {value['workers']} workers" if value["workers"] > 1 else ""
    end = "ok" if value["ok"] else f"FAILED: {shown(value['message'])}{_ACTS.get(value['act'], '')}"
    lines = [f"{name} ({shown(value['variant'])}{workers}): {end}"]
    lines += [f"  {line}" for row in value["golden"] for line in _golden_lines(row)]
    if value["ok"] and not value["golden"]:
        lines.append("  the bundle has no golden inputs; the worker answers")
    return lines


def _all(client: Client) -> Iterator[dict[str, Any]]:
    """Test every version that serves, once however many slots hold it; what cannot be tested has not passed."""
    tested: set[tuple[str, str]] = set()
    for row in client.call("models"):
        named = _named(row["slot"])
        one = (named["model"], row["active"])
        if row["active"] and one not in tested:
            tested.add(one)
            try:
                yield client.call("selftest", {**named, "wake": False})
            except AgentError as error:
                yield {**named, "ok": False, "code": error.code, "message": str(error)}


def _named(target: str) -> dict[str, str]:
    model, _, version = target.partition("@")
    return {"model": model, "version": version}


def _golden_lines(row: Mapping[str, Any]) -> list[str]:
    end = "ok" if row["ok"] else "FAILED"
    lines = [f"{shown(row['id'])}: {end}, {row['ms']:g} ms (at most {row['ms_max']:g})"]
    for check in row["checks"]:
        found = "no number" if check["found"] is None else f"{check['found']:g}"
        held = "" if check["ok"] else ", FAILED"
        lines.append(f"  {shown(check['output'])} {shown(check['metric'])}: {found} ({shown(check['bound'])}){held}")
    return lines
