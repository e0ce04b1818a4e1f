"""Reading memory: this process as if it were a worker, and GPUs behind their port."""

from __future__ import annotations

import os
from collections.abc import Mapping

import pytest

from agent.engine.memory import HOST
from agent.engine.meter import NvmlDevices, SystemMeter, available_bytes

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


class FakeNvml:
    """The part of ``pynvml`` that is used; the second device is lost."""

    class Info:
        total, free = 80, 70

    class Process:
        pid, usedGpuMemory = 7, 11  # noqa: N815 (NVML's own name)

    def __init__(self, error: type[Exception]) -> None:
        self._error = error

    def nvmlDeviceGetHandleByIndex(self, index: int) -> int:  # noqa: N802
        if index:
            raise self._error(15)
        return index

    def nvmlDeviceGetMemoryInfo(self, _handle: int) -> Info:  # noqa: N802
        return self.Info()

    def nvmlDeviceGetComputeRunningProcesses(self, _handle: int) -> list[Process]:  # noqa: N802
        return [self.Process()]


def test_a_lost_gpu_has_nothing_free_and_the_others_go_on() -> None:
    pynvml = pytest.importorskip("pynvml")
    devices = NvmlDevices(2, nvml=FakeNvml(pynvml.NVMLError))
    assert devices.read() == {"cuda:0": (80, 70), "cuda:1": (0, 0)}
    assert devices.used_by(7) == {"cuda:0": 11}
    assert devices.used_by(8) == {}
