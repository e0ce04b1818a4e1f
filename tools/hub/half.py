"""Make a half-precision model that is right on a GPU too, where nothing hides an overflow.

fp16 ends at 65504. ONNX Runtime's CPU kernels compute fp16 models in fp32 and drop casts in between, so a model whose
inner values leave that range looks right on a CPU and answers NaN on a GPU. Hence the fp32 model is run first with all
its inner values in view; nodes that make or take large ones stay fp32, and no fp16 value stands between two of them.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto

from tools.hub.samples import Feed

LARGEST: Final = 65504.0 / 2  # other inputs than those at hand may go further
_FEEDS: Final = 16
_PROTOBUF_BYTES_MAX: Final = 1900 * 1024 * 1024  # a ModelProto ends at 2 GiB


def convert(model: Any, *, exclude: Sequence[str] = (), feeds: Sequence[Feed] = ()) -> tuple[Any, tuple[str, ...]]:
    """Return ``model`` (fp32, weights loaded) in half precision, and the names of nodes that had to stay fp32.

    Args:
        model: Changed on the way.
        exclude: Nodes that shall stay fp32 anyhow.
        feeds: Inputs to look for large values with; none: not looked for.
    """
    from onnxruntime.transformers.float16 import convert_float_to_float16

    small = model.ByteSize() < _PROTOBUF_BYTES_MAX
    for number, node in enumerate(model.graph.node):
        node.name = node.name or f"node_{number}"  # the converter tells nodes apart by name
    large = _large_values(model, feeds[:_FEEDS]) if feeds and small else set()
    wide = tuple(node.name for node in model.graph.node if large & {*node.input, *node.output})
    blocked = [*exclude, *wide]
    halved = convert_float_to_float16(model, keep_io_types=True, disable_shape_infer=not small, node_block_list=blocked)
    _join_casts(halved.graph)
    return halved, wide


def _large_values(model: Any, feeds: Sequence[Feed]) -> set[str]:
    """Return the names of the inner values, inputs and outputs that leave half precision's range."""
    seen = onnx.ModelProto()
    seen.CopyFrom(model)
    known = {output.name for output in seen.graph.output}
    names = [name for node in seen.graph.node for name in node.output if name and name not in known]
    seen.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names)
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(seen.SerializeToString(), options, providers=["CPUExecutionProvider"])
    wanted = [node.name for node in session.get_outputs() if node.type == "tensor(float)"]
    large: set[str] = set()
    for feed in feeds:
        values = dict(zip(wanted, session.run(wanted, dict(feed)), strict=True)) | dict(feed)
        large |= {name for name, value in values.items() if _is_large(value)}
    return large


def _is_large(value: Any) -> bool:
    if value.dtype != np.float32 or not value.size:
        return False
    finite = np.abs(value[np.isfinite(value)])
    return bool(np.max(finite, initial=0.0) > LARGEST)


def _join_casts(graph: Any) -> None:
    """Take out what the converter leaves between two fp32 nodes: a cast to fp16 and back, and casts made twice."""
    made: set[str] = set()
    for node in list(graph.node):
        if made & set(node.output):
            graph.node.remove(node)
        made |= set(node.output)
    down = {node.output[0]: node.input[0] for node in graph.node if _casts_to(node, TensorProto.FLOAT16)}
    results = {output.name for output in graph.output}
    same: dict[str, str] = {}
    for node in list(graph.node):
        if not _casts_to(node, TensorProto.FLOAT) or node.input[0] not in down:
            continue
        if node.output[0] in results:
            _make_identity(node, down[node.input[0]])
        else:
            same[node.output[0]] = down[node.input[0]]
            graph.node.remove(node)
    for node in graph.node:
        for place, name in enumerate(node.input):
            node.input[place] = same.get(name, name)
    _drop_unused(graph, results)


def _casts_to(node: Any, kind: int) -> bool:
    """Say whether the converter put this cast in; a cast of the model's own stays."""
    ours = "_cast_to_fp" in node.name or node.name.startswith(("graph_input_cast", "graph_output_cast"))
    return bool(node.op_type == "Cast" and ours and node.attribute[0].i == kind)


def _make_identity(node: Any, source: str) -> None:
    node.op_type = "Identity"
    node.input[0] = source
    del node.attribute[:]


def _drop_unused(graph: Any, results: Collection[str]) -> None:
    used = {name for node in graph.node for name in node.input} | set(results)
    inner = {name for node in graph.node for attribute in node.attribute for name in _names_below(attribute)}
    for node in list(graph.node):
        if node.op_type == "Cast" and not (set(node.output) & (used | inner)):
            graph.node.remove(node)


def _names_below(attribute: Any) -> set[str]:
    """Return the names that a subgraph takes, from wherever."""
    graphs = [attribute.g] if attribute.HasField("g") else list(attribute.graphs)
    names: set[str] = set()
    for graph in graphs:
        for node in graph.node:
            names |= set(node.input)
            for below in node.attribute:
                names |= _names_below(below)
        names |= {output.name for output in graph.output}
    return names


def written(model: Any, out: Path, *, external_bytes_min: int) -> None:
    """Write ``model`` to ``out``, its weights beside it if they are large."""
    large = model.ByteSize() > external_bytes_min
    onnx.save(model, str(out), save_as_external_data=large, location=f"{out.name}.data", all_tensors_to_one_file=True)
