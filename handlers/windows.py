"""``windows/v1``: a long signal in, an answer for each window of it out, as soon as it is there.

For models of one input ``[N, size]``. Takes little-endian samples of any number, as one body. Parameters:

- ``samples``: their dtype, for example ``int16``; default: that of the model's input;
- ``scale``: what each is multiplied by (1.0), for example ``0.000030517578125`` from 16 bits to -1 … 1;
- ``hop``: from the start of one window to that of the next (samples); default: ``size``.

Gives ``{"start": first sample, "outputs": {"name": nested lists}}`` per window. What the last window lacks is zero.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from handlers.base import Array, Context, InputError, Json, Prepared, Run, StreamingHandler
from handlers.tensors import listed


class WindowsHandler(StreamingHandler):
    """See the module."""

    def __init__(self, context: Context) -> None:
        super().__init__(context)
        inputs = context.signature["inputs"]
        shape = inputs[0]["shape"]
        if len(inputs) != 1 or len(shape) != 2 or not isinstance(shape[1], int):
            raise ValueError("windows/v1 is for models of one input [N, size]")
        self._name: str = inputs[0]["name"]
        self._dtype = np.dtype(inputs[0]["dtype"])
        self._size: int = shape[1]
        self._samples = np.dtype(context.params.get("samples", self._dtype)).newbyteorder("<")
        self._scale = float(context.params.get("scale", 1.0))
        self._hop = context.params.get("hop", self._size)
        if type(self._hop) is not int or self._hop < 1:
            raise ValueError(f"hop must be an integer from 1, got {self._hop!r}")

    def preprocess(self, body: bytes, content_type: str) -> Prepared:
        """Return the first window; the whole signal is the state."""
        del content_type
        if not body or len(body) % self._samples.itemsize:
            raise InputError(f"expected {self._samples.name} samples, got {len(body)} bytes")
        signal = np.frombuffer(body, self._samples)
        return Prepared({self._name: self._window(signal, 0)}, signal)

    def stream(self, inputs: Mapping[str, Array], rows: int, run: Run, state: Any) -> Iterator[Json]:
        """Yield the outputs of each window; a request of tensors brings its windows as rows."""
        if state is None:
            for row in range(rows):
                yield _outputs(row, run({self._name: inputs[self._name][row : row + 1]}))
            return
        for start in range(0, len(state), self._hop):
            yield _outputs(start, run({self._name: self._window(state, start)}))
            if start + self._size >= len(state):
                return

    def _window(self, signal: Array, start: int) -> Array:
        window = np.zeros((1, self._size), self._dtype)
        part = signal[start : start + self._size]
        window[0, : len(part)] = part if self._scale == 1.0 else part * self._scale
        return window


def _outputs(start: int, outputs: Mapping[str, Array]) -> Json:
    return {"start": start, "outputs": {name: listed(array[0]) for name, array in outputs.items()}}
