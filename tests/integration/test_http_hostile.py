"""HTTP with clients that lie, stall, flood or do not listen: each gets a clear answer, nobody else notices."""

from __future__ import annotations

import asyncio
import gzip
import socket
from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from agent.wire import encode_head
from tests.fakes.edges import Edges, edges, run, until
from tests.fakes.engine import FakeEngine
from tests.fakes.peer import FramePeer
from tests.fakes.web import WebPeer, ask, request

pytestmark = pytest.mark.integration

FUZZ = settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
KIB = 1024
PREDICT = "/predictions/echo"
CHUNKED = b"POST /predictions/echo HTTP/1.1\r\nHost: b\r\nTransfer-Encoding: chunked\r\n\r\n"


async def still_serves(served: Edges) -> None:
    """Whatever one client did, the next is answered and nothing of it is left."""
    assert (await ask(served.port, "POST", PREDICT, b"abc")).body == b"abc"
    await until(lambda: served.budget.held == 0)


@pytest.mark.parametrize(
    "data",
    [
        b"garbage\r\n\r\n",
        b"IFD1\x00\x00\x00\x00",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",  # a TLS client hello
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        b"GET /v2 HTTP/9.9\r\n\r\n",
        b"GET /v2 HTTP/1.1\r\nbad header\r\n\r\n",
        b"GET /\xff\xfe HTTP/1.1\r\nHost: x\r\n\r\n",
        b"POST /v2 HTTP/1.1\r\nContent-Length: -1\r\n\r\n",
        b"POST /v2 HTTP/1.1\r\nContent-Length: 99999999999999999999999\r\n\r\n",
        b"POST /v2 HTTP/1.1\r\nContent-Length: 3\r\nContent-Length: 4\r\n\r\nabcd",
        b"POST /v2 HTTP/1.1\r\nContent-Length: 3\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        b"CONNECT example.org:443 HTTP/1.1\r\nHost: example.org\r\n\r\n",
        CHUNKED + b"zz\r\n",
        b"POST /predictions/echo HTTP/1.1\r\nContent-Length: 3\r\nConnection: Upgrade\r\nUpgrade: h2c\r\n\r\nabc",
    ],
)
@pytest.mark.parametrize("loop", ["uvloop", "asyncio"])
def test_garbage_is_answered_400_and_the_connection_ends(tmp_path: Path, data: bytes, loop: str) -> None:
    async def test() -> None:
        async with edges(tmp_path) as served:
            for to in (served.port, served.http_path):
                async with WebPeer(to) as peer:
                    await peer.send(data)
                    answer = await peer.answer()
                    assert (answer.status, answer.json()["code"]) == (400, "invalid_input")
                    assert answer.headers["connection"] == "close"
                    assert await peer.ended()
            await still_serves(served)
            assert len(served.engine.seen) == 1

    run(test, loop=loop)


@FUZZ
@given(st.lists(st.binary(max_size=200), max_size=6))
def test_random_bytes_harm_nobody(tmp_path: Path, streams: list[bytes]) -> None:
    async def test() -> None:
        async with edges(tmp_path) as served:
            prefixes = (b"", b"POST /predictions/echo HTTP/1.1\r\n", CHUNKED)
            for data in [prefix + data for data in streams for prefix in prefixes]:
                async with WebPeer(served.port) as peer:
                    with suppress(ConnectionError, EOFError, asyncio.LimitOverrunError):
                        await peer.send(data)
                        peer.writer.write_eof()
                        while True:
                            await peer.answer()
            await still_serves(served)

    run(test)


