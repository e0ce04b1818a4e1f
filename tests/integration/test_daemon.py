"""The daemon as a process: a real signed store, real workers, real sockets, real signals."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from agent.client import Client
from agent.errors import AgentError, RateLimitedError, TensorError, TooLargeError, UnavailableError, UnknownModelError
from agent.wire import encode
from tests.box import MODEL, Box, copy_box
from tests.models import FEATURES
from tools.demo import magika
from tools.demo.broker import Mosquitto, find_mosquitto
from tools.demo.receiver import Receiver
from tools.demo.stage import DEVICE, StepFailedError

pytestmark = pytest.mark.integration


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store with scale 1.0.0 (x 2, stable) and 2.0.0 (x 3), made once."""
    folder = tmp_path_factory.mktemp("store") / "box"
    with Box(folder, fresh=True) as box:
        box.make_store()
        box.publish_scale("1.0.0", factor=2.0)
        box.publish_scale("2.0.0", factor=3.0, channel="")
    return folder


@pytest.fixture
def box(template: Path, tmp_path: Path) -> Iterator[Box]:
    with copy_box(template, tmp_path / "box") as box:
        box.configure()
        yield box


def http(box: Box, path: str, body: bytes | None = None, **headers: str) -> tuple[int, Any]:
    request = urllib.request.Request(f"http://127.0.0.1:{box.http_port}{path}", body, headers)
    try:
        with urllib.request.urlopen(request) as response:
            return response.status, json.load(response)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)


def test_an_empty_box_pulls_serves_and_starts_again_without_its_store(box: Box) -> None:
    box.start()
    box.until_serving("1.0.0")
    assert box.ask(2.0) == (4.0, "1.0.0")
    assert box.stop_daemon() == 0
    shutil.rmtree(box.store)
    box.start()
    box.until(lambda: box.ask(1.5) == (3.0, "1.0.0"), what="an answer without the store")


def test_memory_of_large_bodies_is_given_back_once_nobody_uses_it(box: Box) -> None:
    box.configure(more="[shared_memory]\narena_idle_s = 0.5\n")
    box.start()
    box.until_serving()

    def kept() -> bool:
        assert box.daemon is not None
        return "inferd-arena" in Path(f"/proc/{box.daemon.pid}/maps").read_text(errors="replace")

    with socket.socket(socket.AF_UNIX) as client:  # a body that is received half, so that the daemon holds its memory
        client.connect(str(box.socket))
        entry = {"name": "x", "dtype": "float32", "shape": [1 << 18, FEATURES], "nbytes": FEATURES << 20}
        head, *_ = encode({"kind": "infer", "id": 1, "model": MODEL, "tensors": [entry]}, (bytes(FEATURES << 20),))
        client.sendall(bytes(head) + bytes(1 << 16))
        box.until(kept, what="the body has its memory")
    box.until(lambda: not kept(), what="the memory is given back", timeout_s=90)


