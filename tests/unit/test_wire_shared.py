"""Tensors that are named instead of sent: what a header may say about them."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.errors import TensorError
from agent.tensors import unpack
from agent.wire import REGION_NUMBER_MAX, Decoder, Tensor, Window, encode, parse_tensors, parse_window

pytestmark = pytest.mark.unit


def entry(name: str = "x", **more: Any) -> dict[str, Any]:
    return {"name": name, "dtype": "uint8", "shape": [4], "nbytes": 4, **more}


def test_a_reference_takes_nothing_of_the_body() -> None:
    entries = [entry("a"), entry("b", region=7, offset=100), entry("c")]
    assert parse_tensors(entries, 8) == (
        Tensor("a", "uint8", (4,), 0, 4),
        Tensor("b", "uint8", (4,), 100, 4, 7),
        Tensor("c", "uint8", (4,), 4, 4),
    )


NUMBERS = [None, True, -1, 1.0, "1", [1], 2**31, 2**63, 2**64 - 1]


@pytest.mark.parametrize("region", NUMBERS)
def test_a_region_is_a_number_below_2_to_the_31(region: Any) -> None:
    with pytest.raises(TensorError, match="region"):
        parse_tensors([entry(region=region, offset=0)], 0)
    with pytest.raises(TensorError, match="region"):
        parse_window({"region": region, "offset": 0, "nbytes": 0})


@pytest.mark.parametrize("offset", [None, True, -1, 1.0, "1", 2**63, 2**64 - 1])
def test_an_offset_is_a_number_below_2_to_the_63(offset: Any) -> None:
    with pytest.raises(TensorError, match="offset"):
        parse_tensors([entry(region=1, offset=offset)], 0)
    with pytest.raises(TensorError, match="offset"):
        parse_window({"region": 1, "offset": offset, "nbytes": 0})
    with pytest.raises(TensorError, match="nbytes"):
        parse_window({"region": 1, "offset": 0, "nbytes": offset})


@pytest.mark.parametrize("value", [None, 7, "x", [], {}, {"region": 1}, {"region": 1, "nbytes": 1}])
def test_a_window_is_whole(value: Any) -> None:
    with pytest.raises(TensorError):
        parse_window(value)


def test_a_bytes_tensor_cannot_be_shared() -> None:
    with pytest.raises(TensorError, match="bytes"):
        parse_tensors([{**entry(region=1, offset=0), "dtype": "bytes"}], 0)


def test_who_offered_no_memory_takes_no_reference() -> None:
    with pytest.raises(TensorError, match="not offered"):
        unpack([entry(region=1, offset=0)], b"")


@given(st.integers(0, REGION_NUMBER_MAX), st.integers(0, 2**63 - 1), st.integers(0, 2**63 - 1))
def test_what_is_in_range_is_taken_as_it_is(region: int, offset: int, nbytes: int) -> None:
    assert parse_window({"region": region, "offset": offset, "nbytes": nbytes}) == Window(region, offset, nbytes)
    (tensor,) = parse_tensors([entry(region=region, offset=offset)], 0)
    assert (tensor.region, tensor.offset) == (region, offset)


@given(st.recursive(st.none() | st.integers() | st.text(max_size=3), lambda inner: st.lists(inner, max_size=3)))
def test_nonsense_is_refused_and_never_crashes(value: Any) -> None:
    for build in (lambda: parse_window(value), lambda: parse_tensors([entry(region=value, offset=value)], 0)):
        try:
            build()
        except TensorError:
            continue


@pytest.mark.parametrize("size", [65_536, 65_537, 200_000, 5_000_000])
@pytest.mark.parametrize("step", [1_000, 65_536])
def test_a_large_body_is_received_where_its_owner_says(size: int, step: int) -> None:
    places: list[bytearray] = []

    def place(header: Any, nbytes: int) -> memoryview | None:
        assert header["kind"] == "infer"
        places.append(bytearray(nbytes))
        return memoryview(places[-1])

    body = bytes(range(256)) * (size // 256 + 1)
    data = b"".join(bytes(part) for part in encode({"kind": "infer", "id": 1}, [body[:size]]))
    decoder, frames = Decoder(place=place), []
    for start in range(0, len(data), step):
        frames += decoder.feed(data[start : start + step])
    (frame,) = frames
    assert bytes(frame.body) == body[:size]
    assert len(places) == (size > 65_536)
