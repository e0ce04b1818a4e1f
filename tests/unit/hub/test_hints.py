"""What a publisher is told to do next."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from tools.hub.cli import report_error
from tools.hub.commands import _failure
from tools.inferhub import main

pytestmark = pytest.mark.unit


@pytest.mark.parametrize(
    ("code", "message", "advice"),
    [
        ("command_refused", "m is pinned on the box to 1.0.0; unpin it first", "inferctl unpin MODEL"),
        ("command_refused", "not signed by a current operator key", "--operator-key"),
    ],
)
def test_common_refusals_of_a_device_come_with_a_hint(
    code: str, message: str, advice: str, capsys: pytest.CaptureFixture[str]
) -> None:
    error = _failure(code, f"the device says rejected: {message}")
    assert error.code == code
    report_error(error, as_json=True)
    assert advice in json.loads(capsys.readouterr().out)["error"]["hint"]


def test_the_example_of_a_store_from_nothing_has_an_operator() -> None:
    assert "--operator-key" in CliRunner().invoke(main, ["--help"]).stdout


@pytest.mark.parametrize("operators", [0, 1])
def test_a_store_without_operators_is_warned_of(tmp_path: Path, operators: int) -> None:
    def hub(*arguments: object) -> str:
        done = CliRunner().invoke(main, [str(argument) for argument in arguments])
        assert done.exit_code == 0, done.output
        return done.stdout

    for role in ("root", "targets", "online", "operator"):
        hub("keygen", "--role", role, "--out", tmp_path / role, "--unencrypted")
    named = ("--operator-key", tmp_path / "operator.pub") if operators else ()
    keys = ("--root-key", tmp_path / "root", "--targets-key", tmp_path / "targets", "--online-key", tmp_path / "online")
    told = hub("init", tmp_path / "store", *keys, "--threshold", 1, *named)
    assert ("attention: no operator keys" in told) == (not operators)
