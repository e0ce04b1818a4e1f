"""The whole publisher by its command line, and a device's own puller at the other end."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from tests.fakes import bundles
from tests.fakes.hub import MODEL_TOML, X, make_source
from tests.fakes.store import serving
from tools.hub import keys, oms, safetensors
from tools.hub.bundle import open_bundle
from tools.inferhub import main

pytestmark = pytest.mark.integration
PASSWORD = "correct horse battery"
ROOTS = ("root-a", "root-b", "root-c")
SIGNING = ("--team-key", "keys/team", "--online-key", "keys/online")


def hub(*words: str, fails: str = "", password: str | None = PASSWORD) -> dict[str, Any]:
    """Run a verb with ``--json`` and return its answer; ``fails`` is the error code it must end with."""
    result = run(*words, "--json", password=password)
    answer: dict[str, Any] = json.loads(result.stdout)
    assert result.exit_code == (1 if fails else 0), answer
    if fails:
        assert answer["error"]["code"] == fails, answer
    return answer


def run(*words: str, password: str | None = PASSWORD) -> Result:
    result = CliRunner().invoke(main, list(words), env={"INFERHUB_KEY_PASSWORD": password})
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


@pytest.fixture
def centre(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with keys, a store and the sources of one model; the working directory."""
    monkeypatch.chdir(tmp_path)
    for name in (*ROOTS, "targets", "online", "team", "operator"):
        hub("keygen", "--role", name.partition("-")[0], "--out", f"keys/{name}")
    hub(
        "init", "store", "--root-key", "keys/root-a", "--root-key", "keys/root-b", "--root-key", "keys/root-c.pub",
        "--targets-key", "keys/targets", "--online-key", "keys/online", "--team", "vision=keys/team.pub",
        "--operator-key", "keys/operator.pub", "--anchor", "anchor/root.json",
    )  # fmt: skip
    make_source(tmp_path / "source")
    return tmp_path


def pull(store: str, anchor: Path, state: Path, **request: Any) -> list[dict[str, Any]]:
    """Ask the agent's own trust child; return its lines."""
    asked = {
        "op": "fetch",
        "state_dir": str(state),
        "store": {"urls": [store], "anchor": str(anchor), "disk_reserve_bytes": 0},
        "hardware": {"arch": "x86_64", "cores": 2, "memory_bytes": 8 << 30},
        "precisions": ["fp32", "int8"],
        "team": "vision",
        "name": "linear",
    }
    done = subprocess.run(
        [sys.executable, "-m", "agent.bundles.child"],
        input=json.dumps(asked | request).encode(),
        capture_output=True,
        timeout=60,
        check=True,
    )
    return [json.loads(line) for line in done.stdout.splitlines()]


def pack_tiny(folder: Path, **changes: Any) -> None:
    """Write a bundle that needs no trial run, in no time."""
    bundles.pack(folder, bundles.plain_files(rows=16), **changes)


def test_from_nothing_to_a_device_that_holds_the_version(centre: Path) -> None:
    packed = hub("pack", "source", "--out", "bundle")
    variant = packed["variants"]["cpu-fp32"]
    assert variant["tried"]
    assert variant["p50_ms"] > 0
    assert variant["host_mb"] >= 1

    first = hub("publish", "bundle", "--store", "store", *SIGNING, "--channel", "stable")
    assert (first["changed"], first["channels"], first["blobs_new"]) == (True, ["stable"], first["blobs"])
    assert not hub("publish", "bundle", "--store", "store", *SIGNING, "--channel", "stable")["changed"]
    assert hub("promote", "vision/linear@1.0.0", "--store", "store", *SIGNING, "--channel", "canary")["changed"]
    refreshed = hub("refresh-timestamp", "--store", "store", "--online-key", "keys/online")
    assert refreshed["timestamp_version"] > first["timestamp_version"]

    seen = hub("verify", "--store", "store", "--anchor", "anchor/root.json", "--deep")
    assert seen["models"][0]["channels"] == {"canary": "1.0.0", "stable": "1.0.0"}
    assert seen["blobs"] == first["blobs"]
    assert hub("ls", "--store", "store")["models"][0]["versions"][0]["manifest_sha256"] == packed["manifest_sha256"]
    assert hub("show", "vision/linear@1.0.0", "--store", "store")["seq"] == 1
    inside = hub("inspect", "vision/linear@1.0.0", "--store", "store")
    assert inside["manifest_sha256"] == packed["manifest_sha256"]
    assert [model["parameters"] for model in inside["models"]] == [12]
    hub("inspect", "vision/linear@9.0.0", "--store", "store", fails="bundle_not_found")

    lines = pull(f"file://{centre}/store", centre / "anchor/root.json", centre / "state")
    assert lines[-1]["event"] == "done", lines[-1]
    assert lines[-1]["manifest_sha256"] == packed["manifest_sha256"]
    installed = Path(lines[-1]["path"])
    assert (installed / "fp32/model.onnx").read_bytes() == (centre / "source/fp32/model.onnx").read_bytes()


