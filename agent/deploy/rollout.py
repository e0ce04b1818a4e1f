"""How a new version meets its first requests: shares of them, copies of them, and what it must show. Pure.

A wish may say it, the publisher's manifest, and the box's configuration, in this order; what nobody says is not done.
The gates that a version must pass are the box's; a wish or a manifest can only ask for more agreement.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, Final

from agent.config import DeployConfig, canary_fault
from agent.errors import InvalidInputError

_SPAN_S_MAX: Final = 30 * 86_400


@dataclass(frozen=True, slots=True, kw_only=True)
class Rollout:
    """What somebody asks for; ``None``: not said.

    Raises:
        InvalidInputError: a value out of its range.
    """

    canary: tuple[float, ...] | None = None  # percent of the routing keys, growing; empty: all at once
    shadow: float | None = None  # percent of the requests that are copied to the candidate, compared and dropped
    step_s: float | None = None  # each share is held at least so long
    calls_min: int | None = None  # and until the candidate has given so many good answers
    limit_s: float | None = None  # without them by then it is rolled back
    agreement_min: float | None = None  # of the copies, 0..1

    def __post_init__(self) -> None:
        if self.canary is not None and (reason := canary_fault(self.canary)):
            raise InvalidInputError(f"canary: {reason}")
        _within("shadow", self.shadow, 0, 100)
        _within("step_s", self.step_s, 0, _SPAN_S_MAX)
        _within("calls_min", self.calls_min, 0, 1_000_000)
        _within("limit_s", self.limit_s, 0, _SPAN_S_MAX)
        _within("agreement_min", self.agreement_min, 0, 1)

    def plain(self) -> dict[str, Any]:
        """Return what is said, JSON-able."""
        return {
            field.name: list(value) if isinstance(value, tuple) else value
            for field in fields(self)
            if (value := getattr(self, field.name)) is not None
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Course:
    """What is done with one deployment."""

    shares: tuple[float, ...] = ()  # percent, one after the other; 0: copies only. Empty: everything at once
    shadow: float = 0.0
    step_s: float = 0.0
    calls_min: int = 0
    limit_s: float = 0.0
    agreement_min: float = 0.0


def course_of(wish: Rollout | None, manifest: Rollout | None, config: DeployConfig) -> Course:
    """Return what is done: of the wish what it says, then of the manifest, then of the configuration."""
    own = Rollout(
        canary=config.canary,
        shadow=config.shadow_percent,
        step_s=config.canary_s,
        calls_min=config.canary_calls_min,
        limit_s=config.canary_limit_s,
    )
    said = [wish or Rollout(), manifest or Rollout(), own]

    def first(name: str) -> Any:
        return next(value for one in said if (value := getattr(one, name)) is not None)

    shadow = float(first("shadow"))
    step_s = float(first("step_s"))
    return Course(
        shares=((0.0,) if shadow else ()) + tuple(first("canary")),
        shadow=shadow,
        step_s=step_s,
        calls_min=int(first("calls_min")),
        limit_s=max(step_s, float(first("limit_s"))),
        agreement_min=max(config.agreement_min, *(one.agreement_min or 0.0 for one in said)),
    )


def rollout_of(value: object) -> Rollout | None:
    """Return what a command or a caller asks for: a map of the fields of ``Rollout``; ``None`` if nothing.

    Raises:
        InvalidInputError: an unknown field, or a value of the wrong type or out of its range.
    """
    if value is None:
        return None
    known = {field.name for field in fields(Rollout)}
    if not isinstance(value, dict) or not value.keys() <= known:
        raise InvalidInputError(f"'rollout' must be a map; it may hold {', '.join(sorted(known))}")
    if not value:
        return None
    shares = value.get("canary")
    if shares is not None:
        if not isinstance(shares, list | tuple) or not all(map(_is_number, shares)):
            raise InvalidInputError("canary: a list of percentages")
        value = {**value, "canary": tuple(map(float, shares))}
    for name in known - {"canary"}:
        number = value.get(name)
        if number is not None and (not _is_number(number) or (name == "calls_min" and not isinstance(number, int))):
            raise InvalidInputError(f"{name}: a {'whole ' if name == 'calls_min' else ''}number")
    return Rollout(**value)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _within(name: str, value: float | None, low: float, high: float) -> None:
    if value is not None and not low <= value <= high:
        raise InvalidInputError(f"{name}: {low:g}..{high:g}, got {value:g}")
