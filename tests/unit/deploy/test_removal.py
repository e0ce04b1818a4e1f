"""Which slots a removal takes, and what a slot is called."""

from __future__ import annotations

import pytest

from agent.deploy.removal import leaving
from agent.deploy.slots import model_of, slot_of, version_beside
from agent.errors import AgentError, CommandError, NotFoundError

pytestmark = pytest.mark.unit

SLOTS = {"m", "m@1.0.0", "m@2.0.0-rc.1", "m-2", "m-2@1.0.0"}


@pytest.mark.parametrize("version", ["", "1.0.0", "2.0.0-rc.1"])
def test_a_slots_name_says_model_and_version(version: str) -> None:
    slot = slot_of("m.x-1", version)
    assert (model_of(slot), version_beside(slot)) == ("m.x-1", version)


@pytest.mark.parametrize(
    ("model", "version", "gone"),
    [
        ("m", "1.0.0", ["m@1.0.0"]),
        ("m", "", ["m@2.0.0-rc.1", "m@1.0.0", "m"]),
        ("m-2", "", ["m-2@1.0.0", "m-2"]),
    ],
)
def test_a_version_goes_alone_and_a_model_with_its_default_last(model: str, version: str, gone: list[str]) -> None:
    assert leaving(model, version, slots=SLOTS, configured=set(), default="1.0.0") == gone


@pytest.mark.parametrize(
    ("model", "version", "configured", "default", "error", "reason"),
    [
        ("x", "", set(), None, NotFoundError, "no model 'x'"),
        ("m", "9.0.0", set(), "1.0.0", NotFoundError, r"m@9\.0\.0 .* beside it: 1\.0\.0, 2\.0\.0-rc\.1"),
        ("m", "3.0.0", set(), "3.0.0", CommandError, "inferctl default m VERSION"),
        ("m", "1.0.0", {"m@1.0.0"}, "3.0.0", CommandError, "the configuration wants m@1.0.0"),
        ("m", "", {"m", "m@1.0.0"}, "3.0.0", CommandError, "the configuration wants m, m@1.0.0"),
    ],
)
def test_what_cannot_go_says_why(
    model: str, version: str, configured: set[str], default: str | None, error: type[AgentError], reason: str
) -> None:
    with pytest.raises(error, match=reason):
        leaving(model, version, slots=SLOTS, configured=configured, default=default)
