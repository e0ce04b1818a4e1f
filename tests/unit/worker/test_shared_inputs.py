"""Inputs in shared memory: used where they lie, copied where the runtime would trust them, batched without a copy."""

from __future__ import annotations

import fcntl
import os
from typing import Any

import numpy as np
import pytest

from agent.errors import FrameError, InferenceError, TensorError
from agent.wire import Header
from agent.worker import signature
from agent.worker.regions import Region, Regions
from agent.worker.requests import Forms, Request, into_window, stacked

pytestmark = pytest.mark.unit


def signed(dtype: str) -> Any:
    tensors = [{"name": "x", "dtype": dtype, "shape": ["N", "C"]}]
    outputs = [{"name": "y", "dtype": "float32", "shape": ["N", "C"]}]
    return signature.parse({"inputs": tensors, "outputs": outputs}, batch_axis="N", rows_max=8)


@pytest.fixture
def region() -> Region:
    return Region(memoryview(bytearray(range(256)) * 16), writable=True)


def request(region: Region, offset: int, rows: int, columns: int, dtype: str = "uint8", **more: Any) -> Request:
    nbytes = rows * columns * np.dtype(dtype).itemsize
    entry = {"name": "x", "dtype": dtype, "shape": [rows, columns], "nbytes": nbytes, "region": 3, "offset": offset}
    header = Header({"kind": "infer", "tensors": [entry], **more})
    declared = signed(dtype)
    asked = Forms(declared, None, model="m", version="1").asked(header)
    made = Request(header, b"", 1, 10.0, 0.0, asked=asked, line=None)
    made.regions = {3: region}
    made.prepare(declared)
    return made


def memory(region: Region) -> Any:
    return np.frombuffer(region.view, np.uint8)


def test_an_input_is_used_where_it_lies(region: Region) -> None:
    made = request(region, 128, 2, 10)
    assert np.shares_memory(made.arrays()["x"], memory(region))
    assert made.arrays()["x"][0, 0] == 128


@pytest.mark.parametrize("dtype", ["int32", "uint32", "int64", "uint64", "bool"])
def test_positions_are_copied(region: Region, dtype: str) -> None:
    made = request(region, 64, 2, 10, dtype)
    assert not np.shares_memory(made.arrays()["x"], memory(region))
    assert not made.places


def test_rows_back_to_back_form_a_batch_without_a_copy(region: Region) -> None:
    parts = [request(region, 100 + 30 * number, 3, 10) for number in range(4)]
    batch = stacked(parts, 12)["x"]
    assert np.shares_memory(batch, memory(region))
    np.testing.assert_array_equal(batch, np.concatenate([part.arrays()["x"] for part in parts]))


@pytest.mark.parametrize("offsets", [(0, 30, 61), (30, 0, 60), (0, 0, 0), (0, 30, 29)])
def test_other_rows_are_copied_together(region: Region, offsets: tuple[int, ...]) -> None:
    parts = [request(region, offset, 3, 10) for offset in offsets]
    batch = stacked(parts, 9)["x"]
    assert not np.shares_memory(batch, memory(region))
    np.testing.assert_array_equal(batch, np.concatenate([part.arrays()["x"] for part in parts]))


def test_rows_of_two_regions_are_copied_together(region: Region) -> None:
    parts = [request(region, 0, 1, 10), request(Region(region.view, writable=True), 10, 1, 10)]
    assert not np.shares_memory(stacked(parts, 2)["x"], memory(region))


def test_outputs_lie_in_the_window_at_multiples_of_64(region: Region) -> None:
    window = {"region": 3, "offset": 1, "nbytes": 1000}
    made = request(region, 0, 1, 4, reply=window)
    outputs = {"y": np.ones((1, 3), np.float32), "z": np.full((1, 5), 7, np.float32)}
    fields, body = made.answer(outputs)
    assert not body
    assert [(entry["region"], entry["offset"]) for entry in fields["tensors"]] == [(3, 64), (3, 128)]
    assert np.frombuffer(region.view, np.float32, 5, 128).tolist() == [7] * 5


def test_outputs_that_do_not_all_fit_are_not_written(region: Region) -> None:
    before = bytes(region.view)
    made = request(region, 0, 1, 4, reply={"region": 3, "offset": 0, "nbytes": 64 + 19})
    fields, body = made.answer({"y": np.ones((1, 3), np.float32), "z": np.full((1, 5), 7, np.float32)})
    assert "region" not in fields["tensors"][0]
    assert sum(len(part) for part in body) == 32
    assert bytes(region.view) == before


def test_texts_stay_in_the_body(region: Region) -> None:
    made = request(region, 0, 1, 4, reply={"region": 3, "offset": 0, "nbytes": 1000})
    fields, body = made.answer({"t": np.array([[b"abc"]], object), "y": np.ones((1, 3), np.float32)})
    assert ["region" in entry for entry in fields["tensors"]] == [False, True]
    assert b"".join(bytes(part) for part in body).endswith(b"abc")


def test_memory_that_cannot_be_written_is_no_window(region: Region) -> None:
    frozen = Region(region.view, writable=False)
    with pytest.raises(TensorError, match="written"):
        request(frozen, 0, 1, 4, reply={"region": 3, "offset": 0, "nbytes": 1000})


def test_a_large_answer_goes_into_the_daemons_window() -> None:
    window, fields = memoryview(bytearray(200_000)), {}
    assert into_window(window, fields, [b"a" * 70_000, b"b" * 70_000]) == []
    assert fields == {"window_bytes": 140_000}
    assert bytes(window[69_999:70_001]) == b"ab"
    for body in ([b"a" * 1000], [b"a" * 200_001]):
        fields = {}
        assert into_window(window, fields, body) is body
        assert not fields


def test_regions_are_mapped_checked_and_forgotten() -> None:
    regions = Regions()

    def attach(number: int, nbytes: int, *, seals: int) -> None:
        descriptor = os.memfd_create("test", os.MFD_ALLOW_SEALING)
        os.ftruncate(descriptor, 4096)
        fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, seals)
        regions.attach({"region": number, "nbytes": nbytes}, descriptor)
        with pytest.raises(OSError, match="Bad file"):
            os.fstat(descriptor)

    both = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW
    attach(1, 4096, seals=both)
    attach(2, 8192, seals=both)
    attach(3, 4096, seals=fcntl.F_SEAL_GROW)
    assert len(regions.named([(7, 1)])[7].view) == 4096
    for number in (2, 3):
        with pytest.raises(InferenceError, match="sealed"):
            regions.named([(7, number)])
    regions.detach({"region": 1})
    with pytest.raises(FrameError):
        regions.named([(7, 1)])
