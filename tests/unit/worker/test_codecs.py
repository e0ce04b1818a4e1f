"""Open Inference Protocol bodies: every check of the contract, and no surprise on any bytes."""

from __future__ import annotations

import contextlib
import json
import struct
import tracemalloc
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from agent.errors import InvalidInputError, TensorError
from agent.worker import codecs, signature

SIGNATURE = signature.parse(
    {
        "inputs": [{"name": "x", "dtype": "float32", "shape": ["N", 2]}],
        "outputs": [{"name": "y", "dtype": "float32", "shape": ["N"]}, {"name": "z", "dtype": "bytes", "shape": ["N"]}],
    },
    batch_axis="N",
    rows_max=8,
)
X = {"name": "x", "datatype": "FP32", "shape": [1, 2], "data": [1.5, 2]}


def body(*inputs: Any, **fields: Any) -> bytes:
    return json.dumps({"inputs": list(inputs), **fields}).encode()


def decode(*inputs: Any, **fields: Any) -> codecs.OipRequest:
    return codecs.decode(body(*inputs, **fields), None, SIGNATURE)


def one(datatype: str, shape: list[int], data: Any) -> np.ndarray:
    request = decode({"name": "x", "datatype": datatype, "shape": shape, "data": data})
    return request.inputs["x"][1]


@pytest.mark.parametrize(
    ("datatype", "dtype", "data"),
    [
        ("BOOL", "bool", [True, False]),
        ("UINT8", "uint8", [0, 255]),
        ("INT8", "int8", [-128, 127]),
        ("UINT16", "uint16", [0, 65535]),
        ("INT16", "int16", [-32768, 1]),
        ("UINT32", "uint32", [0, 2**32 - 1]),
        ("INT32", "int32", [-(2**31), 1]),
        ("UINT64", "uint64", [0, 2**64 - 1]),
        ("INT64", "int64", [-(2**63), 2**63 - 1]),
        ("FP32", "float32", [1, 2.5]),
        ("FP64", "float64", [1e300, -1]),
    ],
)
def test_json_numbers_keep_their_values(datatype: str, dtype: str, data: list[Any]) -> None:
    array = one(datatype, [2], data)
    assert array.dtype == np.dtype(dtype)
    assert array.tolist() == data


@pytest.mark.parametrize("data", [[1, 2, 3, 4], [[1, 2], [3, 4]]])
def test_data_may_be_flat_or_nested(data: Any) -> None:
    assert one("INT32", [2, 2], data).tolist() == [[1, 2], [3, 4]]


def test_texts_are_utf8_elements() -> None:
    assert one("BYTES", [2, 1], [["grüß"], [""]]).tolist() == [["grüß".encode()], [b""]]


def test_empty_tensors_are_fine() -> None:
    assert one("FP32", [0, 2], []).shape == (0, 2)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"datatype": "FP8"}, "input 'x': unknown datatype 'FP8'"),
        ({"datatype": None}, "unknown datatype None"),
        ({"shape": [-1, 2]}, "integers from 0"),
        ({"shape": [1.0, 2]}, "integers from 0"),
        ({"shape": [True, 2]}, "integers from 0"),
        ({"shape": "1,2"}, "shape must be a list"),
        ({"shape": [2**40, 2**40]}, "too large"),
        ({"shape": [0, 2**40, 2**40], "data": []}, "too large"),
        ({"shape": [0, 2**100], "data": []}, "too large"),
        ({"shape": [1] * 17}, "at most 16"),
        ({"shape": [2, 2]}, "data of shape [2], 'shape' says [2, 2]"),
        ({"data": [[1, 2, 3]]}, "data of shape [1, 3]"),
        ({"data": [[1], [2, 3]]}, "ragged"),
        ({"data": "12"}, "needs 'data', a list"),
        ({"data": ["1", "2"]}, "is not all FP32"),
        ({"data": [1e39, 0]}, "does not fit FP32"),
        ({"data": [None, 1]}, "not all FP32"),
        ({"datatype": "INT8", "data": [128, 0]}, "values from 0 to 128 do not fit INT8"),
        ({"datatype": "UINT8", "data": [-1, 0]}, "do not fit UINT8"),
        ({"datatype": "UINT64", "data": [2**64, 0]}, "do not fit UINT64"),
        ({"datatype": "INT32", "data": [1.5, 2]}, "not all INT32"),
        ({"datatype": "BOOL", "data": [0, 1]}, "not all BOOL"),
        ({"datatype": "INT32", "data": [True, False]}, "not all INT32"),
        ({"datatype": "FP16"}, "FP16 travels as binary only"),
        ({"datatype": "BF16"}, "BF16 travels as binary only"),
        ({"datatype": "BYTES", "data": [1, 2]}, "must be texts"),
        ({"parameters": []}, "'parameters' of input 'x' must be an object"),
        ({"parameters": {"shared_memory_region": "r"}}, "shared memory is not offered"),
        ({"parameters": {"binary_data_size": 8}}, "both 'data' and binary_data_size"),
        ({"parameters": {"binary_data_size": -1}}, "integer from 0"),
        ({"parameters": {"binary_data_size": True}}, "integer from 0"),
        ({"name": 3}, "object with a 'name'"),
    ],
)
def test_bad_inputs_are_refused_by_name(change: dict[str, Any], words: str) -> None:
    with pytest.raises(InvalidInputError, match=r".") as caught:
        decode(X | change)
    assert words in str(caught.value)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (b"", "not JSON"),
        (b"[]", "must be a JSON object"),
        (b"{}", "'inputs' must be a list"),
        (b'{"inputs": {}}', "'inputs' must be a list"),
        (b'{"inputs": [1]}', "object with a 'name'"),
        (b'{"inputs": [], "inputs": []}', "same key twice"),
        (b'{"inputs": [], "id": 7}', "'id' must be a text"),
        (b'{"inputs": [], "x": NaN}', "NaN is not a JSON number"),
        (b'{"inputs": [], "x": -Infinity}', "-Infinity"),
        (b"[" * 100_000, "nested too deeply"),
        (b'{"inputs": [], "x": ' + b"9" * 5000 + b"}", "not JSON"),
        (b"\xff\xfe", "not JSON"),
        (b'{"inputs": [], "parameters": {"timeout": "1"}}', "'timeout'"),
        (b'{"inputs": [], "parameters": {"binary_data_output": 1}}', "'binary_data_output'"),
    ],
)
def test_bad_documents_are_refused(text: bytes, words: str) -> None:
    with pytest.raises(InvalidInputError) as caught:
        codecs.decode(text, None, SIGNATURE)
    assert words in str(caught.value)


