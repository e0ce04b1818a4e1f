"""The life of one deployment, as a pure table: ``reconciler.py`` performs, ``journal.py`` keeps.

The self-test is part of LOADING: a worker reports ready only after its golden inputs passed. What is waited for, and
how long, is decided in ``gates.py``. Absent on purpose: timers (who performs turns a missed deadline into an event).
``docs/deployment.md`` holds the diagram that ``mermaid()`` prints.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import Any, Final

from agent.deploy.plan import ORDINARY, Plan
from agent.deploy.slots import model_of
from agent.errors import IllegalTransitionError

TRANSITIONS_MAX: Final = 64  # catches loops that individual counters miss
STEPS_BEFORE_CUTOVER_MAX: Final = TRANSITIONS_MAX - 8  # leaves what a trial and its end need


class State(StrEnum):
    """Where a deployment stands."""

    RECEIVED = "received"
    QUEUED = "queued"  # until bytes may be fetched
    VALIDATING = "validating"  # metadata, manifest, policy, variants, space
    FETCHING = "fetching"
    FETCH_WAIT = "fetch_wait"  # the store cannot be reached; tried again
    VERIFYING = "verifying"
    STAGED = "staged"  # complete and verified on disk
    WAITING_WINDOW = "waiting_window"  # until it may be loaded: windows, holds, the box's one trial
    LOADING = "loading"  # beside what serves, golden self-test included
    CANARY = "canary"  # a share of the requests, or copies of them, go to the new version; the pointer is untouched
    CUTOVER = "cutover"  # pointer written, requests go to the new version
    PROBATION = "probation"
    CONFIRMED = "confirmed"
    PREPARED = "prepared"  # on disk, as asked; nothing was loaded
    ROLLING_BACK = "rolling_back"
    ROLLED_BACK = "rolled_back"
    INCONSISTENT = "inconsistent"  # the rollback failed too
    REJECTED = "rejected"  # refused for good: trust, policy, no variant
    FAILED = "failed"
    CANCELED = "canceled"  # somebody asked to give it up
    SUPERSEDED = "superseded"  # another wish won
    EXPIRED = "expired"  # not to be carried out any more


class Event(StrEnum):
    """What may happen to a deployment."""

    DONE = "done"  # the state's work succeeded
    FAIL = "fail"
    REJECT = "reject"
    OFFLINE = "offline"
    ALREADY = "already"  # what is asked for serves already
    SHARE = "share"  # the new version gets its first share of the requests, or the next
    RESUME = "resume"  # a restart found it in the middle
    WAIT = "wait"  # not now
    PREPARE = "prepare"  # no more than this was asked for
    SUPERSEDE = "supersede"
    CANCEL = "cancel"
    EXPIRE = "expire"


# Nothing that serves has changed: it may be given up, or begun again after a restart.
BEFORE_CUTOVER: Final = (
    State.RECEIVED,
    State.QUEUED,
    State.VALIDATING,
    State.FETCH_WAIT,
    State.FETCHING,
    State.VERIFYING,
    State.STAGED,
    State.WAITING_WINDOW,
    State.LOADING,
    State.CANARY,
)
# A restart finds these as it left them: it costs no transition, however often a box that waits is switched off.
WAITING: Final = frozenset({State.QUEUED, State.FETCH_WAIT, State.WAITING_WINDOW})

TABLE: Final[Mapping[tuple[State, Event], State]] = {
    (State.RECEIVED, Event.DONE): State.VALIDATING,
    (State.RECEIVED, Event.WAIT): State.QUEUED,
    (State.RECEIVED, Event.REJECT): State.REJECTED,
    (State.QUEUED, Event.DONE): State.VALIDATING,
    (State.VALIDATING, Event.DONE): State.FETCHING,
    (State.VALIDATING, Event.ALREADY): State.CONFIRMED,
    (State.VALIDATING, Event.OFFLINE): State.FETCH_WAIT,
    (State.VALIDATING, Event.REJECT): State.REJECTED,
    (State.FETCH_WAIT, Event.DONE): State.VALIDATING,
    (State.FETCH_WAIT, Event.WAIT): State.QUEUED,
    (State.FETCH_WAIT, Event.REJECT): State.REJECTED,
    (State.FETCHING, Event.DONE): State.VERIFYING,
    (State.FETCHING, Event.OFFLINE): State.FETCH_WAIT,
    (State.FETCHING, Event.WAIT): State.QUEUED,  # the window closed; what is here stays
    (State.FETCHING, Event.REJECT): State.REJECTED,
    (State.VERIFYING, Event.DONE): State.STAGED,
    (State.VERIFYING, Event.OFFLINE): State.FETCH_WAIT,
    (State.VERIFYING, Event.REJECT): State.REJECTED,
    (State.STAGED, Event.DONE): State.LOADING,
    (State.STAGED, Event.REJECT): State.REJECTED,  # callers of what serves would notice
    (State.STAGED, Event.PREPARE): State.PREPARED,
    (State.STAGED, Event.WAIT): State.WAITING_WINDOW,
    (State.WAITING_WINDOW, Event.DONE): State.LOADING,
    (State.LOADING, Event.DONE): State.CUTOVER,
    (State.LOADING, Event.SHARE): State.CANARY,
    (State.LOADING, Event.REJECT): State.REJECTED,  # also if it was revoked while it waited
    (State.CANARY, Event.SHARE): State.CANARY,
    (State.CANARY, Event.DONE): State.CUTOVER,
    (State.CUTOVER, Event.DONE): State.PROBATION,
    (State.CUTOVER, Event.RESUME): State.RECEIVED,  # the pointer was not written yet
    (State.CUTOVER, Event.FAIL): State.ROLLING_BACK,
    (State.PROBATION, Event.DONE): State.CONFIRMED,
    (State.PROBATION, Event.FAIL): State.ROLLING_BACK,
    (State.PROBATION, Event.SUPERSEDE): State.ROLLING_BACK,  # never left on trial without a watcher
    (State.ROLLING_BACK, Event.DONE): State.ROLLED_BACK,
    (State.ROLLING_BACK, Event.FAIL): State.INCONSISTENT,
    **{
        (state, event): target
        for state in BEFORE_CUTOVER
        for event, target in (
            (Event.SUPERSEDE, State.SUPERSEDED),
            (Event.CANCEL, State.CANCELED),
            (Event.FAIL, State.FAILED),
            (Event.RESUME, State.RECEIVED),
        )
    },
    **{(state, Event.EXPIRE): State.EXPIRED for state in BEFORE_CUTOVER[:-2]},  # LOADING, CANARY: it is carried out
    (State.CANARY, Event.FAIL): State.ROLLING_BACK,  # it has answered
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
    attempts: Mapping[State, int] = field(default_factory=dict)  # how often each state's work was begun
    version: str = ""  # resolved
    digest: str = ""  # sha256 of the manifest, lower-case hex
    variant: str = ""  # that serves
    percent: float = 0.0  # of the routing keys that it answers in CANARY
    evidence: tuple[dict[str, Any], ...] = ()  # of each share it has had, then of its probation
    previous: str = ""  # version that served when it was created
    waited_s: float = 0.0  # for windows and holds, while the box was running
    offline_s: float = 0.0  # the same, for a store that cannot be reached
    bytes_done: int = 0
    bytes_total: int = 0
    rate_bps: int = 0  # bytes per second while it is fetched
    code: str = ""  # of the failure
    message: str = ""
    created: float = 0.0  # Unix seconds
    updated: float = 0.0  # when it came to its state
    boot_id: str = ""  # of the boot in which it was last changed
    clock_quality: str = ""  # of ``updated``: ntp, rtc, floor, none, as telemetry has it; empty: not known

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

    @property
    def lane(self) -> str:
        """The line of deployments it stands in: what is only prepared must not hide what serves."""
        return staging_lane(self.slot) if self.plan.stage_only else self.slot

    def plain(self) -> dict[str, Any]:
        """Return JSON-able fields, for people and telemetry."""
        values = {name: getattr(self, name) for name in self.__dataclass_fields__}
        attempts = {str(state): count for state, count in self.attempts.items()}
        return values | {"plan": self.plan.plain(), "attempts": attempts, "eta_s": self.eta_s}


def staging_lane(slot: str) -> str:
    """Return the lane of what is only prepared for ``slot``."""
    return f"{slot}#stage"


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
