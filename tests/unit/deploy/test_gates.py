"""Windows by the clock on the wall, and what else opens or closes a gate."""

from datetime import datetime
from zoneinfo import ZoneInfo

import pytest

from agent.config import DeployConfig, WindowConfig, load
from agent.deploy.desired import REVOCATION
from agent.deploy.gates import Situation, before_fetch, before_load, is_open, opens_in
from agent.deploy.plan import Plan
from agent.deploy.state import Record
from agent.errors import ConfigError

BERLIN = ZoneInfo("Europe/Berlin")
NIGHTS = WindowConfig(days=("fri",), start="22:00", end="05:00", timezone="Europe/Berlin")


def at(text: str, zone: ZoneInfo = BERLIN) -> float:
    return datetime.fromisoformat(text).replace(tzinfo=zone).timestamp()


@pytest.mark.parametrize(
    ("window", "moment", "is_in"),
    [
        (NIGHTS, "2026-06-05T21:59", False),  # a Friday
        (NIGHTS, "2026-06-05T22:00", True),
        (NIGHTS, "2026-06-06T04:59", True),  # Saturday, still Friday's window
        (NIGHTS, "2026-06-06T05:00", False),
        (NIGHTS, "2026-06-06T22:30", False),
        (WindowConfig(timezone="Europe/Berlin"), "2026-06-06T22:30", True),  # whole days, all of them
        (WindowConfig(start="02:15", end="02:45", timezone="Europe/Berlin"), "2026-03-29T03:20", True),  # skipped
        (WindowConfig(start="02:15", end="02:45", timezone="Europe/Berlin"), "2026-10-25T02:20", True),  # comes twice
    ],
)
def test_a_window_is_open_by_its_own_clock(window: WindowConfig, moment: str, is_in: bool) -> None:
    assert is_open(window, at(moment)) is is_in


def test_an_hour_that_comes_twice_opens_its_window_once() -> None:
    window = WindowConfig(start="02:15", end="02:45", timezone="Europe/Berlin")
    second = datetime(2026, 10, 25, 2, 20, fold=1, tzinfo=BERLIN).timestamp()
    assert not is_open(window, second)


def test_the_next_window_is_found_whatever_the_day() -> None:
    assert opens_in([NIGHTS], at("2026-06-06T05:00")) == at("2026-06-12T22:00") - at("2026-06-06T05:00")
    assert opens_in([NIGHTS], at("2026-06-05T23:00")) == 0


def record(*, source: str = "fleet", local: bool = False, waited_s: float = 0.0, **plan: object) -> Record:
    return Record(
        id="a", slot="m", team="t", wanted="1.0.0", source=source, local=local, waited_s=waited_s, plan=Plan(**plan)
    )


NEVER_NOW = DeployConfig(windows=(NIGHTS,), fetch_windows=(NIGHTS,))
DAY = Situation(wall_s=at("2026-06-03T12:00"), clock_trusted=True, serves=True, replaces=True)


@pytest.mark.parametrize(
    ("asked", "opens"),
    [
        (record(), False),
        (record(ignore_window=True), True),
        (record(force_after_s=60, waited_s=59), False),
        (record(force_after_s=60, waited_s=60), True),
        (record(source=REVOCATION), True),
        (record(local=True), True),
    ],
)
def test_whom_a_closed_window_holds_back(asked: Record, opens: bool) -> None:
    assert before_load(asked, DAY, NEVER_NOW).open is opens
    assert before_fetch(asked, DAY, NEVER_NOW).open is opens


def test_a_gate_says_why_and_when_to_look_again() -> None:
    gate = before_load(record(force_after_s=10, waited_s=9), DAY, NEVER_NOW)
    assert gate.reason == ("the next maintenance window opens Fri 2026-06-05 22:00 CEST; forced after 10 s of waiting")
    assert gate.look_s == 1


def test_the_wish_says_more_than_the_configuration_of_when_to_force() -> None:
    config = DeployConfig(windows=(NIGHTS,), force_after_s=100)
    assert before_load(record(waited_s=100), DAY, config).open
    assert not before_load(record(waited_s=100, force_after_s=200.0), DAY, config).open


def test_a_trial_elsewhere_holds_back_even_what_ignores_windows() -> None:
    busy = Situation(wall_s=0, clock_trusted=True, serves=True, replaces=True, on_trial="other")
    assert not before_load(record(ignore_window=True), busy, DeployConfig()).open
    first = Situation(wall_s=0, clock_trusted=True, serves=False, replaces=False, on_trial="other")
    assert before_load(record(), first, DeployConfig()).open


@pytest.mark.parametrize(
    ("entry", "complaint"),
    [
        ('start = "25:00"', "start: hour and minute"),
        ('timezone = "Mars/Olympus"', "not known on this box"),
        ("days = []", "at least one"),
        ('days = ["monday"]', "one of 'mon'"),
    ],
)
def test_a_window_that_is_none_is_refused_where_it_is_written(tmp_path, entry: str, complaint: str) -> None:
    path = tmp_path / "inferd.toml"
    path.write_text(f"[[deploy.windows]]\n{entry}\n")
    with pytest.raises(ConfigError, match=complaint):
        load(path)
