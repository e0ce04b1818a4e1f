"""Which media are looked at, and that each content is handled once."""

from __future__ import annotations

import asyncio
import threading
from pathlib import Path
from typing import Any

import pytest

from agent.deploy.sideload import KnownMedia, MediumWatch, Report
from agent.errors import AgentError, TransientError, UntrustedError
from tests.fakes.clock import Calendar

pytestmark = pytest.mark.unit


class Taker:
    """Stands for ``Sideload``; fails as told."""

    def __init__(self) -> None:
        self.taken: list[str] = []
        self.failure: AgentError | None = None

    async def take(self, path: str) -> Report:
        self.taken.append(Path(path).name)
        if self.failure is not None:
            raise self.failure
        return Report(path=path, origin="stick", issued=1, taken=())


def medium(folder: Path, name: str, content: bytes) -> None:
    (folder / name / "metadata").mkdir(parents=True, exist_ok=True)
    (folder / name / "metadata" / "timestamp.json").write_bytes(content)


async def looks(folder: Path, taker: Taker, known: KnownMedia, count: int = 3) -> None:
    """Let the watcher look ``count`` times."""
    watch: Any = MediumWatch(str(folder), taker, known, clock=Calendar(0.0), poll_s=0.1)  # type: ignore[arg-type]
    running = asyncio.ensure_future(watch.run())
    before = watch._clock.monotonic()
    while watch._clock.monotonic() < before + count * 0.1:
        assert not running.done(), running.exception()
        await asyncio.sleep(0.001)
    running.cancel()
    await asyncio.wait({running})


def test_a_missing_mount_path_is_no_trouble(tmp_path: Path) -> None:
    taker = Taker()
    asyncio.run(looks(tmp_path / "nowhere", taker, KnownMedia(tmp_path / "known.json")))
    assert taker.taken == []


def test_each_content_is_taken_once_also_after_a_restart(tmp_path: Path) -> None:
    mounts, known, taker = tmp_path / "mounts", tmp_path / "known.json", Taker()
    medium(mounts, "a", b"1")
    (mounts / "photos").mkdir()
    asyncio.run(looks(mounts, taker, KnownMedia(known)))
    asyncio.run(looks(mounts, taker, KnownMedia(known)))
    medium(mounts, "b", b"1")  # a copy of the same stick
    asyncio.run(looks(mounts, taker, KnownMedia(known)))
    assert taker.taken == ["a"]
    medium(mounts, "b", b"2")  # written anew
    asyncio.run(looks(mounts, taker, KnownMedia(known)))
    assert taker.taken == ["a", "b"]


def test_a_refused_medium_is_not_asked_again_and_a_failing_one_is(tmp_path: Path) -> None:
    mounts, taker = tmp_path / "mounts", Taker()
    medium(mounts, "bad", b"1")
    taker.failure = UntrustedError("forged")
    asyncio.run(looks(mounts, taker, KnownMedia(tmp_path / "known.json")))
    assert taker.taken == ["bad"]
    medium(mounts, "bad", b"2")
    taker.failure = TransientError("the stick was pulled")
    asyncio.run(looks(mounts, taker, KnownMedia(tmp_path / "known.json"), count=10))
    assert len(taker.taken) > 2


def test_a_folder_that_is_refused_again_and_again_rests(tmp_path: Path) -> None:
    mounts = tmp_path / "mounts"
    taker = Taker()
    taker.failure = TransientError("input/output error")
    medium(mounts, "bad", b"1")
    asyncio.run(looks(mounts, taker, KnownMedia(tmp_path / "known.json"), count=100))
    assert 3 <= len(taker.taken) <= 7  # after 0.2 s, 0.4 s, 0.8 s, …


@pytest.mark.parametrize("damage", [b"", b"{}", b'[1, "x"]', b"\xff"])
def test_a_damaged_memory_starts_anew(tmp_path: Path, damage: bytes) -> None:
    (tmp_path / "known.json").write_bytes(damage)
    known = KnownMedia(tmp_path / "known.json")
    known.add("c")
    assert KnownMedia(tmp_path / "known.json").has("c")


def test_the_mount_path_itself_may_be_the_medium(tmp_path: Path) -> None:
    medium(tmp_path, "usb", b"1")
    taker = Taker()
    asyncio.run(looks(tmp_path / "usb", taker, KnownMedia(tmp_path / "known.json")))
    assert taker.taken == ["usb"]


def test_a_mount_that_hangs_does_not_hold_up_the_end(tmp_path: Path) -> None:
    asked, over = threading.Event(), threading.Event()

    def hang(folder: Path) -> list[tuple[Path, str]]:
        asked.set()
        over.wait()
        return []

    async def main() -> None:
        known: Any = KnownMedia(tmp_path / "known.json")
        sideload: Any = Taker()
        watch = MediumWatch(str(tmp_path), sideload, known, clock=Calendar(0.0), poll_s=0.1, look=hang)
        watching = asyncio.create_task(watch.run())
        await asyncio.to_thread(asked.wait, 90.0)
        watching.cancel()
        await asyncio.wait({watching})

    life = threading.Thread(target=asyncio.run, args=(main(),), daemon=True)
    life.start()
    life.join(90.0)
    ended = not life.is_alive()
    over.set()
    assert asked.is_set()
    assert ended
