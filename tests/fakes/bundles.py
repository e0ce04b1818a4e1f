"""Small valid bundles as plain files, for tests of publishing, pulling and refusing."""

from __future__ import annotations

import random
from collections.abc import Mapping
from hashlib import sha256
from pathlib import Path
from typing import Any, cast

import msgspec
import numpy as np
import onnx
import zstandard
from onnx import TensorProto, helper

from agent.bundles import manifest as schema
from agent.bundles.manifest import Chunk, File, Manifest
from tools.hub import safetensors
from tools.hub.bundle import Bundle, open_bundle
from tools.hub.chunks import blob_name

CHUNK = 64 * 1024
CLASSES = b"left\nright\n"


def content(size: int, *, seed: int = 1) -> bytes:
    """Return ``size`` bytes that do not compress; equal seeds share their beginning."""
    return random.Random(seed).randbytes(size)


def external_model(location: str = "model.onnx.data", *, rows: int = 1024, length: int | None = None) -> bytes:
    """Return an ONNX model whose weights ``[rows, 256]`` float32 are in ``location``."""
    weights = TensorProto(name="w", data_type=TensorProto.FLOAT, dims=[rows, 256])
    weights.data_location = TensorProto.EXTERNAL
    values = {"location": location, "offset": "0", "length": str(rows * 1024 if length is None else length)}
    for key, value in values.items():
        weights.external_data.add(key=key, value=value)
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["y"])],
        "product",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", rows])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["N", 256])],
        [weights],
    )
    return cast("bytes", helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)]).SerializeToString())


def operator_model(op: str, domain: str) -> bytes:
    """Return an ONNX model of one node."""
    graph = helper.make_graph(
        [helper.make_node(op, ["x"], ["y"], domain=domain)],
        "one",
        [helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, ["N"])],
        [helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, ["N"])],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17), helper.make_opsetid("x", 1)])
    return cast("bytes", model.SerializeToString())


def plain_files(*, weights_seed: int = 1, rows: int = 1024) -> dict[str, bytes]:
    """Return the files of a bundle with two variants: ``rows`` KiB of weights and a little around them."""
    golden = safetensors.dump({"x": np.zeros((1, rows), np.float32)})
    return {
        "fp32/model.onnx": external_model(rows=rows),
        "fp32/model.onnx.data": content(rows * 1024, seed=weights_seed),
        "int8/model.onnx": operator_model("Relu", ""),
        "classes.txt": CLASSES,
        "golden/g1.in.safetensors": golden,
        "golden/g1.out.safetensors": safetensors.dump({"y": np.zeros((1, 256), np.float32)}),
    }


def describe(files: Mapping[str, bytes], **changes: Any) -> dict[str, Any]:
    """Return a manifest for ``files`` as JSON values; ``changes`` replaces top-level fields."""
    value: dict[str, Any] = {
        "schema": schema.MANIFEST_SCHEMA,
        "team": "vision",
        "name": "tiny",
        "version": "1.0.0",
        "seq": 1,
        "created": "2026-11-21T08:00:00Z",
        "total_size": sum(len(data) for data in files.values()),
        "files": [_file(path, data) for path, data in files.items()],
        "variants": [
            {
                "id": "cpu-fp32",
                "priority": 20,
                "runtime": "onnxruntime",
                "entry": "fp32/model.onnx",
                "files": [path for path in files if path.startswith("fp32/")],
                "precision": "fp32",
                "device": {"kind": "cpu", "providers": ["CPUExecutionProvider"]},
            },
            {
                "id": "cpu-int8",
                "priority": 10,
                "runtime": "onnxruntime",
                "entry": "int8/model.onnx",
                "files": [path for path in files if path.startswith("int8/")],
                "precision": "int8",
                "device": {"kind": "cpu", "providers": ["CPUExecutionProvider"]},
            },
        ],
        "signature": {
            "inputs": [{"name": "x", "dtype": "float32", "shape": ["N", 1024]}],
            "outputs": [{"name": "y", "dtype": "float32", "shape": ["N", 256]}],
        },
        "handler": {"id": "tensors/v1"},
        "classes": {"file": "classes.txt", "count": 2},
        "golden": [
            {
                "id": "g1",
                "inputs": "golden/g1.in.safetensors",
                "outputs": "golden/g1.out.safetensors",
                "compare": [{"output": "y", "rtol": 0.1, "atol": 0.1}],
            }
        ],
    }
    return value | changes


def manifest(files: Mapping[str, bytes] | None = None, **changes: Any) -> Manifest:
    """Return the same as a checked manifest."""
    return schema.parse_manifest(msgspec.json.encode(describe(plain_files() if files is None else files, **changes)))


def pack(folder: Path, files: Mapping[str, bytes], *, zstd: bool = False, **changes: Any) -> Bundle:
    """Write a packed bundle of ``files``; with ``zstd`` every chunk is compressed."""
    value = describe(files, **changes)
    for item in value["files"]:
        item["chunks"] = [_store(folder, piece, zstd=zstd) for piece in _pieces(files[item["path"]])]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "manifest.json").write_bytes(msgspec.json.encode(value))
    return open_bundle(folder)


def _file(path: str, data: bytes) -> dict[str, Any]:
    role, file_format = _kind(path)
    value = File(
        path=path,
        size=len(data),
        sha256=sha256(data).hexdigest(),
        role=role,
        format=file_format,
        chunks=tuple(Chunk(sha256(piece).hexdigest(), len(piece)) for piece in _pieces(data)),
    )
    raw = msgspec.to_builtins(value)
    raw["chunks"] = [chunk[:2] for chunk in raw.get("chunks", [])]
    return cast("dict[str, Any]", raw)


def _kind(path: str) -> tuple[schema.FileRole, schema.FileFormat]:
    if path.endswith(".onnx"):
        return "model", "onnx"
    if path.endswith((".pt", ".pt2")):
        return "model", "torchscript" if path.endswith(".pt") else "pt2"
    if path.endswith(".data"):
        return "weights", "onnx-data"
    if path.endswith(".safetensors"):
        return "golden", "safetensors"
    if path.endswith(".py"):
        return "handler", "python"
    if path.endswith("classes.txt"):
        return "classes", "txt"
    return "doc", "raw"


def _pieces(data: bytes) -> list[bytes]:
    return [data[start : start + CHUNK] for start in range(0, len(data), CHUNK)]


def _store(folder: Path, piece: bytes, *, zstd: bool) -> list[Any]:
    stored = zstandard.ZstdCompressor().compress(piece) if zstd else piece
    digest = sha256(stored).hexdigest()
    path = folder / blob_name(digest)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(stored)
    raw = [sha256(piece).hexdigest(), len(piece)]
    return [*raw, "zstd", digest, len(stored)] if zstd else raw
