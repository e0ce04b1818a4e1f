"""Measurements for people and for programs: tables of 80 columns, JSON, and a plot of latencies as PNG."""

from __future__ import annotations

import io
import json
import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any, Final

from rich.console import Console
from rich.table import Table

from tools.bench_targets import FLOOR, IN_PROCESS, Target

WIDTH: Final = 80
_ROLES: Final = ("daemon", "worker", "zygote", "other", "client")
_COLUMNS_MAX: Final = 3  # of panels
_BELOW_MAX: Final = 1000.0  # 99.9 %: where the plot's axis ends


@dataclass(frozen=True, kw_only=True)
class Report:
    """One run of the bench.

    ``rows`` has one entry per load and way, as ``compared`` returns them; ``processes`` pid, role and PSS of each;
    ``left_out`` what was not measured and why; ``facts`` further figures, by what they are of; ``targets`` what must
    be reached.
    """

    model: str
    rows: Sequence[dict[str, Any]]
    processes: Sequence[dict[str, Any]]
    left_out: Sequence[str] = ()
    facts: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    targets: Sequence[Target] = ()

    def text(self) -> str:
        """Return the tables."""
        file = io.StringIO()
        console = Console(file=file, width=WIDTH, color_system=None, highlight=False)
        for load, rows in groupby(self.rows, key=lambda row: str(row["load"])):
            shown = list(rows)
            console.print(load, _latencies(shown), f"\n{load}: CPU time per request, µs", _cpu(shown), sep="\n")
            for row in shown:
                if "skipped" in row:
                    console.print(f"{row['way']}: {row['skipped']}", soft_wrap=True)
                elif row["errors"]:
                    console.print(f"{row['way']}: errors {row['errors']}", soft_wrap=True)
            console.print()
        for title, facts in self.facts.items():
            console.print(title, _facts(facts), "", sep="\n")
        if self.processes:
            console.print("memory", _memory(self.processes), sep="\n")
        if self.targets:
            console.print("\ntargets", _targets(self.targets), sep="\n")
        console.print(f"\nMedians of interleaved repetitions on {machine()}.", soft_wrap=True)
        for line in self.left_out:
            console.print(f"Left out: {line}", soft_wrap=True)
        return "\n".join(line.rstrip() for line in file.getvalue().splitlines()) + "\n"

    def json(self) -> str:
        """Return everything."""
        value = {
            "model": self.model,
            "machine": machine(),
            "figures": self.rows,
            "processes": self.processes,
            "left_out": self.left_out,
            "facts": self.facts,
            "targets": [asdict(target) for target in self.targets],
        }
        return json.dumps(value, indent=1)

    def write(self, folder: Path) -> list[str]:
        """Write ``report.txt``, ``report.json`` and ``latency.png``; return why one is missing."""
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "report.txt").write_text(self.text())
        (folder / "report.json").write_text(self.json() + "\n")
        return plot(self.rows, folder / "latency.png")


def compared(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return rows with what each costs over the yardsticks of its load: ``over_*_us``, ``of_*`` (ratios).

    Without a yardstick in a load, as in an open loop, its figures are missing. With many outstanding, only the ratio
    of rates says something of the server: latency is then mostly the time in its queue.
    """
    found = []
    for row in rows:
        if "skipped" in row:
            found.append(row)
            continue
        row = dict(row)
        for name, key in ((IN_PROCESS, "in_process"), (FLOOR, "floor")):
            if row["way"] == name:
                continue
            base = next((other for other in rows if (other["load"], other["way"]) == (row["load"], name)), None)
            if base is not None and base.get("p50_us"):
                row[f"over_{key}_us"] = row["p50_us"] - base["p50_us"]
                row[f"p50_of_{key}"] = row["p50_us"] / base["p50_us"]
                row[f"rate_of_{key}"] = row["rate_s"] / base["rate_s"] if base["rate_s"] else 0.0
        found.append(row)
    return found


def plot(rows: Sequence[dict[str, Any]], path: Path) -> list[str]:
    """Draw latency by quantile, one panel per load; return why not, if not."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return ["latency.png: matplotlib is not installed (pip install 'inferd[bench]')"]
    loads = list(dict.fromkeys(row["load"] for row in rows))
    if not loads:
        return ["latency.png: no latency was measured"]
    columns = min(len(loads), _COLUMNS_MAX)
    lines = -(-len(loads) // columns)
    figure = Figure(figsize=(6 * columns, 5 * lines), layout="constrained")
    for place, load in enumerate(loads, start=1):
        axes = figure.add_subplot(lines, columns, place)
        for row in rows:
            if row["load"] == load and row.get("quantiles_us"):
                points = [(1 / (1 - float(q) / 100), us) for q, us in row["quantiles_us"].items() if float(q) < 100]
                axes.plot(*zip(*points, strict=True), marker=".", label=row["way"])
        axes.set(
            xscale="log", yscale="log", xlim=(1, _BELOW_MAX), title=load, xlabel="percentile", ylabel="latency, µs"
        )
        axes.set_xticks([1, 2, 10, 100, 1000], ["0", "50", "90", "99", "99.9"])
        axes.grid(visible=True, which="both", alpha=0.25)
        if axes.get_legend_handles_labels()[0]:
            axes.legend()
    figure.savefig(path, dpi=120)
    return []


def machine() -> str:
    """Return processor, cores, kernel and Python."""
    model = platform.processor() or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), model)
    except OSError:
        pass
    cores = len(os.sched_getaffinity(0))
    return f"{model}, {cores} cores, Linux {platform.release()}, Python {platform.python_version()}"


