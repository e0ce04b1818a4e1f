"""``make bench-pull``: what a pull costs beside ``curl``, ``sha256sum`` and ``sync`` of the same bytes, in one run.

Both take turns over the same server at the same priority; figures are medians, and the spread of their ratio says how
much the machine had else to do. The puller is the real trust child as the daemon starts it.
"""

from __future__ import annotations

import json
import resource
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final
from urllib.request import urlopen

import click
import msgspec
from rich.console import Console
from rich.table import Table

from agent.config import MIB, StoreConfig
from agent.profile import Hardware
from tools.bench_pull_store import NAME, PLAIN, SERVED, TEAM, LargeStore
from tools.loadgen import showing_progress

_NICE: Final = "10"  # the puller's own
_LOOK_S: Final = 0.02
_HARDWARE: Final = Hardware(arch="x86_64", cores=2, memory_bytes=8 << 30, cpu_features=(), gpu_reason="not asked")


class BenchError(Exception):
    """Something that must work for a measurement did not."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Figure:
    """One figure and what it must be; ``bound`` is a lower one for ratios of throughput, else an upper one."""

    name: str
    value: float
    bound: float
    unit: str = ""
    at_least: bool = False
    note: str = ""

    @property
    def met(self) -> bool:
        """Whether it is what it must be."""
        return self.value >= self.bound if self.at_least else self.value <= self.bound


class Box:
    """A state folder and the requests a daemon would make for it."""

    def __init__(self, state: Path, url: str, anchor: Path) -> None:
        self.state = state
        self._store = StoreConfig(urls=(url,), anchor=str(anchor), disk_reserve_bytes=0)

    def start(self, op: str, version: str = "") -> subprocess.Popen[bytes]:
        """Return a trust child that has its request."""
        request = {
            "op": op,
            "state_dir": str(self.state),
            "store": self._store,
            "hardware": _HARDWARE,
            "team": TEAM,
            "name": NAME,
            "version": version,
        }
        child = subprocess.Popen(
            [sys.executable, "-P", "-m", "agent.bundles.child"], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        assert child.stdin is not None
        child.stdin.write(msgspec.json.encode(request))
        child.stdin.close()
        return child

    def run(self, op: str, version: str = "") -> tuple[dict[str, Any], int]:
        """Return the child's answer and its peak memory in bytes."""
        child = self.start(op, version)
        with _peak_memory(child.pid) as peak:
            assert child.stdout is not None
            lines = child.stdout.read().splitlines()
            child.wait()
        answer: dict[str, Any] = json.loads(lines[-1])
        if answer["event"] == "error":
            raise BenchError(f"{op}: {answer['code']}: {answer['message']}")
        return answer, peak()

    def chunks_done(self) -> int:
        """Return how many chunks the journal of the pull under way counts."""
        journals = list(self.state.glob("staging/*/journal"))
        return sum(mark != 0 for mark in journals[0].read_bytes()) if journals else 0


@click.command(context_settings={"help_option_names": ["-h", "--help"], "show_default": True})
@click.option("--state", type=click.Path(path_type=Path), help="Where to work; not in memory.  [default: a new folder]")
@click.option("--megabytes", default=1024, type=click.IntRange(64), help="Of the bundle.")
@click.option("--repetitions", default=5, type=click.IntRange(1), help="Interleaved.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of tables.")
def main(state: Path | None, megabytes: int, repetitions: int, as_json: bool) -> None:
    """Measure pulls beside curl, sha256sum and sync.

    \b
    Example: python -m tools.bench_pull --megabytes 256 --repetitions 3
    """
    if missing := [name for name in ("curl", "sha256sum", "sync", "nice") if shutil.which(name) is None]:
        raise click.ClickException(f"{', '.join(missing)} must be installed to compare with")
    if state is not None:
        state.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=state, prefix="bench-pull-") as folder:
        try:
            figures, times = measure(Path(folder), megabytes=megabytes, repetitions=repetitions)
        except BenchError as error:
            raise click.ClickException(str(error)) from error
    if as_json:
        click.echo(json.dumps({"figures": [_plain(figure) for figure in figures], "seconds": times}))
    else:
        _print(figures, times, megabytes)
    sys.exit(0 if all(figure.met for figure in figures) else 1)


