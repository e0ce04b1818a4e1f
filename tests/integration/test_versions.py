"""Versions of one model side by side on a whole box: a real store and daemon, every way to ask, and ``inferctl``."""

from __future__ import annotations

import json
import shutil
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from agent.client import Client
from agent.errors import AgentError, UnknownModelError
from tests.box import MODEL, Box, NearBox
from tests.models import FEATURES
from tools.demo.broker import Mosquitto, find_mosquitto
from tools.demo.stage import DEVICE

pytestmark = pytest.mark.integration

FACTORS = {"1.0.0": 2.0, "2.0.0": 3.0, "3.0.0": 4.0}
ONES = np.ones((1, FEATURES), dtype=np.float32)


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store with three versions of scale, the first of them stable, made once."""
    folder = tmp_path_factory.mktemp("store") / "box"
    with NearBox(folder, fresh=True) as box:
        box.make_store()
        for version, factor in FACTORS.items():
            box.publish_scale(version, factor=factor, channel="stable" if version == "1.0.0" else "")
    return folder


@pytest.fixture
def box(template: Path, tmp_path: Path) -> Iterator[Box]:
    shutil.copytree(template, tmp_path / "box", symlinks=True)
    with NearBox(tmp_path / "box", fresh=False) as box:
        box.configure()
        yield box


def inferctl(box: Box, *arguments: str, status: int = 0) -> Any:
    """Return the JSON answer of a verb; of one that follows a deployment, its last line."""
    done = box.control(*arguments, "--json")
    assert done.returncode == status, done.stdout + done.stderr
    try:
        return json.loads(done.stdout)
    except ValueError:
        return json.loads(done.stdout.splitlines()[-1])


def refusal(box: Box, *arguments: str) -> str:
    done = box.control(*arguments)
    assert done.returncode == 1, done.stdout + done.stderr
    return str(done.stderr)


def http(box: Box, path: str, body: Any = None) -> tuple[int, Any]:
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(
        f"http://127.0.0.1:{box.http_port}{path}", data, {"content-type": "application/json"}
    )
    try:
        with urllib.request.urlopen(request) as response:
            return response.status, json.loads(response.read() or b"null")
    except urllib.error.HTTPError as error:
        return error.code, json.loads(error.read())


def answer(box: Box, version: str | None = None, *, lanes: bool = False) -> tuple[float, str]:
    """Return the first output for 1, and the version that answered."""
    with Client(box.socket, lanes=lanes) as client:
        result = client.infer(MODEL, {"x": ONES}, version=version)
        row = next(row for row in box.status()["models"] if row.get("version") == result.version)
        assert row["lanes"] or not lanes
    return float(result.outputs["y"][0, 0]), result.version


@contextmanager
def asked(box: Box, version: str | None, *, lanes: bool = False) -> Iterator[list[str]]:
    """Ask again and again as long as the body runs; yield which versions answered, or what went wrong."""
    answers: list[str] = []
    over = threading.Event()

    def ask() -> None:
        with Client(box.socket, retries=0, lanes=lanes) as client:
            while not over.is_set():
                try:
                    answers.append(client.infer(MODEL, {"x": ONES}, version=version).version)
                except AgentError as error:
                    answers.append(f"{error.code}: {error}")
                time.sleep(0.001)  # the box has other work, too

    thread = threading.Thread(target=ask)
    thread.start()
    try:
        yield answers
    finally:
        over.set()
        thread.join()


def by_http(box: Box, version: str) -> float:
    tensor = {"name": "x", "datatype": "FP32", "shape": [1, FEATURES], "data": [1.0] * FEATURES}
    path = f"/v2/models/{MODEL}/versions/{version}/infer" if version else f"/v2/models/{MODEL}/infer"
    status, value = http(box, path, {"inputs": [tensor]})
    assert status == 200, value
    return float(value["outputs"][0]["data"][0])


def slots(box: Box) -> dict[str, str]:
    return {row["slot"]: row["active"] for row in box.status()["slots"]}


def workers(box: Box) -> dict[str, int]:
    """Return how many workers each version has; nothing as long as one of the slots is being loaded."""
    rows = box.status()["models"]
    return {row["version"]: len(row["workers"]) for row in rows} if all("version" in row for row in rows) else {}


def loads(box: Box) -> int:
    """Return how often something was loaded into memory since the daemon started."""
    return sum(event["type"] == "model.loaded" for event in box.events())


def test_versions_answer_side_by_side_the_default_changes_in_one_step_and_a_restart_needs_no_store(box: Box) -> None:
    box.start()
    box.until_serving("1.0.0")
    assert "has no default version" in refusal(box, "deploy", "other@1.0.0", "--team", "demo", "--beside")
    assert inferctl(box, "deploy", f"{MODEL}@2.0.0", "--beside")["state"] == "confirmed"

    # Every way to ask finds each version; without one the default answers.
    for lanes in (False, True):
        assert answer(box, lanes=lanes) == (2.0, "1.0.0")
        assert answer(box, "1.0.0", lanes=lanes) == (2.0, "1.0.0")
        assert answer(box, "2.0.0", lanes=lanes) == (3.0, "2.0.0")
    assert [by_http(box, version) for version in ("", "1.0.0", "2.0.0")] == [2.0, 2.0, 3.0]
    with pytest.raises(UnknownModelError, match=r"there are 1\.0\.0 \(default\), 2\.0\.0 \(beside\)$"):
        answer(box, "9.0.0")
    assert http(box, f"/v2/models/{MODEL}/versions/9.0.0/infer", {"inputs": []})[0] == 404

    # And says so.
    assert http(box, f"/v2/models/{MODEL}")[1]["versions"] == ["1.0.0", "2.0.0"]
    assert http(box, f"/v2/models/{MODEL}/versions/2.0.0/ready")[0] == 200
    assert http(box, f"/v2/models/{MODEL}/versions/2.0.0")[1]["versions"] == ["1.0.0", "2.0.0"]
    with Client(box.socket) as client:
        metadata = {row["slot"]: row for row in client.call("models")}
    assert metadata[f"{MODEL}@2.0.0"]["ready"]
    assert slots(box) == {MODEL: "1.0.0", f"{MODEL}@2.0.0": "2.0.0"}
    assert f"{MODEL} 2.0.0 beside" in box.control("status").stdout
    assert f"{MODEL}@2.0.0" in box.control("models").stdout
    assert {row["version"]: row["roles"] for row in inferctl(box, "store")["versions"]} == {
        "1.0.0": ["active"],
        "2.0.0": ["beside", "pinned"],
    }
    assert inferctl(box, "selftest", f"{MODEL}@2.0.0")["ok"]

    # The default changes without anything being loaded, and back, when the one before is kept.
    before = loads(box)
    with asked(box, None) as everybody, asked(box, "1.0.0") as by_name, asked(box, None, lanes=True) as direct:
        assert inferctl(box, "default", MODEL, "2.0.0", "--keep")["state"] == "confirmed"
        assert (answer(box), answer(box, "1.0.0")) == ((3.0, "2.0.0"), (2.0, "1.0.0"))
        assert inferctl(box, "default", MODEL, "1.0.0")["state"] == "confirmed"
        assert (answer(box), answer(box, "2.0.0")) == ((2.0, "1.0.0"), (3.0, "2.0.0"))
        assert inferctl(box, "default", MODEL, "2.0.0")["state"] == "confirmed"
    assert set(everybody) | set(direct) == {"1.0.0", "2.0.0"}, "no request was lost on the way"
    assert set(by_name) == {"1.0.0"}
    assert loads(box) == before
    assert len(box.status()["models"]) == 3
    assert "not on this box" in refusal(box, "default", MODEL, "3.0.0")

    # So does the number of workers; what an operator said of it survives a restart.
    assert inferctl(box, "scale", MODEL, "--min", "2")["max"] == 2
    box.until(lambda: workers(box) == {"1.0.0": 2, "2.0.0": 2}, what="each version has two workers")
    assert "'max' must be" in refusal(box, "scale", MODEL, "--min", "3", "--max", "2")

    # What is on disk is enough.
    assert box.stop_daemon() == 0
    box.store.rename(box.store.with_name("hidden"))
    box.start()
    box.until(lambda: answer(box) == (3.0, "2.0.0") and answer(box, "1.0.0") == (2.0, "1.0.0"), what="both answer")
    assert loads(box) == 2
    box.until(lambda: workers(box) == {"1.0.0": 2, "2.0.0": 2}, what="each version has two workers again")
    assert inferctl(box, "scale", MODEL, "--reset")["configured"]
    everything = {MODEL: "2.0.0", f"{MODEL}@1.0.0": "1.0.0", f"{MODEL}@2.0.0": "2.0.0"}
    assert slots(box) == everything
    with pytest.raises(UnknownModelError, match=r"there are 2\.0\.0 \(default, beside\), 1\.0\.0 \(beside\)$"):
        answer(box, "9.0.0")

    # A version goes without touching the others; the default only with its model.
    assert "is the default" in refusal_of_default(box)
    assert inferctl(box, "remove", f"{MODEL}@1.0.0") == {
        "model": MODEL, "version": "1.0.0", "slots": [f"{MODEL}@1.0.0"], "removed": True,
    }  # fmt: skip
    with pytest.raises(UnknownModelError):
        answer(box, "1.0.0")
    assert answer(box) == (3.0, "2.0.0")
    assert "is not kept beside" in refusal(box, "remove", f"{MODEL}@1.0.0")
    assert "the configuration wants" in refusal(box, "remove", MODEL)
    assert [event["data"]["slot"] for event in box.events() if event["type"] == "slot.removed"] == [
        f"{MODEL}@2.0.0", f"{MODEL}@1.0.0",
    ]  # fmt: skip


def refusal_of_default(box: Box) -> str:
    """Return why the default cannot be removed while its model is there."""
    assert inferctl(box, "remove", f"{MODEL}@2.0.0")["removed"]  # from beside: it is the default all the same
    assert answer(box) == (3.0, "2.0.0")
    return refusal(box, "remove", f"{MODEL}@2.0.0")


def test_the_configuration_keeps_versions_beside_and_a_model_it_does_not_name_can_go(box: Box) -> None:
    text = box.config.read_text()
    named = text.replace(f'name = "{MODEL}"', f'name = "{MODEL}"\nversion = "1.0.0"\nbeside = ["3.0.0", "2.0.0"]')
    box.config.write_text(named)
    box.start()
    expected = {MODEL: "1.0.0", f"{MODEL}@2.0.0": "2.0.0", f"{MODEL}@3.0.0": "3.0.0"}
    box.until(lambda: slots(box) == expected and not any(row["trial"] for row in box.status()["slots"]), what="all")
    assert [answer(box, version)[0] for version in FACTORS] == list(FACTORS.values())
    status, index = http(box, "/v2/repository/index", {})
    assert (status, [(row["version"], row["state"]) for row in index]) == (
        200,
        [("1.0.0", "READY"), ("2.0.0", "READY"), ("3.0.0", "READY")],
    )
    assert "the configuration wants" in refusal(box, "remove", f"{MODEL}@3.0.0")

    # Once nobody names the model any more it serves on until it is told to go, with all its versions.
    assert box.stop_daemon() == 0
    box.config.write_text(text[: text.index("[[models]]")])
    box.start()
    box.until(lambda: answer(box, "3.0.0") == (4.0, "3.0.0"), what="it serves on")
    assert sorted(inferctl(box, "remove", MODEL)["slots"]) == sorted(expected)
    with pytest.raises(UnknownModelError):
        answer(box)
    assert (slots(box), box.status()["models"]) == ({}, [])
    assert "there is no model" in refusal(box, "remove", MODEL)
    assert box.stop_daemon() == 0
    box.start()
    box.until(lambda: box.status()["slots"] == [], what="it is gone for good")
    assert list((box.state / "active").iterdir()) == []
    # And comes back when it is asked for.
    assert inferctl(box, "deploy", f"{MODEL}@2.0.0", "--team", "demo")["state"] == "confirmed"
    assert answer(box) == (3.0, "2.0.0")


@pytest.mark.skipif(find_mosquitto() is None, reason="needs mosquitto")
def test_the_fleet_deploys_beside_changes_the_default_and_removes(box: Box) -> None:
    with Mosquitto(box.folder / "broker") as broker:
        box.configure(broker_port=broker.port)
        box.start()
        box.until_serving("1.0.0")
        common = ("--device", DEVICE, "--broker", f"{broker.host}:{broker.port}", "--key", box.key("operator"))
        reply = box.hub("deploy", f"{MODEL}@2.0.0", "--team", "demo", "--beside", *common)
        assert (reply["status"], reply["result"]["slot"]) == ("done", f"{MODEL}@2.0.0")
        assert answer(box, "2.0.0") == (3.0, "2.0.0")
        assert box.hub("default", MODEL, "2.0.0", "--keep", *common)["status"] == "done"
        assert (answer(box), answer(box, "1.0.0")) == ((3.0, "2.0.0"), (2.0, "1.0.0"))
        assert box.hub("remove", f"{MODEL}@1.0.0", *common)["result"]["removed"]
        assert slots(box) == {MODEL: "2.0.0", f"{MODEL}@2.0.0": "2.0.0"}
