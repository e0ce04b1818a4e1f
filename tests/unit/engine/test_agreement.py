"""Two answers to one request, compared by what matters in them."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agent.engine.agreement import Rules, compare, rules_of
from agent.tensors import Array, pack

pytestmark = pytest.mark.unit

NONE = Rules({}, classes=False)
CLASSES = Rules({}, classes=True)
Answer = tuple[dict[str, Any], bytes]


def tensors(**arrays: Array) -> Answer:
    entries, buffers = pack(arrays)
    return {"kind": "result", "tensors": entries}, b"".join(buffers)


def document(value: Any, content_type: str = "application/json") -> Answer:
    return {"kind": "result", "content_type": content_type}, json.dumps(value).encode()


def oip(version: str, array: Array, *, binary: bool) -> Answer:
    entry: dict[str, Any] = {"name": "y", "datatype": "FP32", "shape": list(array.shape)}
    data = array.astype("<f4").tobytes() if binary else b""
    if binary:
        entry["parameters"] = {"binary_data_size": len(data)}
    else:
        entry["data"] = array.reshape(-1).tolist()
    head = json.dumps({"model_name": "m", "model_version": version, "outputs": [entry]}).encode()
    if not binary:
        return {"kind": "result", "content_type": "application/json"}, head
    header = {"kind": "result", "content_type": "application/octet-stream", "params": {"oip_header_bytes": len(head)}}
    return header, head + data


def share(found: Answer, wanted: Answer, rules: Rules = NONE) -> float:
    agreement = compare(*found, *wanted, rules)
    assert agreement is not None
    return agreement.share


SCORES = np.array([[0.1, 0.7, 0.2], [0.5, 0.2, 0.3]], dtype=np.float32)
SAME_BEST = np.array([[0.3, 0.4, 0.3], [0.8, 0.1, 0.1]], dtype=np.float32)
ONE_OTHER = np.array([[0.1, 0.7, 0.2], [0.2, 0.5, 0.3]], dtype=np.float32)


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
@pytest.mark.parametrize("rules", [NONE, CLASSES])
def test_scores_agree_by_their_best_class_row_by_row(dtype: str, rules: Rules) -> None:
    wanted = tensors(y=SCORES.astype(dtype))
    assert share(tensors(y=SAME_BEST.astype(dtype)), wanted, rules) == 1.0
    assert share(tensors(y=ONE_OTHER.astype(dtype)), wanted, rules) == 0.5


def test_another_precision_may_answer_alike() -> None:
    assert share(tensors(y=SAME_BEST.astype("float64")), tensors(y=SCORES)) == 1.0


def test_bfloat16_is_read() -> None:
    def bfloat(array: Array) -> Answer:
        data = (np.ascontiguousarray(array, "<f4").view("<u4") >> 16).astype("<u2").tobytes()
        entry = {"name": "y", "dtype": "bfloat16", "shape": list(array.shape), "nbytes": len(data)}
        return {"kind": "result", "tensors": [entry]}, data

    assert share(bfloat(SAME_BEST), bfloat(SCORES)) == 1.0
    assert share(bfloat(ONE_OTHER), bfloat(SCORES)) == 0.5


@pytest.mark.parametrize(
    ("rule", "agrees"),
    [
        ({"metric": "topk", "k": 1}, True),
        ({"metric": "topk", "k": 2}, False),
        ({"metric": "cosine", "min": 0.5}, True),
        ({"metric": "cosine", "min": 0.99}, False),
        ({"metric": "allclose", "rtol": 1e-5}, False),
        ({"metric": "max_abs", "atol": 0.5}, True),
    ],
)
def test_the_manifests_metric_is_taken(rule: dict[str, Any], agrees: bool) -> None:
    found, wanted = tensors(y=np.array([[0.4, 0.3, 0.1]])), tensors(y=np.array([[0.5, 0.1, 0.3]]))
    assert (share(found, wanted, Rules({"y": rule}, classes=False)) == 1.0) is agrees


def test_a_tolerance_for_variants_is_widened_to_a_hundredth_between_versions() -> None:
    rules = Rules({"y": {"metric": "allclose", "rtol": 1e-5}}, classes=False)
    wanted = tensors(y=np.array([[100.0, 1.0]]))
    assert share(tensors(y=np.array([[100.5, 1.4]])), wanted, rules) == 1.0
    assert share(tensors(y=np.array([[102.0, 1.0]])), wanted, rules) == 0.0


def test_rules_come_from_what_the_worker_is_told() -> None:
    first, second = {"output": "y", "metric": "topk"}, {"output": "y", "metric": "cosine"}
    worker = {"golden": [{"compare": [first]}, {"compare": [second]}], "classes_file": "classes.txt"}
    assert rules_of(worker) == Rules({"y": first}, classes=True)
    assert rules_of({}) == NONE


@pytest.mark.parametrize(
    ("found", "agrees"),
    [
        (tensors(y=np.array([1, 2], dtype=np.int64)), True),
        (tensors(y=np.array([1, 3], dtype=np.int64)), False),
        (tensors(y=np.array([[1, 2]], dtype=np.int64)), False),
        (tensors(z=np.array([1, 2], dtype=np.int64)), False),
        (tensors(y=np.array([b"a", b"b"], dtype=object)), False),
    ],
)
def test_other_values_must_be_equal(found: Answer, agrees: bool) -> None:
    assert (share(found, tensors(y=np.array([1, 2], dtype=np.int64))) == 1.0) is agrees


def test_what_is_no_number_agrees_with_nothing() -> None:
    bad = tensors(y=np.array([[np.nan, 1.0], [np.inf, 0.0]]))
    assert share(bad, tensors(y=np.array([[0.0, 1.0], [1.0, 0.0]]))) == 0.0
    assert share(tensors(y=np.array([[0.0, 1.0], [1.0, 0.0]])), bad) == 0.0


@pytest.mark.parametrize("binary", [False, True])
def test_answers_of_the_open_inference_protocol_differ_in_their_version_only(binary: bool) -> None:
    wanted = oip("1.0.0", SCORES, binary=binary)
    assert share(oip("2.0.0", SAME_BEST, binary=binary), wanted) == 1.0
    assert share(oip("2.0.0", ONE_OTHER, binary=binary), wanted) == 0.5
    assert share(oip("2.0.0", SCORES, binary=not binary), oip("1.0.0", SCORES, binary=not binary)) == 1.0


@pytest.mark.parametrize(
    ("found", "wanted", "agreement"),
    [
        ({"cat": 0.6, "dog": 0.4}, {"cat": 0.9, "dog": 0.1}, 1.0),
        ({"cat": 0.4, "dog": 0.6}, {"cat": 0.9, "dog": 0.1}, 0.0),
        ([{"label": "cat", "score": 0.5}], [{"label": "cat", "score": 0.9}], 1.0),
        ([{"label": "dog", "score": 0.5}], [{"label": "cat", "score": 0.9}], 0.0),
        ({"label": "zip", "score": 0.5}, {"label": "zip", "score": 0.9}, 1.0),
        ({"y": [[1.0, 2.0]]}, {"y": [[1.001, 2.0]]}, 1.0),
        ({"y": [[1.0, 2.0]]}, {"y": [[1.5, 2.0]]}, 0.0),
        ([{"label": "a", "n": 1}, {"label": "b", "n": 2}], [{"label": "a", "n": 1}, {"label": "b", "n": 2}], 1.0),
        ("yes", "no", 0.0),
        ({"a": 1}, {"b": 1}, 0.0),
        ([1, "x"], [1, "y"], 0.5),
        ([], [1], 0.0),
    ],
)
def test_documents(found: Any, wanted: Any, agreement: float) -> None:
    assert share(document(found), document(wanted)) == agreement


def test_texts_agree_if_they_are_equal() -> None:
    plain = {"kind": "result", "content_type": "text/plain"}
    assert share((plain, b"hello"), (plain, b"hello")) == 1.0
    assert share((plain, b"hello"), (plain, b"world")) == 0.0
    assert share(({**plain, "content_type": "text/html"}, b"hello"), (plain, b"hello")) == 0.0


def test_an_error_of_the_candidate_is_named() -> None:
    verdict = compare({"kind": "error", "code": "handler_failed"}, b"", *tensors(y=SCORES), NONE)
    assert verdict == (0.0, "error handler_failed")


@pytest.mark.parametrize(
    "hostile",
    [
        ({"kind": "result", "tensors": [{"name": "y"}]}, b""),
        ({"kind": "result", "tensors": "nonsense"}, b"\0" * 24),
        ({"kind": "result", "tensors": tensors(y=SCORES)[0]["tensors"]}, b"short"),
        ({"kind": "result", "content_type": "application/json"}, b"{"),
        ({"kind": "result", "content_type": "application/json"}, b"[" * 5000 + b"]" * 5000),
        ({"kind": "result", "content_type": "application/octet-stream", "params": {"oip_header_bytes": -5}}, b"x"),
        ({"kind": "result", "content_type": "application/octet-stream", "params": {"oip_header_bytes": 9**30}}, b"x"),
    ],
)
def test_malformed_answers_are_no_agreement_and_no_fault_of_ours(hostile: Answer) -> None:
    for wanted in (tensors(y=SCORES), document({"a": 1}), oip("1.0.0", SCORES, binary=True)):
        assert share(hostile, wanted) == 0.0
        assert share((hostile[0], hostile[1] + b" "), hostile) <= 1.0


def test_the_work_is_bounded_whatever_the_size() -> None:
    wanted = np.random.default_rng(5).random((100, 2500), dtype=np.float32)
    unseen = wanted.copy()
    unseen[50, 7] += 2
    assert share(tensors(y=unseen), tensors(y=wanted)) == 1.0, "of large outputs a part is looked at"
    huge = np.ones((600, 600), dtype=np.float32)
    assert share(tensors(y=huge + 1), tensors(y=huge), Rules({"y": {"metric": "allclose"}}, classes=False)) == 0.0
    assert share(tensors(y=huge), tensors(y=huge)) == 1.0


def test_large_documents_are_not_compared() -> None:
    large = document(["x" * 70_000])
    assert compare(*large, *large, NONE) == (1.0, ""), "but equal ones agree"
    assert compare(*document(["y" * 70_000]), *large, NONE) is None
    text = {"kind": "result", "content_type": "text/plain"}
    assert compare(text, b"x" * (1 << 21), text, b"y" * (1 << 21), NONE) is None


_HEADERS = st.fixed_dictionaries(
    {"kind": st.just("result")},
    optional={
        "content_type": st.sampled_from(["application/json", "application/octet-stream", "text/plain", None, 5]),
        "params": st.one_of(st.none(), st.fixed_dictionaries({"oip_header_bytes": st.integers(-5, 300)})),
        "tensors": st.lists(
            st.fixed_dictionaries(
                {
                    "name": st.sampled_from(["y", "z", 3]),
                    "dtype": st.sampled_from(["float32", "bool", "bytes", "bfloat16", "int64", "none"]),
                    "shape": st.lists(st.integers(-2, 4), max_size=3),
                    "nbytes": st.integers(-1, 64),
                }
            ),
            max_size=2,
        ),
    },
)
_ENTRIES = st.fixed_dictionaries(
    {
        "name": st.sampled_from(["y", 3]),
        "datatype": st.sampled_from(["FP32", "BYTES", "BOOL", "NONE", None]),
        "shape": st.one_of(st.none(), st.lists(st.one_of(st.integers(-3, 9), st.text(max_size=2)), max_size=3)),
    },
    optional={
        "data": st.one_of(st.none(), st.lists(st.one_of(st.floats(), st.text(max_size=3), st.none()), max_size=9)),
        "parameters": st.one_of(st.lists(st.none()), st.fixed_dictionaries({"binary_data_size": st.integers(-9, 99)})),
    },
)
_VALUES = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=4)),
    lambda inner: st.one_of(
        st.lists(inner, max_size=4),
        st.dictionaries(st.sampled_from(["label", "score", "name", "a"]), inner, max_size=3),
    ),
    max_leaves=12,
)
_BODIES = st.one_of(
    st.binary(max_size=64),
    _VALUES.map(lambda value: json.dumps(value).encode()),
    st.lists(_ENTRIES, max_size=2).map(lambda entries: json.dumps({"outputs": entries}).encode()),
)
_RULES = st.sampled_from(
    [NONE, CLASSES, *(Rules({"y": {"metric": metric}}, classes=False) for metric in ("topk", "cosine", "max_abs"))]
)


@settings(max_examples=150, deadline=None)
@given(found=st.tuples(_HEADERS, _BODIES), wanted=st.tuples(_HEADERS, _BODIES), rules=_RULES)
def test_nothing_that_an_answer_says_is_a_fault_of_ours(found: Answer, wanted: Answer, rules: Rules) -> None:
    for mine, theirs in ((found, wanted), (found, (found[0], found[1] + b" ")), (found, found)):
        agreement = compare(*mine, *theirs, rules)
        assert agreement is None or 0.0 <= agreement.share <= 1.0