def test_a_store_behind_http_is_seen_as_the_same(centre: Path) -> None:
    hub("pack", "source", "--out", "bundle")
    hub("publish", "bundle", "--store", "store", *SIGNING, "--channel", "stable")
    with serving(centre / "store") as server:
        for depth in ([], ["--deep"]):
            near = hub("verify", "--store", "store", "--anchor", "anchor/root.json", *depth)
            far = hub("verify", "--store", server.url, "--anchor", "anchor/root.json", *depth)
            assert near == far
        lines = pull(server.url, centre / "anchor/root.json", centre / "state")
    assert lines[-1]["event"] == "done", lines[-1]


def test_a_store_that_cannot_be_written_is_an_error_not_a_traceback(centre: Path) -> None:
    hub("pack", "source", "--out", "bundle")
    (centre / "store/blobs").write_text("in the way")
    hub("publish", "bundle", "--store", "store", *SIGNING, fails="store_failed")
    assert hub("verify", "--store", "store", "--anchor", "anchor/root.json")["manifests"] == 0


def test_each_verb_speaks_to_a_person_too(centre: Path) -> None:
    for words in (
        ("pack", "source", "--out", "bundle"),
        ("publish", "bundle", "--store", "store", *SIGNING),
        ("promote", "vision/linear@1.0.0", "--store", "store", *SIGNING, "--channel", "stable"),
        ("refresh-timestamp", "--store", "store", "--online-key", "keys/online"),
        ("export", "vision/linear", "--to", "usb", "--store", "store", "--online-key", "keys/online"),
        ("deprecate", "vision/linear@1.0.0", "--store", "store", *SIGNING),
        ("renew", "--role", "team:vision", "--store", "store", "--sign-with", "keys/team",
         "--sign-with", "keys/online"),
        ("rotate-keys", "--role", "operator", "--add", "keys/team.pub", "--store", "store", "--sign-with",
         "keys/targets"),
        ("show-keys", "--store", "store"),
        ("store", "gc", "--store", "store", "--grace", "30d", "--dry-run"),
        ("verify", "--store", "store"),
        ("ls", "--store", "store"),
        ("show", "vision/linear", "--store", "store"),
        ("show", "vision/linear@1.0.0", "--store", "store"),
        ("add-team", "audio", "keys/operator.pub", "--store", "store", "--targets-key", "keys/targets",
         "--online-key", "keys/online"),
        ("quantize", "source", "--kinds", "fp16,dynamic", "--seconds", "0.1"),
    ):  # fmt: skip
        result = run(*words)
        assert result.exit_code == 0, (words, result.output)
        assert result.stdout.strip()
    assert "vision/linear" in run("ls", "--store", "store").stdout


