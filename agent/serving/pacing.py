"""Which streams of one frame connection may go on: none while its client is behind, none that the client holds itself.

Leaves out: when the client is behind, and what becomes of one that stays so; the connection knows both.
"""

from __future__ import annotations

from agent.serving.ports import Engine, InferRequest


class Pacing:
    """The requests of one connection that are answered in parts, by the client's ids."""

    __slots__ = ("_behind", "_engine", "_held", "_streams")

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._streams: dict[int, InferRequest] = {}
        self._held: set[int] = set()  # by the client
        self._behind = False

    def add(self, request_id: int, request: InferRequest) -> None:
        """Note a request that may be answered in parts."""
        self._streams[request_id] = request

    def remove(self, request_id: int) -> None:
        """Forget one, if it is here: it is answered or withdrawn."""
        self._streams.pop(request_id, None)
        self._held.discard(request_id)

    def hold(self, request_id: int, *, held: bool) -> None:
        """The client asks to pause or resume a stream; one that has ended is no fault, the frames crossed."""
        request = self._streams.get(request_id)
        if request is None:
            return
        (self._held.add if held else self._held.discard)(request_id)
        self._engine.pace(request, paused=held or self._behind)

    def part_queued(self, request_id: int) -> None:
        """A part was sent on: if its stream should not go on, it may have begun after that was said."""
        if self._behind or request_id in self._held:
            self._engine.pace(self._streams[request_id], paused=True)

    def set_behind(self, behind: bool) -> None:
        """The client does not take its answers fast enough, or has caught up."""
        if behind != self._behind:
            self._behind = behind
            for request_id, request in self._streams.items():
                self._engine.pace(request, paused=behind or request_id in self._held)
