"""Answers in parts from a whole box: a signed bundle with its own streaming handler, the daemon, ordinary clients."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import threading
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from agent.errors import WorkerDiedError
from tests.box import MODEL, Box, copy_box
from tests.models import FEATURES

pytestmark = pytest.mark.integration

ENDLESS = {"kind": "bytes", "count": 1_000_000_000, "sleep_s": 0.002}
PREDICT = f"/predictions/{MODEL}"
curl = pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store with scale 1.0.0, which streams, and 2.0.0 (x 3, channel beta), made once."""
    folder = tmp_path_factory.mktemp("store") / "box"
    with Box(folder, fresh=True) as box:
        box.make_store()
        box.publish_scale("1.0.0", handler="steps")
        box.publish_scale("2.0.0", factor=3.0, handler="steps", channel="")
    return folder


@pytest.fixture(scope="module")
def shared(template: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Box]:
    with copy_box(template, tmp_path_factory.mktemp("shared") / "box") as box:
        box.configure()
        box.start()
        box.until_serving("1.0.0")
        yield box


@pytest.fixture
def box(template: Path, tmp_path: Path) -> Iterator[Box]:
    with copy_box(template, tmp_path / "box") as box:
        box.configure()
        box.start()
        box.until_serving("1.0.0")
        yield box


def body(asked: dict[str, Any]) -> bytes:
    return json.dumps(asked).encode()


def counts(box: Box) -> dict[str, int]:
    with box.client() as client:
        (found,) = client.predict(MODEL, b'{"report": true}').json()
    return dict(found)


def until_closed(box: Box, opened: int) -> None:
    def closed() -> bool:
        now = counts(box)
        return now["opened"] >= opened and now["opened"] == now["closed"]

    box.until(closed, what="every generator is closed")


def run_curl(box: Box, path: str, asked: dict[str, Any], *options: str) -> subprocess.CompletedProcess[bytes]:
    url = f"http://127.0.0.1:{box.http_port}{path}"
    command = ["curl", "-sN", "--max-time", "60", *options, "--data-binary", json.dumps(asked), url]
    return subprocess.run(command, capture_output=True, check=False)


@curl
def test_curl_gets_chunks_events_and_generated_text(shared: Box) -> None:
    assert run_curl(shared, PREDICT, {"kind": "text"}).stdout == b"2 4 8 "
    assert run_curl(shared, PREDICT, {"kind": "text"}, "-0").stdout == b"2 4 8 "
    done = run_curl(shared, PREDICT, {"kind": "json", "count": 2}, "-H", "Accept: text/event-stream")
    assert done.stdout == (
        b'data: {"number":0,"y":2.0}\n\ndata: {"number":1,"y":4.0}\n\nevent: end\ndata: {"parts":2}\n\n'
    )
    done = run_curl(shared, f"/v2/models/{MODEL}/generate_stream", {"text_input": "a", "kind": "text", "count": 1})
    assert json.loads(done.stdout.removeprefix(b"data: ")) == {
        "model_name": MODEL,
        "model_version": "1.0.0",
        "text_output": "2 ",
    }


@curl
def test_curl_sees_that_a_stream_was_cut(shared: Box) -> None:
    done = run_curl(shared, PREDICT, {"kind": "text", "fail_at": 1})
    assert (done.returncode, done.stdout) == (18, b"2 ")  # 18: a part of the file was transferred
    done = run_curl(shared, PREDICT, {"fail_at": 0}, "-o", "/dev/null", "-w", "%{http_code}")
    assert done.stdout == b"500"


@curl
def test_a_killed_curl_ends_its_stream(shared: Box) -> None:
    url = f"http://127.0.0.1:{shared.http_port}{PREDICT}"
    before = counts(shared)["opened"]
    with subprocess.Popen(
        ["curl", "-sN", "--data-binary", json.dumps(ENDLESS), url], stdout=subprocess.PIPE
    ) as running:
        assert running.stdout is not None
        assert running.stdout.read(6) == b"\0\0\0\1\1\1"
        running.kill()
    until_closed(shared, before + 1)


def test_a_raw_socket_may_read_parts_as_they_come(shared: Box) -> None:
    asked = body({"kind": "text", "sleep_s": 0.05})
    with socket.create_connection(("127.0.0.1", shared.http_port)) as sock:
        head = f"POST {PREDICT} HTTP/1.1\r\nHost: b\r\nContent-Length: {len(asked)}\r\n\r\n"
        sock.sendall(head.encode() + asked)
        read = b""
        while b"0\r\n\r\n" not in read:
            read += sock.recv(65536)
        assert read.partition(b"\r\n\r\n")[2] == b"2\r\n2 \r\n2\r\n4 \r\n2\r\n8 \r\n0\r\n\r\n"


