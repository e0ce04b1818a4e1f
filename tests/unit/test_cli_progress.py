"""What people and programs see of a deployment under way."""

from __future__ import annotations

import json
from typing import Any

import pytest

from agent.cli_progress import follow, pace_text, step_text

pytestmark = pytest.mark.unit


def record(**changes: Any) -> dict[str, Any]:
    value = {"slot": "magika", "version": "2.0.0", "state": "fetching", "step": 2, "bytes_done": 0, "bytes_total": 0,
             "rate_bps": 0, "eta_s": None, "code": "", "message": "", "final": False}  # fmt: skip
    return value | changes


class Client:
    """Answers with the records in order, and remembers what it was asked."""

    def __init__(self, *records: dict[str, Any]) -> None:
        self._records = list(records)
        self.asked: list[dict[str, Any]] = []

    def call(self, method: str, args: dict[str, Any]) -> dict[str, Any]:
        self.asked.append({"method": method, **args})
        return self._records.pop(0)


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({}, ""),
        ({"rate_bps": 2_500_000}, "2.5 MB/s"),
        ({"rate_bps": 2_500_000, "eta_s": 75}, "2.5 MB/s, 1 min 15 s left"),
    ],
)
def test_rate_and_time_left(changes: dict[str, Any], text: str) -> None:
    assert pace_text(record(**changes)) == text


def test_a_wait_says_why_without_control_characters() -> None:
    waits = record(state="fetch_wait", code="budget_spent", message="goes on in 3 h\x1b[31m")
    assert step_text(waits) == "magika 2.0.0: fetch_wait (goes on in 3 h\\x1b[31m)"


def test_programs_get_a_line_for_each_change(capsys: pytest.CaptureFixture[str]) -> None:
    client: Any = Client(record(), record(step=2, bytes_done=5, bytes_total=9), record(state="confirmed", final=True))
    assert follow(client, "pin-1", as_json=True)["state"] == "confirmed"
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["final"] for line in lines] == [False, False, True]
    assert client.asked[2]["after_step"] == 2
    assert client.asked[2]["after_bytes"] == 5
