"""A candidate beside the version that serves: which requests it answers, and which are copied to it.

Requests that name a version, and those of direct lanes, are never its own: a model gives no lanes meanwhile, because
its workers could not divide what arrives there. While the candidate cannot answer at once, the version that serves
answers everything.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from agent.engine.shadow import Copy, Shadow, Tally
from agent.engine.split import place_of
from agent.engine.types import InferRequest

if TYPE_CHECKING:
    from agent.engine.version import Version


class Canary:
    """One candidate's part in its model's requests.

    Args:
        candidate: On trial.
        percent: Of the routing keys that it answers.
        shadow: What copies requests to it, if anything does.
    """

    __slots__ = ("candidate", "diverted", "percent", "requests", "shadow")

    def __init__(
        self, candidate: Version, percent: float, shadow: Shadow | None, requests: int = 0, diverted: int = 0
    ) -> None:
        self.candidate = candidate
        self.percent = percent
        self.shadow = shadow
        self.requests = requests  # that it was given
        self.diverted = diverted  # requests for it that another version had to answer

    def choose(self, request: InferRequest, arrived: float, default: Version) -> tuple[Version, Copy | None]:
        """Return who answers a request that names no version, and the copy to be made of it."""
        candidate = self.candidate
        if self.percent and place_of(routing_key(request), candidate.digest) < self.percent:
            if candidate.ready:
                self.requests += 1
                return candidate, None
            self.diverted += 1
            return default, None
        return default, self.shadow.choose(request, arrived) if self.shadow is not None else None

    def end(self) -> None:
        """Copy nothing more."""
        if self.shadow is not None:
            self.shadow.end()

    def tally(self) -> Tally:
        """Return what copies have shown."""
        return self.shadow.tally() if self.shadow is not None else Tally()

    def status(self) -> dict[str, Any]:
        """Return what an operator wants to see."""
        tally = self.tally()
        return {
            "version": self.candidate.version,
            "digest": self.candidate.digest,
            "ready": self.candidate.ready,
            "reason": self.candidate.why_not,
            "canary_percent": self.percent,
            "requests": self.requests,
            "diverted": self.diverted,
            "shadow_percent": self.shadow.percent if self.shadow is not None else 0.0,
            "compared": tally.compared,
            "agreement": round(tally.agreed / tally.compared, 4) if tally.compared else None,
            "skipped": tally.skipped,
            "difference": tally.difference,
        }


def routing_key(request: InferRequest) -> str:
    """Return what a request is sticky by: the key it brings, else its client."""
    if request.routing_key:
        return request.routing_key
    params = request.header.get("params")
    key = params.get("routing_key") if isinstance(params, dict) else None
    return str(key) if isinstance(key, str | int) and key != "" else request.client
