"""The demonstration's steps. Each does the real thing, checks it, and returns its figure as a short text."""

from __future__ import annotations

import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import time
import urllib.request
from collections import Counter
from pathlib import Path
from typing import Any, Final

import numpy as np
import psutil

from tools.demo import magika
from tools.demo.broker import Mosquitto
from tools.demo.load import Load, Seen
from tools.demo.receiver import Receiver, arrived_of
from tools.demo.stage import DEVICE, Stage, StepFailedError

_FILES_MAX: Final = 200
_FILE_BYTES_MAX: Final = 1024 * 1024
_OUTAGE_REQUESTS: Final = 200
_SETTLE_S: Final = 0.2  # a message through the local broker takes a few milliseconds
_TAMPERED: Final = "2.0.1"


def make_store(stage: Stage) -> str:
    """Fresh keys, an empty signed store."""
    stage.make_store()
    root = json.loads(stage.anchor.read_text())["signed"]["roles"]["root"]
    if root["threshold"] != 2 or len(root["keyids"]) != 3:
        raise StepFailedError(f"root is {root}")
    return "root 2 of 3, team, online and operator keys (ed25519)"


def publish(stage: Stage, version: str) -> str:
    """Pack the official model and publish it."""
    bundle = stage.make_bundle(version)
    stage.publish(bundle, "--channel", "stable")
    stage.hub("verify", "--store", stage.store, "--anchor", stage.anchor, "--deep")
    size = sum(path.stat().st_size for path in bundle.rglob("*") if path.is_file())
    wheel = magika.RELEASES[version].wheel
    return f"Magika {wheel}: fp32 and int8, handler, golden test; {size / 1e6:.1f} MB, every byte verified"


def start(stage: Stage) -> str:
    """An empty box pulls, verifies, self-tests and serves."""
    started = time.monotonic()
    stage.start_daemon()
    body = Path(sys.executable).resolve().read_bytes()[:65536]
    with stage.client() as client:
        stage.until(lambda: client.predict(magika.NAME, body), what="the first answer")
    elapsed = time.monotonic() - started
    row = _model(stage)
    if row["sandbox"]["level"] != "full":
        raise StepFailedError(f"the worker's sandbox is {row['sandbox']}")
    return (
        f"first answer {elapsed:.2f} s after start, pull included; {row['variant']}, sandbox {row['sandbox']['level']}"
    )


def restart(stage: Stage) -> str:
    """The same box again, from its disk alone."""
    stage.until(lambda: not _slot(stage)["trial"] and _slot(stage)["active"], what="the first version is confirmed")
    if (code := stage.stop_daemon()) != 0:
        raise StepFailedError(f"inferd stopped with {code}: {stage.tail()}")
    started = time.monotonic()
    stage.start_daemon()
    body = Path(sys.executable).resolve().read_bytes()[:65536]
    with stage.client() as client:
        stage.until(lambda: client.predict(magika.NAME, body), what="the first answer")
    return f"first answer {time.monotonic() - started:.2f} s after process start"


def classify_frames(stage: Stage) -> str:
    """Real files of this machine over the unix socket."""
    labels: Counter[str] = Counter()
    seconds = []
    with stage.client() as client:
        for path in _files():
            body = path.read_bytes()
            began = time.perf_counter()
            labels[client.predict(magika.NAME, body).json()["label"]] += 1
            seconds.append(time.perf_counter() - began)
        for path, expected in _known(stage).items():
            label = client.predict(magika.NAME, path.read_bytes()).json()["label"]
            if label != expected:
                raise StepFailedError(f"{path} is {label}, expected {expected}")
    common = ", ".join(f"{count} {label}" for label, count in labels.most_common(4))
    return f"{sum(labels.values())} files: {common}; median {statistics.median(seconds) * 1e3:.1f} ms"


