"""Whether what a run gave is what the manifest's signature declares.

Callers rely on the declaration: it is the model's metadata, and what a new version is compared by before it takes
another's place. A model file need not say how long its outputs are, so they are looked at after a run.
Promises: outputs that pass have the declared names, dtypes, ranks and fixed dimensions, one length for each named
dimension, within its bounds; a fault names the output, what is declared and what was found.
Leaves out: what a handler makes of outputs. Its JSON and bytes have no declared form.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from types import MappingProxyType
from typing import Final

from agent.errors import OutputError, TensorError
from agent.tensors import Array, dtype_name
from agent.worker.signature import Signature, TensorSpec

_SEEN_MAX: Final = 256  # kinds of outputs that are known to pass
_NOTHING: Final[Mapping[str, int]] = MappingProxyType({})

Run = Callable[[Mapping[str, Array]], Mapping[str, Array]]


class Outputs:
    """The declared outputs of one model."""

    def __init__(self, declared: Signature) -> None:
        self._declared = declared
        self._specs = {spec.name: spec for spec in declared.outputs}
        self._seen: set[Hashable] = set()

    def checked_run(self, run: Run) -> Run:
        """Return ``run`` with its outputs checked against its inputs, too; it may raise ``OutputError``."""

        def checked(inputs: Mapping[str, Array]) -> Mapping[str, Array]:
            outputs = run(inputs)
            self._check(outputs, self._sizes(inputs))
            return outputs

        return checked

    def check(self, outputs: Mapping[str, Array], rows: int) -> None:
        """Check what a run of ``rows`` rows gave; quick where the same kind has passed before.

        Named dimensions other than the rows are compared among the outputs only.

        Raises:
            OutputError: it is not what is declared.
        """
        parts: list[Hashable] = [rows]  # one flat tuple of them costs 0.6 µs, half of what nested ones do
        for name, array in outputs.items():
            parts += (name, array.dtype, array.shape)
        kind = tuple(parts)
        if kind in self._seen:
            return
        axis = self._declared.batch_axis
        self._check(outputs, {axis: rows} if axis is not None else _NOTHING)
        if len(self._seen) < _SEEN_MAX:
            self._seen.add(kind)

    def check_part(self, arrays: Mapping[str, Array]) -> None:
        """Check one item of a handler's stream: at least one of the outputs, any number of rows.

        Raises:
            OutputError: it is not what is declared.
        """
        axis, first = self._declared.batch_axis, next(iter(arrays.values()))
        self._check(arrays, {axis: len(first)} if axis is not None and first.ndim else _NOTHING, part=True)

    def _check(self, outputs: Mapping[str, Array], sizes: Mapping[str, int], *, part: bool = False) -> None:
        giver = "the handler's stream" if part else "the model"
        if not (outputs.keys() <= self._specs.keys() if part else outputs.keys() == self._specs.keys()):
            found, wanted = (", ".join(map(repr, names)) for names in (outputs, self._specs))
            raise OutputError(f"{giver} returned {found}; declared are {wanted}")
        known = dict(sizes)
        for name, array in outputs.items():
            spec = self._specs[name]
            if reason := self._fault(spec, _dtype(array), array.shape, known):
                found = f"{_dtype(array)}{list(array.shape)}"
                raise OutputError(f"output {name!r}: {giver} returned {found}, {reason}")

    def _fault(self, spec: TensorSpec, dtype: str, shape: tuple[int, ...], known: dict[str, int]) -> str:
        """Return what is wrong, empty if nothing; ``known`` collects the named dimensions."""
        fixed = all(not isinstance(size, int) or size == found for size, found in zip(spec.shape, shape, strict=False))
        if dtype != spec.dtype or len(shape) != len(spec.shape) or not fixed:
            return f"declared is {spec}"
        for size, found in zip(spec.shape, shape, strict=True):
            if not isinstance(size, str):
                continue
            if size in known:
                if known[size] != found:
                    return f"declared is {spec} with {size} = {known[size]}"
                continue
            known[size] = found
            low, high = self._declared.bounds.get(size, (found, found))
            if not low <= found <= high:
                return f"declared is {spec} with {size} from {low} to {high}"
        return ""

    def _sizes(self, inputs: Mapping[str, Array]) -> dict[str, int]:
        """Return the named dimensions as the inputs of a run set them."""
        sizes: dict[str, int] = {}
        for spec in self._declared.inputs:
            if spec.name in inputs:
                named = zip(spec.shape, inputs[spec.name].shape, strict=False)
                sizes |= {size: found for size, found in named if isinstance(size, str)}
        return sizes


def _dtype(array: Array) -> str:
    try:
        return dtype_name(array)
    except TensorError:
        return str(array.dtype)
