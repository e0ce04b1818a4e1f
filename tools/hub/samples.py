"""Inputs for a model, read from what people have: a folder of samples, one ``.npz``, ``.npy`` or ``.safetensors`` file.

Promises: every feed that is returned fits the model's inputs (names, dtypes, fixed dimensions), with the batch axis the
model wants; nothing is unpickled; a file that does not fit is an error that says what was expected.

A file whose first axis counts rows is cut into feeds. In a folder each file is one sample or several rows: ``.npz`` and
``.safetensors`` name the inputs; ``.npy`` and raw bytes (any other suffix) are for models with one input.
"""

from __future__ import annotations

import math
import os
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from agent.bundles.onnx_facts import Port
from agent.errors import UnsafeBundleError
from agent.worker import safetensors
from tools.hub.errors import SourceError

Array = npt.NDArray[Any]
Feed = Mapping[str, Array]
RANDOM_ROWS: Final = 16
_NAMED: Final = frozenset({".npz", ".safetensors"})


@dataclass(frozen=True, slots=True, kw_only=True)
class Samples:
    """Feeds of one row each, unless the model's batch is fixed. ``real``: given by a person, not made up."""

    feeds: tuple[Feed, ...]
    real: bool
    rows_skipped: int = 0  # beyond the wanted number

    @property
    def digest(self) -> str:
        """sha256 over all feeds: which data a calibration was made from."""
        hasher = sha256()
        for feed in self.feeds:
            for name in sorted(feed):
                hasher.update(f"{name}{feed[name].dtype}{feed[name].shape}".encode())
                hasher.update(np.ascontiguousarray(feed[name]).tobytes())
        return hasher.hexdigest()


def load(path: Path, inputs: Sequence[Port], *, rows_max: int) -> Samples:
    """Return at most ``rows_max`` feeds from ``path``.

    Raises:
        SourceError: nothing there, an unreadable file, or arrays that do not fit the model's inputs.
    """
    files = _files(path)
    if not files:
        raise SourceError(
            f"{path}: no samples", hint="A folder of .npz, .npy or raw files, or one .npz or .safetensors."
        )
    feeds: list[Feed] = []
    skipped = 0
    for file in files:
        if len(feeds) >= rows_max:
            skipped += 1
            continue
        for feed in _feeds(file, inputs):
            if len(feeds) < rows_max:
                feeds.append(feed)
            else:
                skipped += 1
    return Samples(feeds=tuple(feeds), real=True, rows_skipped=skipped)


def peek(path: Path) -> Mapping[str, Array]:
    """Return the arrays of the first file, before there is a model to fit them to: an example for an exporter.

    Raises:
        SourceError: there is none, or it does not know its own shape.
    """
    files = _files(path)
    if not files or files[0].suffix.casefold() not in _NAMED | {".npy"}:
        raise SourceError(f"{path}: no .npz, .npy or .safetensors file", hint="An exporter needs arrays with a shape.")
    return _read(files[0], [Port("input", "", ())]) if files[0].suffix == ".npy" else _read(files[0], ())


def of_arrays(arrays: Mapping[str, Array], inputs: Sequence[Port], *, where: str) -> list[Feed]:
    """Return the feeds in ``arrays``; ``where`` names them in errors.

    Raises:
        SourceError: they do not fit the model's inputs.
    """
    wanted = {port.name for port in inputs}
    unknown = sorted(set(arrays) - wanted)
    missing = sorted(wanted - set(arrays))
    if len(arrays) == len(inputs) == 1 and missing:
        arrays = {inputs[0].name: next(iter(arrays.values()))}
    elif missing:
        has = f"; it has {', '.join(unknown)}" if unknown else ""
        raise SourceError(f"{where}: no array for the input {missing[0]!r}{has}", hint="Name arrays as the inputs are.")
    fitted = {port.name: _fit(arrays[port.name], port, where) for port in inputs}
    return list(_rows(fitted, inputs))


def random(inputs: Sequence[Port], *, rows: int = RANDOM_ROWS) -> Samples:
    """Return made-up inputs: they show speed and size, and prove little about agreement.

    Raises:
        SourceError: an input has a type that cannot be made up.
    """
    source = np.random.default_rng(0)
    feeds = []
    for _ in range(rows):
        feed: dict[str, Array] = {}
        for port in inputs:
            if port.dtype in ("", "bytes") or port.dtype not in np.sctypeDict:
                raise SourceError(
                    f"input {port.name}: {port.dtype or 'no tensor'} cannot be made up", hint="Give real ones: --inputs"
                )
            dtype = np.dtype(port.dtype)
            shape = [size if isinstance(size, int) else 1 for size in port.shape]
            values = source.normal(size=shape) if dtype.kind == "f" else source.integers(0, 2, size=shape)
            feed[port.name] = np.asarray(values).astype(dtype)
        feeds.append(feed)
    return Samples(feeds=tuple(feeds), real=False)


