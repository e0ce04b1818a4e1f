"""Inference that never enters ASGI: its place among other routes on a connection, its refusals, its ends."""

from __future__ import annotations

import asyncio
import gzip
import itertools
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from agent.serving.ports import InferRequest
from tests.fakes.edges import RolesOnly, edges, run, until
from tests.fakes.engine import FakeEngine
from tests.fakes.web import Answer, WebPeer, ask, request

pytestmark = pytest.mark.integration

FUZZ = settings(deadline=None, max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
PREDICT = "/predictions/echo"
INFER = "/v2/models/echo/infer"


def chunked(*parts: bytes) -> bytes:
    body = b"".join(b"%x\r\n%b\r\n" % (len(part), part) for part in parts)
    return b"POST /predictions/echo HTTP/1.1\r\nHost: b\r\nTransfer-Encoding: chunked\r\n\r\n" + body + b"0\r\n\r\n"


# Requests of every kind, each with the status and body that must answer it.
KINDS: dict[str, tuple[bytes, int, bytes | None]] = {
    "infer": (request("POST", INFER, b'{"a":1}'), 200, b'{"a":1}'),
    "predict": (request("POST", PREDICT, b"abc"), 200, b"abc"),
    "empty": (request("POST", PREDICT), 200, b""),
    "chunked": (chunked(b"de", b"fgh"), 200, b"defgh"),
    "gzip": (request("POST", PREDICT, gzip.compress(b"ij" * 300_000), Content_Encoding="gzip"), 200, b"ij" * 300_000),
    "not gzip": (request("POST", PREDICT, b"plain", Content_Encoding="gzip"), 400, None),
    "identity": (request("POST", PREDICT, b"k", Content_Encoding="Identity"), 200, b"k"),
    "live": (request("GET", "/v2/health/live"), 200, b'{"live":true}'),
    "verb": (request("POST", "/v1/echo", b'{"x":[1]}'), 200, b'{"x":[1]}'),
    "nowhere": (request("GET", "/nowhere"), 404, None),
    "nobody": (request("POST", "/predictions/nobody", b"abc"), 404, None),
    "wrong method": (request("GET", PREDICT, b"ignored"), 405, None),
    "wrong deadline": (request("POST", PREDICT, b"abc", X_Deadline_Ms="soon"), 400, None),
    "long routing key": (request("POST", PREDICT, b"abc", X_Routing_Key="k" * 2000), 400, None),
    "wrong length": (request("POST", INFER, b"abc", Inference_Header_Content_Length="4"), 400, None),
}


def is_answer_to(kind: str, answer: Answer) -> bool:
    _, status, body = KINDS[kind]
    if body is None:
        return answer.status == status and bool(answer.json()["error"])
    return (answer.status, answer.body) == (status, body)


class LaterEngine(FakeEngine):
    """Answers in the next turn of the loop."""

    def submit(self, request: InferRequest) -> None:
        holding, self.holding = self.holding, True
        super().submit(request)
        self.holding = holding
        if not holding:
            asyncio.get_running_loop().call_soon(self.release)


def test_a_routing_key_is_the_text_that_was_sent(tmp_path: Path) -> None:
    async def test() -> None:
        async with edges(tmp_path) as served:
            for sent in ("", "user-1", "\u00fc".encode().decode("latin-1"), "\xff"):
                await ask(served.port, "POST", PREDICT, b"abc", X_Routing_Key=sent)
            assert [seen.routing_key for seen in served.engine.seen] == ["", "user-1", "\u00fc", "\udcff"]

    run(test)


@pytest.mark.parametrize("engine", [FakeEngine, LaterEngine])
@pytest.mark.parametrize("loop", ["uvloop", "asyncio"])
def test_one_connection_carries_inference_and_everything_else_in_order(
    tmp_path: Path, engine: Callable[[], FakeEngine], loop: str
) -> None:
    async def test() -> None:
        async with edges(tmp_path, engine=engine()) as served:
            order = [*KINDS, *reversed(KINDS)]
            for to in (served.port, served.http_path):
                async with WebPeer(to) as peer:
                    for kind in order:  # one after the other, on a connection that stays
                        await peer.send(KINDS[kind][0])
                        assert is_answer_to(kind, await peer.answer()), kind
                    await peer.send(b"".join(KINDS[kind][0] for kind in order))
                    for kind in order:
                        assert is_answer_to(kind, await peer.answer()), kind
            assert served.budget.held == 0

    run(test, loop=loop)


@FUZZ
@given(st.lists(st.sampled_from(sorted(KINDS)), max_size=12), st.lists(st.floats(0, 1), max_size=12), st.booleans())
def test_answers_do_not_depend_on_how_the_bytes_arrive(
    tmp_path: Path, kinds: list[str], cuts: list[float], later: bool
) -> None:
    async def test() -> None:
        async with edges(tmp_path, engine=LaterEngine() if later else FakeEngine()) as served:
            data = b"".join(KINDS[kind][0] for kind in kinds)
            places = [0, *sorted(int(cut * len(data)) for cut in cuts), len(data)]
            async with WebPeer(served.http_path) as peer, asyncio.TaskGroup() as group:

                async def send() -> None:
                    for start, end in itertools.pairwise(places):
                        await peer.send(data[start:end])
                        await asyncio.sleep(0)

                group.create_task(send())
                for kind in kinds:
                    assert is_answer_to(kind, await peer.answer()), kind
            await until(lambda: served.budget.held == 0)

    run(test)


def test_inference_starts_no_task(tmp_path: Path) -> None:
    async def test() -> None:
        async with edges(tmp_path) as served, WebPeer(served.port) as peer:
            served.engine.holding = True
            await peer.send(request("POST", PREDICT, b"abc"))
            await until(lambda: len(served.engine.waiting) == 1)
            assert not served.http.state.tasks
            served.engine.release()
            assert (await peer.answer()).body == b"abc"

    run(test)


def test_only_one_request_of_a_connection_is_with_the_engine(tmp_path: Path) -> None:
    async def test() -> None:
        async with edges(tmp_path) as served, WebPeer(served.port) as peer:
            served.engine.holding = True
            await peer.send(request("POST", PREDICT, b"1") + KINDS["live"][0] + request("POST", PREDICT, b"2"))
            await until(lambda: len(served.engine.waiting) == 1)
            served.engine.release()
            assert (await peer.answer()).body == b"1"
            assert is_answer_to("live", await peer.answer())
            await until(lambda: len(served.engine.waiting) == 1)
            served.engine.release()
            assert (await peer.answer()).body == b"2"

    run(test)


def test_thousands_of_waiting_requests_are_answered(tmp_path: Path) -> None:
    async def test() -> None:
        async with edges(tmp_path) as served, WebPeer(served.port) as peer, asyncio.TaskGroup() as group:
            served.engine.holding = True
            await peer.send(request("POST", PREDICT, b"first"))
            await until(lambda: len(served.engine.waiting) == 1)
            group.create_task(peer.send(KINDS["nobody"][0] * 5000))  # errors: answered at once, each within the last
            connection = next(iter(served.http.state.connections))
            await until(lambda: len(connection.pipeline) > 1000)
            served.engine.holding = False
            served.engine.release()
            assert (await peer.answer()).body == b"first"
            for _ in range(5000):
                assert (await peer.answer()).status == 404

    run(test)


def test_a_client_that_does_not_read_is_not_worked_for(tmp_path: Path) -> None:
    async def test() -> None:
        engine = LaterEngine()
        engine.reply = lambda asked: ({"kind": "result", "model": asked.model}, (bytes(2_000_000),))
        async with edges(tmp_path, engine=engine) as served, WebPeer(served.http_path) as peer:
            await peer.send(request("POST", PREDICT, b"abc") * 50)
            (connection,) = served.http_unix.state.connections
            await until(lambda: bool(connection.flow.write_paused))
            assert len(engine.seen) < 50
            assert connection.flow.read_paused
            for _ in range(50):
                assert len((await peer.answer()).body) == 2_000_000
            assert is_answer_to("live", await peer.ask("GET", "/v2/health/live"))

    run(test)


@pytest.mark.parametrize("method", ["GET", "PUT", "DELETE", "OPTIONS", "HEAD", "PATCH"])
@pytest.mark.parametrize("path", [PREDICT, INFER, "/v2/models/nobody/versions/7/infer?x"])
def test_only_post_infers(tmp_path: Path, method: str, path: str) -> None:
    async def test() -> None:
        async with edges(tmp_path) as served, WebPeer(served.port) as peer:
            await peer.send(request(method, path, X_Request_Id="r-1") + KINDS["predict"][0])
            if method == "HEAD":  # its length is told, its body is not sent
                head = (await peer.head()).lower()
                assert head.startswith(b"http/1.1 405 ")
                assert b"\r\nallow: post\r\n" in head
                assert b"\r\ncontent-length: 0\r\n" not in head
            else:
                answer = await peer.answer()
                assert (answer.status, answer.headers["allow"], answer.headers["x-request-id"]) == (405, "POST", "r-1")
            assert is_answer_to("predict", await peer.answer())
            assert len(served.engine.seen) == 1

    run(test)


def test_absolute_addresses_are_understood(tmp_path: Path) -> None:
    async def test() -> None:
        async with edges(tmp_path) as served:
            assert (await ask(served.port, "POST", "http://box:1" + PREDICT, b"abc")).body == b"abc"

    run(test)


# Expect: 100-continue


def test_who_is_refused_is_not_asked_for_a_body(tmp_path: Path) -> None:
    async def test() -> None:
        async with edges(tmp_path, policy=RolesOnly("read")) as served, WebPeer(served.http_path) as peer:
            head = request("POST", PREDICT, bytes(1000), Expect="100-continue")[:-1000]
            await peer.send(head)
            assert (await peer.answer()).status == 403
            await peer.send(bytes(1000) + head.replace(b"POST", b"GET"))
            assert (await peer.answer()).status == 405
            assert served.engine.seen == []

    run(test)


def test_a_waiting_request_is_asked_for_its_body_when_its_turn_comes(tmp_path: Path) -> None:
    async def test() -> None:
        async with edges(tmp_path) as served, WebPeer(served.port) as peer:
            served.engine.holding = True
            head = request("POST", PREDICT, b"abc", Expect="100-continue")[:-3]
            await peer.send(request("POST", PREDICT, b"first") + head)
            await until(lambda: len(served.engine.waiting) == 1)
            served.engine.holding = False
            served.engine.release()
            assert (await peer.answer()).body == b"first"
            assert (await peer.answer()).status == 100
            await peer.send(b"abc")
            assert (await peer.answer()).body == b"abc"

    run(test)


def test_who_sends_the_body_unasked_is_not_told_to(tmp_path: Path) -> None:
    async def test() -> None:
        async with edges(tmp_path) as served, WebPeer(served.port) as peer:
            served.engine.holding = True
            await peer.send(KINDS["predict"][0] + request("POST", PREDICT, b"abc", Expect="100-continue"))
            await until(lambda: len(served.engine.waiting) == 1)
            served.engine.holding = False
            served.engine.release()
            assert [(await peer.answer()).body for _ in range(2)] == [b"abc", b"abc"]

    run(test)


# Ends


@pytest.mark.parametrize("data", [request("POST", PREDICT, bytes(5000))[:-1], chunked(bytes(5000))[:-9]])
@pytest.mark.parametrize("before", [0, 1])
def test_a_client_that_leaves_in_its_body_asked_nothing(tmp_path: Path, data: bytes, before: int) -> None:
    async def test() -> None:
        async with edges(tmp_path) as served:
            served.engine.holding = True
            async with WebPeer(served.port) as peer:
                await peer.send(request("POST", PREDICT, b"whole") * before + data)
                await until(lambda: bool(served.http.state.connections))
                await until(lambda: len(served.engine.waiting) == before)
            await until(lambda: not served.http.state.connections)
            assert served.budget.held == 0
            assert len(served.engine.seen) == len(served.engine.canceled) == before

    run(test)


def test_a_client_that_leaves_withdraws_what_is_asked_and_what_waits(tmp_path: Path) -> None:
    async def test() -> None:
        async with edges(tmp_path) as served:
            served.engine.holding = True
            async with WebPeer(served.port) as peer:
                await peer.send(request("POST", PREDICT, b"abc") * 3 + KINDS["live"][0] + KINDS["gzip"][0])
                await until(lambda: len(served.engine.waiting) == 1)
            await until(lambda: len(served.engine.canceled) == 1)
            served.engine.holding = False
            assert is_answer_to("predict", await ask(served.port, "POST", PREDICT, b"abc"))
            assert len(served.engine.seen) == 2

    run(test)


def test_a_client_that_leaves_while_its_body_is_inflated_asked_nothing(tmp_path: Path) -> None:
    async def test() -> None:
        body = gzip.compress(bytes(60_000_000))
        async with edges(tmp_path) as served:
            async with WebPeer(served.port) as peer:
                await peer.send(request("POST", PREDICT, body, Content_Encoding="gzip"))
                await until(lambda: bool(served.http.state.connections))
                (connection,) = served.http.state.connections
                await until(lambda: connection.cycle is not None and not connection.cycle.more_body)
                connection.transport.abort()
            await until(lambda: not served.http.state.connections)
            await still_answers(served.port)
            assert len(served.engine.seen) == 1

    run(test)


async def still_answers(port: int) -> None:
    assert (await ask(port, "POST", PREDICT, b"abc")).body == b"abc"


@pytest.mark.parametrize("first", ["1.1", "1.0"])
def test_what_follows_the_last_request_is_no_request(tmp_path: Path, first: str) -> None:
    async def test() -> None:
        async with edges(tmp_path) as served:
            extra = {"Connection": "close" if first == "1.1" else "keep-alive"}
            data = request("POST", PREDICT, b"abc", **extra).replace(b"HTTP/1.1", b"HTTP/" + first.encode(), 1)
            for engine_holds in (False, True):
                served.engine.holding = engine_holds
                async with WebPeer(served.port) as peer:
                    await peer.send(data + KINDS["predict"][0])
                    if engine_holds:
                        await until(lambda: len(served.engine.waiting) == 1)
                        served.engine.release()
                    answer = await peer.answer()
                    assert (answer.body, answer.headers["connection"]) == (b"abc", "close")
                    assert await peer.ended()
            assert len(served.engine.seen) == 2

    run(test)


def test_the_end_waits_for_all_that_was_asked_on_a_connection(tmp_path: Path) -> None:
    async def test() -> None:
        engine = FakeEngine()
        engine.holding = True
        stop, started = asyncio.Event(), asyncio.Event()
        ports: list[int] = []

        async def serve() -> None:
            async with edges(tmp_path, engine=engine) as served:
                ports.append(served.port)
                started.set()
                await stop.wait()

        async with asyncio.TaskGroup() as group:
            server = group.create_task(serve())
            await started.wait()
            async with WebPeer(ports[0]) as several, WebPeer(ports[0]) as half:
                await half.send(request("POST", PREDICT, b"half")[:-1])
                await several.send(KINDS["predict"][0] + KINDS["live"][0] + request("POST", PREDICT, b"last"))
                await until(lambda: len(engine.waiting) == 1)
                stop.set()
                with suppress(OSError):
                    while True:  # until intake has stopped
                        async with WebPeer(ports[0]) as late:
                            assert await late.ended()
                engine.holding = False
                engine.release()
                answers = [await several.answer() for _ in range(3)]
                assert [answer.body for answer in answers] == [b"abc", b'{"live":true}', b"last"]
                assert [answer.headers.get("connection") for answer in answers] == [None, None, "close"]
                assert await several.ended()
                assert not server.done()
                await half.send(b"f")
                assert (await half.answer()).body == b"half"
                assert await half.ended()

    run(test)


def test_a_fault_ends_its_connection_and_nothing_else(tmp_path: Path) -> None:
    class Faulty(FakeEngine):
        def submit(self, request: InferRequest) -> None:
            if request.body == b"fault":
                raise RuntimeError("a bug")
            super().submit(request)

    async def test() -> None:
        async with edges(tmp_path, engine=Faulty()) as served, WebPeer(served.port) as other:
            async with WebPeer(served.port) as peer:
                await peer.send(request("POST", PREDICT, b"fault"))
                assert await peer.ended()
            assert (await other.ask("POST", PREDICT, b"abc")).body == b"abc"
            assert 'reason="fault"' in served.metrics.render().decode()

    run(test)
