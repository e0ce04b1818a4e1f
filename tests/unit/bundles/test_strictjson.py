"""JSON with one reading only."""

from __future__ import annotations

import pytest

from agent.bundles import strictjson
from agent.errors import UnsafeBundleError

pytestmark = pytest.mark.unit


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "{} {}",
        '{"a": 1, "a": 2}',
        '{"a": {"b": 1, "b": 1}}',
        '{"a": NaN}',
        '{"a": Infinity}',
        '{"a": -Infinity}',
        '{"a": 1e999}',
        "[" * 17 + "]" * 17,
        "[" * 100_000,
        "9" * 5000,
        '"\\ud800',
    ],
)
def test_ambiguous_or_exhausting_json_is_refused(text: str) -> None:
    with pytest.raises(UnsafeBundleError, match="thing"):
        strictjson.loads(text.encode(), what="thing")


def test_invalid_utf8_is_refused() -> None:
    with pytest.raises(UnsafeBundleError):
        strictjson.loads(b'"\xff"', what="thing")


def test_more_bytes_than_allowed_are_not_parsed() -> None:
    with pytest.raises(UnsafeBundleError, match="11 bytes"):
        strictjson.loads(b'"123456789"', what="thing", size_bytes_max=10)


def test_sixteen_levels_are_accepted() -> None:
    assert strictjson.loads(b"[" * 16 + b"]" * 16, what="thing")
