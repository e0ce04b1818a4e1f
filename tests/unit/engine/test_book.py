"""What is learned of variants outlives the daemon, and belongs to one device."""

from __future__ import annotations

from pathlib import Path

import pytest

from agent.engine.book import VariantBook
from agent.engine.ladder import Measured, Verdict, fallen

pytestmark = pytest.mark.unit
DIGEST = "a" * 64
CRASH = fallen(None, "worker_died", "5 deaths", now=17.0)
VERDICT = Verdict(
    preferred=True,
    reason="faster",
    own=Measured(p50_ms=1.0, cosine=0.999, top1=1.0),
    rival=Measured(p50_ms=2.0, cosine=1.0),
    rival_id="fp32",
    wall_s=1.7e9,
)


def test_falls_and_verdicts_are_read_again(tmp_path: Path) -> None:
    book = VariantBook(tmp_path / "variants.json", "box")
    book.note_fall(DIGEST, "gpu", fallen(CRASH, "worker_died", "again", now=20.0))
    book.note_verdict(DIGEST, "int8", VERDICT)
    again = VariantBook(tmp_path / "variants.json", "box")
    found = again.falls(DIGEST)["gpu"]
    assert (found.times, found.code, found.reason, found.remembered, found.at) == (2, "worker_died", "again", True, 0)
    assert again.verdicts(DIGEST) == {"int8": VERDICT}
    assert not again.falls("b" * 64)


def test_another_device_or_bundle_knows_nothing(tmp_path: Path) -> None:
    book = VariantBook(tmp_path / "variants.json", "driver 1")
    book.note_verdict(DIGEST, "int8", VERDICT)
    assert not VariantBook(tmp_path / "variants.json", "driver 2").verdicts(DIGEST)
    assert not book.verdicts("b" * 64)


@pytest.mark.parametrize("code", ["device_lost", "load_failed", "overloaded", "sandbox_failed"])
def test_what_a_restart_may_change_is_not_kept(tmp_path: Path, code: str) -> None:
    book = VariantBook(tmp_path / "variants.json", "box")
    book.note_fall(DIGEST, "gpu", fallen(None, code, "x", now=1.0))
    assert not VariantBook(tmp_path / "variants.json", "box").falls(DIGEST)


def test_a_variant_that_served_well_is_forgiven(tmp_path: Path) -> None:
    book = VariantBook(tmp_path / "variants.json", "box")
    book.note_fall(DIGEST, "gpu", CRASH)
    book.forgive(DIGEST, "gpu")
    assert not VariantBook(tmp_path / "variants.json", "box").falls(DIGEST)


@pytest.mark.parametrize("content", ["", "{", '{"schema": 1}', '{"schema": "other", "device": "box"}', "[]"])
def test_a_damaged_file_costs_what_it_held_and_nothing_else(tmp_path: Path, content: str) -> None:
    path = tmp_path / "variants.json"
    path.write_text(content)
    book = VariantBook(path, "box")
    assert not book.falls(DIGEST)
    book.note_fall(DIGEST, "gpu", CRASH)
    assert VariantBook(path, "box").falls(DIGEST)


def test_a_folder_that_cannot_be_written_is_no_failure(tmp_path: Path) -> None:
    book = VariantBook(tmp_path / "absent" / "variants.json", "box")
    book.note_fall(DIGEST, "gpu", CRASH)
    assert book.falls(DIGEST)["gpu"].times == 1


def test_the_file_is_bounded_and_the_newest_stay(tmp_path: Path) -> None:
    book = VariantBook(tmp_path / "variants.json", "box")
    for number in range(140):
        book.note_fall(f"{number:064}", "gpu", CRASH)
    again = VariantBook(tmp_path / "variants.json", "box")
    known = [number for number in range(140) if again.falls(f"{number:064}")]
    assert known == list(range(12, 140))
