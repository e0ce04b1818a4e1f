"""What inferd promises under systemd, tried inside a booted container as root; one JSON line per proof.

Runs with the installed environment only: no pytest, no publisher's extras, none of the tests' other modules.
"""

from __future__ import annotations

import contextlib
import errno
import http.client
import json
import os
import pwd
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final

import numpy as np
import paho.mqtt.client as mqtt
from paho.mqtt.enums import CallbackAPIVersion, MQTTProtocolVersion

from agent.client import Client
from agent.errors import AgentError
from tools.hub import commands, keys

_REPORT: Final = Path("/report.jsonl")
_FRAMES: Final = "/run/inferd/inferd.sock"
_HTTP: Final = "/run/inferd/http.sock"
_TCP: Final = ("127.0.0.1", 8080)
_MODEL: Final = "scale"
_CONFIG: Final = Path("/etc/inferd/inferd.toml")
_DROP_IN: Final = Path("/etc/systemd/system/inferd.service.d/test.conf")
_STATE: Final = Path("/var/lib/inferd")
_UNITS: Final = ("inferd.service", "inferd.socket", "inferd-http.socket", "inferd-tcp.socket")


def first_start() -> str:
    until(lambda: show("ActiveState") == "active", "the service is active")
    elapsed_s = until_served()
    assert show("Type") == "notify"
    assert show("NRestarts") == "0"
    assert show("StatusText").startswith("serving "), show("StatusText")
    return f"active by READY=1, first pull and first answer after {elapsed_s:.1f} s more"


def identity() -> str:
    own = pwd.getpwnam("inferd").pw_uid
    pids = cgroup_pids()
    assert len(pids) >= 3, pids  # daemon, zygote, worker
    for pid in pids:
        assert process_status(pid)["Uid"].split()[0] == str(own)
        assert process_status(pid)["CapBnd"].strip("0") == ""
    mode = oct(_STATE.stat().st_mode & 0o777)
    assert (_STATE.stat().st_uid, mode) == (own, "0o700")
    return f"{len(pids)} processes, all of the user inferd without a capability; state folder {mode}"


def sandbox() -> str:
    status = box_status()
    models = [row for row in status["models"] if row["model"] == _MODEL]
    assert [row["sandbox"]["level"] for row in models] == ["full"], models
    workers = [pid for row in models for pid in row["workers"]]
    assert workers
    for pid in workers:
        facts = process_status(pid)
        assert (facts["Seccomp"], facts["NoNewPrivs"]) == ("2", "1")
        assert int(facts["Seccomp_filters"]) > int(process_status(status["agent"]["pid"])["Seccomp_filters"])
        assert Path(f"/proc/{pid}/oom_score_adj").read_text().strip() == "500"
    return f"level full, Landlock ABI {models[0]['sandbox']['landlock']}; PSS of every process is known: " + str(
        {row["role"]: round(row["pss_bytes"] / 1e6, 1) for row in status["processes"] if row["pss_bytes"] > 0}
    )


def link() -> str:
    heard: list[str] = []
    receiver = mqtt.Client(CallbackAPIVersion.VERSION2, protocol=MQTTProtocolVersion.MQTTv5)
    receiver.on_message = lambda _client, _data, message: heard.append(message.topic)
    receiver.connect("127.0.0.1", 1883)
    receiver.subscribe("inferd/v1/#", qos=1)
    receiver.loop_start()
    try:
        until(lambda: box_status()["telemetry"]["delivered"] > 0 and bool(heard), "telemetry is acknowledged and heard")
    finally:
        receiver.disconnect()
        receiver.loop_stop()
    return f"acknowledged: {box_status()['telemetry']['delivered']}, heard: {sorted(set(heard))}"


def fleet_command() -> str:
    signer = keys.load_signer(Path("/opt/operator"), Path("/opt/password").read_text())
    broker = commands.Broker(host="127.0.0.1", port=1883)

    def order(name: str, args: dict[str, Any]) -> float:
        box = {"tenant": "default", "device": "container"}
        order = commands.make_command(name, args, **box, signer=signer, now_s=time.time(), lifetime_s=60)
        reply = commands.send(broker, order, wait_s=60.0)
        assert reply["status"] == "done", reply
        return ask()

    assert order("deploy", {"team": "demo", "model": _MODEL, "version": "2.0.0", "channel": "stable"}) == 12.0
    assert order("rollback", {"model": _MODEL}) == 8.0
    return "signed deploy and rollback are verified by the trust child, carried out and answered"


