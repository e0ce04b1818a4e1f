"""The contract between a worker and a handler: raw request to tensors, tensors to answer.

A handler is made once per worker, after the sandbox closed and before the model is warmed up, and is called from one
thread. Per request the worker calls ``preprocess``, runs the model on a batch that may hold other requests too, and
calls ``postprocess`` with this request's own rows. A handler that must remember something between the two (the size
of an image, the text of the lines) returns ``Prepared`` and overrides ``postprocess_with``.

A ``StreamingHandler`` answers in parts: the worker calls ``preprocess``, then takes one item at a time from ``stream``,
which runs the model itself, and serves other requests between two items.

Leaves out: requests that carry tensors. They bypass the handler, unless they ask for parts.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy.typing as npt

Array = npt.NDArray[Any]
Json = Any  # what json.dumps takes: dict, list, str, int, finite float, bool, None
Run = Callable[[Mapping[str, Array]], Mapping[str, Array]]  # the model: inputs to outputs, by name
TEXT = "text/plain; charset=utf-8"


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


class StreamingHandler(Handler):
    """Base of handlers that answer in parts: tokens of a text, windows of a signal, frames of a film."""

    # ``stream`` of so many requests is under way at once, not counting those whose callers do not take their parts.
    streams_max: ClassVar[int] = 16

    @abstractmethod
    def stream(
        self, inputs: Mapping[str, Array], rows: int, run: Run, state: Any
    ) -> Iterator[Json | Reply | Mapping[str, Array]]:
        """Yield the parts of the answer, usually as a generator.

        What happens between two items is one step: no other request is served meanwhile. When the caller leaves or the
        deadline passes, the generator is closed where it stands, so release what you hold in ``finally``.

        Args:
            inputs: From ``preprocess``, or the tensors of a request that carries them; they fit the signature.
            rows: Of ``inputs``.
            run: Runs the model on inputs that fit the signature, as often as needed.
            state: From ``Prepared``, else ``None``.

        Yields:
            A text, any other JSON value, a ``Reply``, or arrays by name, which are answered as the model's outputs
            would be: by ``postprocess`` where the request came through ``preprocess``. At most 1 MiB each.

        Raises:
            InputError: the request is wrong after all.
        """

    def joined(self, items: Sequence[Any]) -> Json | Reply:
        """Return the answer for a caller who did not ask for parts.

        ``items`` is all that ``stream`` yielded, with what ``postprocess`` made of them in the place of arrays.

        By default texts are joined, and so are replies of one content type; anything else becomes a JSON list.
        """
        if items and all(isinstance(item, str) for item in items):
            return Reply("".join(items).encode(), TEXT)
        if items and all(isinstance(item, Reply) and item.content_type == items[0].content_type for item in items):
            return Reply(b"".join(item.body for item in items), items[0].content_type)
        return list(items)

    def postprocess(self, outputs: Mapping[str, Array], rows: int) -> Json | Reply:
        """Return the outputs as nested lists; override it if ``stream`` yields arrays that should look otherwise."""
        del rows
        return {name: array.tolist() for name, array in outputs.items()}
