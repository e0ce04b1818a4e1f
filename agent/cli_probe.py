"""inferctl probe: what this machine is and which profile fits it, read here and now, with or without a daemon."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping
from typing import Any, Final

import click
import msgspec
from rich.text import Text

from agent.cli_text import columns, print_text, shown
from agent.errors import AgentError
from agent.probe import described, probe, readings
from agent.profile import Choice, Hardware, choose, load_profiles

_GIB: Final = 2**30


@click.command("probe")
@click.option("--profile", "name", default="auto", show_default=True, help="As [device] profile names it.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of a table.")
def probe_command(name: str, as_json: bool) -> None:
    """Show this machine's CPU, memory, limits and GPUs, and why each profile fits it or not.

    Asks the machine itself, not the daemon, so it works before the daemon does.

    \b
    Examples:
      inferctl probe
      inferctl probe --profile cuda
      inferctl probe --json | jq .profile.name
    """
    hardware = probe()
    gpus = described(hardware, readings(hardware))
    try:
        choice = choose(name, hardware, load_profiles())
    except AgentError as error:
        click.echo(f"inferctl: {error.code}: {shown(error)}", err=True)
        sys.exit(1)
    if as_json:
        click.echo(json.dumps(report(hardware, choice, gpus), indent=1))
    else:
        print_text(probe_text(hardware, choice, gpus))


def report(hardware: Hardware, choice: Choice, gpus: list[dict[str, Any]]) -> dict[str, Any]:
    """Return everything as plain values."""
    value: dict[str, Any] = msgspec.to_builtins(hardware)
    return {
        "hardware": {**value, "gpus": gpus, "fingerprint": hardware.fingerprint()},
        "profile": {"name": choice.profile.name, "reason": choice.reason},
        "profiles": [
            {**msgspec.to_builtins(seen), "matches": not seen.failed, "chosen": seen.name == choice.profile.name}
            for seen in choice.considered
        ],
    }


def probe_text(hardware: Hardware, choice: Choice, gpus: list[dict[str, Any]]) -> Text:
    """Return the same for people."""
    facts = "\n".join(f"{title:<10}{shown(value)}" for title, value in _facts(hardware))
    rows = [
        ("chosen" if seen.name == choice.profile.name else ("no" if seen.failed else "fits"), seen.name, seen.rank)
        for seen in choice.considered
    ]
    notes = [[seen.description, *(f"not here: {failed}" for failed in seen.failed)] for seen in choice.considered]
    return Text("\n").join(
        [
            Text(facts),
            *_gpu_lines(hardware, gpus),
            Text.assemble("profile   ", (shown(choice.profile.name), "bold"), f": {shown(choice.reason)}"),
            Text(""),
            columns(("fits", "profile", "rank"), rows, notes),
        ]
    )


def _facts(hardware: Hardware) -> Iterator[tuple[str, str]]:
    yield "cpu", f"{hardware.cpu_model or 'unknown'} ({hardware.arch})"
    quota = f", quota {hardware.cpu_quota:g}" if hardware.cpu_quota is not None else ""
    yield "cores", f"{hardware.cores} may be used of {hardware.cores_present}{quota}"
    limit = ", limited by its control group" if hardware.memory_limit_bytes is not None else ""
    present = f"{hardware.memory_present_bytes / _GIB:.1f}"
    yield "memory", f"{hardware.memory_bytes / _GIB:.1f} GiB may be used of {present}{limit}"
    yield "features", ", ".join(hardware.cpu_features) or "none known"
    yield "int8", f"quick: {', '.join(hardware.int8)}" if hardware.int8 else "no dot product instructions"
    if hardware.board:
        yield "board", f"{hardware.board}{f', L4T {hardware.l4t}' if hardware.l4t else ''}"
    if hardware.container:
        yield "container", hardware.container


def _gpu_lines(hardware: Hardware, gpus: list[dict[str, Any]]) -> list[Text]:
    if hardware.driver:
        cuda = f", CUDA up to {hardware.cuda}" if hardware.cuda else ""
        lines = [Text(f"driver    {shown(hardware.driver)}{shown(cuda)}")]
    else:
        lines = []
    for gpu in gpus:
        total = f"{gpu['memory_bytes'] / _GIB:.1f} GiB{' shared with the CPU' if gpu['integrated'] else ''}"
        lines.append(
            Text(f"gpu {gpu['index']:<6}{shown(gpu['name'])}, compute capability {gpu['compute']}, {total}{_now(gpu)}")
        )
    if hardware.gpu_reason:
        lines.append(Text(f"gpu       {'none' if not gpus else 'another'}: {shown(hardware.gpu_reason)}"))
    return lines


def _now(gpu: Mapping[str, Any]) -> str:
    """Return how a GPU is doing."""
    if gpu["fault"]:
        return f"; no reading: {shown(gpu['fault'])}"
    reading = gpu["reading"] or {}
    words = [
        f"{reading['memory_free_bytes'] / _GIB:.1f} GiB free" if reading.get("memory_free_bytes") is not None else "",
        f"{reading['temperature_c']} °C" if reading.get("temperature_c") is not None else "",
        f"{reading['power_w']:.0f} W" if reading.get("power_w") is not None else "",
        f"{reading['utilisation_percent']} % busy" if reading.get("utilisation_percent") is not None else "",
    ]
    return "".join(f", {word}" for word in words if word)
