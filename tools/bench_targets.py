"""What the data plane must reach, and whether it was reached. Pure: figures in, verdicts out.

Promises: a figure that was not measured is never counted as reached.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

IN_PROCESS: Final = "in-process"
FLOOR: Final = "echo floor"  # across two cores
FLOOR_ONE_CORE: Final = "echo, one core"
BARE_RELAY: Final = "bare relay"  # bench_relay.py: the mechanism without a feature
BARE_WORKER: Final = "bare worker"
BARE_SHARED: Final = "bare, shared"  # bench_beside.py
BARE_TCP: Final = "bare, TCP"
BARE: Final = (BARE_RELAY, BARE_WORKER, BARE_SHARED, BARE_TCP)
TINY_ONE: Final = "tiny MLP, closed loop, 1 outstanding"
TINY_MANY: Final = "tiny MLP, closed loop, 32 outstanding"
FRAME: Final = "6 MB frame, closed loop, 1 outstanding"
CNN: Final = "ResNet-18, closed loop, 8 outstanding"

Rows = Sequence[Mapping[str, Any]]
Facts = Mapping[str, Mapping[str, Any]]


@dataclass(frozen=True, kw_only=True)
class Target:
    """One figure that must be reached. ``met`` is ``None`` where it was not measured."""

    work: str
    way: str
    limit: str
    measured: str = "–"
    met: bool | None = None

    @property
    def verdict(self) -> str:
        """One word for the table."""
        return "–" if self.met is None else "met" if self.met else "missed"


def judged(rows: Rows, facts: Facts) -> list[Target]:
    """Return every target with what was measured.

    Args:
        rows: One per load and way, as ``bench_report.compared`` returns them.
        facts: Figures by section: ``overload``, ``swap``, ``memory``.
    """
    return [*_latencies(rows), *_rates(rows), *_of_facts(facts)]


def _latencies(rows: Rows) -> Iterator[Target]:
    for work, load, base, limits in (
        ("tiny, 1 at once: p50", TINY_ONE, "", (("lane tensors", 70), ("unix tensors", 140), ("http binary", 220))),
        ("6 MB by region: p50", FRAME, IN_PROCESS, (("lane region", 70), ("unix region", 140))),
        ("6 MB plain array: p50", FRAME, IN_PROCESS, (("unix tensors", 500),)),
    ):
        floor, beside = _p50(rows, load, FLOOR), _p50(rows, load, base) if base else 0.0
        for way, over in limits:
            sum_text = f"≤ {'in-proc.+' if base else ''}floor+{over} µs"
            p50 = _p50(rows, load, way)
            if p50 is None or floor is None or beside is None:
                yield Target(work=work, way=way, limit=sum_text)
                continue
            found = p50 - floor - beside
            yield Target(work=work, way=way, limit=sum_text, measured=f"{found:+,.0f} µs", met=found <= over)
    p50, beside = _p50(rows, FRAME, "http binary"), _p50(rows, FRAME, IN_PROCESS)
    times = p50 / beside if p50 is not None and beside else None
    yield _bound("6 MB plain array: p50", "http binary", times, 8.0, "≤ 8 × in-proc.", "{:.1f} ×")


def _rates(rows: Rows) -> Iterator[Target]:
    for work, load, limits in (
        ("tiny, 32 at once: rate", TINY_MANY, (("lane", 0.9), ("unix", 0.55), ("http", 0.2))),
        ("ResNet-18, 8: rate", CNN, (("lane", 0.97), ("unix", 0.97), ("http", 0.95))),
    ):
        for way, least in limits:
            rates = [row["rate_of_in_process"] for row in _of_edge(rows, load, way) if "rate_of_in_process" in row]
            limit, best = f"≥ {least:g} × in-proc.", max(rates, default=None)
            if best is None:
                yield Target(work=work, way=way, limit=limit)
            else:
                yield Target(work=work, way=way, limit=limit, measured=f"{best:.2f} ×", met=best >= least)


def _of_facts(facts: Facts) -> Iterator[Target]:
    overload, swap, memory = (facts.get(name, {}) for name in ("overload", "swap", "memory"))
    p99, bound = overload.get("accepted p99, ms"), overload.get("bound, ms")
    limit = f"≤ {bound:,.0f} ms" if bound is not None else "≤ 2 × queue × service"
    met = None if p99 is None or bound is None else p99 <= bound and not overload["other errors"]
    measured = "–" if p99 is None else f"{p99:,.0f} ms"
    yield Target(work="overload: accepted p99", way="unix", limit=limit, measured=measured, met=met)
    ratio, failed = swap.get("p99.9, swap / quiet"), swap.get("failed requests")
    yield _bound("swap: p99.9 of quiet", "unix", ratio, 3.0, "≤ 3 ×", "{:.1f} ×")
    yield _bound("swap: failed requests", "unix", failed, 0, "0", "{}")
    for work, name, most, form in (
        ("PSS, daemon", "daemon, MB", 42.0, "MB"),
        ("PSS, zygote and worker", "with zygote and worker, MB", 88.0, "MB"),
        ("PSS, each more model", "each further model, MB", 12.0, "MB"),
        ("idle CPU of a core", "idle CPU, %", 0.3, "%"),
        ("cold start to answer", "cold start, s", 0.5, "s"),
    ):
        yield _bound(work, "", memory.get(name), most, f"≤ {most:g} {form}", "{:.2f} " + form)


def _bound(work: str, way: str, found: float | None, most: float, limit: str, form: str) -> Target:
    if found is None:
        return Target(work=work, way=way, limit=limit)
    return Target(work=work, way=way, limit=limit, measured=form.format(found), met=found <= most)


def _p50(rows: Rows, load: str, way: str) -> float | None:
    found = _first(rows, lambda row: (row["load"], row["way"]) == (load, way) and bool(row.get("p50_us")))
    return None if found is None or found["errors"] else float(found["p50_us"])


def _of_edge(rows: Rows, load: str, edge: str) -> list[Mapping[str, Any]]:
    """Return the rows of one edge, whichever generator asked: the faster one shows the server."""
    return [
        row for row in rows if row["load"] == load and str(row["way"]).startswith(f"{edge} ") and not row.get("errors")
    ]


def _first(rows: Rows, accept: Callable[[Mapping[str, Any]], bool]) -> Mapping[str, Any] | None:
    return next((row for row in rows if accept(row)), None)
