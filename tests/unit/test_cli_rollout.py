"""The options of a rollout, and how what it showed is told."""

from __future__ import annotations

from typing import Any

import click
import pytest
from click.testing import CliRunner

from agent.arguments import wish_of
from agent.cli_rollout import deployment_lines, rollout_options
from agent.deploy.rollout import Rollout
from agent.errors import InvalidInputError

pytestmark = pytest.mark.unit

RECORD: dict[str, Any] = {
    "id": "pin-1",
    "slot": "magika",
    "version": "2.0.0",
    "state": "rolled_back",
    "percent": 25.0,
    "source": "pin",
    "previous": "1.0.0",
    "code": "canary_failed",
    "message": "50.0% of 20 copies agree, 95.0% must (last: y: another best class)",
    "updated": 0.0,
    "boot_id": "5e1f",
    "clock_quality": "ntp",
    "attempts": {"received": 1},
    "offline_s": 0.0,
    "evidence": [
        {"percent": 0.0, "elapsed_s": 3.2, "good": 40, "compared": 20, "agreement": 0.5, "verdict": "too few agree",
         "difference": "y: \x1b[2Janother best class"},
    ],
}  # fmt: skip


def asked(*options: str) -> Any:
    """Return what a verb gets."""
    seen: list[Any] = []

    @click.command()
    @rollout_options
    @click.option("--force", is_flag=True)
    def verb(rollout: dict[str, Any] | None, force: bool) -> None:
        """Do it."""
        seen.append(rollout)

    done = CliRunner().invoke(verb, options)
    return seen[0] if seen else done.output


@pytest.mark.parametrize(
    ("options", "rollout"),
    [
        ((), None),
        (("--force",), None),
        (("--canary", "5,25,50"), {"canary": (5.0, 25.0, 50.0)}),
        (("--canary", "none", "--shadow", "0"), {"canary": (), "shadow": 0.0}),
        (
            ("--shadow", "20", "--step-s", "600", "--calls-min", "7", "--limit-s", "900", "--agreement", "0.98"),
            {"shadow": 20.0, "step_s": 600.0, "calls_min": 7, "limit_s": 900.0, "agreement_min": 0.98},
        ),
    ],
)
def test_options_become_a_rollout(options: tuple[str, ...], rollout: dict[str, Any] | None) -> None:
    assert asked(*options) == rollout


def test_what_is_no_percentage_is_named() -> None:
    assert "percentages such as 5,25,50" in asked("--canary", "five")


def test_a_wish_carries_it() -> None:
    args = {"model": "magika", "team": "files", "version": "2.0.0", "rollout": {"canary": [5, 25], "shadow": 20}}
    assert wish_of("w", args, "fleet").plan.rollout == Rollout(canary=(5.0, 25.0), shadow=20)
    assert wish_of("w", {**args, "rollout": None}, "fleet").plan.rollout is None
    for more in ({"rollout": {"canary": [25, 5]}}, {"rollout": {"shadows": 1}}, {"beside": True}, {"stage_only": True}):
        with pytest.raises(InvalidInputError):
            wish_of("w", {**args, **more}, "fleet")


def test_a_deployment_is_told_with_its_evidence() -> None:
    text = "\n".join(deployment_lines(RECORD))
    assert text.startswith("magika 2.0.0: rolled_back\n")
    assert "canary_failed: 50.0% of 20 copies agree" in text
    assert "copies only for 3.2 s: too few agree\n    40 good, 20 copies, 50.0% agree" in text
    assert "\x1b" not in text
    trying = {"requests": 12, "compared": 0, "agreement": None}
    text = "\n".join(deployment_lines({**RECORD, "state": "canary", "code": "", "trying": trying}))
    assert "magika 2.0.0: canary 25 %" in text
    assert "now: 12 requests answered by it" in text


def test_a_deployment_tells_what_was_begun_again_in_which_boot_and_by_which_clock() -> None:
    text = "\n".join(deployment_lines(RECORD))
    assert "clock" not in text
    assert "out of reach" not in text
    assert "more than once" not in text
    assert "last changed in boot 5e1f" in text
    record = {
        **RECORD,
        "offline_s": 7200.0,
        "clock_quality": "floor",
        "attempts": {"received": 2, "fetching": 3, "staged": 1},
    }
    text = "\n".join(deployment_lines(record))
    assert "by a clock that is wrong: it is before the newest signature" in text
    assert "the store was out of reach for 2 h 0 min of waiting" in text
    assert "begun more than once: received 2 times, fetching 3 times\n" in text
    older = {**RECORD, "boot_id": "", "clock_quality": "", "attempts": {}}
    assert "boot" not in "\n".join(deployment_lines(older))
