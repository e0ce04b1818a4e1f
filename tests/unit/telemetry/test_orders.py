"""Which messages on a command topic are orders for this device."""

from __future__ import annotations

from typing import Any

import pytest

from agent.errors import CommandError, CommandExpiredError
from agent.telemetry.orders import Order, judge, parse_request

pytestmark = pytest.mark.unit

GOOD: dict[str, Any] = {
    "schema": "inferd-command/1",
    "id": "c1",
    "name": "deploy",
    "tenant": "default",
    "device": "box-1",
    "issued": 1000.0,
    "not_after": 2000.0,
    "gen": 1_000_000,
    "args": {"model": "m"},
}


def decide(payload: Any, **changes: Any) -> Order:
    known: dict[str, Any] = {
        "name": "deploy",
        "tenant": "default",
        "device": "box-1",
        "now_s": 1500.0,
        "quality": "ntp",
        "expiry_left_s": None,
    }
    return judge(payload, **{**known, **changes})


def test_an_order_for_this_device_and_time_is_taken() -> None:
    assert decide(GOOD).args == {"model": "m"}
    assert decide({**GOOD, "device": "*"}).id == "c1"


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"schema": "inferd-command/2"}, "schema"),
        ({"name": "rollback"}, "signed as 'rollback' and sent as 'deploy'"),
        ({"tenant": "other"}, "addressed to other/box-1"),
        ({"device": "box-2"}, "addressed to default/box-2"),
        ({"id": ""}, "not a command"),
        ({"id": "x" * 65}, "not a command"),
        ({"id": "a b"}, "not a command"),
        ({"gen": "1"}, "not a command"),
        ({"extra": 1}, "not a command"),
        ({"args": {"x": "y" * 20_000}}, "args of more than"),
        ({"not_after": 1499.0}, "not to be carried out any more for 1 s"),
    ],
)
def test_anything_else_is_refused_by_name(change: dict[str, Any], reason: str) -> None:
    with pytest.raises(CommandError, match=reason):
        decide({**GOOD, **change})


def test_what_is_no_object_or_lacks_a_field_is_refused() -> None:
    for payload in ([], "x", None, {name: value for name, value in GOOD.items() if name != "gen"}):
        with pytest.raises(CommandError, match="not a command"):
            decide(payload)


@pytest.mark.parametrize(
    ("now_s", "quality", "left", "taken"),
    [
        (1500.0, "rtc", None, True),
        (1500.0, "floor", None, False),  # a lower bound cannot prove that an order is young
        (1500.0, "floor", 5.0, True),
        (2500.0, "floor", 5.0, False),  # and it can prove that it is old
        (None, "none", 5.0, True),
        (None, "none", 0.0, False),
        (None, "none", None, False),
    ],
)
def test_without_a_good_clock_the_brokers_countdown_decides(
    now_s: float | None, quality: Any, left: float | None, taken: bool
) -> None:
    if taken:
        decide(GOOD, now_s=now_s, quality=quality, expiry_left_s=left)
    else:
        with pytest.raises(CommandExpiredError):
            decide(GOOD, now_s=now_s, quality=quality, expiry_left_s=left)


@pytest.mark.parametrize(
    ("name", "payload", "accepted"),
    [
        ("ping", b'{"id": "p1"}', True),
        ("deploy", b'{"id": "p1"}', False),
        ("ping", b"{}", False),
        ("ping", b'{"id": "p1", "payloadType": "x"}', False),
        ("ping", b"[" * 100_000, False),
        ("ping", b'{"id": "p1", "args": {"x": "' + b"y" * 70_000 + b'"}}', False),
        ("ping", b"\xff\xfe", False),
    ],
)
def test_only_looking_may_be_asked_without_a_signature(name: str, payload: bytes, accepted: bool) -> None:
    assert (parse_request(name, payload) is not None) is accepted