def classify_http(stage: Stage) -> str:
    """The same question with curl."""
    curl = shutil.which("curl")
    if curl is None:
        raise StepFailedError("curl is not installed (Debian: apt-get install curl)")
    path = Path(sys.executable).resolve()
    url = f"http://127.0.0.1:{stage.http_port}/predictions/{magika.NAME}"
    command = [curl, "--silent", "--show-error", "--fail-with-body", "--data-binary", f"@{path}", url]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise StepFailedError(f"curl: {done.stderr or done.stdout}")
    answer = json.loads(done.stdout)
    if answer["label"] != "elf":
        raise StepFailedError(f"{path} is {answer['label']}, expected elf")
    return f"curl --data-binary @{path.name} …/predictions/{magika.NAME} -> {answer['label']} {answer['score']:.2f}"


def classify_oip(stage: Stage) -> str:
    """The Open Inference Protocol, as JSON, straight to the model."""
    handler = magika.handler_of(stage.folder / "sources" / "1.0.0", "1.0.0")
    body = Path(os.__file__).read_bytes()
    row = handler.preprocess(body, "").tensors["bytes"]
    request = {"inputs": [{"name": "bytes", "shape": [1, 2048], "datatype": "INT32", "data": row[0].tolist()}]}
    url = f"http://127.0.0.1:{stage.http_port}/v2/models/{magika.NAME}/infer"
    with urllib.request.urlopen(urllib.request.Request(url, json.dumps(request).encode(), method="POST")) as response:
        answer = json.load(response)
    output = answer["outputs"][0]
    label = handler.postprocess({output["name"]: np.array(output["data"]).reshape(output["shape"])}, 1)["label"]
    if label != "python":
        raise StepFailedError(f"{os.__file__} is {label}, expected python")
    return f"{output['datatype']}{output['shape']} -> {label}, version {answer['model_version']}"


def outage(stage: Stage, broker: Mosquitto, receiver: Receiver) -> str:
    """The broker goes away and comes back: inference does not notice, telemetry waits, every row of it arrives."""
    before = _settled_ahead(stage, receiver)
    epoch = _telemetry(stage)["epoch"]
    broker.stop()
    stage.until(lambda: not _telemetry(stage)["connected"], what="the link noticed the outage")
    body = Path(sys.executable).resolve().read_bytes()[:65536]
    with Load(stage.socket, body, clients=2) as load:
        stage.until(lambda: load.seen.asked >= _OUTAGE_REQUESTS, what="answers during the outage")
        stage.until(lambda: _telemetry(stage)["outbox_rows"] >= 10, what="telemetry piles up in the outbox")
        waiting = _telemetry(stage)["outbox_rows"]
    _no_errors(load.seen)
    broker.start()
    stage.until(lambda: _telemetry(stage)["connected"] and receiver.connected, what="the link came back")
    started = time.monotonic()
    stage.until(lambda: _telemetry(stage)["outbox_rows"] == 0, what="the outbox drained")
    drained_s = time.monotonic() - started

    def all_arrived() -> bool:
        ahead = _ahead(stage, receiver)
        return ahead is not None and ahead >= before and not receiver.report()["missing"]

    stage.until(all_arrived, what="every row that the box appended reached the receiver")
    report = receiver.report()
    if report["lost"] or _telemetry(stage)["lost"] or _telemetry(stage)["epoch"] != epoch:
        raise StepFailedError(f"rows were lost: {report['lost']}; the box says {_telemetry(stage)['lost']}")
    return (
        f"{load.seen.asked} answers during the outage, {waiting} rows waited, drained in {drained_s:.1f} s; "
        f"receiver: {report['arrived']} distinct rows, {report['missing']} missing, {report['lost']} lost "
        f"({report['doubled']} repeats removed)"
    )


def roll_out(stage: Stage, broker: Mosquitto) -> str:
    """Version 2 by a signed fleet command, under load."""
    body = Path(sys.executable).resolve().read_bytes()[:65536]
    with Load(stage.socket, body) as load:
        stage.until(lambda: load.seen.asked >= 50, what="the load runs")
        before = load.seen.last_version
        began = time.monotonic()
        _command(stage, broker, "deploy", f"{magika.NAME}@2.0.0", "--team", magika.TEAM)
        took_s = time.monotonic() - began
        stage.until(lambda: load.seen.last_version == "2.0.0", what="answers of version 2.0.0")
    _no_errors(load.seen)
    if before != "1.0.0" or set(load.seen.versions) != {"1.0.0", "2.0.0"}:
        raise StepFailedError(f"versions seen: {dict(load.seen.versions)}")
    return f"confirmed {took_s:.1f} s after the command; {load.seen.asked} requests, 0 failed, {_by_version(load.seen)}"


