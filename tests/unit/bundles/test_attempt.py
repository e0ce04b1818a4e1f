"""How the last refresh ended, across restarts and damage."""

from __future__ import annotations

from pathlib import Path

import pytest

from agent.bundles.attempt import Attempt, read_attempt, write_attempt

pytestmark = pytest.mark.unit

GOOD = Attempt(at=1000, source="http://a")
BAD = Attempt(at=1010, source="http://a", code="untrusted", message="forged", refused=True)


def test_the_newest_end_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "trust" / "refresh.json"
    assert read_attempt(path) is None
    write_attempt(path, GOOD)
    write_attempt(path, BAD)
    assert read_attempt(path) == BAD


def test_the_same_end_is_not_written_again_within_a_minute(tmp_path: Path) -> None:
    path = tmp_path / "refresh.json"
    write_attempt(path, GOOD)
    written = path.stat().st_ino
    write_attempt(path, Attempt(at=1030, source="http://a"))
    assert path.stat().st_ino == written
    write_attempt(path, Attempt(at=1090, source="http://a"))
    assert path.stat().st_ino != written


@pytest.mark.parametrize("damage", [b"", b"[]", b'{"at": "x"}', b"\xff"])
def test_a_damaged_record_is_no_record(tmp_path: Path, damage: bytes) -> None:
    path = tmp_path / "refresh.json"
    path.write_bytes(damage)
    assert read_attempt(path) is None
    write_attempt(path, GOOD)
    assert read_attempt(path) == GOOD
