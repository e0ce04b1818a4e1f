"""Make the sources of a bundle from one ONNX file: its fp32 variant, a golden test and a ``model.toml`` to go on from.

Promises: what it writes can be packed as it is; the folder appears whole or not at all. What only a person knows
(licence, where the model came from, what it is for) is left out or taken from the file's own metadata.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime

from agent.bundles import inspection, onnx_facts
from agent.bundles.names import check_name, check_version
from tools.hub import onnx_versions, safetensors, toml
from tools.hub.convert import EXTERNAL_BYTES_MIN, model_bytes
from tools.hub.description import FILE_NAME
from tools.hub.errors import SourceError
from tools.hub.onnxfile import described
from tools.hub.samples import Feed, Samples, batch_of, stacked

Array = npt.NDArray[Any]
ENTRY: Final = "fp32/model.onnx"
PRIORITY: Final = 50  # room on both sides for variants that are faster or slower
_GOLDEN_ROWS: Final = 8
_BATCH: Final = 8
_OPEN_MAX: Final = 1 << 24
_RTOL, _ATOL = 1e-3, 1e-4  # fp32 differs between CPUs in its last digits


class Title(NamedTuple):
    """Who publishes it, what it is called, and which version it is."""

    team: str
    name: str
    version: str


def make(model: Path, folder: Path, samples: Samples, title: Title) -> None:
    """Write the sources of the version ``title`` to the new ``folder``.

    Args:
        model: An fp32 ONNX model.
        folder: Must not exist.
        samples: Inputs; the first few become the golden test.
        title: As in ``model.toml``.

    Raises:
        SourceError: ``folder`` exists, or the model cannot run its inputs.
        UnsafeBundleError: a name that no store takes.
    """
    check_name(title.team, "team")
    check_name(title.name, "name")
    check_version(title.version)
    if folder.exists():
        raise SourceError(f"{folder}: exists already", hint="Choose another --out, or quantize that folder.")
    facts = inspection.inspect_file(model)
    beside = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    try:
        (beside / ENTRY).parent.mkdir(parents=True)
        (beside / "golden").mkdir()
        _copy(model, beside / ENTRY)
        feed, answers = _golden(beside / ENTRY, samples)
        (beside / "golden/g1.in.safetensors").write_bytes(safetensors.dump(feed))
        (beside / "golden/g1.out.safetensors").write_bytes(safetensors.dump(answers))
        (beside / FILE_NAME).write_text(_description(facts, answers, title, real=samples.real))
        beside.rename(folder)
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def run(model: Path, feed: Feed) -> dict[str, Array]:
    """Return the model's outputs by name, from the CPU with one thread: what a golden sample records.

    Raises:
        SourceError: the model cannot be loaded, or cannot run the inputs.
    """
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    try:
        session = onnxruntime.InferenceSession(str(model), options, providers=["CPUExecutionProvider"])
        names = [node.name for node in session.get_outputs()]
        return dict(zip(names, session.run(names, dict(feed)), strict=True))
    except Exception as error:  # the binding's exceptions have no root of their own
        raise SourceError(f"{model.name}: {' '.join(str(error).split())[:500]}") from error


def _copy(model: Path, target: Path) -> None:
    """Write the model to ``target``, its weights in one file beside it if they are large."""
    if model_bytes(model) <= EXTERNAL_BYTES_MIN:
        onnx.save(onnx.load(str(model)), str(target))
        return
    onnx.save(
        onnx.load(str(model)), str(target), save_as_external_data=True, location=f"{target.name}.data",
        all_tensors_to_one_file=True,
    )  # fmt: skip


def _golden(model: Path, samples: Samples) -> tuple[Feed, dict[str, Array]]:
    few = samples.feeds[:_GOLDEN_ROWS]
    batched = batch_of(described(model).inputs) == 1
    together = stacked(few) if batched else None
    if together is not None:
        try:
            return together, run(model, together)
        except SourceError:
            pass  # exported for one row at a time, whatever its shapes say
    return few[0], run(model, few[0])


def _description(facts: inspection.ModelFacts, answers: Mapping[str, Array], title: Title, *, real: bool) -> str:
    signature, axis = _signature(facts, answers)
    lines = [
        "# A beginning, made by: inferhub quantize. Keys: inferhub pack --help",
        *toml.lines(title._asdict() | {"handler": {"id": "tensors/v1"}}),
        *(toml.lines({"batching": {"axis": axis, "max_batch": _BATCH}}) if axis else []),
    ]
    if re.fullmatch(r"[A-Za-z0-9.+-]{2,64}", facts.license):
        lines += ["", "[license]", *toml.lines({"spdx": facts.license})]
    producer = str(facts.about.get("producer", ""))
    if producer:
        lines += ["", "[provenance]", *toml.lines({"exporter": producer})]
    spec = onnx_versions.spec_for(facts.about.get("opsets", {}), int(facts.about.get("ir_version", 0)))
    lines += ["", "[requires]", *toml.lines({"runtimes": [{"name": "onnxruntime", "spec": spec}]})]
    lines += ["", "[signature]", *toml.lines(signature)]
    variant = {"id": "cpu-fp32", "entry": ENTRY, "precision": "fp32", "priority": PRIORITY}
    lines += ["", "[[variants]]", *toml.lines(variant)]
    sample = {"id": "g1", "inputs": "golden/g1.in.safetensors", "outputs": "golden/g1.out.safetensors"}
    if not real:
        lines += ["", "# Its inputs are made up: record real ones before anybody relies on this test."]
    lines += ["", "[[golden]]", *toml.lines(sample), "compare = ["]
    for output, array in answers.items():
        atol = float(f"{_ATOL * max(1.0, float(np.max(np.abs(array.astype(np.float64)), initial=0.0))):.1g}")
        rule = {"output": output, "metric": "allclose", "rtol": _RTOL, "atol": atol}
        lines.append(f"  {toml.value(rule)},")
    return "\n".join([*lines, "]", ""])


def _signature(facts: inspection.ModelFacts, answers: Mapping[str, Array]) -> tuple[dict[str, Any], str]:
    """Return the signature as the description has it, and the axis along which requests may be joined."""
    together = bool(facts.inputs) and all(
        port.shape and not isinstance(port.shape[0], int) for port in (*facts.inputs, *facts.outputs)
    )
    sides = {"inputs": facts.inputs, "outputs": facts.outputs}
    told: dict[str, Any] = {
        side: [_port(port, answers, batched=together) for port in ports] for side, ports in sides.items()
    }
    names = dict.fromkeys(
        size for side in sides for one in told[side] for size in one["shape"] if isinstance(size, str)
    )
    if names:
        told["dims"] = {name: {"min": 1, "max": _BATCH if name == "N" and together else _OPEN_MAX} for name in names}
    return told, "N" if together else ""


def _port(port: onnx_facts.Port, answers: Mapping[str, Array], *, batched: bool) -> dict[str, Any]:
    if not port.dtype:
        raise SourceError(f"{port.name} is not a tensor and cannot be served", hint="Export the model without it.")
    # An output without a shape in the file has the rank that was seen.
    shape = port.shape or ((None,) * answers[port.name].ndim if port.name in answers else ())
    named = [
        "N" if batched and not place else size if size is not None else _dimension(port.name, place)
        for place, size in enumerate(shape)
    ]
    return {"name": port.name, "dtype": port.dtype, "shape": named}


def _dimension(name: str, place: int) -> str:
    return f"{re.sub(r'[^A-Za-z0-9_]', '_', name)}_{place}"


def name_of(source: str) -> str:
    """Return a model name that fits the source's file or factory name."""
    stem = source.rpartition(":")[2] if ":" in source else Path(source).stem
    fitting = re.sub(r"[^a-z0-9._-]+", "-", stem.casefold()).strip("-._")
    return fitting[:64] or "model"
