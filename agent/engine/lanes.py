"""Direct lanes: a socket from a local application straight to a worker, without the daemon in between.

The daemon makes the socket, says to the worker for whom it is and what its bounds are, and hears once a second what
was asked on it. Who is limited by rate or quota gets none, nor does a model whose worker runs its bundle's own code
(it is not trusted to count).

Promises: a lane ends with the connection that asked for it, with its worker, and when its model's version changes; it
holds the shared memory that its application uses there until it ends. Leaves out: the worker's side (``worker/``).
"""

from __future__ import annotations

import socket
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Final, Protocol

import msgspec

from agent.errors import LaneRefusedError, OverloadedError
from agent.regions import Region

_BUFFER_BYTES: Final = 1 << 20
_LENDING_MAX: Final = 256  # at once on one lane: its worker has not been told yet


class _Link(Protocol):
    """What a lane needs of its worker's link."""

    lanes: dict[int, Lane]

    def post(self, header: dict[str, Any]) -> bytes: ...

    def pass_on(self, header: dict[str, Any], descriptor: int, release: Callable[[], None]) -> None: ...

    def pin(self, region: Region) -> None: ...

    def unpin(self, region: Region) -> None: ...

    def when_sent(self, done: Callable[[], None]) -> None: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Terms:
    """The bounds of a lane, as the worker is told."""

    client: str
    deadline_ms: int  # of requests that bring none
    queue_requests_max: int
    queue_bytes_max: int
    bounds_s: tuple[float, ...]  # of the latency buckets it reports


class Lane:
    """One application's lane to one worker. Made by ``Engine.open_lane``."""

    def __init__(self, number: int, link: _Link, terms: Terms, *, model: str, version: str) -> None:
        self.number = number
        self.model = model
        self.version = version
        self.on_end: Callable[[Lane], None] = _nobody
        self._link = link
        self._regions: dict[int, Region] = {}  # by the application's numbers
        self._lending = 0
        self._ended = False
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        for side in (ours, theirs):
            side.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _BUFFER_BYTES)
        self.socket = theirs  # the application's end: whoever passes it on closes it
        link.lanes[number] = self
        link.pass_on({"kind": "lane", "lane": number, **_plain(terms)}, ours.fileno(), ours.close)

    def lend(self, number: int, region: Region, done: Callable[[], None]) -> None:
        """Let the worker know a region as the application calls it; ``done`` is called when it has been told.

        Raises:
            OverloadedError: the worker has as many regions as it may, or has not been told of the last ones.
            LaneRefusedError: the lane has ended.
        """
        if self._ended:
            raise LaneRefusedError("the lane has ended")
        if self._lending >= _LENDING_MAX:
            raise OverloadedError("the worker has not been told yet of what was lent before")
        if number not in self._regions:
            self._link.pin(region)
            self._regions[number] = region
            self._link.post({"kind": "lend", "lane": self.number, "as": number, "region": region.number})
        self._lending += 1
        self._link.when_sent(partial(self._lent, done))

    def _lent(self, done: Callable[[], None]) -> None:
        self._lending -= 1
        done()

    def unlend(self, number: int) -> None:
        """Take a region back; requests that look at it keep it mapped until they are answered."""
        region = self._regions.pop(number, None)
        if region is not None:
            self._link.post({"kind": "unlend", "lane": self.number, "as": number})
            self._link.unpin(region)

    def revoke(self) -> None:
        """Ask the worker to end it: what has arrived there is answered, nothing more is taken."""
        if not self._ended:
            self._link.post({"kind": "revoke", "lane": self.number})

    def ended(self) -> None:
        """The worker has closed it, or is gone."""
        if self._ended:
            return
        self._ended = True
        self._link.lanes.pop(self.number, None)
        regions, self._regions = self._regions, {}
        for region in regions.values():
            self._link.unpin(region)
        self.on_end(self)


class LaneCounts(msgspec.Struct, frozen=True, kw_only=True):
    """What a worker says its lanes did since it last told: it serves no foreign code, or it would have none."""

    codes: dict[str, int]
    buckets: list[int]
    sum_s: float
    waiting: int


def counts_of(header: dict[str, Any]) -> LaneCounts | None:
    """Return what a ``lanes`` frame says, or ``None`` if it is malformed."""
    try:
        return msgspec.convert(header, LaneCounts)
    except (msgspec.ValidationError, RecursionError):
        return None


def too_many(count: int) -> OverloadedError:
    """Return the refusal of one region more than a worker may have."""
    return OverloadedError(f"the worker has {count} regions mapped")


def _plain(terms: Terms) -> dict[str, Any]:
    return {
        "client": terms.client,
        "default_ms": terms.deadline_ms,
        "queue_requests_max": terms.queue_requests_max,
        "queue_bytes_max": terms.queue_bytes_max,
        "bounds_s": list(terms.bounds_s),
    }


def _nobody(_lane: Lane) -> None:
    """Nobody waits for the end of a lane that is being made."""
