"""What a runtime's foreign exception means, by its text: native code raises ``RuntimeError`` for everything. Pure."""

from __future__ import annotations

from typing import Final

# Host and device allocators: ONNX Runtime's arena, torch's CPU and CUDA allocators, cuBLAS and cuDNN workspaces.
_MEMORY: Final = (
    "bad_alloc", "failed to allocate", "out of memory", "bfcarena", "allocate memory", "not enough memory",
    "alloc_failed", "memoryallocation", "cudnn_status_internal_error_host_allocation_failed",
)  # fmt: skip
# After these a CUDA context answers every further call with the same error.
_DEVICE_LOST: Final = (
    "illegal memory access", "illegal instruction", "misaligned address", "unspecified launch failure",
    "device-side assert", "launch timed out", "uncorrectable ecc", "gpu is lost", "device lost",
    "context is destroyed", "hardware stack error", "cuda failure 46", "unknown error",
)  # fmt: skip


def is_memory(error: BaseException) -> bool:
    """Whether memory of the host or of a device did not suffice."""
    text = str(error).lower()
    return isinstance(error, MemoryError) or any(sign in text for sign in _MEMORY)


def is_device_loss(error: BaseException) -> bool:
    """Whether the CUDA device, or this process' context on it, is of no use any more."""
    text = str(error).lower()
    return ("cuda" in text or "gpu" in text) and any(sign in text for sign in _DEVICE_LOST)
