"""The version floor: never lower, bound to keys, alive while one copy is."""

from __future__ import annotations

from pathlib import Path

import pytest

from agent.bundles.floor import Floor, FloorFile
from agent.errors import StateError

pytestmark = pytest.mark.unit


@pytest.fixture
def paths(tmp_path: Path) -> tuple[Path, Path]:
    return tmp_path / "floor.a.json", tmp_path / "floor.b.json"


def test_a_new_box_has_no_floor(paths: tuple[Path, Path]) -> None:
    assert FloorFile(paths).read() is None


def test_raising_never_lowers_a_version() -> None:
    floor = Floor(keys="k", roles={"timestamp": 10, "targets": 2}).raised({"timestamp": 5, "snapshot": 1})
    assert floor.roles == {"timestamp": 10, "targets": 2, "snapshot": 1}


def test_other_keys_drop_the_floor() -> None:
    assert Floor(keys="stolen", roles={"timestamp": 4_000_000_000}).bound_to("new") == Floor(keys="new")


def test_the_newest_copy_is_read(paths: tuple[Path, Path]) -> None:
    file = FloorFile(paths)
    for version in range(1, 6):
        file.write(Floor(keys="k", roles={"timestamp": version}))
        assert FloorFile(paths).read() == Floor(keys="k", roles={"timestamp": version})
    assert all(path.exists() for path in paths)


@pytest.mark.parametrize("damage", [b"", b"{", b"[]", b'{"sequence":9,"floor":{},"sha256":"0"}', b"\x00" * 100])
def test_one_broken_copy_costs_one_step_at_most(paths: tuple[Path, Path], damage: bytes) -> None:
    FloorFile(paths).write(Floor(keys="k", roles={"timestamp": 1}))
    file = FloorFile(paths)
    file.read()
    file.write(Floor(keys="k", roles={"timestamp": 2}))
    for path in paths:
        before = path.read_bytes()
        path.write_bytes(damage)
        survivor = FloorFile(paths).read()
        assert survivor is not None
        assert survivor.timestamp in (1, 2)
        path.write_bytes(before)


def test_a_changed_number_does_not_pass_the_checksum(paths: tuple[Path, Path]) -> None:
    FloorFile(paths).write(Floor(keys="k", roles={"timestamp": 1234}))
    path = next(path for path in paths if path.exists())
    path.write_text(path.read_text().replace("1234", "1233"))
    with pytest.raises(StateError, match="checksum"):
        FloorFile(paths).read()


def test_two_broken_copies_are_not_guessed_at(paths: tuple[Path, Path]) -> None:
    for path in paths:
        path.write_bytes(b"?")
    with pytest.raises(StateError):
        FloorFile(paths).read()
