"""What a worker asks of an inference runtime.

A runtime is loaded after the fork, inside the sandbox, by ``load(spec, declared) -> Runtime`` of its module, which
``table.py`` names. It converts floating types between the model file and what is declared, so that variants of other
precisions keep one signature. To add one: write the module, add its line to the table.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from agent.tensors import Array
from agent.worker.signature import Signature, TensorSpec
from agent.worker.spec import Spec


class Runtime(Protocol):
    """One loaded model. ``run`` may be called from several threads at once: a stream goes on beside a batch."""

    inputs: tuple[TensorSpec, ...]  # as the model file has them; as declared where it converts or does not say
    outputs: tuple[TensorSpec, ...]
    provider: str  # what really executes it
    placement: Mapping[str, int]  # how many of its operators each provider executes; empty where one does all

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """Return every output by name, in memory that nothing else writes.

        Raises:
            InvalidInputError: the runtime calls these values invalid.
            InferenceError: it failed on them.
            OutputError: it gave something that cannot be what is declared.
            OutOfMemoryError: memory did not suffice.
            DeviceLostError: this process cannot compute any more.
        """
        ...

    def device_peak_bytes(self) -> int | None:
        """Return the most device memory held at once so far; ``None`` where the runtime cannot tell."""
        ...


class Load(Protocol):
    """The entry point of a runtime's module."""

    def __call__(self, spec: Spec, declared: Signature) -> Runtime:
        """Open ``spec.entry``.

        Raises:
            UnloadableError: missing, malformed, or not runnable as the spec wants it; another try would fail likewise.
            LoadError: it could not be loaded now.
            OutOfMemoryError: memory did not suffice.
            DeviceLostError: the device answers no more.
        """
        ...
