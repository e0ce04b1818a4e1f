"""Twice as many requests as a model can answer: what becomes of those that are let in, and of the others.

An open loop offers twice the measured capacity of a model that cannot be batched. With a queue of ``Q`` requests and a
service time of ``S``, what is accepted should be answered within ``2 x Q x S``, and the rest be refused at once.
"""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from typing import Any

import numpy as np
import uvloop
from rich.progress import Progress

from tools.bench_load import Sample, closed_concurrent, open_loop
from tools.bench_ways import Unix, Work
from tools.rig import models
from tools.rig.box import Rig

_CALLERS = 4  # enough that the worker never waits, too few to fill the queue


@dataclass(frozen=True, kw_only=True)
class Round:
    """One measurement of the capacity, and the overload after it."""

    capacity_s: float
    overload: Sample


def overload(
    rig: Rig, progress: Progress, *, seconds: float, repetitions: int, queue_requests_max: int
) -> dict[str, Any]:
    """Measure and return the figures of ``summary``."""
    model = models.heavy()
    rig.publish_model(model)
    rig.configure(model.name, state="state-overload", more=f"[engine]\nqueue_requests_max = {queue_requests_max}")
    rig.start_serving()
    example = model.example(np.random.default_rng(1))
    way = Unix(rig.socket, Work(model=model.name, inputs={model.takes.name: example}))
    bar = progress.add_task("overload", total=repetitions)
    rounds = []
    try:
        for _ in range(repetitions):
            full = uvloop.run(closed_concurrent(way, callers=_CALLERS, connections=1, seconds=seconds / 2))
            offered = uvloop.run(open_loop(way, rate_s=2 * full.rate_s, connections=1, seconds=seconds))
            rounds.append(Round(capacity_s=full.rate_s, overload=offered))
            progress.advance(bar)
    finally:
        rig.stop_daemon()
        progress.remove_task(bar)
    return summary(rounds, queue_requests_max=queue_requests_max)


def summary(rounds: list[Round], *, queue_requests_max: int) -> dict[str, Any]:
    """Return medians over the rounds; times in milliseconds."""
    capacity_s = statistics.median(one.capacity_s for one in rounds)
    service_ms = 1000 / capacity_s
    samples = [one.overload for one in rounds]
    refused = sum(sample.errors["overloaded"] for sample in samples)
    others = {
        code: sum(sample.errors[code] for sample in samples)
        for code in sorted({code for sample in samples for code in sample.errors} - {"overloaded"})
    }
    asked = sum(sample.answers + sample.errors.total() for sample in samples)
    accepted_ms = _median_ms([sample.quantiles_us.get("99", 0.0) for sample in samples if sample.answers])
    bound_ms = 2 * queue_requests_max * service_ms
    return {
        "capacity, requests/s": capacity_s,
        "service time, ms": service_ms,
        "queue limit, requests": queue_requests_max,
        "offered, requests/s": 2 * capacity_s,
        "answered, requests/s": statistics.median(sample.rate_s for sample in samples),
        "accepted p50, ms": _median_ms([sample.quantiles_us.get("50", 0.0) for sample in samples if sample.answers]),
        "accepted p99, ms": accepted_ms,
        "bound, ms": bound_ms,
        "bound holds": accepted_ms is not None and accepted_ms <= bound_ms,
        "refused, share": refused / asked if asked else 0.0,
        "refused p50, ms": _median_ms([sample.refused_us["50"] for sample in samples if sample.refused_us]),
        "refused p99, ms": _median_ms([sample.refused_us["99"] for sample in samples if sample.refused_us]),
        "other errors": others,
    }


def _median_ms(values_us: list[float]) -> float | None:
    return statistics.median(values_us) / 1000 if values_us else None
