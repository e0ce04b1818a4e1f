"""Plans travel through the journal of any program version."""

import json
from dataclasses import asdict, replace

import msgspec
import pytest

from agent.deploy.desired import Desired
from agent.deploy.plan import Plan
from agent.deploy.state import Record

WISH = Desired(id="a", slot="magika", team="files", plan=Plan(stage_only=True, force_after_s=60.0))
RECORD = Record(id="a", slot="magika", team="files", wanted="1.0.0", plan=WISH.plan)


def test_a_plan_survives_the_journal_with_its_wish_and_its_record() -> None:
    assert msgspec.json.decode(json.dumps(asdict(WISH)), type=Desired) == WISH
    assert msgspec.json.decode(json.dumps(RECORD.plain()), type=Record) == RECORD


@pytest.mark.parametrize("plain", [{}, {"plan": {}}, {"plan": {"of_another_version": 3}}])
def test_rows_of_other_program_versions_are_read_with_the_default_plan(plain: dict[str, object]) -> None:
    row = {name: value for name, value in RECORD.plain().items() if name != "plan"} | plain
    assert msgspec.json.decode(json.dumps(row), type=Record) == replace(RECORD, plan=Plan())


def test_a_plan_tells_only_what_was_asked_for() -> None:
    assert Plan().plain() == {}
    assert WISH.plan.plain() == {"stage_only": True, "force_after_s": 60.0}
