"""inferctl: the box's command line. Talks to the daemon's frame socket, never to its files.

Every verb has a table for people and ``--json`` for programs. Exit codes: 0 done, 1 refused or failed, 2 bad usage,
3 the daemon cannot be reached.
"""

from __future__ import annotations

import base64
import json
import sys
import time
from collections.abc import Iterator
from typing import Any, Final

import click
from rich.console import Console

from agent import __version__, cli_store, cli_versions
from agent.cli_hold import hold
from agent.cli_plan import plan_options
from agent.cli_probe import probe_command
from agent.cli_progress import POLL_S, follow
from agent.cli_rollout import deployment, rollout_options
from agent.cli_selftest import selftest_command
from agent.cli_session import FINAL_GOOD, change, connected, end_text, json_option, print_json
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
from agent.inspect_text import version_lines

_SOCKET: Final = "/run/inferd/inferd.sock"
_GIVEN_UP: Final = ("canceled", "prepared")
_HISTORY_ROWS: Final = 100  # looked through for why a model is not ready


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--socket", "socket_path", default=_SOCKET, show_default=True, help="The daemon's frame socket.")
@click.version_option(__version__, prog_name="inferctl")
@click.pass_context
def main(context: click.Context, socket_path: str) -> None:
    """Look after the inferd daemon of this box.

    \b
    Examples:
      inferctl status
      inferctl probe
      inferctl infer magika README.md
      inferctl deploy magika@2.0.0
      inferctl rollback magika
      inferctl default magika 1.0.0
      inferctl sideload /media/usb
      inferctl events --follow
    """
    context.obj = socket_path


main.add_command(probe_command)
main.add_command(selftest_command)
main.add_command(cli_versions.default)
main.add_command(deployment)
main.add_command(hold)
main.add_command(cli_versions.remove)
main.add_command(cli_versions.scale)


@main.command()
@json_option
@click.pass_obj
def status(socket_path: str, as_json: bool) -> None:
    """Show the box, its models, the telemetry link and the memory of every process.

    \b
    Examples:
      inferctl status
      inferctl status --json | jq '.models[].reason'
    """
    with connected(socket_path) as client:
        value = client.call("status")
        if as_json:
            print_json(value)
            return
        print_text(status_text(value, _failures(client, value)))


@main.command()
@json_option
@click.pass_obj
def models(socket_path: str, as_json: bool) -> None:
    """List the models of this box: what serves, what is wanted and by whom, inputs and outputs.

    \b
    Examples:
      inferctl models
      inferctl models --json | jq '.[] | {slot, active}'
    """
    with connected(socket_path) as client:
        rows = client.call("models")
    if as_json:
        print_json(rows)
        return
    print_text(models_text(rows))