@pytest.mark.parametrize(
    ("entry", "words"),
    [
        ({"name": "q"}, "unknown output 'q'; the model gives y, z"),
        ({"name": "y", "parameters": {"classification": 3}}, "classification extension is not offered"),
        ({"name": "y", "parameters": {"shared_memory_region": "r"}}, "shared memory is not offered"),
        ({"name": "y", "parameters": {"binary_data": "yes"}}, "'binary_data' of output 'y'"),
    ],
)
def test_bad_outputs_are_refused(entry: dict[str, Any], words: str) -> None:
    with pytest.raises(InvalidInputError) as caught:
        decode(X, outputs=[entry])
    assert words in str(caught.value)


def test_names_given_twice_are_refused() -> None:
    with pytest.raises(InvalidInputError, match="input 'x' is given twice"):
        decode(X, X)
    with pytest.raises(InvalidInputError, match="output 'y' is given twice"):
        decode(X, outputs=[{"name": "y"}, {"name": "y"}])


def test_a_requests_own_timeout_and_id_are_kept() -> None:
    request = decode(X, id="a", parameters={"timeout": 1500, "priority": 1, "mine": "x"})
    assert (request.id, request.timeout_s) == ("a", 0.0015)


# binary


def binary(*tensors: tuple[str, str, list[int], bytes], extra: bytes = b"", **fields: Any) -> tuple[bytes, int]:
    entries = [
        {"name": name, "datatype": datatype, "shape": shape, "parameters": {"binary_data_size": len(data)}}
        for name, datatype, shape, data in tensors
    ]
    head = body(*entries, **fields)
    return head + b"".join(data for *_, data in tensors) + extra, len(head)


@pytest.mark.parametrize(
    ("datatype", "data", "values"),
    [
        ("FP32", struct.pack("<2f", 1.5, -2), [1.5, -2.0]),
        ("FP16", struct.pack("<2e", 1.5, -2), [1.5, -2.0]),
        ("BF16", bytes.fromhex("c03f00c0"), [1.5, -2.0]),
        ("INT64", struct.pack("<2q", -1, 2), [-1, 2]),
        ("BOOL", b"\x00\x01", [False, True]),
        ("BYTES", b"\x01\x00\x00\x00a\x00\x00\x00\x00", [b"a", b""]),
    ],
)
def test_binary_tensors_are_read_in_order(datatype: str, data: bytes, values: list[Any]) -> None:
    packed, length = binary(("a", "UINT8", [1], b"\x07"), ("x", datatype, [2], data))
    request = codecs.decode(packed, length, SIGNATURE)
    assert request.inputs["a"][1].tolist() == [7]
    assert request.inputs["x"][1].tolist() == values


