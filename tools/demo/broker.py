"""A private mosquitto on a free local port, for the demo and the tests: started, stopped, killed, started again.

Its configuration keeps what it acknowledged across a kill: persistence after every change, no cap on queued messages.
That suits a few devices; a large fleet's broker saves at intervals instead.
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import time
from pathlib import Path
from types import TracebackType
from typing import Final

from tools.demo.ports import free_port

_START_TIMEOUT_S: Final = 20.0
_STOP_TIMEOUT_S: Final = 10.0


def find_mosquitto() -> str | None:
    """Return the path of the mosquitto binary, which Debian puts outside a user's PATH; ``None`` if there is none."""
    return shutil.which("mosquitto", path=os.environ.get("PATH", "") + ":/usr/sbin:/usr/local/sbin")


class Mosquitto:
    """One broker process at a time, always on the same port with the same stored state.

    Args:
        directory: For configuration, log and persistence; made if it is missing.
        extra: Further lines of mosquitto.conf.

    Raises:
        FileNotFoundError: mosquitto is not installed.
    """

    def __init__(self, directory: Path, *, extra: str = "") -> None:
        binary = find_mosquitto()
        if binary is None:
            raise FileNotFoundError("mosquitto is not installed (Debian: apt install mosquitto)")
        self._binary = binary
        self._directory = directory
        self._process: subprocess.Popen[bytes] | None = None
        self.host = "127.0.0.1"
        self.port = free_port()
        directory.mkdir(parents=True, exist_ok=True)
        self._configuration = directory / "mosquitto.conf"
        self._configuration.write_text(self._lines() + extra)

    @property
    def log(self) -> str:
        """What the broker has logged so far."""
        path = self._directory / "mosquitto.log"
        return path.read_text(errors="replace") if path.exists() else ""

    @property
    def running(self) -> bool:
        """Whether its process lives."""
        return self._process is not None and self._process.poll() is None

    def start(self) -> None:
        """Start the broker and return once it accepts connections.

        Raises:
            RuntimeError: it ended or did not listen in time; the message has its log.
        """
        with (self._directory / "mosquitto.log").open("ab") as log:
            self._process = subprocess.Popen(
                [self._binary, "-c", str(self._configuration)], stdin=subprocess.DEVNULL, stdout=log, stderr=log
            )
        deadline = time.monotonic() + _START_TIMEOUT_S
        while not self._listens():
            if self._process.poll() is not None or time.monotonic() > deadline:
                self.kill()
                raise RuntimeError(f"mosquitto did not start:\n{self.log[-2000:]}")
            time.sleep(0.02)

    def stop(self) -> None:
        """End the broker in order; it stores its state."""
        self._end(signal.SIGTERM)

    def kill(self) -> None:
        """End the broker at once, as a crash would."""
        self._end(signal.SIGKILL)

    def __enter__(self) -> Mosquitto:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def _end(self, number: signal.Signals) -> None:
        process, self._process = self._process, None
        if process is None or process.poll() is not None:
            return
        process.send_signal(number)
        try:
            process.wait(_STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()

    def _listens(self) -> bool:
        try:
            socket.create_connection((self.host, self.port), timeout=0.2).close()
        except OSError:
            return False
        return True

    def _lines(self) -> str:
        lines = [
            f"listener {self.port} {self.host}",
            "allow_anonymous true",
            "persistence true",
            f"persistence_location {self._directory}/",
            "autosave_on_changes true",
            "autosave_interval 1",
            "max_queued_messages 0",
            "max_inflight_messages 0",
            "max_packet_size 1048576",
            "log_type error",
            "log_type warning",
            "log_type notice",
        ]
        if os.geteuid() == 0:
            lines.append("user root")  # else it gives up its rights and cannot write here
        return "\n".join(lines) + "\n"
