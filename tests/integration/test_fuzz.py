"""The fuzzer against a real daemon, and against false ones that do what it must find."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from agent.wire import Decoder, encode, error_header
from tools.fuzz.cases import Case, Step, make_case
from tools.fuzz.drive import FaultError, read_cases, send_case, write_cases

pytestmark = pytest.mark.integration


def fuzz(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "tools.fuzz", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_a_daemon_withstands_some_hundred_cases(tmp_path: Path) -> None:
    done = fuzz("--state", tmp_path / "box", "--cases", 400, "--minutes", 5, "--seed", 11)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "seed 11: 400 cases" in done.stdout
    assert "'result'" in done.stdout


def test_kept_cases_are_sent_again(tmp_path: Path) -> None:
    write_cases(tmp_path / "kept.json", [make_case(3, number) for number in range(5)], "something")
    done = fuzz("--state", tmp_path / "box", "--replay", tmp_path / "kept.json")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "kept.json: 5 cases" in done.stdout


PING = b"".join(bytes(part) for part in encode({"kind": "call", "id": 1, "method": "ping"}))
CASE = Case(seed=0, number=0, steps=(Step(data=PING),), patient=True)


@contextmanager
def false_daemon(path: Path, answer: dict[str, Any]) -> Iterator[None]:
    """Answer every frame with the same header."""

    def serve(listener: socket.socket) -> None:
        with suppress(OSError):
            while True:
                sock, _ = listener.accept()
                decoder = Decoder()
                with sock:
                    while data := sock.recv(1 << 16):
                        for frame in decoder.feed(data):
                            header = {"id": frame.header["id"], **answer}
                            sock.sendall(b"".join(bytes(part) for part in encode(header)))

    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        listener.bind(str(path))
        listener.listen()
        threading.Thread(target=serve, args=(listener,), daemon=True).start()
        try:
            yield
        finally:
            listener.shutdown(socket.SHUT_RDWR)


def test_what_a_daemon_must_not_say_is_a_fault(tmp_path: Path) -> None:
    outcomes: Counter[str] = Counter()
    with false_daemon(tmp_path / "good", {"kind": "reply", "value": 1}):
        send_case(tmp_path / "good", CASE, outcomes)
    assert outcomes["reply"] == 2
    with false_daemon(tmp_path / "internal", error_header(None, "internal", "oh")):
        with pytest.raises(FaultError, match="internal error: oh"):
            send_case(tmp_path / "internal", CASE, outcomes)
    with false_daemon(tmp_path / "odd", {"kind": "infer"}):
        with pytest.raises(FaultError, match="said"):
            send_case(tmp_path / "odd", CASE, outcomes)


def test_a_fault_is_kept_with_its_cases(tmp_path: Path) -> None:
    write_cases(tmp_path / "f.json", [CASE], "the daemon said something")
    assert json.loads((tmp_path / "f.json").read_text())["fault"] == "the daemon said something"
    assert read_cases(tmp_path / "f.json") == [CASE]
