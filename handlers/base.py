"""The contract between a worker and a handler: raw request to tensors, tensors to answer.

A handler is made once per worker, after the sandbox closed and before the model is warmed up, and is called from one
thread. Per request the worker calls ``preprocess``, runs the model on a batch that may hold other requests too, and
calls ``postprocess`` with this request's own rows. A handler that must remember something between the two (the size
of an image, the text of the lines) returns ``Prepared`` and overrides ``postprocess_with``.

Leaves out: requests that carry tensors. They bypass the handler.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy.typing as npt

Array = npt.NDArray[Any]
Json = Any  # what json.dumps takes: dict, list, str, int, finite float, bool, None


class InputError(ValueError):
    """The request is wrong; the caller is told the message under the code ``invalid_input``."""


@dataclass(frozen=True, slots=True)
class Prepared:
    """Tensors, and whatever this request's ``postprocess_with`` needs besides the outputs."""

    tensors: Mapping[str, Array]
    state: Any


@dataclass(frozen=True, slots=True)
class Reply:
    """An answer that is not JSON."""

    body: bytes
    content_type: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Context:
    """What a handler may know: its bundle, its parameters, its model."""

    bundle_dir: Path
    params: Mapping[str, Any]  # the manifest's handler.params
    classes: list[str] | None  # one label per line of the manifest's classes file
    signature: Mapping[str, Any]  # {"inputs": [{"name", "dtype", "shape"}], "outputs": […]}

    def path(self, relative: str) -> Path:
        """Return a bundle file's path.

        Raises:
            ValueError: the path leaves the bundle.
        """
        path = (self.bundle_dir / relative).resolve()
        if not path.is_relative_to(self.bundle_dir.resolve()):
            raise ValueError(f"{relative!r} is outside the bundle")
        return path


class Handler(ABC):
    """Base of built-in handlers and of those a bundle brings."""

    idempotent: ClassVar[bool] = True  # False: a request is not tried again when its worker dies

    def __init__(self, context: Context) -> None:
        self.context = context

    @abstractmethod
    def preprocess(self, body: bytes, content_type: str) -> Mapping[str, Array] | Prepared:
        """Return the model's inputs, each with the batch axis first: ``[rows, …]``.

        Raises:
            InputError: the body is not what this handler takes; say what it expects.
        """

    @abstractmethod
    def postprocess(self, outputs: Mapping[str, Array], rows: int) -> Json | Reply:
        """Return the answer for one request's ``outputs``, each ``[rows, …]``."""

    def postprocess_with(self, outputs: Mapping[str, Array], rows: int, state: Any) -> Json | Reply:
        """Answer a request whose ``preprocess`` returned ``Prepared``; ``state`` is from there."""
        del state
        return self.postprocess(outputs, rows)
