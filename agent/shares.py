"""A fair part of a crowded queue for each client: a bound, not a schedule.

Below half of a queue anybody may take what is free; above it nobody may hold more than an equal part, so one client's
flood cannot keep another's single request out. The daemon holds its queues to it and a worker its direct lanes.
Source of the idea: the dynamic threshold of shared-memory switches (Choudhury and Hahne, 1998), with the threshold at
an equal part.
"""

from __future__ import annotations

from agent.errors import OverloadedError


class Shares:
    """How many of a queue's requests each client holds."""

    __slots__ = ("_held",)

    def __init__(self) -> None:
        self._held: dict[str, int] = {}

    def check(self, client: str, *, outstanding: int, bound: int) -> None:
        """Let one more request of ``client`` in, or not.

        Args:
            client: Who asks.
            outstanding: Requests in the queue.
            bound: The most the queue takes.

        Raises:
            OverloadedError: the queue is full, or crowded and this client holds its equal part already.
        """
        if outstanding >= bound:
            raise OverloadedError(f"{bound} requests are waiting; try again later")
        if outstanding * 2 < bound:
            return
        held = self._held.get(client, 0)
        others = len(self._held) + (held == 0)
        if others > 1 and held >= max(1, bound // others):
            raise OverloadedError(f"the queue is crowded and this client holds {held} of its places; try again later")

    def add(self, client: str) -> None:
        """Count one request."""
        self._held[client] = self._held.get(client, 0) + 1

    def remove(self, client: str) -> None:
        """Uncount one request."""
        left = self._held[client] - 1
        if left:
            self._held[client] = left
        else:
            del self._held[client]
