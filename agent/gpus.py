"""The GPUs' free memory, asked of NVML when it matters; who uses which GPU changes all the time.

What GPUs there are and what they can do is ``profile.py``'s. Never raises: a box whose driver does not tell has none.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class GpuMemory:
    """One GPU at one moment."""

    index: int  # as NVML, and CUDA by PCI order, count
    uuid: str
    free_bytes: int


def free_memory() -> tuple[GpuMemory, ...]:
    """Return every GPU that tells; blocks for milliseconds, or seconds if no process holds the driver."""
    import pynvml  # here, because it costs 5 MB that a CPU box need not pay

    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return ()
    try:
        handles = [pynvml.nvmlDeviceGetHandleByIndex(index) for index in range(pynvml.nvmlDeviceGetCount())]
        return tuple(
            GpuMemory(
                index=index,
                uuid=str(pynvml.nvmlDeviceGetUUID(handle)),
                free_bytes=int(pynvml.nvmlDeviceGetMemoryInfo(handle).free),
            )
            for index, handle in enumerate(handles)
        )
    except pynvml.NVMLError:  # a lost GPU, or a Jetson, whose memory is the host's
        return ()
    finally:
        pynvml.nvmlShutdown()
