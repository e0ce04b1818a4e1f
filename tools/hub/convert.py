"""Make smaller models from one fp32 ONNX file: fp16, dynamic int8, static int8.

- fp16 (``half.py``): weights and arithmetic in half precision; inputs, outputs and what would overflow stay fp32.
- dynamic int8: weights are stored as int8, activations are scaled at run time; no data is needed.
- static int8: scales of activations are fixed from calibration data and stored as QDQ nodes.

Promises: the source is only read; a conversion writes its file whole or raises; weights above ``EXTERNAL_BYTES_MIN`` go
into one file beside the model. Whether a variant is worth having is for ``measure`` and ``gate`` to find out.
"""

from __future__ import annotations

import logging
import platform
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

import onnx
from onnxruntime import quantization
from onnxruntime.quantization.shape_inference import quant_pre_process

from agent.config import MIB
from tools.hub import half
from tools.hub.errors import SourceError
from tools.hub.onnxfile import external_files
from tools.hub.samples import Feed

Kind = Literal["fp16", "dynamic", "static"]
Weights = Literal["int8", "uint8"]
Calibration = Literal["minmax", "entropy", "percentile"]
KINDS: Final[tuple[Kind, ...]] = ("fp16", "dynamic", "static")
EXTERNAL_BYTES_MIN: Final = 16 * MIB
_METHODS: Final = {
    "minmax": quantization.CalibrationMethod.MinMax,
    "entropy": quantization.CalibrationMethod.Entropy,
    "percentile": quantization.CalibrationMethod.Percentile,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Int8:
    """How int8 is made.

    Attributes:
        operators: Operator types to quantize; empty: all that can be.
        exclude: Names of nodes that stay fp32 (for fp16 too).
        weights: Integer type of the weights.
        per_channel: One scale per output channel: nearer to fp32, a little larger.
        reduce_range: 7-bit weights, against overflow on x86 CPUs without VNNI.
        calibration: How ranges follow from calibration data.
    """

    operators: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    weights: Weights = "int8"
    per_channel: bool = True
    reduce_range: bool = False
    calibration: Calibration = "minmax"

    def recipe(self, scheme: str) -> dict[str, str]:
        """Return what the manifest's ``quant`` tells about a variant made so."""
        told = {
            "scheme": scheme,
            "weights": self.weights,
            "granularity": "per-channel" if self.per_channel else "per-tensor",
        }
        if self.reduce_range:
            told["range"] = "reduced"
        if self.operators:
            told["operators"] = ",".join(self.operators)
        if self.exclude:
            told["exclude"] = ",".join(self.exclude)
        return told


def fp16(source: Path, out: Path, *, exclude: Sequence[str] = (), feeds: Sequence[Feed] = ()) -> tuple[str, ...]:
    """Write ``source`` in half precision to ``out``; inputs and outputs keep their types.

    Args:
        source: The fp32 model.
        out: Must not exist.
        exclude: Nodes that stay fp32.
        feeds: Inputs to find the nodes with whose values half precision cannot hold.

    Returns:
        The names of those nodes; they stayed fp32 too.

    Raises:
        SourceError: it cannot be converted, or ``out`` exists.
    """
    with _making(source, out):
        model, wide = half.convert(onnx.load(str(source)), exclude=exclude, feeds=feeds)
        half.written(model, out, external_bytes_min=EXTERNAL_BYTES_MIN)
    return wide


def dynamic_int8(source: Path, out: Path, how: Int8) -> None:
    """Write the dynamically quantized ``source`` to ``out``.

    Raises:
        SourceError: it cannot be quantized, or ``out`` exists.
    """
    with _making(source, out):
        quantization.quantize_dynamic(
            str(source),
            str(out),
            op_types_to_quantize=list(how.operators) or None,
            nodes_to_exclude=list(how.exclude) or None,
            use_external_data_format=model_bytes(source) > EXTERNAL_BYTES_MIN,
            **_common(how),
        )


def static_int8(
    source: Path, out: Path, how: Int8, feeds: Sequence[Feed], *, advance: Callable[[int], None] = lambda done: None
) -> None:
    """Write the statically quantized ``source`` to ``out``.

    Args:
        source: The fp32 model.
        out: Must not exist.
        how: See ``Int8``.
        feeds: Calibration data: inputs as the model will meet them.
        advance: Told after each feed.

    Raises:
        SourceError: it cannot be quantized, or ``out`` exists.
    """
    large = model_bytes(source) > EXTERNAL_BYTES_MIN
    with _making(source, out), tempfile.TemporaryDirectory(prefix="inferhub-quantize-") as scratch:
        prepared = Path(scratch, "prepared.onnx")
        # Shapes and fused operators first: a Conv with its BatchNormalization folded in is quantized as one.
        quant_pre_process(str(source), str(prepared), skip_symbolic_shape=True, save_as_external_data=large)
        quantization.quantize_static(
            str(prepared),
            str(out),
            _Reader(feeds, advance),
            quant_format=quantization.QuantFormat.QDQ,
            activation_type=quantization.QuantType.QUInt8,
            op_types_to_quantize=list(how.operators) or None,
            nodes_to_exclude=list(how.exclude) or None,
            calibrate_method=_METHODS[how.calibration],
            use_external_data_format=large,
            **_common(how),
        )


def model_files(model: Path) -> list[Path]:
    """Return the model file and the files of weights that it names, which lie beside it."""
    return [model, *(model.parent / name for name in external_files(model.parent, model.name))]


def model_bytes(model: Path) -> int:
    """Return the size of the model with its files of weights."""
    return sum(path.stat().st_size for path in model_files(model))


def saturates() -> bool:
    """Say whether 8-bit products may overflow on this CPU: x86 without VNNI."""
    if platform.machine() not in ("x86_64", "AMD64"):
        return False
    flags = next((line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("flags")), "")
    return "vnni" not in flags


class _Reader(quantization.CalibrationDataReader):  # type: ignore[misc]  # the library has no types
    def __init__(self, feeds: Sequence[Feed], advance: Callable[[int], None]) -> None:
        self._feeds = iter(feeds)
        self._advance = advance

    def get_next(self) -> Mapping[str, Any] | None:
        """Return the next feed, ``None`` behind the last."""
        feed = next(self._feeds, None)
        if feed is not None:
            self._advance(1)
        return feed


def _common(how: Int8) -> dict[str, Any]:
    kinds = {"int8": quantization.QuantType.QInt8, "uint8": quantization.QuantType.QUInt8}
    return {
        "weight_type": kinds[how.weights],
        "per_channel": how.per_channel,
        "reduce_range": how.reduce_range,
    }


@contextmanager
def _making(source: Path, out: Path) -> Iterator[None]:
    """Leave nothing behind when the body raises; say which model it was."""
    if out.exists():
        raise SourceError(f"{out}: exists already", hint="Choose another place.")
    folder_existed = out.parent.exists()
    out.parent.mkdir(parents=True, exist_ok=True)
    try:
        with _quiet():
            yield
    except Exception as error:  # the converters raise whatever their walk over the graph meets
        for path in out.parent.glob(f"{out.name}*"):
            path.unlink()
        if not folder_existed:
            shutil.rmtree(out.parent, ignore_errors=True)
        if isinstance(error, SourceError | MemoryError):
            raise
        told = " ".join(str(error).split())[:300]
        raise SourceError(f"{source.name}: cannot be converted: {told or type(error).__name__}") from error


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
