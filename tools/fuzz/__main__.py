"""``make fuzz MINUTES=n``: frames and regions that are nearly right, against a real daemon with a real model.

The daemon must live, answer a client of good manners correctly after each case, never answer ``internal``, lose no
worker, and keep no descriptors or memory. Cases follow from the seed alone. What finds a fault is written to a file;
``--replay FILE`` sends it again.
"""

from __future__ import annotations

import secrets
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import click

from tools.demo.stage import StepFailedError
from tools.fuzz.cases import Case, make_case
from tools.fuzz.drive import Driver, FaultError, read_cases, write_cases
from tools.rig import models
from tools.rig.box import Rig
from tools.rig.line import MODEL
from tools.rig.watch import ARENA_IDLE_BYTES_MAX

_WARM_UP = 100  # cases before the first look
_LOOK_EVERY = 500  # cases
_CONFIG = f"""\
[shared_memory]
arena_idle_bytes_max = {ARENA_IDLE_BYTES_MAX}
"""


@click.command(context_settings={"help_option_names": ["-h", "--help"], "show_default": True})
@click.option("--state", type=click.Path(path_type=Path), default=Path(".state/fuzz"), help="Made fresh.")
@click.option("--minutes", default=1.0, type=click.FloatRange(0, min_open=True), help="After the set-up.")
@click.option("--cases", "cases_max", type=click.IntRange(1), help="Stop after so many.  [default: by time alone]")
@click.option("--seed", type=int, help="Of the cases.  [default: another each time]")
@click.option("--first", default=0, type=click.IntRange(0), help="Number of the first case.")
@click.option("--replay", type=click.Path(exists=True, dir_okay=False, path_type=Path), help="Send these cases.")
@click.option("--failing", type=click.Path(path_type=Path), help="File of a fault.  [default: STATE/failing.json]")
def main(
    state: Path,
    minutes: float,
    cases_max: int | None,
    seed: int | None,
    first: int,
    replay: Path | None,
    failing: Path | None,
) -> None:
    """Talk nonsense to a daemon."""
    cases: Iterator[Case]
    if replay is not None:
        cases = iter(read_cases(replay))  # before the folder is made fresh: it may lie there
        what = f"replaying {replay}"
    else:
        seed = secrets.randbelow(1 << 30) if seed is None else seed
        end = None if cases_max is None else first + cases_max
        cases = _cases(seed, first, end)
        what = f"seed {seed}"
    click.echo(f"{what}; preparing a signed store and a box", err=True)
    try:
        with Rig(state, fresh=True) as rig:
            rig.make_store()
            rig.publish_model(models.times(2.0, name=MODEL))
            rig.configure(MODEL, more=_CONFIG)
            rig.start_serving()
            with Driver(rig) as driver:
                done, fault = _drive(driver, cases, 60 * minutes if replay is None else float("inf"))
                outcomes, kept = driver.outcomes, list(driver.kept)
    except StepFailedError as error:
        raise click.ClickException(str(error)) from error
    click.echo(f"{what}: {done} cases; answers: {dict(outcomes.most_common())}")
    if not fault:
        return
    path = failing or state / "failing.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_cases(path, kept, fault)
    click.echo(f"FAULT {fault}")
    click.echo(f"{len(kept)} cases that may have led to it: python -m tools.fuzz --replay {path}")
    sys.exit(1)


def _cases(seed: int, first: int, end: int | None) -> Iterator[Case]:
    number = first
    while end is None or number < end:
        yield make_case(seed, number)
        number += 1


def _drive(driver: Driver, cases: Iterator[Case], seconds: float) -> tuple[int, str]:
    """Return how many cases were sent, and the fault, if there was one."""
    done, shown, began = 0, 0.0, time.monotonic()
    try:
        for case in cases:
            elapsed = time.monotonic() - began
            if elapsed > seconds:
                break
            driver.run(case)
            done += 1
            if done == _WARM_UP or not done % _LOOK_EVERY:
                driver.look()
            if elapsed - shown > 10.0:
                shown = elapsed
                click.echo(f"[{elapsed:6.1f} s] {done} cases", err=True)
        driver.look()
    except FaultError as error:
        return done, str(error)
    return done, ""


if __name__ == "__main__":
    main()