def test_errors_name_a_code_and_what_to_do(centre: Path) -> None:
    hub("pack", "nowhere", "--out", "b", fails="bad_source")
    hub("publish", "nowhere", "--store", "store", *SIGNING, fails="bad_source")
    hub("ls", "--store", "nowhere", fails="store_state")
    hub("show", "vision/none", "--store", "store", fails="bundle_not_found")
    hub("show", "linear", "--store", "store", fails="invalid_input")
    hub("ls", "--store", "https://models.example/", fails="store_state")
    hub("verify", "--store", "store", "--anchor", "nowhere.json", fails="invalid_input")
    hub("pack", "source", "--out", "bundle")
    stranger = ("--team-key", "keys/operator", "--online-key", "keys/online")
    hub("publish", "bundle", "--store", "store", *stranger, fails="key_not_allowed")
    hub("publish", "bundle", "--store", "store", *SIGNING, password="not the password", fails="bad_key")
    hub("publish", "bundle", "--store", "store", *SIGNING, password=None, fails="bad_key")
    hub("keygen", "--role", "team", "--out", "keys/new", password=None, fails="bad_key")
    result = run("publish", "bundle", "--store", "store", *stranger)
    assert "error [key_not_allowed]" in result.stderr
    assert "private key file" in result.stderr


def test_a_password_file_and_unencrypted_keys_work_without_a_prompt(centre: Path) -> None:
    (centre / "password").write_text(PASSWORD + "\n")
    hub("refresh-timestamp", "--store", "store", "--online-key", "keys/online", "--password-file", "password",
        password=None)  # fmt: skip
    assert not hub("keygen", "--role", "team", "--out", "keys/open", "--unencrypted", password=None)["encrypted"]


def test_a_version_is_withdrawn_and_a_device_hears_of_it(centre: Path) -> None:
    pack_tiny(centre / "bundle")
    pack_tiny(centre / "next", version="1.1.0", seq=2)
    hub("publish", "bundle", "--store", "store", *SIGNING)
    hub("publish", "next", "--store", "store", *SIGNING, "--channel", "stable")

    one = ("vision/tiny@1.0.0", "--store", "store", *SIGNING)
    assert hub("deprecate", *one, "--reason", "use 1.1")["status"] == "deprecated"
    assert hub("promote", *one, "--channel", "canary")["status"] == "deprecated"
    assert hub("deprecate", *one, "--undo")["status"] == "active"
    two = ("vision/tiny@1.1.0", "--store", "store", *SIGNING, "--reason", "wrong labels")
    refused = hub("revoke", *two, fails="version_conflict")
    assert "--to VERSION" in refused["error"]["hint"]
    done = hub("revoke", *two, "--to", "1.0.0")
    assert (done["status"], done["channels"], done["changed"]) == (
        "revoked",
        {"canary": "1.0.0", "stable": "1.0.0"},
        True,
    )
    assert not hub("revoke", *two, "--to", "1.0.0")["changed"]
    hub("publish", "next", "--store", "store", *SIGNING, "--channel", "stable", fails="version_conflict")
    hub("promote", "vision/tiny@1.1.0", "--store", "store", *SIGNING, "--channel", "canary", fails="version_conflict")

    anchor, store = centre / "anchor/root.json", f"file://{centre}/store"
    assert pull(store, anchor, centre / "state", name="tiny", version="1.1.0")[-1]["code"] == "policy_refused"
    assert pull(store, anchor, centre / "state", name="tiny", channel="stable")[-1]["version"] == "1.0.0"


def test_a_stick_feeds_a_device_that_has_no_network(centre: Path) -> None:
    pack_tiny(centre / "bundle")
    hub("publish", "bundle", "--store", "store", *SIGNING, "--channel", "stable")
    done = hub("export", "vision/tiny", "--to", "usb", "--store", "store", "--online-key", "keys/online")
    assert (done["blobs_new"], done["models"][0]["version"]) == (done["blobs"], "1.0.0")
    assert hub("verify", "--store", "usb", "--model", "vision/tiny@1.0.0", "--deep")["timestamp"] == done["issued"]
    (centre / "store").rename(centre / "away")
    lines = pull(f"file://{centre}/usb", centre / "anchor/root.json", centre / "state", name="tiny")
    assert lines[-1]["event"] == "done", lines[-1]
    again = hub(
        "export", "vision/tiny@1.0.0", "--have", lines[-1]["path"], "--to", "usb-2", "--store", "away",
        "--online-key", "keys/online",
    )  # fmt: skip
    assert again["blobs_new"] < done["blobs_new"]
    hub("export", "vision/tiny", "--to", "away", "--store", "away", "--online-key", "keys/online",
        fails="invalid_input")  # fmt: skip


