"""What may be collected: the plan over values, and its effects on real folders."""

from __future__ import annotations

import fcntl
import os
from dataclasses import replace
from pathlib import Path

import pytest

from agent.bundles import collection
from agent.bundles.collection import Needed, Stored, plan
from agent.bundles.layout import Layout

pytestmark = pytest.mark.unit

DAY = 86_400.0


def version(number: int, *, name: str = "tiny", size: int = 10) -> Stored:
    return Stored(
        kind="version",
        path=Path(f"/s/versions/vision/{name}/{number}"),
        size_bytes=size,
        digest=f"{number:012x}",
        team="vision",
        name=name,
        version=f"{number}.0.0",
        seq=number,
    )


def pull(digest: str, *, idle_s: float, held: bool = False) -> Stored:
    return Stored(
        kind="staging", path=Path(f"/s/staging/{digest}"), size_bytes=10, digest=digest, idle_s=idle_s, held=held
    )


FIVE = [version(number) for number in (5, 4, 3, 2, 1)]


def gone(items: list[Stored], needed: Needed, *, keep: int = 2, room: int = 0) -> list[tuple[str, str]]:
    return [
        (removal.item.version or removal.item.digest, removal.reason)
        for removal in plan(items, needed, keep=keep, room_bytes=room)
    ]


@pytest.mark.parametrize(
    ("needed", "keep", "room", "expected"),
    [
        (set(), 5, 0, []),
        (set(), 2, 0, ["3.0.0", "2.0.0", "1.0.0"]),
        ({1, 5}, 1, 0, ["3.0.0", "2.0.0"]),
        ({1, 2, 3, 4, 5}, 0, 0, []),
        ({5}, 4, 1, ["1.0.0"]),
        ({5}, 4, 15, ["1.0.0", "2.0.0"]),
        ({5}, 4, 10_000, ["1.0.0", "2.0.0", "3.0.0"]),
        ({5, 1}, 4, 10_000, ["2.0.0", "3.0.0"]),
    ],
)
def test_the_newest_and_the_needed_stay(needed: set[int], keep: int, room: int, expected: list[str]) -> None:
    paths = frozenset(version(number).path for number in needed)
    assert [what for what, _ in gone(FIVE, Needed(paths=paths), keep=keep, room=room)] == expected


def test_a_revoked_version_goes_unless_it_is_needed() -> None:
    revoked = frozenset({"5".rjust(12, "0") + "e" * 52, "4".rjust(12, "0") + "e" * 52})
    needed = Needed(paths=frozenset({FIVE[0].path}), revoked=revoked)
    assert gone(FIVE, needed, keep=4) == [("4.0.0", "revoked")]


def test_what_a_pending_activation_needs_stays() -> None:
    needed = Needed(digests=frozenset({"1".rjust(12, "0") + "e" * 52, "ab" * 32}))
    items = [*FIVE, pull("ab" * 32, idle_s=30 * DAY)]
    assert ("1.0.0", "superseded") not in gone(items, needed, keep=0, room=1000)
    assert all(what != "ab" * 32 for what, _ in gone(items, needed, room=1000))


def test_idle_pulls_go_first_and_held_ones_never() -> None:
    items = [*FIVE, pull("old", idle_s=8 * DAY), pull("new", idle_s=1.0), pull("held", idle_s=9 * DAY, held=True)]
    assert gone(items, Needed(), keep=4)[0] == ("old", "unfinished and idle")
    with_room = gone(items, Needed(), keep=4, room=10_000)
    assert ("new", "unfinished, room is needed") in with_room
    assert all(what != "held" for what, _ in with_room)


def test_models_are_counted_apart() -> None:
    items = [version(2), version(1), version(2, name="other"), version(1, name="other")]
    assert [removal.item.name for removal in plan(items, Needed(), keep=1)] == ["tiny", "other"]


# Real folders.


@pytest.fixture
def layout(tmp_path: Path) -> Layout:
    return Layout(tmp_path)


def stored(layout: Layout, number: str, digest: str = "ab" * 32) -> Path:
    path = layout.version("vision", "tiny", number, digest)
    (path / "fp32").mkdir(parents=True)
    (path / "fp32" / "model").write_bytes(b"x" * 5000)
    (path / "VERIFIED.json").write_text('{"seq": 7, "approved_until": 12}')
    for folder in (path / "fp32", path):
        folder.chmod(0o555)
    return path


def test_the_inventory_tells_size_sequence_and_idle_pulls(layout: Layout) -> None:
    path = stored(layout, "1.0.0")
    (layout.staging / ("cd" * 32)).mkdir(parents=True)
    later = (layout.staging / ("cd" * 32)).stat().st_mtime + 100
    one, other = collection.inventory(layout, now=lambda: later)
    assert (one.path, one.version, one.seq, one.approved_until) == (path, "1.0.0", 7, 12)
    assert one.size_bytes >= 5000
    assert (other.kind, other.idle_s, other.held) == ("staging", 100.0, False)


def test_removing_deletes_versions_pulls_and_their_manifests(layout: Layout) -> None:
    stored(layout, "1.0.0", "ab" * 32)
    kept = stored(layout, "2.0.0", "ef" * 32)
    for name in ("cd" * 32, "aa" * 32):
        (layout.staging / name).mkdir(parents=True)
    descriptor = os.open(layout.staging / ("aa" * 32), os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    for digest in ("ab", "cd", "ef"):
        path = layout.manifest(digest * 32)
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"{}")
    items = [replace(item, held=False) for item in collection.inventory(layout)]  # taken up after the look
    removals = plan(items, Needed(paths=frozenset({kept})), keep=0, room_bytes=1 << 40)
    removed = collection.remove(layout, removals)
    os.close(descriptor)
    assert sorted(removal.item.digest[:2] for removal in removed) == ["ab", "cd"]
    assert kept.exists()
    assert sorted(path.name[:2] for path in layout.root.glob("manifests/*")) == ["ef"]
    assert list(layout.trash.iterdir()) == []


def test_an_empty_box_has_nothing(layout: Layout) -> None:
    assert collection.inventory(layout) == []
    assert collection.remove(layout, []) == []


def test_a_pull_that_ends_meanwhile_is_no_trouble(layout: Layout, monkeypatch: pytest.MonkeyPatch) -> None:
    stored(layout, "1.0.0")
    for digest in ("aa" * 32, "bb" * 32):
        (layout.staging / digest).mkdir(parents=True)
    real = collection.unheld

    def end_first(path: Path) -> bool:
        if path.name == "aa" * 32:
            path.rmdir()  # between the listing and the look
        return real(path)

    monkeypatch.setattr(collection, "unheld", end_first)
    found = collection.inventory(layout)
    assert [item.digest for item in found if item.kind == "staging"] == ["bb" * 32]
    gone_by_itself = pull("cc" * 32, idle_s=1.0)
    monkeypatch.setattr(collection, "unheld", real)
    removals = [collection.Removal(item=item, reason="") for item in (gone_by_itself, found[-1])]
    assert collection.remove(layout, removals) == removals[1:]
