"""``python -m tools.loadgen``: what asking the daemon costs, beside the same work in one's own process.

In one run, interleaved: ``session.run`` of the same file, a blocking unix-socket echo of the same bytes, and a running
daemon over its unix socket and over HTTP; closed loops at each concurrency, and an open loop at a fixed rate if asked.
Figures are medians of the repetitions. Memory is the proportional set size of every process of the daemon.
"""

from __future__ import annotations

import json
import socket
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import click
import psutil
import uvloop
from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from agent.client.messages import DEFAULT_SOCKET
from agent.serving.identity import peer_credentials
from tools.bench_load import Sample, closed_blocking, closed_concurrent, interleaved, medians, open_loop
from tools.bench_ways import Floor, Http, InProcess, Unix, Way, Work, random_inputs

IN_PROCESS = "in-process"


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What to measure and for how long."""

    concurrencies: tuple[int, ...]
    rate_s: float  # of the open loop; 0: none
    connections: int  # at most, for concurrent asking
    seconds: float  # per way and repetition
    repetitions: int


@click.command(context_settings={"show_default": True})
@click.option("--socket", "socket_path", type=click.Path(path_type=Path), default=DEFAULT_SOCKET, help="Frame socket.")
@click.option("--http", "url", default="http://127.0.0.1:8080", help="HTTP listener; empty: leave HTTP out.")
@click.option("--model", required=True, help="Name of the model on the daemon.")
@click.option(
    "--model-file",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    required=True,
    help="The ONNX file the daemon serves under that name, for the in-process figures and the inputs' shapes.",
)
@click.option("--rows", default=1, help="Rows of the first open dimension.")
@click.option("--open-dim", default=1, help="Size of every other open dimension.")
@click.option(
    "--body", type=click.Path(exists=True, dir_okay=False, path_type=Path), help="Also ask raw, with this file."
)
@click.option("--content-type", default="application/octet-stream", help="Of the raw body.")
@click.option("-c", "--concurrency", "concurrencies", multiple=True, type=click.IntRange(1), default=(1,))
@click.option("--rate", "rate_s", default=0.0, type=click.FloatRange(0), help="Open loop, requests a second; 0: none.")
@click.option("--connections", default=8, type=click.IntRange(1), help="Connections of concurrent asking, at most.")
@click.option("--seconds", default=1.0, type=click.FloatRange(0, min_open=True), help="Per way and repetition.")
@click.option("--repetitions", default=5, type=click.IntRange(1))
@click.option("--pid", default=0, help="The daemon, for its memory; 0: whoever listens on the socket.")
@click.option(
    "--json", "json_to", type=click.Path(path_type=Path, allow_dash=True), help="Write figures; - for stdout."
)
def main(
    socket_path: Path,
    url: str,
    model: str,
    model_file: Path,
    rows: int,
    open_dim: int,
    body: Path | None,
    content_type: str,
    pid: int,
    json_to: Path | None,
    **plan: Any,
) -> None:
    """Measure a running daemon."""
    raw = None if body is None else body.read_bytes()
    inputs = random_inputs(model_file, rows=rows, open_dim=open_dim)
    work = Work(model=model, inputs=inputs, body=raw, content_type=content_type)
    served: list[Way] = [Unix(socket_path, work)]
    if url:
        served.append(Http(url, work))
    if raw is not None:
        served.append(Unix(socket_path, work, raw=True))
        if url:
            served.append(Http(url, work, raw=True))
    yardsticks = [InProcess(model_file, work), Floor(Unix(socket_path, work).request_bytes)]
    console = Console(stderr=json_to is not None and str(json_to) == "-")
    rows_out = measure(Plan(**plan), yardsticks, served, console)
    memory = processes(pid or daemon_pid(socket_path))
    console.print(figures_table(rows_out), memory_table(memory), sep="\n")
    if json_to is not None:
        text = json.dumps({"model": model, "figures": rows_out, "processes": memory}, indent=1)
        if str(json_to) == "-":
            click.echo(text)
        else:
            json_to.write_text(text + "\n")
    if any(row["errors"] for row in rows_out):
        raise click.ClickException("some requests failed; see the table")


def measure(plan: Plan, yardsticks: list[Any], served: list[Way], console: Console) -> list[dict[str, Any]]:
    """Return one row of figures per way and load, with the overhead over in-process."""
    loads: dict[str, dict[str, Callable[[], Sample]]] = {}
    for callers in plan.concurrencies:
        runs: dict[str, Callable[[], Sample]] = {
            way.name: partial(closed_blocking, way, seconds=plan.seconds) for way in yardsticks
        }
        for way in served:
            runs[way.name] = _closed(way, callers, plan)
        loads[f"closed, {callers}"] = runs
    if plan.rate_s:
        loads[f"open, {plan.rate_s:g}/s"] = {way.name: _open(way, plan) for way in served}
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    rows: list[dict[str, Any]] = []
    with Progress(*columns, console=console, transient=True) as progress:
        bar = progress.add_task("measuring", total=plan.repetitions * sum(map(len, loads.values())))
        for load, runs in loads.items():
            samples = interleaved(runs, repetitions=plan.repetitions, on_step=lambda: progress.advance(bar))
            rows += [{"load": load, "way": name, **medians(found)} for name, found in samples.items()]
    base = next((row["p50_us"] for row in rows if row["way"] == IN_PROCESS), 0.0)
    for row in rows:
        row["over_us"] = row["p50_us"] - base
        row["ratio"] = row["p50_us"] / base if base else 0.0
    return rows


def daemon_pid(socket_path: Path) -> int:
    """Return the process that serves the socket; ``ClickException`` if systemd opened it, which hides that."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
        sock.connect(str(socket_path))
        pid = peer_credentials(sock).pid
    if pid == 1:
        raise click.ClickException("systemd holds the socket: name the daemon's process with --pid")
    return pid


