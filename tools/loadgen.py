"""``python -m tools.loadgen``: what asking the daemon costs, beside the same work in one's own process.

In one run, interleaved: ``session.run`` of the same file, a blocking unix-socket echo of the same bytes, and a running
daemon over a direct lane, its unix socket and HTTP; closed loops at each concurrency, and an open loop at a fixed rate
if asked. Where the daemon gives no lane, its row says why.
With ``--build``, concurrent asking is also done by a generator in C, which leaves the cores to the daemon.
Figures are medians of the repetitions; CPU time is that of each process over all of them, for each request asked.
Memory is the proportional set size of every process of the daemon.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import click
import uvloop
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from agent.client.messages import DEFAULT_SOCKET
from agent.serving.identity import peer_credentials
from tools.bench_lanes import LaneError, refusal
from tools.bench_load import Sample, closed_blocking, closed_concurrent, interleaved, medians, open_loop
from tools.bench_native import Native, NativeError, build, over_http, over_lane, over_unix
from tools.bench_processes import Processes, used_between
from tools.bench_report import Report, compared
from tools.bench_targets import FLOOR, FLOOR_ONE_CORE, IN_PROCESS
from tools.bench_ways import Floor, Http, InProcess, Unix, Way, Work, random_inputs

Runs = Mapping[str, Callable[[], Sample]]


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
@click.option(
    "--connections",
    default=8,
    type=click.IntRange(1),
    help="Connections of concurrent asking, at most; HTTP has one each.",
)
@click.option("--seconds", default=1.0, type=click.FloatRange(0, min_open=True), help="Per way and repetition.")
@click.option("--repetitions", default=5, type=click.IntRange(1))
@click.option("--pid", default=0, help="The daemon, for its CPU time and memory; 0: whoever listens on the socket.")
@click.option("--build", type=click.Path(file_okay=False, path_type=Path), help="Folder to compile the C generator in.")
@click.option("--results", type=click.Path(file_okay=False, path_type=Path), help="Write tables, JSON and a plot here.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of tables.")
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
    build: Path | None,
    results: Path | None,
    as_json: bool,
    **plan: Any,
) -> None:
    """Measure a running daemon."""
    raw = None if body is None else body.read_bytes()
    inputs = random_inputs(model_file, rows=rows, open_dim=open_dim)
    work = Work(model=model, inputs=inputs, body=raw, content_type=content_type)
    served: list[Way] = [Unix(socket_path, work, lanes=True), Unix(socket_path, work)]
    if url:
        served.append(Http(url, work))
    if raw is not None:
        served.append(Unix(socket_path, work, raw=True))
        if url:
            served.append(Http(url, work, raw=True))
    left_out: list[str] = []
    native = natives(build, socket_path, url, work, left_out)
    yardsticks = [InProcess(model_file, work, IN_PROCESS), *floors(Unix(socket_path, work).request_bytes)]
    processes = Processes(pid or daemon_pid(socket_path))
    try:
        with showing_progress() as progress:
            figures = measure(loads(Plan(**plan), yardsticks, served, native), Plan(**plan), processes, progress)
    except NativeError as error:
        raise click.ClickException(str(error)) from error
    report = Report(model=model, rows=compared(figures), processes=processes.memory(), left_out=left_out)
    click.echo(report.json() if as_json else report.text())
    if results is not None:
        for line in report.write(results):
            click.echo(f"left out: {line}", err=True)
        click.echo(f"written to {results}", err=True)
    if any(row["errors"] for row in figures if "skipped" not in row):
        raise click.ClickException("some requests failed; see the table")


def natives(folder: Path | None, socket_path: Path, url: str, work: Work, left_out: list[str]) -> list[Native]:
    """Return the ways of the C generator; what hinders it is added to ``left_out``."""
    if folder is None:
        return []
    try:
        program = build(folder)
    except NativeError as error:
        left_out.append(f"the native ways: {error}")
        return []
    unix = [over_lane(program, socket_path, work), over_unix(program, socket_path, work)]
    return [*unix, *([over_http(program, Http(url, work))] if url else [])]


def floors(nbytes: int) -> list[Floor]:
    """Return the echo across two cores, which is the yardstick (none where there is one core), and on one core."""
    across = [Floor(nbytes, FLOOR)] if len(os.sched_getaffinity(0)) > 1 else []
    return [*across, Floor(nbytes, FLOOR_ONE_CORE, across=False)]


def loads(
    plan: Plan, yardsticks: Sequence[Any], served: Sequence[Way], native: Sequence[Native], title: str = ""
) -> dict[str, Runs]:
    """Return what to run, by load and way; ``title`` stands before each load's name."""
    found: dict[str, Runs] = {}
    for callers in plan.concurrencies:
        runs: dict[str, Callable[[], Sample]] = {
            way.name: partial(closed_blocking, way, seconds=plan.seconds) for way in yardsticks
        }
        runs |= {way.name: _closed(way, callers, plan) for way in served}
        for generator in native:
            runs[generator.name] = partial(
                generator.closed, callers=callers, connections=plan.connections, seconds=plan.seconds
            )
        found[f"{title}closed loop, {callers} outstanding"] = runs
    if plan.rate_s:
        found[f"{title}open loop, {plan.rate_s:g}/s"] = {way.name: _open(way, plan) for way in served}
    return found


