"""Models with random weights, made to be measured and attacked: what they cost is known, what they say is not news.

``write`` turns one into the sources of a bundle, with a golden test recorded from ONNX Runtime itself.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto, helper, numpy_helper

from agent.tensors import Array
from tools.demo import magika
from tools.hub import safetensors

FRAME_SHAPE: Final = (3, 1024, 2048)  # of one uint8 picture: 6 MiB
_ONNX: Final = {"float32": TensorProto.FLOAT, "uint8": TensorProto.UINT8}
_OPSET: Final = 17
_TOY_FEATURES: Final = 4


class Port(NamedTuple):
    """One input or output: its name, dtype and shape, with texts for open dimensions."""

    name: str
    dtype: str
    shape: tuple[str | int, ...]


@dataclass(frozen=True, kw_only=True)
class Model:
    """One model. ``build`` returns nodes and weights; ``example`` one input for its golden test."""

    name: str
    takes: Port
    gives: Port
    max_batch: int
    build: Callable[[np.random.Generator], tuple[list[Any], dict[str, Array]]]
    example: Callable[[np.random.Generator], Array]
    version: str = "1.0.0"
    seed: int = 0


def tiny(*, name: str = "tiny", version: str = "1.0.0") -> Model:
    """Return an MLP of 64 inputs and 8 outputs, about ten microseconds of compute: what is measured is the server."""
    inputs, hidden, outputs = 64, 64, 8

    def build(rng: np.random.Generator) -> tuple[list[Any], dict[str, Array]]:
        nodes = [_node("MatMul", "x first", "h"), _node("Relu", "h", "r"), _node("MatMul", "r second", "y")]
        return nodes, {"first": _normal(rng, inputs, hidden), "second": _normal(rng, hidden, outputs)}

    return Model(
        name=name,
        version=version,
        takes=Port("x", "float32", ("N", inputs)),
        gives=Port("y", "float32", ("N", outputs)),
        max_batch=32,
        build=build,
        example=lambda rng: rng.normal(0, 1, (4, inputs)).astype(np.float32),
    )


def frame(*, name: str = "frame") -> Model:
    """Return a model of camera frames: the mean of each channel over every eighth pixel of every eighth row."""

    def build(_rng: np.random.Generator) -> tuple[list[Any], dict[str, Array]]:
        nodes = [
            _node("Slice", "x from to axes steps", "few"),
            _node("Cast", "few", "f", to=TensorProto.FLOAT),
            _node("ReduceMean", "f", "y", axes=[2, 3], keepdims=0),
        ]
        ends = {"from": [0, 0], "to": list(FRAME_SHAPE[1:]), "axes": [2, 3], "steps": [8, 8]}
        return nodes, {key: np.array(value, dtype=np.int64) for key, value in ends.items()}

    return Model(
        name=name,
        takes=Port("x", "uint8", ("N", *FRAME_SHAPE)),
        gives=Port("y", "float32", ("N", FRAME_SHAPE[0])),
        max_batch=1,
        build=build,
        example=lambda rng: rng.integers(0, 256, (1, *FRAME_SHAPE), dtype=np.uint8),
    )


def heavy(*, name: str = "heavy") -> Model:
    """Return a model of some milliseconds, which cannot be batched: its capacity is known and small."""
    wide = 512

    def build(rng: np.random.Generator) -> tuple[list[Any], dict[str, Array]]:
        nodes = [
            _node("Unsqueeze", "x one", "row"),
            _node("Expand", "row shape", "rows"),
            _node("MatMul", "rows first", "a"),
            _node("MatMul", "a second", "b"),
            _node("ReduceMean", "b", "y", axes=[1], keepdims=0),
        ]
        return nodes, {
            "one": np.array([1], dtype=np.int64),
            "shape": np.array([1, 512, 64], dtype=np.int64),
            "first": _normal(rng, 64, wide),
            "second": _normal(rng, wide, wide),
        }

    return Model(
        name=name,
        takes=Port("x", "float32", ("N", 64)),
        gives=Port("y", "float32", ("N", wide)),
        max_batch=1,
        build=build,
        example=lambda rng: rng.normal(0, 1, (1, 64)).astype(np.float32),
    )


def resnet18(*, name: str = "resnet18") -> Model:
    """Return ResNet-18 with batch normalisation folded away: 11.7 million weights, 224 x 224 pixels, 1000 classes."""
    return Model(
        name=name,
        takes=Port("x", "float32", ("N", 3, 224, 224)),
        gives=Port("y", "float32", ("N", 1000)),
        max_batch=8,
        build=_resnet18,
        example=lambda rng: rng.normal(0, 1, (1, 3, 224, 224)).astype(np.float32),
    )


def times(factor: float, *, name: str = "times", version: str = "1.0.0", features: str | int = "C") -> Model:
    """Return ``y[N, C] = factor x x[N, C]`` with any number of columns: an answer tells whose request it belongs to."""

    def build(_rng: np.random.Generator) -> tuple[list[Any], dict[str, Array]]:
        return [_node("Mul", "x factor", "y")], {"factor": np.array(factor, dtype=np.float32)}

    columns = features if isinstance(features, int) else _TOY_FEATURES
    return Model(
        name=name,
        version=version,
        takes=Port("x", "float32", ("N", features)),
        gives=Port("y", "float32", ("N", features)),
        max_batch=8,
        build=build,
        example=lambda rng: rng.normal(0, 1, (2, columns)).astype(np.float32),
    )


def write(model: Model, folder: Path) -> Path:
    """Write the sources of a bundle into ``folder``, which must not exist; return its ONNX file."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(model.seed)
    nodes, weights = model.build(rng)
    graph = helper.make_graph(
        nodes,
        model.name,
        [helper.make_tensor_value_info(model.takes.name, _ONNX[model.takes.dtype], list(model.takes.shape))],
        [helper.make_tensor_value_info(model.gives.name, _ONNX[model.gives.dtype], list(model.gives.shape))],
        [numpy_helper.from_array(value, key) for key, value in weights.items()],
    )
    path = folder / "model.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", _OPSET)], ir_version=10), str(path))
    example = model.example(rng)
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    (answer,) = session.run(None, {model.takes.name: example})
    (folder / "in.safetensors").write_bytes(safetensors.dump({model.takes.name: example}))
    (folder / "out.safetensors").write_bytes(safetensors.dump({model.gives.name: answer}))
    (folder / "model.toml").write_text(_description(model))
    return path


