"""What ``pack`` derives from an ONNX file so that nobody has to write it down: its weights' files, its signature.

Absent on purpose: judging the file. That is the box's rule (``agent/bundles/content.py``), which ``pack`` runs too.
"""

from __future__ import annotations

import mmap
import posixpath
from pathlib import Path
from typing import Any, Final

import onnx

from agent.bundles import onnx_facts, onnx_file
from agent.bundles.manifest import DataType, Signature, Tensor
from agent.errors import UnsafeBundleError
from tools.hub.errors import SourceError

_DTYPES: Final[dict[int, DataType]] = {
    onnx.TensorProto.FLOAT: "float32", onnx.TensorProto.DOUBLE: "float64", onnx.TensorProto.FLOAT16: "float16",
    onnx.TensorProto.BFLOAT16: "bfloat16", onnx.TensorProto.INT8: "int8", onnx.TensorProto.INT16: "int16",
    onnx.TensorProto.INT32: "int32", onnx.TensorProto.INT64: "int64", onnx.TensorProto.UINT8: "uint8",
    onnx.TensorProto.UINT16: "uint16", onnx.TensorProto.UINT32: "uint32", onnx.TensorProto.UINT64: "uint64",
    onnx.TensorProto.BOOL: "bool", onnx.TensorProto.STRING: "bytes",
}  # fmt: skip


def external_files(folder: Path, entry: str) -> list[str]:
    """Return the files that hold weights of the model ``entry``, relative to ``folder``, sorted.

    Raises:
        SourceError: the model is missing.
        UnsafeBundleError: it is not ONNX, or names a file outside its own folder.
    """
    try:
        data = (folder / entry).read_bytes()
    except OSError as error:
        raise SourceError(f"{entry}: {error.strerror}", hint="A variant's entry is relative to SRC.") from error
    try:
        found = onnx_file.inspect(memoryview(data)).external
    except UnsafeBundleError as error:
        raise UnsafeBundleError(f"{entry}: {error}") from error
    paths = set()
    for reference in found:
        path = posixpath.join(posixpath.dirname(entry), reference.location)
        if reference.location.startswith("/") or posixpath.normpath(path) != path or path.startswith("../"):
            raise UnsafeBundleError(
                f"{entry}: external data {reference.location[:80]!r} is not a file beside the model"
            )
        paths.add(path)
    return sorted(paths)


def described(model: Path) -> onnx_facts.OnnxFacts:
    """Return what the model file says about itself, its inputs and outputs among it.

    Raises:
        SourceError: it cannot be read, or is not ONNX.
    """
    try:
        with model.open("rb") as file, mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as mapped:
            with memoryview(mapped) as view:
                return onnx_facts.describe(view)
    except (OSError, ValueError) as error:
        raise SourceError(f"{model}: {getattr(error, 'strerror', None) or 'empty'}") from error
    except UnsafeBundleError as error:
        raise SourceError(f"{model}: {error}") from error


def signature_of(folder: Path, entry: str) -> Signature:
    """Return the inputs and outputs that the model declares; named dimensions keep their names.

    Raises:
        SourceError: one of them is no plain tensor; such a model needs its signature written down.
    """
    model = onnx.load(str(folder / entry), load_external_data=False)
    initial = {tensor.name for tensor in model.graph.initializer}
    inputs = [value for value in model.graph.input if value.name not in initial]
    return Signature(
        inputs=tuple(_tensor(entry, value) for value in inputs),
        outputs=tuple(_tensor(entry, value) for value in model.graph.output),
    )


def _tensor(entry: str, value: Any) -> Tensor:
    kind = value.type.tensor_type
    if kind.elem_type not in _DTYPES:
        raise SourceError(
            f"{entry}: {value.name} is not a tensor that can be served", hint="Write [signature] yourself."
        )
    shape = tuple(
        dimension.dim_value if dimension.HasField("dim_value") else dimension.dim_param or None
        for dimension in kind.shape.dim
    )
    return Tensor(name=value.name, dtype=_DTYPES[kind.elem_type], shape=shape)
