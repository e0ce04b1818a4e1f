"""inferctl: the box's command line. Talks to the daemon's frame socket, never to its files.

Every verb has a table for people and ``--json`` for programs. Exit codes: 0 done, 1 refused or failed, 2 bad usage,
3 the daemon cannot be reached.
"""

from __future__ import annotations

import base64
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

from agent import __version__
from agent.cli_text import (
    deployments_text,
    event_text,
    models_text,
    print_text,
    reason_text,
    residency_text,
    shown,
    status_text,
)
from agent.client import Client
from agent.client.messages import Part, Result
from agent.errors import AgentError

_SOCKET: Final = "/run/inferd/inferd.sock"
_FINAL_GOOD: Final = "confirmed"
_POLL_S: Final = 20.0
_HISTORY_ROWS: Final = 100  # looked through for why a model is not ready
_INTERRUPTED: Final = 130
_HINT_REFUSED: Final = (
    "The socket is open to root and the group inferd: sudo usermod -aG inferd $USER, then log in anew."
)
_HINT: Final = "Is it running (systemctl status inferd)? Another socket is named with --socket PATH."


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
        print_text(status_text(value, _failures(client, value)))


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
    print_text(models_text(rows))


@main.command()
@click.argument("model")
@click.argument("file", type=click.File("rb"))
@click.option("--version", "version", help="A certain version; default: the active one.")
@click.option("--content-type", default="application/octet-stream", show_default=True)
@click.option("--deadline-ms", type=int, help="Give up after so many milliseconds, queue time included.")
@click.option("--stream", is_flag=True, help="Print each part of the answer as it comes.")
@_json_option
@click.pass_obj
def infer(
    socket_path: str,
    model: str,
    file: Any,
    version: str | None,
    content_type: str,
    deadline_ms: int | None,
    stream: bool,
    as_json: bool,
) -> None:
    """Send FILE (``-`` = standard input) to MODEL as a raw request and print the answer.

    \b
    Example:
      inferctl infer magika /bin/ls
      echo "Once upon a time" | inferctl infer --stream writer -
    """
    if stream:
        with _client(socket_path) as client:
            _print_parts(
                client.stream(model, file.read(), content_type, version=version, deadline_ms=deadline_ms), as_json
            )
        return
    with _client(socket_path) as client:
        started = time.perf_counter()
        result = client.predict(model, file.read(), content_type=content_type, version=version, deadline_ms=deadline_ms)
        elapsed_ms = (time.perf_counter() - started) * 1e3
    _print_answer(result, as_json=as_json)
    if not as_json:
        name = f"{shown(result.model)} {shown(result.version)} ({shown(result.variant)})"
        click.echo(f"{name}, {elapsed_ms:.1f} ms", err=True)


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
    """Return MODEL to the version that served before, from disk, without network, and pin it there.

    A second rollback goes forward again: the version that was left is then the one that served before.
    """
    _change(socket_path, "rollback", {"model": model}, no_wait=no_wait, as_json=as_json)


@main.command()
@click.argument("model")
@click.pass_obj
def unpin(socket_path: str, model: str) -> None:
    """Give MODEL back to the fleet and the configuration file."""
    with _client(socket_path) as client:
        client.call("unpin", {"model": model})
    click.echo(f"{shown(model)} follows the fleet and the configuration again")


@main.command()
@click.argument("model")
@_json_option
@click.pass_obj
def load(socket_path: str, model: str, as_json: bool) -> None:
    """Load MODEL into memory now, as its next request would.

    \b
    Example:
      inferctl load detector
    """
    _move(socket_path, "load", model, as_json=as_json)


@main.command()
@click.argument("model")
@_json_option
@click.pass_obj
def unload(socket_path: str, model: str, as_json: bool) -> None:
    """Give MODEL's memory back now; what it holds is answered, and its next request loads it again.

    Refused for a model that is pinned in the configuration, and while one of its versions is on trial.

    \b
    Example:
      inferctl unload detector
    """
    _move(socket_path, "unload", model, as_json=as_json)


def _move(socket_path: str, verb: str, model: str, *, as_json: bool) -> None:
    with _client(socket_path) as client, Console(stderr=True).status(f"{verb}ing {shown(model)}"):
        value = client.call(verb, {"model": model})
    if as_json:
        _print_json(value)
        return
    click.echo(f"{shown(model)}: {residency_text(value)}")


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
    print_text(deployments_text(rows))


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
            end = "ok" if golden.get("ok") else golden.get("reason", "failed")
            click.echo(f"{shown(golden.get('id'))}: {shown(end)}")
    sys.exit(0 if value.get("ok") else 1)


@main.command()
@click.option("--follow", "-f", is_flag=True, help="Go on printing events as they happen.")
@_json_option
@click.pass_obj
def events(socket_path: str, follow: bool, as_json: bool) -> None:
    """Show what happened since the daemon started; with --follow until Ctrl-C."""
    with _client(socket_path) as client:
        try:
            _print_events(client, follow=follow, as_json=as_json)
        except KeyboardInterrupt:
            if not follow:
                raise


