"""What a worker asks of an inference runtime.

A runtime is loaded after the fork, inside the sandbox, by ``load(spec) -> Runtime`` of its module, which
``table.py`` names. To add one: write the module, add its line to the table.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from agent.tensors import Array
from agent.worker.signature import TensorSpec
from agent.worker.spec import Spec


class Runtime(Protocol):
    """One loaded model. ``run`` may be called from several threads at once: a stream goes on beside a batch."""

    inputs: tuple[TensorSpec, ...]  # as the model file has them
    outputs: tuple[TensorSpec, ...]
    provider: str  # what really executes it

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """Return every output by name.

        Raises:
            InvalidInputError: the runtime calls these values invalid.
            InferenceError: it failed on them.
            OutOfMemoryError: memory did not suffice.
        """
        ...


class Load(Protocol):
    """The entry point of a runtime's module."""

    def __call__(self, spec: Spec) -> Runtime:
        """Open ``spec.entry``.

        Raises:
            UnloadableError: missing, malformed, or not runnable by ``spec.providers``; another try would fail likewise.
            LoadError: it could not be loaded now.
            OutOfMemoryError: memory did not suffice.
        """
        ...