def test_a_root_ceremony_on_three_machines(centre: Path) -> None:
    hub("keygen", "--role", "root", "--out", "keys/root-d")
    hub("keygen", "--role", "online", "--out", "keys/online-2")
    change = ("--role", "root", "--add", "keys/root-d.pub", "--remove", "keys/root-a.pub")
    begun = hub("rotate-keys", *change, "--store", "store", "--sign-with", "keys/root-b")
    assert (begun["complete"], begun["published"], begun["pending"]) == (False, False, "root.pending.json")
    assert [(len(need["signed"]), need["threshold"]) for need in begun["needs"]] == [(1, 2), (1, 2)]

    carried = centre / "elsewhere/pending.json"  # another machine, without a store
    carried.parent.mkdir()
    (centre / "root.pending.json").rename(carried)
    told = run("rotate-keys", "--pending", str(carried), "--sign-with", "keys/root-d").stdout
    assert "root: 1 of 2 signatures by the keys of root 1, still needed: 1 of " in told
    assert "root: 2 of 2 signatures by the keys of root 2" in told
    hub("rotate-keys", "--pending", str(carried), "--sign-with", "keys/operator", fails="key_not_allowed")
    hub("rotate-keys", "--role", "online", "--add", "keys/online-2.pub", "--pending", str(carried),
        fails="invalid_input")  # fmt: skip
    last = ("rotate-keys", "--pending", str(carried), "--sign-with", "keys/root-c")
    (centre / "stranger.json").write_bytes(
        (centre / "anchor/root.json").read_bytes().replace(b'"threshold":2', b'"threshold":1')
    )
    hub(*last, "--anchor", "stranger.json", fails="untrusted")
    assert hub(*last, "--anchor", "anchor/root.json")["complete"]

    done = hub("rotate-keys", "--pending", str(carried), "--store", "store")
    assert (done["published"], done["changed"], done["versions"]) == (True, True, {"root": 2})
    assert not carried.exists()
    assert not hub("rotate-keys", *change, "--store", "store")["changed"]

    online = ("--role", "online", "--add", "keys/online-2.pub", "--remove", "keys/online.pub", "--store", "store")
    roots = ("--sign-with", "keys/root-c", "--sign-with", "keys/root-d")
    assert not hub("rotate-keys", *online, *roots)["published"]  # an online key has to be there
    changed = hub("rotate-keys", *online, "--sign-with", "keys/online", "--sign-with", "keys/online-2")
    assert changed["versions"] == {"root": 3}
    assert hub("renew", "--role", "root", "--store", "store", *roots)["versions"] == {"root": 4}
    seen = hub("verify", "--store", "store", "--anchor", "anchor/root.json")
    assert seen["root"] == 4
    shown = {row["role"]: row for row in hub("show-keys", "--store", "store")["roles"]}
    assert (shown["root"]["threshold"], len(shown["root"]["keys"]), shown["root"]["renew"]) == (2, 3, False)
    hub("refresh-timestamp", "--store", "store", "--online-key", "keys/online", fails="key_not_allowed")

    pack_tiny(centre / "bundle")
    hub("publish", "bundle", "--store", "store", "--team-key", "keys/team", "--online-key", "keys/online-2",
        "--channel", "stable")  # fmt: skip
    lines = pull(f"file://{centre}/store", centre / "anchor/root.json", centre / "state", name="tiny")
    assert lines[-1]["event"] == "done", lines[-1]


def test_a_retired_team_is_gone_and_may_come_back(centre: Path) -> None:
    pack_tiny(centre / "bundle")
    hub("publish", "bundle", "--store", "store", *SIGNING, "--channel", "stable")
    retire = ("retire-team", "vision", "--store", "store", "--targets-key", "keys/targets", *SIGNING[2:])
    assert hub(*retire)["changed"]
    assert not hub(*retire)["changed"]
    assert hub("ls", "--store", "store")["models"] == []
    collected = hub("store", "gc", "--store", "store")
    assert collected["names"] == []  # not for 90 days
    assert collected["blobs_kept"] > 0
    assert len(hub("store", "gc", "--store", "store", "--grace", "0d", "--dry-run")["names"]) > 0
    hub("publish", "bundle", "--store", "store", *SIGNING, fails="key_not_allowed")
    hub("rotate-keys", "--role", "team:vision", "--add", "keys/team.pub", "--remove", "keys/targets.pub", "--store",
        "store", "--sign-with", "keys/targets", "--sign-with", "keys/team", "--sign-with", "keys/online")  # fmt: skip
    assert hub("publish", "bundle", "--store", "store", *SIGNING)["changed"]


