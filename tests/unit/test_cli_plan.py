"""Times as people write them on the command lines."""

import click
import pytest
from click.testing import CliRunner

from agent.arguments import plan_of
from agent.cli_plan import plan_options
from agent.deploy.plan import Plan
from agent.errors import InvalidInputError


@click.command()
@plan_options
def verb(plan: dict[str, object]) -> None:
    click.echo(repr(plan))


@pytest.mark.parametrize(
    ("arguments", "plan"),
    [
        ([], {}),
        (["--now"], {"ignore_window": True}),
        (["--force-after", "2h"], {"force_after_s": 7200.0}),
        (["--force-after", "90"], {"force_after_s": 90.0}),
        (["--stage-only", "--not-after", "2026-11-21T22:00+01:00"], {"stage_only": True, "not_after": 1795294800.0}),
    ],
)
def test_options_become_the_plan_of_the_wish(arguments: list[str], plan: dict[str, object]) -> None:
    done = CliRunner().invoke(verb, arguments)
    assert done.output == f"{plan}\n"
    assert plan_of(plan) == Plan(**plan)


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--force-after", "soon"], "no time such as 90s, 30m, 2h or 3d"),
        (["--not-after", "tomorrow"], "no moment such as 2026-11-21T22:00"),
    ],
)
def test_what_is_no_time_is_refused_with_an_example(arguments: list[str], complaint: str) -> None:
    done = CliRunner().invoke(verb, arguments)
    assert done.exit_code == 2
    assert complaint in done.output


@pytest.mark.parametrize(
    "args",
    [
        {"stage_only": "yes"},
        {"force_after_s": -1},
        {"not_after": True},
        {"ignore_window": True, "force_after_s": 1},
    ],
)
def test_a_command_whose_plan_makes_no_sense_is_refused(args: dict[str, object]) -> None:
    with pytest.raises(InvalidInputError):
        plan_of(args)
