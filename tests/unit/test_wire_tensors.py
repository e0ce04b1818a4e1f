"""Arrays become tensors and arrays again, unchanged and without copies where none is needed."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from agent.errors import TensorError
from agent.tensors import pack, pack_bytes, unpack, unpack_bytes
from agent.wire import Buffer

pytestmark = pytest.mark.unit

dtypes = st.one_of(
    npst.boolean_dtypes(),
    npst.integer_dtypes(endianness="="),
    npst.unsigned_integer_dtypes(endianness="="),
    npst.floating_dtypes(sizes=(16, 32, 64), endianness="="),
)

shapes = npst.array_shapes(min_dims=0, min_side=0, max_dims=4)


def joined(parts: list[Buffer]) -> bytes:
    return b"".join(bytes(part) for part in parts)


@given(st.dictionaries(st.text(min_size=1, max_size=5), npst.arrays(dtypes, shapes)))
def test_arrays_come_back_unchanged(arrays: dict[str, np.ndarray]) -> None:
    entries, parts = pack(arrays)
    back = unpack(entries, joined(parts))
    assert list(back) == list(arrays)
    for name, array in arrays.items():
        assert back[name].dtype == array.dtype
        np.testing.assert_array_equal(back[name], array)


@given(npst.arrays(object, shapes, elements=st.binary(max_size=9) | st.text(max_size=5)))
def test_text_and_bytes_come_back_as_bytes(array: np.ndarray) -> None:
    entries, parts = pack({"t": array})
    back = unpack(entries, joined(parts))["t"]
    assert back.shape == array.shape
    expected = [value.encode() if isinstance(value, str) else value for value in array.reshape(-1)]
    assert list(back.reshape(-1)) == expected


def test_a_contiguous_array_is_not_copied() -> None:
    array = np.arange(12, dtype=np.float32).reshape(3, 4)
    _, parts = pack({"x": array})
    assert np.shares_memory(np.frombuffer(parts[0], dtype=np.float32), array)


@pytest.mark.parametrize("array", [np.arange(12.0).reshape(3, 4).T, np.arange(12.0)[::2], np.arange(3, dtype=">i4")])
def test_other_layouts_are_sent_in_the_wires_own(array: np.ndarray) -> None:
    entries, parts = pack({"x": array})
    np.testing.assert_array_equal(unpack(entries, joined(parts))["x"], array)


def test_answers_are_read_only_views() -> None:
    entries, parts = pack({"x": np.ones(3)})
    assert not unpack(entries, joined(parts))["x"].flags.writeable


def test_bfloat16_is_read_as_float32() -> None:
    body = (np.array([1.0, -2.5], dtype=np.float32).view(np.uint32) >> 16).astype("<u2").tobytes()
    entries = [{"name": "x", "dtype": "bfloat16", "shape": [2], "nbytes": 4}]
    np.testing.assert_array_equal(unpack(entries, body)["x"], np.array([1.0, -2.5], dtype=np.float32))


def test_a_dtype_the_wire_lacks_is_refused() -> None:
    with pytest.raises(TensorError, match="complex64"):
        pack({"x": np.zeros(1, dtype=np.complex64)})


@given(st.binary(max_size=40), st.lists(st.integers(0, 4), max_size=3))
def test_random_bytes_elements_parse_or_are_refused(data: bytes, shape: list[int]) -> None:
    try:
        array = unpack_bytes(data, shape)
    except TensorError:
        return
    assert pack_bytes(array) == data
