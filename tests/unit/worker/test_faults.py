"""What runtimes say when memory or a device is gone, as it was seen or as their sources have it."""

from __future__ import annotations

import pytest

from agent.worker.runtimes import faults


@pytest.mark.parametrize(
    "text",
    [
        "[enforce fail at alloc_cpu.cpp:128] err == 0. DefaultCPUAllocator: can't allocate memory: you tried",
        "CUDA out of memory. Tried to allocate 4.00 TiB. GPU 0 has a total capacity of 139.80 GiB",
        "[ONNXRuntimeError] : 6 : RUNTIME_EXCEPTION : Non-zero status code returned while running Mul node. "
        "bfc_arena.cc:376 void* onnxruntime::BFCArena::AllocateRawInternal Failed to allocate memory for requested",
        "CUDA failure 2: out of memory ; GPU=0 ; hostname=box ; expr=cudaMalloc((void**)&p, size);",
        "CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
        "std::bad_alloc",
    ],
)
def test_memory_that_did_not_suffice(text: str) -> None:
    assert faults.is_memory(RuntimeError(text))
    assert not faults.is_device_loss(RuntimeError(text))


@pytest.mark.parametrize(
    "text",
    [
        "CUDA error: an illegal memory access was encountered",
        "CUDA error: device-side assert triggered",
        "CUDA error: unspecified launch failure",
        "CUDA failure 700: an illegal memory access was encountered ; GPU=0 ; hostname=box",
        "CUDA error: uncorrectable ECC error encountered",
    ],
)
def test_a_device_that_is_lost(text: str) -> None:
    assert faults.is_device_loss(RuntimeError(text))
    assert not faults.is_memory(RuntimeError(text))


@pytest.mark.parametrize("text", ["mat1 and mat2 shapes cannot be multiplied (2x3 and 4x3)", "unknown error", ""])
def test_an_ordinary_fault(text: str) -> None:
    assert not faults.is_device_loss(RuntimeError(text))
    assert not faults.is_memory(RuntimeError(text))


def test_pythons_own_needs_no_text() -> None:
    assert faults.is_memory(MemoryError())
