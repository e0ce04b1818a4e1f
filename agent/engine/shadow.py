"""Copies of requests for a candidate: its answers are compared with what was answered, then dropped.

A copy begins once its request has been answered, so it can neither delay nor fail it; copies are no client's: no quota,
no request metric counts them. They are bounded in number, bytes and pace, and the first thing to be left out when the
version that serves has enough to do. What cannot be copied cheaply is left out and counted: shared memory of a client,
which may change once its answer is there, and streams.
Leaves out: how answers are compared (``agreement.py``), and what follows from it (``deploy``).
"""

from __future__ import annotations

import asyncio
from collections import Counter as Tallied
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING, Any, Final

from agent.engine.agreement import compare, rules_of
from agent.engine.job import Job
from agent.engine.split import Sampler
from agent.engine.types import InferRequest
from agent.errors import AgentError
from agent.metrics import Counter, HistogramSeries
from agent.regions import Region
from agent.spread import NOTHING, Counts, Spread
from agent.wire import Buffer, Header

if TYPE_CHECKING:
    from agent.engine.version import Version

COPIES_MAX: Final = 4  # under way at once
_BYTES_MAX: Final = 16 << 20  # of their bodies and of the answers they are compared with
_APART_S: Final = 0.01  # between two copies: more of them would be no better evidence
_CROWD: Final = 8  # requests for each worker of the version that serves: above it nothing is copied
_TIMEOUT_S: Final = 30.0
_COPIED: Final = ("content_type", "params", "priority", "outputs", "tensors")


class Skip(StrEnum):
    """Why a request that was chosen is not copied."""

    SHARED_MEMORY = "shared_memory"
    STREAM = "stream"
    LOAD = "load"
    BOUND = "bound"  # copies under way, their pace or their bytes
    FAILED = "failed"  # the request itself: there is nothing to compare with
    NOT_READY = "not_ready"  # the candidate
    LARGE = "large"  # the answers


@dataclass(frozen=True, slots=True, kw_only=True)
class Tally:
    """What copies have shown."""

    compared: int = 0
    agreed: float = 0.0  # of those; a copy of several rows may agree in part
    failed: int = 0  # of those: the candidate gave an error, or no answer in time
    skipped: dict[str, int] = field(default_factory=dict)  # by reason
    durations: Counts = NOTHING  # the candidate's, of the copies it answered
    originals: Counts = NOTHING  # of the requests that these copy
    difference: str = ""  # the last one


class Copy:
    """One request, as the candidate will see it."""

    __slots__ = (
        "arrived", "body", "client", "deadline", "handle", "header", "model", "nbytes", "part", "regions",
        "routing_key", "shadow", "version", "wanted", "wanted_body", "wanted_s",
    )  # fmt: skip

    def __init__(self, shadow: Shadow, request: InferRequest, arrived: float) -> None:
        self.shadow = shadow
        self.model = request.model
        self.version: str | None = None
        self.header = request.header
        self.body = request.body
        self.arrived = arrived
        self.deadline = request.deadline - arrived  # a span until it begins
        self.client = ""
        self.routing_key = ""
        self.regions: Sequence[tuple[int, Region]] = ()
        self.handle: Any = None
        self.part: Callable[[dict[str, Any], Sequence[Buffer]], None] | None = None
        self.wanted: Header | None = None
        self.wanted_body: Buffer = b""
        self.wanted_s = 0.0
        self.nbytes = 0  # that it keeps in memory

    def original_answered(self, header: Header, body: Sequence[Buffer], *, streamed: bool) -> None:
        """Begin, now that the request has its answer."""
        self.shadow.begin(self, header, body, streamed=streamed)

    def answer(self, header: Header, body: Sequence[Buffer], /) -> None:
        """Take the candidate's answer."""
        self.shadow.answered(self, header, body)