@main.command()
@click.argument("target", metavar="MODEL[@VERSION]")
@click.argument("file", type=click.File("rb"))
@click.option("--version", "version", help="Another way to name the version.")
@click.option("--content-type", default="application/octet-stream", show_default=True)
@click.option("--deadline-ms", type=int, help="Give up after so many milliseconds, queue time included.")
@click.option("--stream", is_flag=True, help="Print each part of the answer as it comes.")
@json_option
@click.pass_obj
def infer(
    socket_path: str,
    target: str,
    file: Any,
    version: str | None,
    content_type: str,
    deadline_ms: int | None,
    stream: bool,
    as_json: bool,
) -> None:
    """Send FILE (``-`` = standard input) to MODEL as a raw request and print the answer.

    Without a version the default answers; with one, that version, if it is the default, beside it, or on trial.

    \b
    Examples:
      inferctl infer magika /bin/ls
      inferctl infer magika@1.0.0 /bin/ls
      echo "Once upon a time" | inferctl infer --stream writer -
    """
    model, _, named = target.partition("@")
    if named and version and named != version:
        raise click.UsageError(f"which version: {named} or {version}?")
    version = named or version
    if stream:
        with connected(socket_path) as client:
            _print_parts(
                client.stream(model, file.read(), content_type, version=version, deadline_ms=deadline_ms), as_json
            )
        return
    with connected(socket_path) as client:
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
@click.option("--beside", is_flag=True, help="Keep the default; VERSION answers the requests that name it.")
@rollout_options
@click.option("--force", is_flag=True, help="Also a version that failed on this box before.")
@plan_options
@click.option("--no-wait", is_flag=True, help="Return at once instead of following the deployment.")
@json_option
@click.pass_obj
def deploy(
    socket_path: str,
    target: str,
    team: str | None,
    channel: str,
    beside: bool,
    rollout: dict[str, Any] | None,
    force: bool,
    plan: dict[str, Any],
    no_wait: bool,
    as_json: bool,
) -> None:
    """Pin MODEL to a version on this box: fetch, verify, self-test, switch over, watch, confirm or roll back.

    A version with other inputs, outputs, class labels or another handler than the one that serves is refused before it
    is loaded; --allow-incompatible lets it through. The pin stands against fleet commands until ``inferctl unpin
    MODEL``. With --json each step and each progress of the download is one line; the last one has ``"final": true``.

    Windows of [deploy] and applications that hold MODEL may keep it waiting, and one model at a time is on trial. With
    --stage-only nothing is pinned: the version is brought here and kept until a deploy of it, which needs no network.

    With --beside the version is brought here and tried in the same way, and then kept for those who name it, until
    ``inferctl remove MODEL@VERSION``; ``inferctl default MODEL VERSION`` lets it answer everybody.

    With --canary and --shadow it first meets a share of the requests, or copies of some, beside what serves; what each
    has shown is in ``inferctl deployment ID``. ``inferctl rollback MODEL`` and ``inferctl cancel MODEL`` end that.

    \b
    Examples:
      inferctl deploy magika@2.0.0
      inferctl deploy magika@2.0.0 --shadow 20 --canary 5,25,50 --step-s 600
      inferctl deploy magika@2.1.0 --beside
      inferctl deploy detector --team vision --channel canary
      inferctl deploy magika@2.0.0 --stage-only
      inferctl deploy magika@2.0.0 --force-after 2h
      inferctl deploy detector@3.0.0 --allow-incompatible
    """
    model, _, version = target.partition("@")
    args: dict[str, Any] = {"model": model, "version": version, "team": team, "channel": channel, "force": force}
    if beside:
        args["beside"] = True
    if rollout is not None:
        args["rollout"] = rollout
    change(socket_path, "deploy", args | plan, no_wait=no_wait, as_json=as_json)


@main.command()
@click.argument("model")
@click.option("--no-wait", is_flag=True, help="Return at once instead of following the rollback.")
@json_option
@click.pass_obj
def rollback(socket_path: str, model: str, no_wait: bool, as_json: bool) -> None:
    """Return MODEL to the version that served before, from disk, without network, and pin it there.

    A second rollback goes forward again: the version that was left is then the one that served before.

    \b
    Example:
      inferctl rollback magika
    """
    change(socket_path, "rollback", {"model": model}, no_wait=no_wait, as_json=as_json)


@main.command()
@click.argument("target", metavar="MODEL[@VERSION]")
@click.option("--team", help="Who publishes it; only needed for a model that is new on this box.")
@click.option("--no-wait", is_flag=True, help="Return at once instead of following the deployment.")
@json_option
@click.pass_obj
def pin(socket_path: str, target: str, team: str | None, no_wait: bool, as_json: bool) -> None:
    """Keep MODEL on the version that serves, or on VERSION, until ``inferctl unpin MODEL``.

    A pinned version stands against fleet commands and channels, and its files are never collected.

    \b
    Example:
      inferctl pin magika
    """
    model, _, version = target.partition("@")
    args = {"model": model, "version": version, "team": team}
    change(socket_path, "pin", args, no_wait=no_wait, as_json=as_json)


@main.command()
@click.argument("model", metavar="MODEL[@VERSION]")
@json_option
@click.pass_obj
def unpin(socket_path: str, model: str, as_json: bool) -> None:
    """Give MODEL back to the fleet and the configuration file.

    What they want of it is deployed if another version serves, also where that is the older one.

    \b
    Example:
      inferctl unpin magika
    """
    with connected(socket_path) as client:
        value = client.call("unpin", {"model": model})
    if as_json:
        print_json(value)
        return
    click.echo(f"{shown(model)} follows the fleet and the configuration again")


@main.command()
@click.argument("model", metavar="MODEL[@VERSION]")
@json_option
@click.pass_obj
def cancel(socket_path: str, model: str, as_json: bool) -> None:
    """Give up what is being deployed to MODEL, as long as it does not serve yet, and the pin that asked for it.

    Without a deployment to give up, it is what is being staged, or was (``deploy --stage-only``).

    What was fetched stays, so that another try fetches the rest only. What the fleet or the configuration want of MODEL
    stands: a version that the configuration names is tried again later.

    \b
    Example:
      inferctl cancel magika
    """
    with connected(socket_path) as client:
        record = follow(client, client.call("cancel", {"model": model})["deployment"], as_json=as_json)
    given_up = record["state"] in _GIVEN_UP
    if not as_json:
        click.echo(f"{shown(model)}: cancelled" if given_up else end_text(record), err=not given_up)
    sys.exit(0 if given_up else 1)


