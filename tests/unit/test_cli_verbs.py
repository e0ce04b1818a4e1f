"""What holds for every verb of ``inferctl``, and what some say when they are called wrongly."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from agent.cli import main
from tests.unit.test_cli import daemon, deployment, replies

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


CHECK = {"output": "y", "metric": "cosine", "ok": True, "found": 0.999812, "bound": "at least 0.99"}
TESTED = {
    "model": "m", "version": "1.0.0", "ok": True, "variant": "int8", "workers": 2, "code": "", "message": "", "act": "",
    "golden": [{"id": "g", "ok": True, "ms": 3.25, "ms_max": 50.0, "checks": [CHECK], "reason": ""}],
}  # fmt: skip


def test_a_self_test_shows_what_was_measured(tmp_path: Path) -> None:
    with daemon(tmp_path / "s", replies(selftest=TESTED)):
        done = CliRunner().invoke(main, ["--socket", str(tmp_path / "s"), "selftest", "m@1.0.0"])
    assert done.exit_code == 0
    assert done.stdout.splitlines() == [
        "m 1.0.0 (int8, 2 workers): ok",
        "  g: ok, 3.25 ms (at most 50)",
        "    y cosine: 0.999812 (at least 0.99)",
    ]


def test_a_self_test_that_was_not_passed_says_what_follows_and_cannot_colour_the_terminal(tmp_path: Path) -> None:
    check = {**CHECK, "ok": False, "found": None}
    golden = [{**TESTED["golden"][0], "id": "g\x1b[31m", "ok": False, "checks": [check]}]  # type: ignore[index]
    failed = {**TESTED, "ok": False, "message": "differs", "act": "leave", "golden": golden}
    with daemon(tmp_path / "s", replies(selftest=failed)):
        done = CliRunner().invoke(main, ["--socket", str(tmp_path / "s"), "selftest", "m"])
    assert done.exit_code == 1
    assert done.stdout.splitlines() == [
        "m 1.0.0 (int8, 2 workers): FAILED: differs; the variant is left for the next one",
        "  g\\x1b[31m: FAILED, 3.25 ms (at most 50)",
        "    y cosine: no number (at least 0.99), FAILED",
    ]


def test_all_models_are_tested_and_one_that_sleeps_is_no_failure(tmp_path: Path) -> None:
    asleep = {"model": "m", "version": "1", "ok": True, "message": "not loaded, loads on demand"}
    models = [{"slot": "m", "active": "1"}, {"slot": "m@1", "active": "1"}, {"slot": "new", "active": None}]
    with daemon(tmp_path / "s", replies(models=models, selftest=asleep)):
        done = CliRunner().invoke(main, ["--socket", str(tmp_path / "s"), "selftest", "--all"])
    assert (done.exit_code, done.stdout) == (0, "m 1: not tested: not loaded, loads on demand\n")


def test_a_self_test_needs_a_model_or_all_of_them() -> None:
    for arguments in (["selftest"], ["selftest", "m", "--all"]):
        done = CliRunner().invoke(main, arguments)
        assert (done.exit_code, "name a MODEL, or --all" in done.stderr) == (2, True)


@pytest.mark.parametrize(
    ("slot", "state", "hint"),
    [
        ("m", "rejected", "inferctl unpin m gives"),
        ("m@2.0.0", "rolled_back", "inferctl remove m@2.0.0 forgets"),
        ("m", "canceled", ""),
    ],
)
def test_a_deployment_that_fails_says_what_becomes_of_its_pin(tmp_path: Path, slot: str, state: str, hint: str) -> None:
    record = deployment("x") | {"slot": slot, "state": state, "source": "pin"}
    with daemon(tmp_path / "s", replies(deploy={"deployment": "pin-1"}, deployment=record)):
        done = CliRunner().invoke(main, ["--socket", str(tmp_path / "s"), "deploy", "m@2.0.0"])
    assert done.exit_code == 1
    assert hint in done.stderr
    assert ("inferctl" in done.stderr) == bool(hint)
