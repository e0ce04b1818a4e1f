"""The deployment's table: what may follow what."""

from __future__ import annotations

from itertools import product

import pytest

from agent.deploy.state import FINAL, TABLE, Event, Record, State, advance, mermaid
from agent.errors import IllegalTransitionError

pytestmark = pytest.mark.unit


def record(state: State) -> Record:
    return Record(id="d1", slot="magika", team="files", wanted="1.0.0", state=state)


@pytest.mark.parametrize(("state", "event"), list(product(sorted(FINAL), Event)))
def test_final_states_refuse_every_event(state: State, event: Event) -> None:
    with pytest.raises(IllegalTransitionError):
        advance(record(state), event)


@pytest.mark.parametrize(("edge", "target"), sorted(TABLE.items()))
def test_each_edge_leads_where_the_table_says_and_counts_a_step(edge: tuple[State, Event], target: State) -> None:
    state, event = edge
    after = advance(record(state), event)
    assert (after.state, after.step) == (target, 1)


def test_every_state_can_reach_a_final_one() -> None:
    reaching = set(FINAL)
    while True:
        more = {state for (state, _), target in TABLE.items() if target in reaching} - reaching
        if not more:
            break
        reaching |= more
    assert reaching == set(State)


def test_success_passes_every_stage_in_order() -> None:
    at, seen = record(State.RECEIVED), []
    while at.state not in FINAL:
        at = advance(at, Event.DONE)
        seen.append(at.state)
    assert seen == [
        State.VALIDATING,
        State.FETCHING,
        State.VERIFYING,
        State.STAGED,
        State.LOADING,
        State.CUTOVER,
        State.PROBATION,
        State.CONFIRMED,
    ]


def test_nothing_is_given_up_between_cutover_and_the_end_of_a_rollback() -> None:
    for state in (State.CUTOVER, State.ROLLING_BACK):
        assert (state, Event.SUPERSEDE) not in TABLE


def test_the_diagram_holds_every_edge() -> None:
    drawn = mermaid()
    for (state, event), target in TABLE.items():
        assert f"{state} --> {target}: {event}" in drawn
