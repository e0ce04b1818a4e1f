"""The engine's bookkeeping of one request, from admission to its one answer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from agent.engine.admission import Client
from agent.engine.types import InferRequest
from agent.errors import AgentError
from agent.shares import Shares
from agent.wire import Buffer, Header, error_header


class Copy(Protocol):
    """A copy of a request for another version, see ``shadow.py``."""

    def original_answered(self, header: Header, body: Sequence[Buffer], *, streamed: bool) -> None:
        """The request has its answer."""


class Job:
    """One admitted request. ``number`` is its id towards workers, unique in the engine."""

    __slots__ = (
        "arrived", "attempts", "begun", "body_bytes", "client", "copied", "copy", "dispatched", "link", "number",
        "parts", "regions", "request", "settled", "shares", "version",
    )  # fmt: skip

    def __init__(self, request: InferRequest, number: int, arrived: float) -> None:
        self.request = request
        self.number = number
        self.body_bytes = len(request.body)
        self.arrived = arrived  # loop seconds
        self.dispatched = 0.0  # loop seconds of the last hand-over to a worker
        self.attempts = 0
        self.begun = False  # its worker has said that it works on a stream for it
        self.parts = 0  # of the answer, delivered so far
        self.link: Any = None  # the WorkerLink that holds it
        self.version: Any = None  # the Version it was routed to
        self.regions = request.regions  # held from here until the job is settled: a retry needs them again
        self.client: Client | None = None  # whose rate and quota it counts against
        self.shares: Shares | None = None  # of the queue it has a place in
        self.settled = False  # answered or withdrawn
        self.copied = False  # it is a copy: nobody's request
        self.copy: Copy | None = None  # to be begun once this is answered
        for _, region in self.regions:
            region.hold()

    def answer(self, header: Header, body: Sequence[Buffer] = ()) -> None:
        """Give the one answer."""
        self.settle()
        self.request.answer(header, body)
        copy, self.copy = self.copy, None
        if copy is not None:
            copy.original_answered(header, body, streamed=self.parts > 0)

    def part(self, header: dict[str, Any], body: Sequence[Buffer]) -> None:
        """Pass on one part of the answer."""
        if self.request.part is not None:
            self.request.part(header, body)

    def settle(self) -> None:
        """Nothing more is to be done for this job: let go of its place and shared memory. Repeating it does nothing."""
        if not self.settled:
            self.settled = True
            if self.client is not None:
                self.client.outstanding -= 1
            if self.shares is not None:
                self.shares.remove(self.request.client)
            self.request.body = b""
            self.request.handle = None  # they know each other: neither, nor its client, may wait for the collector
        regions, self.regions = self.regions, ()
        for _, region in regions:
            region.release()


def error_of(error: AgentError, request_id: int | None) -> dict[str, Any]:
    """Return the error header of ``error``."""
    header = error_header(request_id, error.code, str(error), retryable=error.retryable)
    if error.retry_after_s:
        header["retry_after_s"] = error.retry_after_s
    return header
