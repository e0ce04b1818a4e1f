"""What paths ask for, and how compressed bodies are bounded."""

from __future__ import annotations

import gzip
import zlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.errors import InvalidInputError, TooLargeError
from agent.serving.budget import ReceiveBudget
from agent.serving.http_inference import Generate, Target, inflate, parse_target, target_of
from agent.serving.replies import Dialect

pytestmark = pytest.mark.unit

KIB = 1024


@pytest.mark.parametrize(
    ("path", "target"),
    [
        (b"/predictions/magika", Target("magika", None, Dialect.TORCHSERVE)),
        (b"/predictions/magika/1.0", Target("magika", "1.0", Dialect.TORCHSERVE)),
        (b"/predictions/a%20b", Target("a b", None, Dialect.TORCHSERVE)),
        (b"/v2/models/magika/infer", Target("magika", None, Dialect.INFERENCE)),
        (b"/v2/models/magika/versions/3/infer", Target("magika", "3", Dialect.INFERENCE)),
        (b"/v2/models/a%2Fb/infer", Target("a/b", None, Dialect.INFERENCE)),
        (b"/v2/models/a/generate", Target("a", None, Dialect.INFERENCE, Generate.WHOLE)),
        (b"/v2/models/a/generate_stream", Target("a", None, Dialect.INFERENCE, Generate.STREAM)),
        (b"/v2/models/a/versions/1/generate_stream", Target("a", "1", Dialect.INFERENCE, Generate.STREAM)),
        (b"/v2/models/a/generate_streams", None),
        (b"/predictions/", None),
        (b"/predictions", None),
        (b"/predictions/m/1/x", None),
        (b"/v2/models//infer", None),
        (b"/v2/models/m", None),
        (b"/v2/models/m/ready", None),
        (b"/v2/models/m/versions/infer", None),
        (b"/", None),
        (b"*", None),
    ],
)
def test_inference_paths(path: bytes, target: Target | None) -> None:
    assert parse_target(path) == target
    if path != b"*":
        assert target_of(path + b"?a=/b") == target_of(path + b"?" + b"x" * 500) == target


@given(st.binary(max_size=60))
def test_any_path_is_parsed(path: bytes) -> None:
    parse_target(path)
    parse_target(b"/predictions/" + path)


def inflated(data: bytes, encoding: bytes, bytes_max: int = 1024 * KIB) -> bytes:
    steps = inflate(data, encoding, bytes_max=bytes_max, budget=ReceiveBudget(1 << 20))
    while True:
        try:
            next(steps)
        except StopIteration as done:
            return bytes(done.value)


@pytest.mark.parametrize("size", [0, 1, 300 * KIB, 1024 * KIB])
def test_bodies_are_decompressed(size: int) -> None:
    data = bytes(size)
    assert inflated(gzip.compress(data), b"gzip") == data
    assert inflated(zlib.compress(data), b"deflate") == data


def test_a_small_body_cannot_become_a_large_one() -> None:
    bomb = gzip.compress(bytes(64 * 1024 * KIB))
    assert len(bomb) < 100 * KIB
    with pytest.raises(TooLargeError):
        inflated(bomb, b"gzip")


@pytest.mark.parametrize(
    ("data", "encoding", "text"),
    [
        (b"x", b"br", "not supported"),
        (b"x", b"gzip, gzip", "not supported"),
        (b"", b"gzip", "cut"),
        (b"plain text", b"gzip", "not valid"),
        (gzip.compress(b"abc")[:-1], b"gzip", "cut"),
        (gzip.compress(b"abc") + b"more", b"gzip", "follow"),
        (zlib.compress(b"abc"), b"gzip", "not valid"),
    ],
)
def test_damaged_bodies_are_refused(data: bytes, encoding: bytes, text: str) -> None:
    with pytest.raises(InvalidInputError, match=text):
        inflated(data, encoding)


@given(st.binary(max_size=200), st.sampled_from([b"gzip", b"deflate"]))
def test_random_bodies_are_refused_or_decompressed(data: bytes, encoding: bytes) -> None:
    try:
        inflated(data, encoding)
    except (InvalidInputError, TooLargeError):
        return
