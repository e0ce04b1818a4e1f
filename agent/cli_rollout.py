"""How a deployment meets its first requests, on the command line: the options that ask for it, and what it showed.

The options are the same for one box (``inferctl deploy``) and for the fleet (``inferhub deploy``).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from functools import wraps
from typing import Any, Final

import click

from agent.cli_progress import step_text
from agent.cli_session import connected, json_option, print_json
from agent.cli_text import duration, reason_text, shown

_NONE: Final = "none"
_FOUND: Final = (
    ("good", "{} good"), ("failed", "{} failed"), ("p95_ms", "p95 {:.1f} ms"),
    ("before_p95_ms", "p95 before {:.1f} ms"), ("compared", "{} copies"), ("agreement", "{:.1%} agree"),
    ("copies_p95_ms", "copies' p95 {:.1f} ms"), ("originals_p95_ms", "originals' {:.1f} ms"),
    ("delta_p95_ms", "delta {:+.1f} ms"),
)  # fmt: skip
# What is to be said of a clock that no time server sets; ``record.clock_quality``.
_CLOCKS: Final = {
    "rtc": "by a clock that no time server sets",
    "floor": "by a clock that is wrong: it is before the newest signature",
    "none": "by a clock that was never set",
}


def rollout_options(verb: Callable[..., None]) -> Callable[..., None]:
    """Give a verb the options of a rollout; it gets them as the map ``rollout``, ``None`` if none is used."""
    options = (
        click.option(
            "--canary",
            callback=_percentages,
            metavar="5,25,50",
            help="Percent of the routing keys that the new version answers before it serves all; none: all at once.",
        ),
        click.option(
            "--shadow",
            type=float,
            metavar="PERCENT",
            help="Copy so many of the requests to the new version first; its answers are compared and dropped.",
        ),
        click.option("--step-s", type=float, metavar="S", help="Hold each of these at least so long."),
        click.option("--calls-min", type=int, metavar="N", help="And until so many good answers, or comparisons."),
        click.option("--limit-s", type=float, metavar="S", help="Give the version up without them after so long."),
        click.option(
            "--agreement", "agreement_min", type=float, metavar="SHARE", help="Of the copies that must agree, 0..1."
        ),
    )
    names = ("canary", "shadow", "step_s", "calls_min", "limit_s", "agreement_min")

    @wraps(verb)
    def gathered(*arguments: Any, **values: Any) -> None:
        asked = {name: value for name in names if (value := values.pop(name)) is not None}
        verb(*arguments, rollout=asked or None, **values)

    for option in reversed(options):
        option(gathered)
    return gathered


@click.command()
@click.argument("deployment_id", metavar="ID")
@json_option
@click.pass_obj
def deployment(socket_path: str, deployment_id: str, as_json: bool) -> None:
    """Show one deployment: where it stands and why, and what each share of a canary and its probation have shown.

    Work that was begun more than once is counted, and a date that its clock does not vouch for says so.

    The ids are in ``inferctl deployments`` and in events.

    \b
    Example:
      inferctl deployment pin-0123456789ab
    """
    with connected(socket_path) as client:
        record = client.call("deployment", {"id": deployment_id})
    if as_json:
        print_json(record)
        return
    click.echo("\n".join(deployment_lines(record)))


def deployment_lines(record: Mapping[str, Any]) -> list[str]:
    """Return a deployment in words."""
    when = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(record["updated"]))
    if clock := _CLOCKS.get(record["clock_quality"]):
        when += f" ({clock})"
    lines = [step_text(dict(record)), f"since {when}, asked for by {shown(record['source'])} as {shown(record['id'])}"]
    if record["previous"]:
        lines.append(f"served before: {shown(record['previous'])}")
    if record["offline_s"]:
        lines.append(f"the store was out of reach for {duration(record['offline_s'])} of waiting")
    if again := [f"{state} {count} times" for state, count in record["attempts"].items() if count > 1]:
        lines.append(f"begun more than once: {shown(', '.join(again))}")
    if record["boot_id"]:
        lines.append(f"last changed in boot {shown(record['boot_id'])}")
    if reason := reason_text(record):
        lines.append(shown(reason))
    for evidence in record.get("evidence") or ():
        lines += _evidence_lines(evidence)
        if evidence.get("difference"):
            lines.append(f"    last difference: {shown(evidence['difference'])}")
    if trying := record.get("trying"):
        agreement = trying["agreement"]
        agrees = f", {agreement:.1%} of {trying['compared']} copies agree" if agreement is not None else ""
        lines.append(f"now: {trying['requests']} requests answered by it{agrees}")
    return lines


def _percentages(_context: click.Context, _option: click.Parameter, value: str | None) -> tuple[float, ...] | None:
    """Return the percentages; whether they grow is checked where the wish enters."""
    if value is None or value == _NONE:
        return None if value is None else ()
    try:
        return tuple(float(part) for part in value.split(","))
    except ValueError as error:
        raise click.BadParameter(f"{value!r}: percentages such as 5,25,50, or {_NONE}") from error


def _evidence_lines(evidence: Mapping[str, Any]) -> list[str]:
    share = f"at {evidence['percent']:g} %" if evidence["percent"] else "copies only"
    found = [form.format(evidence[name]) for name, form in _FOUND if evidence.get(name) is not None]
    verdict = shown(evidence.get("verdict") or "no verdict")
    return [f"  {share} for {evidence['elapsed_s']:g} s: {verdict}", f"    {', '.join(found)}"]
