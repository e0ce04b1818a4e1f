"""A soak of some seconds: it passes on a sound daemon, and it notices one that is not."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from tools.rig.box import Rig
from tools.soak.run import prepare, soak

pytestmark = pytest.mark.integration


def test_a_short_soak_finds_nothing(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tools.soak", "--state", str(tmp_path / "box"), "--minutes", "0.1", "--seed", "5"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "seed 5" in done.stderr
    found: dict[str, Any] = json.loads((tmp_path / "box/report.json").read_text())
    assert (found["seed"], found["faults"]) == (5, [])
    assert set(found["acts"]) == {
        *("kill_worker", "kill_client", "burst", "cancel_storm", "region_lies", "region_moves", "malformed", "swap"),
    }
    assert found["answers"] > 0
    assert {ledger["name"] for ledger in found["ledgers"]} >= {"frames", "http", "library"}
    assert all(ledger["outcomes"]["result"] for ledger in found["ledgers"])
    assert found["before"]["pid"] == found["after"]["pid"]


def test_a_daemon_that_ends_is_a_fault(tmp_path: Path) -> None:
    with Rig(tmp_path / "box", fresh=True) as rig:
        prepare(rig)
        killed = threading.Event()

        def say(text: str) -> None:
            if "left" in text and not killed.is_set():
                killed.set()
                os.kill(rig.daemon_pid, signal.SIGKILL)

        report = soak(rig, seed=1, seconds=3.0, say=say)
        assert killed.is_set()
        assert any("the daemon ended with -9" in fault for fault in report.faults), report.faults