def measure(folder: Path, *, megabytes: int, repetitions: int) -> tuple[list[Figure], dict[str, list[float]]]:
    """Return all figures, and the seconds of each repetition."""
    with showing_progress() as progress:
        bar = progress.add_task("bundle", total=megabytes * MIB)
        store = LargeStore(folder)
        bundle = store.publish_random(megabytes, lambda size: progress.advance(bar, size))
        with serving(store.root) as url:
            bar = progress.add_task("curl and pulls", total=repetitions)
            times, peaks = _throughput(
                folder, store, url, bundle.manifest.files[-1].sha256, repetitions, lambda: progress.advance(bar)
            )
            bar = progress.add_task("changes, cuts, refreshes", total=3)
            rest = []
            for part in (after_insertion, after_a_kill, nothing_new):
                rest += part(folder, store, url)
                progress.advance(bar)
    ratios = [curl / pull for curl, pull in zip(times["curl"], times["pull"], strict=True)]
    figures = [
        Figure(
            name="rate beside curl + sha256sum + sync",
            value=round(statistics.median(times["curl"]) / statistics.median(times["pull"]), 2),
            bound=0.7,
            unit="x",
            at_least=True,
            note=f"{min(ratios):.2f} to {max(ratios):.2f} in {repetitions} rounds",
        ),
        Figure(name="peak memory of the puller", value=round(max(peaks) / 1e6, 1), bound=120.0, unit="MB"),
        *rest,
    ]
    return figures, {name: [round(value, 3) for value in values] for name, values in times.items()}


def _throughput(
    folder: Path, store: LargeStore, url: str, wanted: str, repetitions: int, advance: Callable[[], None]
) -> tuple[dict[str, list[float]], list[int]]:
    times: dict[str, list[float]] = {"curl": [], "pull": [], "curl, CPU": [], "pull, CPU": []}
    peaks: list[int] = []

    def curl() -> None:
        target = folder / "curled.bin"
        commands = (["curl", "-sSf", "-o", str(target), f"{url}/{PLAIN}"], ["sha256sum", str(target)],
                    ["sync", str(target)])  # fmt: skip
        for command in commands:
            done = subprocess.run(["nice", "-n", _NICE, *command], capture_output=True, check=False)
            if done.returncode or (command[0] == "sha256sum" and wanted.encode() not in done.stdout):
                raise BenchError(f"{' '.join(command)}: {done.stderr.decode()}")
        target.unlink()

    def pull() -> None:
        box = Box(folder / "state", url, store.anchor)
        peaks.append(box.run("fetch", "1.0.0")[1])

    for number in range(repetitions):
        for name, work in (("curl", curl), ("pull", pull))[:: 1 if number % 2 else -1]:
            started, cpu = time.monotonic(), _cpu_s()
            work()
            times[name].append(time.monotonic() - started)
            times[f"{name}, CPU"].append(_cpu_s() - cpu)
            _remove(folder / "state")
        advance()
    return times, peaks


def after_insertion(folder: Path, store: LargeStore, url: str) -> list[Figure]:
    """Return how much of an update is fetched that inserts 1 KB in the middle of the weights."""
    box = Box(folder / "state", url, store.anchor)
    box.run("fetch", "1.0.0")
    bundle = store.publish_with_insertion(1024)
    before = served(url)
    box.run("fetch", "1.1.0")
    after = served(url)
    share = (after["bytes"] - before["bytes"]) / bundle.manifest.total_size
    _remove(box.state)
    return [
        Figure(name="fetched after 1 KB was inserted", value=round(100 * share, 2), bound=3.0, unit="%"),
        Figure(name="chunks of it", value=after["chunks"] - before["chunks"], bound=2),
    ]


