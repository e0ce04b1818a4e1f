"""``make soak MINUTES=n``: swaps, kills, lies and crowds for as long as wanted, against a real daemon and store.

What is checked: every request got exactly one answer, and its own; the daemon never restarted; and when all is over,
its memory, descriptors, processes and shared regions are what they were. The choice of what is done when comes from
the seed; what meets what does not, since the processes are real. Exit status 1 if anything was wrong.
"""

from __future__ import annotations

import json
import secrets
import sys
import time
from pathlib import Path

import click

from tools.demo.stage import StepFailedError
from tools.rig.box import Rig
from tools.soak.run import prepare, soak


@click.command(context_settings={"help_option_names": ["-h", "--help"], "show_default": True})
@click.option("--state", type=click.Path(path_type=Path), default=Path(".state/soak"), help="Made fresh.")
@click.option("--minutes", default=1.0, type=click.FloatRange(0, min_open=True), help="Of trouble.")
@click.option("--seed", type=int, help="Of the choices.  [default: another each time]")
@click.option("--report", type=click.Path(path_type=Path), help="The JSON report.  [default: STATE/report.json]")
def main(state: Path, minutes: float, seed: int | None, report: Path | None) -> None:
    """Give a daemon a hard time."""
    seed = secrets.randbelow(1 << 30) if seed is None else seed
    began = time.monotonic()

    def say(text: str) -> None:
        click.echo(f"[{time.monotonic() - began:6.1f} s] {text}", err=True)

    say(f"seed {seed}; preparing a signed store and a box")
    try:
        with Rig(state, fresh=True) as rig:
            prepare(rig)
            found = soak(rig, seed=seed, seconds=60 * minutes, say=say)
    except StepFailedError as error:
        raise click.ClickException(f"{error} (seed {seed})") from error
    path = report or state / "report.json"
    path.write_text(json.dumps(found.plain(), indent=1) + "\n")
    before, after = found.before, found.after or found.before
    click.echo(f"seed {seed}: {sum(found.acts.values())} acts, {found.answers} answers checked")
    click.echo(f"acts: {', '.join(f'{count} {name}' for name, count in sorted(found.acts.items()))}")
    click.echo(
        f"daemon: {before['pss_bytes'] / 1e6:.1f} -> {after['pss_bytes'] / 1e6:.1f} MB PSS, "
        f"{before['descriptors']} -> {after['descriptors']} descriptors, "
        f"{before['children']} -> {after['children']} processes"
    )
    for note in found.notes:
        click.echo(f"note: {note}")
    for fault in found.faults:
        click.echo(f"FAULT {fault}")
    click.echo(f"{len(found.faults)} faults; report: {path}")
    sys.exit(1 if found.faults else 0)


if __name__ == "__main__":
    main()
