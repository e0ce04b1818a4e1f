"""Who asked what, and what came back: every request gets exactly one answer, and it is its own. Pure.

The model is ``times``: an answer is the request's values times the factor of the version that answered, so that it
tells whose it is. Faults are collected as texts; an empty list means that all was well.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np

from agent.errors import AgentError
from agent.tensors import Array, unpack

FACTORS: Final[Mapping[str, float]] = {"1.0.0": 2.0, "2.0.0": 3.0}  # of the versions of ``times``
# What a good request may be told while workers die, versions change and queues are full.
EXPECTED: Final = frozenset(
    {"overloaded", "rate_limited", "unavailable", "deadline_exceeded", "canceled", "worker_died"}
)
_FAULTS_MAX: Final = 50  # more say nothing new


@dataclass(kw_only=True)
class Ledger:
    """The requests of one client.

    ``outcomes`` counts answers by ``result`` or error code.
    """

    name: str
    outstanding: dict[int, Array] = field(default_factory=dict)
    hurried: set[int] = field(default_factory=set)  # those that named a deadline of their own
    outcomes: Counter[str] = field(default_factory=Counter)
    asked: int = 0
    faults: list[str] = field(default_factory=list)

    def ask(self, request_id: int, values: Array, *, hurried: bool = False) -> None:
        """A request leaves; ``hurried`` if it may be too late for its answer."""
        self.asked += 1
        if hurried:
            self.hurried.add(request_id)
        self.outstanding[request_id] = values

    def result(self, request_id: int, version: str, values: Array | None) -> None:
        """A result came."""
        asked = self._taken(request_id, "result")
        if asked is None:
            return
        factor = FACTORS.get(version)
        if factor is None:
            self.fault(f"request {request_id}: answered by version {version!r}")
        elif values is None or not np.array_equal(values, asked * np.float32(factor)):
            self.fault(f"request {request_id}: the answer is not its own")

    def refused(self, request_id: int, code: str, message: str) -> None:
        """An error came."""
        hurried = request_id in self.hurried
        if self._taken(request_id, code) is None:
            return
        if code not in EXPECTED or (code == "deadline_exceeded" and not hurried):
            self.fault(f"request {request_id}: {code}: {message}")

    def frame(self, header: Mapping[str, Any], body: Any) -> None:
        """Any answer came, as a frame."""
        request_id, kind = header.get("id"), header["kind"]
        if not isinstance(request_id, int):
            self.fault(f"an answer to nobody: {kind} {header.get('code', '')} {header.get('message', '')}")
        elif kind == "error":
            self.refused(request_id, str(header.get("code")), str(header.get("message")))
        elif kind == "result":
            self.result(request_id, str(header.get("version")), _output(header, body))
        else:
            self.fault(f"request {request_id}: answered by {kind!r}")

    def refused_outside(self, header: Mapping[str, Any]) -> None:
        """An error came for a request that is not kept here."""
        self.outcomes[str(header.get("code"))] += 1
        if header.get("code") not in EXPECTED:
            self.fault(f"refused by {header.get('code')}: {header.get('message')}")

    def close(self, why: str) -> None:
        """No more answers will come."""
        if self.outstanding:
            self.fault(f"{len(self.outstanding)} requests without an answer: {why}")
        self.outstanding.clear()

    def fault(self, text: str) -> None:
        """Something was wrong."""
        if len(self.faults) < _FAULTS_MAX:
            self.faults.append(f"{self.name}: {text}")

    def plain(self) -> dict[str, Any]:
        """Return everything for a report."""
        return {"name": self.name, "asked": self.asked, "outcomes": dict(self.outcomes), "faults": self.faults}

    def _taken(self, request_id: int, outcome: str) -> Array | None:
        asked = self.outstanding.pop(request_id, None)
        self.hurried.discard(request_id)
        if asked is None:
            self.fault(f"request {request_id}: {outcome}, though it is answered already or was never asked")
        else:
            self.outcomes[outcome] += 1
        return asked


def _output(header: Mapping[str, Any], body: Any) -> Array | None:
    try:
        return unpack(header.get("tensors"), body)["y"]
    except (AgentError, KeyError):
        return None
