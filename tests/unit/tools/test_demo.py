"""The demonstration's words and counts, without its processes."""

from __future__ import annotations

import fcntl
import io
import shlex
from pathlib import Path
from typing import Any, cast

import pytest
from click.testing import CliRunner
from rich.console import Console

from tools.demo import __main__ as demo
from tools.demo.broker import Mosquitto
from tools.demo.receiver import Tally, arrived_of
from tools.demo.stage import Stage, StepFailedError
from tools.hub.errors import SourceError

pytestmark = pytest.mark.unit


def test_a_lost_tail_shows_in_the_count_though_nothing_seems_missing() -> None:
    tally = Tally()
    for seq in (1, 2, 2, 3):
        tally.add("box", {"st": "tel/metrics", "ep": "e", "seq": seq})
    tally.add("box", {"st": "evt/health", "ep": "e", "seq": 1})
    tally.add("box", {"st": "evt/health", "ep": "older", "seq": 1})
    tally.add("other", {"st": "evt/health", "ep": "e", "seq": 1})
    report = tally.report()
    assert report["missing"] == 0
    assert arrived_of(report, "box", "e") == 4  # a box that appended five has lost one


def test_a_folder_whose_daemon_runs_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "state").mkdir()
    (tmp_path / "inferd.toml").write_text("in use")
    with (tmp_path / "state/daemon.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        for fresh in (True, False):
            with pytest.raises(StepFailedError, match="in use by a running inferd"):
                Stage(tmp_path, fresh=fresh)
    assert (tmp_path / "inferd.toml").read_text() == "in use"
    Stage(tmp_path, fresh=True)
    assert not (tmp_path / "inferd.toml").exists()


def test_hints_can_be_pasted_whatever_the_path_is_called(tmp_path: Path) -> None:
    stage = Stage(tmp_path / "a folder; with 'marks'", fresh=False)

    class Broker:
        host, port = "127.0.0.1", 1883

    lines = demo.hints(stage, cast("Mosquitto", Broker()))
    words = [shlex.split(line) for line in lines if line.startswith("  ")]
    assert [line[line.index("--socket") + 1] for line in words if "--socket" in line] == [str(stage.socket)] * 6
    verbs = [next((verb for verb in ("unpin", "--team") if verb in line), "") for line in words]
    assert verbs.index("unpin") + 1 == verbs.index("--team")  # a pin would refuse the fleet's command
    assert words[verbs.index("--team")][-1] == str(stage.key("operator"))


def test_without_a_broker_the_hints_say_what_is_missing(tmp_path: Path) -> None:
    assert "mosquitto is not installed" in demo.hints(Stage(tmp_path, fresh=False), None)[-1]


def test_the_last_lines_say_what_was_skipped_and_the_table_shows_it() -> None:
    output = io.StringIO()
    shown = demo.Demonstration(Console(file=output, width=80))
    shown.step("first", lambda: "figure [/x]")
    shown.skip("the broker", "no mosquitto")
    shown.say_end(1.0, Path("log"))
    text = output.getvalue()
    assert "figure [/x]" in text
    assert "│ skipped │" in text
    assert "MQTT was left out" in text.split("└")[-1]


@pytest.mark.parametrize(
    "error", [RuntimeError("mosquitto did not start: [/x]"), StepFailedError("no"), OSError(28, "No space")]
)
def test_a_step_that_fails_is_told_and_ends_the_rest(error: Exception) -> None:
    def work() -> str:
        raise error

    output = io.StringIO()
    shown = demo.Demonstration(Console(file=output, width=80))
    shown.step("first", work)
    shown.step("second", lambda: "never")
    shown.say_end(1.0, Path("log"))
    assert shown.failed
    assert str(error) in output.getvalue()
    assert "not reached" in output.getvalue()


@pytest.mark.parametrize("arguments", [[], ["run"]])
def test_a_download_that_fails_names_the_folder_for_the_wheels(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str]
) -> None:
    def fail(*_: Any) -> None:
        raise SourceError("pip could not get magika", hint="Put the wheel into the folder by hand.")

    for name in ("demonstrate", "run_daemon"):
        monkeypatch.setattr(demo, name, fail)
    done = CliRunner().invoke(demo.main, [*arguments, "--wheels", str(tmp_path / "wheels")])
    assert done.exit_code == 1
    assert done.stderr.splitlines() == [
        "pip could not get magika",
        "Put the wheel into the folder by hand.",
        f"The wheels' folder is {tmp_path / 'wheels'}.",
    ]
