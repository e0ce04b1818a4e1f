"""CUDA graphs: all launches of one input shape recorded once and replayed by one call.

Worth it for small models, whose launches cost more than their arithmetic. Each shape has its own graph, with input and
output memory that every replay uses again; shapes beyond the bound run as usual.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from typing import Any, Final

import torch

_SHAPES_MAX: Final = 8  # each holds its own memory on the device
_RUNS_BEFORE: Final = 3  # on a stream of their own: libraries choose their kernels and allocate in the first runs

Tensors = Mapping[str, torch.Tensor]
Call = Callable[[Tensors], Mapping[str, torch.Tensor]]


@dataclass(frozen=True, slots=True)
class _Recorded:
    graph: Any  # torch.cuda.CUDAGraph
    inputs: Tensors
    outputs: Tensors


class Graphs:
    """Runs ``call`` through one recorded graph for each of the first shapes.

    Args:
        call: Runs the model; deterministic in what it launches for one shape, and returns tensors by name.
    """

    def __init__(self, call: Call) -> None:
        self._call = call
        self._recorded: dict[Hashable, _Recorded] = {}
        self._lock = threading.Lock()  # the graphs' memory is used again by each run

    def __call__(self, tensors: Tensors) -> Mapping[str, torch.Tensor]:
        """Return the outputs, as copies."""
        shape: Hashable = tuple((name, tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items())
        with self._lock:
            recorded = self._recorded.get(shape)
            if recorded is None:
                if len(self._recorded) >= _SHAPES_MAX:
                    return self._call(tensors)
                recorded = self._recorded[shape] = self._record(tensors)
            for name, tensor in tensors.items():
                recorded.inputs[name].copy_(tensor)
            recorded.graph.replay()
            return {name: tensor.clone() for name, tensor in recorded.outputs.items()}

    def _record(self, tensors: Tensors) -> _Recorded:
        inputs = {name: tensor.clone() for name, tensor in tensors.items()}
        aside = torch.cuda.Stream()
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):
            for _ in range(_RUNS_BEFORE):
                self._call(inputs)
        torch.cuda.current_stream().wait_stream(aside)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):  # a stream's step may run beside
            outputs = self._call(inputs)
        return _Recorded(graph, inputs, outputs)
