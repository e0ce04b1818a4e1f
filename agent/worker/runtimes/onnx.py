"""ONNX Runtime behind the worker's protocol.

Promises: only the providers the spec names are used, and the first of them really executes operators of the model, or
the load fails; threads are as many as the spec says; bfloat16 comes and goes as float32; weights in external
data files are mapped by the runtime, not copied, and stay mapped if the spec says so: otherwise the runtime makes its
own copy of many in an order that its kernels read faster.
Leaves out: sub-byte types, which NumPy cannot feed, sequences and maps: a model that takes or gives them is refused at
load.
"""

from __future__ import annotations

import ctypes
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

import numpy as np
import onnxruntime
from onnxruntime.capi import onnxruntime_pybind11_state as binding

from agent.errors import (
    AgentError,
    DeviceLostError,
    InferenceError,
    InvalidInputError,
    LoadError,
    OutOfMemoryError,
    TensorError,
    UnloadableError,
)
from agent.log import get_logger
from agent.tensors import Array
from agent.worker.runtimes import faults
from agent.worker.signature import Dimension, Signature, TensorSpec, as_served
from agent.worker.spec import Spec, inside

_log = get_logger("worker")
_DTYPES: Final = {
    "tensor(bool)": "bool", "tensor(uint8)": "uint8", "tensor(int8)": "int8", "tensor(uint16)": "uint16",
    "tensor(int16)": "int16", "tensor(uint32)": "uint32", "tensor(int32)": "int32", "tensor(uint64)": "uint64",
    "tensor(int64)": "int64", "tensor(float16)": "float16", "tensor(float)": "float32", "tensor(double)": "float64",
    "tensor(bfloat16)": "bfloat16", "tensor(string)": "bytes",
}  # fmt: skip
_LEVELS: Final = {
    "disable": onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL,
    "basic": onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC,
    "extended": onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED,
    "all": onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL,
}
_LOG_ERRORS_ONLY: Final = 3
_SILENT: Final = 4
_CPU: Final = "CPUExecutionProvider"
_TENSORRT: Final = "TensorrtExecutionProvider"
_BFLOAT16: Final = 16  # onnx.TensorProto.BFLOAT16
# A spinning thread pool answers a little sooner and burns a core after every request: wrong on a shared small box.
_CONFIG: Final = {"session.intra_op.allow_spinning": "0", "session.inter_op.allow_spinning": "0"}
# The binding's exceptions have no root of their own.
_FOREIGN: Final[tuple[type[Exception], ...]] = (
    *(c for c in vars(binding).values() if isinstance(c, type) and issubclass(c, Exception)),
    ValueError,
    TypeError,
    RuntimeError,
    MemoryError,
)
_PERMANENT: Final = tuple(
    getattr(binding, name)
    for name in ("InvalidProtobuf", "InvalidGraph", "InvalidArgument", "NoSuchFile", "NoModel", "NotImplemented")
)
# What the library calls a mere failure, and is the file's: an operator or version it does not know, weights not there.
_PERMANENT_SIGNS: Final = (
    "is not a registered function/op",
    "ValidateOpsetForDomain",
    "Unsupported model IR version",
    "onnxruntime::Model::Model",
    "External data path",
)

Run = Callable[[Sequence[str], Mapping[str, Array], onnxruntime.RunOptions | None], Sequence[Array]]


class OnnxRuntime:
    """One ``InferenceSession``."""

    def __init__(
        self,
        session: onnxruntime.InferenceSession,
        declared: Signature,
        *,
        device_kind: str,
        provider: str,
        placement: Mapping[str, int],
    ) -> None:
        inputs, outputs = _specs(session.get_inputs()), _specs(session.get_outputs())
        self.provider = provider
        self.placement = placement
        self._device_kind = device_kind
        self.inputs = as_served(inputs, declared.inputs)
        self.outputs = as_served(outputs, declared.outputs)
        self._names = [spec.name for spec in outputs]
        self._run = _runner(session, inputs, outputs)
        self._options: onnxruntime.RunOptions | None = None  # set once memory has run short
        self._takes = _conversions(self.inputs, inputs)
        self._gives = _conversions(outputs, self.outputs)
        self._texts = frozenset(spec.name for spec in inputs if spec.dtype == "bytes")

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """See ``Runtime.run``. A view into a received frame may be unaligned, which the runtime does not check."""
        feed = {name: array if array.flags.aligned else array.copy() for name, array in inputs.items()}
        for name in self._texts:
            feed[name] = _as_text(name, feed[name])
        for name, dtype in self._takes.items():
            feed[name] = feed[name].astype(dtype, copy=False)
        try:
            outputs = dict(zip(self._names, self._run(self._names, feed, self._options), strict=True))
        except _FOREIGN as error:
            failure = _translated(error, self._device_kind)
            if isinstance(failure, OutOfMemoryError):
                self._options = _lean()
            raise failure from error
        for name, dtype in self._gives.items():
            outputs[name] = outputs[name].astype(dtype, copy=False)
        return outputs

    def device_peak_bytes(self) -> int | None:
        """See ``Runtime.device_peak_bytes``: this library does not tell."""
        return None