@FUZZ
@given(st.lists(st.tuples(st.integers(0, 10**6), st.integers(1, 255)), max_size=3), st.integers(0, 10**6))
def test_damaged_and_cut_requests_harm_nobody(tmp_path: Path, flips: list[tuple[int, int]], cut: int) -> None:
    async def test() -> None:
        async with edges(tmp_path) as served:
            whole = request("POST", PREDICT, b"abc") * 2 + CHUNKED + b"3\r\nabc\r\n0\r\n\r\n"
            data = bytearray(whole)
            for place, flip in flips:
                data[place % len(data)] ^= flip
            for sent in (bytes(data), whole[: cut % len(whole)]):
                async with WebPeer(served.port) as peer:
                    with suppress(ConnectionError, EOFError, asyncio.LimitOverrunError):
                        await peer.send(sent)
                        peer.writer.write_eof()
                        while True:
                            await peer.answer()
            await still_serves(served)

    run(test)


@pytest.mark.parametrize(
    "data",
    [
        b"GET /" + b"x" * 5000 + b" HTTP/1.1\r\nHost: b\r\n\r\n",
        b"GET /v2 HTTP/1.1\r\nA: " + b"x" * 5000 + b"\r\n\r\n",
        b"GET /v2 HTTP/1.1\r\n" + b"A: x\r\n" * 1000 + b"\r\n",
        b"GET /v2 HTTP/1.1\r\nA: " + b"x" * 5000,
        b"GET /" + b"x" * 5000,
    ],
)
@pytest.mark.parametrize("step", [700, 100_000])
def test_headers_above_the_limit_are_refused(tmp_path: Path, data: bytes, step: int) -> None:
    async def test() -> None:
        async with edges(tmp_path, header_bytes_max=2 * KIB, read_timeout_s=30) as served:
            async with WebPeer(served.port) as peer:
                for offset in range(0, len(data), step):
                    await peer.send(data[offset : offset + step])
                    await asyncio.sleep(0)
                if step > len(data) and not data.endswith(b"\r\n\r\n"):
                    await peer.send(b"x" * 3000)  # one read may pass unmeasured, what follows it does not
                answer = await peer.answer()
                assert (answer.status, answer.json()["code"]) == (431, "too_large")
                assert await peer.ended()
            await still_serves(served)

    run(test)


def test_headers_at_the_limit_pass(tmp_path: Path) -> None:
    async def test() -> None:
        async with edges(tmp_path, header_bytes_max=2 * KIB) as served:
            assert (await ask(served.port, "GET", "/v2", X="x" * 1900)).status == 200
            body = bytes(500 * KIB)  # a large body behind small headers, in the same reads
            assert (await ask(served.port, "POST", PREDICT, body)).body == body

    run(test)


@pytest.mark.parametrize("client", ["announces", "chunks", "trailers", "chunk-extensions"])
def test_bodies_above_the_limit_are_refused_and_the_client_can_read_why(tmp_path: Path, client: str) -> None:
    async def test() -> None:
        async with edges(tmp_path, body_bytes_max=100 * KIB, header_bytes_max=2 * KIB) as served:
            async with WebPeer(served.port) as peer:
                if client == "announces":
                    data = request("POST", PREDICT, bytes(3000 * KIB))
                elif client == "chunks":
                    data = CHUNKED + b"400\r\n" + bytes(KIB) + b"\r\n" + (b"400\r\n" + bytes(KIB) + b"\r\n") * 3000
                elif client == "trailers":
                    data = CHUNKED + b"0\r\n" + b"A: x\r\n" * 500_000
                else:
                    data = CHUNKED + b"1;" + b"x" * 3_000_000
                await peer.send(data)
                answer = await peer.answer()
                assert (answer.status, answer.json()["code"]) == (413, "too_large")
                assert await peer.ended()
            await still_serves(served)
            assert len(served.engine.seen) == 1

    run(test)


def test_a_body_at_the_limit_passes(tmp_path: Path) -> None:
    async def test() -> None:
        async with edges(tmp_path, body_bytes_max=100 * KIB) as served:
            body = bytes(100 * KIB)
            assert (await ask(served.port, "POST", PREDICT, body)).body == body
            assert (await ask(served.port, "POST", PREDICT, body + b"x")).status == 413

    run(test)


