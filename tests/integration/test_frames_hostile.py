"""The frame socket with clients that lie, stall, flood or do not listen: nobody else notices."""

from __future__ import annotations

import asyncio
import resource
import socket
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import msgpack
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from agent.wire import MAGIC, PREFIX, encode, encode_head
from tests.fakes.edges import Edges, edges, run, until
from tests.fakes.engine import FakeEngine
from tests.fakes.peer import FramePeer

pytestmark = pytest.mark.integration

GOOD = b"".join(bytes(part) for part in encode({"kind": "infer", "id": 1, "model": "echo"}, (b"abc",)))
FUZZ = settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])


async def still_serves(served: Edges) -> None:
    """Whatever one client did, the next is answered and nothing of it is left."""
    async with FramePeer(served.frame_path) as peer:
        await peer.send_raw(GOOD)
        assert (await peer.frame()).header["kind"] == "result"
    await until(lambda: served.budget.held == 0)


def packed(header: Any, *, body_bytes: int = 0) -> bytes:
    raw = msgpack.packb(header)
    return PREFIX.pack(MAGIC, len(raw), body_bytes) + raw


@pytest.mark.parametrize(
    ("data", "code", "text"),
    [
        (b"GET / HTTP/1.1\r\n\r\n", "bad_frame", "magic"),
        (b"\x00", "bad_frame", "magic"),
        (PREFIX.pack(MAGIC, 10**6, 0), "too_large", "header of 1000000"),
        (PREFIX.pack(MAGIC, 10, 2**63), "too_large", "body of"),
        (PREFIX.pack(MAGIC, 1, 0) + b"\xc1", "bad_frame", "MessagePack"),
        (packed([1, 2]), "bad_frame", "map"),
        (packed({"id": 1}), "bad_frame", "kind"),
        (packed({"kind": "infer", "model": "echo"}), "bad_frame", "id"),
        (packed({"kind": "infer", "id": -1}), "bad_frame", "id"),
        (packed({"kind": "cancel"}), "bad_frame", "id"),
        (packed({"kind": "result", "id": 1}), "bad_frame", "not for a server"),
        (packed({"kind": "x" * 500, "id": 1}), "bad_frame", "not for a server"),
        (packed({"kind": "hello", "protocol": 99}), "bad_frame", "protocol 1"),
    ],
)
@pytest.mark.parametrize("loop", ["uvloop", "asyncio"])
def test_a_bad_frame_is_named_and_the_connection_ends(
    tmp_path: Path, data: bytes, code: str, text: str, loop: str
) -> None:
    async def test() -> None:
        async with edges(tmp_path) as served:
            async with FramePeer(served.frame_path) as peer:
                await peer.send_raw(data)
                header = await peer.last_words()
                assert (header["kind"], header["code"]) == ("error", code)
                assert "id" not in header
                assert text in header["message"]
            await still_serves(served)

    run(test, loop=loop)


def test_an_id_in_use_is_refused(tmp_path: Path) -> None:
    async def test() -> None:
        async with edges(tmp_path) as served:
            served.engine.holding = True
            async with FramePeer(served.frame_path) as peer:
                await peer.send_raw(GOOD + GOOD)
                header = await peer.last_words()
                assert (header["code"], "still outstanding" in header["message"]) == ("bad_frame", True)
            assert len(served.engine.canceled) == 1

    run(test)


def test_what_was_asked_before_a_bad_frame_is_withdrawn(tmp_path: Path) -> None:
    async def test() -> None:
        async with edges(tmp_path) as served:
            served.engine.holding = True
            async with FramePeer(served.frame_path) as peer:
                await peer.send_raw(GOOD)
                await until(lambda: len(served.engine.waiting) == 1)
                await peer.send_raw(b"garbage")
                assert (await peer.last_words())["code"] == "bad_frame"
            assert len(served.engine.canceled) == 1

    run(test)


def fuzz(tmp_path: Path, make: Callable[[], list[bytes]]) -> None:
    async def test() -> None:
        async with edges(tmp_path) as served:
            for data in make():
                async with FramePeer(served.frame_path) as peer:
                    with suppress(OSError):  # it may close on us at any byte
                        await peer.send_raw(data)
                        peer.sock.shutdown(socket.SHUT_WR)
                    await peer.last_words()
            await still_serves(served)

    run(test)


