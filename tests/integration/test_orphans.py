"""A daemon that is killed takes its processes with it, those included that hear nothing any more."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from agent.wire import encode
from tests.box import MODEL, Box, copy_box

pytestmark = pytest.mark.integration


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store with scale 1.0.0, whose handler can be made to hang, made once."""
    folder = tmp_path_factory.mktemp("store") / "box"
    with Box(folder, fresh=True) as box:
        box.make_store()
        box.publish_scale("1.0.0", handler="odd")
    return folder


@pytest.fixture
def box(template: Path, tmp_path: Path) -> Iterator[Box]:
    with copy_box(template, tmp_path / "box") as box:
        box.configure()
        yield box


def living(processes: list[psutil.Process]) -> list[psutil.Process]:
    """Those that still run: one that nobody has collected yet does not."""
    return [process for process in processes if process.is_running() and process.status() != psutil.STATUS_ZOMBIE]


def hang(box: Box) -> list[psutil.Process]:
    """Let the model's worker hang in its handler; return the daemon's processes."""
    assert box.daemon is not None
    processes = psutil.Process(box.daemon.pid).children(recursive=True)
    assert {process.name() for process in processes} == {"inferd-zygote", "inferd-worker"}
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(str(box.socket))
        asked = {"kind": "infer", "id": 1, "model": MODEL, "content_type": "text/plain", "deadline_ms": 500}
        client.sendall(b"".join(bytes(part) for part in encode(asked, (b"hang",))))
        assert b"deadline_exceeded" in client.recv(4096)
    return processes


def test_a_worker_that_hangs_does_not_outlive_a_killed_daemon(box: Box) -> None:
    box.start()
    box.until_serving()
    processes = hang(box)
    daemon, box.daemon = box.daemon, None
    assert daemon is not None
    daemon.kill()
    daemon.wait()
    box.until(lambda: not living(processes), what="no process is left", timeout_s=90)


def test_a_worker_that_nobody_could_see_out_is_found_by_the_next_daemon(box: Box) -> None:
    box.start()
    box.until_serving()
    processes = hang(box)
    (worker,) = [process for process in processes if process.name() == "inferd-worker"]
    (zygote,) = [process for process in processes if process.name() == "inferd-zygote"]
    zygote.kill()
    box.until(lambda: not living([zygote]), what="the zygote is gone", timeout_s=90)
    daemon, box.daemon = box.daemon, None
    assert daemon is not None
    daemon.kill()
    daemon.wait()
    assert living([worker])
    box.start()
    box.until(lambda: not living([worker]), what="the worker is gone", timeout_s=90)
    box.until_serving()
