"""Whom a worker answers: the daemon on its channel, and applications on direct lanes.

A lane is a socket that the daemon made, one end given to an application that it knows, the other to this worker. The
daemon says for whom the lane is and what its bounds are; this side holds the application to them as the daemon holds
those that go through it: fair share, queue, deadlines, an answer for everything.

Promises: a lane that misbehaves is told why and closed, which concerns nobody else; when a lane is revoked, whatever
had arrived is answered and nothing else is taken, so its application knows which requests are still to be asked.
Leaves out: the loop and the model (``main.py``).
"""

from __future__ import annotations

import socket
from bisect import bisect_left
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from agent.errors import AgentError, CanceledError, FrameError, OverloadedError, StreamUnsupportedError
from agent.shares import Shares
from agent.wire import Buffer, Frame, Limits, error_header
from agent.worker.channel import Channel
from agent.worker.regions import Region
from agent.worker.requests import Request

_REGIONS_MAX: Final = 4096  # named on one lane


class Line:
    """One peer: the daemon. Its requests are admitted already."""

    number = 0
    default_s = float("inf")  # a request's time if it brings none

    def __init__(self, channel: Channel, names: Mapping[str, str] | None = None) -> None:
        self.channel = channel
        self.arrived: deque[Frame] = deque()  # and not handled yet
        self.interest = 0  # what the loop's poll is told of it
        self.gone = False  # closed: nobody is there to answer
        self._names = dict(names or {})

    def admit(self, request: Request) -> None:
        """Count a request that was accepted.

        Raises:
            OverloadedError: it is not.
        """

    def refused(self, code: str) -> None:
        """Count a request that was not accepted, under its error's code."""

    def settled(self, request: Request, code: str, now: float) -> None:
        """Count its answer, under ``ok`` or its error's code."""

    def post_result(self, request_id: int, fields: Mapping[str, Any], body: Sequence[Buffer]) -> None:
        """Queue an answer; ``TooLargeError`` if its peer's limits do not allow it."""
        self.channel.post({"kind": "result", "id": request_id, **fields, **self._names}, body)

    def post_alive(self, request_id: int) -> None:
        """Say that an answer is worked on.

        Raises:
            CanceledError: nobody is there to take it.
        """
        self.channel.post({"kind": "alive", "id": request_id})

    def post_error(self, request_id: int | None, error: AgentError) -> None:
        """Queue a refusal."""
        self.channel.post(error_header(request_id, error.code, str(error), retryable=error.retryable))


@dataclass(frozen=True, slots=True, kw_only=True)
class Grant:
    """What the daemon says of a lane."""

    lane: int
    client: str  # whom fairness goes by
    deadline_ms: float  # of requests that bring none
    queue_requests_max: int  # of all lanes' requests that wait in this worker
    queue_bytes_max: int

    @staticmethod
    def parse(header: Mapping[str, Any]) -> Grant:
        """Return the grant of a ``lane`` frame.

        Raises:
            FrameError: malformed.
        """
        try:
            return Grant(
                lane=int(header["lane"]),
                client=str(header["client"]),
                deadline_ms=float(header["default_ms"]),
                queue_requests_max=int(header["queue_requests_max"]),
                queue_bytes_max=int(header["queue_bytes_max"]),
            )
        except (KeyError, TypeError, ValueError) as error:
            raise FrameError(f"a lane's grant is malformed: {error}") from error


