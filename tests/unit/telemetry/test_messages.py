"""Topics, payloads, time quality, presence and the receiver's tally: pure values in and out."""

from __future__ import annotations

import json
from typing import Any

import pytest

from agent.clock import Clock
from agent.events import Event, Severity, Stream
from agent.telemetry import payloads
from agent.telemetry.link import spread_s
from agent.telemetry.payloads import Stamper
from agent.telemetry.presence import Presence
from agent.telemetry.topics import Topics
from tests.fakes.clock import FakeClock
from tools.demo.receiver import Tally

pytestmark = pytest.mark.unit

TOPICS = Topics("acme", "box-1")


@pytest.mark.parametrize(
    ("topic", "name"),
    [
        ("inferd/v1/acme/d/box-1/cmd/deploy", "deploy"),
        ("inferd/v1/acme/ctl/rebirth", "rebirth"),
        ("inferd/v1/acme/d/box-2/cmd/deploy", None),
        ("inferd/v1/acme/d/box-1/cmd/", None),
        ("inferd/v1/acme/d/box-1/cmd/a/b", None),
        ("inferd/v1/acme/d/box-1/status", None),
    ],
)
def test_a_command_is_known_by_its_topic(topic: str, name: str | None) -> None:
    assert TOPICS.command_name(topic) == name


@pytest.mark.parametrize(
    ("requested", "topic"),
    [
        (None, "inferd/v1/acme/d/box-1/res/ping"),
        ("inferd/v1/acme/d/box-1/res/mine", "inferd/v1/acme/d/box-1/res/mine"),
        ("inferd/v1/acme/d/box-2/cmd/deploy", "inferd/v1/acme/d/box-1/res/ping"),
        ("inferd/v1/acme/d/box-1/res/#", "inferd/v1/acme/d/box-1/res/ping"),
        ("inferd/v1/acme/d/box-1/res/" + "x" * 300, "inferd/v1/acme/d/box-1/res/ping"),
    ],
)
def test_a_reply_goes_only_below_the_devices_own_replies(requested: str | None, topic: str) -> None:
    assert TOPICS.reply("ping", requested) == topic


@pytest.mark.parametrize(
    ("wall", "synchronized", "floor", "expected"),
    [
        (1_760_000_000.0, True, 0.0, (1_760_000_000.0, "ntp")),
        (1_760_000_000.0, False, 0.0, (1_760_000_000.0, "rtc")),
        (1_760_000_000.0, False, 1_770_000_000.0, (1_770_000_000.0, "floor")),
        (0.0, False, 1_770_000_000.0, (1_770_000_000.0, "floor")),
        (0.0, False, 0.0, (None, "none")),
    ],
)
def test_the_time_says_how_good_it_is(wall: float, synchronized: bool, floor: float, expected: Any) -> None:
    clock: Clock = FakeClock(wall_s=wall)
    stamper = Stamper(clock, boot_id="b", synchronized=lambda: synchronized, floor_s=lambda: floor)
    assert stamper.now() == expected
    assert stamper.stamp() == {"ts": expected[0], "mono": 0.0, "boot": "b", "tq": expected[1]}


def test_an_event_keeps_what_json_cannot_say_as_text() -> None:
    happened = Event(stream=Stream.DEPLOY, type="x", severity=Severity.ERROR, data={"path": TOPICS})
    value = json.loads(payloads.encode(payloads.event({"ts": 1}, happened)))
    assert (value["type"], value["sev"]) == ("x", "error")
    assert "Topics" in value["data"]["path"]


def test_condensed_metrics_fit_and_name_what_is_left_out() -> None:
    snapshot = {
        "small": [{"value": 1.0}],
        "empty": [],
        "huge": [{"model": f"m{number}", "value": 1.0} for number in range(1000)],
    }
    whole = payloads.condense(snapshot, bytes_max=100_000)
    assert (set(whole["metrics"]), "left_out" in whole) == ({"small", "huge"}, False)
    part = payloads.condense(snapshot, bytes_max=1000)
    assert (set(part["metrics"]), part["left_out"]) == ({"small"}, ["huge"])
    assert len(payloads.encode(part["metrics"])) <= 1000


def test_reporting_the_same_state_again_is_no_change() -> None:
    presence, told = Presence(dict), []
    with presence.watched(lambda: told.append(presence.digest)):
        presence.report({"a": 1}, generation=1)
        presence.report({"a": 1}, generation=1)
        presence.report({"a": 1}, generation=2)
        presence.rebirth()
    assert len(told) == 3
    assert json.loads(presence.document({"ts": 5}) or b"") == {
        "gen_applied": 2,
        "hash": presence.digest[:16],
        "doc": {"a": 1},
        "ts": 5,
    }


def test_a_fleet_spreads_its_first_connects_and_each_box_keeps_its_place() -> None:
    delays = [spread_s(f"box-{number}", 30.0) for number in range(200)]
    assert delays == [spread_s(f"box-{number}", 30.0) for number in range(200)]
    assert all(0 <= delay < 30 for delay in delays)
    assert all(any(start <= delay < start + 6 for delay in delays) for start in range(0, 30, 6))
    assert spread_s("box", 0.0) == 0.0


def test_the_tally_tells_missing_doubled_and_named_losses_apart() -> None:
    tally = Tally()
    message = {"st": "evt/deploy", "ep": "e"}
    for seq in (1, 2, 2, 5, 9):
        tally.add("box", {**message, "seq": seq})
    tally.add("box", {**message, "from": 6, "to": 9, "reason": "full"})
    tally.add("box", {"online": True})
    report = tally.report()
    assert (report["arrived"], report["doubled"], report["missing"], report["lost"]) == (4, 1, 2, 3)
    assert report["streams"][0]["missing"] == [[3, 4]]