class Shadow:
    """Copies requests of one model to one candidate.

    Args:
        candidate: Who gets them.
        default: Who answers the requests.
        percent: How many of the requests are copied.
        submit: Hands a copy to the candidate under a new number; raises ``AgentError``.
        outcomes: Counts copies by model, version and outcome.
        durations: Of the candidate's answers to copies.
    """

    def __init__(
        self,
        candidate: Version,
        default: Version,
        percent: float,
        *,
        submit: Callable[[Copy], Job],
        outcomes: Counter,
        durations: HistogramSeries,
        now: Callable[[], float],
    ) -> None:
        self.percent = percent
        self._candidate = candidate
        self._default = default
        self._sampler = Sampler(percent)
        self._submit = submit
        self._outcomes = outcomes
        self._histogram = durations
        self._now = now
        self._loop = asyncio.get_running_loop()
        self._rules = rules_of(candidate.spec.variants[0].worker if candidate.spec.variants else {})
        self._under_way: dict[Copy, Job] = {}
        self._bytes = 0
        self._next_at = 0.0  # loop seconds
        self._ended = False
        self._compared = self._failed = 0
        self._agreed = 0.0
        self._skipped: Tallied[str] = Tallied()
        self._durations, self._originals = Spread(now()), Spread(now())
        self._difference = ""

    def choose(self, request: InferRequest, arrived: float) -> Copy | None:
        """Return a copy of the request to be begun later, if it is chosen and can be copied."""
        if not self._sampler.take():
            return None
        if request.regions or "reply" in request.header:
            self._skip(Skip.SHARED_MEMORY)
        elif request.header.get("stream") is True:
            self._skip(Skip.STREAM)
        else:
            return Copy(self, request, arrived)
        return None

    def begin(self, copy: Copy, header: Header, body: Sequence[Buffer], *, streamed: bool) -> None:
        """Send the copy to the candidate soon, unless there is a reason not to; the answer is what it will face."""
        if self._ended:
            return
        now = self._now()
        if header["kind"] != "result":
            self._skip(Skip.FAILED)
        elif streamed:
            self._skip(Skip.STREAM)
        elif not self._candidate.ready:
            self._skip(Skip.NOT_READY)
        elif self._crowded():
            self._skip(Skip.LOAD)
        else:
            copy.wanted, copy.wanted_s = header, now - copy.arrived
            copy.wanted_body = body[0] if len(body) == 1 else b"".join(body)
            copy.nbytes = len(copy.body) + len(copy.wanted_body)
            if now < self._next_at or len(self._under_way) >= COPIES_MAX or self._bytes + copy.nbytes > _BYTES_MAX:
                self._skip(Skip.BOUND)
                return
            self._next_at = now + _APART_S
            self._loop.call_soon(self._send, copy)  # behind the answers of this turn

    def answered(self, copy: Copy, header: Header, body: Sequence[Buffer]) -> None:
        """Compare."""
        if self._under_way.pop(copy, None) is None:
            return
        self._bytes -= copy.nbytes
        duration_s = self._now() - copy.arrived
        assert copy.wanted is not None
        mine = body[0] if len(body) == 1 else b"".join(body)
        found = compare(header, mine, copy.wanted, copy.wanted_body, self._rules)
        if found is None:
            self._skip(Skip.LARGE)
            return
        self._compared += 1
        self._agreed += found.share
        if header["kind"] == "error":
            self._failed += 1
            self._count("failed")
        else:
            self._durations.observe(duration_s, 0.0)
            self._originals.observe(copy.wanted_s, 0.0)
            self._histogram.observe(duration_s)
            self._count("agreed" if found.share == 1.0 else "differed")
        if found.reason:
            self._difference = found.reason

    def end(self) -> None:
        """Withdraw what is under way; begin nothing more."""
        self._ended = True
        under_way, self._under_way = self._under_way, {}
        for job in under_way.values():
            self._candidate.cancel(job)
            job.settle()
        self._bytes = 0

    def tally(self) -> Tally:
        """Return what copies have shown so far."""
        return Tally(
            compared=self._compared,
            agreed=self._agreed,
            failed=self._failed,
            skipped=dict(self._skipped),
            durations=self._durations.counts(),
            originals=self._originals.counts(),
            difference=self._difference,
        )

    def _send(self, copy: Copy) -> None:
        if self._ended or len(self._under_way) >= COPIES_MAX:
            return
        now = self._now()
        asked = {"kind": "infer", "model": copy.model}
        asked.update((name, copy.header[name]) for name in _COPIED if copy.header.get(name) is not None)
        copy.header, copy.arrived = Header(asked), now
        copy.deadline = now + min(_TIMEOUT_S, copy.deadline)
        try:
            job = self._submit(copy)
        except AgentError:
            self._skip(Skip.BOUND)
            return
        self._under_way[copy] = job
        self._bytes += copy.nbytes

    def _crowded(self) -> bool:
        pool = self._default.pool
        return pool is not None and (bool(pool.waiting) or pool.outstanding > _CROWD * max(1, len(pool.links)))

    def _skip(self, reason: Skip) -> None:
        self._skipped[reason.value] += 1
        self._count(f"skipped_{reason}")

    def _count(self, outcome: str) -> None:
        self._outcomes.add((self._candidate.model, self._candidate.version, outcome))
