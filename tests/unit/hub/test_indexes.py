"""What an index may say next: channels, deprecation and revocation."""

from __future__ import annotations

import pytest

from agent.bundles.manifest import INDEX_SCHEMA, Index, IndexEntry, encode, parse_index
from agent.errors import InvalidInputError, TargetNotFoundError, UnsafeBundleError
from tools.hub import indexes
from tools.hub.errors import ConflictError

pytestmark = pytest.mark.unit


def entry(version: str, seq: int) -> IndexEntry:
    return IndexEntry(version=version, seq=seq, manifest_sha256="a" * 64, bytes=1, created="2026-11-21T08:00:00Z")


INDEX = Index(
    schema=INDEX_SCHEMA,
    team="vision",
    name="tiny",
    generated="2026-11-21T08:00:00Z",
    channels={"stable": "1.0.0", "canary": "1.1.0", "pilot": "1.1.0"},
    versions=(entry("1.0.0", 1), entry("1.1.0", 2), entry("1.2.0", 3)),
)


def test_a_new_version_takes_its_place_among_the_others() -> None:
    index = indexes.added(INDEX, entry("1.1.0-rc.1", 4))
    assert [item.version for item in index.versions] == ["1.0.0", "1.1.0-rc.1", "1.1.0", "1.2.0"]


def test_a_revoked_version_keeps_its_place_and_says_why() -> None:
    index = indexes.revoked(INDEX, "1.2.0", " wrong labels ")
    assert indexes.entry_of(index, "1.2.0").status == "revoked"
    assert indexes.entry_of(index, "1.2.0").reason == "wrong labels"
    assert index.channels == INDEX.channels
    assert parse_index(encode(index)) == index


def test_every_channel_of_a_revoked_version_moves_or_goes() -> None:
    with pytest.raises(ConflictError, match=r"canary, pilot of vision/tiny points to 1\.1\.0"):
        indexes.revoked(INDEX, "1.1.0", "bad")
    moved = indexes.revoked(INDEX, "1.1.0", "bad", replacement="1.2.0")
    assert moved.channels == {"stable": "1.0.0", "canary": "1.2.0", "pilot": "1.2.0"}
    assert indexes.revoked(INDEX, "1.1.0", "bad", drop_channels=True).channels == {"stable": "1.0.0"}


def test_no_way_leads_back_from_a_revocation() -> None:
    index = indexes.revoked(INDEX, "1.2.0", "bad")
    for attempt in (
        lambda: indexes.deprecated(index, "1.2.0", "old"),
        lambda: indexes.reinstated(index, "1.2.0"),
        lambda: indexes.pointed(index, ["stable"], "1.2.0"),
        lambda: indexes.revoked(index, "1.0.0", "bad", replacement="1.2.0"),
    ):
        with pytest.raises(ConflictError, match=r"1\.2\.0 is revoked: bad"):
            attempt()
    assert indexes.revoked(index, "1.2.0", "bad") == index


def test_a_deprecation_can_be_taken_back_and_leaves_channels_alone() -> None:
    index = indexes.deprecated(INDEX, "1.0.0", "")
    assert indexes.entry_of(index, "1.0.0").status == "deprecated"
    assert index.channels == INDEX.channels
    assert indexes.reinstated(index, "1.0.0") == INDEX
    assert indexes.pointed(index, ["canary"], "1.0.0").channels["canary"] == "1.0.0"


@pytest.mark.parametrize("reason", ["", "  ", "two\nlines", "x" * 301, "\x1b[31mred"])
def test_a_reason_is_one_readable_line(reason: str) -> None:
    with pytest.raises(InvalidInputError, match="reason"):
        indexes.revoked(INDEX, "1.2.0", reason)


def test_what_is_not_published_can_be_neither_marked_nor_pointed_to() -> None:
    for attempt in (
        lambda: indexes.deprecated(INDEX, "9.0.0", ""),
        lambda: indexes.reinstated(INDEX, "9.0.0"),
        lambda: indexes.revoked(INDEX, "9.0.0", "bad"),
        lambda: indexes.revoked(INDEX, "1.0.0", "bad", replacement="9.0.0"),
        lambda: indexes.pointed(INDEX, ["stable"], "9.0.0"),
    ):
        with pytest.raises(TargetNotFoundError, match=r"published are: 1\.0\.0, 1\.1\.0, 1\.2\.0"):
            attempt()
    with pytest.raises(ConflictError, match="itself"):
        indexes.revoked(INDEX, "1.0.0", "bad", replacement="1.0.0")
    with pytest.raises(UnsafeBundleError, match="channel"):
        indexes.pointed(INDEX, ["No Channel"], "1.0.0")