@main.command()
@click.argument("target", metavar="MODEL[@VERSION]")
@json_option
@click.pass_obj
def load(socket_path: str, target: str, as_json: bool) -> None:
    """Load MODEL into memory now, as its next request would.

    \b
    Examples:
      inferctl load detector
      inferctl load detector@2.0.0
    """
    _move(socket_path, "load", target, as_json=as_json)


@main.command()
@click.argument("target", metavar="MODEL[@VERSION]")
@json_option
@click.pass_obj
def unload(socket_path: str, target: str, as_json: bool) -> None:
    """Give MODEL's memory back now; what it holds is answered, and its next request loads it again.

    Refused for a model that is pinned in the configuration, and while one of its versions is on trial.

    \b
    Examples:
      inferctl unload detector
      inferctl unload detector@2.0.0 --json
    """
    _move(socket_path, "unload", target, as_json=as_json)


def _move(socket_path: str, verb: str, target: str, *, as_json: bool) -> None:
    model, _, version = target.partition("@")
    with connected(socket_path) as client, Console(stderr=True).status(f"{verb}ing {shown(target)}"):
        value = client.call(verb, {"model": model, "version": version})
    if as_json:
        print_json(value)
        return
    click.echo(f"{shown(target)}: {residency_text(value)}")


@main.command()
@click.option("--limit", default=20, show_default=True)
@json_option
@click.pass_obj
def deployments(socket_path: str, limit: int, as_json: bool) -> None:
    """Show the newest deployments with their ends, ids and reasons; ``inferctl deployment ID`` tells more of one.

    \b
    Example:
      inferctl deployments --limit 5
    """
    with connected(socket_path) as client:
        rows = client.call("deployments", {"limit": limit})
    if as_json:
        print_json(rows)
        return
    print_text(deployments_text(rows))


@main.command()
@click.argument("target", metavar="MODEL[@VERSION]")
@json_option
@click.pass_obj
def inspect(socket_path: str, target: str, as_json: bool) -> None:
    """Show what a version on this box says about itself: licence, provenance, variants, and what is in its models.

    \b
    Examples:
      inferctl inspect magika
      inferctl inspect magika@1.0.0 --json
    """
    model, _, version = target.partition("@")
    with connected(socket_path) as client:
        value = client.call("inspect", {"model": model, "version": version})
    if as_json:
        print_json(value)
    else:
        click.echo("\n".join(version_lines(value)))


@main.command()
@click.option("--follow", "-f", is_flag=True, help="Go on printing events as they happen.")
@json_option
@click.pass_obj
def events(socket_path: str, follow: bool, as_json: bool) -> None:
    """Show what happened since the daemon started; with --follow until Ctrl-C.

    \b
    Example:
      inferctl events --follow --json
    """
    with connected(socket_path) as client:
        try:
            _print_events(client, follow=follow, as_json=as_json)
        except KeyboardInterrupt:
            if not follow:
                raise


def _failures(client: Client, status: dict[str, Any]) -> dict[str, str]:
    """Return how the newest deployment of each model that is not ready ended, unless it ended well."""
    ready = {row["slot"] for row in status["models"] if row["ready"]}
    if all(slot["slot"] in ready for slot in status.get("slots", [])) and len(ready) == len(status["models"]):
        return {}
    newest: dict[str, dict[str, Any]] = {}
    for record in client.call("deployments", {"limit": _HISTORY_ROWS}):
        newest.setdefault(record["slot"], record)
    return {
        slot: ": ".join(filter(None, (_tried(record), record["state"], reason_text(record))))
        for slot, record in newest.items()
        if slot not in ready and record["state"] != FINAL_GOOD
    }


def _tried(record: dict[str, Any]) -> str:
    return str(record["version"] or record["wanted"] or record["channel"])


def _print_answer(result: Result, *, as_json: bool) -> None:
    """Print whatever the handler answered: JSON, text, tensors or bytes."""
    kind, value = _decoded(result)
    if as_json:
        about = {"model": result.model, "version": result.version, "variant": result.variant}
        content = {} if kind == "answer" else {"content_type": result.content_type}
        print_json({**about, **content, kind: value})
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
        rows = client.call("events", {"after": after, "wait_s": POLL_S if follow and after else 0})
        for row in rows:
            after = max(after, row["number"])
            click.echo(json.dumps(row) if as_json else event_text(row))
        if not follow:
            return
        after = max(after, 1)


cli_store.add_to(main)


if __name__ == "__main__":
    main()
