"""Arguments of verbs: what is stored stays in force, so what makes no sense is refused where it enters."""

from __future__ import annotations

from typing import Any

import pytest

from agent.arguments import wish_of
from agent.errors import InvalidInputError

NAMED = {"model": "scale", "version": "1.0.0", "team": "demo"}


@pytest.mark.parametrize("name", ["force", "beside", "stage_only", "ignore_window", "allow_incompatible"])
@pytest.mark.parametrize("value", ["false", 0, 1, None, [], b"x"])
def test_a_flag_is_true_or_false_and_nothing_that_looks_like_it(name: str, value: Any) -> None:
    with pytest.raises(InvalidInputError, match=f"'{name}' must be true or false"):
        wish_of("id", {**NAMED, name: value}, "fleet")


def test_a_flag_that_is_not_there_is_false() -> None:
    wish = wish_of("id", dict(NAMED), "fleet")
    assert (wish.slot, wish.force) == ("scale", False)
    assert wish_of("id", {**NAMED, "beside": True, "force": True}, "fleet").force