@FUZZ
@given(st.lists(st.binary(max_size=300), max_size=8))
def test_random_bytes_harm_nobody(tmp_path: Path, streams: list[bytes]) -> None:
    fuzz(tmp_path, lambda: [*streams, *(MAGIC + data for data in streams)])


@FUZZ
@given(st.lists(st.tuples(st.integers(0, 10**6), st.integers(1, 255)), max_size=4), st.integers(0, 10**6))
def test_damaged_and_cut_frames_harm_nobody(tmp_path: Path, flips: list[tuple[int, int]], cut: int) -> None:
    def damaged() -> list[bytes]:
        data = bytearray(GOOD * 3)
        for place, flip in flips:
            data[place % len(data)] ^= flip
        return [bytes(data), bytes(data[: cut % len(data)])]

    fuzz(tmp_path, damaged)


scalars = st.none() | st.booleans() | st.integers(-(2**63), 2**63 - 1) | st.floats()
junk = st.recursive(
    scalars | st.text(max_size=9) | st.binary(max_size=9),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
names = st.sampled_from(["model", "version", "deadline_ms", "tensors", "params", "args", "method", "protocol", "id"])
kinds = st.sampled_from(["infer", "cancel", "call", "hello", "part", "pause", "resume", "result", "reply", "error", ""])


@FUZZ
@given(st.lists(st.tuples(kinds, st.dictionaries(names, junk, max_size=5)), max_size=5))
def test_well_packed_nonsense_harms_nobody(tmp_path: Path, said: list[tuple[str, dict[str, Any]]]) -> None:
    fuzz(tmp_path, lambda: [b"".join(packed({"id": n, **more, "kind": kind}) for n, (kind, more) in enumerate(said))])


@pytest.mark.parametrize("part", [GOOD[:1], GOOD[:10], GOOD[:-1], encode_head({"kind": "infer", "id": 1}, 10**6)])
def test_a_half_sent_frame_ends_at_its_deadline(tmp_path: Path, part: bytes) -> None:
    async def test() -> None:
        async with edges(tmp_path, read_timeout_s=0.05) as served:
            async with FramePeer(served.frame_path) as peer:
                await peer.send_raw(part)
                header = await peer.last_words()
                assert header["code"] == "bad_frame"
                assert "not completed" in header["message"]
            await still_serves(served)

    run(test)


def test_a_connection_between_frames_may_stay_silent(tmp_path: Path) -> None:
    async def test() -> None:
        async with edges(tmp_path, read_timeout_s=0.02) as served, FramePeer(served.frame_path) as quiet:
            async with FramePeer(served.frame_path) as stalled:
                await stalled.send_raw(GOOD[:-1])
                await stalled.last_words()  # its deadline has passed, so the quiet one's would have
            await quiet.send_raw(GOOD)
            assert (await quiet.frame()).header["kind"] == "result"

    run(test)


def test_announced_bodies_share_one_budget(tmp_path: Path) -> None:
    async def test() -> None:
        mib = 1024 * 1024
        bounds = {"body_bytes_max": 2 * mib, "receive_bytes_max": 3 * mib}
        async with edges(tmp_path, **bounds) as served, FramePeer(served.frame_path) as first:
            await first.send_raw(encode_head({"kind": "infer", "id": 1, "model": "echo"}, 2 * mib))
            await until(lambda: served.budget.held > 0)
            async with FramePeer(served.frame_path) as second:
                await second.send_raw(encode_head({"kind": "infer", "id": 1, "model": "echo"}, 2 * mib))
                assert (await second.last_words())["code"] == "overloaded"
            await first.send_raw(bytes(2 * mib))
            assert (await first.frame()).header["kind"] == "result"
            assert served.budget.held == 0

    run(test)


def test_a_client_that_dies_in_a_body_leaves_nothing(tmp_path: Path) -> None:
    async def test() -> None:
        async with edges(tmp_path) as served:
            async with FramePeer(served.frame_path) as peer:
                await peer.send_raw(encode_head({"kind": "infer", "id": 1, "model": "echo"}, 10**7) + bytes(10**5))
                await until(lambda: served.budget.held > 0)
            await still_serves(served)
            assert served.engine.seen[0].model == "echo"
            assert len(served.engine.seen) == 1

    run(test)


def large_answers() -> FakeEngine:
    engine = FakeEngine()
    engine.reply = lambda request: ({"kind": "result", "model": request.model}, (bytes(200_000),))
    return engine


def test_a_client_that_takes_no_answers_is_cut_when_too_many_wait(tmp_path: Path) -> None:
    async def test() -> None:
        async with edges(tmp_path, engine=large_answers(), output_bytes_max=400_000) as served:
            async with FramePeer(served.frame_path) as slow:
                asks = [b"".join(encode({"kind": "infer", "id": n, "model": "echo"})) for n in range(100)]
                with suppress(OSError):  # cut while it still talks
                    await slow.send_raw(b"".join(asks))
                await until(lambda: 'reason="slow_reader"' in served.metrics.render().decode())
            await still_serves(served)
            assert served.engine.answers < 100

    run(test)


def test_a_client_that_takes_no_answers_is_cut_at_its_deadline(tmp_path: Path) -> None:
    async def test() -> None:
        async with edges(tmp_path, engine=large_answers(), write_timeout_s=0.05) as served:
            async with FramePeer(served.frame_path) as slow:
                for number in range(4):
                    await slow.send({"kind": "infer", "id": number, "model": "echo"})
                await until(lambda: 'reason="slow_reader"' in served.metrics.render().decode())
            await still_serves(served)

    run(test)


def test_a_slow_client_that_does_read_gets_everything(tmp_path: Path) -> None:
    async def test() -> None:
        async with edges(tmp_path, engine=large_answers()) as served, FramePeer(served.frame_path) as slow:
            count = 40  # 8 MB of answers: far beyond what the kernel holds, so reading pauses and resumes

            async def ask() -> None:
                for number in range(count):
                    await slow.send({"kind": "infer", "id": number, "model": "echo"})

            async with asyncio.TaskGroup() as group:
                group.create_task(ask())
                seen = [(await slow.frame()).header["id"] for _ in range(count)]
            assert seen == list(range(count))

    run(test)


def test_connections_are_capped_and_told(tmp_path: Path) -> None:
    async def test() -> None:
        async with edges(tmp_path, connections_max=2) as served:
            async with FramePeer(served.frame_path) as one, FramePeer(served.frame_path) as two:
                for peer in (one, two):
                    await peer.send_raw(GOOD)
                    await peer.frame()
                async with FramePeer(served.frame_path) as three:
                    header = await three.last_words()
                    assert (header["code"], header["retryable"]) == ("overloaded", True)
                await one.send_raw(GOOD)
                assert (await one.frame()).header["kind"] == "result"
            await until(lambda: "inferd_frame_connections 0.0" in served.metrics.render().decode())
            await still_serves(served)

    run(test)


def test_running_out_of_descriptors_passes(tmp_path: Path) -> None:
    async def test() -> None:
        async with edges(tmp_path) as served, FramePeer(served.frame_path) as peer:
            await peer.send_raw(GOOD)
            await peer.frame()
            soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
            waiting = FramePeer(served.frame_path)
            try:
                resource.setrlimit(resource.RLIMIT_NOFILE, (waiting.sock.fileno() + 1, hard))
                async with waiting:
                    await peer.send_raw(GOOD)  # those who are connected go on
                    assert (await peer.frame()).header["kind"] == "result"
                    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
                    await waiting.send_raw(GOOD)
                    assert (await waiting.frame()).header["kind"] == "result"
            finally:
                resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))

    run(test)


def test_passed_descriptors_are_not_kept(tmp_path: Path) -> None:
    async def test() -> None:
        async with edges(tmp_path) as served, FramePeer(served.frame_path) as peer:
            left, right = socket.socketpair()
            with left:
                with right:
                    socket.send_fds(peer.sock, [GOOD], [right.fileno()])
                assert (await peer.frame()).header["kind"] == "result"
                assert left.recv(1) == b""  # the copy in flight is closed: nobody holds the other end

    run(test)
