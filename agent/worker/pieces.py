"""One request in pieces: what to do when its rows do not fit into memory at once.

Rows that the manifest lets be batched do not depend on each other, so half of them may run after the other half.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np

from agent.errors import OutOfMemoryError
from agent.tensors import Array

Run = Callable[[Mapping[str, Array]], Mapping[str, Array]]


def in_halves(inputs: Mapping[str, Array], rows: int, run: Run) -> tuple[dict[str, Array], int]:
    """Return the outputs of ``rows`` rows, run as halves of halves as far down as memory demands.

    Args:
        inputs: Each ``[rows, *features]``; together they did not fit.
        rows: At least 2.
        run: The model.

    Returns:
        The outputs ``[rows, *features]``, and the most rows that fitted at once.

    Raises:
        OutOfMemoryError: a single row does not fit, or the outputs do not come by rows.
    """
    done: list[Mapping[str, Array]] = []
    fitted = rows
    pending = [(rows // 2, rows), (0, rows // 2)]
    while pending:
        start, stop = pending.pop()
        try:
            outputs = run({name: array[start:stop] for name, array in inputs.items()})
        except (OutOfMemoryError, MemoryError) as error:
            if stop - start == 1:
                raise OutOfMemoryError(f"memory does not suffice for one of {rows} rows: {error}") from error
            middle = (start + stop) // 2
            pending += [(middle, stop), (start, middle)]
            continue
        if any(len(array) != stop - start for array in outputs.values()):
            raise OutOfMemoryError("the outputs do not come by rows, so the request cannot run in pieces")
        fitted = min(fitted, stop - start)
        done.append(outputs)
    return {name: np.concatenate([piece[name] for piece in done]) for name in done[0]}, fitted
