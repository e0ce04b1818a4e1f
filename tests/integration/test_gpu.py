"""Workers on a real CUDA device: both runtimes, in the sandbox's profile for it. Skipped where there is none."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from agent.probe import free_memory, probe
from agent.worker import landlock
from tests.fakes import models, torch_models
from tests.fakes.daemon_side import ZygoteProcess
from tests.fakes.models import LINEAR_SIGNATURE, WEIGHTS

NODES = ("/dev/nvidiactl", "/dev/nvhost-gpu")
pytestmark = [
    pytest.mark.integration,
    pytest.mark.gpu,
    pytest.mark.skipif(not any(Path(node).exists() for node in NODES), reason="no CUDA device"),
]
X = np.arange(8, dtype=np.float32).reshape(2, 4)


def on_gpu(spec: dict[str, Any]) -> dict[str, Any]:
    """Return ``spec`` for the first GPU, as the engine places it."""
    device: dict[str, Any] = {"kind": "cuda", "index": 0}
    if found := free_memory(probe()):
        device["uuid"] = found[0].uuid
    return spec | {"device": device, "limits": {"memory_bytes": 1 << 30, "open_files": 256}}


def cuda_of_torch() -> bool:
    if importlib.util.find_spec("torch") is None:
        return False
    import torch

    return bool(torch.cuda.is_available())


def providers() -> list[str]:
    import onnxruntime

    return list(onnxruntime.get_available_providers())


@pytest.fixture(scope="module")
def onnx() -> Iterator[ZygoteProcess]:
    process = ZygoteProcess()
    yield process
    process.close()


@pytest.mark.parametrize("provider", ["CUDAExecutionProvider", "TensorrtExecutionProvider"])
def test_onnx_runtime_really_runs_on_the_provider(onnx: ZygoteProcess, tmp_path: Path, provider: str) -> None:
    if provider not in providers():
        pytest.skip(f"this onnxruntime has no {provider}")
    spec = on_gpu(models.bundle(tmp_path, models.linear(), LINEAR_SIGNATURE))
    worker = onnx.fork(spec | {"providers": [provider, "CUDAExecutionProvider"][: 2 - ("CUDA" in provider)]})
    hello = worker.hello()
    assert (hello["provider"], hello["device"]) == (provider, "cuda:0")
    assert hello["placement"][provider] >= 1
    assert hello["sandbox"]["profile"] == "cuda"
    if landlock.abi():
        assert hello["sandbox"]["level"] == "full"
    np.testing.assert_allclose(worker.infer({"x": X})["y"], X @ WEIGHTS, rtol=1e-2)
    worker.close()


@pytest.mark.torch
@pytest.mark.skipif(not cuda_of_torch(), reason="torch with CUDA is not installed")
@pytest.mark.parametrize("suffix", ["pt", "pt2"])
@pytest.mark.parametrize("graphs", [False, True], ids=["eager", "graphs"])
def test_torch_runs_on_the_device_with_and_without_graphs(
    torch_files: Path, tmp_path: Path, suffix: str, graphs: bool
) -> None:
    zygote = ZygoteProcess("torch" if suffix == "pt" else "torch-export")
    spec = on_gpu(torch_models.bundle(tmp_path, torch_files / f"linear.{suffix}", LINEAR_SIGNATURE))
    worker = zygote.fork(spec | {"session": {"cuda_graphs": graphs}})
    hello = worker.hello()
    assert (hello["provider"], hello["device"]) == ("torch cuda", "cuda:0")
    assert hello["memory"]["device_peak_bytes"] > 0
    assert hello["sandbox"]["profile"] == "cuda"
    for rows in (*range(1, 9), 1, 8):  # more shapes than graphs are kept for
        x = np.random.default_rng(rows).standard_normal((rows, 4)).astype(np.float32)
        np.testing.assert_allclose(worker.infer({"x": x})["y"], x @ WEIGHTS, rtol=1e-2, atol=1e-3)
    worker.close()
    zygote.close()


@pytest.mark.torch
@pytest.mark.skipif(not cuda_of_torch(), reason="torch with CUDA is not installed")
def test_device_memory_that_does_not_suffice_is_an_error_of_its_request(torch_files: Path, tmp_path: Path) -> None:
    zygote = ZygoteProcess("torch")
    signature = {
        "inputs": [{"name": "count", "dtype": "int64", "shape": []}],
        "outputs": [{"name": "y", "dtype": "float32", "shape": [None]}],
    }
    worker = zygote.fork(on_gpu(torch_models.bundle(tmp_path, torch_files / "greedy.pt", signature)))
    worker.hello()
    for count, kind in ((2, "result"), (1 << 22, "error"), (2, "result")):
        worker.post({"count": np.int64(count)})
        header = worker.receive().header
        assert (header["kind"], header.get("code", "out_of_memory")) == (kind, "out_of_memory")
    worker.close()
    zygote.close()
