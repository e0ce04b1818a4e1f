"""What follows from wish, pointer and newest deployment."""

from __future__ import annotations

from dataclasses import replace

import pytest

from agent.deploy.desired import Action, Desired, decide, effective, may_pass
from agent.deploy.pointer import Pointer, Target
from agent.deploy.state import Record, State

pytestmark = pytest.mark.unit

TARGET = Target(team="files", name="magika", version="1.0.0", digest="a" * 64, path="versions/x")
SERVING = Pointer(slot="magika", active=TARGET)
TRIAL = Pointer(slot="magika", active=TARGET, trial=True)


def wish(wish_id: str = "w1", version: str = "1.0.0", source: str = "fleet") -> Desired:
    return Desired(id=wish_id, slot="magika", team="files", version=version, source=source)


def done(state: State, deployment_id: str = "w1") -> Record:
    return Record(id=deployment_id, slot="magika", team="files", wanted="1.0.0", state=state)


@pytest.mark.parametrize(
    ("wanted", "pointer", "latest", "action"),
    [
        (None, None, None, Action.NOTHING),
        (None, SERVING, done(State.CONFIRMED), Action.NOTHING),
        (wish(), None, None, Action.BEGIN),
        (wish(), None, done(State.FETCHING), Action.RESUME),
        (wish("w2"), None, done(State.FETCHING), Action.SUPERSEDE),
        (wish("w2"), TRIAL, done(State.PROBATION), Action.SUPERSEDE),
        (wish("w2"), TRIAL, done(State.CUTOVER), Action.RESUME),
        (wish("w2"), TRIAL, done(State.ROLLING_BACK), Action.RESUME),
        (None, TRIAL, done(State.PROBATION), Action.RESUME),
        (wish(), SERVING, done(State.CONFIRMED), Action.NOTHING),
        (wish(), SERVING, done(State.ROLLED_BACK), Action.NOTHING),
        (wish(), None, done(State.CONFIRMED), Action.BEGIN),
        (wish("w2", "2.0.0"), SERVING, done(State.CONFIRMED), Action.BEGIN),
        (wish(version=""), SERVING, done(State.CONFIRMED), Action.POLL),
        (wish(version=""), SERVING, done(State.CONFIRMED, "w1@abc"), Action.POLL),
        (wish(source="file"), None, done(State.REJECTED), Action.POLL),
        (wish("w9", source="file"), SERVING, done(State.CONFIRMED), Action.NOTHING),
    ],
)
def test_the_next_action_follows_from_stored_state(
    wanted: Desired | None, pointer: Pointer | None, latest: Record | None, action: Action
) -> None:
    assert decide(wanted, pointer, latest) is action


@pytest.mark.parametrize(
    ("code", "medium", "wanted_medium", "passes"),
    [
        ("offline", "", "", True),
        ("chunk_mismatch", "", "", True),
        ("self_test_failed", "", "", False),
        ("invalid_input", "/media/stick", "", True),
        ("invalid_input", "/media/stick", "/media/stick", False),
    ],
)
def test_what_may_pass_by_itself(code: str, medium: str, wanted_medium: str, passes: bool) -> None:
    failed = replace(done(State.FAILED), code=code, medium=medium)
    wanted = replace(wish(), medium=wanted_medium)
    assert may_pass(failed, wanted) is passes
    assert decide(wanted, SERVING, failed) is (Action.POLL if passes else Action.NOTHING)


def test_a_sideload_that_was_cancelled_is_not_tried_again() -> None:
    assert not may_pass(replace(done(State.SUPERSEDED), medium="/media/stick"), wish())


def test_a_pin_wins_over_the_fleet_and_the_fleet_over_the_file() -> None:
    wishes = [wish("f", source="file"), wish("p", source="pin"), wish("m", source="fleet")]
    assert effective(wishes)["magika"].id == "p"
    assert effective(wishes[::2])["magika"].id == "m"
