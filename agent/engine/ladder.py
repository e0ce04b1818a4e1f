"""The variants of one version as a ladder: which one to load, when to try a better one again. Pure.

The rungs come ranked by profile and manifest. What was learned on this box moves them:

- An approximate variant (int8, int4, mixed) that is ranked above an exact one on the same kind of device stands below
  it until it was measured here as faster *and* in agreement: on CPUs without dot products it is often the slower one.
- A rung that failed keeps the failure's reason. It is tried again after a wait that doubles with each failure, so many
  times; what fails the same way each time is not, and a lost device's rungs wait for the device.
- A version that has nothing to serve tries its rungs again sooner than one that serves a fallback.

Leaves out: starting and measuring (``version.py``), and keeping what was learned (``book.py``).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Final

from agent.config import VariantsConfig
from agent.errors import (
    DeviceLostError,
    OutOfMemoryError,
    SandboxError,
    SelfTestError,
    UnloadableError,
    WorkerDiedError,
)
from agent.profile import APPROXIMATE


class Kind(StrEnum):
    """What a failure says about the next try."""

    PERMANENT = "permanent"  # the same on each try: it is not made
    CRASH = "crash"
    MEMORY = "memory"
    TEST = "test"
    DEVICE = "device"  # not before the device is back
    LOAD = "load"  # anything else: it may have been the moment


_KINDS: Final[Mapping[str, Kind]] = {
    UnloadableError.code: Kind.PERMANENT,
    SandboxError.code: Kind.PERMANENT,
    WorkerDiedError.code: Kind.CRASH,
    OutOfMemoryError.code: Kind.MEMORY,
    SelfTestError.code: Kind.TEST,
    DeviceLostError.code: Kind.DEVICE,
}
_RETRIED: Final = frozenset({Kind.CRASH, Kind.MEMORY, Kind.TEST, Kind.LOAD})
# What a restart of the daemon would only find out again, at the cost of requests or of a slow start.
_KEPT: Final = frozenset({Kind.PERMANENT, Kind.CRASH, Kind.MEMORY, Kind.TEST})


@dataclass(frozen=True, slots=True, kw_only=True)
class Rung:
    """One variant."""

    id: str
    device: str  # "cpu", "cuda"; "cuda:1" if it is pinned to that one
    precision: str

    @property
    def approximate(self) -> bool:
        """Whether it trades accuracy for speed or size."""
        return self.precision in APPROXIMATE


@dataclass(frozen=True, slots=True, kw_only=True)
class Fall:
    """Why a rung does not serve. ``times`` counts failures since it last served well."""

    kind: Kind
    code: str
    reason: str
    times: int = 1
    at: float = 0.0  # monotonic seconds
    remembered: bool = False  # from before the daemon's start: if nothing else loads, it is tried all the same

    @property
    def kept(self) -> bool:
        """Whether a restart of the daemon should remember it."""
        return self.kind in _KEPT and self.code != SandboxError.code  # that is the box's, whose policy may change


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """What a worker measured of its variant with the golden inputs."""

    p50_ms: float
    cosine: float  # of the worst output row with the recorded one
    top1: float | None = None  # share of rows whose best class is the recorded one; None: no output looks like classes


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """Whether an approximate variant is worth its errors here."""

    preferred: bool
    reason: str
    own: Measured
    rival: Measured
    rival_id: str
    wall_s: float = 0.0  # when, Unix seconds


class Purpose(StrEnum):
    """Why a rung is tried beside the one that serves."""

    RETRY = "retry"  # a better one that failed, or whose device is back
    COMPARE = "compare"  # an approximate one that may turn out to be better


@dataclass(frozen=True, slots=True, kw_only=True)
class Try:
    """The next thing to try, and when at the earliest (monotonic seconds)."""

    rung: Rung
    purpose: Purpose
    at: float


Falls = Mapping[str, Fall]
Verdicts = Mapping[str, Verdict]


def kind_of(code: str) -> Kind:
    """Return what an error's code says about the next try."""
    return _KINDS.get(code, Kind.LOAD)


def arrange(ranked: Sequence[Rung], verdicts: Verdicts) -> tuple[Rung, ...]:
    """Return the rungs best first: approximate ones that have not proven themselves below their exact rivals."""
    order = list(ranked)
    for rung in reversed(ranked):
        rivals = rivals_of(rung, ranked)
        if rivals and not (rung.id in verdicts and verdicts[rung.id].preferred):
            order.remove(rung)
            order.insert(max(order.index(rival) for rival in rivals) + 1, rung)
    return tuple(order)