def lost_zygote() -> str:
    def processes(role: str) -> list[int]:
        return [row["pid"] for row in box_status()["processes"] if row["role"].startswith(role)]

    daemon, zygotes, workers = int(show("MainPID")), processes("zygote"), processes("worker")
    for pid in zygotes:
        os.kill(pid, signal.SIGKILL)
    assert ask() == 8.0
    assert processes("worker") == workers, "workers outlive their zygote"
    for pid in workers:
        os.kill(pid, signal.SIGKILL)
    until_served()
    assert int(show("MainPID")) == daemon
    assert not {*zygotes, *workers} & {*processes("zygote"), *processes("worker")}
    zombies = [pid for pid in cgroup_pids() if process_status(pid)["State"].startswith("Z")]
    assert not zombies, zombies
    return "workers serve on without their zygote; both come back, no zombie stays with the daemon"


def clients() -> str:
    assert ask_as("app") == "8.0"
    assert "forbidden" in control_as("app", "unpin", _MODEL)
    assert "follows the fleet" in control_as("technician", "unpin", _MODEL)
    assert "PermissionError" in ask_as("stranger")
    assert http_status("GET", "/v2/health/ready", tcp=True) == 200
    assert http_status("GET", "/v2/health/ready", tcp=False) == 200
    return "the group inferd may ask, operate_uids may operate, others cannot connect, loopback HTTP answers"


def secrets_are_closed() -> str:
    done = run_as("app", "cat", str(_CONFIG))
    assert "Permission denied" in done, done
    done = run_as("app", "ls", str(_STATE))
    assert "Permission denied" in done, done
    return "a client in the group inferd reads neither configuration nor state"


def journal() -> str:
    rows = [json.loads(line) for line in run("journalctl", "-u", "inferd", "-o", "json").stdout.splitlines()]
    own = [(row, json.loads(row["MESSAGE"])) for row in rows if str(row.get("MESSAGE", "")).startswith("{")]
    assert any(message["msg"] == "ready" and row["PRIORITY"] == "6" for row, message in own)
    assert all({"ts", "level", "logger", "msg"} <= message.keys() for _, message in own)
    assert {row["_SYSTEMD_UNIT"] for row, _ in own} == {"inferd.service"}
    plain = [
        row["MESSAGE"]
        for row in rows
        if row.get("_SYSTEMD_UNIT") == "inferd.service" and not str(row["MESSAGE"]).startswith("{")
    ]
    assert all(message.startswith("inferd: bad_config: ") for message in plain), plain
    return f"{len(own)} structured lines with priorities; the only plain ones name the bad configuration"


def stop_and_activation() -> str:
    assert systemctl("stop", "inferd.service").returncode == 0
    assert (show("Result"), show("ExecMainStatus"), show("ActiveState")) == ("success", "0", "inactive")
    assert not cgroup_pids()
    shown = []
    for name, connect in _WAYS.items():
        if show("ActiveState") != "inactive":
            systemctl("stop", "inferd.service")
        began = time.monotonic()
        with connect():
            until(lambda: show("ActiveState") == "active", f"a connect to {name} starts the service")
        until_served()
        shown.append(f"{name} {time.monotonic() - began:.1f} s")
    return "clean stop; a first connect starts it and is answered: " + ", ".join(shown)


def kept_down_and_without_tcp() -> str:
    assert systemctl("stop", *_UNITS).returncode == 0
    for name in ("frames", "http-unix", "http"):
        try:
            _WAYS[name]().close()
        except ConnectionRefusedError:
            continue
        raise AssertionError(f"{name} still takes connections")
    assert "Connection refused" in control_as("app", "status")
    assert "Permission denied" in control_as("stranger", "status")
    good = _CONFIG.read_text()
    try:
        _CONFIG.write_text(good + "[serving]\nhttp_port = 0\n")
        systemctl("disable", "--now", "inferd-tcp.socket")
        systemctl("start", "inferd.service")
        until_served()
        assert show("ActiveState", "inferd-tcp.socket") == "inactive"
        assert socket.socket().connect_ex(_TCP) == errno.ECONNREFUSED
    finally:
        _CONFIG.write_text(good)
    systemctl("enable", "inferd-tcp.socket")
    systemctl("stop", "inferd.service")
    assert systemctl("start", *_UNITS[1:], "inferd.service").returncode == 0
    until_served()
    return "stopped sockets refuse; a disabled port stays closed when the service starts"


def restart_under_load() -> str:
    with load() as counts:
        time.sleep(1.0)
        for _ in range(3):
            assert systemctl("restart", "inferd.service").returncode == 0
            time.sleep(1.0)
    assert counts["connects"] > 100, counts
    assert counts["answers"] > 100, counts
    assert not counts["failures"], counts
    return f"three restarts: {counts}"


