"""What is wanted of a slot and does not serve, because its deployment did not end well. Pure.

A wish outlives its deployment: a pin whose version failed stays in force, and nothing is tried again by itself. Whoever
looks at the slot is told so, with the reason and what can be done. Leaves out: deployments that are under way.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from agent.deploy.desired import SUPERSEDED, Desired, may_pass, serves
from agent.deploy.pointer import Pointer
from agent.deploy.slots import version_beside
from agent.deploy.state import FINAL, Record, State
from agent.errors import CanaryUndecidedError, IncompatibleError, PolicyError, RefusedBeforeError

_UNDONE: Final = (State.ROLLED_BACK, State.INCONSISTENT)  # after which the version is refused without force


@dataclass(frozen=True, slots=True, kw_only=True)
class Unmet:
    """Why a wish is not met: how its deployment ended, and what to do about it."""

    deployment: str
    version: str  # that was tried; empty: the channel's, and it was not found out which that is
    state: str
    code: str
    message: str
    advice: str


def unmet(wish: Desired | None, pointer: Pointer | None, ended: Record | None) -> Unmet | None:
    """Return why what is wanted of a slot does not serve; ``None`` if it does, or may yet.

    Args:
        wish: The strongest one.
        pointer: What is active.
        ended: The slot's newest deployment, if it has ended.
    """
    if wish is None or ended is None or not serves(ended, wish):
        return None
    if ended.state not in FINAL - {State.CONFIRMED, State.SUPERSEDED} or ended.code == SUPERSEDED:
        return None  # overtaken ones begin anew
    version = ended.version or wish.version
    if pointer is not None and not pointer.trial and pointer.active.version == version:
        return None
    return Unmet(
        deployment=ended.id,
        version=version,
        state=str(ended.state),
        code=ended.code,
        message=ended.message,
        advice=_advice(wish, ended, version, something_serves=pointer is not None),
    )


def _advice(wish: Desired, ended: Record, version: str, *, something_serves: bool) -> str:
    beside = bool(version_beside(wish.slot))
    ways = [_way_back(wish, beside=beside, something_serves=something_serves)]
    if may_pass(ended, wish):
        ways.append("it is tried again by itself")
    elif ended.code != PolicyError.code:  # which another try would meet again
        named = f"{wish.model}@{version}" if version else wish.model
        ways.append(f"inferctl deploy {named}{' --beside' * beside}{_option(ended)} tries it again")
    if not beside:
        ways.append(f"inferctl deploy {wish.model}@VERSION takes another")
    return "; ".join(filter(None, ways))


def _way_back(wish: Desired, *, beside: bool, something_serves: bool) -> str:
    """Return how the box gets rid of the wish, as far as that is for the box to say."""
    if wish.source == "file" and beside:
        return "the configuration names it: beside in [[models]]"
    if beside:
        return f"inferctl remove {wish.slot} forgets it"
    if wish.source == "pin":
        return f"inferctl unpin {wish.slot} gives it back to the fleet and the configuration"
    return f"inferctl pin {wish.slot} keeps what serves" if something_serves else ""


def _option(ended: Record) -> str:
    if ended.code == IncompatibleError.code:
        return " --allow-incompatible"
    undone = ended.state in _UNDONE and ended.code != CanaryUndecidedError.code
    return " --force" if undone or ended.code == RefusedBeforeError.code else ""
