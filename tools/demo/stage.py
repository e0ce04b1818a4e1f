"""The demo's stage: folders, keys, the signed store, a static web server, the daemon. Real programs, by their CLIs.

Everything lives below one state folder and ends with the ``with`` block; the unix sockets move to a short temporary
folder when the state folder's path is too long for them.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

from agent.client import Client
from agent.errors import AgentError
from tools.demo import magika
from tools.demo.ports import free_port

DEVICE: Final = "demo-box"
_SOCKET_PATH_MAX: Final = 90  # sun_path is 108 bytes
PASSWORD: Final = "only-for-the-demo"
_STOP_TIMEOUT_S: Final = 30.0


class StepFailedError(Exception):
    """A step of the demo did not hold; the message says what was seen."""


class Stage:
    """Paths and processes of one demonstration.

    Args:
        folder: All state; made if missing. ``fresh`` removes what an earlier run left.
        wheels: Downloads, kept from run to run; default: ``wheels`` in ``folder``.

    Raises:
        StepFailedError: a daemon runs on this folder.
    """

    def __init__(self, folder: Path, *, fresh: bool, wheels: Path | None = None) -> None:
        self.folder = folder.absolute()
        self.wheels = (wheels or folder / "wheels").absolute()
        self._refuse_if_in_use()
        if fresh:
            for child in self.folder.glob("*"):
                if child != self.wheels:
                    _remove(child)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.store, self.keys, self.anchor = self.folder / "store", self.folder / "keys", self.folder / "root.json"
        self.state, self.config, self.log = (
            self.folder / "state",
            self.folder / "inferd.toml",
            self.folder / "inferd.log",
        )
        self._temporary: tempfile.TemporaryDirectory[str] | None = None
        sockets = self.folder / "run"
        if len(str(sockets)) > _SOCKET_PATH_MAX:
            self._temporary = tempfile.TemporaryDirectory(prefix="inferd-")
            sockets = Path(self._temporary.name)
        self.socket, self.http_socket = sockets / "inferd.sock", sockets / "http.sock"
        self.http_port, self.web_port = free_port(), free_port()
        self.daemon: subprocess.Popen[bytes] | None = None
        self._web: subprocess.Popen[bytes] | None = None

    # Publisher

    def hub(self, *arguments: object) -> dict[str, Any]:
        """Run ``inferhub`` with ``--json`` and return its answer.

        Raises:
            StepFailedError: it failed; the message is its own.
        """
        done = subprocess.run(
            self.hub_command(*arguments, "--json"),
            capture_output=True,
            text=True,
            check=False,
            env={**os.environ, "INFERHUB_KEY_PASSWORD": PASSWORD},
        )
        lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
        if done.returncode or not lines:
            raise StepFailedError(f"inferhub {arguments[0]}: {(done.stdout + done.stderr).strip()[-600:]}")
        answer: dict[str, Any] = json.loads(lines[-1])
        return answer

    def hub_command(self, *arguments: object) -> list[str]:
        """Return the command line of ``inferhub``."""
        return [sys.executable, "-m", "tools.inferhub", *map(str, arguments)]

    def key(self, name: str) -> Path:
        """Return the private key file called ``name``."""
        return self.keys / name

    def make_store(self) -> dict[str, Any]:
        """Make fresh keys and an empty signed store."""
        for name in ("root-a", "root-b", "root-c"):
            self.hub("keygen", "--role", "root", "--out", self.key(name))
        for role in ("targets", "online", "team", "operator"):
            self.hub("keygen", "--role", role, "--out", self.key(role))
        roots = [part for name in ("root-a", "root-b", "root-c") for part in ("--root-key", self.key(name))]
        return self.hub(
            *("init", self.store, *roots, "--threshold", 2),
            *("--targets-key", self.key("targets"), "--online-key", self.key("online")),
            *("--team", f"{magika.TEAM}={self.key('team')}.pub", "--operator-key", f"{self.key('operator')}.pub"),
            *("--anchor", self.anchor),
        )

    def make_bundle(self, version: str, *, change: Callable[[Path], None] | None = None, release: str = "") -> Path:
        """Pack the model ``release`` (default: that of ``version``) as ``version``; ``change`` may edit its sources."""
        source, bundle = self.folder / "sources" / version, self.folder / "bundles" / version
        release = release or version
        wheel = magika.download_wheel(magika.RELEASES[release].wheel, self.wheels)
        magika.build_sources(wheel, release, source)
        if release != version:
            description = source / "model.toml"
            text = description.read_text()
            if f'version = "{release}"' not in text:
                raise StepFailedError("the bundle description names no version")
            description.write_text(text.replace(f'version = "{release}"', f'version = "{version}"', 1))
        if change is not None:
            change(source)
        self.hub("pack", source, "--out", bundle)
        return bundle

    def publish(self, bundle: Path, *more: object) -> dict[str, Any]:
        """Publish a packed bundle."""
        keys = ("--team-key", self.key("team"), "--online-key", self.key("online"))
        return self.hub("publish", bundle, "--store", self.store, *keys, *more)

    def serve_store(self) -> str:
        """Serve the store with a plain static web server; return its address."""
        self._web = subprocess.Popen(
            [
                *(sys.executable, "-m", "http.server", str(self.web_port)),
                *("--bind", "127.0.0.1", "--directory", str(self.store)),
            ],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        self._until_listening(self._web, self.web_port)
        return f"http://127.0.0.1:{self.web_port}"

    # Box

    def write_config(
        self, *, store_url: str, broker_port: int | None, models: Sequence[str] = (magika.NAME,), more: str = ""
    ) -> None:
        """Write the daemon's configuration; ``more`` is TOML of further sections."""
        lines = [
            *("[device]", f'id = "{DEVICE}"', f'state_dir = "{self.state}"', ""),
            *("[serving]", f'frame_socket = "{self.socket}"', f'http_socket = "{self.http_socket}"'),
            *(f"http_port = {self.http_port}", ""),
            *("[store]", f'urls = ["{store_url}"]', f'anchor = "{self.anchor}"', ""),
            *("[deploy]", "probation_s = 1.0", "probation_calls_min = 10"),
            *("latency_slack_ms = 1000.0", ""),  # ten answers say nothing of the latency of a machine that is busy
        ]
        if broker_port is not None:
            lines += [
                *("[telemetry]", 'host = "127.0.0.1"', f"port = {broker_port}", "metrics_interval_s = 0.5"),
                *("reconnect_first_s = 0.2", "reconnect_cap_s = 2.0", ""),
            ]
        for model in models:
            lines += ["[[models]]", f'name = "{model}"', f'team = "{magika.TEAM}"', ""]
        self.config.write_text("\n".join([*lines, more, ""]))

    def start_daemon(self) -> None:
        """Start ``inferd``; its log goes to a file."""
        with self.log.open("ab") as log:
            self.daemon = subprocess.Popen(
                [sys.executable, "-m", "agent", "--config", str(self.config)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )

    def stop_daemon(self) -> int:
        """Ask the daemon to stop and return its exit status."""
        daemon, self.daemon = self.daemon, None
        return _end(daemon)

    def client(self) -> Client:
        """Return a new client of the daemon."""
        return Client(self.socket, connect_timeout_s=10.0)

    def status(self) -> dict[str, Any]:
        """Return the daemon's status."""
        with self.client() as client:
            value: dict[str, Any] = client.status()
            return value

    def worker_pids(self) -> list[int]:
        """Return the pids of the model's workers."""
        rows: list[dict[str, Any]] = self.status()["models"]
        return [int(pid) for row in rows if row["model"] == magika.NAME for pid in row.get("workers", [])]

    def until(self, condition: Callable[[], Any], *, what: str, timeout_s: float = 60.0) -> Any:
        """Return ``condition``'s first true value.

        Raises:
            StepFailedError: it did not become true in time, or the daemon ended.
        """
        deadline = time.monotonic() + timeout_s
        while True:
            try:
                if value := condition():
                    return value
            except (AgentError, OSError):
                pass  # not yet
            if self.daemon is not None and self.daemon.poll() is not None:
                raise StepFailedError(f"inferd ended with {self.daemon.returncode}: {self.tail()}")
            if time.monotonic() > deadline:
                raise StepFailedError(f"not within {timeout_s:g} s: {what}; log: {self.tail()}")
            time.sleep(0.02)

    def tail(self) -> str:
        """Return the end of the daemon's log."""
        return self.log.read_text(errors="replace")[-1500:] if self.log.exists() else ""

    # End

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop_daemon()
        web, self._web = self._web, None
        _end(web)
        if self._temporary is not None:
            self._temporary.cleanup()

    def _refuse_if_in_use(self) -> None:
        """The daemon locks its state folder; whoever rewrote its store and configuration would break it."""
        lock = self.folder / "state" / "daemon.lock"
        with contextlib.suppress(FileNotFoundError), lock.open("rb") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise StepFailedError(f"{self.folder} is in use by a running inferd; stop it first") from error

    def _until_listening(self, process: subprocess.Popen[bytes], port: int) -> None:
        deadline = time.monotonic() + 20.0
        while process.poll() is None and time.monotonic() < deadline:
            try:
                socket.create_connection(("127.0.0.1", port), timeout=0.5).close()
            except OSError:
                time.sleep(0.02)
            else:
                return
        raise StepFailedError(f"nothing listens on port {port}")


def _end(process: subprocess.Popen[bytes] | None) -> int:
    if process is None:
        return 0
    if process.poll() is None:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(_STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
    return process.returncode


def _remove(path: Path) -> None:
    """Remove a file or a tree whose folders may be read-only."""
    if not path.is_dir() or path.is_symlink():
        path.unlink()
        return
    for folder, _, _ in os.walk(path):
        os.chmod(folder, 0o700)
    shutil.rmtree(path)
