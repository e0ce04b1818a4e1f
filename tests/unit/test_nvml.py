"""NVML behind its port: several GPUs, one that is lost, drivers in every kind of trouble."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from pathlib import Path

import pynvml
import pytest

from agent.clock import SystemClock
from agent.events import EventBus
from agent.gpus import GpuWatch, changes
from agent.metrics import Metrics
from agent.nvml import Fault, Nvml, NvmlError, Reading, Unread
from agent.probe import probe, readings
from agent.profile import choose, load_profiles
from tests.fakes.nvml import GIB, Board, FakeDriver

pytestmark = pytest.mark.unit


def two() -> FakeDriver:
    return FakeDriver([Board(uuid="GPU-a"), Board(name="A2", uuid="GPU-b", compute=(8, 6), memory_bytes=8 * GIB)])


def machine(root: Path) -> Path:
    """Return the root of a machine with a driver's device file."""
    (root / "dev").mkdir(parents=True)
    (root / "dev/nvidiactl").touch()
    return root


def test_several_gpus_are_told_apart() -> None:
    with two().opened() as nvml:
        found = nvml.inventory()
    assert (found.driver, found.cuda) == ("550.54.14", "12.4")
    assert [(gpu.index, gpu.name, gpu.uuid, gpu.compute) for gpu in found.gpus] == [
        (0, "Tesla T4", "GPU-a", "7.5"),
        (1, "A2", "GPU-b", "8.6"),
    ]


def test_a_reading_has_what_the_board_offers() -> None:
    driver = FakeDriver([Board(lacks=frozenset({"power", "utilisation"}))])
    with driver.opened() as nvml:
        reading = nvml.read("GPU-0")
    assert reading == Reading(memory_used_bytes=GIB, memory_free_bytes=15 * GIB, temperature_c=41)


def test_a_lost_gpu_does_not_hide_the_other() -> None:
    driver = two()
    driver.boards[0].lost = True
    with driver.opened() as nvml:
        found = nvml.inventory()
        with pytest.raises(NvmlError) as lost:
            nvml.read("GPU-a")
    assert [gpu.uuid for gpu in found.gpus] == ["GPU-b"]
    assert found.faults[0].startswith("GPU 0: the GPU has fallen off the bus")
    assert lost.value.fault is Fault.LOST


def test_a_gpu_that_is_not_enumerated_any_more_is_lost() -> None:
    driver = two()
    with driver.opened() as nvml:
        assert len(nvml.inventory().gpus) == 2
    driver.boards[0].lost = True
    hardware = probe(nvml=two().opened, root=Path("/nonexistent"))
    assert not hardware.gpus
    with driver.opened() as nvml, pytest.raises(NvmlError) as lost:
        nvml.read("GPU-a")
    assert lost.value.fault is Fault.LOST


@pytest.mark.parametrize(
    ("code", "fault", "advice"),
    [
        (pynvml.NVML_ERROR_LIBRARY_NOT_FOUND, Fault.NO_LIBRARY, "libnvidia-ml.so.1 is missing"),
        (pynvml.NVML_ERROR_DRIVER_NOT_LOADED, Fault.NO_DRIVER, "kernel driver is not loaded"),
        (pynvml.NVML_ERROR_LIB_RM_VERSION_MISMATCH, Fault.MISMATCH, "different versions; reboot"),
        (pynvml.NVML_ERROR_NO_PERMISSION, Fault.NO_PERMISSION, "add the user that runs inferd"),
        (pynvml.NVML_ERROR_UNKNOWN, Fault.OTHER, "NVML: Unknown Error"),
    ],
)
def test_a_driver_in_trouble_is_explained_and_the_box_is_a_cpu_box(
    tmp_path: Path, code: int, fault: Fault, advice: str
) -> None:
    driver = FakeDriver(failing=code)
    with pytest.raises(NvmlError, match=advice) as caught:
        driver.opened().__enter__()
    assert caught.value.fault is fault
    hardware = probe(root=machine(tmp_path), nvml=driver.opened, cores=8, memory_bytes=16 * GIB)
    assert not hardware.gpus
    assert advice in hardware.gpu_reason
    choice = choose("auto", hardware, load_profiles())
    assert choice.profile.name == "cpu-large"
    assert advice in choice.reason
    cuda = next(seen for seen in choice.considered if seen.name == "cuda")
    assert advice in cuda.failed[0]


