"""Whether a deployment may go on now: windows, applications' holds, the box's one trial. Pure.

There are two gates, one before bytes are fetched and one before anything is loaded. Times of the day count only while
the clock can be right; how long has been waited is counted in the box's own running time, so a wrong clock or a box
that is switched off at night neither opens a gate nor forgets the wait.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import date, datetime, time, timedelta
from typing import Final

from agent.config import DAYS, DeployConfig, WindowConfig, zone_of
from agent.deploy.desired import REVOCATION
from agent.deploy.state import Record

_DAYS_AHEAD: Final = 8  # a window comes at least once a week
_LOOK_S: Final = 30.0  # the wall clock may be set while we wait


@dataclass(frozen=True, slots=True, kw_only=True)
class Situation:
    """What the box knows at this moment."""

    wall_s: float  # Unix seconds, as the system believes them
    clock_trusted: bool
    serves: bool  # some version of the model serves now
    replaces: bool  # the slot has a confirmed version that it would return to
    held_by: str = ""  # the application that asked for no change now, as people are told; empty: none did
    medium: bool = False  # the bytes can be taken from a medium, which costs no link
    on_trial: str = ""  # another slot whose new version is on trial; empty: none is


@dataclass(frozen=True, slots=True, kw_only=True)
class Gate:
    """Open, or why not and when to look again (seconds)."""

    reason: str = ""  # empty: open
    look_s: float = 0.0

    @property
    def open(self) -> bool:
        return not self.reason


Judge = Callable[[Record, Situation, DeployConfig], Gate]
_OPEN: Final = Gate()


def before_fetch(record: Record, now: Situation, config: DeployConfig) -> Gate:
    """Return whether ``record`` may fetch bytes; ``record.waited_s`` is up to date."""
    if record.local or record.medium or now.medium or _exempt(record, now, config):
        return _OPEN
    return _limited(_window(config.fetch_windows, now, "fetching"), record, config)


def before_load(record: Record, now: Situation, config: DeployConfig) -> Gate:
    """Return whether ``record`` may load its version; ``record.waited_s`` is up to date."""
    if record.local or record.source == REVOCATION:
        return _OPEN
    if record.plan.not_after is not None and not now.clock_trusted:
        return Gate(reason="the clock cannot be right, so whether it is too late cannot be told", look_s=_LOOK_S)
    if not _exempt(record, now, config):
        gate = _window(config.windows, now, "maintenance")
        if gate.open and now.held_by:
            gate = Gate(reason=f"held by {now.held_by}", look_s=_LOOK_S)
        if not gate.open:
            return _limited(gate, record, config)
    if now.replaces and now.on_trial:
        return Gate(reason=f"{now.on_trial} is on trial, and only one model is at a time", look_s=_LOOK_S)
    return _OPEN


def is_open(window: WindowConfig, wall_s: float) -> bool:
    """Return whether the window is open at a moment (Unix seconds)."""
    return any(start <= wall_s < end for start, end in _spans(window, wall_s))


def opens_in(windows: Sequence[WindowConfig], wall_s: float) -> float:
    """Return the seconds until the first of them opens, 0 if one is open."""
    starts = [start for window in windows for start, end in _spans(window, wall_s) if end > wall_s]
    return max(0.0, min(starts) - wall_s)


def force_after_s(record: Record, config: DeployConfig) -> float | None:
    """Return after how much waiting windows and holds do not count any more; ``None``: they always do."""
    if record.plan.force_after_s is not None:
        return record.plan.force_after_s
    return config.force_after_s or None


def _exempt(record: Record, now: Situation, config: DeployConfig) -> bool:
    """Whether windows and holds do not count."""
    if record.source == REVOCATION or record.plan.ignore_window or not (now.serves or config.first_waits):
        return True
    limit_s = force_after_s(record, config)
    return limit_s is not None and record.waited_s >= limit_s


def _window(windows: Sequence[WindowConfig], now: Situation, what: str) -> Gate:
    if not windows:
        return _OPEN
    if not now.clock_trusted:
        return Gate(reason=f"the clock cannot be right, so no {what} window counts as open", look_s=_LOOK_S)
    if any(is_open(window, now.wall_s) for window in windows):
        return _OPEN
    left_s = opens_in(windows, now.wall_s)
    when = _shown(windows, now.wall_s, now.wall_s + left_s)
    return Gate(reason=f"the next {what} window opens {when}", look_s=min(left_s, _LOOK_S))


def _limited(gate: Gate, record: Record, config: DeployConfig) -> Gate:
    """Say of a closed gate what opens it at the latest, and look again no later than that."""
    limit_s = force_after_s(record, config)
    if gate.open or limit_s is None:
        return gate
    left_s = limit_s - record.waited_s
    return Gate(reason=f"{gate.reason}; forced after {limit_s:g} s of waiting", look_s=min(gate.look_s, left_s))


def _spans(window: WindowConfig, wall_s: float) -> list[tuple[float, float]]:
    """Return start and end (Unix seconds) of the window's occurrences from the day before until a week ahead.

    A time that the clocks skip counts as an hour later, one that comes twice as the first of both.
    """
    zone = zone_of(window.timezone)
    today = datetime.fromtimestamp(wall_s, zone).date()
    start, end = time.fromisoformat(window.start), time.fromisoformat(window.end)
    found = []
    for offset in range(-1, _DAYS_AHEAD):
        day = today + timedelta(days=offset)
        if DAYS[day.weekday()] in window.days:
            last = day + timedelta(days=end <= start)
            found.append((_moment(day, start, window), _moment(last, end, window)))
    return found


def _moment(day: date, at: time, window: WindowConfig) -> float:
    return datetime.combine(day, at, zone_of(window.timezone)).timestamp()


def _shown(windows: Sequence[WindowConfig], wall_s: float, moment_s: float) -> str:
    """Return a moment by the clock of the window that begins then."""
    window = next(item for item in windows if any(start == moment_s for start, _ in _spans(item, wall_s)))
    return datetime.fromtimestamp(moment_s, zone_of(window.timezone)).strftime("%a %Y-%m-%d %H:%M %Z").strip()
