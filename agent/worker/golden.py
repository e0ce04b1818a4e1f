"""Golden self-tests: known inputs through the model, outputs compared with the publisher's.

Metrics, each per ``compare`` entry: ``allclose`` (rtol, atol), ``max_abs`` (atol), ``cosine`` (min, the worst row),
``topk`` (k, min: share of the k best classes that agree, mean over the rows).
Promises: a model passes only if every comparison of every golden entry holds within its time; the first that does
not is named with what was measured and what was required.
Leaves out: ``iou`` and other metrics of decoded boxes, which need a handler's view of the outputs; such an entry
fails with its metric's name, it is never skipped.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np

from agent.errors import SelfTestError
from agent.tensors import Array
from agent.worker import safetensors
from agent.worker.spec import inside

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


def verify(goldens: Sequence[Golden], run: Run) -> list[dict[str, Any]]:
    """Run every entry and return ``[{"id", "ok": True, "ms"}]``.

    Raises:
        SelfTestError: an output differs, is missing, or came too late.
    """
    reports = []
    for golden in goldens:
        began = time.perf_counter()
        outputs = run(golden.inputs)
        took_ms = (time.perf_counter() - began) * 1000
        if took_ms > golden.timeout_ms:
            raise SelfTestError(f"golden {golden.id!r} took {took_ms:.0f} ms, allowed are {golden.timeout_ms:.0f}")
        for rule in golden.compare:
            _compare(golden, rule, outputs)
        reports.append({"id": golden.id, "ok": True, "ms": round(took_ms, 3)})
    return reports


def _compare(golden: Golden, rule: Mapping[str, Any], outputs: Mapping[str, Array]) -> None:
    name, metric = str(rule.get("output")), str(rule.get("metric", "allclose"))  # the manifest leaves defaults out
    where = f"golden {golden.id!r}, output {name!r}, {metric}"
    if metric not in _METRICS:
        raise SelfTestError(f"{where}: no such metric here; known: {', '.join(_METRICS)}")
    if name not in outputs or name not in golden.outputs:
        raise SelfTestError(f"{where}: the output is missing in the {'model' if name not in outputs else 'sample'}")
    found, wanted = outputs[name], golden.outputs[name]
    if found.shape != wanted.shape:
        raise SelfTestError(f"{where}: shape {list(found.shape)}, expected {list(wanted.shape)}")
    fault = _METRICS[metric](np.asarray(found, np.float64), np.asarray(wanted, np.float64), rule)
    if fault:
        raise SelfTestError(f"{where}: {fault}")


def _allclose(found: Array, wanted: Array, rule: Mapping[str, Any]) -> str:
    rtol, atol = float(rule.get("rtol", 1e-5)), float(rule.get("atol", 1e-8))
    if np.allclose(found, wanted, rtol=rtol, atol=atol):
        return ""
    return f"differs by up to {_largest(found, wanted):.6g}, allowed are rtol {rtol:g} and atol {atol:g}"


def _max_abs(found: Array, wanted: Array, rule: Mapping[str, Any]) -> str:
    allowed, largest = float(rule.get("atol", 1e-8)), _largest(found, wanted)
    return "" if largest <= allowed else f"differs by up to {largest:.6g}, allowed is {allowed:g}"


def _cosine(found: Array, wanted: Array, rule: Mapping[str, Any]) -> str:
    left, right = _by_rows(found), _by_rows(wanted)
    lengths = np.linalg.norm(left, axis=1) * np.linalg.norm(right, axis=1)
    both_zero = np.all(left == right, axis=1)
    cosines = np.where(both_zero, 1.0, np.sum(left * right, axis=1) / np.where(lengths > 0, lengths, np.inf))
    worst, least = float(np.min(cosines, initial=1.0)), float(rule.get("min", 0.999))
    return "" if worst >= least else f"the worst row has {worst:.6g}, required is {least:g}"


def _topk(found: Array, wanted: Array, rule: Mapping[str, Any]) -> str:
    left, right = _by_rows(found), _by_rows(wanted)
    k = max(1, min(int(rule.get("k", 1)), left.shape[1]))
    if not np.isfinite(left).all():
        return "holds NaN or infinity"
    agreeing = [len(set(_best(a, k)) & set(_best(b, k))) / k for a, b in zip(left, right, strict=True)]
    share, least = float(np.mean(agreeing)) if agreeing else 1.0, float(rule.get("min", 1.0))
    return "" if share >= least else f"{share:.4g} of the {k} best agree, required is {least:g}"


def _best(row: Array, k: int) -> list[int]:
    return [int(index) for index in np.argsort(-row, kind="stable")[:k]]


def _by_rows(array: Array) -> Array:
    return array.reshape(array.shape[0], -1) if array.ndim > 1 else array.reshape(1, -1)


def _largest(found: Array, wanted: Array) -> float:
    return float(np.max(np.abs(found - wanted), initial=0.0))


_METRICS: Final[Mapping[str, Callable[[Array, Array, Mapping[str, Any]], str]]] = {
    "allclose": _allclose,
    "max_abs": _max_abs,
    "cosine": _cosine,
    "topk": _topk,
}
