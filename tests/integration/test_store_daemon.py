"""Sideload, revocation, collection and trust on a whole box: a real store, a real daemon, and ``inferctl``."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.box import MODEL, Box, NearBox
from tools.demo import magika

pytestmark = pytest.mark.integration

TARGET = f"{magika.TEAM}/{MODEL}"


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store with scale 1.0.0 (x 2, stable) and 2.0.0 (x 3), made once."""
    folder = tmp_path_factory.mktemp("store") / "box"
    with NearBox(folder, fresh=True) as box:
        box.make_store()
        box.publish_scale("1.0.0", factor=2.0)
        box.publish_scale("2.0.0", factor=3.0, channel="")
    return folder


@pytest.fixture
def box(template: Path, tmp_path: Path) -> Iterator[Box]:
    shutil.copytree(template, tmp_path / "box", symlinks=True)
    with NearBox(tmp_path / "box", fresh=False) as box:
        box.configure()
        yield box


FOLLOWED = frozenset({"deploy", "rollback", "pin", "cancel"})


def inferctl(box: Box, *arguments: str, status: int = 0) -> Any:
    """Return the JSON answer of a verb; of one that is followed, the last line."""
    done = box.control(*arguments, "--json")
    assert done.returncode == status, done.stdout + done.stderr
    return json.loads(done.stdout.splitlines()[-1] if arguments[0] in FOLLOWED else done.stdout)


def followed(box: Box, *arguments: str, status: int = 0) -> Any:
    """Return the last line of a verb that tells a deployment's steps."""
    done = box.control(*arguments, "--json")
    assert done.returncode == status, done.stdout + done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def keys(box: Box) -> tuple[object, ...]:
    return ("--store", box.store, "--team-key", box.key("team"), "--online-key", box.key("online"))


def promote(box: Box, version: str) -> None:
    box.hub("promote", f"{TARGET}@{version}", "--channel", "stable", *keys(box))


def export(box: Box, stick: Path) -> None:
    box.hub("export", TARGET, "--to", stick, "--store", box.store, "--online-key", box.key("online"))


def cut_off(box: Box) -> None:
    """Let the box lose its network store."""
    box.store.rename(box.store.with_name("hidden"))


def events(box: Box, kind: str) -> list[dict[str, Any]]:
    return [event for event in box.events() if event["type"] == kind]


def test_a_newer_stick_updates_a_box_without_network(box: Box) -> None:
    box.start()
    box.until_serving("1.0.0")
    promote(box, "2.0.0")
    stick = box.folder / "stick"
    export(box, stick)
    cut_off(box)
    report = inferctl(box, "sideload", str(stick))
    assert report["origin"] == "stick"
    assert [row["record"]["state"] for row in report["slots"]] == ["confirmed"]
    assert box.ask() == (3.0, "2.0.0")
    assert [event["data"]["origin"] for event in events(box, "sideload.read")] == ["stick"]
    again = inferctl(box, "sideload", str(stick))
    assert [row["code"] for row in again["slots"]] == ["nothing_new"]
    # People see the same, and what is on disk.
    assert "serves already" in box.control("sideload", str(stick)).stdout
    rows = {row["version"]: row["roles"] for row in inferctl(box, "store")["versions"]}
    assert rows == {"2.0.0": ["active"], "1.0.0": ["previous"]}
    assert "2.0.0" in box.control("store").stdout
    trust = inferctl(box, "trust")
    assert (trust["freshness"], trust["problems"], trust["root"]["version"]) == ("fresh", [], 1)
    assert {row["role"] for row in trust["roles"]} >= {"timestamp", "snapshot", "targets"}
    assert "signs" in box.control("trust").stdout
    assert "trust: fresh" in box.control("status").stdout


