"""Why a deployment ended, as programs read it: the code travels as it is to whoever asked for the deployment."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from agent import deploy
from agent.errors import CommandError, by_code

CODES = [
    "canary_failed",
    "canary_impossible",
    "canary_undecided",
    "probation_failed",
    "refused_before",
    "boot_failed",
    "pointer_failed",
    "too_many_steps",
    "superseded",
]


@pytest.mark.parametrize("code", CODES)
def test_the_reasons_of_a_deployment_are_errors_of_their_own(code: str) -> None:
    error = by_code(code, "why")
    assert (error.code, str(error)) == (code, "why")
    assert isinstance(error, CommandError)


def test_no_deployment_ends_for_a_reason_that_is_no_error() -> None:
    """A code that is written as a text would reach the fleet as ``internal``."""
    for path in Path(deploy.__file__).parent.glob("*.py"):
        for call in ast.walk(ast.parse(path.read_text())):
            if isinstance(call, ast.Call) and isinstance(call.func, ast.Attribute) and call.func.attr == "step":
                codes = [given.value for given in call.keywords if given.arg == "code"]
                for code in (str(value.value) for value in codes if isinstance(value, ast.Constant)):
                    assert not code or by_code(code, "").code == code, f"{path.name}: {code}"
