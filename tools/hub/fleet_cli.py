"""Verbs of ``inferhub`` that send one signed command to a device and follow it to its end: ``deploy``, ``remove``, …

What a box would refuse for its arguments alone is refused here, by the box's own checks, before anything is signed.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Final, TypeVar

import click
from rich.console import Console

from agent.arguments import name_of, version_of, wish_of
from agent.cli_plan import plan_options
from agent.cli_rollout import rollout_options
from agent.cli_text import human_bytes
from tools.hub import commands
from tools.hub.cli import Passwords, emit, json_option, key_option, password_option, usage, wants_json

_WAITING: Final = ("queued", "fetch_wait", "waiting_window")
_PASSWORD_VARIABLE: Final = "INFERHUB_BROKER_PASSWORD"
_PORT_MAX: Final = 65_535
Verb = TypeVar("Verb", bound=Callable[..., Any])


def _host_and_port(_ctx: click.Context, _parameter: click.Parameter, value: str) -> tuple[str, int]:
    host, _, port = value.rpartition(":")
    if not host or not port.isdecimal() or not 1 <= int(port) <= _PORT_MAX:
        raise click.BadParameter(f"{value!r} is not HOST:PORT, for example mqtt.example:1883")
    return host.strip("[]"), int(port)


def _delivery_options(verb: Verb) -> Verb:
    """Add where to send, as whom, and how long to wait."""
    options = (
        click.option("--device", required=True, metavar="ID", help="The box, as `inferctl status` names it."),
        click.option("--tenant", default="default", show_default=True),
        click.option(
            "--broker",
            required=True,
            callback=_host_and_port,
            metavar="HOST:PORT",
            envvar="INFERHUB_BROKER",
            help="The fleet's MQTT broker.",
        ),
        click.option(
            "--username", default="", metavar="NAME", help=f"At the broker; password in {_PASSWORD_VARIABLE}."
        ),
        click.option("--broker-password", default="", envvar=_PASSWORD_VARIABLE, hidden=True),
        click.option("--ca-file", default="", metavar="FILE", help="Speak TLS, trusting this authority."),
        key_option("--key", "An operator's private key, named in the store's fleet/operators.json."),
        password_option,
        click.option(
            "--wait",
            "wait_s",
            default=120.0,
            show_default=True,
            metavar="S",
            type=click.FloatRange(min=0),
            help="For the end; 0: only send.",
        ),
        click.option(
            "--expires",
            "lifetime_s",
            default=3600,
            show_default=True,
            metavar="S",
            type=click.IntRange(1, 30 * 86_400),
            help="A box that comes online later refuses the command.",
        ),
        json_option,
    )
    for option in reversed(options):
        verb = option(verb)
    return verb


@click.command()
@click.argument("model", metavar="MODEL[@VERSION]")
@click.option("--team", required=True, help="Whose model it is; the team signs its bundles.")
@click.option("--channel", default="stable", show_default=True, help="Followed when no VERSION is given.")
@click.option("--beside", is_flag=True, help="Beside the default: for those who name the version.")
@rollout_options
@click.option("--force", is_flag=True, help="Although this version failed on the box before.")
@plan_options
@_delivery_options
def deploy(
    model: str,
    team: str,
    channel: str,
    beside: bool,
    rollout: dict[str, Any] | None,
    force: bool,
    plan: dict[str, Any],
    **delivery: Any,
) -> None:
    """Make a box serve MODEL.

    \b
    Examples:
      inferhub deploy magika@2.0.0 --team demo --stage-only --device box-1 --broker mqtt.example:1883 --key k/op
      inferhub deploy magika@2.0.0 --team demo --device box-1 --broker mqtt.example:1883 --key keys/operator
      inferhub deploy magika@2.0.0 --canary 5,25 --shadow 10 --wait 0 --team demo --device box-1 ...
      inferhub deploy magika@2.1.0 --team demo --beside --device box-1 --broker mqtt.example:1883 --key keys/operator
    """
    name, _, version = model.partition("@")
    args: dict[str, Any] = {"team": team, "model": name, "version": version, "channel": channel, **plan}
    args |= {"rollout": rollout} if rollout is not None else {}
    flags = {"force": force, "beside": beside}
    args |= {flag: True for flag, given in flags.items() if given}
    with usage():
        wish_of("", args, "fleet")
    _carry_out("deploy", args, **delivery)


@click.command()
@click.argument("model")
@click.argument("version")
@click.option("--keep", is_flag=True, help="Keep the version that was the default until now beside it.")
@click.option("--allow-incompatible", is_flag=True, help="Although it takes, gives or means something else.")
@_delivery_options
def default(model: str, version: str, keep: bool, allow_incompatible: bool, **delivery: Any) -> None:
    """Let VERSION, which is on the box and was confirmed there, answer the requests to MODEL that name no version.

    \b
    Example:
      inferhub default magika 2.1.0 --device box-1 --broker mqtt.example:1883 --key keys/operator
    """
    args: dict[str, Any] = {"model": model, "version": version}
    flags = {"keep": keep, "allow_incompatible": allow_incompatible}
    _check_names(args)
    _carry_out("default", args | {flag: True for flag, given in flags.items() if given}, **delivery)


@click.command()
@click.argument("model", metavar="MODEL[@VERSION]")
@_delivery_options
def remove(model: str, **delivery: Any) -> None:
    """Let a box no longer keep VERSION beside MODEL's default, or no longer have MODEL at all.

    \b
    Example:
      inferhub remove magika@1.0.0 --device box-1 --broker mqtt.example:1883 --key keys/operator
    """
    name, _, version = model.partition("@")
    args = {"model": name, "version": version}
    _check_names(args)
    _carry_out("remove", args, **delivery)


@click.command()
@click.argument("model")
@_delivery_options
def rollback(model: str, **delivery: Any) -> None:
    """Make a box serve the version of MODEL that it served before.

    \b
    Example:
      inferhub rollback magika --device box-1 --broker mqtt.example:1883 --key keys/operator
    """
    _check_slot(model)
    _carry_out("rollback", {"model": model}, **delivery)


@click.command()
@click.argument("model")
@_delivery_options
def cancel(model: str, **delivery: Any) -> None:
    """Let a box give up what it is deploying or preparing of MODEL, as long as that does not serve.

    What a person pinned on the box is left alone.

    \b
    Example:
      inferhub cancel magika --device box-1 --broker mqtt.example:1883 --key keys/operator
    """
    _check_slot(model)
    _carry_out("cancel", {"model": model}, **delivery)


def _check_slot(slot: str) -> None:
    model, _, version = slot.partition("@")
    _check_names({"model": model, "version": version})


def _check_names(args: dict[str, Any]) -> None:
    with usage():
        name_of(args, "model")
        version_of(args)


def _carry_out(
    name: str,
    args: dict[str, Any],
    *,
    device: str,
    tenant: str,
    broker: tuple[str, int],
    username: str,
    broker_password: str,
    ca_file: str,
    key: str,
    passwords: Passwords,
    wait_s: float,
    lifetime_s: int,
) -> None:
    command = commands.make_command(
        name,
        args,
        tenant=tenant,
        device=device,
        signer=passwords.signer(key),
        now_s=time.time(),
        lifetime_s=lifetime_s,
    )
    host, port = broker
    address = commands.Broker(host=host, port=port, username=username, password=broker_password, ca_file=ca_file)
    with _shown(f"{name} {args['model']} on {device}") as show:
        reply = commands.send(address, command, wait_s=wait_s, on_reply=show)
    emit(reply, _sentence(name, args, device, reply))


@contextmanager
def _shown(title: str) -> Iterator[Callable[[dict[str, Any]], None]]:
    """Yield a listener that shows replies as one changing line, if a person looks on."""
    if wants_json() or not sys.stderr.isatty():
        yield lambda reply: None
        return
    with Console(stderr=True).status(f"{title}: sent") as line:
        yield lambda reply: line.update(f"{title}: {_progress_text(reply)}")


def _progress_text(reply: dict[str, Any]) -> str:
    progress = reply.get("progress") or {}
    state = str(progress.get("state") or reply["status"])
    if state in _WAITING and progress.get("message"):
        return f"{state}: {progress['message']}"
    done, total = progress.get("bytes_done"), progress.get("bytes_total")
    if not total:
        return state
    rate, left = progress.get("rate_bps"), progress.get("eta_s")
    pace = f", {human_bytes(rate)}/s" if rate else ""
    return f"{state} {human_bytes(done or 0)} of {human_bytes(total)}{pace}{f', {left} s left' if left else ''}"


def _sentence(name: str, args: dict[str, Any], device: str, reply: dict[str, Any]) -> str:
    if reply["status"] == "sent":
        return f"{name} {args['model']}: the broker has it for {device} (command {reply['id']})"
    result = reply.get("result") or {}
    version = result.get("version") or args.get("version") or ""
    return f"{device}: {name} {args['model']}{f' {version}' if version else ''}: {result.get('state', reply['status'])}"