def processes(pid: int) -> list[dict[str, Any]]:
    """Return pid, name and PSS (bytes) of a process and everything below it."""
    found = []
    root = psutil.Process(pid)
    for process in (root, *root.children(recursive=True)):
        try:
            command = " ".join(process.cmdline()[-4:]) or process.name()
            found.append({"pid": process.pid, "command": command, "pss_bytes": process.memory_full_info().pss})
        except psutil.Error:
            continue  # it ended meanwhile, or is not ours to look into
    return found


def figures_table(rows: list[dict[str, Any]]) -> Table:
    """Return the figures for people."""
    table = Table(
        title="medians of repetitions; over and × compare p50 with in-process",
        title_justify="left",
        box=box.SIMPLE_HEAD,
        padding=0,
        collapse_padding=True,
        pad_edge=False,
    )
    for name in ("load", "way", "p50 µs", "p99 µs", "asked/s", "over µs", "×", "errors"):
        table.add_column(name, justify="left" if name in ("load", "way") else "right", no_wrap=True)
    for row in rows:
        over = ("", "") if row["way"] == IN_PROCESS else (f"{row['over_us']:.0f}", f"{row['ratio']:.2f}")
        numbers = (f"{row['p50_us']:.0f}", f"{row['p99_us']:.0f}", f"{row['rate_s']:,.0f}", *over)
        table.add_row(row["load"], row["way"], *numbers, f"{row['errors']:.0f}" if row["errors"] else "")
    return table


def memory_table(rows: list[dict[str, Any]]) -> Table:
    """Return the memory for people."""
    table = Table(title="memory", title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1), collapse_padding=True)
    table.add_column("pid", justify="right")
    table.add_column("command", overflow="ellipsis", no_wrap=True, max_width=58)
    table.add_column("PSS MB", justify="right")
    for row in rows:
        table.add_row(str(row["pid"]), row["command"], f"{row['pss_bytes'] / 1e6:.1f}")
    table.add_row("", "total", f"{sum(row['pss_bytes'] for row in rows) / 1e6:.1f}")
    return table


def _closed(way: Way, callers: int, plan: Plan) -> Callable[[], Sample]:
    if callers == 1:
        return partial(closed_blocking, way, seconds=plan.seconds)
    connections = min(callers, plan.connections)

    def run() -> Sample:
        return uvloop.run(closed_concurrent(way, callers=callers, connections=connections, seconds=plan.seconds))

    return run


def _open(way: Way, plan: Plan) -> Callable[[], Sample]:
    def run() -> Sample:
        return uvloop.run(open_loop(way, rate_s=plan.rate_s, connections=plan.connections, seconds=plan.seconds))

    return run


if __name__ == "__main__":
    main()
