"""A model's inputs and outputs as its manifest declares them, and the check of a request against them.

Promises: arrays that pass have the declared names, dtypes and ranks, fixed dimensions as declared, one value per
named dimension and within its bounds; every refusal names the tensor, what was expected and what came.
Leaves out: decoding (``requests.py``) and whether the model file agrees (the runtime is asked at load).
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from agent.errors import TensorError, UnloadableError
from agent.wire import DTYPES

Dimension = int | str | None  # fixed, named, or free
_SIZE_MAX: Final = 1 << 40
_FLOATS: Final = frozenset({"float16", "bfloat16", "float32", "float64"})


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """One declared tensor."""

    name: str
    dtype: str  # the wire's name
    shape: tuple[Dimension, ...]

    def __str__(self) -> str:
        return f"{self.dtype}[{', '.join('*' if size is None else str(size) for size in self.shape)}]"

    def as_dict(self) -> dict[str, Any]:
        """Return the entry that the worker's hello carries."""
        return {"name": self.name, "dtype": self.dtype, "shape": list(self.shape)}


class Signature:
    """The declared tensors; ``batch_axis`` is set only if every input and output begins with it."""

    def __init__(
        self,
        inputs: Sequence[TensorSpec],
        outputs: Sequence[TensorSpec],
        *,
        bounds: Mapping[str, tuple[int, int]],
        batch_axis: str | None,
        rows_max: int,
    ) -> None:
        self.inputs: Final = tuple(inputs)
        self.outputs: Final = tuple(outputs)
        self.bounds: Final = dict(bounds)
        self.output_names: Final = tuple(spec.name for spec in outputs)
        self.by_name: Final = {spec.name: spec for spec in inputs}
        stackable = batch_axis is not None and all(s.shape and s.shape[0] == batch_axis for s in (*inputs, *outputs))
        self.batch_axis: Final = batch_axis if stackable else None
        self.rows_max: Final = rows_max if stackable else 1
        # With nothing but the batch axis open, any two requests stack and the grouping key is the same.
        self._closed: Final = stackable and all(isinstance(n, int) for spec in inputs for n in spec.shape[1:])

    def check(self, name: str, dtype: str, shape: Sequence[int], sizes: dict[str, int]) -> None:
        """Check one tensor; ``sizes`` collects the named dimensions of its request.

        Raises:
            TensorError: unknown name, wrong dtype, rank, size or bound.
        """
        spec = self.by_name.get(name)
        if spec is None:
            raise TensorError(f"unknown input {name!r}; the model takes {self.takes()}")
        if dtype != spec.dtype:
            raise TensorError(f"input {name!r}: dtype {dtype}, expected {spec}")
        declared = spec.shape
        if len(shape) != len(declared):
            raise TensorError(f"input {name!r}: shape {list(shape)} has {len(shape)} dimensions, expected {spec}")
        for index, size in enumerate(declared):
            given = shape[index]
            if size == given or size is None:
                continue
            if isinstance(size, int):
                raise TensorError(f"input {name!r}: shape {list(shape)}, expected {spec}: dimension {index} is {given}")
            if sizes.setdefault(size, given) != given:
                raise TensorError(f"input {name!r}: dimension {size} is {given}, in another input {sizes[size]}")

    def rows(self, count: int, sizes: Mapping[str, int]) -> int:
        """Return the rows of a request whose ``count`` tensors passed ``check``; 1 if requests do not stack.

        Raises:
            TensorError: an input is missing, or a named dimension is out of its bounds.
        """
        if count != len(self.inputs):
            raise TensorError(f"{count} inputs given; the model takes {self.takes()}")
        for name, size in sizes.items():
            low, high = self.bounds.get(name, (0, _SIZE_MAX))
            if name == self.batch_axis:
                low, high = max(low, 1), min(high, self.rows_max)
            if not low <= size <= high:
                raise TensorError(f"dimension {name} is {size}, allowed are {low} to {high}")
        return sizes[self.batch_axis] if self.batch_axis is not None else 1

    def key(self, shapes: Mapping[str, tuple[int, ...]]) -> Hashable:
        """Return what two requests must have equal to be stacked, by the shapes of their inputs.

        If nothing stacks, it is equal for all: a batch then has one row (``rows_max``), so one request.
        """
        if self._closed or self.batch_axis is None:
            return None
        return tuple(shapes[spec.name][1:] for spec in self.inputs)

    def takes(self) -> str:
        """Return the inputs as a phrase for messages."""
        return ", ".join(f"{spec.name!r} {spec}" for spec in self.inputs)

    def as_dict(self) -> dict[str, Any]:
        """Return what the worker's hello carries."""
        return {
            "inputs": [spec.as_dict() for spec in self.inputs],
            "outputs": [spec.as_dict() for spec in self.outputs],
        }


