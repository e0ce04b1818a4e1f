"""What is wanted of each slot, by whom, and what follows from it. Pure.

Sources by precedence: a local pin, the fleet, the configuration file. The next action is a function of the wanted
version, the pointer and the newest deployment of the slot alone, so a restart or a repeated hint changes nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from enum import StrEnum
from typing import Final

from agent.deploy.plan import ORDINARY, Plan
from agent.deploy.pointer import Pointer
from agent.deploy.slots import model_of
from agent.deploy.state import BEFORE_CUTOVER, FINAL, TABLE, TRIAL, Event, Record, State
from agent.errors import CanceledError, CommandExpiredError, SupersededError

PRECEDENCE: Final = ("pin", "fleet", "file")  # strongest first
STAGING: Final = "stage"  # where a wish is kept that asks for no more than bytes on disk
REVOCATION: Final = "revocation"  # nobody's wish: away from a version that was revoked, before anything else
# Ends whose cause may pass by itself: the wish is tried again now and then.
TRANSIENT: Final = frozenset(
    {"metadata_expired", "disk_full", "offline", "store_transient", "store_failed", "budget_spent", "overloaded"}
)
SUPERSEDED: Final = SupersededError.code  # code of a trial that was rolled back because another wish won
_BYTES_WRONG: Final = "chunk_mismatch"  # says something of who gave the bytes, nothing of what was signed


@dataclass(frozen=True, slots=True, kw_only=True)
class Desired:
    """One source's wish for one slot. ``id`` names the wish: a command's id, or a text made of the file's entry."""

    id: str
    slot: str
    team: str
    version: str = ""  # empty: the channel's newest
    channel: str = "stable"
    source: str = "file"
    local: bool = False  # take it from disk, without network
    force: bool = False  # although it failed here before
    medium: str = ""  # the folder to take it from, instead of the configured stores
    plan: Plan = ORDINARY

    @property
    def model(self) -> str:
        """Of which the slot is."""
        return model_of(self.slot)

    @property
    def place(self) -> str:
        """Where it is kept, one per slot and place: what is only prepared leaves the other wishes alone."""
        return STAGING if self.plan.stage_only else self.source


@dataclass(frozen=True, slots=True, kw_only=True)
class Ending:
    """Why a deployment is to be given up."""

    event: Event
    message: str
    code: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Overtaken:
    """A wish that ended before its deployment began."""

    wish: Desired
    event: Event
    message: str


class Action(StrEnum):
    """What a slot's performer does next."""

    NOTHING = "nothing"
    BEGIN = "begin"  # a new deployment for the wish
    RESUME = "resume"  # the unfinished deployment
    SUPERSEDE = "supersede"  # give up the unfinished deployment, another wish won
    POLL = "poll"  # ask the store what the channel offers


def record_of(wish: Desired, deployment_id: str, *, previous: str = "", digest: str = "", now_s: float) -> Record:
    """Return the first record of a deployment for ``wish``; ``digest`` if it is known already."""
    return Record(
        id=deployment_id,
        slot=wish.slot,
        team=wish.team,
        wanted=wish.version,
        channel=wish.channel,
        source=wish.source,
        local=wish.local,
        force=wish.force,
        medium=wish.medium,
        plan=wish.plan,
        previous=previous,
        digest=digest,
        created=now_s,
        updated=now_s,
    )


def effective(wishes: Iterable[Desired]) -> Mapping[str, Desired]:
    """Return the strongest wish of each slot; what is only to be prepared is none."""
    best: dict[str, Desired] = {}
    for wish in wishes:
        if wish.plan.stage_only:
            continue
        known = best.get(wish.slot)
        if known is None or PRECEDENCE.index(wish.source) < PRECEDENCE.index(known.source):
            best[wish.slot] = wish
    return best


def decide(wish: Desired | None, pointer: Pointer | None, latest: Record | None) -> Action:
    """Return what to do for a slot.

    Args:
        wish: The strongest wish; ``None`` if nobody wants the slot any more (it goes on serving).
        pointer: What is active now.
        latest: The slot's newest deployment.
    """
    if latest is not None and latest.state not in FINAL:
        if (
            wish is None
            or latest.source == REVOCATION
            or serves(latest, wish)
            or latest.state in TRIAL - {State.PROBATION}
        ):
            return Action.RESUME
        return Action.SUPERSEDE
    if wish is None:
        return Action.NOTHING
    if latest is not None and serves(latest, wish):
        if pointer is None and latest.state is State.CONFIRMED:
            return Action.BEGIN  # it was lost from the disk
        if latest.state is State.SUPERSEDED or latest.code == SUPERSEDED:
            return Action.BEGIN  # the wish that won is withdrawn
        unserved = pointer is None and wish.source == "file"
        if not wish.version or unserved or (latest.state is not State.CONFIRMED and may_pass(latest, wish)):
            return Action.POLL
        return Action.NOTHING
    if pointer is not None and not pointer.trial and wish.version == pointer.active.version and wish.source == "file":
        return Action.NOTHING  # the configured version serves already, whatever brought it
    return Action.BEGIN


def ending(record: Record, wish: Desired | None, *, cancelled: bool, now_s: float | None) -> Ending | None:
    """Return why a deployment is to be given up before it serves; ``None``: it is not.

    Args:
        record: The deployment.
        wish: The strongest wish of its lane now.
        cancelled: Somebody asked to give it up.
        now_s: Unix seconds; ``None``: the clock cannot be right.
    """
    if cancelled and record.state in BEFORE_CUTOVER:
        return Ending(event=Event.CANCEL, message="it was cancelled", code=CanceledError.code)
    limit = record.plan.not_after
    late = limit is not None and now_s is not None and now_s > limit
    if late and (record.state, Event.EXPIRE) in TABLE:
        message = f"it was to be carried out until {datetime.fromtimestamp(limit or 0.0, UTC):%Y-%m-%d %H:%M:%S} UTC"
        return Ending(event=Event.EXPIRE, message=message, code=CommandExpiredError.code)
    if wish is not None and record.source != REVOCATION and not serves(record, wish):
        return Ending(event=Event.SUPERSEDE, message="something else was asked for")
    return None


def may_pass(record: Record, wish: Desired) -> bool:
    """Whether a deployment that failed may do better when its wish is tried again, with nothing new on offer.

    What a medium gave is no reason to leave a version aside that the store has, too.
    """
    only_medium = record.state in (State.FAILED, State.REJECTED) and bool(record.medium) and not wish.medium
    return record.code in TRANSIENT or record.code == _BYTES_WRONG or only_medium


def serves(record: Record, wish: Desired) -> bool:
    """Whether the deployment was made for this wish, at the first look or a later poll."""
    return record.id == wish.id or record.id.startswith(f"{wish.id}@")