def kill() -> str:
    restarts, pids = int(show("NRestarts")), cgroup_pids()
    with load() as counts:
        time.sleep(0.5)
        assert systemctl("kill", "-s", "KILL", "inferd.service").returncode == 0
        until(lambda: int(show("NRestarts")) == restarts + 1, "systemd starts it again")
        elapsed_s = until_served()
        time.sleep(0.5)
    assert not set(pids) & set(cgroup_pids())
    assert not counts["refused"], counts
    return f"served again {elapsed_s:.1f} s after the restart; {counts}"


def watchdog() -> str:
    assert show("WatchdogUSec") == "30s"
    drop_in("WatchdogSec=3")
    restarts, pid = int(show("NRestarts")), int(show("MainPID"))
    time.sleep(7.0)
    assert int(show("MainPID")) == pid, "a healthy daemon feeds it"
    began = time.monotonic()
    os.kill(pid, signal.SIGSTOP)
    until(lambda: int(show("NRestarts")) > restarts, "the watchdog ends a stopped daemon")
    until_served()
    elapsed_s = time.monotonic() - began
    assert "Watchdog timeout" in run("journalctl", "-u", "inferd", "-o", "cat").stdout
    _DROP_IN.unlink()
    return f"WatchdogSec=3, SIGSTOP: served again after {elapsed_s:.1f} s"


def bad_configuration() -> str:
    good = _CONFIG.read_text()
    _CONFIG.write_text("[serving]\nhttp_prot = 1\n")
    try:
        systemctl("restart", "inferd.service")
        with socket.socket(socket.AF_UNIX) as waiting:
            waiting.connect(_FRAMES)
            until(lambda: int(show("NRestarts")) >= 3, "systemd keeps trying", 30.0)
            states = [show("ActiveState", unit) for unit in _UNITS[1:]]
    finally:
        _CONFIG.write_text(good)
    assert states == ["active"] * 3, states
    assert "http_prot" in run("journalctl", "-u", "inferd", "-o", "cat", "-n", "50").stdout
    elapsed_s = until_served()
    assert show("ActiveState") == "active"
    return f"named in the journal; serves {elapsed_s:.1f} s after it was mended, sockets never closed"


def upgrade() -> str:
    before = os.readlink("/usr/lib/inferd/venv")
    with load() as counts:
        done = run("sh", "/opt/inferd/systemd/install.sh", "--offline", "/opt/wheels")
        assert done.returncode == 0, done.stdout + done.stderr
        until_served()
    after = os.readlink("/usr/lib/inferd/venv")
    assert before != after
    assert sorted(entry.name for entry in Path("/usr/lib/inferd").glob("venv-*")) == [after]
    assert not counts["failures"], counts
    assert "keeping /etc/inferd/inferd.toml" in done.stdout
    return f"{counts}; the installer said: {done.stdout.strip().splitlines()[-2]}"


def uninstall() -> str:
    done = run("sh", "/opt/inferd/systemd/install.sh", "--uninstall")
    assert done.returncode == 0, done.stdout + done.stderr
    assert not cgroup_pids()
    assert not Path("/usr/lib/inferd").exists()
    assert not Path("/run/inferd").exists()
    assert not [unit for unit in _UNITS if Path("/etc/systemd/system", unit).exists()]
    assert (_STATE / "journal.db").exists()
    assert _CONFIG.exists()
    again = run("sh", "/opt/inferd/systemd/install.sh", "--uninstall", "--purge")
    assert again.returncode == 0, again.stdout + again.stderr
    left = [path for path in ("/var/lib/inferd", "/etc/inferd", "/usr/share/inferd") if Path(path).exists()]
    assert not left, left
    return done.stdout.strip().splitlines()[-1]


# In the order they run: the last ones take inferd away.
PROOFS: Final[tuple[Callable[[], str], ...]] = (
    first_start,
    identity,
    sandbox,
    link,
    fleet_command,
    lost_zygote,
    clients,
    secrets_are_closed,
    stop_and_activation,
    kept_down_and_without_tcp,
    restart_under_load,
    kill,
    watchdog,
    bad_configuration,
    upgrade,
    journal,
    uninstall,
)


def main() -> int:
    """Run all proofs; once inferd has served, each is tried whatever became of the others."""
    for proof in PROOFS:
        began = time.monotonic()
        try:
            row = {"ok": True, "said": proof()}
        except (AssertionError, AgentError, OSError, KeyError, ValueError, IndexError) as error:
            row = {"ok": False, "said": f"{type(error).__name__}: {error}", "trace": traceback.format_exc()}
        row |= {"proof": proof.__name__, "seconds": round(time.monotonic() - began, 1)}
        with _REPORT.open("a") as report:
            print(json.dumps(row), file=report)
        if proof is first_start and not row["ok"]:
            return 1  # nothing else can hold
    return 0


# Asking