def after_a_kill(folder: Path, store: LargeStore, url: str) -> list[Figure]:
    """Return how many chunks are fetched twice when a pull is killed and goes on."""
    box = Box(folder / "state", url, store.anchor)
    before = served(url)["chunks"]
    child = box.start("fetch", "1.0.0")
    while box.chunks_done() < 3:
        if child.poll() is not None:
            raise BenchError("the pull ended before it could be killed")
        time.sleep(0.001)
    child.send_signal(signal.SIGKILL)
    child.wait()
    chunks = json.loads(_manifest(box.state))["files"]
    box.run("fetch", "1.0.0")
    asked = served(url)["chunks"] - before
    total = sum(len(file["chunks"]) for file in chunks)
    _remove(box.state)
    return [
        Figure(
            name="chunks fetched twice after kill -9",
            value=asked - total,
            bound=4,
            note=f"{asked} requests for {total} chunks",
        )
    ]


def nothing_new(folder: Path, store: LargeStore, url: str, *, runs: int = 7) -> list[Figure]:
    """Return what a refresh costs that finds nothing new."""
    box = Box(folder / "state", url, store.anchor)
    box.run("resolve")
    before = served(url)["requests"]
    box.run("resolve")
    requests = served(url)["requests"] - before
    seconds = []
    for _ in range(runs):
        since = _cpu_s()
        box.run("resolve")
        seconds.append(_cpu_s() - since)
    _remove(box.state)
    return [
        Figure(name="requests of a refresh with nothing new", value=requests, bound=2),
        Figure(
            name="its CPU time, import included",
            value=round(statistics.median(seconds), 3),
            bound=0.4,
            unit="s",
            note=f"{min(seconds):.2f} to {max(seconds):.2f} in {len(seconds)}",
        ),
    ]


def _cpu_s() -> float:
    """Return the CPU seconds of all children that have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def _manifest(state: Path) -> bytes:
    return next(state.glob("manifests/*.json")).read_bytes()


def served(url: str) -> dict[str, int]:
    """Return the requests, requests for chunks, and bytes that the server has answered."""
    with urlopen(f"{url}{SERVED}") as answer:
        counts: dict[str, int] = json.load(answer)
    return counts


def _remove(state: Path) -> None:
    if state.exists():
        subprocess.run(["chmod", "-R", "u+w", str(state)], check=True)
        shutil.rmtree(state)


@contextmanager
def serving(root: Path) -> Iterator[str]:
    """Serve ``root`` from a process of its own until the block ends; yield its address."""
    command = [sys.executable, "-m", "tools.bench_pull_store", str(root)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            yield process.stdout.readline().strip()
        finally:
            process.stdin.close()


@contextmanager
def _peak_memory(pid: int) -> Iterator[Callable[[], int]]:
    """Yield a function that tells the peak resident bytes of ``pid``, looked at while the block ran.

    ``getrusage`` would count what the forking process held.
    """
    peak, stop = [0], threading.Event()

    def look() -> None:
        while not stop.wait(_LOOK_S):
            try:
                text = Path(f"/proc/{pid}/status").read_text()
            except OSError:
                return
            if "VmHWM:" in text:
                peak[0] = int(text.partition("VmHWM:")[2].split()[0]) * 1024

    thread = threading.Thread(target=look)
    thread.start()
    try:
        yield lambda: peak[0]
    finally:
        stop.set()
        thread.join()


def _plain(figure: Figure) -> dict[str, Any]:
    return {
        "name": figure.name,
        "value": figure.value,
        "bound": figure.bound,
        "unit": figure.unit,
        "met": figure.met,
        "note": figure.note,
    }


def _print(figures: list[Figure], times: dict[str, list[float]], megabytes: int) -> None:
    table = Table("figure", "reached", "must be", "", "", box=None)
    for figure in figures:
        sign = ">=" if figure.at_least else "<="
        table.add_row(
            figure.name,
            f"{figure.value:g} {figure.unit}",
            f"{sign} {figure.bound:g} {figure.unit}",
            "yes" if figure.met else "NO",
            figure.note,
        )
    console = Console(width=120, highlight=False)
    console.print(table)
    for name, seconds in times.items():
        rate = megabytes / statistics.median(seconds)
        console.print(f"{name}: {rate:.0f} MiB per second, seconds {', '.join(f'{value:.2f}' for value in seconds)}")


if __name__ == "__main__":
    main()
