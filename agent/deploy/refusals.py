"""Tell of every refused bundle and store by a ``security`` event.

Whoever refuses goes on as if nothing had been offered; this only makes it heard. A deployment's refusal is always told.
A store that stays bad is asked again and again by polls: the same refusal of those is repeated at most once an hour,
with how often it came up.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

from agent.clock import Clock
from agent.errors import AgentError, BundleError, NoVariantError, PolicyError, TargetNotFoundError
from agent.events import EventBus, Severity, Stream

REPEAT_S: Final = 3600.0
_KNOWN_MAX: Final = 256
# Refused, but as likely a slip of a person as an attack.
_MILD: Final = (NoVariantError, PolicyError, TargetNotFoundError)


@dataclass(slots=True)
class _Told:
    at: float | None = None
    unsaid: int = 0


class Refusals:
    """Reports what was refused."""

    def __init__(self, events: EventBus, clock: Clock) -> None:
        self._events = events
        self._clock = clock
        self._told: dict[tuple[str, ...], _Told] = {}

    def bundle(
        self, error: BundleError, *, team: str, name: str, version: str, source: str = "", polled: bool = False
    ) -> None:
        """Report a bundle, or the metadata that speaks of it. What is not known is an empty text."""
        severity = Severity.WARNING if isinstance(error, _MILD) else Severity.ERROR
        about = {"source": source, "team": team, "name": name, "version": version}
        self._tell("bundle.refused", severity, error, about, always=not polled)

    def source(self, error: AgentError, *, source: str, team: str = "", name: str = "", version: str = "") -> None:
        """Report one of several sources that was refused, whatever the others gave."""
        about = {"source": source, "team": team, "name": name, "version": version}
        self._tell("source.refused", Severity.ERROR, error, about, always=False)

    def _tell(self, kind: str, severity: Severity, error: AgentError, about: dict[str, str], *, always: bool) -> None:
        now, key = self._clock.monotonic(), (kind, error.code, *about.values())
        told = self._told.pop(key, None) or _Told()
        if not always and told.at is not None and now - told.at < REPEAT_S:
            told.unsaid += 1
            self._told[key] = told
            return
        data: dict[str, Any] = {field: value for field, value in about.items() if value}
        if told.unsaid:
            data["repeated"] = told.unsaid
        self._told[key] = _Told(now)
        while len(self._told) > _KNOWN_MAX:
            self._told.pop(next(iter(self._told)))
        self._events.emit(Stream.SECURITY, kind, severity, code=error.code, message=str(error), **data)
