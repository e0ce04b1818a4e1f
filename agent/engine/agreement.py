"""Whether two versions answered the same request alike. Pure, and without NumPy: it runs in the daemon.

Equal bytes agree. Otherwise outputs are compared by the metric of the manifest's golden samples where that says what
matters (``topk``, ``cosine``); scores of classes by the best class; other numbers within the manifest's tolerance or a
hundredth, whichever is laxer: it is another version. All else must be equal. In JSON, of labels with scores the best
one counts.
Promises: the work is bounded, whatever the size of the answers: at most ``_VALUES_MAX`` values of each are looked at,
whole rows at even distances. What makes no sense is no agreement, and the reason says why; a document too large to be
parsed here is not compared.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Final, NamedTuple

import msgspec

from agent.errors import TensorError
from agent.wire import DTYPES, Buffer, parse_tensors

_EQUAL_BYTES_MAX: Final = 1 << 20  # larger ones are not compared byte by byte
_VALUES_MAX: Final = 2048  # half a millisecond
_JSON_BYTES_MAX: Final = 1 << 16
_JSON_DEPTH_MAX: Final = 16
_CLOSE: Final = 0.01  # of the larger magnitude
_COSINE_MIN: Final = 0.99
_FORMATS: Final[Mapping[str, str]] = {
    "bool": "?", "uint8": "B", "int8": "b", "uint16": "H", "int16": "h", "uint32": "I", "int32": "i", "uint64": "Q",
    "int64": "q", "float16": "e", "float32": "f", "float64": "d",
}  # fmt: skip
_OF_OIP: Final[Mapping[str, str]] = {
    "BOOL": "bool", "UINT8": "uint8", "INT8": "int8", "UINT16": "uint16", "INT16": "int16", "UINT32": "uint32",
    "INT32": "int32", "UINT64": "uint64", "INT64": "int64", "FP16": "float16", "BF16": "bfloat16", "FP32": "float32",
    "FP64": "float64", "BYTES": "bytes",
}  # fmt: skip
_LABELS: Final = ("label", "class", "class_name", "name")
_SCORES: Final = ("score", "confidence", "probability", "prob")


class Rules(NamedTuple):
    """What the manifest says about comparing outputs."""

    by_output: Mapping[str, Mapping[str, Any]]  # the first entry of ``compare`` for each
    classes: bool  # whether rows of numbers are scores of classes


class Agreement(NamedTuple):
    """How far two answers agree: the share of their rows that do, and what differs in the others."""

    share: float  # 0..1
    reason: str = ""


class _Output(NamedTuple):
    """One output of an answer."""

    dtype: str
    shape: tuple[int, ...]
    data: Buffer | Sequence[Any]  # its bytes, or its values in row-major order


_RowsAgree = Callable[[Sequence[Any], Sequence[Any]], bool]
# What malformed answers make of the code below: a candidate may say anything.
_NONSENSE: Final = (
    TensorError, ArithmeticError, AttributeError, LookupError, TypeError, ValueError, RecursionError, struct.error,
    msgspec.MsgspecError,
)  # fmt: skip
_AGREES: Final = Agreement(1.0)


def rules_of(worker: Mapping[str, Any]) -> Rules:
    """Return the rules of a variant, from what its worker is told."""
    rules: dict[str, Mapping[str, Any]] = {}
    for entry in worker.get("golden", ()):
        for rule in entry.get("compare", ()):
            rules.setdefault(str(rule.get("output")), rule)
    return Rules(rules, bool(worker.get("classes_file")))


def compare(
    found: Mapping[str, Any], found_body: Buffer, wanted: Mapping[str, Any], wanted_body: Buffer, rules: Rules
) -> Agreement | None:
    """Return how far two answers to one request agree; ``None`` if they are too large to tell.

    Args:
        found: The candidate's ``result`` or ``error`` header.
        found_body: Its body.
        wanted: The ``result`` header of the version that serves.
        wanted_body: Its body.
        rules: From ``rules_of``.
    """
    if found["kind"] == "error":
        return Agreement(0.0, f"error {found.get('code')}")
    if found.get("content_type") != wanted.get("content_type"):
        return Agreement(0.0, f"content type {found.get('content_type')}, not {wanted.get('content_type')}")
    small = max(len(found_body), len(wanted_body)) <= _EQUAL_BYTES_MAX
    if small and found.get("tensors") == wanted.get("tensors") and found_body == wanted_body:
        return _AGREES
    try:
        content_type = str(wanted.get("content_type") or "")
        if not content_type:
            return _outputs_agree(_tensors(found, found_body), _tensors(wanted, wanted_body), rules)
        json_bytes = [_json_bytes(found, found_body), _json_bytes(wanted, wanted_body)]
        if max(json_bytes) > _JSON_BYTES_MAX:
            return None
        if all(json_bytes):
            mine, theirs = _json(found_body, json_bytes[0]), _json(wanted_body, json_bytes[1])
            if _is_oip(mine) and _is_oip(theirs):
                left, right = _oip(mine, found_body, json_bytes[0]), _oip(theirs, wanted_body, json_bytes[1])
                return _outputs_agree(left, right, rules)
            return _documents_agree(mine, theirs)
    except _NONSENSE as error:
        return Agreement(0.0, f"cannot be compared: {str(error)[:120]}")
    return Agreement(0.0, "the bodies are not equal") if small else None


def _tensors(header: Mapping[str, Any], body: Buffer) -> dict[str, _Output]:
    view = memoryview(body)
    return {
        tensor.name: _Output(tensor.dtype, tensor.shape, view[tensor.offset : tensor.offset + tensor.nbytes])
        for tensor in parse_tensors(header.get("tensors"), len(view))
    }


def _json_bytes(header: Mapping[str, Any], body: Buffer) -> int:
    """Return how much of the body, from its beginning, is a JSON document; 0 if none is."""
    params = header.get("params")
    told = params.get("oip_header_bytes") if isinstance(params, dict) else None
    if isinstance(told, int):
        return told if 0 <= told <= len(body) else 0
    content_type = str(header.get("content_type")).partition(";")[0].strip().lower()
    return len(body) if content_type.endswith("json") else 0


def _json(body: Buffer, size: int) -> Any:
    return msgspec.json.decode(memoryview(body)[:size])


def _is_oip(document: Any) -> bool:
    """Whether this is an Open Inference Protocol answer; its version's name is no part of what it says."""
    outputs = document.get("outputs") if isinstance(document, dict) else None
    return isinstance(outputs, list) and all(isinstance(entry, dict) and "datatype" in entry for entry in outputs)


