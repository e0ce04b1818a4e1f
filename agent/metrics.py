"""Numbers of the running daemon: cheap to count on the hot path, rendered only when asked.

A counter is one dict update, a histogram observation one bisection; ``render`` builds the Prometheus text and
``snapshot`` the same numbers as plain values for telemetry. prometheus_client does the exposition format.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Final

from prometheus_client import CollectorRegistry
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.exposition import generate_latest

# Seconds. From 50 µs (a tiny model over the unix socket) to 10 s, about 2.2 steps a factor of ten.
LATENCY_BUCKETS_S: Final = (
    0.00005, 0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 10.0,
)  # fmt: skip

Labels = tuple[str, ...]


class Counter:
    """A number that only grows, per label values."""

    def __init__(self, name: str, text: str, labels: Sequence[str]) -> None:
        self.name = name
        self.text = text
        self.labels = tuple(labels)
        self.values: dict[Labels, float] = {}

    def add(self, labels: Labels = (), amount: float = 1.0) -> None:
        """Add ``amount`` (not negative) under ``labels``, in the declared order."""
        self.values[labels] = self.values.get(labels, 0.0) + amount


class Histogram:
    """Counts of observations per bucket, per label values."""

    def __init__(
        self, name: str, text: str, labels: Sequence[str], bounds: Sequence[float] = LATENCY_BUCKETS_S
    ) -> None:
        self.name = name
        self.text = text
        self.labels = tuple(labels)
        self.bounds = tuple(bounds)
        self.values: dict[Labels, HistogramSeries] = {}

    def series(self, labels: Labels) -> HistogramSeries:
        """Return the series of ``labels``; keep it to observe without a look-up."""
        found = self.values.get(labels)
        if found is None:
            found = self.values[labels] = HistogramSeries(self.bounds)
        return found


class HistogramSeries:
    """One histogram's buckets for one set of label values."""

    __slots__ = ("_bounds", "buckets", "count", "total")

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self._bounds = bounds
        self.buckets = [0] * (len(bounds) + 1)
        self.count = 0
        self.total = 0.0

    def observe(self, value: float) -> None:
        """Count one observation, in the histogram's unit."""
        self.buckets[bisect_left(self._bounds, value)] += 1
        self.count += 1
        self.total += value

    def merge(self, buckets: Sequence[int], total: float) -> None:
        """Add what was observed elsewhere with the same bounds; other bounds are ignored."""
        if len(buckets) == len(self.buckets):
            self.buckets = [mine + theirs for mine, theirs in zip(self.buckets, buckets, strict=True)]
            self.count += sum(buckets)
            self.total += total

    def quantile(self, q: float) -> float:
        """Return the upper bound of the bucket that holds quantile ``q`` (0..1); 0.0 when empty."""
        rank, seen = q * self.count, 0
        for index, amount in enumerate(self.buckets):
            seen += amount
            if seen >= rank and seen:
                return self._bounds[min(index, len(self._bounds) - 1)]
        return 0.0


GaugeSource = Callable[[], Iterable[tuple[Labels, float]]]


class Metrics:
    """The daemon's metrics by name. One per process, made by the composition root."""

    def __init__(self) -> None:
        self._counters: dict[str, Counter] = {}
        self._histograms: dict[str, Histogram] = {}
        self._gauges: dict[str, tuple[str, tuple[str, ...], GaugeSource]] = {}
        self._registry = CollectorRegistry(auto_describe=False)
        self._registry.register(self)  # a collector is anything with collect()

    def counter(self, name: str, text: str, labels: Sequence[str] = ()) -> Counter:
        """Return the counter ``name`` (without ``_total``), made at the first call."""
        return self._counters.setdefault(name, Counter(name, text, labels))

    def histogram(
        self, name: str, text: str, labels: Sequence[str] = (), bounds: Sequence[float] = LATENCY_BUCKETS_S
    ) -> Histogram:
        """Return the histogram ``name``, made at the first call."""
        return self._histograms.setdefault(name, Histogram(name, text, labels, bounds))

    def gauge(self, name: str, text: str, labels: Sequence[str], source: GaugeSource) -> None:
        """Register a value that is read when asked for."""
        self._gauges[name] = (text, tuple(labels), source)

    def render(self) -> bytes:
        """Return the Prometheus text exposition."""
        return generate_latest(self._registry)

    def snapshot(self) -> dict[str, Any]:
        """Return all numbers as plain values: ``{name: [{labels…, value | count, sum, p50, p99}]}``."""
        plain: dict[str, Any] = {}
        for counter in self._counters.values():
            plain[counter.name] = [
                {**dict(zip(counter.labels, labels, strict=True)), "value": value}
                for labels, value in counter.values.items()
            ]
        for histogram in self._histograms.values():
            plain[histogram.name] = [
                {
                    **dict(zip(histogram.labels, labels, strict=True)),
                    "count": series.count,
                    "sum": round(series.total, 6),
                    "p50": series.quantile(0.5),
                    "p99": series.quantile(0.99),
                }
                for labels, series in histogram.values.items()
            ]
        for name, (_, names, source) in self._gauges.items():
            plain[name] = [{**dict(zip(names, labels, strict=True)), "value": value} for labels, value in source()]
        return plain

    def collect(self) -> Iterator[Metric]:
        """Yield prometheus_client metric families; called by its exposition."""
        for counter in self._counters.values():
            family = CounterMetricFamily(counter.name, counter.text, labels=counter.labels)
            for labels, value in counter.values.items():
                family.add_metric(labels, value)
            yield family
        for histogram in self._histograms.values():
            yield _histogram_family(histogram)
        for name, (text, names, source) in self._gauges.items():
            gauge = GaugeMetricFamily(name, text, labels=names)
            for labels, value in source():
                gauge.add_metric(labels, value)
            yield gauge


def _histogram_family(histogram: Histogram) -> HistogramMetricFamily:
    family = HistogramMetricFamily(histogram.name, histogram.text, labels=histogram.labels)
    for labels, series in histogram.values.items():
        seen, rows = 0, []
        for bound, amount in zip((*map(str, histogram.bounds), "+Inf"), series.buckets, strict=True):
            seen += amount
            rows.append((bound, seen))
        family.add_metric(labels, rows, series.total)
    return family