def test_a_stick_on_the_mount_path_is_taken_once_and_a_forged_one_is_a_security_event(box: Box) -> None:
    media = box.folder / "media"
    media.mkdir()
    box.configure()
    config = box.config.read_text().replace("[store]", f'[store]\nsideload_path = "{media}"\nsideload_poll_s = 0.2', 1)
    box.config.write_text(config)
    box.start()
    box.until_serving("1.0.0")
    promote(box, "2.0.0")
    export(box, box.folder / "stick")
    cut_off(box)
    # A stick is complete before its timestamp is there: the exporter writes it last, as the mount shows it at once.
    (box.folder / "stick").rename(media / "good")
    box.until_serving("2.0.0")
    assert box.ask() == (3.0, "2.0.0")
    forged = media / "forged" / "metadata"
    forged.mkdir(parents=True)
    raw = json.loads((media / "good" / "metadata" / "timestamp.json").read_bytes())
    raw["signed"]["version"] += 100
    (forged / "timestamp.json").write_text(json.dumps(raw))
    box.until(lambda: bool(events(box, "sideload.failed")), what="the forged stick is refused")
    refused = events(box, "bundle.refused")[-1]
    assert (refused["stream"], refused["data"]["code"]) == ("security", "untrusted")
    assert refused["data"]["source"] == str(media / "forged")
    assert box.ask() == (3.0, "2.0.0")
    assert len(events(box, "sideload.read")) == 1
    assert box.stop_daemon() == 0
    box.start()
    box.until(lambda: box.ask() == (3.0, "2.0.0"), what="it serves after a restart")
    assert not events(box, "sideload.begun")


def test_a_revoked_version_is_left_and_never_comes_back(box: Box) -> None:
    box.start()
    box.until_serving("1.0.0")
    promote(box, "2.0.0")
    assert box.control("deploy", f"{MODEL}@2.0.0").returncode == 0
    box.hub("revoke", f"{TARGET}@2.0.0", "--reason", "wrong labels", "--to", "1.0.0", *keys(box))
    refreshed = inferctl(box, "store", "refresh")
    assert refreshed["newly_revoked"] == [f"{TARGET} 2.0.0"]
    box.until(lambda: box.ask() == (2.0, "1.0.0"), what="it falls back to 1.0.0")
    box.until_serving("1.0.0")
    (event,) = events(box, "version.revoked")
    assert (event["stream"], event["data"]["version"], event["data"]["measure"]) == ("security", "2.0.0", "fall_back")
    assert any(row["source"] == "revocation" for row in inferctl(box, "deployments"))
    cut_off(box)
    for _ in range(2):
        for verb in (("rollback", MODEL), ("deploy", f"{MODEL}@2.0.0", "--force")):
            refused = box.control(*verb)
            assert refused.returncode == 1
            assert "policy_refused" in refused.stderr
            assert "revoked: wrong labels" in refused.stderr
        assert box.stop_daemon() == 0
        box.start()
        box.until(lambda: box.ask() == (2.0, "1.0.0"), what="it serves 1.0.0 after a restart offline")
    assert inferctl(box, "store")["revoked"][0]["reason"] == "wrong labels"


def test_collection_quarantine_and_pins(box: Box) -> None:
    box.start()
    box.until_serving("1.0.0")
    assert followed(box, "pin", MODEL)["state"] == "confirmed"
    promote(box, "2.0.0")
    assert [row["source"] for row in box.status()["slots"]] == ["pin"]
    assert inferctl(box, "gc", "--dry-run", "--room") == {"dry_run": True, "removed": [], "bytes": 0}
    assert "0 B were freed" in box.control("gc").stdout
    missing = box.control("store", "unquarantine", f"{MODEL}@2.0.0")
    assert "not quarantined" in missing.stderr
    # The golden answers of 3.0.0 are wrong, so every variant fails its self-test.
    bundle = box.publish_scale("3.0.0", factor=7.0, prepare_only=True)
    manifest = json.loads((bundle / "manifest.json").read_text())
    manifest["golden"][0]["compare"] = [{"output": "y", "metric": "cosine", "min": 2.0}]
    (bundle / "manifest.json").write_text(json.dumps(manifest))
    box.publish(bundle)
    assert box.control("deploy", f"{MODEL}@3.0.0").returncode == 1
    (row,) = inferctl(box, "store")["quarantined"]
    assert (row["slot"], row["version"]) == (MODEL, "3.0.0")
    again = followed(box, "deploy", f"{MODEL}@3.0.0", status=1)
    assert again["code"] == "refused_before"
    assert inferctl(box, "store", "unquarantine", f"{MODEL}@3.0.0")["version"] == "3.0.0"
    assert inferctl(box, "store")["quarantined"] == []
    assert box.ask() == (2.0, "1.0.0")
