"""Tiny real ONNX models and the bundle directories around them, built on the spot."""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

WEIGHTS = np.random.default_rng(7).standard_normal((4, 3)).astype(np.float32)


def linear() -> onnx.ModelProto:
    """``y[N,3] = x[N,4] @ WEIGHTS``, float32."""
    return _model(
        [helper.make_node("MatMul", ["x", "w"], ["y"])],
        [("x", TensorProto.FLOAT, ["N", 4])],
        [("y", TensorProto.FLOAT, ["N", 3])],
        {"w": WEIGHTS},
    )


def lookup(name: str = "") -> onnx.ModelProto:
    """``y[N] = table[index[N]]``: an index outside 0..3 fails when run, and with it the whole batch.

    The error tells the node's ``name``.
    """
    return _model(
        [helper.make_node("Gather", ["table", "index"], ["y"], name=name)],
        [("index", TensorProto.INT64, ["N"])],
        [("y", TensorProto.FLOAT, ["N"])],
        {"table": np.arange(4, dtype=np.float32) * 10},
    )


def sequence_sum() -> onnx.ModelProto:
    """``y[N] = sum over T of x[N,T]``: requests of different T do not stack."""
    return _model(
        [helper.make_node("ReduceSum", ["x", "axes"], ["y"], keepdims=0)],
        [("x", TensorProto.FLOAT, ["N", "T"])],
        [("y", TensorProto.FLOAT, ["N"])],
        {"axes": np.array([1], dtype=np.int64)},
    )


def text_identity() -> onnx.ModelProto:
    """``y[N] = x[N]``, strings."""
    return _model(
        [helper.make_node("Identity", ["x"], ["y"])],
        [("x", TensorProto.STRING, ["N"])],
        [("y", TensorProto.STRING, ["N"])],
        {},
    )


def narrow_identity() -> onnx.ModelProto:
    """``y[N,4] = x[N,4]``, bfloat16 on both sides."""
    return _model(
        [
            helper.make_node("Cast", ["x"], ["wide"], to=TensorProto.FLOAT),
            helper.make_node("Cast", ["wide"], ["y"], to=TensorProto.BFLOAT16),
        ],
        [("x", TensorProto.BFLOAT16, ["N", 4])],
        [("y", TensorProto.BFLOAT16, ["N", 4])],
        {},
    )


LINEAR_SIGNATURE: dict[str, Any] = {
    "inputs": [{"name": "x", "dtype": "float32", "shape": ["N", 4]}],
    "outputs": [{"name": "y", "dtype": "float32", "shape": ["N", 3]}],
    "dims": {"N": {"min": 1, "max": 8}},
}
LOOKUP_SIGNATURE: dict[str, Any] = {
    "inputs": [{"name": "index", "dtype": "int64", "shape": ["N"]}],
    "outputs": [{"name": "y", "dtype": "float32", "shape": ["N"]}],
}
SEQUENCE_SIGNATURE: dict[str, Any] = {
    "inputs": [{"name": "x", "dtype": "float32", "shape": ["N", "T"]}],
    "outputs": [{"name": "y", "dtype": "float32", "shape": ["N"]}],
}
TEXT_SIGNATURE: dict[str, Any] = {
    "inputs": [{"name": "x", "dtype": "bytes", "shape": ["N"]}],
    "outputs": [{"name": "y", "dtype": "bytes", "shape": ["N"]}],
}


def bundle(folder: Path, model: onnx.ModelProto, signature: Mapping[str, Any], **changes: Any) -> dict[str, Any]:
    """Write ``model`` as a bundle directory below ``folder`` and return the worker's spec, with ``changes``."""
    bundle_dir, scratch_dir = folder / "bundle", folder / "scratch"
    (bundle_dir / "fp32").mkdir(parents=True, exist_ok=True)
    scratch_dir.mkdir(exist_ok=True)
    onnx.save(model, bundle_dir / "fp32" / "model.onnx")
    spec: dict[str, Any] = {
        "model": "m",
        "version": "1.0.0",
        "variant": "cpu-fp32",
        "runtime": "onnxruntime",
        "precision": "fp32",
        "device": {"kind": "cpu", "index": 0},
        "providers": ["CPUExecutionProvider"],
        "bundle_dir": str(bundle_dir),
        "entry": "fp32/model.onnx",
        "handler": {"id": "tensors/v1", "params": {}},
        "signature": dict(signature),
        "classes_file": None,
        "golden": [],
        "warmup": {"runs": 1, "max_ms": 5000},
        "batching": {"axis": "N", "max_batch": 8, "max_delay_ms": 0},
        "threads": {"intra": 1, "inter": 1},
        "scratch_dir": str(scratch_dir),
        "limits": {"memory_bytes": 0, "open_files": 64},
        "sandbox": "enforce",
        "wire": {"header_bytes_max": 65536, "body_bytes_max": 8 << 20},
    }
    return spec | changes


def with_handler(spec: dict[str, Any], source: str, name: str = "H", **params: Any) -> dict[str, Any]:
    """Put ``source`` into the bundle as its handler module."""
    (Path(spec["bundle_dir"]) / "handler.py").write_text(source)
    return spec | {"handler": {"module": "handler.py", "class": name, "params": params}}


def golden(spec: dict[str, Any], outputs: Mapping[str, Any], inputs: Mapping[str, Any], compare: Sequence[Any]) -> None:
    """Add a golden entry with these samples to ``spec`` and its bundle."""
    folder = Path(spec["bundle_dir"]) / "golden"
    folder.mkdir(exist_ok=True)
    (folder / "in.safetensors").write_bytes(safetensors_bytes(inputs))
    (folder / "out.safetensors").write_bytes(safetensors_bytes(outputs))
    entry = {"id": "g1", "inputs": "golden/in.safetensors", "outputs": "golden/out.safetensors"}
    spec["golden"] = [*spec["golden"], entry | {"compare": list(compare), "timeout_ms": 10_000}]


def safetensors_bytes(arrays: Mapping[str, Any]) -> bytes:
    """Return a safetensors file of float32 and int64 arrays."""
    names = {"float32": "F32", "int64": "I64", "int32": "I32"}
    header, body = {}, b""
    for name, value in arrays.items():
        array = np.ascontiguousarray(value)
        data = array.tobytes()
        header[name] = {
            "dtype": names[array.dtype.name],
            "shape": list(array.shape),
            "data_offsets": [len(body), len(body) + len(data)],
        }
        body += data
    packed = json.dumps(header).encode()
    return struct.pack("<Q", len(packed)) + packed + body


def _model(nodes: Any, inputs: Any, outputs: Any, constants: Mapping[str, Any]) -> onnx.ModelProto:
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info(*entry) for entry in inputs],
        [helper.make_tensor_value_info(*entry) for entry in outputs],
        [numpy_helper.from_array(value, name) for name, value in constants.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)])
    model.ir_version = 10
    return model
