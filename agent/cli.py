"""inferctl: the box's command line. Talks to the daemon's frame socket, never to its files.

Every verb has a table for people and ``--json`` for programs. Exit codes: 0 done, 1 refused or failed, 2 bad usage,
3 the daemon cannot be reached.
"""

from __future__ import annotations

import json
import socket
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Final

import click
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, SpinnerColumn, TextColumn
from rich.table import Table

from agent import __version__
from agent.client import Client
from agent.errors import AgentError

_SOCKET: Final = "/run/inferd/inferd.sock"
_FINAL_GOOD: Final = "confirmed"
_POLL_S: Final = 20.0


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--socket", "socket_path", default=_SOCKET, show_default=True, help="The daemon's frame socket.")
@click.version_option(__version__, prog_name="inferctl")
@click.pass_context
def main(context: click.Context, socket_path: str) -> None:
    """Look after the inferd daemon of this box.

    \b
    Examples:
      inferctl status
      inferctl infer magika README.md
      inferctl deploy magika@2.0.0
      inferctl rollback magika
      inferctl events --follow
    """
    context.obj = socket_path


def _json_option(function: Callable[..., None]) -> Callable[..., None]:
    return click.option("--json", "as_json", is_flag=True, help="Print JSON instead of a table.")(function)


@main.command()
@_json_option
@click.pass_obj
def status(socket_path: str, as_json: bool) -> None:
    """Show the box, its models, the telemetry link and the memory of every process."""
    with _client(socket_path) as client:
        value = client.call("status")
    if as_json:
        _print_json(value)
        return
    console = Console(soft_wrap=True, highlight=False)
    agent, device, link = value["agent"], value["device"], value["telemetry"]
    gpus = ", ".join(device["gpus"]) or f"none ({device['gpu_reason']})"
    console.print(
        f"[bold]{device['id']}[/] inferd {agent['version']} up {_duration(agent['uptime_s'])}, pid {agent['pid']}, "
        f"profile {device['profile']}, {device['cores']} cores, {device['memory_bytes'] / 2**30:.1f} GiB, GPU: {gpus}"
    )
    console.print(f"telemetry: {_link_text(link)}")
    _print_models(console, value["models"])
    processes = Table("process", "pid", "PSS", box=None, header_style="bold")
    for row in value["processes"]:
        processes.add_row(row["role"], str(row["pid"]), f"{row['pss_bytes'] / 1e6:.1f} MB")
    console.print(processes)


@main.command()
@_json_option
@click.pass_obj
def models(socket_path: str, as_json: bool) -> None:
    """List the models of this box: what serves, what is wanted and by whom, inputs and outputs."""
    with _client(socket_path) as client:
        rows = client.call("models")
    if as_json:
        _print_json(rows)
        return
    table = Table(
        *("model", "ready", "active", "previous", "wanted", "source", "inputs", "outputs"),
        box=None,
        header_style="bold",
    )
    for row in rows:
        metadata = row["metadata"] or {"inputs": [], "outputs": []}
        table.add_row(
            row["slot"],
            "yes" if row["ready"] else f"no: {row['reason']}",
            (row["active"] or "-") + (" (on trial)" if row["trial"] else ""),
            row["previous"] or "-",
            row["wanted"] or "-",
            row["source"] or "-",
            _tensors_text(metadata["inputs"]),
            _tensors_text(metadata["outputs"]),
        )
    Console().print(table)


@main.command()
@click.argument("model")
@click.argument("file", type=click.File("rb"))
@click.option("--version", "version", help="A certain version; default: the active one.")
@click.option("--content-type", default="application/octet-stream", show_default=True)
@click.option("--deadline-ms", type=int, help="Give up after so many milliseconds, queue time included.")
@_json_option
@click.pass_obj
def infer(
    socket_path: str,
    model: str,
    file: Any,
    version: str | None,
    content_type: str,
    deadline_ms: int | None,
    as_json: bool,
) -> None:
    """Send FILE (``-`` = standard input) to MODEL as a raw request and print the answer.

    \b
    Example:
      inferctl infer magika /bin/ls
    """
    with _client(socket_path) as client:
        started = time.perf_counter()
        result = client.predict(model, file.read(), content_type=content_type, version=version, deadline_ms=deadline_ms)
        elapsed_ms = (time.perf_counter() - started) * 1e3
    answer = result.json()
    if as_json:
        _print_json({"model": result.model, "version": result.version, "variant": result.variant, "answer": answer})
        return
    Console().print_json(json.dumps(answer))
    click.echo(f"{result.model} {result.version} ({result.variant}), {elapsed_ms:.1f} ms", err=True)


