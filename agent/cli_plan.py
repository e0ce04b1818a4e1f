"""The options of a deployment that say when and on which terms it may take place, for ``inferctl`` and ``inferhub``."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from datetime import datetime
from typing import Any, Final, TypeVar

import click

Verb = TypeVar("Verb", bound=Callable[..., Any])
_DURATION: Final = re.compile(r"(\d+(?:\.\d+)?)(s|m|h|d)?")
_UNIT_S: Final = {None: 1, "s": 1, "m": 60, "h": 3600, "d": 86_400}


def seconds(text: str) -> float:
    """Return a time such as ``90``, ``30m``, ``2h`` or ``3d`` in seconds."""
    match = _DURATION.fullmatch(text)
    if match is None:
        raise click.BadParameter(f"{text!r} is no time such as 90s, 30m, 2h or 3d")
    return float(match[1]) * _UNIT_S[match[2]]


def moment(text: str) -> float:
    """Return a date and time as Unix seconds; by the clock of this machine if it names no offset."""
    try:
        return datetime.fromisoformat(text).timestamp()
    except ValueError as error:
        raise click.BadParameter(f"{text!r} is no moment such as 2026-11-21T22:00 or 2026-11-21T22:00+01:00") from error


def plan_options(verb: Verb) -> Verb:
    """Give a verb these options; it gets what was given of them as ``plan``."""

    @functools.wraps(verb)
    def with_plan(*args: Any, **options: Any) -> Any:
        names = ("stage_only", "ignore_window", "force_after_s", "not_after", "allow_incompatible")
        given = {name: options.pop(name) for name in names}
        return verb(*args, plan={name: value for name, value in given.items() if value not in (None, False)}, **options)

    chosen: Any = with_plan
    for option in reversed(
        (
            click.option(
                "--stage-only", is_flag=True, help="Fetch and verify now; load it by a later deploy, offline."
            ),
            click.option("--now", "ignore_window", is_flag=True, help="Wait for no window and no application's hold."),
            click.option(
                "--force-after",
                "force_after_s",
                metavar="TIME",
                type=seconds,
                help="Wait for windows and holds so long at most, such as 2h; then go ahead.",
            ),
            click.option(
                "--not-after",
                metavar="WHEN",
                type=moment,
                help="Give up if it was not loaded by then: 2026-11-21T22:00.",
            ),
            click.option(
                "--allow-incompatible", is_flag=True, help="Although it takes, gives or means something else."
            ),
        )
    ):
        chosen = option(chosen)
    result: Verb = chosen
    return result