def test_a_zip_bomb_is_refused(tmp_path: Path) -> None:
    async def test() -> None:
        async with edges(tmp_path, body_bytes_max=1024 * KIB) as served:
            bomb = gzip.compress(bytes(100 * 1024 * KIB))
            answer = await ask(served.port, "POST", PREDICT, bomb, Content_Encoding="gzip")
            assert (answer.status, answer.json()["error"]) == (413, "too_large")
            damaged = await ask(served.port, "POST", PREDICT, bomb[:-9], Content_Encoding="gzip")
            assert damaged.status == 413
            assert (await ask(served.port, "POST", PREDICT, b"x", Content_Encoding="br")).status == 400
            assert served.engine.seen == []

    run(test)


HALVES = [
    b"G",
    b"POST /predictions/echo HT",
    b"POST /predictions/echo HTTP/1.1\r\nHost: b\r\n",
    request("POST", PREDICT, b"abc")[:-1],
    CHUNKED + b"3\r\nab",
]


@pytest.mark.parametrize("part", HALVES)
@pytest.mark.parametrize("loop", ["uvloop", "asyncio"])
def test_a_half_sent_request_ends_at_its_deadline(tmp_path: Path, part: bytes, loop: str) -> None:
    async def test() -> None:
        async with edges(tmp_path, read_timeout_s=0.05) as served:
            for to in (served.port, served.http_path):
                async with WebPeer(to) as peer:
                    await peer.send(part)
                    answer = await peer.answer()
                    assert (answer.status, answer.json()["code"]) == (408, "invalid_input")
                    assert await peer.ended()
            await still_serves(served)
            assert len(served.engine.seen) == 1

    run(test, loop=loop)


@pytest.mark.parametrize("part", HALVES)
def test_a_half_sent_request_after_a_whole_one_does_not_end_that(tmp_path: Path, part: bytes) -> None:
    async def test() -> None:
        async with edges(tmp_path, read_timeout_s=0.05) as served, WebPeer(served.port) as peer:
            served.engine.holding = True
            await peer.send(request("POST", PREDICT, b"whole") + part)
            await until(lambda: len(served.engine.waiting) == 1)
            async with WebPeer(served.port) as other:
                await other.send(b"G")
                assert (await other.answer()).status == 408  # by now the deadline has passed
            served.engine.release()
            assert (await peer.answer()).body == b"whole"
            assert (await peer.answer()).status == 408
            assert await peer.ended()

    run(test)


@pytest.mark.parametrize("bad", [b"garbage\r\n\r\n", CHUNKED + b"zz\r\n", b"GET / HTTP/1.1\r\nX\r\n\r\n"])
@pytest.mark.parametrize("before", [1, 3])
def test_garbage_after_whole_requests_does_not_lose_their_answers(tmp_path: Path, bad: bytes, before: int) -> None:
    async def test() -> None:
        async with edges(tmp_path) as served, WebPeer(served.port) as peer:
            served.engine.holding = True
            await peer.send(request("POST", PREDICT, b"whole") * before + bad)
            for _ in range(before):
                await until(lambda: len(served.engine.waiting) == 1)
                served.engine.release()
                assert (await peer.answer()).body == b"whole"
            with suppress(EOFError):
                assert (await peer.answer()).status == 400
            assert await peer.ended()
            await until(lambda: served.budget.held == 0)

    run(test)


def test_a_client_that_stops_in_its_body_leaves_nothing(tmp_path: Path) -> None:
    async def test() -> None:
        async with edges(tmp_path) as served:
            async with WebPeer(served.port) as peer:
                await peer.send(request("POST", PREDICT, bytes(10**6))[:-1])
                await until(lambda: served.budget.held > 0)
            await still_serves(served)
            assert len(served.engine.seen) == 1

    run(test)