def test_bad_configuration_is_refused_with_its_key(box: Box) -> None:
    box.config.write_text("[serving]\nhttp_prot = 1\n")
    done = subprocess.run(
        [sys.executable, "-m", "agent", "--config", str(box.config)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 78
    assert "bad_config" in done.stderr
    assert "http_prot" in done.stderr


def test_a_second_daemon_on_the_same_state_is_refused(box: Box) -> None:
    box.start()
    box.until_serving()
    done = subprocess.run(
        [sys.executable, "-m", "agent", "--config", str(box.config)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert "in use by another inferd" in done.stderr
    assert box.ask()[0] == 2.0


def test_sigterm_answers_what_was_accepted(template: Path, tmp_path: Path) -> None:
    with copy_box(template, tmp_path / "box") as box:
        box.configure()
        box.start()
        box.until_serving()
        answers: list[Any] = []
        started = threading.Event()

        def ask() -> None:
            with Client(box.socket, retries=0, connect_timeout_s=1.0) as client:
                while True:
                    try:
                        client.infer(MODEL, {"x": np.ones((1, FEATURES), dtype=np.float32)})
                        answers.append("ok")
                    except AgentError as error:
                        answers.append(error)
                        return
                    if len(answers) > 200:
                        started.set()

        threads = [threading.Thread(target=ask) for _ in range(4)]
        for thread in threads:
            thread.start()
        assert started.wait(30)
        assert box.stop_daemon() == 0
        for thread in threads:
            thread.join(30)
        # Each client ends with one error: the connection was closed between two requests, none was lost within one.
        errors = [answer for answer in answers if answer != "ok"]
        assert len(errors) == 4
        assert all("cannot" in str(error) or "no daemon" in str(error) for error in errors), errors


def _listen(notify: socket.socket, heard: list[bytes]) -> None:
    """Take what a service manager takes, as it comes."""
    with suppress(OSError):  # closed at the end of the test
        while True:
            heard.append(notify.recv(4096))


def test_systemd_hears_ready_watchdog_and_stopping_and_hands_over_sockets(box: Box) -> None:
    notify_path = box.folder / "notify"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notify, socket.socket(socket.AF_UNIX) as frames:
        notify.bind(str(notify_path))
        box.socket.parent.mkdir(parents=True, exist_ok=True)
        frames.bind(str(box.socket))
        frames.listen()
        # A shell gives the descriptor its number and the variables the daemon's own pid, as systemd does.
        script = (
            f"exec 3<&{frames.fileno()}; export LISTEN_PID=$$ WATCHDOG_PID=$$; "
            f'exec "{sys.executable}" -m agent --config "{box.config}"'
        )
        environment = {
            **os.environ,
            "NOTIFY_SOCKET": str(notify_path),
            "WATCHDOG_USEC": "1000000",
            "LISTEN_FDS": "1",
            "LISTEN_FDNAMES": "frames",
        }
        with box.log.open("ab") as log:
            box.daemon = subprocess.Popen(
                ["/bin/bash", "-c", script], pass_fds=[frames.fileno()], env=environment, stdout=log, stderr=log
            )
        heard: list[bytes] = []
        threading.Thread(target=_listen, args=(notify, heard), daemon=True).start()
        box.until(lambda: any(b"READY=1" in text for text in heard), what="READY=1")
        box.until(lambda: heard.count(b"WATCHDOG=1") >= 2, what="the watchdog is fed")
        box.until_serving()
        assert box.ask()[0] == 2.0
        assert box.stop_daemon() == 0
        box.until(lambda: b"STOPPING=1" in heard, what="STOPPING=1")
    assert box.socket.exists(), "an inherited socket belongs to systemd"


@pytest.mark.parametrize("name", ["active/scale.json", "journal.db", "outbox.db", "commands.db"])
def test_an_unreadable_state_file_is_set_aside_and_the_box_serves(box: Box, name: str) -> None:
    # Nobody listens on port 1: the link stays down, but the journal of commands is in use.
    box.configure(broker_port=1)
    box.start()
    box.until_serving()
    assert box.stop_daemon() == 0
    (box.state / name).write_bytes(b"\x00garbage\xff" * 400)
    box.start()
    box.until(lambda: box.ask() == (2.0, "1.0.0"), what="an answer")
    assert list((box.state / name).parent.glob(Path(name).name + "*broken*"))


def test_deploy_rollback_and_history_by_inferctl(box: Box) -> None:
    box.start()
    box.until_serving()
    deployed = box.control("deploy", f"{MODEL}@2.0.0")
    assert deployed.returncode == 0, deployed.stderr
    assert box.ask() == (3.0, "2.0.0")
    shutil.rmtree(box.store)
    rolled_back = box.control("rollback", MODEL, "--json")
    assert rolled_back.returncode == 0, rolled_back.stderr
    assert json.loads(rolled_back.stdout.splitlines()[-1])["version"] == "1.0.0"
    assert box.ask() == (2.0, "1.0.0")
    history = json.loads(box.control("deployments", "--json").stdout)
    assert [(row["version"], row["state"]) for row in history] == [
        ("1.0.0", "confirmed"),
        ("2.0.0", "confirmed"),
        ("1.0.0", "confirmed"),
    ]
    models = json.loads(box.control("models", "--json").stdout)
    assert (models[0]["active"], models[0]["previous"], models[0]["source"]) == ("1.0.0", "2.0.0", "pin")


def test_who_follows_a_deployment_does_not_hold_up_a_stop(box: Box) -> None:
    text = box.config.read_text()
    box.config.write_text(text.replace("[serving]", "[serving]\ndrain_timeout_s = 600", 1))
    shutil.rmtree(box.store)
    box.start()
    with box.client() as client:
        (row,) = box.until(lambda: client.call("deployments"), what="the deployment has begun")
    asked = {"id": row["id"], "after_step": 1 << 40, "wait_s": 60}
    with socket.socket(socket.AF_UNIX) as follower:
        follower.settimeout(90)
        follower.connect(str(box.socket))
        follower.sendall(b"".join(map(bytes, encode({"kind": "call", "id": 1, "method": "deployment", "args": asked}))))
        assert box.stop_daemon() == 0
        assert b"final" in follower.recv(1 << 16)


def test_inspect_tells_what_is_inside_a_version_of_this_box(box: Box) -> None:
    box.start()
    box.until_serving()
    told = json.loads(box.control("inspect", MODEL, "--json").stdout)
    assert (told["manifest"]["name"], told["manifest"]["version"]) == (MODEL, "1.0.0")
    assert [model["path"] for model in told["models"]] == ["first/model.onnx", "second/model.onnx"]
    assert told["models"][0]["about"]["opsets"] == {"ai.onnx": 17}
    assert told["warnings"] == []
    assert told["verified"] > 0
    assert f"{magika.TEAM}/{MODEL}@1.0.0" in box.control("inspect", f"{MODEL}@1.0.0").stdout
    absent = box.control("inspect", f"{MODEL}@7.0.0")
    assert absent.returncode == 1
    assert "inferctl deploy scale@7.0.0" in absent.stderr
    assert box.control("inspect", "nobody").returncode == 1


def test_every_verb_prints_for_people_and_for_programs(box: Box) -> None:
    box.start()
    box.until_serving()
    for verb in (["status"], ["models"], ["deployments"], ["events"], ["selftest", MODEL], ["inspect", MODEL]):
        for form in ([], ["--json"]):
            done = box.control(*verb, *form)
            assert done.returncode == 0, done.stderr
            assert done.stdout.strip()
    unreachable = subprocess.run(
        [sys.executable, "-m", "agent.cli", "--socket", "/nowhere/x.sock", "status"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert unreachable.returncode == 3
    assert "Is it running" in unreachable.stderr


def test_a_version_that_is_not_there_is_rejected_and_nothing_changes(box: Box) -> None:
    box.start()
    box.until_serving()
    done = box.control("deploy", f"{MODEL}@9.9.9", "--json")
    record = json.loads(done.stdout.splitlines()[-1])
    assert done.returncode == 1
    assert (record["state"], record["code"], record["final"]) == ("rejected", "bundle_not_found", True)
    assert box.ask() == (2.0, "1.0.0")


def test_a_deployment_that_waits_can_be_cancelled_and_nothing_changes(box: Box) -> None:
    box.start()
    box.until_serving()
    box.store.rename(box.store.with_name("hidden"))
    assert box.control("deploy", f"{MODEL}@2.0.0", "--no-wait").returncode == 0
    cancelled = box.control("cancel", MODEL, "--json")
    last = json.loads(cancelled.stdout.splitlines()[-1])
    assert cancelled.returncode == 0, cancelled.stderr
    assert (last["state"], last["message"], last["final"]) == ("canceled", "it was cancelled", True)
    models = json.loads(box.control("models", "--json").stdout)
    assert (models[0]["active"], models[0]["source"]) == ("1.0.0", "file")
    assert box.ask() == (2.0, "1.0.0")


def test_a_missing_store_waits_and_heals(box: Box) -> None:
    hidden = box.store.with_name("hidden")
    box.store.rename(hidden)
    box.start()
    box.until(lambda: any(event["type"] == "deployment.fetch_wait" for event in box.events()), what="it waits")
    status, answer = http(box, f"/v2/models/{MODEL}/infer", b"{}")
    assert (status, answer["code"]) == (503, "unavailable")
    hidden.rename(box.store)
    box.until_serving("1.0.0")


def test_policy_never_refuses_handler_code(box: Box) -> None:
    box.publish_scale("3.0.0", handler="odd")
    box.configure(more='[policy]\nhandler_code = "never"\n')
    box.start()
    box.until(
        lambda: any(event["data"].get("code") == "policy_refused" for event in box.events()), what="it is refused"
    )


def test_a_variant_for_other_hardware_is_dropped_with_its_reason(box: Box) -> None:
    cuda = """
[[variants]]
id = "gpu"
entry = "first/model.onnx"
precision = "fp32"
priority = 1
device = { kind = "cuda", providers = ["CUDAExecutionProvider"] }
"""
    box.publish_scale("3.0.0", factor=5.0, extra_variant=cuda)
    box.start()
    box.until_serving("3.0.0")
    row = next(row for row in box.status()["models"] if row["model"] == MODEL)
    assert row["variant"] == "first"
    assert [(skip["variant"], bool(skip["reason"])) for skip in row["fallbacks"]] == [("gpu", True)]


def test_a_black_holed_broker_is_not_felt(box: Box) -> None:
    with socket.socket() as hole:
        hole.bind(("127.0.0.1", 0))
        hole.listen(1)  # accepts in the kernel and never answers
        box.configure(broker_port=hole.getsockname()[1])
        box.start()
        box.until_serving()
        for _ in range(50):
            assert box.ask()[0] == 2.0
        link = box.status()["telemetry"]
        assert not link["connected"]
        assert link["outbox_rows"] > 0
        assert box.stop_daemon() == 0


@pytest.mark.parametrize(
    ("inputs", "text"),
    [
        ({"x": np.ones((1, FEATURES), dtype=np.float64)}, "float64"),
        ({"x": np.ones((1, FEATURES + 1), dtype=np.float32)}, "x"),
        ({"wrong": np.ones((1, FEATURES), dtype=np.float32)}, "wrong"),
        ({}, "x"),
    ],
)
def test_wrong_tensors_are_named_over_the_socket(serving: Box, inputs: dict[str, Any], text: str) -> None:
    with serving.client() as client, pytest.raises(TensorError, match=text):
        client.infer(MODEL, inputs)
    assert serving.ask()[0] == 2.0


@pytest.mark.parametrize(
    ("body", "status"),
    [
        (b"not json", 400),
        (b'{"inputs": []}', 400),
        (b'{"inputs": [{"name": "x", "shape": [1, 4], "datatype": "INT64", "data": [1, 2, 3, 4]}]}', 400),
        (b'{"inputs": [{"name": "x", "shape": [1, 4], "datatype": "FP32", "data": [1, 2, 3]}]}', 400),
        (b'{"inputs": [{"name": "x", "shape": [1, 4], "datatype": "FP32", "data": [1, 2, 3, 4]}]}', 200),
    ],
)
def test_open_inference_protocol_bodies_are_checked_in_the_worker(serving: Box, body: bytes, status: int) -> None:
    got, answer = http(serving, f"/v2/models/{MODEL}/infer", body)
    assert got == status, answer
    assert ("outputs" in answer) == (status == 200)


def test_unknown_models_and_versions_are_told(serving: Box) -> None:
    with serving.client() as client, pytest.raises(UnknownModelError):
        client.infer("nobody", {})
    assert http(serving, "/v2/models/nobody/infer", b"{}")[0] == 404
    assert http(serving, f"/v2/models/{MODEL}/versions/7/infer", b"{}")[0] == 404
    assert http(serving, f"/v2/models/{MODEL}/ready")[0] == 200


@pytest.fixture(scope="module")
def serving(template: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Box]:
    """A box that serves scale 1.0.0; tests leave it as they find it."""
    with copy_box(template, tmp_path_factory.mktemp("serving") / "box") as box:
        box.configure()
        box.start()
        box.until_serving()
        yield box


def test_kill_9_of_the_daemon_takes_its_workers_along_and_the_next_start_serves(box: Box) -> None:
    box.start()
    box.until_serving()
    assert box.daemon is not None
    children = psutil.Process(box.daemon.pid).children(recursive=True)
    os.kill(box.daemon.pid, signal.SIGKILL)
    box.daemon.wait()
    _, alive = psutil.wait_procs(children, timeout=90)
    assert not alive
    box.start()
    box.until(lambda: box.ask() == (2.0, "1.0.0"), what="an answer")


def test_a_header_at_the_limit_is_served_and_kills_nobody(box: Box) -> None:
    box.start()
    box.until_serving()
    pids = [row["pid"] for row in box.status()["processes"] if row["role"].startswith("worker")]
    x = np.ones((1, FEATURES), dtype=np.float32)
    with box.client() as client:
        low, high = 0, 65536
        while high - low > 1:  # the longest text that the daemon still takes
            middle = (low + high) // 2
            try:
                client.infer(MODEL, {"x": x}, params={"note": "n" * middle})
                low = middle
            except (TooLargeError, UnavailableError):
                high = middle
    assert low > 60_000
    assert [row["pid"] for row in box.status()["processes"] if row["role"].startswith("worker")] == pids


def test_a_variant_that_fails_its_golden_test_yields_to_the_next_and_says_so(box: Box) -> None:
    bundle = box.publish_scale("3.0.0", factor=7.0, prepare_only=True)
    manifest = json.loads((bundle / "manifest.json").read_text())
    # cosine similarity is at most 1: the first variant cannot pass on any box
    manifest["golden"][0]["per_variant"] = {"first": [{"output": "y", "metric": "cosine", "min": 2.0}]}
    (bundle / "manifest.json").write_text(json.dumps(manifest))
    box.publish(bundle, "--channel", "stable")
    box.start()
    box.until_serving("3.0.0")
    row = next(row for row in box.status()["models"] if row["model"] == MODEL)
    assert (row["variant"], row["fallbacks"][0]["variant"], row["fallbacks"][0]["code"]) == (
        "second",
        "first",
        "selftest_failed",
    )
    assert any(event["type"] == "variant.skipped" for event in box.events())
    assert "variant skipped" in box.log.read_text()


@pytest.mark.skipif(find_mosquitto() is None, reason="mosquitto is not installed")
def test_a_signed_fleet_command_deploys_and_rolls_back_and_is_reported(box: Box) -> None:
    with Mosquitto(box.folder / "broker") as broker, Receiver(broker.host, broker.port) as receiver:
        box.configure(broker_port=broker.port)
        box.start()
        box.until_serving("1.0.0")
        common = ("--device", DEVICE, "--broker", f"{broker.host}:{broker.port}", "--key", box.key("operator"))
        box.hub("deploy", f"{MODEL}@2.0.0", "--team", magika.TEAM, *common, "--wait", 60)
        assert box.ask() == (3.0, "2.0.0")
        box.hub("rollback", MODEL, *common, "--wait", 60)
        assert box.ask() == (2.0, "1.0.0")

        def reported() -> bool:
            newest = [message.value for message in receiver.messages("reported")][-1:]
            return bool(newest) and newest[0]["doc"]["slots"][0]["active"] == "1.0.0" and newest[0]["gen_applied"] > 0

        box.until(reported, what="the reported document names 1.0.0 and the command's generation")
        deployments = [message.value["type"] for message in receiver.messages("evt/deploy")]
        assert deployments.count("deployment.confirmed") == 3
        with pytest.raises(StepFailedError, match="command_refused"):
            box.hub("deploy", f"{MODEL}@2.0.0", "--team", magika.TEAM, *common[:-1], box.key("team"), "--wait", 20)
        assert box.ask() == (2.0, "1.0.0")


def test_a_model_has_the_workers_that_its_configuration_says(box: Box) -> None:
    more = '[engine]\nworkers = {max = 3}\npin_cores = "always"\n[[engine.models]]\nname = "scale"\nworkers = 2\n'
    box.configure(more=more)
    box.start()
    box.until_serving()
    box.until(lambda: [len(row.get("workers", [])) for row in box.status()["models"]] == [2], what="two workers serve")
    (row,) = box.status()["models"]
    assert (row["scaling"]["min"], row["scaling"]["max"], row["restarts"]) == (2, 2, 0)
    assert row["scaling"]["cores"] == [sorted(os.sched_getaffinity(pid)) for pid in row["workers"]]
    assert "\n  workers: 2, on cores " in box.control("status").stdout
    assert box.ask(3.0)[0] == 6.0


def test_a_client_over_its_rate_is_told_and_others_are_not_touched(box: Box) -> None:
    box.configure(more=f'[[limits]]\nclient = "uid:{os.getuid()}"\nrequests_per_s = 0.001\nburst = 2\n')
    box.start()
    box.until_serving()
    assert box.ask()[0] == 2.0
    assert box.ask()[0] == 2.0
    with pytest.raises(RateLimitedError):
        box.ask()
    body = b'{"inputs": [{"name": "x", "shape": [1, 4], "datatype": "FP32", "data": [1, 2, 3, 4]}]}'
    assert http(box, f"/v2/models/{MODEL}/infer", body)[0] == 200  # another client: TCP knows no uid
