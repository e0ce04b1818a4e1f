"""What operators said of numbers of workers: kept, taken back, and not believed when it cannot be read."""

from __future__ import annotations

from pathlib import Path

import pytest

from agent.scales import Scale, Scales

pytestmark = pytest.mark.unit


def test_what_was_said_is_found_after_a_restart_until_it_is_taken_back(tmp_path: Path) -> None:
    path = tmp_path / "scales.json"
    scale = Scale(least=2, most=4)
    Scales(path).change("m", scale)
    assert Scales(path).of("m") == scale
    assert Scales(path).of("other") is None
    Scales(path).change("m", None)
    assert Scales(path).of("m") is None


@pytest.mark.parametrize("content", ["{", "[]", '{"m": {"least": "2"}}', '{"m": 3}'])
def test_a_file_that_cannot_be_read_is_set_aside_and_the_configuration_holds(tmp_path: Path, content: str) -> None:
    path = tmp_path / "scales.json"
    path.write_text(content)
    scales = Scales(path)
    assert scales.of("m") is None
    assert path.with_name("scales.json.broken").read_text() == content
    scales.change("m", Scale(least=1, most=1))
    assert Scales(path).of("m") == Scale(least=1, most=1)
