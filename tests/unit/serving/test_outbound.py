"""Queued bytes leave in order, whole, and only as fast as the peer takes them."""

from __future__ import annotations

import socket

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agent.serving.outbound import Outbound

pytestmark = pytest.mark.unit

frames = st.lists(
    st.lists(st.binary(max_size=50) | st.just(b"L" * 70_000) | st.just(bytearray(b"v" * 300)), min_size=1, max_size=4),
    max_size=6,
)


@settings(deadline=None, max_examples=50)
@given(frames)
def test_everything_arrives_in_order(queued: list[list[bytes]]) -> None:
    left, right = socket.socketpair()
    with left, right:
        left.setblocking(False)
        left.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        out, arrived = Outbound(), bytearray()
        for frame in queued:
            out.add(frame)
        expected = b"".join(bytes(part) for frame in queued for part in frame)
        assert out.size == len(expected)
        while out.size:
            before = out.size
            sent = out.send(left)
            assert out.size == before - sent
            while len(arrived) < len(expected) - out.size:
                arrived += right.recv(65536)
        assert bytes(arrived) == expected


def test_more_buffers_than_one_call_takes_are_sent() -> None:
    left, right = socket.socketpair()
    with left, right:
        left.setblocking(False)
        out = Outbound()
        for _ in range(1500):
            out.add([b"ab", b"c"])
        while out.size:
            out.send(left)
            right.recv(65536)


def test_a_full_peer_takes_nothing() -> None:
    left, right = socket.socketpair()
    with left, right:
        left.setblocking(False)
        out = Outbound()
        out.add([b"x" * 10_000_000])
        out.send(left)
        assert out.send(left) == 0
        assert out.size > 0