def rivals_of(rung: Rung, ranked: Sequence[Rung]) -> tuple[Rung, ...]:
    """Return the exact rungs on the same kind of device that an approximate one is ranked above."""
    if not rung.approximate:
        return ()
    below = ranked[list(ranked).index(rung) + 1 :]
    return tuple(one for one in below if not one.approximate and _device_kind(one) == _device_kind(rung))


def fallen(before: Fall | None, code: str, reason: str, *, now: float) -> Fall:
    """Return the fall that follows another failure."""
    times = before.times + 1 if before is not None else 1
    return Fall(kind=kind_of(code), code=code, reason=reason, times=times, at=now)


def due_at(fall: Fall, config: VariantsConfig, *, serving: bool) -> float:
    """Return when a fallen rung may be tried again; infinity: never by itself."""
    if fall.kind not in _RETRIED or (serving and fall.times > config.retries_max):
        return math.inf
    first_s = config.retry_first_s if serving else config.restart_first_s
    return fall.at + min(config.retry_cap_s, first_s * 2.0 ** min(fall.times - 1, 32))


def descent(order: Sequence[Rung], falls: Falls, config: VariantsConfig, *, now: float) -> tuple[Rung, ...]:
    """Return the rungs to try when nothing serves, in this order.

    First those that nothing speaks against; then, because a box without a model is no safer place, those that are only
    remembered to have failed.
    """
    clear, last = [], []
    for rung in order:
        fall = falls.get(rung.id)
        if fall is None or (not fall.remembered and due_at(fall, config, serving=False) <= now):
            clear.append(rung)
        elif fall.remembered:
            last.append(rung)
    return (*clear, *last)


def below(order: Sequence[Rung], falls: Falls, config: VariantsConfig, *, current: str, now: float) -> Rung | None:
    """Return the next rung down from ``current`` that may be tried."""
    start = [rung.id for rung in order].index(current) + 1
    return next((one for one in order[start:] if _at(one, falls, config, serving=False, now=now) <= now), None)


def next_try(
    ranked: Sequence[Rung],
    falls: Falls,
    verdicts: Verdicts,
    config: VariantsConfig,
    *,
    current: str | None,
    now: float,
) -> Try | None:
    """Return what to try next, and when; ``None``: there is nothing better to be had.

    Args:
        ranked: By profile and manifest, before anything was measured.
        falls: What failed.
        verdicts: What was measured.
        config: The waits.
        current: The rung that serves; ``None``: nothing does.
        now: Monotonic seconds.
    """
    order = arrange(ranked, verdicts)
    better = order
    if current is not None:
        better = order[: [rung.id for rung in order].index(current)]
    tries = [
        Try(rung=rung, purpose=Purpose.RETRY, at=_at(rung, falls, config, serving=current is not None, now=now))
        for rung in better
    ]
    tries += [
        Try(rung=rung, purpose=Purpose.COMPARE, at=_at(rung, falls, config, serving=True, now=now))
        for rung in (ranked if config.measure_ms else ())
        if rung.id not in verdicts and current in [rival.id for rival in rivals_of(rung, ranked)]
    ]
    possible = [one for one in tries if one.at < math.inf]
    return min(possible, key=lambda one: one.at, default=None)


def judge(own: Measured, rival: Measured, rival_id: str, config: VariantsConfig, *, wall_s: float = 0.0) -> Verdict:
    """Return whether an approximate variant beats its exact rival: faster by the margin, and in agreement."""
    ratio = rival.p50_ms / own.p50_ms if own.p50_ms > 0 else 0.0
    figures = f"{own.p50_ms:.3g} ms against {rival.p50_ms:.3g} ms of {rival_id}"
    verdict = Verdict(preferred=False, reason="", own=own, rival=rival, rival_id=rival_id, wall_s=wall_s)
    if not own.cosine >= config.agreement_min:  # NaN agrees with nothing
        return replace(verdict, reason=f"disagrees: cosine {own.cosine:.4f}, required is {config.agreement_min:g}")
    if own.top1 is not None and rival.top1 is not None and own.top1 < rival.top1 * config.agreement_min:
        return replace(verdict, reason=f"disagrees: best class right in {own.top1:.1%}, {rival_id} in {rival.top1:.1%}")
    if not ratio >= config.speedup_min:
        return replace(verdict, reason=f"not faster here: {figures}, required is {config.speedup_min:g} times as fast")
    return replace(verdict, preferred=True, reason=f"faster and agrees here: {figures}, cosine {own.cosine:.4f}")


def _at(rung: Rung, falls: Falls, config: VariantsConfig, *, serving: bool, now: float) -> float:
    fall = falls.get(rung.id)
    return now if fall is None else due_at(fall, config, serving=serving)


def _device_kind(rung: Rung) -> str:
    return rung.device.partition(":")[0]