class Lane(Line):
    """One application."""

    def __init__(
        self, grant: Grant, sock: socket.socket, limits: Limits, book: LaneBook, names: Mapping[str, str]
    ) -> None:
        super().__init__(Channel(sock, limits, place=self._expect), names)
        self.number = grant.lane
        self.default_s = grant.deadline_ms / 1000
        self.grant = grant
        self.outstanding = 0
        self.leaving = False  # revoked: closes when everything is answered
        self.blocked_since = 0.0  # since when it takes no answers (seconds); 0: it does
        self.regions: dict[int, Region] = {}
        self._book = book
        self._arriving_bytes = 0  # of a large body under way
        self._taken_bytes = 0  # by the application, when that was last looked at

    def admit(self, request: Request) -> None:
        """See ``Line.admit``.

        Raises:
            StreamUnsupportedError: it asks for parts, which the daemon passes on and paces.
        """
        if request.streamed and request.header.get("stream"):
            raise StreamUnsupportedError("a direct lane carries whole answers: ask the daemon for parts")
        self._book.admit(self.grant, len(request.body))
        self.outstanding += 1

    def refused(self, code: str) -> None:
        """See ``Line.refused``."""
        self._book.count(code)

    def settled(self, request: Request, code: str, now: float) -> None:
        """See ``Line.settled``."""
        self.outstanding -= 1
        self._book.settle(self.grant.client, len(request.body), code, now - request.arrived)

    def post_alive(self, request_id: int) -> None:
        """See ``Line.post_alive``; an application is told nothing, but the end of a revoked lane shows only here."""
        if self.channel.abandoned:
            raise CanceledError("nobody waits for it")

    def watch(self, now: float) -> None:
        """Note since when answers wait of which the application has taken nothing."""
        taken_bytes, before = self.channel.sent_bytes, self._taken_bytes
        self._taken_bytes = taken_bytes
        if not self.channel.pending:
            self.blocked_since = 0.0
        elif not self.blocked_since or taken_bytes != before:
            self.blocked_since = now

    def forget_arriving(self) -> None:
        """The large body under way is here, or never will be."""
        self._book.arriving_bytes -= self._arriving_bytes
        self._arriving_bytes = 0

    def _expect(self, _header: Mapping[str, Any], nbytes: int) -> None:
        """Make room for a large body; ``OverloadedError`` ends the lane."""
        self.forget_arriving()
        if self._book.arriving_bytes + nbytes > self.grant.queue_bytes_max:
            raise OverloadedError("too many large bodies are being received")
        self._arriving_bytes = nbytes
        self._book.arriving_bytes += nbytes

    def name(self, number: int, region: Region) -> None:
        """Let requests call a region ``number``.

        Raises:
            FrameError: more of them than a lane may have.
        """
        if len(self.regions) >= _REGIONS_MAX:
            raise FrameError(f"more than {_REGIONS_MAX} regions on one lane")
        self.regions[number] = region


class LaneBook:
    """What the lanes of this worker hold and have answered, until the daemon is told.

    Args:
        bounds_s: Upper bounds of the latency buckets, those of the daemon's histogram.
    """

    def __init__(self, bounds_s: Sequence[float]) -> None:
        self.changed = False
        self.waiting = 0
        self.waiting_bytes = 0
        self.arriving_bytes = 0  # of large bodies that are not whole yet
        self._bounds_s = tuple(bounds_s)
        self._shares = Shares()
        self._codes: dict[str, int] = {}
        self._buckets = [0] * (len(self._bounds_s) + 1)
        self._sum_s = 0.0

    def admit(self, grant: Grant, nbytes: int) -> None:
        """Count a request that waits.

        Raises:
            OverloadedError: the lanes' queue is full, or crowded and this client holds its part.
        """
        if self.waiting_bytes + nbytes > grant.queue_bytes_max:
            raise OverloadedError(f"waiting requests hold {grant.queue_bytes_max} bytes; try again later")
        self._shares.check(grant.client, outstanding=self.waiting, bound=grant.queue_requests_max)
        self._shares.add(grant.client)
        self.waiting += 1
        self.waiting_bytes += nbytes

    def settle(self, client: str, nbytes: int, code: str, took_s: float) -> None:
        """Count an answer."""
        self._shares.remove(client)
        self.waiting -= 1
        self.waiting_bytes -= nbytes
        self.count(code)
        if code == "ok":
            self._buckets[bisect_left(self._bounds_s, took_s)] += 1
            self._sum_s += took_s

    def count(self, code: str) -> None:
        """Count an answer by its code alone: of a request that was never admitted."""
        self._codes[code] = self._codes.get(code, 0) + 1
        self.changed = True

    def report(self) -> dict[str, Any]:
        """Return the frame that tells the daemon, and start to count anew."""
        found = {
            "kind": "lanes",
            "codes": self._codes,
            "buckets": self._buckets,
            "sum_s": self._sum_s,
            "waiting": self.waiting,
        }
        self._codes, self._sum_s, self.changed = {}, 0.0, False
        self._buckets = [0] * (len(self._bounds_s) + 1)
        return found