def parse(raw: Mapping[str, Any], *, batch_axis: str | None, rows_max: int) -> Signature:
    """Return the signature a manifest declares.

    Raises:
        UnloadableError: malformed; the message names the tensor.
    """
    inputs, outputs = (_tensors(raw.get(side), side) for side in ("inputs", "outputs"))
    return Signature(inputs, outputs, bounds=_bounds(raw.get("dims")), batch_axis=batch_axis, rows_max=rows_max)


def converts(dtype: str, other: str) -> bool:
    """Whether a runtime converts one dtype to the other: floating types only, since integers would be cut."""
    return dtype == other or {dtype, other} <= _FLOATS


def as_served(found: Sequence[TensorSpec], declared: Sequence[TensorSpec]) -> tuple[TensorSpec, ...]:
    """Return a model's tensors with the declared dtypes wherever its own convert to them."""
    wanted = {spec.name: spec.dtype for spec in declared}
    return tuple(
        TensorSpec(spec.name, wanted[spec.name], spec.shape)
        if converts(spec.dtype, wanted.get(spec.name, ""))
        else spec
        for spec in found
    )


def check_outputs(declared: Sequence[TensorSpec]) -> None:
    """Refuse an output that no array can hold.

    Raises:
        UnloadableError: bfloat16.
    """
    for spec in declared:
        if spec.dtype == "bfloat16":
            raise UnloadableError(f"signature outputs: {spec.name!r}: declare it float32, to which bfloat16 is widened")


def check_model(declared: Sequence[TensorSpec], found: Sequence[TensorSpec], side: str) -> None:
    """Check that the model file keeps what the manifest declares.

    Raises:
        UnloadableError: other names, dtypes or ranks, or a dimension the file fixes otherwise.
    """
    by_name = {spec.name: spec for spec in found}
    if {spec.name for spec in declared} != set(by_name):
        listed = ", ".join(f"{spec.name!r}" for spec in declared)
        raise UnloadableError(f"signature {side}: declared {listed}; the model has {', '.join(map(repr, by_name))}")
    for spec in declared:
        model = by_name[spec.name]
        fits = len(spec.shape) == len(model.shape) and all(
            mine == theirs or not isinstance(theirs, int) for mine, theirs in zip(spec.shape, model.shape, strict=True)
        )
        if spec.dtype != model.dtype or not fits:
            raise UnloadableError(f"signature {side}: {spec.name!r} is declared {spec}, the model has {model}")


def _bounds(raw: object) -> dict[str, tuple[int, int]]:
    bounds = {}
    for name, bound in (raw if isinstance(raw, dict) else {}).items():
        low, high = (bound.get("min", 0), bound.get("max", _SIZE_MAX)) if isinstance(bound, dict) else (None, None)
        if type(low) is not int or type(high) is not int or not 0 <= low <= high:
            raise UnloadableError(f"signature.dims.{name}: min and max must be integers in order, got {bound}")
        bounds[str(name)] = (low, high)
    return bounds


def _tensors(raw: object, side: str) -> list[TensorSpec]:
    if not isinstance(raw, list) or not raw:
        raise UnloadableError(f"signature.{side} must be a list and not empty")
    specs = [_tensor(entry, side) for entry in raw]
    if len({spec.name for spec in specs}) != len(specs):
        raise UnloadableError(f"signature.{side}: two tensors have the same name")
    return specs


def _tensor(entry: object, side: str) -> TensorSpec:
    fields = entry if isinstance(entry, dict) else {}
    name, dtype, shape = (fields.get(key) for key in ("name", "dtype", "shape"))
    if not isinstance(name, str) or not isinstance(dtype, str) or dtype not in DTYPES or not isinstance(shape, list):
        raise UnloadableError(f"signature.{side}: an entry needs name, dtype and shape, got {entry}")
    if not all(size is None or isinstance(size, str) or (type(size) is int and size >= 0) for size in shape):
        raise UnloadableError(f"signature.{side}: {name!r}: a dimension is an integer, a name or null, got {shape}")
    return TensorSpec(name, dtype, tuple(shape))
