"""Lazy models of a whole box: real daemon, real signed store, ``inferctl`` and HTTP."""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from agent.client import Client
from tests.box import MODEL, Box, copy_box
from tests.models import FEATURES

pytestmark = pytest.mark.integration


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store with scale 1.0.0 (x 2, stable) and 2.0.0 (x 3), and the state of a box that has confirmed 1.0.0."""
    folder = tmp_path_factory.mktemp("store") / "box"
    with Box(folder, fresh=True) as box:
        box.make_store()
        box.publish_scale("1.0.0", factor=2.0)
        box.configure()
        box.start()
        box.publish_scale("2.0.0", factor=3.0, channel="")  # while the box is busy with the first
        box.until_serving("1.0.0")
    return folder


@pytest.fixture
def box(template: Path, tmp_path: Path) -> Iterator[Box]:
    with copy_box(template, tmp_path / "box") as box:
        yield box


def http(box: Box, path: str, body: bytes | None = None) -> tuple[int, Any]:
    try:
        with urllib.request.urlopen(
            urllib.request.Request(f"http://127.0.0.1:{box.http_port}{path}", body)
        ) as response:
            return response.status, json.load(response)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)


def loaded(box: Box) -> bool:
    (row,) = box.status()["models"]
    assert row["ready"], row
    return bool(row["residency"]["loaded"])


def workers(box: Box) -> int:
    return sum(row["role"].startswith("worker") for row in box.status()["processes"])


def test_a_lazy_model_comes_and_goes_and_is_tried_loaded(box: Box) -> None:
    box.configure(more='[engine]\nload = "lazy"\nkeep_alive_s = 0.3\n')
    box.start()
    box.until(lambda: len(box.status()["models"]) == 1, what="it is known", timeout_s=90)
    assert not loaded(box)
    assert workers(box) == 0
    assert http(box, "/v2/health/ready")[0] == 200
    assert http(box, f"/v2/models/{MODEL}")[1]["inputs"][0]["name"] == "x"
    states = http(box, "/healthz")[1]["models"]
    assert states[MODEL] == {"ready": True, "reason": "not loaded, loads on demand"}
    assert "not loaded, loads on demand" in box.control("status").stdout
    assert "memory: not loaded (" in box.control("models").stdout
    with Client(box.socket, lanes=True, connect_timeout_s=10.0) as client:
        for _ in range(2):  # a direct lane is revoked when its worker leaves, and the next request wakes it
            for number in range(20):
                result = client.infer(MODEL, {"x": np.full((1, FEATURES), number, dtype=np.float32)})
                assert float(result.outputs["y"][0, 0]) == 2.0 * number
            box.until(lambda: not loaded(box), what="it leaves with the lane idle", timeout_s=90)
    assert box.control("deploy", f"{MODEL}@2.0.0").returncode == 0
    box.until(lambda: not loaded(box), what="the new version leaves once it is confirmed", timeout_s=90)
    assert box.ask() == (3.0, "2.0.0")
    assert box.control("rollback", MODEL).returncode == 0
    assert box.ask() == (2.0, "1.0.0")
    types = [event["type"] for event in box.events()]
    assert types.count("model.unloaded") >= 3
    box.until(lambda: (box.state / "memory.json").exists(), what="what it takes is written", timeout_s=90)


def test_who_is_loaded_is_the_configurations_then_the_operators_to_say(box: Box) -> None:
    """One box through four configurations, from its disk alone."""
    box.configure()
    box.start()
    box.until_serving("1.0.0")
    done = box.control("unload", MODEL)
    assert (done.returncode, done.stdout.startswith(f"{MODEL}: not loaded (")) == (0, True), done.stderr
    assert not loaded(box)
    done = box.control("load", MODEL, "--json")
    assert json.loads(done.stdout)["loaded"]
    for verb in ("load", "unload"):
        assert http(box, f"/v2/repository/models/{MODEL}/{verb}", b"")[0] == 401
    assert http(box, f"/v2/repository/models/{MODEL}/remove", b"")[0] == 404
    assert workers(box) == 1
    assert box.control("unload", "nothing").returncode == 1
    types = [event["type"] for event in box.events()]
    assert types.count("call.unload") == 2
    box.until(lambda: (box.state / "memory.json").exists(), what="what it takes is written", timeout_s=90)

    assert box.stop_daemon() == 0
    box.configure(more=f'[[engine.models]]\nname = "{MODEL}"\nload = "lazy"\n')
    box.start()
    box.until(lambda: len(box.status()["models"]) == 1, what="it is known", timeout_s=90)
    assert not loaded(box)
    (row,) = box.status()["models"]
    assert (row["residency"]["source"], row["residency"]["keep_alive_s"]) == ("measured", 300.0)
    assert box.ask() == (2.0, "1.0.0")
    assert loaded(box)

    assert box.stop_daemon() == 0
    box.configure(more=f'[[engine.models]]\nname = "{MODEL}"\npin = true\nkeep_alive_s = 0\n')
    box.start()
    box.until_serving("1.0.0")
    assert box.ask() == (2.0, "1.0.0")
    done = box.control("unload", MODEL)
    assert (done.returncode, "command_refused" in done.stderr, "pinned" in done.stderr) == (1, True, True)
    assert loaded(box)

    assert box.stop_daemon() == 0
    (box.state / "memory.json").unlink()
    box.configure(more="[engine]\nmemory_budget_bytes = 1000\n")
    box.start()
    box.until(lambda: not box.status()["models"][0]["ready"], what="it is not loaded", timeout_s=90)
    status, body = http(box, f"/predictions/{MODEL}", b"")
    assert (status, "models may take 1" in body["message"]) == (503, True), body
