"""A version on trial and the ends of its daemon: orderly ones never count, crashes do, a box is never left dark."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.box import MODEL, Box, copy_box

pytestmark = pytest.mark.integration

_ENDLESS = "probation_s = 600.0"  # as long as the trial may take: it does not end during a test


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store with scale 1.0.0 (stable) and 2.0.0, made once."""
    folder = tmp_path_factory.mktemp("store") / "box"
    with Box(folder, fresh=True) as box:
        box.make_store()
        box.publish_scale("1.0.0", factor=2.0)
        box.publish_scale("2.0.0", factor=3.0, channel="")
    return folder


@pytest.fixture
def box(template: Path, tmp_path: Path) -> Iterator[Box]:
    with copy_box(template, tmp_path / "box") as box:
        yield box


def configure(box: Box, probation: str) -> None:
    box.configure()
    box.config.write_text(box.config.read_text().replace("probation_s = 1.0", f"{probation}\ntrial_retry_cap_s = 1.0"))


def pointer(box: Box) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((box.state / "active" / f"{MODEL}.json").read_bytes())
    return found


def crash(box: Box) -> None:
    """End the daemon as a crash or a power cut does."""
    assert box.daemon is not None
    box.daemon.kill()
    box.daemon.wait()
    box.daemon = None


def until_answering(box: Box, version: str) -> None:
    box.until(lambda: box.ask()[1] == version, what=f"{version} answers", timeout_s=90)


def test_a_first_version_on_trial_outlives_any_number_of_orderly_stops(box: Box) -> None:
    configure(box, _ENDLESS)
    for _ in range(5):
        box.start()
        until_answering(box, "1.0.0")
        assert (pointer(box)["trial"], pointer(box)["running"]) == (True, True)
        assert box.stop_daemon() == 0
        assert (pointer(box)["starts_in_trial"], pointer(box)["running"]) == (0, False)


def test_a_first_version_on_trial_is_started_again_later_after_crashes(box: Box) -> None:
    configure(box, _ENDLESS)
    for crashes in range(4):
        box.start()
        until_answering(box, "1.0.0")
        assert pointer(box)["starts_in_trial"] == crashes
        crash(box)
    box.start()
    until_answering(box, "1.0.0")
    assert any(event["type"] == "boot.trial_held" for event in box.events())
    assert box.stop_daemon() == 0
    configure(box, "probation_s = 1.0")
    box.start()
    box.until_serving("1.0.0")
    assert (pointer(box)["trial"], pointer(box)["starts_in_trial"]) == (False, 0)


def test_only_crashes_let_a_version_on_trial_yield_to_the_confirmed_one(box: Box) -> None:
    configure(box, "probation_s = 1.0")
    box.start()
    box.until_serving("1.0.0")
    box.until(lambda: not pointer(box)["trial"], what="1.0.0 is confirmed", timeout_s=90)
    assert box.stop_daemon() == 0
    configure(box, _ENDLESS)
    box.start()
    until_answering(box, "1.0.0")
    assert box.control("deploy", f"{MODEL}@2.0.0", "--no-wait").returncode == 0
    until_answering(box, "2.0.0")
    for _ in range(5):
        assert box.stop_daemon() == 0
        box.start()
        until_answering(box, "2.0.0")
    for _ in range(4):
        until_answering(box, "2.0.0")
        crash(box)
        box.start()
    until_answering(box, "1.0.0")
    assert not pointer(box)["trial"]
