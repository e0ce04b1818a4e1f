"""How quick and how right a loaded model is on this box, by its golden inputs.

Numbers only: whether an int8 variant is worth its errors here is the daemon's to decide, which has both variants'.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from statistics import median
from typing import Any, Final

import numpy as np

from agent.tensors import Array
from agent.worker.golden import Golden

_ROUNDS_MIN: Final = 3
_ROUNDS_MAX: Final = 200
_CLASSES_MAX: Final = 100_000

Run = Callable[[Mapping[str, Array]], Mapping[str, Array]]


def measure(goldens: Sequence[Golden], run: Run, *, budget_s: float) -> dict[str, Any]:
    """Return ``{"rounds", "p50_ms", "cosine", "top1"}`` of the model with its golden inputs.

    A round is one run of each. ``cosine`` is the worst output row's with the recorded one, ``top1`` the share of rows
    whose best class is the recorded one; ``None`` if no output looks like scores of classes.

    Args:
        goldens: Not empty.
        run: The model.
        budget_s: After so long no further round begins, once there are a few.
    """
    cosine, right, rows = 1.0, 0, 0
    for golden in goldens:
        outputs = run(golden.inputs)
        for name, wanted in golden.outputs.items():
            found = np.asarray(outputs[name], np.float64)
            expected = np.asarray(wanted, np.float64)
            if found.shape != expected.shape:
                cosine = -1.0
                continue
            cosine = min(cosine, _cosine(found, expected))
            if expected.ndim == 2 and 1 < expected.shape[1] <= _CLASSES_MAX:
                right += int(np.sum(np.argmax(found, axis=1) == np.argmax(expected, axis=1)))
                rows += len(expected)
    times: list[float] = []
    until = time.perf_counter() + budget_s
    while len(times) < _ROUNDS_MIN or (len(times) < _ROUNDS_MAX and time.perf_counter() < until):
        began = time.perf_counter()
        for golden in goldens:
            run(golden.inputs)
        times.append(time.perf_counter() - began)
    return {
        "rounds": len(times),
        "p50_ms": round(median(times) * 1000, 4),
        "cosine": round(cosine, 6),
        "top1": round(right / rows, 6) if rows else None,
    }


def _cosine(found: Array, wanted: Array) -> float:
    """Return the worst row's cosine; NaN and infinity agree with nothing."""
    if not np.isfinite(found).all():
        return -1.0
    left, right = (array.reshape(array.shape[0] if array.ndim > 1 else 1, -1) for array in (found, wanted))
    lengths = np.linalg.norm(left, axis=1) * np.linalg.norm(right, axis=1)
    both_zero = np.all(left == right, axis=1)
    cosines = np.where(both_zero, 1.0, np.sum(left * right, axis=1) / np.where(lengths > 0, lengths, np.inf))
    return float(np.min(cosines, initial=1.0))