@main.command()
@click.argument("target", metavar="MODEL[@VERSION]")
@click.option("--team", help="Who publishes it; only needed for a model that is new on this box.")
@click.option("--channel", default="stable", show_default=True, help="Followed when no version is named.")
@click.option("--force", is_flag=True, help="Also a version that failed on this box before.")
@click.option("--no-wait", is_flag=True, help="Return at once instead of following the deployment.")
@_json_option
@click.pass_obj
def deploy(
    socket_path: str, target: str, team: str | None, channel: str, force: bool, no_wait: bool, as_json: bool
) -> None:
    """Pin MODEL to a version on this box: fetch, verify, self-test, switch over, watch, confirm or roll back.

    The pin stands against fleet commands until ``inferctl unpin MODEL``.

    \b
    Examples:
      inferctl deploy magika@2.0.0
      inferctl deploy detector --team vision --channel canary
    """
    model, _, version = target.partition("@")
    args = {"model": model, "version": version, "team": team, "channel": channel, "force": force}
    _change(socket_path, "deploy", args, no_wait=no_wait, as_json=as_json)


@main.command()
@click.argument("model")
@click.option("--no-wait", is_flag=True, help="Return at once instead of following the rollback.")
@_json_option
@click.pass_obj
def rollback(socket_path: str, model: str, no_wait: bool, as_json: bool) -> None:
    """Return MODEL to the version that served before, from disk, without network, and pin it there."""
    _change(socket_path, "rollback", {"model": model}, no_wait=no_wait, as_json=as_json)


@main.command()
@click.argument("model")
@click.pass_obj
def unpin(socket_path: str, model: str) -> None:
    """Give MODEL back to the fleet and the configuration file."""
    with _client(socket_path) as client:
        client.call("unpin", {"model": model})
    click.echo(f"{model} follows the fleet and the configuration again")


@main.command()
@click.option("--limit", default=20, show_default=True)
@_json_option
@click.pass_obj
def deployments(socket_path: str, limit: int, as_json: bool) -> None:
    """Show the newest deployments with their ends and reasons."""
    with _client(socket_path) as client:
        rows = client.call("deployments", {"limit": limit})
    if as_json:
        _print_json(rows)
        return
    table = Table("when", "model", "version", "from", "state", "source", "reason", box=None, header_style="bold")
    for row in rows:
        when = time.strftime("%m-%d %H:%M:%S", time.localtime(row["updated"]))
        reason = f"{row['code']}: {row['message']}" if row["code"] else row["message"]
        version = row["version"] or row["wanted"] or f"({row['channel']})"
        table.add_row(
            when, row["slot"], version, row["previous"] or "-", row["state"], reason, row["source"], row["id"]
        )
    Console().print(table)


@main.command()
@click.argument("model")
@_json_option
@click.pass_obj
def selftest(socket_path: str, model: str, as_json: bool) -> None:
    """Run MODEL's golden inputs now, in the worker that serves."""
    with _client(socket_path) as client:
        value = client.call("selftest", {"model": model})
    if as_json:
        _print_json(value)
    else:
        for golden in value.get("golden", []):
            click.echo(f"{golden.get('id')}: {'ok' if golden.get('ok') else golden.get('reason', 'failed')}")
    sys.exit(0 if value.get("ok") else 1)


@main.command()
@click.option("--follow", "-f", is_flag=True, help="Go on printing events as they happen.")
@_json_option
@click.pass_obj
def events(socket_path: str, follow: bool, as_json: bool) -> None:
    """Show what happened since the daemon started."""
    after = 0
    with _client(socket_path) as client:
        while True:
            rows = client.call("events", {"after": after, "wait_s": _POLL_S if follow and after else 0})
            for row in rows:
                after = max(after, row["number"])
                click.echo(json.dumps(row) if as_json else _event_text(row))
            if not follow:
                return
            after = max(after, 1)


