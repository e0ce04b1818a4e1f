"""A small convolutional classifier that has really learned something, made in well under a second without torch.

Ten noisy shapes of 8 x 8 pixels; convolution and hidden layer are random features, the last layer is solved by least
squares. It is sure of its answers, so that quantizing it well keeps them and quantizing it badly does not.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime
from onnx import TensorProto, helper, numpy_helper

Array = npt.NDArray[Any]
CLASSES = 10
INPUT, OUTPUT = "image", "scores"


def images(count: int, seed: int) -> tuple[Array, Array]:
    """Return ``[count, 1, 8, 8]`` pictures in 0 to 1, and the class of each."""
    shapes = np.random.default_rng(0).random((CLASSES, 1, 8, 8))
    source = np.random.default_rng(seed)
    labels = source.integers(0, CLASSES, count)
    noisy = shapes[labels] + source.normal(0, 0.15, (count, 1, 8, 8))
    return np.clip(noisy, 0, 1).astype(np.float32), labels


def write_classifier(path: Path, *, hidden: int = 64, metadata: dict[str, str] | None = None, opset: int = 17) -> Path:
    """Write the trained model to ``path``: ``scores[N, 10] = softmax(…)`` of ``image[N, 1, 8, 8]``."""
    source = np.random.default_rng(1)
    weights: dict[str, Array] = {
        "conv.w": source.normal(0, 0.3, (8, 1, 3, 3)).astype(np.float32),
        "conv.b": np.zeros(8, dtype=np.float32),
        "hidden.w": source.normal(0, 0.06, (8 * 36, hidden)).astype(np.float32),
        "hidden.b": np.zeros(hidden, dtype=np.float32),
    }
    features = [
        helper.make_node("Conv", [INPUT, "conv.w", "conv.b"], ["c"], "conv"),
        helper.make_node("Relu", ["c"], ["r"], "relu"),
        helper.make_node("Flatten", ["r"], ["f"], "flatten"),
        helper.make_node("Gemm", ["f", "hidden.w", "hidden.b"], ["g"], "hidden"),
        helper.make_node("Relu", ["g"], ["h"], "hidden_relu"),
    ]
    x, labels = images(600, seed=2)
    session = onnxruntime.InferenceSession(
        _model(features, ("h", [None, hidden]), weights, opset).SerializeToString(), providers=["CPUExecutionProvider"]
    )
    h = session.run(["h"], {INPUT: x})[0]
    solved, *_ = np.linalg.lstsq(np.c_[h, np.ones(len(h))], np.eye(CLASSES)[labels] * 8, rcond=1e-3)
    weights |= {"last.w": solved[:-1].astype(np.float32), "last.b": solved[-1].astype(np.float32)}
    head = [
        helper.make_node("Gemm", ["h", "last.w", "last.b"], ["l"], "last"),
        helper.make_node("Softmax", ["l"], [OUTPUT], "softmax"),
    ]
    model = _model([*features, *head], (OUTPUT, ["n", CLASSES]), weights, opset)
    model.producer_name, model.producer_version = "classifier", "1"
    model.doc_string = "Ten noisy shapes."
    helper.set_model_props(model, metadata or {})
    path.parent.mkdir(parents=True, exist_ok=True)
    onnx.save(model, str(path))
    return path


def _model(nodes: list[Any], output: tuple[str, list[Any]], weights: dict[str, Array], opset: int) -> onnx.ModelProto:
    graph = helper.make_graph(
        nodes,
        "classifier",
        [helper.make_tensor_value_info(INPUT, TensorProto.FLOAT, ["n", 1, 8, 8])],
        [helper.make_tensor_value_info(output[0], TensorProto.FLOAT, output[1])],
        [numpy_helper.from_array(value, name) for name, value in weights.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=10)
