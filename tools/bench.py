"""``make bench``: fresh boxes with models made here, measured in one run beside the same work without a server.

Six sections, each with a daemon of its own over one signed store: the tiny MLP by every way (``tiny``), a 6 MB picture
(``frame6mb``), a CNN (``cnn``), twice the load that can be answered (``overload``), a swap of versions under load
(``swap``), and what an idle box takes (``memory``). At the end stands what must be reached, and what was.
Results are printed and written into a folder: ``report.txt``, ``report.json``, ``latency.png``.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any, Final

import click

from tools.bench_memory import memory
from tools.bench_native import NativeError
from tools.bench_overload import overload
from tools.bench_report import Report, compared
from tools.bench_served import Served, cnn, frame, tiny
from tools.bench_swap import swap
from tools.bench_targets import judged
from tools.demo.stage import StepFailedError
from tools.loadgen import showing_progress
from tools.rig.box import Rig

SECTIONS: Final = ("tiny", "frame6mb", "cnn", "overload", "swap", "memory")
_TITLES: Final = {
    "overload": "overload: an open loop at twice the capacity of a model without batching",
    "swap": "swap of a small model under load",
    "memory": "memory (PSS), idle CPU, cold start",
}


@click.command(context_settings={"help_option_names": ["-h", "--help"], "show_default": True})
@click.option("--state", type=click.Path(path_type=Path), default=Path(".state/bench"), help="Boxes, store and build.")
@click.option("--results", type=click.Path(path_type=Path), help="Folder of the results.  [default: STATE/results]")
@click.option("--only", default=",".join(SECTIONS), help="Sections, with commas between.")
@click.option("--repetitions", default=5, type=click.IntRange(1), help="Interleaved; medians are reported.")
@click.option("--seconds", default=0.5, type=click.FloatRange(0, min_open=True), help="tiny: per way and repetition.")
@click.option("--rate", default=500.0, type=click.FloatRange(0), help="tiny: open loop, requests a second; 0: none.")
@click.option("--frame-seconds", default=0.5, type=click.FloatRange(0, min_open=True), help="frame6mb: the same.")
@click.option("--cnn-seconds", default=1.5, type=click.FloatRange(0, min_open=True), help="cnn: the same.")
@click.option("--overload-seconds", default=3.0, type=click.FloatRange(0, min_open=True), help="Per repetition.")
@click.option("--overload-repetitions", default=3, type=click.IntRange(1), help="Interleaved with the capacity.")
@click.option("--queue", default=64, type=click.IntRange(8), help="overload: queue limit in requests.")
@click.option("--swaps", default=6, type=click.IntRange(1), help="Each beside a quiet window.")
@click.option("--swap-rate", default=500.0, type=click.FloatRange(1), help="swap: requests a second.")
@click.option("--idle-seconds", default=20.0, type=click.FloatRange(0, min_open=True), help="memory: idle CPU.")
@click.option("--starts", default=5, type=click.IntRange(0), help="memory: cold starts to time.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of tables.")
def main(state: Path, results: Path | None, only: str, as_json: bool, **options: Any) -> None:
    """Measure inferd against the same work in one process, in one run."""
    sections = [name for name in (part.strip() for part in only.split(",")) if name]
    if unknown := set(sections) - set(SECTIONS):
        raise click.UsageError(f"--only: {', '.join(sorted(unknown))}; known: {', '.join(SECTIONS)}")
    try:
        report = _measured(state, sections, options)
    except (StepFailedError, NativeError) as error:
        raise click.ClickException(str(error)) from error
    folder = results or state / "results"
    missing = report.write(folder)
    click.echo(report.json() if as_json else report.text())
    for line in missing:
        click.echo(f"left out: {line}", err=True)
    click.echo(f"written to {folder}", err=True)
    if any(row["errors"] for row in report.rows if "skipped" not in row):
        click.echo("some requests failed; see the tables", err=True)
        sys.exit(1)


def _measured(state: Path, sections: list[str], options: dict[str, Any]) -> Report:
    served: list[Served] = []
    facts: dict[str, dict[str, Any]] = {}
    left_out: list[str] = []
    again = {"repetitions": options["repetitions"]}
    began = time.monotonic()
    with Rig(state, fresh=True) as rig, showing_progress() as progress:
        progress.console.print("preparing a signed store …")
        rig.make_store()
        for number, name in enumerate(sections, start=1):
            progress.console.print(f"[{number}/{len(sections)}] {name}, {time.monotonic() - began:.0f} s so far")
            if name == "tiny":
                served.append(tiny(rig, progress, seconds=options["seconds"], rate_s=options["rate"], **again))
            elif name == "frame6mb":
                served.append(frame(rig, progress, seconds=options["frame_seconds"], **again))
            elif name == "cnn":
                served.append(cnn(rig, progress, seconds=options["cnn_seconds"], **again))
            elif name == "overload":
                facts[name] = overload(
                    rig,
                    progress,
                    seconds=options["overload_seconds"],
                    repetitions=options["overload_repetitions"],
                    queue_requests_max=options["queue"],
                )
            elif name == "swap":
                facts[name] = swap(rig, progress, swaps=options["swaps"], rate_s=options["swap_rate"])
            else:
                facts[name] = memory(
                    rig,
                    progress,
                    idle_seconds=options["idle_seconds"],
                    starts=options["starts"],
                    left_out=left_out,
                )
    rows = compared([row for section in served for row in section.rows])
    return Report(
        model="tiny, frame, resnet18, heavy",
        rows=rows,
        processes=served[0].processes if served else [],
        left_out=[line for section in served for line in section.left_out] + left_out,
        facts={_TITLES[name]: found for name, found in facts.items()},
        targets=judged(rows, facts),
    )


if __name__ == "__main__":
    main()