def _oip(document: Any, body: Buffer, offset: int) -> dict[str, _Output]:
    view, outputs = memoryview(body), {}
    for entry in document["outputs"]:
        size = (entry.get("parameters") or {}).get("binary_data_size")
        dtype, shape = _OF_OIP[entry["datatype"]], tuple(int(length) for length in entry["shape"])
        data = list(entry["data"]) if size is None else view[offset : offset + size]
        outputs[str(entry["name"])] = _Output(dtype, shape, data)
        offset += size or 0
    return outputs


def _outputs_agree(found: Mapping[str, _Output], wanted: Mapping[str, _Output], rules: Rules) -> Agreement:
    """Return the worst output's agreement."""
    if found.keys() != wanted.keys():
        return Agreement(0.0, f"outputs {', '.join(sorted(found))}, not {', '.join(sorted(wanted))}")
    verdicts = [_output_agrees(name, found[name], wanted[name], rules) for name in sorted(wanted)]
    return min(verdicts, key=lambda verdict: verdict.share, default=_AGREES)


def _output_agrees(name: str, found: _Output, wanted: _Output, rules: Rules) -> Agreement:
    if found.shape != wanted.shape:
        return Agreement(0.0, f"{name}: shape {list(found.shape)}, not {list(wanted.shape)}")
    if not math.prod(wanted.shape):
        return _AGREES
    if "bytes" in (found.dtype, wanted.dtype):
        equal = found.dtype == wanted.dtype and found.data == wanted.data
        return _AGREES if equal else Agreement(0.0, f"{name}: texts differ")
    rows = list(zip(_rows(found), _rows(wanted), strict=True))
    text, agrees = _metric(wanted, rules.by_output.get(name), classes=rules.classes)
    right = sum(1 for mine, theirs in rows if agrees(mine, theirs))
    return _AGREES if right == len(rows) else Agreement(right / len(rows), f"{name}: {text}")


def _metric(wanted: _Output, rule: Mapping[str, Any] | None, *, classes: bool) -> tuple[str, _RowsAgree]:
    """Return what differs in rows that do not agree, in words, and whether two rows do."""
    metric, columns = rule.get("metric", "allclose") if rule else "", wanted.shape[-1] if wanted.shape else 1
    scores = wanted.dtype.startswith(("float", "bfloat")) and len(wanted.shape) == 2 and 1 < columns <= _VALUES_MAX
    if rule and metric == "topk" and columns <= _VALUES_MAX:
        k = max(1, min(int(rule.get("k", 1)), columns))
        return f"another set of the {k} best" if k > 1 else "another best class", partial(_same_best, k=k)
    if rule and metric == "cosine":
        least = float(rule.get("min") or _COSINE_MIN)
        return f"cosine below {least:g}", lambda mine, theirs: _cosine(mine, theirs) >= least
    if scores and (classes or not rule):
        return "another best class", partial(_same_best, k=1)
    if wanted.dtype.startswith(("bool", "int", "uint")):
        return "other values", lambda mine, theirs: mine == theirs
    rtol = max(_CLOSE, float(rule.get("rtol", 0.0)) if rule else 0.0)
    atol = float(rule.get("atol", 0.0)) if rule else 0.0
    return f"beyond rtol {rtol:g}, atol {atol:g}", partial(_close, rtol=rtol, atol=atol)


