"""Models measured beside each other: each in a process of its own, and a bad one disturbs nobody."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import numpy as np
import psutil
import pytest

from tests.fakes.classifier import INPUT, OUTPUT, images, write_classifier
from tools.hub.errors import TrialError
from tools.hub.listener import Listener
from tools.hub.measure import Effort, Measured, measure

pytestmark = pytest.mark.integration
QUICK = Effort(runs_max=12, seconds_max=0.1)
FEEDS = [{INPUT: picture[None]} for picture in images(3, seed=4)[0]]


def test_a_model_that_cannot_be_opened_or_run_is_reported_and_the_others_are_measured(tmp_path: Path) -> None:
    good = write_classifier(tmp_path / "good.onnx")
    (tmp_path / "bad.onnx").write_bytes(b"no model")
    wrong = [*FEEDS, {INPUT: np.zeros((1, 1, 8, 9), dtype=np.float32)}]
    found = measure({"bad": tmp_path / "bad.onnx", "good": good}, FEEDS, effort=QUICK, listener=Listener())
    assert isinstance(found["bad"], TrialError)
    assert str(found["bad"]).startswith("bad: ")
    measured = found["good"]
    assert isinstance(measured, Measured)
    assert [array.shape for array in measured.outputs[OUTPUT]] == [(1, 10)] * 3
    assert measured.runs == 12
    refused = measure({"good": good}, wrong, effort=QUICK, listener=Listener())["good"]
    assert isinstance(refused, TrialError)


def test_feeds_beside_are_answered_and_not_timed(tmp_path: Path) -> None:
    good = write_classifier(tmp_path / "good.onnx")
    pictures, _ = images(8, seed=4)
    found = measure({"a": good}, FEEDS, beside=[{INPUT: pictures}], effort=QUICK, listener=Listener())["a"]
    assert isinstance(found, Measured)
    assert len(found.outputs[OUTPUT]) == 3
    (answer,) = found.beside
    assert answer[OUTPUT].shape == (8, 10)


def test_only_as_many_answers_are_kept_as_there_is_room_for(tmp_path: Path) -> None:
    models = {name: write_classifier(tmp_path / f"{name}.onnx") for name in ("a", "b")}
    found = measure(models, FEEDS, beside=FEEDS[:1], effort=QUICK, output_bytes_max=60, listener=Listener())
    for measured in found.values():
        assert isinstance(measured, Measured)
        assert (len(measured.outputs[OUTPUT]), len(measured.beside)) == (2, 1)


def test_a_process_that_dies_is_reported_and_none_is_left(tmp_path: Path) -> None:
    class Killer(Listener):
        """Kills the second child as soon as the timing begins."""

        def stage(self, title: str, total: int, unit: object) -> None:
            if title == "time in turns":
                os.kill(children()[1].pid, signal.SIGKILL)

    def children() -> list[psutil.Process]:
        mine = [child for child in psutil.Process().children() if "tools.hub.measure_child" in command_of(child)]
        return sorted(mine, key=lambda child: child.pid)

    def command_of(child: psutil.Process) -> list[str]:
        try:
            return child.cmdline()
        except psutil.Error:  # another test's, which has ended
            return []

    models = {name: write_classifier(tmp_path / f"{name}.onnx") for name in ("a", "b")}
    found = measure(models, FEEDS, effort=QUICK, listener=Killer())
    assert isinstance(found["a"], Measured)
    assert "ended with -9" in str(found["b"])
    assert children() == []