def roll_out_locally(stage: Stage) -> str:
    """Version 2 by the box's own command line, under load: what a box without a broker does."""
    body = Path(sys.executable).resolve().read_bytes()[:65536]
    with Load(stage.socket, body) as load:
        stage.until(lambda: load.seen.asked >= 50, what="the load runs")
        began = time.monotonic()
        _control(stage, "deploy", f"{magika.NAME}@2.0.0")
        took_s = time.monotonic() - began
        stage.until(lambda: load.seen.last_version == "2.0.0", what="answers of version 2.0.0")
    _no_errors(load.seen)
    return f"confirmed {took_s:.1f} s after the command; {load.seen.asked} requests, 0 failed, {_by_version(load.seen)}"


def refuse_tampered(stage: Stage) -> str:
    """Someone who can write the store, but holds no key, changes one byte of a published handler."""

    def mark(source: Path) -> None:
        with (source / magika.HANDLER).open("a") as file:
            file.write("\n# A release that only touches the handler.\n")

    bundle = stage.make_bundle(_TAMPERED, release="2.0.0", change=mark)
    known = {path.name for path in (stage.store / "blobs").rglob("*") if path.is_file()}
    stage.publish(bundle)
    fresh = [path for path in (stage.store / "blobs").rglob("*") if path.is_file() and path.name not in known]
    if not fresh:
        raise StepFailedError("the changed handler made no new blob")
    for path in fresh:
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 1
        path.chmod(0o644)
        path.write_bytes(bytes(data))
    body = Path(sys.executable).resolve().read_bytes()[:65536]
    with Load(stage.socket, body, clients=2) as load:
        stage.until(lambda: load.seen.asked >= 20, what="the load runs")
        done = _control(stage, "deploy", f"{magika.NAME}@{_TAMPERED}", refused=True)
    _no_errors(load.seen)
    if done["state"] != "rejected" or set(load.seen.versions) != {"2.0.0"}:
        raise StepFailedError(f"{done['state']}: {done['message']}; versions seen: {dict(load.seen.versions)}")
    return f"{done['code']}: {_short(done['message'])}; 2.0.0 went on, {load.seen.asked} requests, 0 failed"


def kill_worker(stage: Stage) -> str:
    """SIGKILL to the model's process, three times, under load."""
    body = Path(sys.executable).resolve().read_bytes()[:65536]
    killed: list[int] = []
    with Load(stage.socket, body) as load:
        for _ in range(3):
            _await_answers(stage, load, 30)
            pid = stage.until(
                lambda: next((pid for pid in stage.worker_pids() if pid not in killed), None), what="a worker runs"
            )
            os.kill(pid, signal.SIGKILL)
            killed.append(pid)
        _await_answers(stage, load, 30)
    _no_errors(load.seen)
    return f"{len(killed)} kills, {load.seen.asked} requests, 0 lost; slowest {max(load.seen.seconds) * 1e3:.0f} ms"


def footprint(stage: Stage) -> str:
    """What all of it costs in memory."""
    rows = {row["role"].split()[0]: row["pss_bytes"] / 1e6 for row in stage.status()["processes"]}
    total = sum(row["pss_bytes"] for row in stage.status()["processes"]) / 1e6
    return ", ".join(f"{role} {size:.0f} MB" for role, size in rows.items()) + f"; together {total:.0f} MB (PSS)"


def stop(stage: Stage) -> str:
    """SIGTERM: drain, flush, leave nothing behind."""
    assert stage.daemon is not None
    children = psutil.Process(stage.daemon.pid).children(recursive=True)
    code = stage.stop_daemon()
    _, alive = psutil.wait_procs(children, timeout=5.0)
    if code or alive:
        raise StepFailedError(f"exit status {code}, still running: {alive}; log: {stage.tail()}")
    return f"exit status 0, {len(children)} child processes gone"


