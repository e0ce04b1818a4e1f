"""``make demo`` and ``make run``: the whole main job on real input, and the daemon to play with.

The demonstration exits with 1 if any step did not hold, and leaves nothing running. What goes wrong is a sentence
with a hint, never a traceback.
"""

from __future__ import annotations

import shlex
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Final

import click
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from agent.errors import AgentError
from tools.demo import magika, steps
from tools.demo.broker import Mosquitto, find_mosquitto
from tools.demo.receiver import Receiver
from tools.demo.stage import DEVICE, PASSWORD, Stage, StepFailedError
from tools.hub.errors import SourceError

_NO_BROKER: Final = "mosquitto is not installed (Debian: apt-get install mosquitto)"
_WHEELS: Final = Path(".state/wheels")
_FAILURES: Final = (StepFailedError, AgentError, OSError, RuntimeError)  # a broker that does not start is the last


class Demonstration:
    """Runs steps, prints each with its figure, remembers how they ended."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._rows: list[tuple[str, str, str]] = []  # mark, title, seconds or why there are none
        self._skipped: list[str] = []
        self.failed = False

    def step(self, title: str, work: Callable[[], str]) -> None:
        """Do one step; after a failure the later ones are not reached."""
        if self.failed:
            self._note("–", title, "not reached", "not reached")
            return
        began = time.monotonic()
        try:
            with self._console.status(f"{title} …"):
                figure, mark = work(), "✓"
        except _FAILURES as error:
            figure, mark, self.failed = str(error), "✗", True
        self._note(mark, title, figure, f"{time.monotonic() - began:.1f}")

    def skip(self, title: str, reason: str) -> None:
        """Say that a step is left out, and why."""
        self._skipped.append(title)
        self._note("–", title, f"skipped: {reason}", "skipped")

    def say_end(self, elapsed_s: float, log: Path) -> None:
        """Print the closing table and what a hurried reader must not miss."""
        self._console.print(self.table(elapsed_s))
        if self._skipped:
            what = " and ".join(f"“{title}”" for title in self._skipped)
            self._console.print(f"[yellow]MQTT was left out: {_NO_BROKER}. Skipped: {escape(what)}.[/]")
        if self.failed:
            self._console.print(f"[red]a step did not hold; the daemon's log is {escape(str(log))}[/]")

    def table(self, elapsed_s: float) -> Table:
        """Return the closing table."""
        table = Table(
            title=f"inferd: the whole main job in {elapsed_s:.0f} s", title_justify="left", header_style="bold"
        )
        for name, justify in (("", "left"), ("step", "left"), ("seconds", "right")):
            table.add_column(name, justify="right" if justify == "right" else "left")
        for row in self._rows:
            table.add_row(*row)
        return table

    def _note(self, mark: str, title: str, figure: str, seconds: str) -> None:
        self._rows.append((mark, title, seconds))
        color = {"✓": "green", "✗": "red"}.get(mark, "yellow")
        self._console.print(f"[{color}]{mark}[/] [bold]{title}[/]\n    {escape(figure)}", highlight=False)


def _folder(name: str, default: Path, about: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    return click.option(name, type=click.Path(path_type=Path), default=default, show_default=True, help=about)


@click.group(invoke_without_command=True)
@_folder("--state", Path(".state/demo"), "Everything the run writes.")
@_folder("--wheels", _WHEELS, "Downloads, kept from run to run.")
@click.pass_context
def main(context: click.Context, state: Path, wheels: Path) -> None:
    """Show the whole main job: sign, publish, pull, verify, serve, survive, roll out, refuse."""
    if context.invoked_subcommand is None:
        sys.exit(_explained(demonstrate, state, wheels))


@main.command()
@_folder("--state", Path(".state/run"), "Everything the run writes.")
@_folder("--wheels", _WHEELS, "Downloads, kept from run to run.")
def run(state: Path, wheels: Path) -> None:
    """The daemon in the foreground with the demo's store, until Ctrl-C."""
    sys.exit(_explained(run_daemon, state, wheels))


def demonstrate(state: Path, wheels: Path) -> int:
    """Run every step; return the exit status."""
    console = Console(soft_wrap=True)
    demo = Demonstration(console)
    with console.status("downloading the model's two releases …"):
        for release in magika.RELEASES.values():
            magika.download_wheel(release.wheel, wheels)
    began = time.monotonic()
    with ExitStack() as stack:
        stage = stack.enter_context(Stage(state, fresh=True, wheels=wheels))
        demo.step("a signed store with fresh keys", lambda: steps.make_store(stage))
        demo.step("Magika packed and published as 1.0.0", lambda: steps.publish(stage, "1.0.0"))
        broker, receiver = _telemetry(stack, stage)
        if not demo.failed:
            stage.write_config(store_url=stage.serve_store(), broker_port=broker.port if broker else None)
        demo.step("inferd starts from an empty state folder", lambda: steps.start(stage))
        demo.step("inferd restarts from its disk", lambda: steps.restart(stage))
        demo.step("files of this machine over the unix socket", lambda: steps.classify_frames(stage))
        demo.step("HTTP", lambda: steps.classify_http(stage))
        demo.step("Open Inference Protocol", lambda: steps.classify_oip(stage))
        if broker is not None and receiver is not None:
            demo.step("the broker goes away and returns", lambda: steps.outage(stage, broker, receiver))
        else:
            demo.skip("the broker goes away and returns", _NO_BROKER)
        demo.step("Magika packed and published as 2.0.0", lambda: steps.publish(stage, "2.0.0"))
        if broker is not None:
            demo.step("2.0.0 rolled out by a signed MQTT command", lambda: steps.roll_out(stage, broker))
        else:
            demo.skip("2.0.0 rolled out by a signed MQTT command", _NO_BROKER)
            demo.step("2.0.0 rolled out by inferctl", lambda: steps.roll_out_locally(stage))
        demo.step("a tampered bundle is offered", lambda: steps.refuse_tampered(stage))
        demo.step("the worker is killed under load", lambda: steps.kill_worker(stage))
        demo.step("memory", lambda: steps.footprint(stage))
        demo.step("inferd stops", lambda: steps.stop(stage))
    demo.say_end(time.monotonic() - began, state / "inferd.log")
    return 1 if demo.failed else 0