def _description(model: Model) -> str:
    names = dict.fromkeys(side for port in (model.takes, model.gives) for side in port.shape if isinstance(side, str))
    most = {name: model.max_batch if name == "N" else 1 << 24 for name in names}
    dims = ", ".join(f"{name} = {{ min = 1, max = {bound} }}" for name, bound in most.items())
    return f"""\
team = "{magika.TEAM}"
name = "{model.name}"
version = "{model.version}"
handler = {{ id = "tensors/v1" }}
batching = {{ axis = "N", max_batch = {model.max_batch} }}

[signature]
inputs = [{_port(model.takes)}]
outputs = [{_port(model.gives)}]
dims = {{ {dims} }}

[[variants]]
id = "cpu-fp32"
entry = "model.onnx"
precision = "fp32"
priority = 10
threads = {{ intra = 1, inter = 1 }}

[[golden]]
id = "g"
inputs = "in.safetensors"
outputs = "out.safetensors"
compare = [{{ output = "{model.gives.name}", metric = "allclose", rtol = 1e-3, atol = 1e-3 }}]
"""


def _port(port: Port) -> str:
    return f'{{ name = "{port.name}", dtype = "{port.dtype}", shape = {json.dumps(list(port.shape))} }}'


def _node(kind: str, takes: str, gives: str, **attributes: Any) -> Any:
    return helper.make_node(kind, takes.split(), gives.split(), **attributes)


def _normal(rng: np.random.Generator, *shape: int) -> Array:
    return rng.normal(0, 0.1, shape).astype(np.float32)


def _resnet18(rng: np.random.Generator) -> tuple[list[Any], dict[str, Array]]:
    nodes: list[Any] = []
    weights: dict[str, Array] = {}

    def conv(at: str, name: str, shape: Sequence[int], *, stride: int = 1) -> str:
        out, fan_in, side, _ = shape
        scale = np.sqrt(1.0 / (fan_in * side * side))  # keeps sums of random activations from growing
        weights[f"{name}.w"] = (rng.normal(0, 1, shape) * scale).astype(np.float32)
        weights[f"{name}.b"] = np.zeros(out, dtype=np.float32)
        nodes.append(_node("Conv", f"{at} {name}.w {name}.b", name, strides=[stride, stride], pads=[side // 2] * 4))
        return name

    def relu(at: str) -> str:
        nodes.append(_node("Relu", at, f"{at}.relu"))
        return f"{at}.relu"

    def block(at: str, name: str, channels: int, out: int, stride: int) -> str:
        inner = relu(conv(at, f"{name}.first", (out, channels, 3, 3), stride=stride))
        inner = conv(inner, f"{name}.second", (out, out, 3, 3))
        short = at if channels == out else conv(at, f"{name}.short", (out, channels, 1, 1), stride=stride)
        nodes.append(_node("Add", f"{inner} {short}", f"{name}.sum"))
        return relu(f"{name}.sum")

    at = relu(conv("x", "stem", (64, 3, 7, 7), stride=2))
    nodes.append(_node("MaxPool", at, "pooled", kernel_shape=[3, 3], strides=[2, 2], pads=[1, 1, 1, 1]))
    at, channels = "pooled", 64
    for stage, out in enumerate((64, 128, 256, 512)):
        for place in range(2):
            at = block(at, f"s{stage}.{place}", channels, out, 2 if stage and not place else 1)
            channels = out
    nodes += [_node("GlobalAveragePool", at, "mean"), _node("Flatten", "mean", "flat", axis=1)]
    nodes.append(_node("Gemm", "flat last.w last.b", "y", transB=1))
    weights["last.w"], weights["last.b"] = _normal(rng, 1000, 512), np.zeros(1000, dtype=np.float32)
    return nodes, weights
