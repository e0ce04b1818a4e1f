"""Reading memory: this process as if it were a worker, and GPUs behind their port."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Mapping
from pathlib import Path

import pynvml
import pytest

from agent.engine.memory import HOST
from agent.engine.meter import NvmlDevices, SystemMeter, available_bytes
from agent.nvml import Nvml
from agent.probe import probe
from agent.profile import Hardware
from tests.fakes.nvml import GIB, Board, FakeDriver

pytestmark = pytest.mark.unit


class FakeGpus:
    """Two GPUs; one process holds something of the second."""

    def read(self) -> Mapping[str, tuple[int, int]]:
        return {"cuda:0": (1000, 900), "cuda:1": (2000, 500)}

    def used_by(self, pid: int) -> Mapping[str, int]:
        return {"cuda:1": 300} if pid == os.getpid() else {}


def test_each_gpu_is_a_place_with_a_share_for_models() -> None:
    rooms = SystemMeter(budget_bytes=123, device_share=0.5, devices=FakeGpus()).rooms()
    assert rooms[HOST].budget_bytes == 123
    assert 0 < rooms[HOST].available_bytes <= available_bytes() * 2
    assert {name: (room.budget_bytes, room.available_bytes) for name, room in rooms.items() if name != HOST} == {
        "cuda:0": (500, 900),
        "cuda:1": (1000, 500),
    }


def test_a_worker_takes_what_it_does_not_share_at_its_highest() -> None:
    meter = SystemMeter(devices=FakeGpus())
    before = meter.worker(os.getpid())[HOST]
    ballast = bytearray(os.urandom(64 << 20))
    del ballast
    after = meter.worker(os.getpid())
    assert after[HOST] >= max(before, 64 << 20)
    assert after["cuda:1"] == 300


def test_a_process_that_is_gone_takes_nothing() -> None:
    assert SystemMeter().worker(1 << 22) == {}


def box() -> FakeDriver:
    return FakeDriver([Board(uuid="GPU-a", held={7: 11}), Board(uuid="GPU-b")])


def hardware(driver: FakeDriver, root: Path) -> Hardware:
    (root / "dev").mkdir(parents=True)
    (root / "dev/nvidiactl").touch()
    return probe(root=root, nvml=driver.opened)


def test_a_lost_gpu_has_nothing_free_and_the_others_go_on(tmp_path: Path) -> None:
    driver = box()
    devices = NvmlDevices(hardware(driver, tmp_path), driver.opened)
    assert devices.read() == {"cuda:0": (16 * GIB, 15 * GIB), "cuda:1": (16 * GIB, 15 * GIB)}
    driver.boards[1].lost = True
    assert devices.read() == {"cuda:0": (16 * GIB, 15 * GIB), "cuda:1": (0, 0)}
    assert devices.used_by(7) == {"cuda:0": 11}
    assert devices.used_by(8) == {}


def test_a_driver_that_cannot_be_used_any_more_has_nothing_free(tmp_path: Path) -> None:
    driver = box()
    devices = NvmlDevices(hardware(driver, tmp_path), driver.opened)
    driver.failing = pynvml.NVML_ERROR_LIB_RM_VERSION_MISMATCH
    assert devices.read() == {"cuda:0": (0, 0), "cuda:1": (0, 0)}
    assert devices.used_by(7) == {}


def test_a_driver_that_does_not_answer_is_waited_for_once(tmp_path: Path) -> None:
    driver, release, opened = box(), threading.Event(), []
    machine = hardware(driver, tmp_path)

    def hanging() -> Nvml:
        opened.append(1)
        release.wait(90)
        return driver.opened()

    devices = NvmlDevices(machine, hanging, patience_s=0.05)
    for _ in range(3):
        assert devices.read() == {"cuda:0": (0, 0), "cuda:1": (0, 0)}
    assert opened == [1]
    release.set()
    deadline = time.monotonic() + 90
    while devices.read()["cuda:1"] == (0, 0):
        assert time.monotonic() < deadline
    assert devices.used_by(7) == {"cuda:0": 11}
