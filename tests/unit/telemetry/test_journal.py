"""What the command journal answers to repeated, reused and overtaken commands."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from agent.telemetry.journal import KEPT_MAX, KEPT_S, CommandJournal, Entry, State, Verdict

pytestmark = pytest.mark.unit

ENTRY = Entry(
    id="c1",
    digest="d1",
    name="deploy",
    args={"model": "m"},
    reply_topic="t",
    correlation=b"x",
    received=1000.0,
    outcome={},
)


@pytest.fixture
def journal(tmp_path: Path) -> CommandJournal:
    return CommandJournal(tmp_path / "commands.db")


def admit(journal: CommandJournal, entry: Entry, generation: int, *, room: bool = True) -> tuple[Verdict, Entry]:
    journal.begin(durable=True)
    answer = journal.admit(entry, generation=generation, room=room)
    journal.commit()
    return answer


def test_each_command_is_new_once(journal: CommandJournal) -> None:
    assert admit(journal, ENTRY, 10)[0] is Verdict.NEW
    assert admit(journal, ENTRY, 10)[0] is Verdict.DUPLICATE
    journal.finish("c1", State.DONE, {"result": {"ok": True}})
    verdict, known = admit(journal, ENTRY, 10)
    assert (verdict, known.state, known.outcome) == (Verdict.DUPLICATE, State.DONE, {"result": {"ok": True}})


def test_a_known_id_with_other_content_is_refused(journal: CommandJournal) -> None:
    admit(journal, ENTRY, 10)
    assert admit(journal, replace(ENTRY, digest="d2"), 11)[0] is Verdict.REUSED


@pytest.mark.parametrize(
    ("generation", "verdict"), [(9, Verdict.OVERTAKEN), (10, Verdict.OVERTAKEN), (11, Verdict.NEW)]
)
def test_the_generation_only_grows(journal: CommandJournal, generation: int, verdict: Verdict) -> None:
    admit(journal, ENTRY, 10)
    assert admit(journal, replace(ENTRY, id="c2"), generation)[0] is verdict


def test_without_room_nothing_is_recorded(journal: CommandJournal) -> None:
    assert admit(journal, ENTRY, 10, room=False)[0] is Verdict.BUSY
    assert admit(journal, ENTRY, 10)[0] is Verdict.NEW


def test_unfinished_commands_and_the_generation_survive_a_restart(tmp_path: Path) -> None:
    journal = CommandJournal(tmp_path / "commands.db")
    admit(journal, ENTRY, 10)
    admit(journal, replace(ENTRY, id="c2"), 11)
    assert journal.start("c1") == 1
    journal.finish("c2", State.FAILED, {"code": "x"})
    journal.close()
    again = CommandJournal(tmp_path / "commands.db")
    (left,) = again.unfinished()
    assert (left.id, left.state, left.starts, left.args, left.correlation) == (
        "c1",
        State.RUNNING,
        1,
        {"model": "m"},
        b"x",
    )
    assert again.start("c1") == 2
    again.interrupted("c1")
    assert again.unfinished()[0].starts == 1
    assert again.generation() == 11


def test_ended_commands_are_kept_for_a_week_and_unfinished_ones_for_ever(journal: CommandJournal) -> None:
    admit(journal, ENTRY, 1)
    admit(journal, replace(ENTRY, id="c2"), 2)
    journal.finish("c2", State.DONE, {})
    admit(journal, replace(ENTRY, id="c3", received=ENTRY.received + KEPT_S + 1), 3)
    assert admit(journal, ENTRY, 9)[0] is Verdict.DUPLICATE
    assert admit(journal, replace(ENTRY, id="c2"), 3)[0] is Verdict.OVERTAKEN, "its row is gone, its generation is not"


def test_the_journal_is_bounded(journal: CommandJournal) -> None:
    journal.begin(durable=True)
    for number in range(KEPT_MAX + 50):
        journal.admit(replace(ENTRY, id=f"c{number}"), generation=number + 1, room=True)
        journal.finish(f"c{number}", State.DONE, {})
    journal.commit()
    assert admit(journal, replace(ENTRY, id="c10"), 1)[0] is Verdict.OVERTAKEN
    assert admit(journal, replace(ENTRY, id=f"c{KEPT_MAX}"), 1)[0] is Verdict.DUPLICATE


def test_an_unreadable_journal_is_replaced(tmp_path: Path) -> None:
    path = tmp_path / "commands.db"
    path.write_bytes(b"no database" * 500)
    assert admit(CommandJournal(path), ENTRY, 1)[0] is Verdict.NEW
    assert path.with_name("commands.db.broken").exists()