def test_binary_and_json_tensors_mix() -> None:
    entry = {"name": "b", "datatype": "UINT8", "shape": [2], "parameters": {"binary_data_size": 2}}
    head = body(X, entry)
    request = codecs.decode(head + b"\x01\x02", len(head), SIGNATURE)
    assert request.inputs["b"][1].tolist() == [1, 2]
    assert request.inputs["x"][1].tolist() == [[1.5, 2.0]]


@pytest.mark.parametrize(
    ("tensor", "extra", "words"),
    [
        (("x", "FP32", [2], b"1234567"), b"", "takes 8 bytes, not 7"),
        (("x", "FP32", [1], b"1234"), b"!", "1 bytes behind the last"),
        (("x", "BYTES", [1], b"\x05\x00\x00\x00a"), b"", "input 'x': bytes tensor: element runs past"),
        (("x", "BYTES", [2], b"\x01\x00\x00\x00a"), b"", "1 elements for shape [2]"),
        (("x", "BYTES", [1], b"\x01"), b"", "truncated"),
    ],
)
def test_binary_sizes_must_add_up(tensor: Any, extra: bytes, words: str) -> None:
    packed, length = binary(tensor, extra=extra)
    with pytest.raises(InvalidInputError) as caught:
        codecs.decode(packed, length, SIGNATURE)
    assert words in str(caught.value)


def test_a_binary_size_beyond_the_body_is_refused() -> None:
    head = body({"name": "x", "datatype": "UINT8", "shape": [9], "parameters": {"binary_data_size": 9}})
    with pytest.raises(TensorError, match="9 binary bytes, the body has 3 left"):
        codecs.decode(head + b"123", len(head), SIGNATURE)


@pytest.mark.parametrize("length", [-1, 10_000, "12", 1.0, True])
def test_a_wrong_length_of_the_json_part_is_refused(length: Any) -> None:
    with pytest.raises(InvalidInputError, match="JSON part"):
        codecs.decode(body(X), length, SIGNATURE)


# raw requests


def one_input(dtype: str, shape: list[Any]) -> signature.Signature:
    raw = {
        "inputs": [{"name": "x", "dtype": dtype, "shape": shape}],
        "outputs": [{"name": "y", "dtype": "float32", "shape": ["N"]}],
    }
    return signature.parse(raw, batch_axis="N", rows_max=8)


@pytest.mark.parametrize(
    ("dtype", "shape", "data", "found"),
    [
        ("float32", ["N", 2], bytes(24), (3, 2)),
        ("uint8", [1, None], b"abc", (1, 3)),
        ("uint8", [2, 2], b"abcd", (2, 2)),
        ("bytes", [1], b"text", (1,)),
        ("bytes", ["N", 1], b"text", (1, 1)),
    ],
)
def test_a_raw_request_is_the_one_input(dtype: str, shape: list[Any], data: bytes, found: Any) -> None:
    request = codecs.decode(data, 0, one_input(dtype, shape))
    assert request.inputs["x"][1].shape == found
    assert request.binary


@pytest.mark.parametrize(
    ("dtype", "shape", "data", "words"),
    [
        ("float32", ["N", 2], bytes(25), "not a whole number of float32[N, 2]"),
        ("float32", ["N", None], bytes(24), "cannot be sent raw"),
        ("float32", [2, 2], bytes(24), "takes 16 bytes, not 24"),
        ("float32", ["N", 0], b"", "not a whole number"),
        ("bytes", [2], b"x", "cannot be sent raw"),
    ],
)
def test_a_raw_request_whose_shape_does_not_follow_is_refused(
    dtype: str, shape: list[Any], data: bytes, words: str
) -> None:
    with pytest.raises(InvalidInputError) as caught:
        codecs.decode(data, 0, one_input(dtype, shape))
    assert words in str(caught.value)


# answers


OUTPUTS = {"y": np.array([1.5, 2], np.float32), "z": np.array(["a", b"b"], dtype=object)}


def encode(outputs: Any = None, arrays: Any = OUTPUTS, **fields: Any) -> tuple[int | None, bytes]:
    request = decode(X, **fields, **({"outputs": outputs} if outputs else {}))
    length, buffers = codecs.encode(request, arrays, model="m", version="1")
    return length, b"".join(bytes(part) for part in buffers)


def test_an_answer_without_binary_is_json() -> None:
    length, text = encode(id="7")
    assert length is None
    assert json.loads(text) == {
        "model_name": "m",
        "model_version": "1",
        "id": "7",
        "outputs": [
            {"name": "y", "datatype": "FP32", "shape": [2], "data": [1.5, 2.0]},
            {"name": "z", "datatype": "BYTES", "shape": [2], "data": ["a", "b"]},
        ],
    }


