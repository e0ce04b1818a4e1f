"""What holds for every verb of ``inferctl``, and what some say when they are called wrongly."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from agent.cli import main
from tests.unit.test_cli import daemon, replies

pytestmark = pytest.mark.unit


def verbs(group: click.Group, path: str = "inferctl") -> Iterator[tuple[str, click.Command]]:
    for name, command in group.commands.items():
        yield f"{path} {name}", command
        if isinstance(command, click.Group):
            yield from verbs(command, f"{path} {name}")


VERBS = dict(verbs(main))


@pytest.mark.parametrize("name", list(VERBS))
def test_every_verb_speaks_json(name: str) -> None:
    assert any("--json" in option.opts for option in VERBS[name].params)


@pytest.mark.parametrize(
    "name", [name for name, verb in VERBS.items() if any(p.name != "as_json" for p in verb.params)]
)
def test_every_verb_with_arguments_has_an_example(name: str) -> None:
    assert f"{name} " in (VERBS[name].help or "").partition("Example")[2]


def test_unpin_answers_in_json(tmp_path: Path) -> None:
    with daemon(tmp_path / "s", replies(unpin={"model": "m"})):
        done = CliRunner().invoke(main, ["--socket", str(tmp_path / "s"), "unpin", "m", "--json"])
    assert json.loads(done.stdout) == {"model": "m"}


def test_unquarantine_without_a_version_says_how_to_name_one(tmp_path: Path) -> None:
    done = CliRunner().invoke(main, ["store", "unquarantine", "m"])
    assert done.exit_code == 2
    assert "MODEL@VERSION" in done.stderr
