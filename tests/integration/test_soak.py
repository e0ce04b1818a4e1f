"""A soak of some seconds passes on a sound daemon; its clients notice one that is not."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from agent.tensors import pack
from agent.wire import Decoder, encode
from tools.rig.line import Line, values

pytestmark = pytest.mark.integration


def test_a_short_soak_finds_nothing(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tools.soak", "--state", str(tmp_path / "box"), "--minutes", "0.1", "--seed", "5"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "seed 5" in done.stderr
    found: dict[str, Any] = json.loads((tmp_path / "box/report.json").read_text())
    assert (found["seed"], found["faults"]) == (5, [])
    assert set(found["acts"]) == {
        *("kill_worker", "kill_client", "burst", "cancel_storm", "region_lies", "region_moves", "malformed", "swap"),
    }
    assert found["answers"] > 0
    assert {ledger["name"] for ledger in found["ledgers"]} >= {"frames", "http", "library"}
    assert all(ledger["outcomes"]["result"] for ledger in found["ledgers"])
    assert found["before"]["pid"] == found["after"]["pid"]


@contextmanager
def false_daemon(path: Path, answers: Callable[[dict[str, Any]], list[dict[str, Any] | None]]) -> Iterator[None]:
    """Say what ``answers`` says to each frame of one connection; ``None`` ends it."""

    def serve(listener: socket.socket) -> None:
        with suppress(OSError):
            sock, _ = listener.accept()
            decoder = Decoder()
            with sock:
                while data := sock.recv(1 << 16):
                    for frame in decoder.feed(data):
                        for header in answers(frame.header):
                            if header is None:
                                return
                            y = np.frombuffer(header.pop("y", b""), dtype=np.float32).reshape(1, -1)
                            entries, (body,) = pack({"y": y})
                            sock.sendall(b"".join(map(bytes, encode({"tensors": entries, **header}, (body,)))))

    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        listener.bind(str(path))
        listener.listen()
        threading.Thread(target=serve, args=(listener,), daemon=True).start()
        try:
            yield
        finally:
            with suppress(OSError):
                listener.shutdown(socket.SHUT_RDWR)


def result(request_id: int, number: int, *, factor: float = 2.0) -> dict[str, Any]:
    y = (values(number, 3) * np.float32(factor)).tobytes()
    return {"kind": "result", "id": request_id, "version": "1.0.0", "y": y}


def faults(path: Path, answers: Callable[[dict[str, Any]], list[dict[str, Any] | None]]) -> list[str]:
    """Return what two requests, numbers 0 and 1 with ids 1 and 2, found."""
    with false_daemon(path, answers), Line(path, "c") as line:
        with suppress(OSError):
            for number in range(2):
                line.infer(values(number, 3))
            line.settle(timeout_s=30.0)
        return line.ledger.faults


def test_a_client_notices_what_is_not_one_answer_of_its_own(tmp_path: Path) -> None:
    assert faults(tmp_path / "good", lambda asked: [result(asked["id"], asked["id"] - 1)]) == []
    silent = faults(tmp_path / "lost", lambda asked: [None] if asked["id"] == 2 else [result(1, 0)])
    assert len(silent) == 1
    assert "1 requests without an answer" in silent[0]
    (swapped, _) = faults(tmp_path / "swapped", lambda asked: [result(asked["id"], 2 - asked["id"])])
    assert "not its own" in swapped
    twice = faults(tmp_path / "twice", lambda asked: [result(1, 0)] * 2 if asked["id"] == 1 else [result(2, 1)])
    assert "already" in twice[0]
    (foreign,) = faults(tmp_path / "old", lambda asked: [result(asked["id"], asked["id"] - 1, factor=asked["id"] + 1)])
    assert "request 2: the answer is not its own" in foreign