def _rows(output: _Output) -> list[Sequence[Any]]:
    """Return rows of the last axis at even distances, all of them if they are few; of a longer one a part."""
    columns = output.shape[-1] if output.shape else 1
    count = math.prod(output.shape) // columns
    kept = min(count, max(1, _VALUES_MAX // columns))
    return [_values(output, (index * count // kept) * columns, min(columns, _VALUES_MAX)) for index in range(kept)]


def _values(output: _Output, start: int, count: int) -> Sequence[Any]:
    if isinstance(output.data, list):
        return output.data[start : start + count]
    data, width = output.data, DTYPES[output.dtype]
    assert isinstance(data, Buffer)
    assert width is not None
    if output.dtype == "bfloat16":
        halves = struct.unpack_from(f"<{count}H", data, start * width)
        return struct.unpack(f"<{count}f", struct.pack(f"<{count}I", *(half << 16 for half in halves)))
    return struct.unpack_from(f"<{count}{_FORMATS[output.dtype]}", data, start * width)


def _same_best(mine: Sequence[float], theirs: Sequence[float], *, k: int) -> bool:
    """Whether the same ``k`` are the largest; rows that hold what is no number agree with nothing."""
    if not all(map(math.isfinite, (*mine, *theirs))):
        return False
    return _largest(mine, k) == _largest(theirs, k)


def _largest(row: Sequence[float], k: int) -> set[int]:
    if k == 1:
        return {row.index(max(row))}
    return set(sorted(range(len(row)), key=lambda index: -row[index])[:k])


def _cosine(mine: Sequence[float], theirs: Sequence[float]) -> float:
    if mine == theirs:
        return 1.0
    length = math.hypot(*mine) * math.hypot(*theirs)
    return sum(a * b for a, b in zip(mine, theirs, strict=True)) / length if length > 0 else 0.0


def _close(mine: Sequence[float], theirs: Sequence[float], *, rtol: float, atol: float) -> bool:
    """Whether each number is as near as it must be; small ones are measured by the largest of the row."""
    slack = max(atol, rtol * max((abs(b) for b in theirs if math.isfinite(b)), default=0.0))
    return all(abs(a - b) <= slack or a == b or (a != a and b != b) for a, b in zip(mine, theirs, strict=True))


# Documents


def _documents_agree(found: Any, wanted: Any) -> Agreement:
    share, reason = _parts_agree(found, wanted, 0)
    return _AGREES if share == 1.0 else Agreement(share, reason)


def _parts_agree(found: Any, wanted: Any, depth: int) -> Agreement:
    if found == wanted:
        return _AGREES
    if depth > _JSON_DEPTH_MAX:
        return Agreement(0.0, "documents nested too deeply")
    if _is_number(found) and _is_number(wanted):
        close = math.isclose(found, wanted, rel_tol=_CLOSE)
        return _AGREES if close else Agreement(0.0, "other numbers")
    mine, theirs = _best_label(found), _best_label(wanted)
    if theirs is not None:
        return _AGREES if mine == theirs else Agreement(0.0, "another best label")
    if isinstance(found, dict) and isinstance(wanted, dict) and found.keys() == wanted.keys():
        parts = [_parts_agree(found[name], wanted[name], depth + 1) for name in wanted]
        return min(parts, key=lambda part: part.share, default=_AGREES)
    if isinstance(found, list) and isinstance(wanted, list) and len(found) == len(wanted):
        if all(map(_is_number, wanted)) and all(map(_is_number, found)):
            return _numbers_agree(found, wanted)
        parts = [_parts_agree(mine, theirs, depth + 1) for mine, theirs in zip(found, wanted, strict=True)]
        worst = min(parts, key=lambda part: part.share, default=_AGREES)
        return Agreement(sum(part.share for part in parts) / len(parts), worst.reason) if parts else _AGREES
    return Agreement(0.0, "other documents")


def _numbers_agree(found: Sequence[float], wanted: Sequence[float]) -> Agreement:
    return _AGREES if _close(found, wanted, rtol=_CLOSE, atol=0.0) else Agreement(0.0, "other numbers")


def _best_label(value: Any) -> Any:
    """Return the best of labels with scores, ``None`` if ``value`` is no such thing."""
    if isinstance(value, dict):
        if len(value) > 1 and all(map(_is_number, value.values())):
            return max(value, key=lambda name: float(value[name]))
        scored = any(name in value for name in _SCORES)
        return next((value[name] for name in _LABELS if scored and isinstance(value.get(name), str)), None)
    if isinstance(value, list) and value and all(isinstance(item, dict) for item in value):
        return _best_label(value[0]) if all(any(name in item for name in _LABELS) for item in value) else None
    return None


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
