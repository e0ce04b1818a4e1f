"""``make bench`` as a whole, as short as it can be: every section ends, every target is listed. No figure is judged."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tools.bench import SECTIONS

pytestmark = pytest.mark.integration

SHORT = (
    *("--repetitions", "1", "--seconds", "0.05", "--frame-seconds", "0.05", "--rate", "50", "--starts", "1"),
    *("--overload-seconds", "0.5", "--overload-repetitions", "1", "--queue", "8", "--swaps", "1", "--swap-rate", "50"),
    *("--idle-seconds", "0.2"),
)


def test_sections_are_measured_on_boxes_of_their_own(tmp_path: Path) -> None:
    only = ",".join(name for name in SECTIONS if name != "cnn")  # which takes minutes of compute on a busy machine
    command = [sys.executable, "-m", "tools.bench", "--state", str(tmp_path / "state"), "--only", only, "--json"]
    done = subprocess.run([*command, *SHORT], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(done.stdout)
    loads = {row["load"] for row in found["figures"]}
    assert {load.split(",")[0] for load in loads} == {"tiny MLP", "6 MB frame"}
    for row in found["figures"]:
        if "skipped" in row:
            assert row["way"].startswith("lane ")
            assert "lane not granted" in row["skipped"]
        else:
            assert row["p50_us"] > 0
    overload, swap, memory = found["facts"].values()
    assert overload["refused, share"] > 0
    assert overload["other errors"] == {}
    assert swap["failed requests"] == 0
    assert swap["requests, swap"] > 0
    assert memory["each further model, MB"] > 0
    assert memory["cold start, s"] > 0
    targets = {(target["work"], target["way"]): target for target in found["targets"]}
    assert len(targets) == 21
    for (work, way), target in targets.items():
        measured = not (work.startswith("ResNet") or way.startswith("lane"))
        assert not measured or target["met"] is not None, (work, way)
    assert json.loads((tmp_path / "state/results/report.json").read_text()) == found
    assert "targets" in (tmp_path / "state/results/report.txt").read_text()


def test_an_unknown_section_is_refused(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tools.bench", "--state", str(tmp_path), "--only", "tiny,tine"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "tine" in done.stderr
