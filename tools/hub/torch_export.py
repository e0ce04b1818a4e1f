"""Export a torch model to ONNX: a module from a factory, an exported program or a TorchScript file.

Needs the ``export`` extra; without it, and only when it is needed, the error says how to get it. These sources run
code when they are opened (a factory is Python, the loaders unpickle): they are for the publisher's own models.
Leaves out: checking the result. ``quantize`` runs it before anything else is made of it.
"""

from __future__ import annotations

import importlib
import logging
import os
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final, Literal

import numpy as np
import numpy.typing as npt

from agent.bundles import inspection
from agent.errors import UnsafeBundleError
from tools.hub.errors import SourceError

Array = npt.NDArray[Any]
Source = Literal["onnx", "pt2", "torchscript", "module"]
OPSET: Final = 18
_INSTALL: Final = "Install it: pip install 'torch==2.13.0' and then 'inferd[export]'; the first on its own."
_EXAMPLE_ROWS: Final = 2  # one row would let the exporter fix the batch to 1


def kind_of(source: str) -> Source:
    """Return what ``source`` is: by its content if it is a file, else ``module:factory``.

    Raises:
        SourceError: neither, or a format that is never taken.
    """
    path = Path(source)
    if not path.exists():
        module, _, factory = source.partition(":")
        if all(part.isidentifier() for part in (*module.split("."), factory)):
            return "module"
        raise SourceError(f"{source}: No such file", hint="Give an .onnx, .pt2 or TorchScript file, or module:factory.")
    try:
        found = inspection.inspect_file(path).format
    except UnsafeBundleError as error:
        raise SourceError(str(error)) from error
    if found in ("torch-pickle", "pickle"):
        raise SourceError(
            f"{source}: pickled weights, not a model", hint="Give module:factory, whose factory loads them."
        )
    if found not in ("onnx", "pt2", "torchscript"):
        raise SourceError(f"{source}: {found}, which cannot be converted", hint="Give ONNX, .pt2 or TorchScript.")
    return found  # type: ignore[return-value]


def export(source: str, kind: Source, out: Path, example: Mapping[str, Array] | None) -> None:
    """Write the model ``source`` as ONNX to ``out``.

    Args:
        source: A path, or ``module:factory``; the factory takes nothing and returns an ``nn.Module``.
        kind: See ``kind_of``; not ``onnx``.
        out: Must not exist.
        example: Inputs by name, first axis = rows; an exported program brings its own.

    Raises:
        SourceError: torch is missing, the model cannot be opened, or torch cannot export it.
    """
    torch = _torch()
    out.parent.mkdir(parents=True, exist_ok=True)
    with _translated(source), _quiet():
        if kind == "pt2":
            program = torch.export.load(source)
            torch.onnx.export(program, (), str(out), dynamo=True, external_data=False, verbose=False)
            return
        module = torch.jit.load(source, map_location="cpu") if kind == "torchscript" else _made(source)
        module.eval()
        _trace(torch, module, out, _arguments(module, kind, example, source))


def _trace(torch: Any, module: Any, out: Path, example: Mapping[str, Array]) -> None:
    tensors = tuple(torch.from_numpy(np.ascontiguousarray(array[:_EXAMPLE_ROWS])) for array in example.values())
    rows = tensors[0].shape[0]
    with torch.no_grad():
        answers = module(*tensors)
    found = list(answers.values()) if isinstance(answers, dict) else answers
    found = list(found) if isinstance(found, list | tuple) else [found]
    named = (
        list(answers) if isinstance(answers, dict) else [f"output_{n}" if n else "output" for n in range(len(found))]
    )
    in_rows = [name for name, tensor in zip(example, tensors, strict=True) if tensor.ndim and tensor.shape[0] == rows]
    out_rows = [name for name, tensor in zip(named, found, strict=True) if tensor.ndim and tensor.shape[0] == rows]
    torch.onnx.export(
        module,
        tensors,
        str(out),
        input_names=list(example),
        output_names=named,
        dynamic_axes={name: {0: "N"} for name in (*in_rows, *out_rows)},
        opset_version=OPSET,
        dynamo=False,
    )


def _arguments(module: Any, kind: Source, example: Mapping[str, Array] | None, source: str) -> dict[str, Array]:
    """Return the example in the order of the module's arguments, under their names."""
    if not example:
        raise SourceError(f"{source}: exporting it needs an input", hint="Give --inputs FILE, first axis = rows.")
    names = _argument_names(module, kind)
    if fitting := {name: example[name] for name in names if name in example}:
        return fitting  # a file may hold more, such as labels; arguments with defaults may be absent
    if len(example) == 1:
        return dict(example)
    raise SourceError(
        f"{source}: takes {', '.join(names)}; the inputs are called {', '.join(example)}",
        hint="Name the arrays as the arguments are.",
    )


def _argument_names(module: Any, kind: Source) -> Sequence[str]:
    if kind == "torchscript":
        return [node.debugName().partition(".")[0] for node in module.graph.inputs()][1:]
    code = module.forward.__func__.__code__
    return list(code.co_varnames[1 : code.co_argcount])


def _made(source: str) -> Any:
    name, _, factory = source.partition(":")
    sys.path.insert(0, os.getcwd())
    try:
        module = getattr(importlib.import_module(name), factory)()
    finally:
        sys.path.remove(os.getcwd())
    if not hasattr(module, "forward"):
        raise SourceError(f"{source}: returned {type(module).__name__}, not a torch module")
    return module


def _torch() -> Any:
    try:
        return importlib.import_module("torch")
    except ImportError as error:
        raise SourceError("exporting this model needs torch, which is not installed", hint=_INSTALL) from error


@contextmanager
def _translated(source: str) -> Iterator[None]:
    try:
        yield
    except SourceError:
        raise
    except ModuleNotFoundError as error:
        hint = _INSTALL if error.name in ("onnxscript", "onnx_ir") else ""
        raise SourceError(f"{source}: {error}", hint=hint) from error
    except Exception as error:  # a factory is foreign code, and torch's exporters raise anything
        told = " ".join(str(error).split())[:500]
        raise SourceError(f"{source}: cannot be exported: {type(error).__name__}: {told}") from error


@contextmanager
def _quiet() -> Iterator[None]:
    """Hold back the exporters' running commentary."""
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(logging.NOTSET)
