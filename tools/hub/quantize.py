"""Make an int8 model from an fp32 one, and say at once whether it is worth having.

Dynamic quantization: weights are stored as int8, activations are scaled at run time, no calibration data is needed. It
is not always faster (a CNN on a CPU without VNNI may run several times slower), so both models are timed in turn on
the same inputs, and their answers compared.
Absent on purpose: static quantization with calibration data, and the choice on a box, which measures for itself.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

import numpy as np
import numpy.typing as npt
import onnxruntime
from onnxruntime.quantization import QuantType, quantize_dynamic

from tools.hub.errors import SourceError

Array = npt.NDArray[Any]
Kind = Literal["dynamic"]
Weights = Literal["int8", "uint8"]
_RUNS_MAX: Final = 64  # rows that are timed
_SAMPLES: Final = 8  # made up if no inputs are given
_DTYPES: Final = {
    "tensor(float)": np.float32, "tensor(double)": np.float64, "tensor(float16)": np.float16,
    "tensor(int64)": np.int64, "tensor(int32)": np.int32, "tensor(uint8)": np.uint8, "tensor(int8)": np.int8,
    "tensor(bool)": np.bool_,
}  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """fp32 against int8 on the same rows, one thread. Agreement is over rows."""

    bytes_before: int
    bytes_after: int
    p50_ms_before: float
    p50_ms_after: float
    rows: int
    top1_agreement: float  # share of rows whose largest value of the first output is at the same place
    max_abs: float  # largest difference of any output value
    real_inputs: bool

    @property
    def latency_ratio(self) -> float:
        """Below 1 the int8 model is the faster one."""
        return self.p50_ms_after / self.p50_ms_before if self.p50_ms_before else 0.0


def quantize(
    source: Path,
    out: Path,
    *,
    operators: Sequence[str] = (),
    weights: Weights = "int8",
    per_channel: bool = False,
    reduce_range: bool = False,
) -> None:
    """Write the dynamically quantized ``source`` to ``out``.

    Args:
        source: An fp32 ONNX model.
        out: Must not exist.
        operators: Operator types to quantize; empty: all that can be.
        weights: Their integer type. On x86 without VNNI uint8 convolutions run much faster than int8 ones.
        per_channel: One scale per output channel: nearer to fp32, a little larger.
        reduce_range: 7-bit weights, against overflow on x86 CPUs without VNNI.

    Raises:
        SourceError: ``source`` cannot be quantized, or ``out`` exists.
    """
    if out.exists():
        raise SourceError(f"{out}: exists already", hint="Choose another --out.")
    out.parent.mkdir(parents=True, exist_ok=True)
    try:
        with _quiet():
            quantize_dynamic(
                str(source),
                str(out),
                op_types_to_quantize=list(operators) or None,
                weight_type=QuantType.QInt8 if weights == "int8" else QuantType.QUInt8,
                per_channel=per_channel,
                reduce_range=reduce_range,
            )
    except Exception as error:  # the quantizer raises whatever its graph walk meets
        out.unlink(missing_ok=True)
        raise SourceError(f"{source}: cannot be quantized: {error}") from error


def compare(source: Path, quantized: Path, inputs: Mapping[str, Array] | None, *, batched: bool = True) -> Result:
    """Return how the two models differ in size, speed and answers.

    Args:
        source: The fp32 model.
        quantized: The int8 model.
        inputs: By name; with ``batched`` the first axis counts the rows, which are run one by one. ``None``: random.
        batched: Whether rows can be cut from the inputs.

    Raises:
        SourceError: a model cannot be loaded, or cannot run the inputs.
    """
    sessions = [_session(source), _session(quantized)]
    given = dict(inputs) if inputs is not None else _random(sessions[0])
    rows = _rows(given) if batched else [given]
    times: tuple[list[float], list[float]] = ([], [])
    agreed, largest = 0, 0.0
    for session in sessions:
        _run(session, rows[0])  # warm-up
    for feed in rows:
        answers = []
        for session, taken in zip(sessions, times, strict=True):  # in turn, so that both meet the same noise
            began = time.perf_counter()
            answers.append(_run(session, feed))
            taken.append((time.perf_counter() - began) * 1000)
        agreed += int(np.argmax(answers[0][0]) == np.argmax(answers[1][0]))
        differences = [np.max(np.abs(a.astype(np.float64) - b), initial=0.0) for a, b in zip(*answers, strict=True)]
        largest = max(largest, float(np.max(differences, initial=0.0)))
    return Result(
        bytes_before=source.stat().st_size,
        bytes_after=quantized.stat().st_size,
        p50_ms_before=round(float(np.median(times[0])), 3),
        p50_ms_after=round(float(np.median(times[1])), 3),
        rows=len(rows),
        top1_agreement=round(agreed / len(rows), 4),
        max_abs=round(largest, 6),
        real_inputs=inputs is not None,
    )


def run(model: Path, inputs: Mapping[str, Array]) -> dict[str, Array]:
    """Return the model's outputs by name, from the CPU with one thread: what a golden sample records.

    Raises:
        SourceError: the model cannot be loaded, or cannot run the inputs.
    """
    session = _session(model)
    return {node.name: value for node, value in zip(session.get_outputs(), _run(session, inputs), strict=True)}


def _session(path: Path) -> Any:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    try:
        return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # the binding's exceptions have no root of their own
        raise SourceError(f"{path}: {error}") from error


def _run(session: Any, feed: Mapping[str, Array]) -> list[Array]:
    try:
        answers: list[Array] = session.run(None, dict(feed))
    except Exception as error:  # as above
        raise SourceError(f"the model cannot run these inputs: {error}") from error
    return answers


def _rows(inputs: Mapping[str, Array]) -> list[dict[str, Array]]:
    counts = {array.shape[0] for array in inputs.values() if array.ndim}
    if len(counts) != 1 or 0 in counts:
        raise SourceError("the inputs do not have the same number of rows, at least one")
    return [
        {name: array[row : row + 1] for name, array in inputs.items()} for row in range(min(counts.pop(), _RUNS_MAX))
    ]


def _random(session: Any) -> dict[str, Array]:
    source = np.random.default_rng(0)
    made: dict[str, Array] = {}
    for node in session.get_inputs():
        if node.type not in _DTYPES:
            raise SourceError(f"input {node.name}: {node.type} cannot be made up", hint="Give real ones: --inputs FILE")
        shape = [size if isinstance(size, int) and number else (1 if number else _SAMPLES)
                 for number, size in enumerate(node.shape)]  # fmt: skip
        dtype = np.dtype(_DTYPES[node.type])
        values = source.normal(size=shape) if dtype.kind == "f" else source.integers(0, 2, size=shape)
        made[node.name] = values.astype(dtype)
    return made


@contextmanager
def _quiet() -> Iterator[None]:
    """Hold back the quantizer's advice to pre-process, which it logs on the root logger."""
    root = logging.getLogger()
    accept: Callable[[logging.LogRecord], bool] = lambda _: False  # noqa: E731
    root.addFilter(accept)
    try:
        yield
    finally:
        root.removeFilter(accept)
