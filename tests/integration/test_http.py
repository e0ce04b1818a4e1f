"""HTTP with well-behaved clients, on TCP and on the unix socket."""

from __future__ import annotations

import asyncio
import gzip
import hashlib
import http.client
import os
import shutil
import signal
import socket
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from agent.arena import Arena, slot_of
from agent.config import AuthConfig, TokenConfig
from agent.errors import HandlerError, OverloadedError
from tests.fakes.edges import Edges, RolesOnly, edges, run, until
from tests.fakes.engine import FakeEngine, FakeState
from tests.fakes.web import WebPeer, ask, request

pytestmark = pytest.mark.integration

MIB = 1024 * 1024
INFER = "/v2/models/echo/infer"


def both(served: Edges) -> tuple[int, Path]:
    return served.port, served.http_path


@pytest.mark.parametrize("loop", ["uvloop", "asyncio"])
def test_raw_bodies_are_predicted(tmp_path: Path, loop: str) -> None:
    async def test() -> None:
        async with edges(tmp_path) as served:
            for to in both(served):
                answer = await ask(to, "POST", "/predictions/echo", b"abc", Content_Type="image/png", Accept="a/b")
                assert (answer.status, answer.body) == (200, b"abc")
                assert answer.headers["content-type"] == "image/png"
                assert answer.headers["x-model-version"] == "1.0.0"
                assert answer.headers["x-model-variant"] == "fp32"
            header = served.engine.seen[0].header
            assert header == {
                "kind": "infer",
                "model": "echo",
                "content_type": "image/png",
                "stream": "auto",
            }

    run(test, loop=loop)


@pytest.mark.parametrize("path", ["/predictions/echo/1.0.0", "/predictions/%65cho/1%2E0.0?query=ignored"])
def test_a_version_may_be_named(tmp_path: Path, path: str) -> None:
    async def test() -> None:
        async with edges(tmp_path) as served:
            assert (await ask(served.port, "POST", path, b"abc")).status == 200
            assert (served.engine.seen[0].model, served.engine.seen[0].version) == ("echo", "1.0.0")
            assert served.engine.seen[0].header["content_type"] == "application/octet-stream"

    run(test)


@pytest.mark.parametrize("path", [INFER, "/v2/models/echo/versions/1.0.0/infer", INFER + "?x=1"])
@pytest.mark.parametrize("length", [None, "0", "7"])
def test_inference_protocol_bodies_pass_unread(tmp_path: Path, path: str, length: str | None) -> None:
    async def test() -> None:
        async with edges(tmp_path) as served:
            headers = {} if length is None else {"inference_header_content_length": length}
            answer = await ask(served.port, "POST", path, b'{"a":1}\x00\xff', **headers)
            assert (answer.status, answer.body) == (200, b'{"a":1}\x00\xff')
            header = served.engine.seen[0].header
            assert header["content_type"] == "application/vnd.oip+json"
            assert header.get("params") == (None if length is None else {"oip_header_bytes": int(length)})
            assert answer.headers.get("inference-header-content-length") == length

    run(test)


@pytest.mark.parametrize("length", ["-1", "x", "", "10", "1.5", "0x1", "1" * 30, "\xb2"])
def test_a_wrong_length_of_the_json_part_is_refused(tmp_path: Path, length: str) -> None:
    async def test() -> None:
        async with edges(tmp_path) as served:
            answer = await ask(served.port, "POST", INFER, b"012345678", Inference_Header_Content_Length=length)
            assert (answer.status, answer.json()["code"]) == (400, "invalid_input")
            assert served.engine.seen == []

    run(test)


@pytest.mark.parametrize(("encoding", "pack"), [("gzip", gzip.compress), ("deflate", zlib.compress)])
def test_compressed_bodies_arrive_decompressed(tmp_path: Path, encoding: str, pack: Callable[[bytes], bytes]) -> None:
    async def test() -> None:
        async with edges(tmp_path) as served:
            body = b'{"inputs":[]}' + bytes(2 * MIB)
            headers = {"content_encoding": encoding, "inference_header_content_length": "13"}
            answer = await ask(served.port, "POST", INFER, pack(body), **headers)
            assert (answer.status, answer.body) == (200, body)

    run(test)


@pytest.mark.parametrize("size", [0, 1, 70_000, 6_000_000])
def test_bodies_of_any_size_pass_unchanged(tmp_path: Path, size: int) -> None:
    async def test() -> None:
        async with edges(tmp_path) as served:
            body = os.urandom(size)
            for to in both(served):
                answer = await ask(to, "POST", "/predictions/echo", body)
                assert (answer.status, answer.body == body) == (200, True)
            assert served.budget.held == 0

    run(test)


