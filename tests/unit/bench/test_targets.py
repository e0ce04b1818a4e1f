"""What must be reached: judged by the figures of its own load, and never by what was not measured."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest

from tools.bench_load import Sample
from tools.bench_overload import Round, summary
from tools.bench_report import Report, compared
from tools.bench_swap import Windows
from tools.bench_targets import CNN, FLOOR, FRAME, IN_PROCESS, TINY_MANY, TINY_ONE, judged

pytestmark = pytest.mark.unit


def row(
    load: str, way: str, p50_us: float, rate_s: float = 1.0, errors: dict[str, int] | None = None
) -> dict[str, Any]:
    return {"load": load, "way": way, "p50_us": p50_us, "p99_us": p50_us, "rate_s": rate_s, "errors": errors or {}}


def verdicts(rows: list[dict[str, Any]], facts: dict[str, Any] | None = None) -> dict[tuple[str, str], str]:
    return {(target.work, target.way): target.verdict for target in judged(compared(rows), facts or {})}


def test_nothing_measured_reaches_nothing() -> None:
    found = judged([], {})
    assert len(found) == 21
    assert {target.met for target in found} == {None}
    assert {target.measured for target in found} == {"–"}


def test_a_lane_that_was_not_granted_is_not_measured() -> None:
    rows = [row(TINY_ONE, FLOOR, 70.0), {"load": TINY_ONE, "way": "lane tensors", "skipped": "lane not granted"}]
    assert verdicts(rows)["tiny, 1 at once: p50", "lane tensors"] == "–"


def test_latencies_are_judged_over_floor_and_work() -> None:
    rows = [
        *(row(TINY_ONE, IN_PROCESS, 10.0), row(TINY_ONE, FLOOR, 70.0), row(TINY_ONE, "lane tensors", 140.0)),
        *(row(TINY_ONE, "unix tensors", 211.0), row(TINY_ONE, "http binary", 200.0, errors={"http": 1})),
        *(row(FRAME, IN_PROCESS, 600.0), row(FRAME, FLOOR, 70.0), row(FRAME, "unix region", 810.0)),
        *(row(FRAME, "unix tensors", 1171.0), row(FRAME, "http binary", 4800.0)),
    ]
    found = verdicts(rows)
    assert found["tiny, 1 at once: p50", "lane tensors"] == "met"
    assert found["tiny, 1 at once: p50", "unix tensors"] == "missed"
    assert found["tiny, 1 at once: p50", "http binary"] == "–"  # a run with errors says nothing
    assert found["6 MB by region: p50", "unix region"] == "met"
    assert found["6 MB plain array: p50", "unix tensors"] == "missed"
    assert found["6 MB plain array: p50", "http binary"] == "met"


def test_rates_are_those_of_the_faster_generator() -> None:
    rows = [row(TINY_MANY, IN_PROCESS, 10.0, 70_000.0), row(TINY_MANY, "unix tensors", 1.0, 7_000.0)]
    rows += [row(TINY_MANY, "unix native", 1.0, 42_000.0), row(CNN, IN_PROCESS, 1.0, 30.0)]
    rows += [row(CNN, "http binary", 1.0, 27.0)]
    found = verdicts(rows)
    assert found["tiny, 32 at once: rate", "unix"] == "met"
    assert found["ResNet-18, 8: rate", "http"] == "missed"


def sample(answers: int, p99_ms: float, **errors: int) -> Sample:
    quantiles = {"50": p99_ms * 500, "99": p99_ms * 1000}
    return Sample(
        answers=answers,
        wall_s=1.0,
        asked=answers,
        errors=Counter(errors),
        quantiles_us=quantiles,
        client_cpu_s=0.0,
        refused_us={"50": 100.0, "99": 900.0} if "overloaded" in errors else {},
    )


def test_overload_is_held_against_queue_and_service_time() -> None:
    rounds = [Round(capacity_s=100.0, overload=sample(100, p99, overloaded=100)) for p99 in (100.0, 700.0, 639.0)]
    found = summary(rounds, queue_requests_max=32)
    assert (found["service time, ms"], found["bound, ms"], found["accepted p99, ms"]) == (10.0, 640.0, 639.0)
    assert (found["bound holds"], found["refused, share"], found["refused p99, ms"]) == (True, 0.5, 0.9)
    assert verdicts([], {"overload": found})["overload: accepted p99", "unix"] == "met"
    lost = summary([Round(capacity_s=100.0, overload=sample(1, 1.0, worker_died=1))], queue_requests_max=32)
    assert lost["other errors"] == {"worker_died": 1}
    assert verdicts([], {"overload": lost})["overload: accepted p99", "unix"] == "missed"


def test_a_swap_is_compared_with_the_quiet_around_it() -> None:
    windows = Windows(latencies={False: [0.001] * 1000, True: [0.001] * 990 + [0.004] * 10}, swaps_s=[1.0, 2.0])
    found = windows.figures()
    assert (found["swaps"], found["p99.9, swap / quiet"], found["failed requests"]) == (2, pytest.approx(4.0), 0)
    assert verdicts([], {"swap": found})["swap: p99.9 of quiet", "unix"] == "missed"
    windows.failed["unavailable"] += 1
    assert verdicts([], {"swap": windows.figures()})["swap: failed requests", "unix"] == "missed"
    assert Windows().figures()["p99.9, swap / quiet"] is None


def test_the_table_of_targets_fits_a_terminal() -> None:
    facts = {"memory": {"daemon, MB": 123.456, "idle CPU, %": 0.2}}
    text = Report(model="m", rows=[], processes=[], facts=facts, targets=judged([], facts)).text()
    tables, _, _ = text.partition("Medians")
    assert max(map(len, tables.splitlines())) <= 80
    assert "…" not in tables
    assert "missed" in tables