def _latencies(rows: Sequence[dict[str, Any]]) -> Table:
    table = _table("way")
    for name in (
        *("p50\nµs", "p99\nµs", "requests\n/s", "rate, ×\nin-proc."),
        *("p50 over\nin-proc.", "×", "p50 over\nfloor", "×"),
    ):
        table.add_column(name, justify="right", no_wrap=True)
    for row in rows:
        if "skipped" in row:
            table.add_row(row["way"], "–")
            continue
        table.add_row(
            row["way"],
            f"{row['p50_us']:,.0f}",
            f"{row['p99_us']:,.0f}",
            f"{row['rate_s']:,.0f}",
            _number(row, "rate_of_in_process", ".2f"),
            *(_number(row, "over_in_process_us", "+,.0f"), _times(row, "p50_of_in_process")),
            *(_number(row, "over_floor_us", "+,.0f"), _times(row, "p50_of_floor")),
        )
    return table


def _cpu(rows: Sequence[dict[str, Any]]) -> Table:
    table = _table("way")
    rows = [row for row in rows if "skipped" not in row]
    roles = [role for role in _ROLES if any(role in row["cpu_us"] for row in rows)]
    for role in roles:
        table.add_column(role, justify="right")
    table.add_column("total", justify="right")
    for row in rows:
        used = row["cpu_us"]
        cells = [f"{used[role]:.1f}" if role in used else "" for role in roles]
        table.add_row(row["way"], *cells, f"{sum(used.values()):.1f}")
    return table


def _memory(rows: Sequence[dict[str, Any]]) -> Table:
    table = _table("process")
    table.add_column("pid", justify="right")
    table.add_column("PSS MB", justify="right")
    for row in rows:
        table.add_row(row["role"], str(row["pid"]), f"{row['pss_bytes'] / 1e6:.1f}")
    table.add_row("total", "", f"{sum(row['pss_bytes'] for row in rows) / 1e6:.1f}")
    return table


def _facts(facts: Mapping[str, Any]) -> Table:
    table = _table("")
    table.show_header = False
    table.add_column("", justify="right", overflow="fold")
    for name, value in facts.items():
        table.add_row(name, f"{value:,.2f}" if isinstance(value, float) else str(value))
    return table


def _targets(targets: Sequence[Target]) -> Table:
    table = _table("work")
    table.add_column("way", no_wrap=True)
    for name in ("must be", "measured"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("")
    for target in targets:
        table.add_row(target.work, target.way, target.limit, target.measured, target.verdict)
    return table


def _table(first: str) -> Table:
    table = Table(box=None, padding=(0, 0, 0, 1), pad_edge=False)
    table.add_column(first, no_wrap=True)
    return table


def _number(row: dict[str, Any], key: str, form: str) -> str:
    return format(row[key], form) if key in row else ""


def _times(row: dict[str, Any], key: str) -> str:
    return _number(row, key, ".1f" if row.get(key, 0.0) < 100 else ",.0f")