def test_a_model_signature_is_checked_on_the_way_in_and_made_on_the_way_out(centre: Path) -> None:
    hub("keygen", "--role", "oms", "--out", "keys/oms")
    hub("pack", "source", "--out", "first")
    signer = keys.load_signer(Path("keys/oms"), PASSWORD)
    signature = centre / "upstream.sig"
    signature.write_bytes(oms.sign(open_bundle(Path("first")).manifest, signer))

    upstream = ("--upstream-oms", "upstream.sig", "--upstream-key", "keys/oms.pub")
    packed = hub("pack", "source", "--out", "bundle", *upstream)
    assert packed["upstream_oms"]["files"] == str(packed["files"])
    published = hub("publish", "bundle", "--store", "store", *SIGNING, "--oms-key", "keys/oms", "--channel", "stable")
    shown = hub("show", "vision/linear@1.0.0", "--store", "store")
    assert shown["provenance"]["oms"]["target"] == "models/vision/linear/1.0.0.oms.json"
    assert shown["provenance"]["upstream_oms"]["identity"] == packed["upstream_oms"]["identity"]
    assert hub("verify", "--store", "store", "--oms-key", "keys/oms.pub")["model_signatures"] == 1
    hub("export", "vision/linear", "--to", "usb", "--store", "store", "--online-key", "keys/online")
    assert hub("verify", "--store", "usb", "--oms-key", "keys/oms.pub")["model_signatures"] == 1
    lines = pull(f"file://{centre}/usb", centre / "anchor/root.json", centre / "state")
    assert lines[-1]["manifest_sha256"] == published["manifest_sha256"]

    golden = centre / "source/golden/g1.in.safetensors"
    golden.write_bytes(golden.read_bytes() + b" ")
    hub("pack", "source", "--out", "other", *upstream, fails="untrusted")
    hub("pack", "source", "--out", "other", *upstream[:2], "--upstream-key", "keys/team.pub", fails="bad_key")
    assert not (centre / "other").exists()


WRONG_GOLDEN = safetensors.dump({"y": X[:, :3] + 1})
BAD_HANDLER = b"""
from handlers.base import Handler

class H(Handler):
    def __init__(self, context):
        raise RuntimeError("the handler cannot start")
    def preprocess(self, body, content_type): ...
    def postprocess(self, outputs, rows): ...
"""


@pytest.mark.parametrize(
    ("path", "data", "toml", "words"),
    [
        ("golden/g1.out.safetensors", WRONG_GOLDEN, MODEL_TOML, "allclose"),
        ("golden/g1.in.safetensors", safetensors.dump({"x": X[:, :3]}), MODEL_TOML, ""),
        ("handler.py", BAD_HANDLER,
         MODEL_TOML.replace('{ id = "tensors/v1" }', '{ module = "handler.py", class = "H" }'), "cannot start"),
        ("model.toml", b"", MODEL_TOML.replace('"allclose"', '"iou"'), "iou"),
        ("model.toml", b"", MODEL_TOML.replace("tensors/v1", "unheard-of/v1"), "unheard-of"),
    ],
    ids=["wrong output", "wrong input", "handler fails", "metric", "handler id"],
)  # fmt: skip
def test_a_variant_that_a_box_would_refuse_is_not_packed(
    centre: Path, path: str, data: bytes, toml: str, words: str
) -> None:
    (centre / "source" / path).write_bytes(data)
    (centre / "source/model.toml").write_text(toml)
    answer = hub("pack", "source", "--out", "bundle", fails="selftest_failed")
    assert words in answer["error"]["message"]
    assert not (centre / "bundle").exists()
