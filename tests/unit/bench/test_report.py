"""How measurements are compared and shown: yardsticks of their own load, 80 columns, nothing hidden."""

from __future__ import annotations

import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from tools.bench_load import Sample, medians, quantiles_us
from tools.bench_processes import used_between
from tools.bench_report import Report, compared, plot
from tools.bench_targets import FLOOR, IN_PROCESS

pytestmark = pytest.mark.unit


def row(load: str, way: str, p50_us: float, rate_s: float = 1000.0, **errors: int) -> dict[str, Any]:
    latencies = {"0": p50_us / 2, "50": p50_us, "99": 2 * p50_us, "100": 9 * p50_us}
    cpu = {"client": 5.0} if way in (IN_PROCESS, FLOOR) else {"client": 5.0, "daemon": 20.5, "worker": 1234.5}
    figures = {"p50_us": p50_us, "p99_us": 2 * p50_us, "rate_s": rate_s, "errors": errors}
    return {"load": load, "way": way, **figures, "quantiles_us": latencies, "cpu_us": cpu}


ROWS = compared(
    [
        row("one", IN_PROCESS, 10.0, 80_000.0),
        row("one", FLOOR, 70.0, 14_000.0),
        row("one", "unix tensors", 210.0, 4_000.0),
        row("many", IN_PROCESS, 20.0, 40_000.0),
        row("many", FLOOR, 0.0, 0.0),
        row("many", "unix tensors", 123_456.0, 30_000.0, overloaded=3),
        row("open", "unix tensors", 100.0),
    ]
)


def test_each_way_is_compared_with_the_yardsticks_of_its_load() -> None:
    one = ROWS[2]
    assert (one["over_in_process_us"], one["p50_of_in_process"], one["rate_of_in_process"]) == (200.0, 21.0, 0.05)
    assert (one["over_floor_us"], one["p50_of_floor"]) == (140.0, 3.0)
    assert ROWS[5]["rate_of_in_process"] == 0.75
    assert "over_floor_us" not in ROWS[5]
    assert not [key for key in ROWS[6] if key.startswith(("over", "rate_of"))]
    assert "over_in_process_us" not in ROWS[0]


def test_the_text_fits_a_terminal_and_hides_nothing() -> None:
    processes = [
        {"pid": 12, "role": "daemon", "pss_bytes": 41_000_000},
        {"pid": 4194303, "role": "worker", "pss_bytes": 1},
    ]
    text = Report(model="m", rows=ROWS, processes=processes, left_out=("the native ways: no C compiler",)).text()
    tables, _, notes = text.partition("Medians")
    assert max(map(len, tables.splitlines())) <= 80
    assert "…" not in text
    for shown in ("123,456", "+123,436", "6,173", "0.75", "+140", "1234.5", "41.0", "4194303", "{'overloaded': 3}"):
        assert shown in tables
    assert "Left out: the native ways: no C compiler" in notes


def test_the_results_folder_has_every_form(tmp_path: Path) -> None:
    report = Report(model="m", rows=ROWS, processes=[])
    left_out = report.write(tmp_path / "results")
    assert (tmp_path / "results/report.txt").read_text() == report.text()
    assert json.loads((tmp_path / "results/report.json").read_text())["figures"] == ROWS
    drawn = tmp_path / "results/latency.png"
    if left_out:
        assert not drawn.exists()
    else:
        assert drawn.read_bytes().startswith(b"\x89PNG")


def test_a_missing_plot_library_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    (line,) = plot(ROWS, tmp_path / "latency.png")
    assert "inferd[bench]" in line
    assert not (tmp_path / "latency.png").exists()


def sample(p50: float, answers: int, **errors: int) -> Sample:
    return Sample(
        answers=answers,
        wall_s=2.0,
        asked=answers,
        errors=Counter(errors),
        quantiles_us=dict.fromkeys(quantiles_us([1.0]), p50) if answers else {},
        client_cpu_s=0.1,
    )


def test_medians_are_of_the_repetitions_and_errors_are_summed() -> None:
    merged = medians([sample(1.0, 10), sample(5.0, 30, overloaded=2), sample(2.0, 20, overloaded=1, internal=1)])
    assert (merged["p50_us"], merged["p99_us"], merged["rate_s"]) == (2.0, 2.0, 10.0)
    assert merged["errors"] == {"overloaded": 3, "internal": 1}
    assert medians([sample(0.0, 0, overloaded=1)])["quantiles_us"] == {}


def test_quantiles_are_values_that_occurred() -> None:
    found = quantiles_us([value / 1e6 for value in range(100, 0, -1)])
    assert (found["0"], found["50"], found["99"], found["100"]) == pytest.approx((1, 51, 100, 100))
    assert quantiles_us([]) == {}


def test_cpu_time_counts_those_who_came_and_forgets_those_who_left() -> None:
    before = {1: ("daemon", 1.0), 2: ("worker", 5.0), 3: ("worker", 7.0)}
    after = {1: ("daemon", 1.5), 2: ("worker", 6.0), 4: ("worker", 0.25)}
    assert used_between(before, after) == {"daemon": 0.5, "worker": 1.25}