def test_chunked_bodies_are_joined(tmp_path: Path) -> None:
    async def test() -> None:
        async with edges(tmp_path) as served, WebPeer(served.port) as peer:
            await peer.send(b"POST /predictions/echo HTTP/1.1\r\nHost: b\r\nTransfer-Encoding: chunked\r\n\r\n")
            for part in (b"3\r\nabc\r\n", b"2;ext=1\r\nde\r\n", b"0\r\nTrailer: x\r\n\r\n"):
                await peer.send(part)
            assert (await peer.answer()).body == b"abcde"

    run(test)


def test_a_client_that_asks_first_is_told_to_continue(tmp_path: Path) -> None:
    async def test() -> None:
        async with edges(tmp_path) as served, WebPeer(served.port) as peer:
            await peer.send(request("POST", "/predictions/echo", b"", Expect="100-continue").replace(b"h: 0", b"h: 3"))
            assert (await peer.answer()).status == 100
            await peer.send(b"abc")
            assert (await peer.answer()).body == b"abc"

    run(test)


def test_connections_are_kept_and_pipelined_requests_answered_in_order(tmp_path: Path) -> None:
    async def test() -> None:
        async with edges(tmp_path) as served:
            for to in both(served):
                async with WebPeer(to) as peer:
                    for number in range(50):
                        assert (await peer.ask("POST", "/predictions/echo", b"%d" % number)).body == b"%d" % number
                    asks = [request("POST", "/predictions/echo", b"%d" % number) for number in range(50)]
                    asks.insert(25, request("GET", "/v2/health/live"))
                    await peer.send(b"".join(asks))
                    bodies = [(await peer.answer()).body for _ in range(51)]
                    assert bodies.pop(25) == b'{"live":true}'
                    assert bodies == [b"%d" % number for number in range(50)]

    run(test)


def test_many_clients_are_served_side_by_side(tmp_path: Path) -> None:
    async def test() -> None:
        async with edges(tmp_path) as served:

            async def one(number: int) -> None:
                async with WebPeer(both(served)[number % 2]) as peer:
                    for _ in range(10):
                        assert (await peer.ask("POST", "/predictions/echo", b"%d" % number)).body == b"%d" % number

            async with asyncio.TaskGroup() as group:
                for number in range(100):
                    group.create_task(one(number))
            assert served.engine.answers == 1000

    run(test)


def test_old_clients_get_their_answer_and_the_end(tmp_path: Path) -> None:
    async def test() -> None:
        async with edges(tmp_path) as served, WebPeer(served.port) as peer:
            await peer.send(b"POST /predictions/echo HTTP/1.0\r\nContent-Length: 3\r\n\r\nabc")
            assert (await peer.answer()).body == b"abc"
            assert await peer.ended()

    run(test)


def test_an_answer_is_one_write_and_is_not_delayed(tmp_path: Path) -> None:
    """Head and body as two segments, with Nagle's algorithm and delayed acknowledgements, would cost 40 ms."""

    async def test() -> None:
        async with edges(tmp_path) as served, WebPeer(served.port) as peer:
            await peer.ask("POST", "/predictions/echo", b"abc")
            (connection,) = served.http.state.connections
            sock = connection.transport.get_extra_info("socket")
            assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
            with socket.create_connection(("127.0.0.1", served.port)) as plain:
                loop = asyncio.get_running_loop()
                plain.setblocking(False)
                await loop.sock_sendall(plain, request("POST", "/predictions/echo", b"abc"))
                first = await loop.sock_recv(plain, 65536)
                assert first.endswith(b"\r\n\r\nabc")

    run(test)


@pytest.mark.parametrize("loop", ["uvloop", "asyncio"])
def test_a_large_body_is_received_into_memory_that_a_worker_can_be_given(tmp_path: Path, loop: str) -> None:
    async def test() -> None:
        arena = Arena(bytes_max=1 << 24, idle_bytes_max=1 << 24)
        async with edges(tmp_path, arena=arena) as served:
            body = os.urandom(700_000)
            for to in both(served):
                for _ in range(2):
                    answer = await ask(to, "POST", "/predictions/echo", body)
                    assert (answer.status, answer.body) == (200, body)
            packed = await ask(served.port, "POST", "/predictions/echo", gzip.compress(body), Content_Encoding="gzip")
            assert packed.body == body
            assert (await ask(served.port, "POST", "/nowhere", body)).status == 404
            small, compressed = await ask(served.port, "POST", "/predictions/echo", b"abc"), served.engine.seen[4]
            assert small.body == b"abc"
            large = served.engine.seen[:4]
            assert all(slot_of(request.body) is not None for request in large)
            assert slot_of(compressed.body) is None
            served.engine.seen.clear()
            del large
        assert arena.held_bytes == arena.idle_bytes > 0

    run(test, loop=loop)


