"""The life of one deployment, as a pure table: ``reconciler.py`` performs, ``journal.py`` keeps.

The self-test is part of LOADING: a worker reports ready only after its golden inputs passed. Absent on purpose:
timers (the performer turns a missed deadline into ``Event.FAIL``) and maintenance windows.
``docs/deployment.md`` holds the diagram that ``mermaid()`` prints.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Any, Final

from agent.deploy.plan import ORDINARY, Plan
from agent.deploy.slots import model_of
from agent.errors import IllegalTransitionError

TRANSITIONS_MAX: Final = 64  # catches loops that individual counters miss


class State(StrEnum):
    """Where a deployment stands."""

    RECEIVED = "received"
    VALIDATING = "validating"  # metadata, manifest, policy, variants, space
    FETCHING = "fetching"
    FETCH_WAIT = "fetch_wait"  # the store cannot be reached; tried again
    VERIFYING = "verifying"
    STAGED = "staged"  # complete and verified on disk
    LOADING = "loading"  # beside what serves, golden self-test included
    CANARY = "canary"  # a share of the requests, or copies of them, go to the new version; the pointer is untouched
    CUTOVER = "cutover"  # pointer written, requests go to the new version
    PROBATION = "probation"
    CONFIRMED = "confirmed"
    ROLLING_BACK = "rolling_back"
    ROLLED_BACK = "rolled_back"
    INCONSISTENT = "inconsistent"  # the rollback failed too
    REJECTED = "rejected"  # refused for good: trust, policy, no variant
    FAILED = "failed"
    SUPERSEDED = "superseded"


class Event(StrEnum):
    """What may happen to a deployment."""

    DONE = "done"  # the state's work succeeded
    FAIL = "fail"
    REJECT = "reject"
    OFFLINE = "offline"
    ALREADY = "already"  # what is asked for serves already
    SHARE = "share"  # the new version gets its first share of the requests, or the next
    RESUME = "resume"  # a restart found it in the middle
    SUPERSEDE = "supersede"


TABLE: Final[Mapping[tuple[State, Event], State]] = {
    (State.RECEIVED, Event.DONE): State.VALIDATING,
    (State.RECEIVED, Event.REJECT): State.REJECTED,
    (State.VALIDATING, Event.DONE): State.FETCHING,
    (State.VALIDATING, Event.ALREADY): State.CONFIRMED,
    (State.VALIDATING, Event.OFFLINE): State.FETCH_WAIT,
    (State.VALIDATING, Event.REJECT): State.REJECTED,
    (State.VALIDATING, Event.FAIL): State.FAILED,
    (State.FETCH_WAIT, Event.DONE): State.VALIDATING,
    (State.FETCH_WAIT, Event.REJECT): State.REJECTED,
    (State.FETCH_WAIT, Event.FAIL): State.FAILED,
    (State.FETCHING, Event.DONE): State.VERIFYING,
    (State.FETCHING, Event.OFFLINE): State.FETCH_WAIT,
    (State.FETCHING, Event.REJECT): State.REJECTED,
    (State.FETCHING, Event.FAIL): State.FAILED,
    (State.VERIFYING, Event.DONE): State.STAGED,
    (State.VERIFYING, Event.OFFLINE): State.FETCH_WAIT,
    (State.VERIFYING, Event.REJECT): State.REJECTED,
    (State.VERIFYING, Event.FAIL): State.FAILED,
    (State.STAGED, Event.DONE): State.LOADING,
    (State.STAGED, Event.REJECT): State.REJECTED,  # not compatible with what serves
    (State.LOADING, Event.DONE): State.CUTOVER,
    (State.LOADING, Event.SHARE): State.CANARY,
    (State.LOADING, Event.FAIL): State.FAILED,
    (State.LOADING, Event.REJECT): State.REJECTED,
    (State.CANARY, Event.SHARE): State.CANARY,
    (State.CANARY, Event.DONE): State.CUTOVER,
    (State.CANARY, Event.FAIL): State.ROLLING_BACK,
    (State.CUTOVER, Event.DONE): State.PROBATION,
    (State.CUTOVER, Event.RESUME): State.RECEIVED,  # the pointer was not written yet
    (State.CUTOVER, Event.FAIL): State.ROLLING_BACK,
    (State.PROBATION, Event.DONE): State.CONFIRMED,
    (State.PROBATION, Event.FAIL): State.ROLLING_BACK,
    (State.PROBATION, Event.SUPERSEDE): State.ROLLING_BACK,  # never left on trial without a watcher
    (State.ROLLING_BACK, Event.DONE): State.ROLLED_BACK,
    (State.ROLLING_BACK, Event.FAIL): State.INCONSISTENT,
    # Before the cut-over nothing that serves has changed: it may be given up, or begun again after a restart.
    **{
        (state, event): target
        for state in (
            State.RECEIVED, State.VALIDATING, State.FETCH_WAIT, State.FETCHING, State.VERIFYING, State.STAGED,
            State.LOADING, State.CANARY,
        )
        for event, target in (
            (Event.SUPERSEDE, State.SUPERSEDED),
            (Event.RESUME, State.RECEIVED),
        )
    },
}  # fmt: skip

FINAL: Final = frozenset(State) - {state for state, _ in TABLE}
TRIAL: Final = frozenset({State.CUTOVER, State.PROBATION, State.ROLLING_BACK})  # the pointer is on trial


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """One journal row: all that a restart needs. ``step`` grows by one per transition."""

    id: str  # the desired change's id: a command's id, or "file:…"
    slot: str
    team: str
    wanted: str  # version asked for; empty: the channel's
    channel: str = "stable"
    source: str = "file"  # file, fleet, pin; revocation: back to a version that is not revoked
    local: bool = False  # from disk only: a rollback
    force: bool = False
    medium: str = ""  # the folder it is taken from, instead of the configured stores
    plan: Plan = ORDINARY
    state: State = State.RECEIVED
    step: int = 0
    version: str = ""  # resolved
    digest: str = ""  # sha256 of the manifest, lower-case hex
    variant: str = ""  # that serves
    percent: float = 0.0  # of the routing keys that it answers in CANARY
    evidence: tuple[dict[str, Any], ...] = ()  # of each share it has had, then of its probation
    previous: str = ""  # version that served when it was created
    bytes_done: int = 0
    bytes_total: int = 0
    rate_bps: int = 0  # bytes per second while it is fetched
    code: str = ""  # of the failure
    message: str = ""
    created: float = 0.0  # Unix seconds
    updated: float = 0.0

    @property
    def model(self) -> str:
        """Of which the slot is."""
        return model_of(self.slot)

    @property
    def eta_s(self) -> int | None:
        """Seconds until all bytes are here if they go on coming as they do; ``None`` if that cannot be told."""
        if not self.rate_bps or self.bytes_done >= self.bytes_total:
            return None
        return math.ceil((self.bytes_total - self.bytes_done) / self.rate_bps)

    def plain(self) -> dict[str, Any]:
        """Return JSON-able fields, for people and telemetry."""
        values = {name: getattr(self, name) for name in self.__dataclass_fields__}
        return values | {"plan": self.plan.plain(), "eta_s": self.eta_s}


def advance(record: Record, event: Event, **changes: Any) -> Record:
    """Return the record after ``event``.

    Raises:
        IllegalTransitionError: there is no such edge.
    """
    target = TABLE.get((record.state, event))
    if target is None:
        raise IllegalTransitionError(f"{record.state} has no edge for {event}")
    return replace(record, state=target, step=record.step + 1, **{"rate_bps": 0, **changes})


def mermaid() -> str:
    """Return the table as a Mermaid state diagram."""
    lines = ["stateDiagram-v2", "    [*] --> received"]
    lines += [f"    {source} --> {target}: {event}" for (source, event), target in TABLE.items()]
    lines += [f"    {state} --> [*]" for state in sorted(FINAL)]
    return "\n".join(lines)