class _Narrow:
    """``session.run`` for tensors of bfloat16, which pass through the library's own values."""

    def __init__(self, session: onnxruntime.InferenceSession, inputs: frozenset[str]) -> None:
        self._session = session
        self._inputs = inputs

    def run(
        self, names: Sequence[str], feed: Mapping[str, Array], options: onnxruntime.RunOptions | None
    ) -> list[Array]:
        """Return the outputs called ``names``."""
        make = onnxruntime.OrtValue
        values = {
            name: make.ortvalue_from_numpy_with_onnx_type(_narrowed(array), _BFLOAT16)
            if name in self._inputs
            else make.ortvalue_from_numpy(array)
            for name, array in feed.items()
        }
        return [_wide(value) for value in self._session.run_with_ort_values(names, values, options)]


def load(spec: Spec, declared: Signature) -> OnnxRuntime:
    """See ``base.Load``."""
    if not spec.providers:
        raise UnloadableError("device.providers is empty: a variant names its execution provider")
    missing = [name for name in spec.providers if name not in onnxruntime.get_available_providers()]
    if missing:
        raise UnloadableError(f"execution provider {missing[0]} is not in this onnxruntime")
    path = inside(spec.bundle_dir, spec.entry)
    try:
        session = onnxruntime.InferenceSession(
            str(path), _options(spec), providers=[_provider(name, spec) for name in spec.providers]
        )
    except _FOREIGN as error:
        raise _load_failure(error, spec.device_kind)(f"{spec.entry}: {_short(error)}") from error
    session.disable_fallback()
    provider = session.get_providers()[0]
    if provider != spec.providers[0]:
        raise LoadError(
            f"execution provider {spec.providers[0]} could not be used; the runtime fell back to {provider}"
        )
    placement = _placement(session, provider)
    return OnnxRuntime(session, declared, device_kind=spec.device_kind, provider=provider, placement=placement)


def _placement(session: onnxruntime.InferenceSession, provider: str) -> dict[str, int]:
    """Return how many operators each provider executes; empty for a model of the CPU, or where nobody can tell.

    Raises:
        UnloadableError: ``provider`` is there and executes none: the model would run elsewhere under its name.
    """
    if provider == _CPU or not hasattr(session, "get_provider_graph_assignment_info"):
        return {}
    placement: Counter[str] = Counter()
    for part in session.get_provider_graph_assignment_info():
        placement[part.ep_name] += len(part.get_nodes())
    if placement and not placement[provider]:
        raise UnloadableError(f"{provider} executes none of the {placement.total()} operators of this model")
    if placement[_CPU]:
        _log.warning("part of the model runs on the CPU", operators=dict(placement))
    return dict(placement)


def _lean() -> onnxruntime.RunOptions:
    """Return options with which a run gives its memory back: the runtime's arena would keep all it ever got."""
    options = onnxruntime.RunOptions()
    options.log_severity_level = _SILENT  # the failure is raised; each try to halve it need not be printed too
    options.add_run_config_entry("memory.enable_memory_arena_shrinkage", "cpu:0")
    return options


def _options(spec: Spec) -> onnxruntime.SessionOptions:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = spec.threads_intra
    options.inter_op_num_threads = spec.threads_inter
    options.log_severity_level = _LOG_ERRORS_ONLY
    level = spec.session.get("graph_opt", "all")
    if level not in _LEVELS:
        raise UnloadableError(f"session.graph_opt must be one of {', '.join(_LEVELS)}, got {level!r}")
    config = {**_CONFIG, **spec.session.get("config", {})}
    if spec.providers[0] != _CPU:
        config["session.record_ep_graph_assignment_info"] = "1"
    if spec.share_weights and spec.providers[0] == _CPU:
        config["session.disable_prepacking"] = "1"
        level = "extended" if level == "all" else level  # "all" reorders the weights of convolutions
    options.graph_optimization_level = _LEVELS[level]
    for key, value in config.items():
        if not key.startswith("session.") or not isinstance(value, str):
            raise UnloadableError(f"session.config: {key!r} must begin with 'session.' and map to a text")
        options.add_session_config_entry(key, value)
    return options