def _command(stage: Stage, broker: Mosquitto, *arguments: str) -> dict[str, Any]:
    return stage.hub(
        *arguments,
        *("--device", DEVICE, "--broker", f"{broker.host}:{broker.port}", "--key", stage.key("operator")),
        *("--wait", 60),
    )


def _control(stage: Stage, *arguments: str, refused: bool = False) -> dict[str, Any]:
    """Run ``inferctl`` and return the deployment it followed."""
    command = [sys.executable, "-m", "agent.cli", "--socket", str(stage.socket), *arguments, "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if bool(done.returncode) != refused or not done.stdout:
        raise StepFailedError(f"inferctl {arguments[0]}: {(done.stdout + done.stderr).strip()[-600:]}")
    record: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])  # the lines before it are steps on the way
    return record


def _files() -> list[Path]:
    """Up to so many real files of this machine, of many kinds."""
    found: list[Path] = []
    for root in (Path("/usr/bin"), Path("/etc"), Path(os.__file__).parent, Path("/usr/share/doc")):
        kept = 0
        for path in sorted(root.rglob("*")):
            if kept * 4 >= _FILES_MAX:
                break
            try:
                usable = (
                    "__pycache__" not in path.parts
                    and path.is_file()
                    and not path.is_symlink()
                    and 0 < path.stat().st_size < _FILE_BYTES_MAX
                )
                if usable and os.access(path, os.R_OK):
                    found.append(path)
                    kept += 1
            except OSError:
                continue
    return found[:_FILES_MAX]


def _known(stage: Stage) -> dict[Path, str]:
    """Files whose kind is beyond doubt."""
    wheel = next(stage.wheels.glob("magika-*.whl"))
    return {Path(sys.executable).resolve(): "elf", Path(os.__file__): "python", wheel: "zip", stage.anchor: "json"}


def _model(stage: Stage) -> dict[str, Any]:
    return next(row for row in stage.status()["models"] if row["model"] == magika.NAME)


def _slot(stage: Stage) -> dict[str, Any]:
    return next(row for row in stage.status()["slots"] if row["slot"] == magika.NAME)


def _telemetry(stage: Stage) -> dict[str, Any]:
    value: dict[str, Any] = stage.status()["telemetry"]
    return value


def _ahead(stage: Stage, receiver: Receiver) -> int | None:
    """Return the receiver's distinct rows less those that the daemon appended since its start; ``None``: not at rest.

    What was appended before that start makes the difference positive, and a lost row makes it smaller: also one at
    the end of its stream, which no later number betrays.
    """
    before, report, after = _telemetry(stage), receiver.report(), _telemetry(stage)
    if before["outbox_rows"] or after["outbox_rows"] or before["appended"] != after["appended"]:
        return None
    return arrived_of(report, DEVICE, str(after["epoch"])) - int(after["appended"])


def _settled_ahead(stage: Stage, receiver: Receiver) -> int:
    """Return ``_ahead`` once it stays the same: the outbox is empty and nothing is on its way to the receiver."""
    seen: list[int | None] = [None]

    def settled() -> bool:
        time.sleep(_SETTLE_S)
        seen.append(_ahead(stage, receiver))
        return seen[-1] is not None and seen[-1] == seen[-2]

    stage.until(settled, what="the outbox is empty before the outage")
    assert seen[-1] is not None
    return seen[-1]


def _await_answers(stage: Stage, load: Load, count: int) -> None:
    """Wait for ``count`` more answers."""
    goal = load.seen.asked + count
    stage.until(lambda: load.seen.asked >= goal, what=f"{count} more answers")


def _no_errors(seen: Seen) -> None:
    if seen.errors:
        raise StepFailedError(
            f"{sum(seen.errors.values())} of {seen.asked} requests failed: {seen.errors.most_common(3)}"
        )


def _by_version(seen: Seen) -> str:
    return ", ".join(f"{count} by {version}" for version, count in sorted(seen.versions.items()))


def _short(text: str) -> str:
    return text if len(text) <= 90 else text[:87] + "…"