def _change(socket_path: str, verb: str, args: dict[str, Any], *, no_wait: bool, as_json: bool) -> None:
    with _client(socket_path) as client:
        begun = client.call(verb, args)
        if no_wait:
            _print_json(begun) if as_json else click.echo(f"deployment {begun['deployment']} begun")
            return
        record = _follow(client, begun["deployment"], quiet=as_json)
    if as_json:
        _print_json(record)
    elif record["state"] == _FINAL_GOOD:
        click.echo(f"{record['slot']} serves {record['version']} ({record['message'] or 'confirmed'})")
    else:
        reason = f"{record['code']}: {record['message']}" if record["code"] else record["message"]
        click.echo(f"{record['slot']}: {record['state']}: {reason}", err=True)
    sys.exit(0 if record["state"] == _FINAL_GOOD else 1)


def _follow(client: Client, deployment_id: str, *, quiet: bool) -> dict[str, Any]:
    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), DownloadColumn())
    with Progress(*columns, console=Console(stderr=True), disable=quiet, transient=True) as progress:
        task = progress.add_task("begun", total=None)
        args: dict[str, Any] = {"id": deployment_id, "wait_s": _POLL_S}
        while True:
            record: dict[str, Any] = client.call("deployment", args)
            total = record["bytes_total"] or None
            progress.update(
                task,
                description=f"{record['slot']} {record['version']}: {record['state']}",
                completed=record["bytes_done"],
                total=total,
            )
            if record["final"]:
                return record
            args |= {"after_step": record["step"], "after_bytes": record["bytes_done"]}


@contextmanager
def _client(socket_path: str) -> Iterator[Client]:
    _require_daemon(socket_path)
    try:
        with Client(socket_path) as client:
            yield client
    except AgentError as error:
        click.echo(f"inferctl: {error.code}: {error}", err=True)
        sys.exit(1)


def _require_daemon(socket_path: str) -> None:
    """Leave with a hint when nobody answers at the socket: a person should not wait for the client's patience."""
    try:
        with socket.socket(socket.AF_UNIX) as probe:
            probe.connect(socket_path)
    except OSError as error:
        click.echo(
            f"inferctl: cannot reach the daemon at {socket_path}: {error.strerror or error}\n"
            "Is it running (systemctl status inferd)? Another socket is named with --socket PATH.",
            err=True,
        )
        sys.exit(3)


def _print_models(console: Console, rows: list[dict[str, Any]]) -> None:
    for row in rows:
        if "version" not in row:
            console.print(f"[bold]{row['model']}[/]: not ready: {row['reason']}")
            continue
        latency, answers = row["latency_s"], row["answers"]
        state = "[green]ready[/]" if row["ready"] else f"[red]not ready: {row['reason']}[/]"
        console.print(
            f"[bold]{row['model']} {row['version']}[/] {state}, {row['variant']} on {row['device']}, "
            f"sandbox {(row['sandbox'] or {}).get('level', 'unknown')}; {answers['good']} good answers, "
            f"{answers['faults']} faults" + _latency_text(latency)
        )
        for skip in row["fallbacks"]:
            console.print(f"  not {skip['variant']}: {skip['reason']}")


def _latency_text(latency: dict[str, float]) -> str:
    if not latency["p50"]:
        return ""
    return f"; p50 ≤ {latency['p50'] * 1e3:g} ms, p99 ≤ {latency['p99'] * 1e3:g} ms"


def _tensors_text(tensors: list[dict[str, Any]]) -> str:
    return ", ".join(f"{tensor['name']} {tensor['datatype']}{tensor['shape']}" for tensor in tensors) or "-"


def _link_text(link: dict[str, Any]) -> str:
    if not link.get("configured", True):
        return "no broker configured"
    state = "connected" if link.get("connected") else f"offline ({link.get('reason') or 'not connected yet'})"
    return f"{state}, {link.get('outbox_rows', 0)} rows wait in the outbox"


def _event_text(row: dict[str, Any]) -> str:
    when = time.strftime("%H:%M:%S", time.localtime(row["wall_s"]))
    fields = " ".join(f"{name}={value}" for name, value in row["data"].items())
    return f"{when} {row['severity']:7} {row['type']:28} {fields}"


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else (f"{minutes} min {seconds} s" if minutes else f"{seconds} s")


def _print_json(value: Any) -> None:
    click.echo(json.dumps(value, indent=1))


if __name__ == "__main__":
    main()
