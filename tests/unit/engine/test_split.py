"""A key sees one version; a growing share only adds keys."""

from __future__ import annotations

import pytest

from agent.engine.split import Sampler, place_of

pytestmark = pytest.mark.unit

KEYS = [f"user-{number}" for number in range(20_000)]
ONE, OTHER = "ab" * 32, "cd" * 32


@pytest.mark.parametrize("percent", [0.5, 5, 25, 50, 99])
def test_a_share_of_the_keys_is_chosen(percent: float) -> None:
    chosen = sum(place_of(key, ONE) < percent for key in KEYS)
    assert chosen / len(KEYS) * 100 == pytest.approx(percent, abs=1.0)


def test_a_growing_share_only_adds_keys() -> None:
    places = {key: place_of(key, ONE) for key in KEYS}
    for smaller, larger in ((5, 25), (25, 50), (50, 100)):
        assert {key for key in KEYS if places[key] < smaller} <= {key for key in KEYS if places[key] < larger}
    assert all(0 <= place < 100 for place in places.values()), "0 % is nobody, 100 % is everybody"


def test_the_place_of_a_key_is_the_same_in_each_process_and_release() -> None:
    assert place_of("user-17", ONE) == pytest.approx(10.53716130554676)


def test_another_candidate_meets_other_keys_first() -> None:
    first = {key for key in KEYS if place_of(key, ONE) < 10}
    both = sum(1 for key in first if place_of(key, OTHER) < 10)
    assert both / len(first) < 0.15


def test_any_text_is_a_key() -> None:
    for key in ("", "\ud800", "ü" * 10_000, "\0"):
        assert 0 <= place_of(key, ONE) < 100


@pytest.mark.parametrize(("percent", "taken"), [(0, 0), (5, 50), (33, 330), (50, 500), (100, 1000)])
def test_an_even_part_of_the_requests_is_copied(percent: float, taken: int) -> None:
    sampler = Sampler(percent)
    assert sum(sampler.take() for _ in range(1000)) == pytest.approx(taken, abs=1)
