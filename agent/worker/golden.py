"""Golden self-tests: known inputs through the model, outputs compared with the publisher's.

Metrics, each per ``compare`` entry: ``allclose`` (rtol, atol), ``max_abs`` (atol), ``cosine`` (min, the worst row),
``topk`` (k, min: share of the k best classes that agree, mean over the rows).
Promises: a model passes only if every comparison of every golden entry holds and each came within its time; the first
that does not is named with what was measured and what was required.
Leaves out: ``iou`` and other metrics of decoded boxes, which need a handler's view of the outputs; such an entry
fails with its metric's name, it is never skipped.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np

from agent.errors import OutputError, SelfTestError
from agent.tensors import Array
from agent.worker import safetensors
from agent.worker.spec import inside

_RUNS_MAX: Final = 3  # of an entry that comes too late

Run = Callable[[Mapping[str, Array]], Mapping[str, Array]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Golden:
    """One entry of the manifest, loaded."""

    id: str
    inputs: Mapping[str, Array]
    outputs: Mapping[str, Array]
    compare: Sequence[Mapping[str, Any]]
    timeout_ms: float


def load(entries: Sequence[Mapping[str, Any]], bundle_dir: Path) -> list[Golden]:
    """Return the entries with their samples.

    Raises:
        UnsafeBundleError: a path outside the bundle, or a sample that is not exactly safetensors.
        SelfTestError: a malformed entry.
    """
    loaded = []
    for entry in entries:
        try:
            loaded.append(
                Golden(
                    id=str(entry["id"]),
                    inputs=safetensors.read(inside(bundle_dir, str(entry["inputs"]))),
                    outputs=safetensors.read(inside(bundle_dir, str(entry["outputs"]))),
                    compare=tuple(entry["compare"]),
                    timeout_ms=float(entry.get("timeout_ms") or 30_000),
                )
            )
        except (KeyError, TypeError, ValueError) as error:
            raise SelfTestError(f"golden entry {entry.get('id')!r} is malformed: {error}") from error
    return loaded


def check(golden: Golden, run: Run) -> dict[str, Any]:
    """Run one entry and return how it ended, with what was measured.

    ``{"id", "ok", "ms", "ms_max", "checks": [{"output", "metric", "ok", "found", "bound"}], "reason"}``; ``found`` is
    ``None`` where nothing can be measured, as with NaN. The quickest of a few runs counts: a box that is busy for a
    moment is no slow model. ``run`` may raise ``OutputError``; what else it raises passes.
    """
    began = time.perf_counter()
    try:
        outputs, took_ms = _quickest(golden, run)
    except OutputError as error:
        return _report(golden, (time.perf_counter() - began) * 1000, [], [f"golden {golden.id!r}, {error}"])
    faults = []
    if took_ms > golden.timeout_ms:
        faults.append(f"golden {golden.id!r} took {took_ms:.4g} ms, allowed are {golden.timeout_ms:g}")
    checks = []
    for rule in golden.compare:
        name, metric = str(rule.get("output")), str(rule.get("metric", "allclose"))  # the manifest leaves defaults out
        found = _compare(metric, name, rule, golden, outputs)
        row = {"output": name, "metric": metric, "ok": not found.fault, "found": _plain(found.value)}
        checks.append({**row, "bound": found.bound})
        if found.fault:
            faults.append(f"golden {golden.id!r}, output {name!r}, {metric}: {found.fault}")
    return _report(golden, took_ms, checks, faults)


def verify(goldens: Sequence[Golden], run: Run) -> list[dict[str, Any]]:
    """Run every entry and return ``[{"id", "ok": True, "ms"}]``.

    Raises:
        SelfTestError: an output differs, is missing, is not what ``run`` says it must be, or came too late.
    """
    reports = []
    for golden in goldens:
        report = check(golden, run)
        if not report["ok"]:
            raise SelfTestError(report["reason"])
        reports.append({"id": golden.id, "ok": True, "ms": report["ms"]})
    return reports


@dataclass(frozen=True, slots=True, kw_only=True)
class _Found:
    """What a comparison found: the figure, what it is held against, and what is wrong."""

    value: float
    bound: str
    fault: str


def _report(golden: Golden, took_ms: float, checks: list[dict[str, Any]], faults: Sequence[str]) -> dict[str, Any]:
    return {
        "id": golden.id,
        "ok": not faults,
        "ms": round(took_ms, 3),
        "ms_max": golden.timeout_ms,
        "checks": checks,
        "reason": faults[0] if faults else "",
    }


def _quickest(golden: Golden, run: Run) -> tuple[Mapping[str, Array], float]:
    outputs, took_ms = _timed(golden, run)
    for _ in range(_RUNS_MAX - 1):
        if took_ms <= golden.timeout_ms:
            break
        outputs, again_ms = _timed(golden, run)
        took_ms = min(took_ms, again_ms)
    return outputs, took_ms


def _timed(golden: Golden, run: Run) -> tuple[Mapping[str, Array], float]:
    began = time.perf_counter()
    outputs = run(golden.inputs)
    return outputs, (time.perf_counter() - began) * 1000


def _compare(metric: str, name: str, rule: Mapping[str, Any], golden: Golden, outputs: Mapping[str, Array]) -> _Found:
    fault = ""
    if metric not in _METRICS:
        fault = f"no such metric here; known: {', '.join(_METRICS)}"
    elif name not in outputs or name not in golden.outputs:
        fault = f"the output is missing in the {'model' if name not in outputs else 'sample'}"
    elif outputs[name].shape != golden.outputs[name].shape:
        fault = f"shape {list(outputs[name].shape)}, expected {list(golden.outputs[name].shape)}"
    if fault:
        return _Found(value=math.nan, bound="", fault=fault)
    found, wanted = (np.asarray(array, np.float64) for array in (outputs[name], golden.outputs[name]))
    return _METRICS[metric](found, wanted, rule)


def _allclose(found: Array, wanted: Array, rule: Mapping[str, Any]) -> _Found:
    rtol, atol = float(rule.get("rtol", 1e-5)), float(rule.get("atol", 1e-8))
    bound, largest = f"rtol {rtol:g}, atol {atol:g}", _largest(found, wanted)
    near = np.allclose(found, wanted, rtol=rtol, atol=atol)
    fault = "" if near else f"differs by up to {largest:.6g}, allowed are rtol {rtol:g} and atol {atol:g}"
    return _Found(value=largest, bound=bound, fault=fault)


def _max_abs(found: Array, wanted: Array, rule: Mapping[str, Any]) -> _Found:
    allowed, largest = float(rule.get("atol", 1e-8)), _largest(found, wanted)
    fault = "" if largest <= allowed else f"differs by up to {largest:.6g}, allowed is {allowed:g}"
    return _Found(value=largest, bound=f"at most {allowed:g}", fault=fault)


def _cosine(found: Array, wanted: Array, rule: Mapping[str, Any]) -> _Found:
    left, right = _by_rows(found), _by_rows(wanted)
    lengths = np.linalg.norm(left, axis=1) * np.linalg.norm(right, axis=1)
    both_zero = np.all(left == right, axis=1)
    cosines = np.where(both_zero, 1.0, np.sum(left * right, axis=1) / np.where(lengths > 0, lengths, np.inf))
    worst, least = float(np.min(cosines, initial=1.0)), float(rule.get("min", 0.999))
    fault = "" if worst >= least else f"the worst row has {worst:.6g}, required is {least:g}"
    return _Found(value=worst, bound=f"at least {least:g}", fault=fault)


def _topk(found: Array, wanted: Array, rule: Mapping[str, Any]) -> _Found:
    left, right = _by_rows(found), _by_rows(wanted)
    k, least = max(1, min(int(rule.get("k", 1)), left.shape[1])), float(rule.get("min", 1.0))
    bound = f"at least {least:g} of the {k} best"
    if not np.isfinite(left).all():
        return _Found(value=math.nan, bound=bound, fault="holds NaN or infinity")
    agreeing = [len(set(_best(a, k)) & set(_best(b, k))) / k for a, b in zip(left, right, strict=True)]
    share = float(np.mean(agreeing)) if agreeing else 1.0
    fault = "" if share >= least else f"{share:.4g} of the {k} best agree, required is {least:g}"
    return _Found(value=share, bound=bound, fault=fault)


def _best(row: Array, k: int) -> list[int]:
    return [int(index) for index in np.argsort(-row, kind="stable")[:k]]


def _by_rows(array: Array) -> Array:
    return array.reshape(array.shape[0], -1) if array.ndim > 1 else array.reshape(1, -1)


def _largest(found: Array, wanted: Array) -> float:
    return float(np.max(np.abs(found - wanted), initial=0.0))


def _plain(value: float) -> float | None:
    return float(f"{value:.6g}") if math.isfinite(value) else None


_METRICS: Final[Mapping[str, Callable[[Array, Array, Mapping[str, Any]], _Found]]] = {
    "allclose": _allclose,
    "max_abs": _max_abs,
    "cosine": _cosine,
    "topk": _topk,
}
