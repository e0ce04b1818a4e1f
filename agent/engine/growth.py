"""When a pool gets another worker and when it gives one back: pure arithmetic over what a sweep sees.

A pool grows when requests have queued for longer than ``grow_delay_s`` at every look of a quarter second, and not
because many arrived: a batching worker takes everything that waits. It shrinks when for ``shrink_idle_s`` nothing
queued and every look found one worker idle, or found that one fewer would have had time to spare for all the work of
the last seconds. If the worker that went is missed soon, the next one stays longer: a load between two sizes does not
make the pool swing.
Leaves out: starting and ending workers, and whether memory allows another (``memory.py``).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Final

_HOLD_S: Final = 0.25  # a queue that a burst leaves and the next batch takes is none
_GAP_S: Final = 1.0  # without a look for so long nothing was asked: what was seen before is over
_SMOOTH_S: Final = 3.0  # time constant of the average of busy workers
_SPARE: Final = 0.6  # of the remaining workers' time: more, and their queue would soon be as long as before
_PATIENCE_MAX: Final = 16


class Move(StrEnum):
    """What to do with a pool's size."""

    GROW = "grow"
    SHRINK = "shrink"
    STAY = "stay"


@dataclass(frozen=True, slots=True, kw_only=True)
class Bounds:
    """Between what a pool may change its size, and how readily."""

    least: int = 1
    most: int = 1
    grow_delay_s: float = 0.1  # queued for so long: one more
    shrink_idle_s: float = 60.0  # not needed for so long: one fewer


@dataclass(frozen=True, slots=True, kw_only=True)
class Seen:
    """One look at a pool."""

    now: float  # monotonic seconds, as all times here
    ready: int  # workers that serve
    wanted: int  # workers that should: those that start or restart included
    busy: int  # workers that owe an answer
    delay_s: float  # how long a request that was handed out since the last growth has queued
    held: bool = False  # a growth has failed, and it is too early to try again


@dataclass(frozen=True, slots=True, kw_only=True)
class Trend:
    """What earlier looks have shown."""

    seen_at: float = -math.inf
    load: float = 0.0  # busy workers, averaged
    pressed_since: float | None = None  # every look since then saw the queue too long
    spare_since: float | None = None  # every look since then saw one worker too many
    shrunk_at: float = -math.inf
    patience: int = 1  # times ``shrink_idle_s`` before the next shrinking


def step(trend: Trend, seen: Seen, bounds: Bounds) -> tuple[Trend, Move]:
    """Return the trend after one more look, and what follows from it."""
    trend = _after(trend, seen, bounds)
    settled = seen.ready == seen.wanted  # nobody is on the way in
    may_grow = settled and not seen.held and seen.wanted < bounds.most
    if may_grow and _for_s(trend.pressed_since, seen.now) >= _HOLD_S:
        missed = seen.now - trend.shrunk_at < bounds.shrink_idle_s * trend.patience
        patience = min(2 * trend.patience, _PATIENCE_MAX) if missed else 1
        return replace(trend, pressed_since=None, spare_since=None, patience=patience), Move.GROW
    idle_s = bounds.shrink_idle_s * trend.patience
    lazy = seen.busy < seen.ready  # there is one that can go at once
    if settled and lazy and seen.wanted > bounds.least and _for_s(trend.spare_since, seen.now) >= idle_s:
        return replace(trend, spare_since=None, shrunk_at=seen.now), Move.SHRINK
    return trend, Move.STAY


def _after(trend: Trend, seen: Seen, bounds: Bounds) -> Trend:
    elapsed = seen.now - trend.seen_at
    if elapsed > _GAP_S:
        trend = replace(trend, load=0.0, pressed_since=None, spare_since=None)
    weight = 1.0 - math.exp(-min(elapsed, _GAP_S) / _SMOOTH_S)
    load = trend.load + weight * (seen.busy - trend.load)
    pressed = seen.delay_s >= bounds.grow_delay_s
    idle = seen.busy < seen.ready or load < _SPARE * (seen.ready - 1)
    spare = idle and not pressed and seen.ready > bounds.least
    return replace(
        trend,
        seen_at=seen.now,
        load=load,
        pressed_since=_since(trend.pressed_since, pressed, seen.now),
        spare_since=_since(trend.spare_since, spare, seen.now),
    )


def _since(before: float | None, holds: bool, now: float) -> float | None:
    return (now if before is None else before) if holds else None


def _for_s(since: float | None, now: float) -> float:
    return now - since if since is not None else -math.inf