def showing_progress() -> Progress:
    """Return a bar on standard error, for ``measure``."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    return Progress(*columns, console=Console(stderr=True), transient=True)


def measure(
    loads: Mapping[str, Runs], plan: Plan, processes: Processes, progress: Progress, yardsticks: Sequence[str] = ()
) -> list[dict[str, Any]]:
    """Return one row of figures per load and way; one without its lane has ``skipped``, the reason, and no figures.

    ``yardsticks`` are further ways that the daemon has no part in.
    """
    rows: list[dict[str, Any]] = []
    beside = {IN_PROCESS, FLOOR, FLOOR_ONE_CORE, *yardsticks}
    bar = progress.add_task("measuring", total=plan.repetitions * sum(map(len, loads.values())))
    for load, runs in loads.items():
        used_s: dict[str, list[dict[str, float]]] = {name: [] for name in runs}
        skipped: dict[str, str] = {}

        progress.update(bar, description=load)

        def watched(
            name: str, run: Callable[[], Sample], used_s: dict[str, Any] = used_s, skipped: dict[str, str] = skipped
        ) -> Sample | None:
            before = processes.times()
            progress.advance(bar)
            try:
                sample = None if name in skipped else run()
            except LaneError as error:
                skipped[name] = str(error)
                return None
            used_s[name].append(used_between(before, processes.times()))
            return sample

        for name, samples in interleaved(runs, repetitions=plan.repetitions, on_run=watched).items():
            if name in skipped:
                rows.append({"load": load, "way": name, "skipped": skipped[name]})
                continue
            cpu_us = _cpu_us(samples, [] if name in beside else used_s[name])
            rows.append({"load": load, "way": name, **medians(samples), "cpu_us": cpu_us})
    progress.remove_task(bar)
    return rows


def daemon_pid(socket_path: Path) -> int:
    """Return the process that serves the socket; ``ClickException`` if systemd opened it, which hides that."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
        sock.connect(str(socket_path))
        pid = peer_credentials(sock).pid
    if pid == 1:
        raise click.ClickException("systemd holds the socket: name the daemon's process with --pid")
    return pid


def _closed(way: Way, callers: int, plan: Plan) -> Callable[[], Sample]:
    connections = callers if isinstance(way, Http) else min(callers, plan.connections)  # HTTP: one request on each

    def run() -> Sample:
        _require_lane(way)
        if callers == 1:
            return closed_blocking(way, seconds=plan.seconds)
        return uvloop.run(closed_concurrent(way, callers=callers, connections=connections, seconds=plan.seconds))

    return run


def _open(way: Way, plan: Plan) -> Callable[[], Sample]:
    def run() -> Sample:
        _require_lane(way)
        return uvloop.run(open_loop(way, rate_s=plan.rate_s, connections=plan.connections, seconds=plan.seconds))

    return run


def _require_lane(way: Way) -> None:
    """Ask the daemon itself: the client library would fall back and not say why."""
    if isinstance(way, Unix) and way.lanes and (reason := refusal(way.path, way.work.model)):
        raise LaneError(reason)


def _cpu_us(samples: list[Sample], used_s: list[dict[str, float]]) -> dict[str, float]:
    """Return CPU microseconds for each request, by role: the client's, and those of the daemon's processes."""
    total = {"client": sum(sample.client_cpu_s for sample in samples)}
    for used in used_s:
        for role, seconds in used.items():
            total[role] = total.get(role, 0.0) + seconds
    asked = max(1, sum(sample.asked * sample.rows for sample in samples))
    return {role: seconds / asked * 1e6 for role, seconds in total.items() if seconds > 0}


if __name__ == "__main__":
    main()
