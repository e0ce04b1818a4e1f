"""Tensors that are named instead of sent: what a header may say about them."""

from __future__ import annotations

from itertools import pairwise
from math import prod
from typing import Any

import pytest
from hypothesis import given, settings
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


shapes = st.lists(st.integers(0, 5), max_size=3)
placed = st.tuples(shapes, st.none() | st.tuples(st.integers(0, REGION_NUMBER_MAX), st.integers(0, 2**63 - 1)))


def described(tensors: list[tuple[list[int], tuple[int, int] | None]]) -> tuple[list[dict[str, Any]], int]:
    """Return header entries of uint8 tensors, and the length of the body that some of them lie in."""
    entries, body_bytes = [], 0
    for number, (shape, where) in enumerate(tensors):
        nbytes = prod(shape)
        entry = {"name": f"t{number}", "dtype": "uint8", "shape": shape, "nbytes": nbytes}
        if where is None:
            body_bytes += nbytes
        else:
            entry |= {"region": where[0], "offset": where[1]}
        entries.append(entry)
    return entries, body_bytes


@given(st.lists(placed, max_size=8))
def test_what_lies_in_the_body_fills_it_in_order_and_the_rest_is_elsewhere(tensors: list[Any]) -> None:
    entries, body_bytes = described(tensors)
    end = 0
    for tensor, (shape, where) in zip(parse_tensors(entries, body_bytes), tensors, strict=True):
        assert (tensor.shape, tensor.nbytes) == (tuple(shape), prod(shape))
        if where is None:
            assert (tensor.region, tensor.offset) == (None, end)
            end += tensor.nbytes
        else:
            assert (tensor.region, tensor.offset) == where
    assert end == body_bytes


@given(st.lists(placed, min_size=1, max_size=5), st.integers(0, 400))
def test_a_body_of_another_length_is_refused(tensors: list[Any], body_bytes: int) -> None:
    entries, needed = described(tensors)
    with pytest.raises(TensorError):
        parse_tensors(entries, body_bytes if body_bytes != needed else needed + 1)


odd = st.none() | st.booleans() | st.integers(-(2**64), 2**64) | st.floats() | st.text(max_size=3) | st.just([])
fields = st.sampled_from(["name", "dtype", "shape", "nbytes", "region", "offset"])


@given(st.lists(placed, min_size=1, max_size=3), st.data())
def test_an_entry_with_an_odd_value_is_refused_or_means_what_it_says(tensors: list[Any], data: st.DataObject) -> None:
    entries, body_bytes = described(tensors)
    entry = data.draw(st.sampled_from(entries))
    field, value = data.draw(fields), data.draw(odd)
    entry[field] = value
    try:
        found = parse_tensors(entries, body_bytes)
    except TensorError:
        return
    for tensor, said in zip(found, entries, strict=True):
        assert (tensor.name, tensor.dtype, list(tensor.shape)) == (said["name"], said["dtype"], said["shape"])
        assert tensor.nbytes == said["nbytes"]
        assert tensor.region == said.get("region")
        assert tensor.region is None or tensor.offset == said["offset"]
        assert tensor.region is not None or tensor.offset + tensor.nbytes <= body_bytes


@given(st.dictionaries(st.sampled_from(["region", "offset", "nbytes", "more"]), odd))
def test_an_odd_window_is_refused_or_means_what_it_says(value: dict[str, Any]) -> None:
    try:
        window = parse_window(value)
    except TensorError:
        return
    assert window == Window(value["region"], value["offset"], value["nbytes"])
    assert window.region <= REGION_NUMBER_MAX
    assert min(window) >= 0


bodies = st.sampled_from([0, 1, 63, 65_535, 65_536, 65_537, 262_144, 262_145])


@settings(deadline=None, max_examples=60)
@given(
    st.lists(st.tuples(bodies, st.booleans()), min_size=1, max_size=5),
    st.lists(st.tuples(st.integers(0, 4), st.integers(-2, 2)), max_size=12),
    st.booleans(),
)
def test_cuts_at_the_edges_of_frames_change_nothing(
    wanted: list[tuple[int, bool]], cuts: list[tuple[int, int]], in_place: bool
) -> None:
    """Prefix, header and body may end anywhere in a read, wherever the body is received."""
    data, edges = b"", [0]
    for number, (size, _) in enumerate(wanted):
        head, body = encode({"kind": "infer", "id": number}, [bytes([number + 1]) * size])
        edges += [len(data) + 16, len(data) + len(head), len(data) + len(head) + size]
        data += bytes(head) + bytes(body)
    places = iter([kept for size, kept in wanted if size > 65_536])
    decoder = Decoder(place=lambda _header, nbytes: memoryview(bytearray(nbytes)) if next(places) else None)
    steps = sorted({0, len(data), *(min(len(data), max(0, edges[at * 3 % len(edges)] + by)) for at, by in cuts)})
    frames = []
    for start, end in pairwise(steps):
        while start < end:
            into = decoder.body_buffer() if in_place else None
            if into is None:
                frames += decoder.feed(data[start:end])
                break
            count = min(len(into), end - start)
            into[:count] = data[start : start + count]
            done = decoder.body_filled(count)
            frames += [] if done is None else [done]
            start += count
    assert [(frame.header["id"], bytes(frame.body)) for frame in frames] == [
        (number, bytes([number + 1]) * size) for number, (size, _) in enumerate(wanted)
    ]
    assert not decoder.mid_frame
