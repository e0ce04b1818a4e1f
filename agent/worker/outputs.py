"""Whether what a run gave is what the manifest's signature declares.

Callers rely on the declaration: it is the model's metadata, and what a new version is compared by before it takes
another's place. A model file need not say how long its outputs are, so they are looked at after a run.
Promises: outputs that pass have the declared names, dtypes, ranks and fixed dimensions; a fault names the output, what
is declared and what was found.
Leaves out: named dimensions, since how long those of an output are is often for the data to say (a detector finds
nothing, or more than it has rows); and what a handler makes of outputs: its JSON and bytes have no declared form.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from typing import Final

from agent.errors import OutputError, TensorError
from agent.tensors import Array, dtype_name
from agent.worker.signature import Signature

_SEEN_MAX: Final = 256  # kinds of outputs that are known to pass

Run = Callable[[Mapping[str, Array]], Mapping[str, Array]]


class Outputs:
    """The declared outputs of one model."""

    def __init__(self, declared: Signature) -> None:
        self._specs = {spec.name: spec for spec in declared.outputs}
        self._seen: set[Hashable] = set()

    def checked_run(self, run: Run) -> Run:
        """Return ``run`` with its outputs checked; it may raise ``OutputError``."""

        def checked(inputs: Mapping[str, Array]) -> Mapping[str, Array]:
            outputs = run(inputs)
            self.check(outputs)
            return outputs

        return checked

    def check(self, outputs: Mapping[str, Array]) -> None:
        """Check what a run gave; quick where the same kind has passed before.

        Raises:
            OutputError: it is not what is declared.
        """
        parts: list[Hashable] = []  # one flat tuple of them costs half of what nested ones do
        for name, array in outputs.items():
            parts += (name, array.dtype, array.shape)
        kind = tuple(parts)
        if kind in self._seen:
            return
        if outputs.keys() != self._specs.keys():
            raise OutputError(self._other_names(outputs, "the model"))
        self._check(outputs, "the model")
        if len(self._seen) < _SEEN_MAX:
            self._seen.add(kind)

    def check_part(self, arrays: Mapping[str, Array]) -> None:
        """Check one item of a handler's stream: at least one of the outputs.

        Raises:
            OutputError: it is not what is declared.
        """
        if not arrays.keys() <= self._specs.keys():
            raise OutputError(self._other_names(arrays, "the handler's stream"))
        self._check(arrays, "the handler's stream")

    def _check(self, outputs: Mapping[str, Array], giver: str) -> None:
        for name, array in outputs.items():
            spec, dtype = self._specs[name], _dtype(array)
            sizes = zip(spec.shape, array.shape, strict=False)
            fixed = all(not isinstance(size, int) or size == found for size, found in sizes)
            if dtype != spec.dtype or array.ndim != len(spec.shape) or not fixed:
                found = f"{dtype}{list(array.shape)}"
                raise OutputError(f"output {name!r}: {giver} returned {found}, declared is {spec}")

    def _other_names(self, outputs: Mapping[str, Array], giver: str) -> str:
        found, wanted = (", ".join(map(repr, names)) for names in (outputs, self._specs))
        return f"{giver} returned {found}; declared are {wanted}"


def _dtype(array: Array) -> str:
    try:
        return dtype_name(array)
    except TensorError:
        return str(array.dtype)
