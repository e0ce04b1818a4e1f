"""A metered link's byte budget: what is spent stays spent, through restarts and clocks that jump."""

from __future__ import annotations

from pathlib import Path

import pytest

from agent.bundles.budget import Budget
from agent.bundles.pace import Throttle
from agent.config import StoreConfig, parse
from agent.errors import BudgetError, ConfigError

pytestmark = pytest.mark.unit
WINDOW_S = 1000.0


class Clock:
    now = 50_000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


def budget(folder: Path, clock: Clock, *, size: int = 100) -> Budget:
    return Budget(folder / "budget.json", size_bytes=size, window_s=WINDOW_S, wall=clock)


def test_what_is_spent_is_remembered_by_the_next_process(tmp_path: Path, clock: Clock) -> None:
    budget(tmp_path, clock).charge(60)
    with pytest.raises(BudgetError, match="60 of"):
        budget(tmp_path, clock).charge(41)
    budget(tmp_path, clock).charge(40)


def test_the_error_says_when_the_next_window_begins(tmp_path: Path, clock: Clock) -> None:
    budget(tmp_path, clock).charge(100)
    clock.now += 400
    with pytest.raises(BudgetError) as failure:
        budget(tmp_path, clock).charge(1)
    assert failure.value.retry_after_s == 600
    clock.now += failure.value.retry_after_s
    budget(tmp_path, clock).charge(100)


def test_a_charge_is_corrected_by_what_was_fetched(tmp_path: Path, clock: Clock) -> None:
    budget(tmp_path, clock).charge(100)
    budget(tmp_path, clock).settle(100, 70)
    budget(tmp_path, clock).charge(30)
    with pytest.raises(BudgetError):
        budget(tmp_path, clock).charge(1)
    budget(tmp_path, clock).settle(30, 50)
    with pytest.raises(BudgetError, match="120 of"):
        budget(tmp_path, clock).charge(1)


def test_a_clock_set_back_gives_no_new_budget(tmp_path: Path, clock: Clock) -> None:
    budget(tmp_path, clock).charge(100)
    clock.now = 10.0
    with pytest.raises(BudgetError):
        budget(tmp_path, clock).charge(1)


@pytest.mark.parametrize("content", [b"", b"[]", b"{}", b'{"since": "x", "spent": 1}', b"\xff"])
def test_a_broken_counter_stops_nothing(tmp_path: Path, clock: Clock, content: bytes) -> None:
    (tmp_path / "budget.json").write_bytes(content)
    budget(tmp_path, clock).charge(100)
    with pytest.raises(BudgetError):
        budget(tmp_path, clock).charge(1)


def test_without_a_budget_nothing_is_counted(tmp_path: Path, clock: Clock) -> None:
    budget(tmp_path, clock, size=0).charge(1 << 40)
    assert not list(tmp_path.iterdir())


def test_a_throttle_lets_the_rate_through_for_all_readers_together() -> None:
    now, slept = [0.0], [0.0]

    def sleep(seconds: float) -> None:
        slept[0] += seconds
        now[0] += seconds

    throttle = Throttle(1000, now=lambda: now[0], sleep=sleep)
    for _ in range(10):
        throttle.spend(500)
    assert slept[0] == pytest.approx(5.0)
    now[0] += 100.0  # a pause is not saved up
    throttle.spend(1000)
    assert slept[0] == pytest.approx(6.0)


@pytest.mark.parametrize(
    ("mirror", "complaint"),
    [
        ({"url": "ftp://x"}, "not file://"),
        ({"url": "https://user:secret@x/"}, "without user"),
        ({"url": "https://x/?sig=1"}, "without user"),
        ({"url": "s3://"}, "s3://bucket"),
        ({"url": "file:///x", "token_file": "/t"}, "token_file"),
        ({"url": "http://x", "tls_ca_file": "/t"}, "tls_ca_file"),
        ({"url": "https://x", "tls_key_file": "/t"}, "tls_certificate_file"),
        ({"url": "https://x", "endpoint": "http://y"}, "endpoint"),
        ({"url": "https://x", "proxy": "socks5://y"}, "proxy"),
        ({"url": "https://x", "rate_bytes_per_s_max": -1}, "rate_bytes_per_s_max"),
    ],
)
def test_a_mirror_that_makes_no_sense_is_refused_with_its_key(mirror: dict[str, object], complaint: str) -> None:
    with pytest.raises(ConfigError, match=complaint) as failure:
        parse({"store": {"mirrors": [mirror]}})
    assert "store.mirrors" in str(failure.value)
    assert "secret" not in str(failure.value)


def test_urls_come_before_mirrors_and_none_twice() -> None:
    store = parse({"store": {"urls": ["file:///a"], "mirrors": [{"url": "http://b"}]}}).store
    assert [source.url for source in store.sources] == ["file:///a", "http://b"]
    with pytest.raises(ValueError, match="the same url"):
        StoreConfig(urls=("http://b/", "http://b"))
    with pytest.raises(ValueError, match="budget_bytes"):
        StoreConfig(budget_bytes=1)