def test_inferctl_prints_parts(shared: Box, tmp_path: Path) -> None:
    asked = tmp_path / "asked.json"
    asked.write_bytes(body({"kind": "text"}))
    assert shared.control("infer", "--stream", MODEL, str(asked)).stdout == "2 4 8 "
    done = shared.control("infer", "--stream", "--json", MODEL, str(asked))
    assert [json.loads(line) for line in done.stdout.splitlines()] == [
        {"seq": 0, "text": "2 "},
        {"seq": 1, "text": "4 "},
        {"seq": 2, "text": "8 "},
    ]
    asked.write_bytes(body({"kind": "json", "fail_at": 1}))
    done = shared.control("infer", "--stream", MODEL, str(asked))
    assert (done.returncode, done.stdout) == (1, '{"number": 0, "y": 2.0}\n')
    assert "handler_failed" in done.stderr


def test_metrics_count_parts(shared: Box) -> None:
    with shared.client() as client:
        assert len(list(client.stream(MODEL, body({"kind": "text"})))) == 3
    with urllib.request.urlopen(f"http://127.0.0.1:{shared.http_port}/metrics") as answer:
        page = answer.read().decode()
    assert 'inferd_stream_parts_total{model="scale",version="1.0.0"}' in page
    assert "inferd_stream_first_part_seconds_bucket" in page


def test_killed_workers_end_their_streams_and_others_are_served(box: Box) -> None:
    with box.client() as client:
        parts = client.stream(MODEL, body(ENDLESS), deadline_ms=120_000)
        next(parts)
        (worker,) = box.status()["models"][0]["workers"]
        os.kill(worker, signal.SIGKILL)
        with pytest.raises(WorkerDiedError):
            for _ in parts:
                pass
        assert len(list(client.stream(MODEL, body({"kind": "text"})))) == 3


def test_a_swap_lets_streams_end_and_routes_new_ones_to_the_new_version(box: Box) -> None:
    seen: list[tuple[int, str]] = []
    failed: list[Exception] = []
    begun = threading.Event()
    stop = threading.Event()

    def follow() -> None:
        try:
            with box.client() as client:
                asked = {"kind": "bytes", "count": 400, "sleep_s": 0.01}
                for part in client.stream(MODEL, body(asked), deadline_ms=120_000):
                    seen.append((part.seq, part.version))
                    begun.set()
        except Exception as error:  # noqa: BLE001  the test shows it
            failed.append(error)
            begun.set()

    def keep_asking() -> None:
        try:
            with box.client() as client:
                while not stop.is_set():
                    client.infer(MODEL, {"x": np.ones((1, FEATURES), dtype=np.float32)})
        except Exception as error:  # noqa: BLE001  as above
            failed.append(error)

    threads = [threading.Thread(target=follow), threading.Thread(target=keep_asking)]
    for thread in threads:
        thread.start()
    assert begun.wait(60)
    assert box.control("deploy", f"{MODEL}@2.0.0").returncode == 0
    stop.set()
    for thread in threads:
        thread.join(90)
    assert failed == []
    assert [seq for seq, _ in seen] == list(range(400))
    assert {version for _, version in seen} == {"1.0.0"}
    with box.client() as client:
        parts = list(client.stream(MODEL, body({"kind": "text"})))
    assert [part.text() for part in parts] == ["3 ", "9 ", "27 "]
    assert {part.version for part in parts} == {"2.0.0"}


def test_a_daemon_that_stops_lets_short_streams_end_and_cuts_endless_ones(template: Path, tmp_path: Path) -> None:
    with copy_box(template, tmp_path / "box") as box:
        box.configure()
        box.config.write_text(box.config.read_text().replace("[serving]", "[serving]\ndrain_timeout_s = 5.0"))
        box.start()
        box.until_serving("1.0.0")
        asked = json.dumps({"kind": "bytes", "count": 10, "sleep_s": 0.01}).encode()
        with socket.create_connection(("127.0.0.1", box.http_port)) as short:
            with socket.create_connection(("127.0.0.1", box.http_port)) as endless:
                for sock, text in ((short, asked), (endless, body(ENDLESS))):
                    head = f"POST {PREDICT} HTTP/1.1\r\nHost: b\r\nContent-Length: {len(text)}\r\n\r\n"
                    sock.sendall(head.encode() + text)
                    sock.settimeout(60)
                    assert sock.recv(17) == b"HTTP/1.1 200 OK\r\n"
                assert box.stop_daemon() == 0
                assert read_all(short).endswith(b"0\r\n\r\n")
                assert not read_all(endless).endswith(b"0\r\n\r\n")


def read_all(sock: socket.socket) -> bytes:
    data = b""
    try:
        while chunk := sock.recv(1 << 16):
            data += chunk
    except ConnectionError:
        pass
    return data