def stacked(feeds: Sequence[Feed]) -> dict[str, Array] | None:
    """Return ``feeds`` joined along the first axis, ``None`` if their shapes do not allow it."""
    if any(array.ndim == 0 for feed in feeds for array in feed.values()):
        return dict(feeds[0]) if len(feeds) == 1 else None
    if any(len({feed[name].shape[1:] for feed in feeds}) != 1 for name in feeds[0]):
        return None
    return {name: np.concatenate([feed[name] for feed in feeds]) for name in feeds[0]}


def batch_of(inputs: Sequence[Port]) -> int | None:
    """Return how many rows one run takes: 1 where the first dimension is open, ``None`` where rows cannot be cut."""
    firsts = {port.shape[0] if port.shape else None for port in inputs}
    if any(not port.shape for port in inputs):
        return None
    numbers = {size for size in firsts if isinstance(size, int)}
    if not numbers:
        return 1
    return numbers.pop() if len(numbers) == 1 and len(firsts) == 1 else None


def _files(path: Path) -> list[Path]:
    if path.is_dir():
        return sorted(item for item in path.rglob("*") if item.is_file() and not item.name.startswith("."))
    if not path.exists():
        raise SourceError(f"{path}: No such file or directory", hint="Name a folder or a file of samples.")
    return [path]


def _feeds(file: Path, inputs: Sequence[Port]) -> Iterator[Feed]:
    yield from of_arrays(_read(file, inputs), inputs, where=str(file))


def _read(file: Path, inputs: Sequence[Port]) -> Mapping[str, Array]:
    suffix = file.suffix.casefold()
    if suffix not in _NAMED and len(inputs) != 1:
        names = ", ".join(port.name for port in inputs)
        raise SourceError(f"{file}: the model has several inputs ({names})", hint="Use .npz files with these names.")
    try:
        if suffix == ".safetensors":
            return safetensors.read(file)
        if suffix == ".npz":
            with np.load(file, allow_pickle=False) as archive:
                wanted = [name for name in archive.files if name in {port.name for port in inputs}]
                return {name: archive[name] for name in wanted or archive.files}
        if suffix == ".npy":
            return {inputs[0].name: np.load(file, allow_pickle=False)}
        return {inputs[0].name: _raw(file, inputs[0])}
    except UnsafeBundleError as error:
        raise SourceError(f"{file}: {error}") from error
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise SourceError(
            f"{file}: cannot be read: {error}", hint="Object arrays need pickle and are refused."
        ) from error


def _raw(file: Path, port: Port) -> Array:
    """Return the file's bytes as rows of ``port``: plain little-endian numbers, as many as one row takes or more."""
    if port.dtype in ("", "bytes", "bfloat16") or port.dtype not in np.sctypeDict:
        raise SourceError(f"{file}: raw bytes cannot be {port.dtype or 'what is no tensor'}")
    dtype = np.dtype(port.dtype).newbyteorder("<")
    shape = [size if isinstance(size, int) else -1 for size in port.shape[1:]]
    size = os.path.getsize(file)
    known = math.prod(size for size in shape if size >= 0) * dtype.itemsize
    opened = shape.count(-1)
    if opened > 1 or not known or not size or size % known:
        raise SourceError(
            f"{file}: {size} bytes do not fit {_shown(port)}", hint="Save it as .npy or .npz, which know their shape."
        )
    values = np.fromfile(file, dtype=dtype).astype(port.dtype)
    return values.reshape((1 if opened else -1, *shape))


def _fit(array: Array, port: Port, where: str) -> Array:
    """Return ``array`` as the input takes it: its dtype where nothing is lost, a batch axis where it lacks one."""
    if array.ndim == len(port.shape) - 1:
        array = array[np.newaxis]
    fixed = list(port.shape[1:])
    if array.ndim != len(port.shape) or any(
        isinstance(size, int) and size != have for size, have in zip(fixed, array.shape[1:], strict=True)
    ):
        raise SourceError(f"{where}: {port.name} has shape {list(array.shape)}, the model takes {_shown(port)}")
    if port.dtype == "bytes":
        return array
    wanted = np.dtype(port.dtype)
    if array.dtype == wanted:
        return array
    if not np.can_cast(array.dtype, wanted, "same_kind"):
        raise SourceError(f"{where}: {port.name} is {array.dtype}, the model takes {port.dtype}")
    return array.astype(wanted)


def _rows(arrays: Mapping[str, Array], inputs: Sequence[Port]) -> Iterator[Feed]:
    step = batch_of(inputs)
    counts = {array.shape[0] for array in arrays.values() if array.ndim}
    if step is None or len(counts) != 1:
        yield dict(arrays)
        return
    for row in range(0, counts.pop() - step + 1, step):
        yield {name: array[row : row + step] for name, array in arrays.items()}


def _shown(port: Port) -> str:
    return f"{port.dtype}[{', '.join('?' if size is None else str(size) for size in port.shape)}]"
