"""Whoever looks at a store is told what has to be signed again soon; every verb speaks JSON and explains itself."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner

from tests.fakes import bundles
from tests.fakes.hub import Centre, Clock
from tools.inferhub import main

pytestmark = pytest.mark.unit
DAY_S = 86_400


def centre_of(folder: Path, *, days_ago: float) -> Centre:
    centre = Centre(folder / "store", Clock(time.time() - days_ago * DAY_S))
    centre.initialise()
    centre.publish(bundles.pack(folder / "bundle", bundles.plain_files(rows=16)), "stable")
    centre.clock.seconds += days_ago * DAY_S
    return centre


def stamp(centre: Centre) -> None:
    edition = centre.repository().edition(centre.repository().state())
    edition.seal(centre.online)
    edition.write()


def told(*words: str) -> tuple[dict[str, Any], str]:
    answers = []
    for extra in (["--json"], []):
        done = CliRunner().invoke(main, [*words, *extra])
        assert done.exit_code == 0, done.output
        answers.append(done.stdout)
    return json.loads(answers[0]), answers[1]


@pytest.mark.parametrize("verb", ["ls", "verify"])
@pytest.mark.parametrize(
    ("days_ago", "due"), [(0, []), (160, ["team-vision"]), (300, ["root"]), (340, ["root", "targets"])]
)
def test_roles_that_are_due_are_named_with_the_verb_that_renews_them(
    tmp_path: Path, verb: str, days_ago: int, due: list[str]
) -> None:
    centre = centre_of(tmp_path, days_ago=days_ago)
    if days_ago > 180:  # the team has published lately
        centre.revoke("1.0.0", drop_channels=True)
    else:
        stamp(centre)
    answer, text = told(verb, "--store", str(centre.root))
    assert sorted(answer["due"]) == sorted(due)
    for role in due:
        assert f"inferhub renew --role {role.replace('team-', 'team:')}" in text


def test_a_timestamp_that_nobody_renews_is_noticed_before_it_expires(tmp_path: Path) -> None:
    centre = centre_of(tmp_path, days_ago=3)
    for verb in ("ls", "verify"):
        answer, text = told(verb, "--store", str(centre.root))
        assert list(answer["due"]) == ["timestamp"]
        assert "inferhub refresh-timestamp" in text
    assert told("verify", "--store", str(centre.root), "--model", "vision/tiny")[0]["due"] == {}  # as of a stick


def test_a_version_says_what_became_of_it(tmp_path: Path) -> None:
    centre = centre_of(tmp_path, days_ago=0)
    answer, text = told("show", "vision/tiny@1.0.0", "--store", str(centre.root))
    assert (answer["status"], answer["channels"]) == ("active", ["stable"])
    centre.revoke("1.0.0", drop_channels=True)
    answer, text = told("show", "vision/tiny@1.0.0", "--store", str(centre.root))
    assert (answer["status"], answer["reason"], answer["channels"]) == ("revoked", "wrong labels", [])
    assert "revoked: wrong labels" in text
    assert "revoked: wrong labels" in told("ls", "--store", str(centre.root))[1]
    answer, text = told("show-keys", "--store", str(centre.root))
    assert {row["role"]: row["threshold"] for row in answer["roles"]}["root"] == 2
    assert centre.team_signer.public_key.keyid[:12] in text


def verbs(group: click.Group, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], click.Command]]:
    context = click.Context(group)
    for name in group.list_commands(context):
        command = group.get_command(context, name)
        assert command is not None
        if isinstance(command, click.Group):
            yield from verbs(command, (*path, name))
        else:
            yield (*path, name), command


VERBS = {" ".join(path): verb for path, verb in verbs(main)}


@pytest.mark.parametrize("name", list(VERBS))
def test_every_verb_speaks_json_and_has_an_example(name: str) -> None:
    assert any("--json" in option.opts for option in VERBS[name].params)
    assert f"inferhub {name}" in (VERBS[name].help or "").partition("Example")[2]


@pytest.mark.parametrize(
    "name", [name for name, verb in VERBS.items() if "--store" in str([o.opts for o in verb.params])]
)
def test_every_verb_with_a_store_takes_a_bucket(name: str) -> None:
    options = {option for parameter in VERBS[name].params for option in parameter.opts}
    assert {"--s3-endpoint", "--s3-region", "--s3-credentials-file"} <= options


@pytest.mark.parametrize("name", list(VERBS))
def test_examples_in_the_help_can_be_pasted(name: str) -> None:
    for line in (VERBS[name].help or "").partition("Example")[2].splitlines():
        assert "  --" not in line.strip(), "a line that was joined by mistake"