def test_request_ids_are_echoed_or_made(tmp_path: Path) -> None:
    async def test() -> None:
        async with edges(tmp_path) as served:
            for path in ("/predictions/echo", INFER, "/v1/echo", "/nowhere", "/predictions/nobody"):
                answer = await ask(served.port, "POST", path, X_Request_Id="abc-1")
                assert answer.headers["x-request-id"] == "abc-1"
            made = {(await ask(served.port, "POST", INFER)).headers["x-request-id"] for _ in range(3)}
            assert len(made) == 3
            odd = await ask(served.port, "POST", INFER, X_Request_Id="x" * 200)
            assert odd.headers["x-request-id"] != "x" * 200

    run(test)


def test_the_deadline_is_the_clients_or_the_default(tmp_path: Path) -> None:
    async def test() -> None:
        async with edges(tmp_path, deadline_ms_default=50_000) as served:
            await ask(served.port, "POST", INFER, X_Deadline_Ms="200000")
            await ask(served.port, "POST", INFER)
            left = [request.deadline - asyncio.get_running_loop().time() for request in served.engine.seen]
            assert 100 < left[0] <= 200
            assert 0 < left[1] <= 50
            assert (await ask(served.port, "POST", INFER, X_Deadline_Ms="0")).status == 400

    run(test)


def test_errors_speak_the_routes_dialect(tmp_path: Path) -> None:
    async def test() -> None:
        async with edges(tmp_path) as served:
            answer = await ask(served.port, "POST", "/v2/models/nobody/infer")
            assert answer.status == 404
            assert answer.json()["error"].startswith("Request for unknown model")
            assert answer.json()["code"] == "unknown_model"
            answer = await ask(served.port, "POST", "/predictions/nobody")
            assert (answer.status, answer.json()["code"], answer.json()["error"]) == (404, 404, "unknown_model")
            assert set(answer.json()) == {"code", "type", "message", "error"}

    run(test)


def test_failures_of_the_engine_have_their_status(tmp_path: Path) -> None:
    async def test() -> None:
        async with edges(tmp_path) as served:

            def fail(error: Exception) -> Any:
                raise error

            served.engine.reply = lambda _request: fail(OverloadedError("full"))
            answer = await ask(served.port, "POST", INFER)
            assert (answer.status, answer.json()["code"], answer.headers["retry-after"]) == (503, "overloaded", "1")
            served.engine.reply = lambda _request: fail(HandlerError("it raised"))
            assert (await ask(served.port, "POST", INFER)).status == 500

    run(test)


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/predictions/echo", 405),
        ("PUT", INFER, 405),
        ("OPTIONS", INFER, 405),
        ("DELETE", "/v2", 405),
        ("POST", "/v2/health/live", 405),
        ("GET", "/v2/repository/index", 405),
        ("GET", "/", 404),
        ("GET", "/v2/", 404),
        ("GET", "/v2/nothing", 404),
        ("POST", "/predictions/", 404),
        ("POST", "/predictions/echo/1.0.0/more", 404),
        ("GET", "/v2/models/nobody", 404),
        ("GET", "/v2/models/nobody/ready", 404),
        ("GET", "/v2/models/echo/versions/9", 404),
        ("GET", "/%00/%ff", 404),
        ("POST", "/v2/models/%00%ff/infer", 404),
    ],
)
def test_wrong_verbs_and_paths(tmp_path: Path, method: str, path: str, status: int) -> None:
    async def test() -> None:
        async with edges(tmp_path) as served:
            answer = await ask(served.port, method, path)
            assert answer.status == status
            assert answer.headers["content-type"] == "application/json"
            assert answer.json()["error"]
            if status == 405:
                assert answer.headers["allow"]

    run(test)


