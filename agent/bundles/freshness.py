"""How far this box may trust what it last heard from its store, and what follows from that. Pure.

Time here is *trusted time*: the system clock, but never before the newest verified signature. The age of the metadata
is what lies between that signature and trusted time. A box that hears nothing keeps serving at any age; only what has
not served before needs fresh word from the signers.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Final

DAY_S: Final = 86_400
FRESH_AGE_S_MAX: Final = 7 * DAY_S
OFFLINE_AGE_S_MAX: Final = 30 * DAY_S  # beyond it a box is long offline
STICK_AGE_S_MAX: Final = 90 * DAY_S  # of a medium that is newer than what the box has, if its signers allow so much


class Freshness(StrEnum):
    """How old the newest word of the signers is."""

    FRESH = "fresh"
    STALE = "stale"
    LONG_OFFLINE = "long_offline"
    UNKNOWN = "unknown"  # no store was ever verified here


class Origin(StrEnum):
    """Where a version comes from that is to be activated."""

    NETWORK = "network"
    STICK = "stick"  # a medium with newer metadata than the box had
    MIRROR = "mirror"  # a medium that only gives bytes; the metadata is the box's own
    APPROVED = "approved"  # fetched before, and not activated yet
    KEPT = "kept"  # served here before


@dataclass(frozen=True, slots=True, kw_only=True)
class Standing:
    """Where the box stands."""

    freshness: Freshness
    clock_trusted: bool  # the system clock is not before the newest signature
    age_s: int  # of the newest verified timestamp
    trusted_time: int  # Unix seconds


def judge(*, issued: int, wall: float, floor: int, refused: bool) -> Standing:
    """Return the standing of a box.

    Args:
        issued: When the newest verified timestamp was signed, Unix seconds; 0: there is none.
        wall: The system clock, Unix seconds.
        floor: No clock is believed to be before this: the build, or a signature.
        refused: The last answer of the store did not hold. No answer only lets the age grow.
    """
    lowest = max(floor, issued)
    now = int(max(wall, lowest))
    age = now - issued if issued else 0
    if not issued:
        freshness = Freshness.UNKNOWN
    elif age > OFFLINE_AGE_S_MAX:
        freshness = Freshness.LONG_OFFLINE
    elif age > FRESH_AGE_S_MAX or refused:
        freshness = Freshness.STALE
    else:
        freshness = Freshness.FRESH
    return Standing(freshness=freshness, clock_trusted=wall >= lowest, age_s=age, trusted_time=now)


def approved_until(origin: Origin, issued: int) -> int:
    """Return until when a version may be activated that was fetched under a timestamp signed at ``issued``."""
    return issued + (FRESH_AGE_S_MAX if origin is Origin.NETWORK else OFFLINE_AGE_S_MAX)


def obstacle(origin: Origin, standing: Standing, *, approved: int = 0) -> str:
    """Return why a version of this origin may not be activated now, an empty text if it may.

    Args:
        origin: Where it comes from.
        standing: After the refresh or check that vouched for the version.
        approved: Until when it may be activated, Unix seconds, if it was fetched before.
    """
    days = standing.age_s // DAY_S
    if origin is Origin.NETWORK and standing.freshness is not Freshness.FRESH:
        return f"the store's newest signature is {days} days old, at most {FRESH_AGE_S_MAX // DAY_S} are allowed"
    if origin is Origin.STICK and standing.age_s > STICK_AGE_S_MAX:
        return f"what is offered was signed {days} days ago, at most {STICK_AGE_S_MAX // DAY_S} are allowed"
    if origin is Origin.MIRROR and standing.age_s > OFFLINE_AGE_S_MAX:
        return f"the metadata on this box is {days} days old; refresh from the store or a newer medium first"
    if origin is Origin.APPROVED and standing.trusted_time > approved:
        return "it was fetched too long ago to be activated without asking the store again"
    return ""
