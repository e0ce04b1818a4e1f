"""Load and its figures: closed loops (ask again when answered), open loops (ask at a fixed rate), medians of repeats.

In an open loop latency counts from when a request was due, not from when the generator got to it, so that a server
that stalls cannot hide it.
"""

from __future__ import annotations

import asyncio
import statistics
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from agent.errors import AgentError, OverloadedError
from tools.bench_ways import Ask, AskLater, Way

QUANTILES: Final = (0, 1, 5, 10, 25, 50, 75, 90, 95, 99, 99.9, 100)  # in percent
_WARM_UP: Final = 20  # requests before the clock starts, at most
_WARM_UP_S: Final = 0.25  # the same, in time
_OUTSTANDING_MAX: Final = 10_000  # of an open loop; beyond it the generator gives up


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One run of one way."""

    answers: int  # that are counted: results, after the warm-up
    wall_s: float
    asked: int  # everything, with warm-up and errors: what CPU time is divided by
    errors: Counter[str]  # by code
    quantiles_us: Mapping[str, float]  # latency, by percent as text
    client_cpu_s: float  # of the process that asked
    rows: int = 1  # of each answer
    refused_us: Mapping[str, float] = field(default_factory=dict)  # latency of what was refused at once, by percent

    @property
    def rate_s(self) -> float:
        """Rows answered a second."""
        return self.answers * self.rows / self.wall_s if self.wall_s else 0.0


@dataclass(kw_only=True)
class Tally:
    """What a run counts as it goes. Latencies in seconds, of counted answers."""

    latencies: list[float] = field(default_factory=list)
    errors: Counter[str] = field(default_factory=Counter)
    refusals: list[float] = field(default_factory=list)  # latencies of ``overloaded``
    warmed_up: int = 0
    rows: int = 1
    cpu_began_s: float = field(default_factory=time.process_time)

    def sample(self, wall_s: float) -> Sample:
        """Return the finished run's figures."""
        count = len(self.latencies)
        return Sample(
            answers=count,
            wall_s=wall_s,
            asked=self.warmed_up + count + self.errors.total(),
            errors=self.errors,
            quantiles_us=quantiles_us(self.latencies),
            client_cpu_s=time.process_time() - self.cpu_began_s,
            rows=self.rows,
            refused_us=quantiles_us(self.refusals),
        )


def quantiles_us(latencies: Sequence[float]) -> dict[str, float]:
    """Return ``QUANTILES`` of latencies in seconds, as microseconds; nothing of none."""
    ordered = sorted(latencies)
    if not ordered:
        return {}
    return {f"{q:g}": ordered[min(len(ordered) - 1, int(q / 100 * len(ordered)))] * 1e6 for q in QUANTILES}


def medians(samples: Sequence[Sample]) -> dict[str, Any]:
    """Return each figure's median over repetitions; errors are summed."""
    quantiles = {
        name: statistics.median(sample.quantiles_us[name] for sample in samples if sample.quantiles_us)
        for name in (f"{q:g}" for q in QUANTILES)
        if any(sample.quantiles_us for sample in samples)
    }
    return {
        "p50_us": quantiles.get("50", 0.0),
        "p99_us": quantiles.get("99", 0.0),
        "rate_s": statistics.median(sample.rate_s for sample in samples),
        "errors": dict(sum((sample.errors for sample in samples), Counter())),
        "quantiles_us": quantiles,
    }


def closed_blocking(way: Any, *, seconds: float, rows: int = 1) -> Sample:
    """Ask one after the other, for ``rows`` each."""
    tally = Tally(rows=rows)
    with way.blocking() as ask:
        began = time.perf_counter()
        while tally.warmed_up < _WARM_UP and time.perf_counter() - began < _WARM_UP_S:
            _try(ask, Tally())
            tally.warmed_up += 1
        started = time.perf_counter()
        now = started
        while now - started < seconds:
            before = time.perf_counter()
            answered = _try(ask, tally)
            now = time.perf_counter()
            if answered:
                tally.latencies.append(now - before)
    return tally.sample(now - started)


async def closed_concurrent(way: Way, *, callers: int, connections: int, seconds: float) -> Sample:
    """``callers`` tasks that each ask one after the other."""
    tally, warm_up = Tally(), Tally()
    async with way.concurrent(connections) as ask:
        await _caller(ask, warm_up, time.perf_counter() + 0.05)
        tally.warmed_up = len(warm_up.latencies) + warm_up.errors.total()
        started = time.perf_counter()
        async with asyncio.TaskGroup() as group:
            for _ in range(callers):
                group.create_task(_caller(ask, tally, started + seconds))
        wall_s = time.perf_counter() - started
    return tally.sample(wall_s)


async def open_loop(way: Way, *, rate_s: float, connections: int, seconds: float) -> Sample:
    """Ask ``rate_s`` times a second, whatever comes back."""
    tally, outstanding = Tally(), 0

    async def one(ask: AskLater, due: float) -> None:
        nonlocal outstanding
        since = min(due, time.perf_counter())  # a timer may be early
        try:
            await ask()
            tally.latencies.append(time.perf_counter() - since)
        except (AgentError, OSError) as error:
            tally.errors[getattr(error, "code", type(error).__name__)] += 1
            if isinstance(error, OverloadedError):
                tally.refusals.append(time.perf_counter() - since)
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
                    tally.errors["generator_full"] += 1
                    continue
                outstanding += 1
                group.create_task(one(ask, due))
                if number % 64 == 0:
                    await asyncio.sleep(0)  # behind schedule there is no other pause to read answers in
        wall_s = time.perf_counter() - started
    return tally.sample(wall_s)


def interleaved(
    runs: Mapping[str, Callable[[], Sample]],
    *,
    repetitions: int,
    on_run: Callable[[str, Callable[[], Sample]], Sample | None],
) -> dict[str, list[Sample]]:
    """Run each in turn, ``repetitions`` times over, each time beginning with another: drift hits all alike.

    ``on_run`` is given the name and the run, and does it; it may leave one out.
    """
    names = list(runs)
    samples: dict[str, list[Sample]] = {name: [] for name in names}
    for number in range(repetitions):
        shift = number % len(names)
        for name in names[shift:] + names[:shift]:
            sample = on_run(name, runs[name])
            if sample is not None:
                samples[name].append(sample)
    return samples


def _try(ask: Ask, tally: Tally) -> bool:
    try:
        ask()
    except AgentError as error:
        tally.errors[error.code] += 1
        return False
    return True


async def _caller(ask: AskLater, tally: Tally, end: float) -> None:
    while (before := time.perf_counter()) < end:
        try:
            await ask()
        except AgentError as error:
            tally.errors[error.code] += 1
        else:
            tally.latencies.append(time.perf_counter() - before)