def _failures(client: Client, status: dict[str, Any]) -> dict[str, str]:
    """Return how the newest deployment of each model that is not ready ended, unless it ended well."""
    ready = {row["model"] for row in status["models"] if row["ready"]}
    if all(slot["slot"] in ready for slot in status.get("slots", [])) and len(ready) == len(status["models"]):
        return {}
    newest: dict[str, dict[str, Any]] = {}
    for record in client.call("deployments", {"limit": _HISTORY_ROWS}):
        newest.setdefault(record["slot"], record)
    return {
        slot: f"{record['version'] or record['wanted'] or record['channel']}: {record['state']}: {reason_text(record)}"
        for slot, record in newest.items()
        if slot not in ready and record["state"] != _FINAL_GOOD
    }


def _print_answer(result: Result, *, as_json: bool) -> None:
    """Print whatever the handler answered: JSON, text, tensors or bytes."""
    kind, value = _decoded(result)
    if as_json:
        about = {"model": result.model, "version": result.version, "variant": result.variant}
        content = {} if kind == "answer" else {"content_type": result.content_type}
        _print_json({**about, **content, kind: value})
    elif kind == "answer":
        Console().print_json(json.dumps(value))
    elif kind == "text":
        click.echo("\n".join(map(shown, value.splitlines())) if sys.stdout.isatty() else value)
    elif sys.stdout.isatty():
        click.echo(
            f"{len(result.body)} bytes of {shown(result.content_type or 'unknown type')}: "
            "redirect standard output to a file to keep them",
            err=True,
        )
    else:
        sys.stdout.buffer.write(result.body)


def _print_parts(parts: Iterator[Part], as_json: bool) -> None:
    """Print each part when it comes: texts run on, JSON and tensors take a line each, ``--json`` makes all lines."""
    on_terminal, text_open = sys.stdout.isatty(), False
    for part in parts:
        is_text = part.content_type.startswith("text/")
        kind, value = ("text", part.body.decode(errors="replace")) if is_text else _decoded(part)
        if as_json:
            click.echo(json.dumps({"seq": part.seq, kind: value}))
        elif kind == "text":
            click.echo("\n".join(map(shown, value.split("\n"))) if on_terminal else value, nl=False)
            text_open = True
        elif kind == "answer":
            click.echo(json.dumps(value))
        elif on_terminal:
            click.echo(f"{len(part.body)} bytes of {shown(part.content_type or 'unknown type')}", err=True)
        else:
            sys.stdout.buffer.write(part.body)
            sys.stdout.buffer.flush()
    if text_open and on_terminal:
        click.echo()


def _decoded(result: Result) -> tuple[str, Any]:
    """Return ``answer``, ``text`` or ``base64``, and the value."""
    if result.outputs:
        return "answer", {name: array.tolist() for name, array in result.outputs.items()}
    try:
        return "answer", result.json()
    except ValueError:
        pass
    if result.content_type.startswith("text/"):
        return "text", result.body.decode(errors="replace")
    return "base64", base64.b64encode(result.body).decode()


def _print_events(client: Client, *, follow: bool, as_json: bool) -> None:
    after = 0
    while True:
        rows = client.call("events", {"after": after, "wait_s": _POLL_S if follow and after else 0})
        for row in rows:
            after = max(after, row["number"])
            click.echo(json.dumps(row) if as_json else event_text(row))
        if not follow:
            return
        after = max(after, 1)


def _change(socket_path: str, verb: str, args: dict[str, Any], *, no_wait: bool, as_json: bool) -> None:
    with _client(socket_path) as client:
        begun = client.call(verb, args)
        if no_wait:
            if as_json:
                _print_json(begun)
            else:
                click.echo(f"deployment {shown(begun['deployment'])} begun")
            return
        try:
            record = _follow(client, begun["deployment"], quiet=as_json)
        except KeyboardInterrupt:
            click.echo(f"deployment {shown(begun['deployment'])} goes on; see inferctl deployments", err=True)
            sys.exit(_INTERRUPTED)
    good = record["state"] == _FINAL_GOOD
    if as_json:
        _print_json(record)
    else:
        click.echo(_end_text(record), err=not good)
    sys.exit(0 if good else 1)


def _end_text(record: dict[str, Any]) -> str:
    """Return how a deployment ended, and which version a channel stood for."""
    slot, version, reason = shown(record["slot"]), shown(record["version"]), shown(reason_text(record))
    if record["state"] == _FINAL_GOOD:
        channel = "" if record["wanted"] else f", the newest of channel {shown(record['channel'])}"
        return f"{slot} serves {version}{channel} ({reason or 'confirmed'})"
    tried = version or shown(record["wanted"]) or f"channel {shown(record['channel'])}"
    return f"{slot} {tried}: {shown(record['state'])}: {reason}"


def _follow(client: Client, deployment_id: str, *, quiet: bool) -> dict[str, Any]:
    columns = (SpinnerColumn(), TextColumn("{task.description}", markup=False), BarColumn(), DownloadColumn())
    console = Console(stderr=True)
    with Progress(*columns, console=console, disable=quiet or not console.is_terminal, transient=True) as progress:
        task = progress.add_task("begun", total=None)
        args: dict[str, Any] = {"id": deployment_id, "wait_s": _POLL_S}
        while True:
            record: dict[str, Any] = client.call("deployment", args)
            total = record["bytes_total"] or None
            progress.update(
                task,
                description=shown(f"{record['slot']} {record['version']}: {record['state']}"),
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


def _print_json(value: Any) -> None:
    click.echo(json.dumps(value, indent=1))


if __name__ == "__main__":
    main()