def test_health_is_honest(tmp_path: Path) -> None:
    async def test() -> None:
        async with edges(tmp_path) as served:

            async def statuses() -> list[int]:
                paths = ("/v2/health/live", "/healthz", "/v2/health/ready", "/ping", "/v2/models/echo/ready")
                return [(await ask(served.port, "GET", path)).status for path in paths]

            assert await statuses() == [200] * 5
            served.engine.states["echo"] = FakeState(ready=False, reason="still loading")
            assert await statuses() == [200, 200, 400, 500, 400]
            assert "still loading" in (await ask(served.port, "GET", "/v2/health/ready")).json()["error"]
            assert (await ask(served.port, "GET", "/healthz")).json()["models"]["echo"]["reason"] == "still loading"
            assert (await ask(served.port, "GET", "/v2/models/echo")).status == 503
            served.engine.states.clear()
            assert (await statuses())[2:] == [400, 500, 404]

    run(test)


def test_metadata(tmp_path: Path) -> None:
    async def test() -> None:
        async with edges(tmp_path) as served:
            server = (await ask(served.port, "GET", "/v2")).json()
            assert (server["name"], "binary_tensor_data" in server["extensions"]) == ("inferd", True)
            for path in ("/v2/models/echo", "/v2/models/echo/versions/1.0.0"):
                model = (await ask(served.port, "GET", path)).json()
                assert (model["name"], model["versions"], model["inputs"][0]["datatype"]) == ("echo", ["1.0.0"], "FP32")
                config = (await ask(served.port, "GET", path + "/config")).json()
                assert config["max_batch_size"] == 8
                assert config["input"] == [
                    {"name": "x", "data_type": "TYPE_FP32", "dims": [4]},
                    {"name": "t", "data_type": "TYPE_STRING", "dims": [1]},
                ]

    run(test)


def test_the_repository_index_lists_states(tmp_path: Path) -> None:
    async def test() -> None:
        async with edges(tmp_path, engine=FakeEngine("a", "b")) as served:
            served.engine.states["b"] = FakeState(ready=False, reason="no variant")
            rows = (await ask(served.port, "POST", "/v2/repository/index")).json()
            assert rows == [
                {"name": "a", "version": "1.0.0", "state": "READY", "reason": ""},
                {"name": "b", "state": "UNAVAILABLE", "reason": "no variant"},
            ]
            ready = await ask(served.port, "POST", "/v2/repository/index", b'{"ready": true}')
            assert [row["name"] for row in ready.json()] == ["a"]

    run(test)


def test_metrics_are_prometheus_text(tmp_path: Path) -> None:
    async def test() -> None:
        async with edges(tmp_path) as served:
            answer = await ask(served.port, "GET", "/metrics")
            assert answer.headers["content-type"].startswith("text/plain; version=")
            assert b"inferd_http_connections_total" in answer.body

    run(test)


def test_verbs_go_to_the_control(tmp_path: Path) -> None:
    async def test() -> None:
        async with edges(tmp_path) as served:
            for to in both(served):
                assert (await ask(to, "GET", "/v1/status")).json()["device"] == "box"
            answer = await ask(served.http_path, "POST", "/v1/deploy", b'{"model": "m"}')
            assert (answer.status, answer.json()) == (200, {"model": "m"})
            assert (await ask(served.http_path, "POST", "/v1/echo", b"[1]")).status == 400
            assert (await ask(served.http_path, "POST", "/v1/echo", b"{bad")).status == 400
            crashed = await ask(served.http_path, "POST", "/v1/crash")
            assert (crashed.status, crashed.json()["code"]) == (500, "internal")

    run(test)


def test_a_get_changes_nothing_whoever_asks(tmp_path: Path) -> None:
    async def test() -> None:
        async with edges(tmp_path) as served:
            assert (await ask(served.http_path, "GET", "/v1/deploy")).status == 403

    run(test)


TOKENS = (
    TokenConfig(name="ci", sha256=hashlib.sha256(b"infer-only").hexdigest(), roles=("infer",)),
    TokenConfig(name="ops", sha256=hashlib.sha256(b"operator").hexdigest(), roles=("operate",)),
)


def test_tokens_on_tcp(tmp_path: Path) -> None:
    async def test() -> None:
        auth = AuthConfig(tokens=TOKENS, tcp_anonymous_roles=("infer",))
        async with edges(tmp_path, auth=auth) as served:

            async def status(method: str, path: str, token: str | None) -> int:
                headers = {} if token is None else {"Authorization": f"Bearer {token}"}
                return (await ask(served.port, method, path, **headers)).status

            assert await status("POST", INFER, None) == 200
            assert await status("POST", INFER, "infer-only") == 200
            assert await status("POST", INFER, "wrong") == 401
            assert await status("POST", INFER, "operator") == 403
            assert await status("GET", "/metrics", None) == 401
            assert await status("GET", "/metrics", "infer-only") == 403
            assert await status("GET", "/metrics", "operator") == 200
            assert await status("POST", "/v1/deploy", None) == 401
            assert await status("POST", "/v1/deploy", "infer-only") == 403
            assert await status("POST", "/v1/deploy", "operator") == 200
            assert [request.client for request in served.engine.seen] == ["tcp:127.0.0.1", "token:ci"]

    run(test)


