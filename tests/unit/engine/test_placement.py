"""Which GPU a variant gets."""

from __future__ import annotations

from dataclasses import replace

import pytest

from agent.engine.memory import HOST, Need
from agent.engine.placement import placed
from agent.engine.types import VariantSpec
from agent.errors import DeviceLostError, LoadError
from agent.nvml import GpuMemory

GIB = 1 << 30
BOX = tuple(
    GpuMemory(index=index, uuid=f"GPU-{index}", free_bytes=free * GIB) for index, free in enumerate((2, 7, 7, 1))
)


def variant(*, pinned: str = "", needs: int = 0) -> VariantSpec:
    return VariantSpec(
        id="v", runtime="onnx", precision="fp16", device=pinned or "cuda:0", worker={"model": "m"},
        pinned_device=pinned, need=Need(sizes={HOST: 5, pinned or "cuda": needs * GIB}),
    )  # fmt: skip


def test_the_gpu_with_the_most_free_memory_is_taken_and_the_first_of_equals() -> None:
    found = placed(variant(needs=3), BOX, {})
    assert found.device == "cuda:1"
    assert found.need.sizes == {HOST: 5, "cuda:1": 3 * GIB}
    assert found.worker == {"model": "m", "device": {"kind": "cuda", "index": 1, "uuid": "GPU-1"}}


def test_a_pin_beats_free_memory() -> None:
    found = placed(variant(pinned="cuda:3", needs=9), BOX, {})
    assert (found.device, found.need.sizes["cuda:3"]) == ("cuda:3", 9 * GIB)


def test_a_gpu_that_is_not_there_is_named_with_those_that_are() -> None:
    with pytest.raises(LoadError, match=r"pinned to cuda:4 .* this box has cuda:0, cuda:1, cuda:2, cuda:3"):
        placed(variant(pinned="cuda:4"), BOX, {})


def test_a_box_that_does_not_tell_leaves_the_choice_to_cuda() -> None:
    assert placed(variant(), (), {}) == variant()


def test_a_lost_gpu_is_left_for_another() -> None:
    assert placed(variant(), BOX, {"cuda:1": "gone"}).device == "cuda:2"
    assert placed(variant(pinned="cuda:0"), BOX, {"cuda:1": "gone"}).device == "cuda:0"


@pytest.mark.parametrize(("pinned", "box"), [("cuda:1", BOX), ("cuda:1", ()), ("", BOX[1:2]), ("", ())])
def test_what_has_lost_its_last_gpu_says_so(pinned: str, box: tuple[GpuMemory, ...]) -> None:
    with pytest.raises(DeviceLostError, match="cuda:1 is lost: fallen off the bus"):
        placed(variant(pinned=pinned), box, {"cuda:1": "fallen off the bus"})


MIXED = (
    GpuMemory(index=0, uuid="GPU-0", free_bytes=9 * GIB, compute="7.5"),
    GpuMemory(index=1, uuid="GPU-1", free_bytes=2 * GIB, compute="8.9"),
    GpuMemory(index=2, uuid="GPU-2", free_bytes=1 * GIB),  # it does not tell
)


@pytest.mark.parametrize(
    ("least", "device"), [("", "cuda:0"), ("7.5", "cuda:0"), ("8.0", "cuda:1"), ("10.0", "cuda:2")]
)
def test_free_memory_decides_between_gpus_that_are_capable_only(least: str, device: str) -> None:
    assert placed(replace(variant(), compute_min=least), MIXED, {}).device == device


def test_what_no_gpu_that_is_left_can_run_says_so() -> None:
    with pytest.raises(LoadError, match=r"needs compute capability 8\.0; cuda:0 has 7\.5$"):
        placed(replace(variant(), compute_min="8.0"), MIXED[:2], {"cuda:1": "gone"})
    with pytest.raises(LoadError, match=r"needs compute capability 8\.0; cuda:0 has 7\.5$"):
        placed(replace(variant(pinned="cuda:0"), compute_min="8.0"), MIXED, {})
