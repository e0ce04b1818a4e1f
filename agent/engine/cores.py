"""Which cores a worker is bound to, when the box binds workers: those that the fewest others hold.

One allotment for all pools, so that two models do not share a core while another is free. Pure bookkeeping; the worker
binds itself (``worker/loading.py``). The daemon stays unbound.
"""

from __future__ import annotations

from collections.abc import Iterable


class Cores:
    """The cores of the box and how many workers hold each. Without cores nobody is bound."""

    def __init__(self, cores: Iterable[int] = ()) -> None:
        self._holders = dict.fromkeys(sorted(cores), 0)

    def take(self, count: int) -> tuple[int, ...]:
        """Return ``count`` cores, or all there are, for one more worker: the least held, the lowest numbers first."""
        chosen = sorted(self._holders, key=lambda core: (self._holders[core], core))[:count]
        for core in chosen:
            self._holders[core] += 1
        return tuple(sorted(chosen))

    def give_back(self, cores: Iterable[int]) -> None:
        """Undo one ``take``."""
        for core in cores:
            self._holders[core] -= 1
