"""Fuzz cases: the same from the same seed, kept in files byte for byte, and never a valid wish to change the box."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from agent.errors import AgentError
from agent.wire import Decoder
from tools.fuzz.cases import DESCRIPTORS, make_case
from tools.fuzz.drive import read_cases, write_cases

pytestmark = pytest.mark.unit


def headers(number: int) -> list[dict[str, Any]]:
    decoder, found = Decoder(), []
    for step in make_case(5, number).steps:
        try:
            found += [frame.header for frame in decoder.feed(step.data)]
        except AgentError:
            break
    return found


def test_a_case_follows_from_seed_and_number_alone() -> None:
    later = [make_case(5, number) for number in range(200, 300)]
    assert later == [make_case(5, number) for number in range(200, 300)]
    assert len({case.steps for case in later}) > 90
    assert make_case(6, 200) != make_case(5, 200)


def test_a_case_survives_its_file(tmp_path: Path) -> None:
    cases = [make_case(5, number) for number in range(50)]
    write_cases(tmp_path / "f.json", cases, "why")
    assert read_cases(tmp_path / "f.json") == cases


def test_cases_reach_every_kind_and_every_descriptor() -> None:
    said = [header for number in range(1500) for header in headers(number)]
    kinds = {header["kind"] for header in said}
    assert kinds >= {"infer", "attach", "detach", "cancel", "call", "hello", "lane"}
    passed = {kind for number in range(1500) for step in make_case(5, number).steps for kind in step.descriptors}
    assert passed == set(DESCRIPTORS)
    assert any(step.on_lane for number in range(1500) for step in make_case(5, number).steps)
    regions = [entry for header in said for entry in _entries(header) if "region" in entry]
    assert len(regions) > 50


def test_no_case_asks_for_a_change_that_could_be_granted() -> None:
    for number in range(1500):
        for header in headers(number):
            if header.get("method") in ("deploy", "rollback", "unpin"):
                args = header.get("args")
                assert not isinstance(args, dict) or "model" not in args


def test_most_cases_are_heard() -> None:
    assert sum(bool(headers(number)) for number in range(300)) > 200


def _entries(header: dict[str, Any]) -> list[dict[str, Any]]:
    entries = header.get("tensors")
    return [entry for entry in entries if isinstance(entry, dict)] if isinstance(entries, list) else []
