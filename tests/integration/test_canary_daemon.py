"""Canary, shadow and gates on a whole box: a signed store, real workers, clients that ask all the time."""

from __future__ import annotations

import http.client
import itertools
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.box import MODEL, Box, copy_box
from tests.models import FEATURES

pytestmark = pytest.mark.integration

KEYS = [f"user-{number}" for number in range(30)]
LARGE_KEYS = frozenset(KEYS[::5])
LARGE = json.dumps([[1.0] * FEATURES]).encode() + b" " * 200_000


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store with scale 1.0.0 (stable), 2.0.0 that answers alike, and 3.0.0 that does not."""
    folder = tmp_path_factory.mktemp("store") / "box"
    with Box(folder, fresh=True) as box:
        box.make_store()
        box.publish_scale("1.0.0", factor=2.0)
        box.publish_scale("2.0.0", factor=2.0, channel="")
        box.publish_scale("3.0.0", factor=3.0, channel="")
    return folder


@pytest.fixture
def box(template: Path, tmp_path: Path) -> Iterator[Box]:
    with copy_box(template, tmp_path / "box") as box:
        box.configure()
        box.start()
        box.until_serving("1.0.0")
        yield box


class Traffic:
    """What clients saw: versions by key, and everything that was no answer."""

    def __init__(self) -> None:
        self.by_key: dict[str, list[str]] = {}
        self.failures: list[str] = []
        self.stop = threading.Event()

    def note(self, key: str, version: str) -> None:
        self.by_key.setdefault(key, []).append(version)


@contextmanager
def traffic(box: Box) -> Iterator[Traffic]:
    """Clients that ask the model over the frame socket and HTTP while the body runs."""
    seen = Traffic()
    threads = [threading.Thread(target=ask, args=(box, seen)) for ask in (_ask_by_frames, _ask_by_http)]
    for thread in threads:
        thread.start()
    try:
        yield seen
    finally:
        seen.stop.set()
        for thread in threads:
            thread.join(60)


def _ask_by_frames(box: Box, seen: Traffic) -> None:
    x = np.ones((1, FEATURES), dtype=np.float32)
    try:
        with box.client() as client:
            for key in itertools.cycle(KEYS):
                if seen.stop.wait(0.004):
                    return
                params = {"routing_key": key}
                if key in LARGE_KEYS:  # through the daemon's shared memory
                    result = client.predict(MODEL, LARGE, "application/json", params=params)
                else:
                    result = client.infer(MODEL, {"x": x}, params=params)
                seen.note(key, result.version)
    except Exception as error:  # noqa: BLE001  whatever it is, a client has lost a request
        seen.failures.append(repr(error))


def _ask_by_http(box: Box, seen: Traffic) -> None:
    tensor = {"name": "x", "datatype": "FP32", "shape": [1, FEATURES], "data": [1.0] * FEATURES}
    body = json.dumps({"inputs": [tensor]})
    try:
        connection = http.client.HTTPConnection("127.0.0.1", box.http_port, timeout=60)
        for key in itertools.cycle(KEYS):
            if seen.stop.wait(0.004):
                return
            connection.request("POST", f"/v2/models/{MODEL}/infer", body, {"X-Routing-Key": key})
            reply = connection.getresponse()
            document = json.loads(reply.read())
            if reply.status != 200:
                seen.failures.append(str(document))
            else:
                seen.note(key, document["model_version"])
    except Exception as error:  # noqa: BLE001  whatever it is, a client has lost a request
        seen.failures.append(repr(error))


def deployed(box: Box, *arguments: str) -> list[dict[str, Any]]:
    """Deploy and return every step that was told; the last is the end."""
    done = box.control("deploy", *arguments, "--json")
    assert done.stdout, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_a_version_meets_copies_then_shares_then_everybody_and_no_client_notices(box: Box) -> None:
    with traffic(box) as seen:
        options = ("--shadow", "50", "--canary", "30,60", "--step-s", "0.5", "--calls-min", "5")
        steps = deployed(box, f"{MODEL}@2.0.0", *options)
        end = steps[-1]
        assert end["state"] == "confirmed", end
        assert [step["percent"] for step in steps if step["state"] == "canary"] == [0, 30, 60]
        copies, *shares, probation = end["evidence"]
        assert copies["compared"] >= 5
        assert copies["agreement"] == 1.0
        assert [share["percent"] for share in shares] == [30, 60]
        assert all(share["good"] >= 5 and share["failed"] == 0 and share["p95_ms"] > 0 for share in shares)
        assert probation["percent"] == 100

        # One that answers otherwise is found out by copies alone.
        end = deployed(box, f"{MODEL}@3.0.0", "--shadow", "100", "--step-s", "1", "--calls-min", "5")[-1]
        assert (end["state"], end["code"]) == ("rolled_back", "canary_failed"), end
        assert "copies agree" in end["message"]
        assert box.ask()[1] == "2.0.0"
        refused = box.control("deploy", f"{MODEL}@3.0.0")
        assert "refused_before" in refused.stderr
        for text in (box.control("models").stdout, box.control("status").stdout):
            assert "not as wanted: 3.0.0 (pin) was tried: rejected: refused_before: version 3.0.0 failed here" in text
            assert f"inferctl unpin {MODEL} gives it back" in text
        for rows in (json.loads(_get(box, "/v1/models")), box.status()["slots"]):
            (missed,) = [row["unmet"] for row in rows if row["slot"] == MODEL]
            assert (missed["version"], missed["state"], missed["code"]) == ("3.0.0", "rejected", "refused_before")
        text = box.control("deployment", end["id"]).stdout
        assert "last difference: y: beyond rtol" in text

        # What serves is pinned again in one step while a candidate is tried.
        options = ("--canary", "50", "--step-s", "600", "--no-wait", "--force", "--json")
        begun = json.loads(box.control("deploy", f"{MODEL}@3.0.0", *options).stdout)["deployment"]

        def record() -> dict[str, Any]:
            found: dict[str, Any] = json.loads(box.control("deployment", begun, "--json").stdout)
            return found

        box.until(lambda: record()["state"] == "canary", what="3.0.0 has its share", timeout_s=90)
        trying = record()["trying"]
        assert (trying["version"], trying["canary_percent"]) == ("3.0.0", 50.0)
        assert any(row.get("canary") for row in box.status()["models"])
        assert "candidate 3.0.0: 50 % of the keys" in box.control("status").stdout
        assert "\n    candidate 3.0.0: canary 50 %\n" in box.control("models").stdout
        assert "  canary 50 %  " in box.control("deployments").stdout
        box.store.rename(box.store.with_name("out of reach"))
        back = box.control("rollback", MODEL, "--json")
        assert back.returncode == 0, back.stdout + back.stderr
        assert json.loads(back.stdout.splitlines()[-1])["version"] == "2.0.0"
        assert record()["state"] == "superseded"
        assert not any(row.get("canary") for row in box.status()["models"])
    assert not seen.failures
    for key, versions in seen.by_key.items():
        first = versions.index("2.0.0")
        early = versions[first : first + 3]
        assert early == ["2.0.0"] * len(early), f"{key} stays with its version"
    metrics = _get(box, "/metrics")
    assert 'inferd_shadow_requests_total{model="scale",outcome="agreed",version="2.0.0"}' in metrics
    assert 'inferd_shadow_requests_total{model="scale",outcome="differed",version="3.0.0"}' in metrics


def test_a_crash_during_a_canary_leaves_what_served_and_the_canary_goes_on(box: Box) -> None:
    options = ("--canary", "40,80", "--step-s", "600", "--no-wait", "--json")
    begun = json.loads(box.control("deploy", f"{MODEL}@2.0.0", *options).stdout)["deployment"]

    def trying() -> bool:
        done = box.control("deployment", begun, "--json")
        record = json.loads(done.stdout) if done.returncode == 0 else {"state": "not up yet"}
        return bool(record["state"] == "canary" and record["percent"] == 40.0 and record.get("trying"))

    box.until(trying, what="2.0.0 has its first share", timeout_s=90)
    assert box.daemon is not None
    box.daemon.kill()
    box.daemon.wait()
    pointer = json.loads((box.state / "active" / f"{MODEL}.json").read_bytes())
    assert (pointer["active"]["version"], pointer["trial"]) == ("1.0.0", False)
    box.start()
    box.until(trying, what="2.0.0 has its share again", timeout_s=90)
    with box.client() as client:
        x = np.ones((1, FEATURES), dtype=np.float32)
        seen = {client.infer(MODEL, {"x": x}, params={"routing_key": key}).version for key in KEYS}
        assert seen == {"1.0.0", "2.0.0"}
        assert client.infer(MODEL, {"x": x}, version="1.0.0").version == "1.0.0"
    cancelled = box.control("cancel", MODEL)
    assert cancelled.returncode == 0, cancelled.stderr
    box.until(lambda: not any(row.get("canary") for row in box.status()["models"]), what="it is over", timeout_s=90)
    assert box.ask()[1] == "1.0.0"


def _get(box: Box, path: str) -> str:
    connection = http.client.HTTPConnection("127.0.0.1", box.http_port, timeout=60)
    connection.request("GET", path)
    return connection.getresponse().read().decode()