def ask() -> float:
    with Client(_FRAMES, connect_timeout_s=10.0) as client:
        result = client.infer(_MODEL, {"x": np.full((1, 4), 4.0, dtype=np.float32)})
    return float(result.outputs["y"][0, 0])


def ask_as(user: str) -> str:
    code = (
        "import sys, numpy as np; from agent.client import Client\n"
        f"with Client({_FRAMES!r}, connect_timeout_s=1.0) as client:\n"
        f"    print(client.infer({_MODEL!r}, {{'x': np.full((1, 4), 4.0, dtype=np.float32)}}).outputs['y'][0, 0])"
    )
    return run_as(user, sys.executable, "-c", code).strip()


def control_as(user: str, *arguments: str) -> str:
    return run_as(user, "/usr/local/bin/inferctl", *arguments)


def box_status() -> dict[str, Any]:
    value: dict[str, Any] = json.loads(run("/usr/local/bin/inferctl", "status", "--json").stdout)
    return value


def http_status(method: str, path: str, *, tcp: bool) -> int:
    connection = http.client.HTTPConnection("127.0.0.1", _TCP[1], timeout=10.0)
    if not tcp:
        connection.sock = _connect_unix(_HTTP)
    try:
        connection.request(method, path)
        return connection.getresponse().status
    finally:
        connection.close()


def until_served(timeout_s: float = 60.0) -> float:
    """Wait for the right answer; return how long it took."""
    began = time.monotonic()

    def served() -> bool:
        try:
            return ask() == 8.0
        except (AgentError, OSError):
            return False

    until(served, "the model answers", timeout_s)
    return time.monotonic() - began


@contextlib.contextmanager
def load() -> Iterator[dict[str, Any]]:
    """Ask without a pause over the client library, and connect to every socket, until the body ends; count."""
    counts: dict[str, Any] = {"answers": 0, "connects": 0, "refused": 0, "failures": []}
    stop = threading.Event()

    def asking() -> None:
        while not stop.is_set():
            try:
                assert ask() == 8.0
                counts["answers"] += 1
            except (AgentError, OSError, AssertionError) as error:
                counts["failures"].append(f"ask: {type(error).__name__}: {error}")

    def connecting(connect: Callable[[], socket.socket]) -> None:
        while not stop.wait(0.005):
            try:
                connect().close()
                counts["connects"] += 1
            except OSError as error:
                counts["refused"] += 1
                counts["failures"].append(f"connect: {error}")

    threads = [threading.Thread(target=asking) for _ in range(2)]
    threads += [threading.Thread(target=connecting, args=(way,)) for way in _WAYS.values()]
    for thread in threads:
        thread.start()
    try:
        yield counts
    finally:
        stop.set()
        for thread in threads:
            thread.join(90.0)


# Looking


def until(condition: Callable[[], bool], what: str, timeout_s: float = 60.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"not within {timeout_s:g} s: {what}"
        time.sleep(0.05)


def run(*command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=180.0, cwd="/")


def run_as(user: str, *command: str) -> str:
    entry = pwd.getpwnam(user)
    done = subprocess.run(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
        timeout=60.0,
        cwd="/",
        user=entry.pw_uid,
        group=entry.pw_gid,
        extra_groups=os.getgrouplist(user, entry.pw_gid),
    )
    return done.stdout


def systemctl(*arguments: str) -> subprocess.CompletedProcess[str]:
    return run("systemctl", *arguments)


def show(name: str, unit: str = "inferd.service") -> str:
    return run("systemctl", "show", "--value", "-p", name, unit).stdout.strip()


def drop_in(*lines: str) -> None:
    _DROP_IN.parent.mkdir(exist_ok=True)
    _DROP_IN.write_text("[Service]\n" + "\n".join(lines) + "\n")
    systemctl("daemon-reload")
    systemctl("restart", "inferd.service")
    until_served()


def cgroup_pids() -> list[int]:
    found = []
    for path in Path("/proc").glob("[0-9]*/cgroup"):
        with contextlib.suppress(OSError):
            if "/inferd.service" in path.read_text():
                found.append(int(path.parent.name))
    return found


def process_status(pid: int) -> dict[str, str]:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return {name: value.strip() for name, _, value in (line.partition(":") for line in lines)}


def _connect_unix(path: str) -> socket.socket:
    made = socket.socket(socket.AF_UNIX)
    made.settimeout(10.0)
    made.connect(path)
    return made


_WAYS: Final[dict[str, Callable[[], socket.socket]]] = {
    "frames": lambda: _connect_unix(_FRAMES),
    "http-unix": lambda: _connect_unix(_HTTP),
    "http": lambda: socket.create_connection(_TCP, timeout=10.0),
}

if __name__ == "__main__":
    sys.exit(main())
