"""What a revoked version means for the slot that serves it. Pure.

A version is revoked by its team's signed index; once known, that is never forgotten. A revoked version is never loaded
again, by no deployment, rollback or boot, unless the box's policy only warns.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass
from enum import StrEnum
from typing import Literal

from agent.deploy.pointer import Pointer
from agent.deploy.ports import Kept
from agent.deploy.slots import version_beside

OnRevoked = Literal["fallback", "stop", "warn"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Revoked:
    """A revoked version."""

    team: str
    name: str
    version: str
    digest: str
    reason: str = ""


class Measure(StrEnum):
    """What to do about the version that a slot serves."""

    NONE = "none"
    WARN = "warn"  # it serves on
    FALL_BACK = "fall_back"  # to another version on this box
    STOP = "stop"


def decide(
    pointer: Pointer,
    *,
    revoked: Collection[str],
    kept: Iterable[Kept],
    served: Collection[str],
    served_before: Collection[str] = (),
    policy: OnRevoked,
) -> tuple[Measure, Kept | None]:
    """Return what to do, and the version to fall back to.

    Args:
        pointer: What the slot serves.
        revoked: Digests.
        kept: The versions on disk.
        served: The model's digests that earned trust here: only to those a box returns without asking anybody.
        served_before: Those that earned it with a former device: better than nothing, for want of the others.
        policy: The box's.
    """
    if pointer.active.digest not in revoked:
        return Measure.NONE, None
    if policy != "fallback" or version_beside(pointer.slot):  # a version beside the default has no other to give
        return (Measure.WARN if policy == "warn" else Measure.STOP), None
    model = (pointer.active.team, pointer.active.name)
    bad = {digest[:12] for digest in revoked}
    good = {digest[:12] for digest in served}
    if pointer.previous is not None:
        good.add(pointer.previous.digest[:12])
    fair = good | {digest[:12] for digest in served_before}
    fit = [item for item in kept if (item.team, item.name) == model and item.digest in fair - bad]
    newest = max(fit, key=lambda item: (item.digest in good, item.seq), default=None)
    return (Measure.FALL_BACK if newest is not None else Measure.STOP), newest


def revoked_text(version: str, reason: str) -> str:
    """Return what people are told of a version that may not be loaded."""
    return f"version {version} was revoked: {reason}"
