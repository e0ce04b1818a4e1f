"""The engine's bookkeeping of one request, from admission to its one answer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from agent.engine.types import InferRequest
from agent.errors import AgentError
from agent.wire import Buffer, error_header


class Job:
    """One admitted request. ``number`` is its id towards workers, unique in the engine."""

    __slots__ = ("arrived", "attempts", "dispatched", "link", "number", "request", "version")

    def __init__(self, request: InferRequest, number: int, arrived: float) -> None:
        self.request = request
        self.number = number
        self.arrived = arrived  # loop seconds
        self.dispatched = 0.0  # loop seconds of the last hand-over to a worker
        self.attempts = 0
        self.link: Any = None  # the WorkerLink that holds it
        self.version: Any = None  # the Version it was routed to

    def answer(self, header: dict[str, Any], body: Sequence[Buffer] = ()) -> None:
        """Give the one answer, under the client's own id."""
        request_id = self.request.header.get("id")
        if request_id is None:
            header.pop("id", None)
        else:
            header["id"] = request_id
        self.request.answer(header, body)


def error_of(error: AgentError, request_id: int | None) -> dict[str, Any]:
    """Return the error header of ``error``."""
    return error_header(request_id, error.code, str(error), retryable=error.retryable)
