"""The checked reader: exactly the format, or a refusal."""

from __future__ import annotations

import contextlib
import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.errors import UnsafeBundleError
from agent.worker import safetensors
from tests.fakes.models import safetensors_bytes


def packed(header: Any, body: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + body


def entry(dtype: str = "U8", shape: Any = (4,), offsets: Any = (0, 4)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


def test_arrays_come_back() -> None:
    arrays = {"b": np.arange(6, dtype=np.float32).reshape(2, 3), "a": np.array([1, -2], np.int64)}
    read = safetensors.parse(safetensors_bytes(arrays))
    assert set(read) == {"a", "b"}
    for name, array in arrays.items():
        np.testing.assert_array_equal(read[name], array)


def test_bfloat16_widens_and_metadata_is_ignored() -> None:
    header = {"__metadata__": {"made": "by hand"}, "x": entry("BF16", [2], [0, 4])}
    assert safetensors.parse(packed(header, bytes.fromhex("c03f00c0")))["x"].tolist() == [1.5, -2.0]


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "shorter"),
        (struct.pack("<Q", 1 << 60), "header of"),
        (struct.pack("<Q", 5) + b"{}", "header of 5 bytes"),
        (packed(b"{"), "not plain JSON"),
        (packed(b"[" * 100_000), "not plain JSON"),
        (packed(b"[]"), "must be a map"),
        (packed(b'{"a": 1, "a": 1}'), "duplicate key"),
        (packed(b'{"a": NaN}'), "NaN"),
        (packed({"__metadata__": {"a": 1}}), "__metadata__"),
        (packed({"x": 1}), "data_offsets"),
        (packed({"x": entry(offsets=(0, True))}, b"1234"), "data_offsets"),
        (packed({"x": entry(offsets=(-4, 0))}, b"1234"), "data_offsets"),
        (packed({"x": entry("F8")}, b"1234"), "unknown dtype"),
        (packed({"x": entry(shape=[-4])}, b"1234"), "shape"),
        (packed({"x": entry(shape=[1 << 30, 1 << 30, 1 << 30])}, b"1234"), "does not take 4 bytes"),
        (packed({"x": entry(shape=[3])}, b"1234"), "does not take 4 bytes"),
        (packed({"x": entry(offsets=(1, 5))}, b"12345"), "begins at 1, expected 0"),
        (packed({"x": entry(), "y": entry(offsets=(3, 7))}, b"1234567"), "begins at 3, expected 4"),
        (packed({"x": entry()}, b"123"), "runs past the file"),
        (packed({"x": entry()}, b"12345"), "1 bytes behind"),
        (packed({}, b"1"), "1 bytes behind"),
    ],
)
def test_anything_else_is_refused(data: bytes, words: str) -> None:
    with pytest.raises(UnsafeBundleError) as caught:
        safetensors.parse(data)
    assert words in str(caught.value)


def test_a_missing_file_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(UnsafeBundleError, match=r"absent\.safetensors"):
        safetensors.read(tmp_path / "absent.safetensors")


@given(st.binary(max_size=120), st.booleans())
def test_random_bytes_never_surprise(data: bytes, with_length: bool) -> None:
    with contextlib.suppress(UnsafeBundleError):
        safetensors.parse(packed(data) if with_length else data)


@given(st.data())
def test_flipped_bytes_of_a_good_file_never_surprise(data: st.DataObject) -> None:
    good = bytearray(safetensors_bytes({"x": np.ones((2, 2), np.float32), "y": np.ones(1, np.int64)}))
    for _ in range(data.draw(st.integers(1, 4))):
        good[data.draw(st.integers(0, len(good) - 1))] = data.draw(st.integers(0, 255))
    with contextlib.suppress(UnsafeBundleError):
        safetensors.parse(bytes(good))