def test_half_received_bodies_share_one_budget(tmp_path: Path) -> None:
    async def test() -> None:
        bounds = {"body_bytes_max": 200 * KIB, "receive_bytes_max": 300 * KIB}
        async with edges(tmp_path, **bounds) as served, WebPeer(served.port) as first:
            whole = request("POST", PREDICT, bytes(200 * KIB))
            await first.send(whole[:-1])
            await until(lambda: served.budget.held >= 199 * KIB)
            async with WebPeer(served.http_path) as second:
                await second.send(whole[:-1])
                answer = await second.answer()
                assert (answer.status, answer.json()["code"], answer.headers["retry-after"]) == (503, "overloaded", "1")
            await first.send(whole[-1:])
            assert (await first.answer()).status == 200

    run(test)


def test_a_refused_request_with_a_body_under_way_leaves_the_connection_usable(tmp_path: Path) -> None:
    async def test() -> None:
        async with edges(tmp_path) as served, WebPeer(served.port) as peer:
            whole = request("GET", PREDICT, bytes(300 * KIB))
            await peer.send(whole[:100_000])
            assert (await peer.answer()).status == 405
            await peer.send(whole[100_000:])
            assert (await peer.ask("POST", PREDICT, b"abc")).body == b"abc"

    run(test)


def test_a_refused_request_that_never_ends_is_cut(tmp_path: Path) -> None:
    async def test() -> None:
        async with edges(tmp_path, read_timeout_s=0.05) as served, WebPeer(served.port) as peer:
            await peer.send(request("GET", PREDICT, bytes(300 * KIB))[:100_000])
            assert (await peer.answer()).status == 405
            assert await peer.ended()

    run(test)


def test_connections_are_capped_and_told(tmp_path: Path) -> None:
    async def test() -> None:
        async with edges(tmp_path, connections_max=2) as served:
            async with WebPeer(served.port) as one, WebPeer(served.port) as two:
                for peer in (one, two):
                    assert (await peer.ask("GET", "/v2")).status == 200
                async with WebPeer(served.port) as three:
                    answer = await three.answer()
                    assert (answer.status, answer.json()["code"]) == (503, "overloaded")
                    assert await three.ended()
                assert (await one.ask("GET", "/v2")).status == 200
            await until(lambda: not served.http.state.connections)
            await still_serves(served)

    run(test)


def test_those_who_stay_after_being_refused_are_aborted(tmp_path: Path) -> None:
    async def test() -> None:
        async with edges(tmp_path, connections_max=1) as served, WebPeer(served.port) as one:
            await one.ask("GET", "/v2")
            async with WebPeer(served.port) as two, WebPeer(served.port) as three:
                assert (await two.answer()).status == 503
                assert await three.ended()

    run(test)


def test_a_silent_connection_ends_at_its_deadline(tmp_path: Path) -> None:
    async def test() -> None:
        async with edges(tmp_path, idle_timeout_s=0.05) as served, WebPeer(served.port) as peer:
            assert await peer.ended()

    run(test)


def test_a_client_that_does_not_read_is_cut(tmp_path: Path) -> None:
    async def test() -> None:
        engine = FakeEngine()
        engine.reply = lambda request: ({"kind": "result", "model": request.model}, (bytes(30_000_000),))
        async with edges(tmp_path, engine=engine, write_timeout_s=0.05) as served:
            for to in (served.port, served.http_path):
                family = socket.AF_UNIX if isinstance(to, Path) else socket.AF_INET
                with socket.socket(family) as slow:
                    slow.connect(str(to) if isinstance(to, Path) else ("127.0.0.1", to))
                    slow.sendall(request("POST", PREDICT, b"abc"))
                    before = served.engine.answers
                    await until(lambda before=before: served.engine.answers > before)
                    await until(lambda: not served.http.state.connections and not served.http_unix.state.connections)
            assert 'reason="slow_reader"' in served.metrics.render().decode()
            engine.reply = FakeEngine().reply
            await still_serves(served)

    run(test)


