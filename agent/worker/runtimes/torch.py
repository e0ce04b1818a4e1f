"""torch behind the worker's protocol, on the CPU or one CUDA device, in inference mode.

``session`` of a variant may hold, of TorchScript, ``freeze`` (fold the weights into the graph; not for modules that
keep state) and ``floats`` ("float16": the type that floating inputs are converted to, which only exported programs
tell by themselves), and on CUDA ``cuda_graphs`` (record the launches of each input shape once).
Promises: the model lies on the device it was asked for, or the load fails; outputs have the declared names, dtypes
and shapes; threads are as many as the spec says.
Leaves out: compiling. What was exported is what runs.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

import torch

from agent.errors import (
    AgentError,
    DeviceLostError,
    InferenceError,
    InvalidInputError,
    LoadError,
    OutOfMemoryError,
    OutputError,
    UnloadableError,
)
from agent.tensors import Array
from agent.worker.runtimes import faults, torch_arrays, torch_programs
from agent.worker.runtimes.torch_graphs import Graphs
from agent.worker.runtimes.torch_programs import Exported, Program, Script
from agent.worker.signature import Signature, converts
from agent.worker.spec import Spec, inside

# What the library says of a file that it can never read. Of an exported program it mostly says nothing but that there
# was an error, which may have been the moment's.
_PERMANENT_SIGNS: Final = (
    "Unknown builtin op",
    "PyTorch file with version",
    "PytorchStreamReader failed",
    "pickler archive",
    "INTERNAL ASSERT FAILED",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """A variant's ``session``."""

    freeze: bool = False
    floats: str = ""
    cuda_graphs: bool = False


class TorchRuntime:
    """One program on one device."""

    def __init__(self, program: Program, device: torch.device, *, cuda_graphs: bool) -> None:
        self.inputs = program.inputs
        self.outputs = program.outputs
        self.provider = f"torch {device.type}"
        self.placement: Mapping[str, int] = {}
        self._program = program
        self._device = device
        self._takes = program.takes
        self._call = Graphs(self._tensors) if cuda_graphs else self._tensors

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """See ``Runtime.run``."""
        try:
            with torch.inference_mode():
                given = {
                    name: torch_arrays.to_tensor(array, self._takes[name], self._device)
                    for name, array in inputs.items()
                }
                found = self._call(given)
                return {spec.name: torch_arrays.to_array(found[spec.name], spec) for spec in self.outputs}
        except AgentError:
            raise
        except Exception as error:
            failure = _translated(error, self._device.type)
            if isinstance(failure, OutOfMemoryError) and self._device.type == "cuda":
                torch.cuda.empty_cache()
            raise failure from error

    def device_peak_bytes(self) -> int | None:
        """See ``Runtime.device_peak_bytes``: what torch's allocator held; the context itself is not in it."""
        return int(torch.cuda.max_memory_reserved(self._device)) if self._device.type == "cuda" else None

    def _tensors(self, given: Mapping[str, torch.Tensor]) -> Mapping[str, Any]:
        result = self._program.call(given)
        try:
            return torch_programs.by_name(result, self.outputs)
        except ValueError as error:
            names = ", ".join(spec.name for spec in self.outputs)
            raise OutputError(f"{error}; declared are {names}") from error


def load(spec: Spec, declared: Signature) -> TorchRuntime:
    """See ``base.Load``."""
    options = _options(spec)
    device = _device(spec)
    torch.set_num_threads(spec.threads_intra)
    torch.set_num_interop_threads(spec.threads_inter)
    for tensor in (*declared.inputs, *declared.outputs):
        if tensor.dtype not in torch_arrays.DTYPES:
            raise UnloadableError(f"{tensor.name!r} is declared {tensor.dtype}, which torch has not")
    path = inside(spec.bundle_dir, spec.entry)
    try:
        program: Program
        if torch_programs.is_exported(path):
            program = Exported(path, device, declared)
        else:
            floats = torch_arrays.DTYPES[options.floats] if options.floats else None
            program = Script(path, device, declared, freeze=options.freeze, floats=floats)
        elsewhere = {tensor.device.type for tensor in program.held()} - {device.type}
    except AgentError:
        raise
    except Exception as error:  # what unpickles and runs a file may raise anything
        raise _load_failure(error, device.type)(f"{spec.entry}: {_short(error)}") from error
    if elsewhere:
        raise UnloadableError(
            f"{spec.entry}: part of the model stays on {', '.join(sorted(elsewhere))}, not on {device}"
        )
    if options.cuda_graphs and program.scalars:
        raise UnloadableError("session.cuda_graphs: an input of this model is a number that is read on the host")
    return TorchRuntime(program, device, cuda_graphs=options.cuda_graphs)


def _options(spec: Spec) -> Options:
    kinds = {name: type(default) for name, default in dataclasses.asdict(Options()).items()}
    for name, value in spec.session.items():
        if name not in kinds:
            raise UnloadableError(f"session: torch knows {', '.join(kinds)}, not {name!r}")
        if type(value) is not kinds[name]:
            raise UnloadableError(f"session.{name}: must be {kinds[name].__name__}, got {value!r}")
    options = Options(**spec.session)
    if options.floats and not converts(options.floats, "float32"):
        raise UnloadableError(f"session.floats: must be a floating type, got {options.floats!r}")
    if options.cuda_graphs and spec.device_kind != "cuda":
        raise UnloadableError(f"session.cuda_graphs needs a CUDA device, this variant runs on {spec.device_name}")
    return options


def _device(spec: Spec) -> torch.device:
    if spec.providers:
        raise UnloadableError(f"device.providers: torch has none, got {', '.join(spec.providers)}")
    if spec.device_kind == "cpu":
        return torch.device("cpu")
    if spec.device_kind != "cuda":
        raise UnloadableError(f"torch does not run on {spec.device_kind!r}")
    if not torch.cuda.is_available():
        raise LoadError(f"CUDA cannot be used by this torch ({torch.__version__})")
    device = torch.device("cuda", spec.visible_index)
    torch.cuda.set_device(device)
    return device


def _load_failure(error: Exception, device_kind: str) -> type[AgentError]:
    """Return what a failed load was: the file's own fault is there at each try."""
    failure = _translated(error, device_kind)
    if isinstance(failure, OutOfMemoryError | DeviceLostError):
        return type(failure)
    permanent = isinstance(error, ValueError) or any(sign in str(error) for sign in _PERMANENT_SIGNS)
    return UnloadableError if permanent else LoadError


def _translated(error: Exception, device_kind: str) -> AgentError:
    text = _short(error)
    if isinstance(error, torch.OutOfMemoryError) or faults.is_memory(error):
        return OutOfMemoryError(text)
    if device_kind == "cuda" and faults.is_device_loss(error):
        return DeviceLostError(text)
    if isinstance(error, AssertionError):  # the guards of an exported program: sizes it was not made for
        return InvalidInputError(text)
    return InferenceError(text)


def _short(error: Exception) -> str:
    return str(error).strip()[:500] or type(error).__name__
