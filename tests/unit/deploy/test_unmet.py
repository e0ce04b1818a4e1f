"""What is told of a wish whose deployment did not end well."""

from __future__ import annotations

from dataclasses import replace

import pytest

from agent.deploy.desired import Desired, record_of
from agent.deploy.pointer import Pointer, Target
from agent.deploy.slots import slot_of
from agent.deploy.state import FINAL, State
from agent.deploy.unmet import Unmet, unmet

pytestmark = pytest.mark.unit

SERVES = Pointer(slot="m", active=Target(team="t", name="m", version="1.0.0", digest="1" * 64, path="v/1"))
TELLS = FINAL - {State.CONFIRMED, State.SUPERSEDED}


def wish(version: str = "2.0.0", *, source: str = "pin", slot: str = "m") -> Desired:
    return Desired(id="w", slot=slot, team="t", version=version, source=source)


def missed(
    asked: Desired,
    state: State = State.FAILED,
    code: str = "load_failed",
    *,
    version: str = "",
    pointer: Pointer | None = SERVES,
    deployment_id: str = "w",
) -> Unmet | None:
    record = record_of(asked, deployment_id, now_s=0.0)
    return unmet(asked, pointer, replace(record, state=state, code=code, message="why", version=version))


@pytest.mark.parametrize("state", sorted(State))
def test_a_deployment_that_ended_otherwise_than_wanted_is_told(state: State) -> None:
    told = missed(wish(), state)
    assert (told is not None) == (state in TELLS)
    if told is not None:
        assert (told.deployment, told.version, told.state, told.code, told.message) == (
            "w", "2.0.0", state, "load_failed", "why",
        )  # fmt: skip


def test_what_serves_what_nobody_wants_and_what_begins_anew_are_not_told_of() -> None:
    assert missed(wish("1.0.0")) is None
    assert missed(wish(""), version="1.0.0") is None
    assert missed(wish(), deployment_id="of another wish") is None
    assert missed(wish(), State.ROLLED_BACK, "superseded") is None
    assert unmet(None, SERVES, record_of(wish(), "w", now_s=0.0)) is None
    assert unmet(wish(), SERVES, None) is None


def test_a_version_on_trial_does_not_meet_a_wish_and_a_channels_find_counts_as_its_own() -> None:
    assert missed(wish("1.0.0"), State.INCONSISTENT, pointer=replace(SERVES, trial=True)) is not None
    told = missed(wish(""), version="2.0.0", deployment_id="w@0123456789ab")
    assert told is not None
    assert told.version == "2.0.0"


@pytest.mark.parametrize(
    ("asked", "state", "code", "advice"),
    [
        (
            wish(), State.ROLLED_BACK, "probation_failed",
            "inferctl unpin m gives it back to the fleet and the configuration; "
            "inferctl deploy m@2.0.0 --force tries it again; inferctl deploy m@VERSION takes another",
        ),
        (
            wish(source="fleet"), State.REJECTED, "refused_before",
            "inferctl pin m keeps what serves; "
            "inferctl deploy m@2.0.0 --force tries it again; inferctl deploy m@VERSION takes another",
        ),
        (
            wish("", source="file"), State.FAILED, "offline",
            "inferctl pin m keeps what serves; it is tried again by itself; inferctl deploy m@VERSION takes another",
        ),
        (
            wish(), State.REJECTED, "policy_refused",
            "inferctl unpin m gives it back to the fleet and the configuration; "
            "inferctl deploy m@VERSION takes another",
        ),
        (
            wish(), State.REJECTED, "incompatible_signature",
            "inferctl unpin m gives it back to the fleet and the configuration; "
            "inferctl deploy m@2.0.0 --allow-incompatible tries it again; inferctl deploy m@VERSION takes another",
        ),
        (
            wish(), State.ROLLED_BACK, "canary_undecided",
            "inferctl unpin m gives it back to the fleet and the configuration; "
            "inferctl deploy m@2.0.0 tries it again; inferctl deploy m@VERSION takes another",
        ),
        (
            wish(slot=slot_of("m", "2.0.0")), State.FAILED, "load_failed",
            "inferctl remove m@2.0.0 forgets it; inferctl deploy m@2.0.0 --beside tries it again",
        ),
        (
            wish(slot=slot_of("m", "2.0.0"), source="file"), State.FAILED, "load_failed",
            "the configuration names it: beside in [[models]]; inferctl deploy m@2.0.0 --beside tries it again",
        ),
    ],
)  # fmt: skip
def test_the_advice_fits_whose_wish_it_is_and_what_went_wrong(
    asked: Desired, state: State, code: str, advice: str
) -> None:
    told = missed(asked, state, code)
    assert (told.advice if told is not None else "") == advice


def test_nothing_is_kept_where_nothing_serves() -> None:
    told = missed(wish(source="fleet"), pointer=None)
    assert told is not None
    assert told.advice == "inferctl deploy m@2.0.0 tries it again; inferctl deploy m@VERSION takes another"
