"""Version ranges."""

from __future__ import annotations

import pytest

from agent.bundles.requirements import satisfies
from agent.errors import UnsafeBundleError

pytestmark = pytest.mark.unit


@pytest.mark.parametrize(
    ("version", "spec", "holds"),
    [
        ("1.31.1", "", True),
        ("1.31.1", ">=1.20,<2", True),
        ("1.9", ">=1.20", False),
        ("2.0", "<2", False),
        ("2", "==2.0.0", True),
        ("1.31.1+cu12", "==1.31.1", True),
        ("2.0rc1", ">=2", True),
        ("1.5", "!=1.5", False),
        ("1.5", ">1.4, <=1.5", True),
        ("550.54.14", ">=550", True),
        ("", ">=1", False),
        ("unknown", ">=1", False),
    ],
)
def test_a_version_lies_in_a_range(version: str, spec: str, holds: bool) -> None:
    assert satisfies(version, spec) is holds


@pytest.mark.parametrize("spec", ["1.2", "~=1.2", ">=", ">=1;<2", ">=1.*", ">=1,,<2"])
def test_other_notations_are_refused(spec: str) -> None:
    with pytest.raises(UnsafeBundleError):
        satisfies("1", spec)
