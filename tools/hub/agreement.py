"""How far a variant's answers are from fp32's, in the measure that suits each output. Pure.

Measures, each over all rows: ``max_abs``; ``cosine`` (the worst row); ``top1`` and ``topk`` (share of rows, of the k
best); ``exact`` (share of equal elements). Which of them is *the* agreement of an output follows from what it is:

- ``top1`` for classes: scores that a person marked or named so, whose number is that of the class file, or
  probabilities (no negative, every row adds up to one);
- ``exact`` for whole numbers, truth values and texts;
- ``cosine`` for everything else: embeddings, masks, boxes, waves.

The agreement of a variant is that of its worst output. Values that are not finite where fp32's are count as none.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal

import numpy as np
import numpy.typing as npt

from agent.bundles.manifest import Compare

Array = npt.NDArray[Any]
Measure = Literal["top1", "exact", "cosine"]
Choice = Literal["auto", "top1", "cosine"]
K: Final = 5
MARGIN: Final = 2.0  # other CPUs round and saturate differently: the golden test allows so many times what was seen
_ROW_MIN: Final = 8  # shorter rows have no direction to speak of: their cosine is taken over all rows together
_ATOL_MIN: Final = 1e-6
_CLASS_NAMES: Final = ("logit", "prob", "score", "class", "label", "softmax")
_CLASS_SEMANTICS: Final = frozenset({"probabilities", "logits", "scores", "classes"})


@dataclass(frozen=True, slots=True, kw_only=True)
class Output:
    """What is known about an output before it is compared."""

    name: str
    semantic: str = ""
    classes: int = 0  # lines of the bundle's class file, 0: none


@dataclass(frozen=True, slots=True, kw_only=True)
class Agreement:
    """One output of one variant. A measure that does not apply is ``None``."""

    output: str
    measure: Measure
    value: float  # of that measure, 0 to 1
    max_abs: float | None  # None: texts, or not finite
    cosine: float | None
    top1: float | None
    topk: float | None
    k: int
    rows: int
    finite: bool
    by_row: bool  # whether the cosine is that of the worst row


def compare(output: Output, wanted: Sequence[Array], found: Sequence[Array], choice: Choice = "auto") -> Agreement:
    """Return the agreement of ``found`` with fp32's ``wanted``, one array per run.

    Args:
        output: The output that both are.
        wanted, found: Same length and, array by array, same shape; first axis: rows.
        choice: The measure for outputs of floating point; ``auto``: as the module says.
    """
    if any(a.shape != b.shape for a, b in zip(wanted, found, strict=True)):
        return _none(output, "cosine", rows=0)
    if wanted[0].dtype.kind not in "f":
        return _exact(output, wanted, found)
    left = [_by_rows(array) for array in wanted]
    right = [_by_rows(array) for array in found]
    rows = sum(len(array) for array in left)
    measure: Measure = choice if choice != "auto" else ("top1" if _is_classes(output, wanted) else "cosine")
    if any(np.any(~np.isfinite(b) & np.isfinite(a)) for a, b in zip(left, right, strict=True)):
        return _none(output, measure, rows=rows)
    # Where fp32 itself has none, there is nothing to agree with: attention masks, logarithms of zero.
    known = [np.isfinite(array) for array in left]
    left = [np.where(mask, array, 0.0) for mask, array in zip(known, left, strict=True)]
    right = [np.where(mask, array, 0.0) for mask, array in zip(known, right, strict=True)]
    by_row = all(array.shape[1] >= _ROW_MIN for array in left)
    cosine = _worst_cosine(left, right) if by_row else _whole_cosine(left, right)
    wide = min(array.shape[1] for array in left)
    k = min(K, wide)
    top1 = _top_share(left, right, 1) if wide > 1 else None
    value = top1 if measure == "top1" and top1 is not None else max(0.0, cosine)
    return Agreement(
        output=output.name,
        measure="top1" if value is top1 else "cosine",
        value=value,
        max_abs=max((_largest(a, b) for a, b in zip(left, right, strict=True)), default=0.0),
        cosine=cosine,
        top1=top1,
        topk=_top_share(left, right, k) if wide > k else None,
        k=k,
        rows=rows,
        finite=True,
        by_row=by_row,
    )


def overall(outputs: Sequence[Agreement]) -> Agreement:
    """Return the output that agrees least."""
    return min(outputs, key=lambda one: (one.value, one.output))


def tolerances(seen: Mapping[str, Agreement], golden: Mapping[str, Agreement]) -> tuple[Compare, ...]:
    """Return the rules of a variant's golden test.

    Args:
        seen: By output, over all inputs that were measured.
        golden: By output, over the golden sample the rules are for.

    What was seen, times ``MARGIN``: the larger of both differences, the smaller cosine. The best class of the golden
    sample must stay what it was there, since that is what a person relies on.
    """
    rules: list[Compare] = []
    for name, on_golden in golden.items():
        other = seen.get(name, on_golden)
        largest = max(on_golden.max_abs or 0.0, other.max_abs or 0.0)
        if on_golden.measure == "exact":
            rules.append(Compare(output=name, metric="max_abs", atol=largest))
            continue
        if on_golden.measure == "top1" and on_golden.top1 is not None:
            rules.append(Compare(output=name, metric="topk", k=1, min=_floor(on_golden.top1)))
        elif on_golden.by_row and on_golden.cosine is not None:
            worst = min(on_golden.cosine, other.cosine if other.cosine is not None else 1.0)
            rules.append(Compare(output=name, metric="cosine", min=_floor(1 - MARGIN * (1 - worst) - _ATOL_MIN)))
        rules.append(Compare(output=name, metric="max_abs", atol=_ceiling(max(largest * MARGIN, _ATOL_MIN))))
    return tuple(rules)


def _is_classes(output: Output, wanted: Sequence[Array]) -> bool:
    if any(array.ndim != 2 or array.shape[1] < 2 for array in wanted):
        return False
    if output.semantic in _CLASS_SEMANTICS or output.classes == wanted[0].shape[1]:
        return True
    if any(part in output.name.casefold() for part in _CLASS_NAMES):
        return True
    return all(bool(np.all(array >= 0)) and np.allclose(array.sum(axis=1), 1, atol=1e-3) for array in wanted)


def _exact(output: Output, wanted: Sequence[Array], found: Sequence[Array]) -> Agreement:
    equal = sum(int(np.sum(a == b)) for a, b in zip(wanted, found, strict=True))
    size = sum(array.size for array in wanted)
    numbers = wanted[0].dtype.kind in "iub"
    return Agreement(
        output=output.name,
        measure="exact",
        value=equal / size if size else 1.0,
        max_abs=max(
            (_largest(a.astype(np.float64), b.astype(np.float64)) for a, b in zip(wanted, found, strict=True)),
            default=0.0,
        ) if numbers else None,
        cosine=None,
        top1=None,
        topk=None,
        k=0,
        rows=sum(len(array) if array.ndim else 1 for array in wanted),
        finite=True,
        by_row=False,
    )  # fmt: skip


def _none(output: Output, measure: Measure, *, rows: int) -> Agreement:
    """Return no agreement at all: other shapes, or values that are not finite."""
    return Agreement(
        output=output.name, measure=measure, value=0.0, max_abs=None, cosine=None, top1=None, topk=None, k=0,
        rows=rows, finite=False, by_row=False,
    )  # fmt: skip


def _worst_cosine(left: Sequence[Array], right: Sequence[Array]) -> float:
    return min((float(np.min(_cosines(a, b), initial=1.0)) for a, b in zip(left, right, strict=True)), default=1.0)


def _whole_cosine(left: Sequence[Array], right: Sequence[Array]) -> float:
    one, other = (np.concatenate([array.ravel() for array in side])[np.newaxis] for side in (left, right))
    return float(_cosines(one, other)[0])


def _cosines(left: Array, right: Array) -> Array:
    lengths = np.linalg.norm(left, axis=1) * np.linalg.norm(right, axis=1)
    products = np.sum(left * right, axis=1)
    cosines = np.where(lengths > 0, products / np.where(lengths > 0, lengths, 1), 0.0)
    return np.where(np.all(left == right, axis=1), 1.0, np.clip(cosines, -1.0, 1.0))


def _top_share(left: Sequence[Array], right: Sequence[Array], k: int) -> float:
    shares = [
        len(set(_best(a, k)) & set(_best(b, k))) / k
        for one, other in zip(left, right, strict=True)
        for a, b in zip(one, other, strict=True)
    ]
    return float(np.mean(shares)) if shares else 1.0


def _best(row: Array, k: int) -> list[int]:
    return [int(index) for index in np.argsort(-row, kind="stable")[:k]]


def _largest(left: Array, right: Array) -> float:
    with np.errstate(invalid="ignore"):
        return float(np.max(np.where(left == right, 0.0, np.abs(left - right)), initial=0.0))


def _by_rows(array: Array) -> Array:
    wide = np.asarray(array, np.float64)
    return wide.reshape(wide.shape[0], -1) if wide.ndim > 1 else wide.reshape(1, -1)


def _ceiling(value: float) -> float:
    """Return ``value`` rounded up to two significant digits."""
    if value <= 0:
        return 0.0
    step = 10.0 ** (math.floor(math.log10(value)) - 1)
    return float(f"{math.ceil(value / step - 1e-9) * step:.2g}")


def _floor(value: float) -> float:
    """Return ``value`` rounded down to six digits behind the point, never below zero."""
    return max(0.0, math.floor(value * 1e6) / 1e6)
