"""What models took of memory, kept over restarts."""

from __future__ import annotations

from pathlib import Path

import pytest

from agent.engine.learned import Learned

pytestmark = pytest.mark.unit

DIGEST = "d" * 64


def saved(path: Path, fingerprint: str = "box", **sizes: int) -> Learned:
    learned = Learned(path, fingerprint)
    learned.note(DIGEST, "cpu", sizes)
    news = learned.news()
    assert news is not None
    learned.save(news)
    return learned


def test_the_highest_use_of_each_place_is_kept_over_a_restart(tmp_path: Path) -> None:
    path = tmp_path / "memory.json"
    learned = saved(path, host=100, gpu=5)
    learned.note(DIGEST, "cpu", {"host": 50, "gpu": 9})
    news = learned.news()
    assert news is not None
    learned.save(news)
    assert Learned(path, "box").of(DIGEST, "cpu") == {"host": 100, "gpu": 9}
    assert Learned(path, "box").of(DIGEST, "other") is None


def test_what_changed_little_is_not_written_again(tmp_path: Path) -> None:
    learned = saved(tmp_path / "memory.json", host=1000)
    learned.note(DIGEST, "cpu", {"host": 1001})
    assert learned.news() is None


def test_another_device_learns_for_itself_and_forgets_nothing(tmp_path: Path) -> None:
    path = tmp_path / "memory.json"
    saved(path, host=100)
    other = saved(path, fingerprint="new driver", host=300)
    assert other.of(DIGEST, "cpu") == {"host": 300}
    assert Learned(path, "box").of(DIGEST, "cpu") == {"host": 100}


@pytest.mark.parametrize(
    "content", [b"\x00\xff", b"[]", b'{"devices": 3}', b'{"devices": {"box": {"a/b": {"host": "x"}}}}']
)
def test_an_unreadable_file_is_set_aside(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "memory.json"
    path.write_bytes(content)
    assert Learned(path, "box").of(DIGEST, "cpu") is None
    assert (tmp_path / "memory.json.broken").read_bytes() == content


def test_it_is_bounded(tmp_path: Path) -> None:
    learned = Learned(tmp_path / "memory.json", "box")
    for number in range(2000):
        learned.note(f"{number:064}", "cpu", {"host": 1 + number})
    assert learned.of(f"{1999:064}", "cpu") == {"host": 2000}
    assert learned.of(f"{0:064}", "cpu") is None
    news = learned.news()
    assert news is not None
    assert len(news["box"]) == 1024
