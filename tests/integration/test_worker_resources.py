"""What further workers of a model share and where they run: weights in external data files, cores."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from tests.fakes import models
from tests.fakes.daemon_side import ZygoteProcess

pytestmark = pytest.mark.integration
SIZE = 2048  # 16 MiB of float32 weights
WEIGHT_BYTES = 4 * SIZE * SIZE


@pytest.fixture(scope="module")
def zygote() -> Iterator[ZygoteProcess]:
    process = ZygoteProcess()
    yield process
    process.close()


def external(folder: Path, nodes: Any, shape: list[Any], weights: np.ndarray, **changes: Any) -> dict[str, Any]:
    """Write a bundle of ``y = f(x, w)`` with the weights in a file of their own; return its spec."""
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, shape)],
        [numpy_helper.from_array(weights, "w")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=10)
    tensor = {"dtype": "float32", "shape": shape}
    signature = {"inputs": [{"name": "x", **tensor}], "outputs": [{"name": "y", **tensor}]}
    spec = models.bundle(folder, model, signature, **changes)
    onnx.save(
        model,
        Path(spec["bundle_dir"]) / spec["entry"],
        save_as_external_data=True,
        location="model.data",
        size_threshold=1024,
    )
    return spec


def matmul(folder: Path, **changes: Any) -> dict[str, Any]:
    weights = np.random.default_rng(1).standard_normal((SIZE, SIZE)).astype(np.float32)
    return external(folder, [helper.make_node("MatMul", ["x", "w"], ["y"])], ["N", SIZE], weights, **changes)


def convolution(folder: Path, **changes: Any) -> dict[str, Any]:
    channels = SIZE // 2
    weights = np.random.default_rng(1).standard_normal((channels, channels, 2, 2)).astype(np.float32)
    node = helper.make_node("Conv", ["x", "w"], ["y"], kernel_shape=[2, 2], pads=[1, 1, 0, 0])
    return external(folder, [node], ["N", channels, 2, 2], weights, **changes)


def anonymous_bytes(pid: int) -> int:
    """Return the memory of a process that no file backs, and that it so shares with nobody who loaded the same."""
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
        if line.startswith("Anonymous:"):
            return int(line.split()[1]) * 1024
    raise AssertionError("no such line")


@pytest.mark.parametrize("make", [matmul, convolution])
def test_shared_weights_stay_in_the_pages_of_their_file(zygote: ZygoteProcess, tmp_path: Path, make: Any) -> None:
    held, outputs = {}, {}
    for shared in (False, True):
        spec = make(tmp_path, share_weights=shared)
        worker = zygote.fork(spec)
        worker.hello()
        shape = [1 if size == "N" else size for size in spec["signature"]["inputs"][0]["shape"]]
        outputs[shared] = worker.infer({"x": np.ones(shape, dtype=np.float32)})["y"]
        held[shared] = anonymous_bytes(worker.pid)
        worker.close()
    assert held[False] - held[True] > 0.75 * WEIGHT_BYTES
    np.testing.assert_allclose(outputs[True], outputs[False], rtol=1e-3, atol=1e-2)


def test_a_worker_says_which_cores_it_is_bound_to(zygote: ZygoteProcess, tmp_path: Path) -> None:
    core = max(os.sched_getaffinity(0))
    worker = zygote.fork(models.bundle(tmp_path, models.linear(), models.LINEAR_SIGNATURE, cores=[core]))
    assert worker.hello()["cores"] == [core]
    threads = Path(f"/proc/{worker.pid}/task").iterdir()
    assert {frozenset(os.sched_getaffinity(int(thread.name))) for thread in threads} == {frozenset({core})}
    worker.close()


def test_a_core_that_is_not_there_keeps_nobody_from_serving(zygote: ZygoteProcess, tmp_path: Path) -> None:
    worker = zygote.fork(models.bundle(tmp_path, models.linear(), models.LINEAR_SIGNATURE, cores=[1000]))
    assert worker.hello()["cores"] == sorted(os.sched_getaffinity(0))
    assert worker.infer({"x": np.zeros((1, 4), dtype=np.float32)})["y"].shape == (1, 3)
    worker.close()
