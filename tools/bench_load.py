"""Load and its figures: closed loops (ask again when answered), open loops (ask at a fixed rate), medians of repeats.

In an open loop latency counts from when a request was due, not from when the generator got to it, so that a server
that stalls cannot hide it.
"""

from __future__ import annotations

import asyncio
import statistics
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from agent.errors import AgentError
from tools.bench_ways import Ask, AskLater, Way

_WARM_UP: Final = 20  # requests before the clock starts
_OUTSTANDING_MAX: Final = 10_000  # of an open loop; beyond it the generator gives up


@dataclass(kw_only=True)
class Sample:
    """One run of one way. Latencies in seconds, of answered requests only."""

    latencies: list[float] = field(default_factory=list)
    wall_s: float = 0.0
    errors: Counter[str] = field(default_factory=Counter)  # by code

    def figures(self) -> dict[str, float]:
        """Return p50_us, p99_us, rate_s and errors."""
        ordered = sorted(self.latencies)
        return {
            "p50_us": quantile(ordered, 0.50) * 1e6,
            "p99_us": quantile(ordered, 0.99) * 1e6,
            "rate_s": len(ordered) / self.wall_s if self.wall_s else 0.0,
            "errors": float(self.errors.total()),
        }


def quantile(ordered: Sequence[float], q: float) -> float:
    """Return quantile ``q`` (0..1) of sorted values; 0.0 of none."""
    return ordered[min(len(ordered) - 1, int(q * len(ordered)))] if ordered else 0.0


def medians(samples: Sequence[Sample]) -> dict[str, float]:
    """Return each figure's median over repetitions; errors are summed."""
    rows = [sample.figures() for sample in samples]
    merged = {name: statistics.median(row[name] for row in rows) for name in ("p50_us", "p99_us", "rate_s")}
    return {**merged, "errors": sum(row["errors"] for row in rows)}


def closed_blocking(way: Any, *, seconds: float) -> Sample:
    """Ask one after the other."""
    sample = Sample()
    with way.blocking() as ask:
        for _ in range(_WARM_UP):
            _try(ask, Sample())
        started = time.perf_counter()
        now = started
        while now - started < seconds:
            before = time.perf_counter()
            answered = _try(ask, sample)
            now = time.perf_counter()
            if answered:
                sample.latencies.append(now - before)
        sample.wall_s = now - started
    return sample


async def closed_concurrent(way: Way, *, callers: int, connections: int, seconds: float) -> Sample:
    """``callers`` tasks that each ask one after the other."""
    sample = Sample()
    async with way.concurrent(connections) as ask:
        await _caller(ask, Sample(), time.perf_counter() + 0.05)
        started = time.perf_counter()
        async with asyncio.TaskGroup() as group:
            for _ in range(callers):
                group.create_task(_caller(ask, sample, started + seconds))
        sample.wall_s = time.perf_counter() - started
    return sample


async def open_loop(way: Way, *, rate_s: float, connections: int, seconds: float) -> Sample:
    """Ask ``rate_s`` times a second, whatever comes back."""
    sample, outstanding = Sample(), 0

    async def one(ask: AskLater, due: float) -> None:
        nonlocal outstanding
        try:
            await ask()
            sample.latencies.append(time.perf_counter() - due)
        except (AgentError, OSError) as error:
            sample.errors[getattr(error, "code", type(error).__name__)] += 1
        finally:
            outstanding -= 1

    async with way.concurrent(connections) as ask:
        await ask()
        started = time.perf_counter()
        async with asyncio.TaskGroup() as group:
            for number in range(max(1, int(rate_s * seconds))):
                due = started + number / rate_s
                if (ahead := due - time.perf_counter()) > 0:
                    await asyncio.sleep(ahead)
                if outstanding >= _OUTSTANDING_MAX:
                    sample.errors["generator_full"] += 1
                    continue
                outstanding += 1
                group.create_task(one(ask, due))
                if number % 64 == 0:
                    await asyncio.sleep(0)  # behind schedule there is no other pause to read answers in
        sample.wall_s = time.perf_counter() - started
    return sample


def interleaved(
    runs: dict[str, Callable[[], Sample]], *, repetitions: int, on_step: Callable[[], None]
) -> dict[str, list[Sample]]:
    """Run each in turn, ``repetitions`` times over, each time beginning with another: drift hits all alike."""
    names = list(runs)
    samples: dict[str, list[Sample]] = {name: [] for name in names}
    for number in range(repetitions):
        shift = number % len(names)
        for name in names[shift:] + names[:shift]:
            samples[name].append(runs[name]())
            on_step()
    return samples


def _try(ask: Ask, sample: Sample) -> bool:
    try:
        ask()
    except AgentError as error:
        sample.errors[error.code] += 1
        return False
    return True


async def _caller(ask: AskLater, sample: Sample, end: float) -> None:
    while (before := time.perf_counter()) < end:
        try:
            await ask()
        except AgentError as error:
            sample.errors[error.code] += 1
        else:
            sample.latencies.append(time.perf_counter() - before)
