"""Who may do what to store, trust and disk."""

from __future__ import annotations

from typing import Any

import pytest

from agent.arguments import wish_of
from agent.config import PolicyConfig
from agent.control_store import StoreVerbs
from agent.errors import InvalidInputError

pytestmark = pytest.mark.unit

NOBODY: Any = None


def test_looking_needs_read_and_changing_needs_operate() -> None:
    verbs = StoreVerbs(PolicyConfig(), reconciler=NOBODY, watch=NOBODY, sideload=NOBODY, trust=NOBODY).verbs()
    assert {name: role for name, (role, _) in verbs.items()} == {
        "trust": "read",
        "store": "read",
        "refresh": "operate",
        "sideload": "operate",
        "gc": "operate",
        "unquarantine": "operate",
    }


@pytest.mark.parametrize(
    "args",
    [
        {"model": "../x", "team": "vision"},
        {"model": "tiny", "team": ""},
        {"model": "tiny", "team": "vision", "version": "1"},
        {"model": "tiny", "team": "vision", "version": "1.0.0/../.."},
        {"model": "tiny", "team": "vision", "channel": "A B"},
        {"model": "tiny", "team": "vision", "beside": True},
    ],
)
def test_names_that_no_store_can_hold_are_refused_where_they_enter(args: dict[str, Any]) -> None:
    with pytest.raises(InvalidInputError):
        wish_of("w", args, "pin", medium="/media/usb")


def test_a_wish_for_a_version_beside_is_for_a_slot_of_its_own() -> None:
    wish = wish_of("w", {"model": "tiny", "team": "vision", "version": "1.0.0", "beside": True}, "pin")
    assert (wish.slot, wish.model, wish.version) == ("tiny@1.0.0", "tiny", "1.0.0")


def test_a_wish_keeps_the_medium_it_is_taken_from() -> None:
    wish = wish_of("w", {"model": "tiny", "team": "vision", "version": "1.0.0"}, "pin", medium="/media/usb")
    assert (wish.medium, wish.version, wish.source) == ("/media/usb", "1.0.0", "pin")
