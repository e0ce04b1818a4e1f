"""``make demo`` and ``make run``: the whole main job on real input, and the daemon to play with.

The demonstration exits with 1 if any step did not hold, and leaves nothing running.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import click
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from tools.demo import magika, steps
from tools.demo.broker import Mosquitto, find_mosquitto
from tools.demo.receiver import Receiver
from tools.demo.stage import Stage, StepFailedError

_NO_BROKER = "mosquitto is not installed (Debian: apt-get install mosquitto)"


class Demonstration:
    """Runs steps, prints each with its figure, remembers how they ended."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._rows: list[tuple[str, str, str, float]] = []  # mark, title, figure, seconds
        self.failed = False

    def step(self, title: str, work: Callable[[], str]) -> None:
        """Do one step; after a failure the later ones are not reached."""
        if self.failed:
            self._note("–", title, "not reached", 0.0)
            return
        began = time.monotonic()
        try:
            with self._console.status(f"{title} …"):
                figure, mark = work(), "✓"
        except (StepFailedError, OSError) as error:
            figure, mark, self.failed = str(error), "✗", True
        self._note(mark, title, figure, time.monotonic() - began)

    def skip(self, title: str, reason: str) -> None:
        """Say that a step is left out, and why."""
        self._note("–", title, f"skipped: {reason}", 0.0)

    def table(self, elapsed_s: float) -> Table:
        """Return the closing table."""
        table = Table(
            title=f"inferd: the whole main job in {elapsed_s:.0f} s", title_justify="left", header_style="bold"
        )
        for name, justify in (("", "left"), ("step", "left"), ("seconds", "right")):
            table.add_column(name, justify="right" if justify == "right" else "left")
        for mark, title, _, seconds in self._rows:
            table.add_row(mark, title, f"{seconds:.1f}" if seconds else "")
        return table

    def _note(self, mark: str, title: str, figure: str, seconds: float) -> None:
        self._rows.append((mark, title, figure, seconds))
        color = {"✓": "green", "✗": "red"}.get(mark, "yellow")
        self._console.print(f"[{color}]{mark}[/] [bold]{title}[/]\n    {escape(figure)}", highlight=False)


@click.group(invoke_without_command=True)
@click.option("--state", type=click.Path(path_type=Path), default=Path(".state/demo"), show_default=True)
@click.pass_context
def main(context: click.Context, state: Path) -> None:
    """Show the whole main job: sign, publish, pull, verify, serve, survive, roll out, refuse."""
    if context.invoked_subcommand is None:
        sys.exit(demonstrate(state))


@main.command()
@click.option("--state", type=click.Path(path_type=Path), default=Path(".state/run"), show_default=True)
def run(state: Path) -> None:
    """The daemon in the foreground with the demo's store, until Ctrl-C."""
    sys.exit(run_daemon(state))


def demonstrate(state: Path) -> int:
    """Run every step; return the exit status."""
    console = Console(soft_wrap=True)
    demo = Demonstration(console)
    with console.status("downloading the model's two releases …"):
        for release in magika.RELEASES.values():
            magika.download_wheel(release.wheel, state / "wheels")
    began = time.monotonic()
    with ExitStack() as stack:
        stage = stack.enter_context(Stage(state, fresh=True))
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
    console.print(demo.table(time.monotonic() - began))
    if demo.failed:
        console.print(f"[red]a step did not hold; the daemon's log is {state / 'inferd.log'}[/]")
    return 1 if demo.failed else 0


def run_daemon(state: Path) -> int:
    """Prepare the demo's store once, then run the daemon until Ctrl-C."""
    console = Console(soft_wrap=True)
    stage = Stage(state, fresh=False)
    ready = state / "published"
    if not ready.exists():
        stage = Stage(state, fresh=True)
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
        console.print(_hints(stage, broker), highlight=False)
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


def _hints(stage: Stage, broker: Mosquitto | None) -> str:
    program = Path(sys.executable).parent
    control = f"{program}/inferctl --socket {stage.socket}"
    lines = [
        "[bold]inferd runs in the foreground; Ctrl-C stops it. In another terminal try:[/]",
        f"  {control} status",
        f"  {control} infer magika /bin/ls",
        f"  {control} deploy magika@2.0.0",
        f"  {control} rollback magika",
        f"  {control} events --follow",
        f"  curl --data-binary @README.md http://127.0.0.1:{stage.http_port}/predictions/magika",
        f"  curl http://127.0.0.1:{stage.http_port}/metrics",
    ]
    if broker is not None:
        lines += [
            f"  INFERHUB_KEY_PASSWORD=only-for-the-demo {program}/inferhub deploy magika@2.0.0 --team {magika.TEAM} "
            f"--device demo-box --broker 127.0.0.1:{broker.port} --key {stage.key('operator')}",
        ]
    else:
        lines.append(f"  ({_NO_BROKER}: no telemetry)")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