def test_unix_peers_are_known_by_uid_not_by_token(tmp_path: Path) -> None:
    async def test() -> None:
        async with edges(tmp_path, auth=AuthConfig(tokens=TOKENS)) as served:
            assert (await ask(served.http_path, "POST", INFER, Authorization="Bearer wrong")).status == 200
            assert served.engine.seen[0].client == f"uid:{os.getuid()}"
        async with edges(tmp_path, policy=RolesOnly()) as served:
            answer = await ask(served.http_path, "POST", INFER, Authorization="Bearer operator")
            assert (answer.status, answer.json()["code"]) == (403, "forbidden")

    run(test)


@pytest.mark.parametrize("size", [10, 1_000_000])
def test_a_client_that_leaves_withdraws_its_request(tmp_path: Path, size: int) -> None:
    async def test() -> None:
        async with edges(tmp_path) as served:
            served.engine.holding = True
            for number, to in enumerate(both(served)):
                async with WebPeer(to) as peer:
                    await peer.send(request("POST", "/predictions/echo", bytes(size)))
                    await until(lambda count=number + 1: len(served.engine.seen) == count)
                await until(lambda count=number + 1: len(served.engine.canceled) == count)

    run(test)


def test_the_end_waits_for_accepted_requests(tmp_path: Path) -> None:
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
            async with WebPeer(ports[0]) as busy, WebPeer(ports[0]) as idle:
                await busy.send(request("POST", "/predictions/echo", b"abc"))
                await until(lambda: len(engine.waiting) == 1)
                stop.set()
                assert await idle.ended()
                assert not server.done()
                engine.release()
                answer = await busy.answer()
                assert (answer.body, answer.headers["connection"]) == (b"abc", "close")
                assert await busy.ended()

    run(test)


def test_the_end_is_bounded(tmp_path: Path) -> None:
    async def test() -> None:
        engine = FakeEngine()
        engine.holding = True
        async with edges(tmp_path, engine=engine, drain_timeout_s=0.05) as served:
            peer = WebPeer(served.port)
            await peer.__aenter__()
            await peer.send(request("POST", "/predictions/echo", b"abc"))
            await until(lambda: len(engine.waiting) == 1)
        assert await peer.ended()
        assert len(engine.canceled) == 1
        await peer.__aexit__()

    run(test)


def test_the_processs_signals_stay_alone(tmp_path: Path) -> None:
    async def test() -> None:
        before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
        async with edges(tmp_path) as served:
            await ask(served.port, "GET", "/v2")
            assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before

    run(test)


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
@pytest.mark.parametrize("over", ["tcp", "unix"])
@pytest.mark.parametrize(
    "extra", [[], ["--http2"], ["-H", "Expect: 100-continue"], ["-H", "Transfer-Encoding: chunked"]]
)
def test_curl_works(tmp_path: Path, over: str, extra: list[str]) -> None:
    async def test() -> None:
        body = os.urandom(2 * MIB)
        (tmp_path / "body").write_bytes(body)
        async with edges(tmp_path) as served:
            to = ["--unix-socket", str(served.http_path)] if over == "unix" else []
            url = f"http://127.0.0.1:{served.port}/predictions/echo"
            file = f"@{tmp_path / 'body'}"
            curl = await asyncio.create_subprocess_exec(
                "curl", "-sSf", *extra, *to, "--data-binary", file, url, stdout=asyncio.subprocess.PIPE
            )
            stdout, _ = await curl.communicate()
            if extra == ["--http2"]:  # an upgrade with a body is refused in so many words
                assert curl.returncode == 22
            else:
                assert (curl.returncode, stdout == body) == (0, True)

    run(test)


def test_the_standard_library_client_works(tmp_path: Path) -> None:
    async def test() -> None:
        async with edges(tmp_path) as served:

            def work() -> None:
                client = http.client.HTTPConnection("127.0.0.1", served.port)
                for size in (3, 100_000, 3):
                    client.request("POST", "/predictions/echo", bytes(size))
                    assert len(client.getresponse().read()) == size
                client.request("GET", "/predictions/echo")
                assert client.getresponse().read()
                client.request("GET", "/v2")
                assert client.getresponse().status == 200
                client.close()

            await asyncio.to_thread(work)

    run(test)
