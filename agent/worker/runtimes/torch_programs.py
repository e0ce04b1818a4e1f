"""The two kinds of file that torch runs, behind one call: TorchScript, and programs of ``torch.export`` (``.pt2``).

Inputs go by name where the file knows the declared names, else in the declared order. Loading either runs what the
file says, so both are native code: only signed, and only inside the sandbox.
"""

from __future__ import annotations

import zipfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, Protocol

import torch

from agent.errors import UnloadableError
from agent.worker.runtimes.torch_arrays import DTYPES, NAMES
from agent.worker.signature import Dimension, Signature, TensorSpec, as_served, converts

_SCALARS: Final = frozenset({"int", "float", "bool"})
_TENSORS: Final = frozenset({"Tensor", "Optional[Tensor]"})


class Program(Protocol):
    """A loaded model file."""

    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    takes: Mapping[str, torch.dtype]  # what each input is converted to
    scalars: bool  # whether an input is read on the host, so that no graph of the device can hold it

    def call(self, tensors: Mapping[str, torch.Tensor]) -> object:
        """Return whatever the model returns."""
        ...

    def held(self) -> list[torch.Tensor]:
        """Return its parameters and buffers."""
        ...


class Script:
    """A TorchScript module. The file says nothing of dtypes and shapes: what is declared is taken for its own."""

    def __init__(
        self, path: Path, device: torch.device, declared: Signature, *, freeze: bool, floats: torch.dtype | None
    ) -> None:
        """``floats``: what floating inputs are converted to; ``None``: they stay as declared."""
        module = torch.jit.load(str(path), map_location=device).eval()
        self._module: Any = torch.jit.freeze(module) if freeze else module
        self.inputs, self.outputs = declared.inputs, declared.outputs
        self.takes: Mapping[str, torch.dtype] = {
            spec.name: floats if floats is not None and converts(spec.dtype, "float32") else DTYPES[spec.dtype]
            for spec in declared.inputs
        }
        arguments = module.forward.schema.arguments[1:]
        by_name = {argument.name: argument for argument in arguments}
        names = [spec.name for spec in declared.inputs]
        required = [argument for argument in arguments if not argument.has_default_value()]
        self._named = set(names) <= set(by_name) and {argument.name for argument in required} <= set(names)
        if not self._named and not len(required) <= len(names) <= len(arguments):
            raise UnloadableError(f"forward takes {', '.join(by_name) or 'nothing'}; declared are {', '.join(names)}")
        taken = [by_name[name] for name in names] if self._named else arguments
        kinds = {name: str(argument.type) for name, argument in zip(names, taken, strict=False)}
        for name, kind in kinds.items():
            if kind not in _SCALARS | _TENSORS:
                raise UnloadableError(f"input {name!r}: forward wants {kind}, which cannot be served")
        self._read_on_host = {name for name, kind in kinds.items() if kind in _SCALARS}
        self.scalars = bool(self._read_on_host)

    def call(self, tensors: Mapping[str, torch.Tensor]) -> object:
        """See ``Program.call``; an argument that is a number is read out of its tensor of one element."""
        values = {
            name: tensor.item() if name in self._read_on_host else tensor
            for name, tensor in ((spec.name, tensors[spec.name]) for spec in self.inputs)
        }
        return self._module(**values) if self._named else self._module(*values.values())

    def held(self) -> list[torch.Tensor]:
        """See ``Program.held``."""
        return [*self._module.parameters(), *self._module.buffers()]


class Exported:
    """A program of ``torch.export``, whose graph tells dtypes and shapes."""

    scalars = False

    def __init__(self, path: Path, device: torch.device, declared: Signature) -> None:
        from torch.utils import _pytree  # what torch.export describes its arguments with

        program = torch.export.load(str(path))
        if device.type != "cpu":
            from torch.export.passes import move_to_device_pass

            program = move_to_device_pass(program, str(device))
        taken, given = program.graph_signature.user_inputs, program.graph_signature.user_outputs
        known = {node.name: node.meta.get("val") for node in program.graph.nodes}
        if not all(isinstance(known.get(str(name)), torch.Tensor) for name in (*taken, *given)):
            raise UnloadableError("the program takes or gives something that is no tensor")
        counts, wanted = (len(taken), len(given)), (len(declared.inputs), len(declared.outputs))
        if counts != wanted:
            raise UnloadableError(
                "the program has {} inputs and {} outputs; declared are {} and {}".format(*counts, *wanted)
            )
        self._order = list(taken) if set(taken) == set(declared.by_name) else list(declared.by_name)
        found = [_found(name, known[place]) for name, place in zip(self._order, taken, strict=True)]
        self.takes: Mapping[str, torch.dtype] = {
            name: known[place].dtype for name, place in zip(self._order, taken, strict=True)
        }
        self.inputs = as_served(found, declared.inputs)
        self.outputs = as_served(
            [_found(name, known[place]) for name, place in zip(declared.output_names, given, strict=True)],
            declared.outputs,
        )
        self._module: Any = program.module()
        self._arguments: Callable[[list[torch.Tensor]], tuple[tuple[Any, ...], dict[str, Any]]] = lambda flat: (
            _pytree.tree_unflatten(flat, program.call_spec.in_spec)
        )

    def call(self, tensors: Mapping[str, torch.Tensor]) -> object:
        """See ``Program.call``."""
        positional, named = self._arguments([tensors[name] for name in self._order])
        return self._module(*positional, **named)

    def held(self) -> list[torch.Tensor]:
        """See ``Program.held``."""
        return [*self._module.parameters(), *self._module.buffers()]


def is_exported(path: Path) -> bool:
    """Whether the file is a program of ``torch.export``.

    Raises:
        UnloadableError: it is neither that nor TorchScript.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            members = {name.partition("/")[2] or name for name in archive.namelist()}
    except (FileNotFoundError, zipfile.BadZipFile) as error:
        raise UnloadableError(f"{path.name}: not a file of torch: {error}") from error
    if members & {"archive_format", "serialized_exported_program.json"}:
        return True
    if "constants.pkl" not in members:
        raise UnloadableError(f"{path.name}: neither TorchScript nor a program of torch.export")
    return False


def by_name(result: object, outputs: Sequence[TensorSpec]) -> dict[str, object]:
    """Return what a model returned by the declared names: a map's own keys, else the declared order.

    Raises:
        ValueError: other keys, or another number.
    """
    if isinstance(result, Mapping):
        if set(result) != {spec.name for spec in outputs}:
            raise ValueError(f"the model returned {', '.join(map(str, result))}")
        return dict(result)
    flat = list(result) if isinstance(result, tuple | list) else [result]
    if len(flat) != len(outputs):
        raise ValueError(f"the model returned {len(flat)} outputs")
    return {spec.name: value for spec, value in zip(outputs, flat, strict=True)}


def _found(name: str, value: torch.Tensor) -> TensorSpec:
    """Return the tensor as the graph has it."""
    shape: tuple[Dimension, ...] = tuple(int(size) if isinstance(size, int) else str(size) for size in value.shape)
    return TensorSpec(name, NAMES.get(value.dtype, str(value.dtype)), shape)
