"""The engine's ladder across runtimes and devices, with GPUs that only the test says are there."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from agent.engine.memory import HOST, Need
from agent.engine.meter import SystemMeter
from agent.engine.types import VariantSpec, VersionSpec
from agent.errors import OutOfMemoryError
from agent.nvml import GpuMemory
from tests.fakes import torch_models
from tests.integration.test_engine import bench, run, until
from tests.models import scale_version

pytestmark = pytest.mark.integration
GPUS = (
    GpuMemory(index=0, uuid="GPU-a", free_bytes=1 << 30),
    GpuMemory(index=1, uuid="GPU-b", free_bytes=8 << 30),
)


class Gpus:
    """Their memory, as the account of memory asks for it."""

    def read(self) -> Mapping[str, tuple[int, int]]:
        return {f"cuda:{gpu.index}": (16_000 << 20, gpu.free_bytes) for gpu in GPUS}

    def used_by(self, pid: int) -> Mapping[str, int]:
        return {}


def on_gpu(variant: VariantSpec, **changes: object) -> VariantSpec:
    """Return the variant for a GPU, executed by the CPU all the same."""
    worker = {**variant.worker, "device": {"kind": "cuda", "index": 0}}
    return replace(variant, device="cuda:0", worker=worker, **changes)  # type: ignore[arg-type]


def load(folder: Path, variants: Sequence[VariantSpec], spec: VersionSpec) -> dict[str, object]:
    """Load the variants in an engine with two GPUs; return the status."""
    seen: dict[str, object] = {}

    async def story() -> None:
        async with bench(folder, gpus=lambda: GPUS, meter=SystemMeter(devices=Gpus())) as box:
            version = await box.engine.load(replace(spec, variants=tuple(variants)))
            box.engine.activate(version)
            assert (await box.ask())["y"] == 2.0
            seen.update(version.status())

    run(story)
    return seen


def test_a_worker_is_told_the_gpu_with_the_most_free_memory(tmp_path: Path) -> None:
    spec = scale_version(tmp_path / "bundle")
    status = load(tmp_path, [on_gpu(spec.variants[0])], spec)
    assert status["device"] == "cuda:1"
    sandbox = status["sandbox"]
    assert isinstance(sandbox, dict)
    assert sandbox["profile"] == "cuda"


def test_a_pin_is_kept(tmp_path: Path) -> None:
    spec = scale_version(tmp_path / "bundle")
    assert load(tmp_path, [on_gpu(spec.variants[0], pinned_device="cuda:0")], spec)["device"] == "cuda:0"


def test_a_variant_that_no_gpu_has_room_for_gives_way_to_the_next(tmp_path: Path) -> None:
    spec = scale_version(tmp_path / "bundle", factors=(2.0, 2.0))
    greedy, plain = spec.variants
    need = Need(sizes={HOST: 0, "cuda": 16 << 30})
    status = load(tmp_path, [on_gpu(greedy, need=need), plain], spec)
    assert (status["variant"], status["device"]) == (plain.id, "cpu")
    assert status["fallbacks"] == [
        {
            "variant": greedy.id,
            "code": OutOfMemoryError.code,
            "reason": "it needs 16384 MiB of cuda:1's memory, models may take 12800",
        }
    ]


def test_a_variant_moves_to_another_gpu_when_its_own_is_lost_and_falls_with_the_last(tmp_path: Path) -> None:
    async def story() -> None:
        spec = scale_version(tmp_path / "bundle", factors=(2.0, 3.0))
        first, second = spec.variants
        async with bench(tmp_path, gpus=lambda: GPUS) as box:
            version = await box.engine.load(replace(spec, variants=(on_gpu(first), second)))
            box.engine.activate(version)
            served = []
            for lost in ("", "cuda:1", "cuda:0"):
                if lost:
                    box.engine.device_lost(lost, "fallen off the bus")
                await until(lambda: version.ready)
                served.append((await box.ask()).get("y"))
                served.append(version.status()["device"])
            assert served == [2.0, "cuda:1", 2.0, "cuda:0", 3.0, "cpu"]
            assert [skip["code"] for skip in version.skipped] == ["device_lost"]
            box.engine.device_back("cuda:1")
            await until(lambda: version.status()["device"] == "cuda:1")
            assert (await box.ask())["y"] == 2.0
            assert not version.skipped

    run(story)


@pytest.mark.torch
@pytest.mark.skipif(bool(torch_models.MISSING), reason=torch_models.MISSING)
def test_a_broken_onnx_file_gives_way_to_torch(tmp_path: Path, torch_files: Path) -> None:
    spec = scale_version(tmp_path / "bundle", factors=(None,))
    (broken,) = spec.variants
    shutil.copyfile(torch_files / "double.pt", tmp_path / "bundle/double.pt")
    worker = {**broken.worker, "variant": "torch", "runtime": "torch", "providers": [], "entry": "double.pt"}
    other = replace(broken, id="torch", runtime="torch", worker=worker)
    status = load(tmp_path, [broken, other], spec)
    assert (status["variant"], status["provider"]) == ("torch", "torch cpu")
    (fallback,) = status["fallbacks"]  # type: ignore[misc]
    assert (fallback["variant"], fallback["code"]) == (broken.id, "unloadable")
