"""The frame format: what was encoded comes out again, however the stream is cut; anything else is refused."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import msgpack
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agent.errors import AgentError, FrameError, TensorError, TooLargeError
from agent.wire import (
    DTYPES,
    MAGIC,
    PREFIX,
    Decoder,
    Frame,
    Limits,
    encode,
    encode_head,
    error_header,
    parse_tensors,
    tensor_entries,
)

pytestmark = pytest.mark.unit

LIMITS = Limits(header_bytes_max=4096, body_bytes_max=2 * 1024 * 1024)
LARGE = 300_000  # above what is received in place

values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats(allow_nan=False) | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)
headers = st.dictionaries(st.text(max_size=8).filter(lambda name: name not in ("kind", "id")), values, max_size=4).map(
    lambda extra: {"kind": "infer", "id": 7, **extra}
)
bodies = st.binary(max_size=600) | st.just(b"z" * LARGE)


def stream(frames: list[tuple[dict[str, Any], bytes]]) -> bytes:
    return b"".join(bytes(part) for header, body in frames for part in encode(header, (body,)))


def pieces(data: bytes, cuts: list[int]) -> list[bytes]:
    edges = [0, *sorted({cut % (len(data) + 1) for cut in cuts}), len(data)]
    return [data[low:high] for low, high in pairwise(edges)]


def plain(frames: list[Frame]) -> list[tuple[dict[str, Any], bytes]]:
    return [(frame.header, bytes(frame.body)) for frame in frames]


@settings(deadline=None)
@given(st.lists(st.tuples(headers, bodies), max_size=4), st.lists(st.integers(0, 2**31), max_size=8))
def test_frames_survive_any_cut_of_the_stream(frames: list[tuple[dict[str, Any], bytes]], cuts: list[int]) -> None:
    decoder = Decoder(LIMITS)
    seen: list[Frame] = []
    for piece in pieces(stream(frames), cuts):
        seen += decoder.feed(piece)
    assert plain(seen) == frames
    assert not decoder.mid_frame


@settings(deadline=None)
@given(st.lists(st.tuples(headers, bodies), min_size=1, max_size=3), st.integers(1, 400_000))
def test_large_bodies_received_in_place_are_the_same(frames: list[tuple[dict[str, Any], bytes]], step: int) -> None:
    decoder, data, seen, offset = Decoder(LIMITS), stream(frames), [], 0
    while offset < len(data):
        into = decoder.body_buffer()
        if into is None:
            seen += decoder.feed(data[offset : offset + step])
            offset += step
            continue
        count = min(step, len(into), len(data) - offset)
        into[:count] = data[offset : offset + count]
        done = decoder.body_filled(count)
        seen += [] if done is None else [done]
        offset += count
    assert plain(seen) == frames


def test_a_stream_of_single_bytes_is_understood() -> None:
    decoder, seen = Decoder(LIMITS), []
    for byte in stream([({"kind": "infer", "id": 1}, b"abc"), ({"kind": "cancel", "id": 1}, b"")]):
        seen += decoder.feed(bytes([byte]))
    assert plain(seen) == [({"kind": "infer", "id": 1}, b"abc"), ({"kind": "cancel", "id": 1}, b"")]


@settings(deadline=None)
@given(st.binary(max_size=2000), st.lists(st.integers(0, 2**31), max_size=4))
def test_random_bytes_never_raise_anything_else(data: bytes, cuts: list[int]) -> None:
    decoder = Decoder(LIMITS)
    try:
        for piece in pieces(data, cuts):
            decoder.feed(piece)
    except (FrameError, TooLargeError):
        with pytest.raises(FrameError):
            decoder.feed(b"")


@settings(deadline=None)
@given(headers, st.binary(max_size=100), st.integers(0, 2**31), st.integers(1, 255))
def test_a_flipped_byte_is_refused_or_changes_one_frame_only(
    header: dict[str, Any], body: bytes, place: int, flip: int
) -> None:
    data = bytearray(stream([(header, body)]))
    data[place % len(data)] ^= flip
    decoder = Decoder(LIMITS)
    try:
        frames = decoder.feed(bytes(data))
    except (FrameError, TooLargeError):
        return
    assert len(frames) <= 1
    assert all(isinstance(frame.header["kind"], str) for frame in frames)


@pytest.mark.parametrize(
    ("data", "error", "text"),
    [
        (b"GET / HTTP/1.1\r\n\r\n", FrameError, "magic"),
        (b"G", FrameError, "magic"),
        (PREFIX.pack(b"IFD9", 1, 0), FrameError, "magic"),
        (PREFIX.pack(MAGIC, 0, 0), TooLargeError, "header of 0"),
        (PREFIX.pack(MAGIC, 4097, 0), TooLargeError, "header of 4097"),
        (PREFIX.pack(MAGIC, 2**32 - 1, 2**64 - 1), TooLargeError, "header"),
        (PREFIX.pack(MAGIC, 5, 2**64 - 1), TooLargeError, "body"),
        (PREFIX.pack(MAGIC, 1, 0) + b"\xc1", FrameError, "MessagePack"),
        (PREFIX.pack(MAGIC, 1, 0) + b"\x01", FrameError, "map"),
        (PREFIX.pack(MAGIC, 1, 0) + b"\x80", FrameError, "kind"),
        (PREFIX.pack(MAGIC, 2, 0) + b"\x80\x80", FrameError, "MessagePack"),
    ],
)
def test_a_bad_frame_is_refused_with_its_fault(data: bytes, error: type[AgentError], text: str) -> None:
    with pytest.raises(error, match=text):
        Decoder(LIMITS).feed(data)


@pytest.mark.parametrize("bad", [-1, 2**63, "7", 1.0, True, [1]])
def test_an_id_that_is_no_small_integer_is_refused(bad: object) -> None:
    packed = msgpack.packb({"kind": "infer", "id": bad})
    with pytest.raises(FrameError, match="id"):
        Decoder(LIMITS).feed(PREFIX.pack(MAGIC, len(packed), 0) + packed)


def test_deeply_nested_headers_are_refused() -> None:
    packed = b"\x82" + msgpack.packb("kind") + msgpack.packb("infer") + msgpack.packb("x") + b"\x91" * 3000 + b"\xc0"
    with pytest.raises(FrameError):
        Decoder(LIMITS).feed(PREFIX.pack(MAGIC, len(packed), 0) + packed)


def test_integer_keys_are_refused() -> None:
    packed = msgpack.packb({"kind": "infer", 1: 2})
    with pytest.raises(FrameError):
        Decoder(LIMITS).feed(PREFIX.pack(MAGIC, len(packed), 0) + packed)


def test_an_announced_body_at_its_limit_is_waited_for() -> None:
    packed = msgpack.packb({"kind": "infer", "id": 1})
    decoder = Decoder(LIMITS)
    assert decoder.feed(PREFIX.pack(MAGIC, len(packed), LIMITS.body_bytes_max) + packed) == []
    into = decoder.body_buffer()
    assert into is not None
    assert len(into) == LIMITS.body_bytes_max
    assert decoder.mid_frame


def test_a_mapped_body_is_received_like_any_other() -> None:
    size = (1 << 24) + 5
    decoder = Decoder(Limits(body_bytes_max=size))
    assert decoder.feed(encode_head({"kind": "infer", "id": 1}, size) + b"abc") == []
    into = decoder.body_buffer()
    assert into is not None
    into[-2:] = b"yz"
    frame = decoder.body_filled(size - 3)
    assert frame is not None
    assert (len(frame.body), bytes(frame.body[:3]), bytes(frame.body[-2:])) == (size, b"abc", b"yz")


def test_more_than_the_body_cannot_be_filled() -> None:
    decoder = Decoder(LIMITS)
    decoder.feed(encode_head({"kind": "infer", "id": 1}, LARGE))
    with pytest.raises(FrameError):
        decoder.body_filled(LARGE + 1)


def test_a_header_that_cannot_be_packed_is_refused() -> None:
    with pytest.raises(FrameError):
        encode_head({"kind": "reply", "value": object()})


def test_an_error_without_a_request_carries_no_id() -> None:
    assert "id" not in error_header(None, "bad_frame", "why")
    assert error_header(3, "overloaded", "why", retryable=True)["id"] == 3


fixed_dtypes = st.sampled_from(sorted(name for name, width in DTYPES.items() if width))
shapes = st.lists(st.integers(0, 5), max_size=4)


@given(st.lists(st.tuples(fixed_dtypes, shapes), max_size=5))
def test_tensors_lie_back_to_back(described: list[tuple[str, list[int]]]) -> None:
    rows, total = [], 0
    for index, (dtype, shape) in enumerate(described):
        nbytes = DTYPES[dtype] or 0
        for side in shape:
            nbytes *= side
        rows.append((f"t{index}", dtype, shape, nbytes))
        total += nbytes
    tensors = parse_tensors(tensor_entries(rows), total)
    assert [(t.name, t.dtype, list(t.shape), t.nbytes) for t in tensors] == rows
    assert all(b.offset == a.offset + a.nbytes for a, b in pairwise(tensors))


GOOD = {"name": "x", "dtype": "float32", "shape": [2, 3], "nbytes": 24}


@pytest.mark.parametrize(
    ("entries", "body_bytes", "text"),
    [
        ("x", 24, "list"),
        ([1], 24, "map"),
        ([GOOD] * 65, 24, "at most"),
        ([{**GOOD, "name": ""}], 24, "name"),
        ([{**GOOD, "name": None}], 24, "name"),
        ([{**GOOD, "dtype": "complex64"}], 24, "dtype"),
        ([{**GOOD, "dtype": ["float32"]}], 24, "dtype"),
        ([{**GOOD, "shape": [-2, -3]}], 24, "shape"),
        ([{**GOOD, "shape": [True, 6]}], 24, "shape"),
        ([{**GOOD, "shape": [1] * 17}], 4, "shape"),
        ([{**GOOD, "shape": [2**62, 2**62]}], 24, "too large"),
        ([{**GOOD, "shape": [0, 2**62], "nbytes": 0}], 0, "too large"),
        ([{**GOOD, "nbytes": 23}], 23, "24 bytes"),
        ([{**GOOD, "nbytes": -1}], 24, "nbytes"),
        ([GOOD], 25, "hold 24"),
        ([GOOD], 23, "runs past"),
        ([GOOD, GOOD], 48, "same name"),
    ],
)
def test_tensors_that_do_not_fit_are_refused(entries: object, body_bytes: int, text: str) -> None:
    with pytest.raises(TensorError, match=text):
        parse_tensors(entries, body_bytes)


entry_like = st.recursive(
    st.none() | st.integers() | st.text() | st.floats() | st.sampled_from(sorted(DTYPES)),
    lambda inner: st.lists(inner) | st.dictionaries(st.sampled_from(["name", "dtype", "shape", "nbytes"]), inner),
)


@given(entry_like, st.integers(0, 100))
def test_any_tensor_entries_parse_or_are_refused(entries: object, body_bytes: int) -> None:
    try:
        parse_tensors(entries, body_bytes)
    except TensorError:
        return