def run_daemon(state: Path, wheels: Path) -> int:
    """Prepare the demo's store once, then run the daemon until Ctrl-C."""
    console = Console(soft_wrap=True)
    stage = Stage(state, fresh=False, wheels=wheels)
    ready = state / "published"
    if not ready.exists():
        stage = Stage(state, fresh=True, wheels=wheels)
        with console.status("making keys and a store, publishing Magika 1.0.0 and 2.0.0 …"):
            stage.make_store()
            stage.publish(stage.make_bundle("1.0.0"), "--channel", "stable")
            stage.publish(stage.make_bundle("2.0.0"))
        ready.touch()
    else:
        stage.hub("refresh-timestamp", "--store", stage.store, "--online-key", stage.key("online"))
    with ExitStack() as stack:
        stack.enter_context(stage)
        broker = stack.enter_context(Mosquitto(state / "broker")) if find_mosquitto() else None
        stage.write_config(store_url=stage.serve_store(), broker_port=broker.port if broker else None)
        console.print("[bold]inferd runs in the foreground; Ctrl-C stops it. In another terminal try:[/]")
        console.print("\n".join(hints(stage, broker)), highlight=False, markup=False)
        stage.log = Path("/dev/stderr")
        stage.start_daemon()
        assert stage.daemon is not None
        try:
            return stage.daemon.wait()
        except KeyboardInterrupt:
            return 0  # the daemon got the signal too; leaving the block waits for its drain


def _telemetry(stack: ExitStack, stage: Stage) -> tuple[Mosquitto | None, Receiver | None]:
    if find_mosquitto() is None:
        return None, None
    broker = stack.enter_context(Mosquitto(stage.folder / "broker"))
    return broker, stack.enter_context(Receiver(broker.host, broker.port, client_id="demo-receiver"))


def hints(stage: Stage, broker: Mosquitto | None) -> list[str]:
    """Return what to type while the daemon runs; every line can be pasted into a shell from any folder."""
    programs = Path(sys.executable).parent
    control = _quoted(programs / "inferctl", "--socket", stage.socket)
    http = f"http://127.0.0.1:{stage.http_port}"
    lines = [
        f"  {control} status",
        f"  {control} infer {magika.NAME} /bin/ls",
        f"  {control} deploy {magika.NAME}@2.0.0",
        f"  {control} rollback {magika.NAME}",
        f"  {control} events --follow",
        f"  curl --data-binary @/bin/ls {http}/predictions/{magika.NAME}",
        f"  curl {http}/metrics",
    ]
    if broker is None:
        return [*lines, f"No telemetry and no fleet commands: {_NO_BROKER}."]
    target = _quoted("--device", DEVICE, "--broker", f"{broker.host}:{broker.port}", "--key", stage.key("operator"))
    return [
        *lines,
        "As the fleet would, by a signed MQTT command (deploy and rollback above pin the model here; unpin it first):",
        f"  {control} unpin {magika.NAME}",
        f"  INFERHUB_KEY_PASSWORD={PASSWORD} {_quoted(programs / 'inferhub')} deploy {magika.NAME}@2.0.0 "
        f"--team {magika.TEAM} {target}",
        "Telemetry waits in the outbox until somebody subscribes; this does, and prints it:",
        "  " + _quoted(sys.executable, "-m", "tools.demo.receiver", "--broker", f"{broker.host}:{broker.port}"),
    ]


def _quoted(*words: object) -> str:
    return shlex.join(map(str, words))


def _explained(work: Callable[[Path, Path], int], state: Path, wheels: Path) -> int:
    """Return the exit status of ``work``; what stops it is told in a sentence."""
    try:
        return work(state, wheels)
    except _FAILURES as error:
        click.echo(f"{error}", err=True)
        for line in _advice(error, wheels):
            click.echo(line, err=True)
        return 1


def _advice(error: BaseException, wheels: Path) -> list[str]:
    if isinstance(error, SourceError):
        return [error.hint, f"The wheels' folder is {wheels.absolute()}."] if error.hint else []
    return []


if __name__ == "__main__":
    main()