def test_the_real_binding_fails_with_our_errors_only() -> None:
    with contextlib.suppress(NvmlError):
        with Nvml() as nvml:
            assert nvml.inventory().driver


def test_a_driver_that_is_not_there_is_not_asked(tmp_path: Path) -> None:
    def never() -> Nvml:
        raise AssertionError("the library costs memory")

    hardware = probe(root=tmp_path, nvml=never)
    assert hardware.gpu_reason == "no NVIDIA driver is loaded"


@pytest.mark.parametrize(
    ("lost", "now", "expected"),
    [
        ((), {"a": Reading()}, ([], [])),
        ((), {"a": Unread(fault=Fault.LOST, reason="x")}, (["a"], [])),
        (("a",), {"a": Unread(fault=Fault.LOST, reason="x")}, ([], [])),
        (("a",), {"a": Reading()}, ([], ["a"])),
        (("a",), {"a": Unread(fault=Fault.OTHER, reason="x")}, ([], [])),
        ((), {"a": Unread(fault=Fault.MISMATCH, reason="x"), "b": Reading()}, ([], [])),
    ],
)
def test_only_what_nvml_calls_lost_is_lost(lost: tuple[str, ...], now: dict, expected: tuple) -> None:
    assert changes(lost, now) == expected


def watching(driver, root, told, metrics=None, read=None, **options):
    hardware = probe(root=machine(root), nvml=driver.opened)
    events = EventBus(SystemClock())
    watch = GpuWatch(
        hardware.gpus,
        read=read or (lambda: readings(hardware, driver.opened)),
        interval_s=1.0,
        clock=SystemClock(),
        events=events,
        metrics=metrics or Metrics(),
        on_lost=lambda device, reason: told.append(f"lost {device}"),
        on_back=lambda device: told.append(f"back {device}"),
        **options,
    )
    return watch, events


def test_a_loss_is_told_once_and_so_is_the_return(tmp_path: Path) -> None:
    driver, told, metrics = two(), [], Metrics()
    watch, events = watching(driver, tmp_path, told, metrics)

    async def story() -> None:
        await watch.look()
        driver.boards[1].lost = True
        for _ in range(3):
            await watch.look()
        assert 'inferd_gpu_up{gpu="1",uuid="GPU-b"} 0.0' in metrics.render().decode()
        driver.failing = pynvml.NVML_ERROR_TIMEOUT
        await watch.look()
        driver.failing, driver.boards[1].lost = 0, False
        await watch.look()

    asyncio.run(story())
    assert told == ["lost cuda:1", "back cuda:1"]
    assert [event.type for event in events.recent()] == ["gpu.lost", "gpu.back"]
    text = metrics.render().decode()
    assert 'inferd_gpu_temperature_celsius{gpu="0",uuid="GPU-a"} 41.0' in text
    assert 'inferd_gpu_power_watts{gpu="0",uuid="GPU-a"} 28.5' in text
    assert 'inferd_gpu_memory_free_bytes{gpu="1",uuid="GPU-b"}' in text
    assert 'inferd_gpu_up{gpu="1",uuid="GPU-b"} 1.0' in text


def test_a_driver_that_does_not_answer_costs_one_thread(tmp_path: Path) -> None:
    release, asked = threading.Event(), []

    def read() -> dict:
        asked.append(1)
        release.wait(60)
        return {"GPU-0": Reading(temperature_c=50)}

    told: list[str] = []
    watch, events = watching(FakeDriver(), tmp_path, told, read=read, answer_timeout_s=0.01)

    async def story() -> None:
        for _ in range(3):
            await watch.look()
        assert asked == [1]
        assert [event.type for event in events.recent()] == ["gpu.silent"]
        release.set()
        async with asyncio.timeout(60):
            while not watch.seen:
                await watch.look()

    asyncio.run(story())
    assert watch.seen["GPU-0"] == Reading(temperature_c=50)
    assert not told