def _provider(name: str, spec: Spec) -> str | tuple[str, dict[str, Any]]:
    if name == _CPU:
        return name
    options: dict[str, Any] = {"device_id": spec.visible_index}
    if name == _TENSORRT:  # engines are built from the ONNX file at each load, for exactly this GPU
        options["trt_fp16_enable"] = spec.precision == "fp16"
    return name, options


def _specs(nodes: Sequence[Any]) -> tuple[TensorSpec, ...]:
    specs = []
    for node in nodes:
        if node.type not in _DTYPES:
            raise UnloadableError(f"tensor {node.name!r} has type {node.type}, which cannot be served")
        shape: tuple[Dimension, ...] = tuple(size if isinstance(size, int | str) else None for size in node.shape)
        specs.append(TensorSpec(node.name, _DTYPES[node.type], shape))
    return tuple(specs)


def _as_text(name: str, array: Array) -> Array:
    """Return the elements as ``str``: the binding would print ``bytes`` objects instead of passing them."""
    texts = np.empty(array.size, dtype=object)
    try:
        texts[:] = [item if isinstance(item, str) else bytes(item).decode() for item in array.reshape(-1)]
    except UnicodeDecodeError as error:
        raise TensorError(f"input {name!r}: an element is not UTF-8 text") from error
    return texts.reshape(array.shape)


def _runner(session: onnxruntime.InferenceSession, inputs: Sequence[TensorSpec], outputs: Sequence[TensorSpec]) -> Run:
    narrow = frozenset(spec.name for spec in inputs if spec.dtype == "bfloat16")
    if narrow or any(spec.dtype == "bfloat16" for spec in outputs):
        return _Narrow(session, narrow).run
    run: Run = session.run
    return run


def _conversions(given: Sequence[TensorSpec], wanted: Sequence[TensorSpec]) -> dict[str, str]:
    """Return NumPy's name of the dtype that each tensor is converted to, for those that are."""
    return {
        spec.name: "float32" if target.dtype == "bfloat16" else target.dtype  # which ``_Narrow`` takes and gives
        for spec, target in zip(given, wanted, strict=True)
        if spec.dtype != target.dtype
    }


def _narrowed(array: Array) -> Array:
    """Return the upper halves of float32 values, rounded to even, in which NaN stays NaN."""
    bits = np.ascontiguousarray(array, dtype=np.float32).view(np.uint32)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return np.where(np.isnan(array), 0x7FC0, rounded).astype(np.uint16)


def _wide(value: onnxruntime.OrtValue) -> Array:
    """Return a value's array; bfloat16, for which the binding has none, as float32."""
    if value.element_type() != _BFLOAT16:
        array: Array = value.numpy()
        return array
    count = value.tensor_size_in_bytes() // 2
    halves = np.ctypeslib.as_array((ctypes.c_uint16 * count).from_address(value.data_ptr()))
    return (halves.astype(np.uint32) << 16).view(np.float32).reshape(value.shape())


def _load_failure(error: Exception, device_kind: str) -> type[AgentError]:
    """Return what a failed load was: the file's own fault is there at each try."""
    failure = _translated(error, device_kind)
    if isinstance(failure, OutOfMemoryError | DeviceLostError):
        return type(failure)
    permanent = isinstance(error, _PERMANENT) or any(sign in str(error) for sign in _PERMANENT_SIGNS)
    return UnloadableError if permanent else LoadError


def _translated(error: Exception, device_kind: str) -> AgentError:
    if faults.is_memory(error):
        return OutOfMemoryError(_short(error))
    if device_kind == "cuda" and faults.is_device_loss(error):
        return DeviceLostError(_short(error))
    if type(error).__name__ == "InvalidArgument":
        return InvalidInputError(_short(error))
    return InferenceError(_short(error))


def _short(error: Exception) -> str:
    """Return the message without the binding's prefix ``[ONNXRuntimeError] : 2 : …`` and file positions."""
    return str(error).rsplit("[ONNXRuntimeError] : ", 1)[-1].strip()[:500] or type(error).__name__