def test_many_small_bodies_that_inflate_to_large_ones_are_bounded_together(tmp_path: Path) -> None:
    async def test() -> None:
        bounds = {"body_bytes_max": 4 * KIB * KIB, "receive_bytes_max": 8 * KIB * KIB}
        engine = FakeEngine()
        async with edges(tmp_path, engine=engine, **bounds) as served:
            bomb = gzip.compress(bytes(4 * KIB * KIB))
            highest = 0

            async def offer() -> int:
                return (await ask(served.port, "POST", PREDICT, bomb, Content_Encoding="gzip")).status

            async def watch() -> None:
                nonlocal highest
                while True:
                    highest = max(highest, served.budget.held)
                    await asyncio.sleep(0)

            watcher = asyncio.ensure_future(watch())
            async with asyncio.TaskGroup() as group:
                offers = [group.create_task(offer()) for _ in range(12)]
            watcher.cancel()
            assert {offer.result() for offer in offers} == {200, 503}
            assert highest <= 8 * KIB * KIB
            await still_serves(served)

    run(test)


def test_a_header_that_would_outgrow_the_workers_frame_is_refused_at_the_edge(tmp_path: Path) -> None:
    async def test() -> None:
        async with edges(tmp_path) as served:
            answer = await ask(served.port, "POST", PREDICT, b"abc", Content_Type="\xe9" * 40_000)
            assert (answer.status, answer.json()["error"]) == (400, "invalid_input")
            assert not served.engine.seen
            await still_serves(served)

    run(test)


@pytest.mark.parametrize("path", ["/v1/status", "/v1/deploy", "/v2/repository/index"])
def test_arguments_above_their_limit_are_refused_before_they_are_parsed(tmp_path: Path, path: str) -> None:
    async def test() -> None:
        async with edges(tmp_path) as served:
            bomb = b'{"a":[' + b"[]," * 100_000 + b"[]]}"
            answer = await ask(served.port, "POST", path, bomb)
            assert (answer.status, answer.json()["code"]) == (413, "too_large")
            assert not served.control.calls
            await still_serves(served)

    run(test)


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("localhost", 200),
        ("127.0.0.1:8080", 200),
        ("[::1]:8080", 200),
        ("till.localhost", 200),
        ("box", 200),
        ("", 200),
        ("attacker.example", 401),
        ("attacker.example:8080", 401),
        ("127.0.0.1.attacker.example", 401),
        ("attacker.", 401),
    ],
)
def test_a_web_page_that_renamed_itself_to_this_box_is_nobody(tmp_path: Path, host: str, status: int) -> None:
    """DNS rebinding: the browser on this box connects from loopback, but names the page's own host."""

    async def test() -> None:
        async with edges(tmp_path) as served:
            for verb, path, body in (("POST", PREDICT, b"abc"), ("GET", "/v1/status", b""), ("GET", "/metrics", b"")):
                data = f"{verb} {path} HTTP/1.1\r\nHost: {host}\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body
                async with WebPeer(served.port) as peer:
                    await peer.send(data)
                    assert (await peer.answer()).status == status
                async with WebPeer(served.http_path) as peer:  # there the kernel says who asks
                    await peer.send(data)
                    assert (await peer.answer()).status == 200

    run(test)


def test_small_requests_pass_while_others_hold_the_whole_receive_budget(tmp_path: Path) -> None:
    async def test() -> None:
        async with edges(tmp_path, body_bytes_max=KIB * KIB, receive_bytes_max=KIB * KIB) as served:
            async with FramePeer(served.frame_path) as hog:
                await hog.send_raw(encode_head({"kind": "infer", "id": 1}, KIB * KIB))
                await until(lambda: served.budget.held > 0)
                assert (await ask(served.port, "POST", PREDICT, b"abc")).body == b"abc"
                small = gzip.compress(b"abc")
                assert (await ask(served.port, "POST", PREDICT, small, Content_Encoding="gzip")).body == b"abc"
                assert (await ask(served.port, "POST", PREDICT, bytes(200 * KIB))).status == 503

    run(test)
