"""ONNX Runtime behind the worker's protocol.

Promises: only the providers the spec names are used, and the first of them really is, or the load fails; threads
are as many as the spec says; weights in external data files are mapped by the runtime, not copied, and stay mapped if
the spec says so: otherwise the runtime makes its own copy of many in an order that its kernels read faster.
Leaves out: bfloat16 and sub-byte types, which NumPy cannot feed, sequences and maps: a model that takes or gives
them is refused at load.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

import numpy as np
import onnxruntime
from onnxruntime.capi import onnxruntime_pybind11_state as binding

from agent.errors import (
    AgentError,
    InferenceError,
    InvalidInputError,
    LoadError,
    OutOfMemoryError,
    TensorError,
    UnloadableError,
)
from agent.tensors import Array
from agent.worker.signature import Dimension, TensorSpec
from agent.worker.spec import Spec, inside

_DTYPES: Final = {
    "tensor(bool)": "bool", "tensor(uint8)": "uint8", "tensor(int8)": "int8", "tensor(uint16)": "uint16",
    "tensor(int16)": "int16", "tensor(uint32)": "uint32", "tensor(int32)": "int32", "tensor(uint64)": "uint64",
    "tensor(int64)": "int64", "tensor(float16)": "float16", "tensor(float)": "float32", "tensor(double)": "float64",
    "tensor(string)": "bytes",
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
_MEMORY_SIGNS: Final = ("bad_alloc", "failed to allocate", "out of memory", "bfcarena", "cannot allocate memory")


class OnnxRuntime:
    """One ``InferenceSession``."""

    def __init__(self, session: onnxruntime.InferenceSession, provider: str) -> None:
        self.provider = provider
        self.inputs = _specs(session.get_inputs())
        self.outputs = _specs(session.get_outputs())
        self._run = session.run
        self._names = [spec.name for spec in self.outputs]
        self._options: onnxruntime.RunOptions | None = None  # set once memory has run short
        self._texts = frozenset(spec.name for spec in self.inputs if spec.dtype == "bytes")

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """See ``Runtime.run``. A view into a received frame may be unaligned, which the runtime does not check."""
        feed = {name: array if array.flags.aligned else array.copy() for name, array in inputs.items()}
        for name in self._texts:
            feed[name] = _as_text(name, feed[name])
        try:
            return dict(zip(self._names, self._run(self._names, feed, self._options), strict=True))
        except _FOREIGN as error:
            failure = _translated(error)
            if isinstance(failure, OutOfMemoryError):
                self._options = _lean()
            raise failure from error


def load(spec: Spec) -> OnnxRuntime:
    """See ``base.Load``."""
    missing = [name for name in spec.providers if name not in onnxruntime.get_available_providers()]
    if missing:
        raise UnloadableError(f"execution provider {missing[0]} is not in this onnxruntime")
    path = inside(spec.bundle_dir, spec.entry)
    try:
        session = onnxruntime.InferenceSession(
            str(path), _options(spec), providers=[_provider(name, spec) for name in spec.providers]
        )
    except _FOREIGN as error:
        raise _load_failure(error)(f"{spec.entry}: {_short(error)}") from error
    session.disable_fallback()
    provider = session.get_providers()[0]
    if provider != spec.providers[0]:
        raise LoadError(
            f"execution provider {spec.providers[0]} could not be used; the runtime fell back to {provider}"
        )
    return OnnxRuntime(session, provider)


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
    return name, {"device_id": int(spec.device.get("index", 0))}


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


def _load_failure(error: Exception) -> type[AgentError]:
    """Return what a failed load was: the file's own fault is there at each try."""
    if _is_memory(error):
        return OutOfMemoryError
    permanent = isinstance(error, _PERMANENT) or any(sign in str(error) for sign in _PERMANENT_SIGNS)
    return UnloadableError if permanent else LoadError


def _translated(error: Exception) -> AgentError:
    if _is_memory(error):
        return OutOfMemoryError(_short(error))
    if type(error).__name__ == "InvalidArgument":
        return InvalidInputError(_short(error))
    return InferenceError(_short(error))


def _is_memory(error: Exception) -> bool:
    text = str(error).lower()
    return isinstance(error, MemoryError) or any(sign in text for sign in _MEMORY_SIGNS)


def _short(error: Exception) -> str:
    """Return the message without the binding's prefix ``[ONNXRuntimeError] : 2 : …`` and file positions."""
    return str(error).rsplit("[ONNXRuntimeError] : ", 1)[-1].strip()[:500] or type(error).__name__