def test_binary_is_chosen_per_output_or_for_all() -> None:
    length, answer = encode([{"name": "z", "parameters": {"binary_data": True}}, {"name": "y"}])
    document = json.loads(answer[:length])
    assert [entry["name"] for entry in document["outputs"]] == ["z", "y"]
    assert document["outputs"][0]["parameters"] == {"binary_data_size": 10}
    assert document["outputs"][1]["data"] == [1.5, 2.0]
    assert answer[length:] == b"\x01\x00\x00\x00a\x01\x00\x00\x00b"

    length, answer = encode(parameters={"binary_data_output": True})
    assert answer[length:] == OUTPUTS["y"].tobytes() + b"\x01\x00\x00\x00a\x01\x00\x00\x00b"

    own = [{"name": "y", "parameters": {"binary_data": False}}]
    assert encode(own, parameters={"binary_data_output": True})[0] is None


@pytest.mark.parametrize(
    ("array", "words"),
    [
        (np.array([np.nan], np.float32), "NaN or infinity"),
        (np.array([np.inf]), "NaN or infinity"),
        (np.array([1], np.float16), "FP16, which travels as binary only"),
        (np.array([b"\xff"], dtype=object), "not text"),
    ],
)
def test_what_json_cannot_carry_is_refused_with_advice(array: np.ndarray, words: str) -> None:
    with pytest.raises(InvalidInputError) as caught:
        encode([{"name": "y"}], {"y": array})
    assert words in str(caught.value)
    assert "ask for binary_data" in str(caught.value)
    length, _ = encode([{"name": "y", "parameters": {"binary_data": True}}], {"y": array})
    assert length is not None


# any bytes at all


@given(st.binary(max_size=200), st.one_of(st.none(), st.integers(-5, 300)))
def test_random_bytes_never_surprise(data: bytes, length: int | None) -> None:
    with contextlib.suppress(InvalidInputError):
        codecs.decode(data, length, SIGNATURE)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4),
    max_leaves=12,
)
ENTRY = st.fixed_dictionaries(
    {"name": st.sampled_from(["x", "y"]) | JSON},
    optional={
        "datatype": st.sampled_from(["FP32", "INT8", "UINT64", "BOOL", "BYTES", "FP16", "BF16"]) | JSON,
        "shape": st.lists(st.integers(-1, 4), max_size=3) | JSON,
        "data": st.lists(st.integers(-300, 300) | st.floats(allow_nan=False, allow_infinity=False), max_size=6) | JSON,
        "parameters": st.fixed_dictionaries({}, optional={"binary_data_size": st.integers(-1, 20) | JSON}) | JSON,
    },
)


@given(
    st.fixed_dictionaries(
        {"inputs": st.lists(ENTRY, max_size=3) | JSON},
        optional={"outputs": st.lists(ENTRY, max_size=2) | JSON, "parameters": JSON, "id": JSON},
    ),
    st.binary(max_size=24),
)
def test_any_document_is_decoded_or_refused(document: dict[str, Any], rest: bytes) -> None:
    head = json.dumps(document).encode()
    try:
        request = codecs.decode(head + rest, len(head), SIGNATURE)
    except InvalidInputError:
        return
    for entry in document["inputs"]:
        assert list(request.inputs[entry["name"]][1].shape) == entry["shape"]


ARRAYS = st.sampled_from(["bool", "uint8", "int8", "uint16", "int32", "int64", "uint64", "float32", "float64"]).flatmap(
    lambda name: hnp.arrays(
        name,
        hnp.array_shapes(min_dims=1, max_dims=3, min_side=0, max_side=4),
        elements={"allow_nan": False, "allow_infinity": False} if name.startswith("float") else None,
    )
)


@given(ARRAYS, st.booleans())
def test_what_is_encoded_decodes_to_itself(array: np.ndarray, as_binary: bool) -> None:
    asked = codecs.OipRequest({}, None, None, as_binary, None)
    length, buffers = codecs.encode(asked, {"y": array}, model="m", version="1")
    answer = b"".join(bytes(part) for part in buffers)
    document = json.loads(answer[:length])
    sent = json.dumps({"inputs": document["outputs"]}).encode()
    request = codecs.decode(sent + (answer[length:] if length else b""), len(sent), SIGNATURE)
    back = request.inputs["y"][1]
    assert back.dtype == array.dtype
    np.testing.assert_array_equal(back, array)


@pytest.mark.parametrize("data", [["x" * 100_000] + ["a"] * 10_000, [["x" * 100_000], *[["a"]] * 10_000]])
@pytest.mark.parametrize("datatype", ["FP32", "INT64", "UINT64", "BOOL"])
def test_texts_among_numbers_cost_no_more_than_they_weigh(datatype: str, data: list[Any]) -> None:
    """An array of texts gives each the room of the longest: here 4 GB for a body of 140 KB."""
    tracemalloc.start()
    try:
        with pytest.raises(TensorError, match="not all"):
            one(datatype, [len(data)], data)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 64 * 1024 * 1024
