"""Which GPU a variant's workers run on: the one it is pinned to, else the capable one with the most free memory. Pure.

All workers of a variant share one GPU, and with it what its driver keeps per process. A variant is placed anew
whenever it is loaded.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from agent.engine.types import VariantSpec
from agent.errors import DeviceLostError, LoadError
from agent.nvml import GpuMemory


def needs_gpu(variant: VariantSpec) -> bool:
    """Whether there is anything to decide."""
    return variant.device.startswith("cuda")


def placed(variant: VariantSpec, gpus: Sequence[GpuMemory], lost: Mapping[str, str]) -> VariantSpec:
    """Return ``variant`` with its device; unchanged if the box tells of no GPU.

    Args:
        variant: One that needs a GPU.
        gpus: Those that tell of their memory.
        lost: Why a device is lost, by its name (``cuda:0``).

    Raises:
        DeviceLostError: the GPU it is pinned to is lost, or there is no other left.
        LoadError: it is pinned to a GPU that is not there, or none that is left is capable of it.
    """
    pin = variant.pinned_device
    here = {name: gpu for gpu in gpus if (name := f"cuda:{gpu.index}") not in lost}
    if pin in lost or (lost and not here and not pin):
        gone = [pin] if pin else sorted(lost)
        raise DeviceLostError("; ".join(f"{name} is lost: {lost[name]}" for name in gone))
    if not here:
        return variant
    if pin and pin not in here:
        raise LoadError(f"is pinned to {pin} by [[engine.models]]; this box has {', '.join(here)}")
    capable = {name: gpu for name, gpu in here.items() if _capable(gpu, variant.compute_min)}
    if not capable or (pin and pin not in capable):
        asked = {pin: here[pin]} if pin else here
        there = ", ".join(f"{name} has {gpu.compute}" for name, gpu in asked.items())
        raise LoadError(f"needs compute capability {variant.compute_min}; {there}")
    device = pin or max(capable, key=lambda name: (capable[name].free_bytes, -capable[name].index))
    chosen = here[device]
    sizes = {device if place in ("cuda", device) else place: size for place, size in variant.need.sizes.items()}
    return replace(
        variant,
        device=device,
        need=replace(variant.need, sizes=sizes),
        worker={**variant.worker, "device": {"kind": "cuda", "index": chosen.index, "uuid": chosen.uuid}},
    )


def _capable(gpu: GpuMemory, least: str) -> bool:
    return not gpu.compute or not least or _numbers(gpu.compute) >= _numbers(least)


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(".") if part.isdigit())
