"""Which GPU a variant's workers run on: the one it is pinned to, else the one with the most free memory. Pure.

All workers of a variant share one GPU, and with it what its driver keeps per process. A variant is placed anew
whenever it is loaded.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from agent.engine.types import VariantSpec
from agent.errors import LoadError, OutOfMemoryError
from agent.gpus import GpuMemory

_MIB = 1024 * 1024


def needs_gpu(variant: VariantSpec) -> bool:
    """Whether there is anything to decide."""
    return variant.device.startswith("cuda")


def placed(variant: VariantSpec, gpus: Sequence[GpuMemory]) -> VariantSpec:
    """Return ``variant`` with its device; unchanged if the box tells of no GPU.

    Raises:
        LoadError: it is pinned to a GPU that is not there.
        OutOfMemoryError: it needs more memory than the GPU has free.
    """
    if not gpus:
        return variant
    if variant.pinned_device:
        chosen = next((gpu for gpu in gpus if f"cuda:{gpu.index}" == variant.pinned_device), None)
        if chosen is None:
            there = ", ".join(f"cuda:{gpu.index}" for gpu in gpus)
            raise LoadError(f"is pinned to {variant.pinned_device} by [[engine.models]]; this box has {there}")
    else:
        chosen = max(gpus, key=lambda gpu: (gpu.free_bytes, -gpu.index))
    if chosen.free_bytes < variant.device_bytes:
        raise OutOfMemoryError(
            f"needs {variant.device_bytes // _MIB} MiB of GPU memory, cuda:{chosen.index} has "
            f"{chosen.free_bytes // _MIB} free"
        )
    device = {"kind": "cuda", "index": chosen.index, "uuid": chosen.uuid}
    return replace(variant, device=f"cuda:{chosen.index}", worker={**variant.worker, "device": device})
