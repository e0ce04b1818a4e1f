"""Answers in parts from a real sandboxed worker to real sockets: frames, HTTP, the client library."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import aclosing, asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from agent.client import AsyncClient, Client, Part
from agent.clock import SystemClock
from agent.config import EngineConfig
from agent.engine.engine import Engine
from agent.engine.version import Version
from agent.engine.zygote import become_subreaper
from agent.errors import (
    DeadlineError,
    HandlerError,
    StreamUnsupportedError,
    UnavailableError,
    WorkerDiedError,
)
from agent.events import EventBus
from agent.metrics import Metrics
from agent.wire import Decoder, Frame, Limits, encode
from tests.fakes.edges import Edges, edges, run
from tests.fakes.web import WebPeer, ask, request
from tests.models import FEATURES, scale_version

pytestmark = pytest.mark.integration

FOREVER = 1_000_000_000
ENDLESS = {"kind": "bytes", "count": FOREVER, "sleep_s": 0.001}
X = {"x": np.ones((1, FEATURES), dtype=np.float32)}
PREDICT = "/predictions/scale"
INFER = "/v2/models/scale/infer"
GENERATE = "/v2/models/scale/generate"


@dataclass
class Served:
    """A model behind all listeners."""

    engine: Engine
    edges: Edges
    version: Version
    metrics: Metrics
    folder: Path

    async def report(self) -> dict[str, int]:
        """Return what the handler counted."""
        async with AsyncClient(self.edges.frame_path) as client:
            (counts,) = (await client.predict("scale", b'{"report": true}')).json()
        return dict(counts)

    async def all_closed(self) -> dict[str, int]:
        """Wait until each generator that was opened is closed, and return the counts."""
        return await self.reported(lambda counts: counts["opened"] == counts["closed"])

    async def reported(self, condition: Callable[[dict[str, int]], bool]) -> dict[str, int]:
        while True:
            counts = await self.report()
            if condition(counts):
                return counts
            await asyncio.sleep(0.01)


@asynccontextmanager
async def served(
    folder: Path, *, handler: str | None = "steps", engine: dict[str, Any] | None = None, **bounds: Any
) -> AsyncIterator[Served]:
    become_subreaper()
    metrics = Metrics()
    config = EngineConfig(**{"restart_first_s": 0.001, "start_timeout_s": 60.0, **(engine or {})})
    wire = Limits(body_bytes_max=1 << 22)
    box = Engine(config, scratch=folder / "scratch", wire=wire, events=EventBus(SystemClock()), metrics=metrics)
    async with box.running():
        sweeper = asyncio.ensure_future(box.run())
        try:
            version = await box.load(scale_version(folder / "bundle", handler=handler))
            box.activate(version)
            async with edges(folder, engine=box, **bounds) as listeners:  # type: ignore[arg-type]
                yield Served(box, listeners, version, metrics, folder)
        finally:
            sweeper.cancel()
            await asyncio.wait({sweeper})


class FramePeer:
    """One raw connection to the frame socket."""

    def __init__(self, path: Path, *, receive_bytes: int = 0) -> None:
        self._sock = socket.socket(socket.AF_UNIX)
        if receive_bytes:
            self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_bytes)
        self._sock.setblocking(False)
        self._path = path
        self._decoder = Decoder()
        self._frames: list[Frame] = []

    async def __aenter__(self) -> FramePeer:
        await asyncio.get_running_loop().sock_connect(self._sock, str(self._path))
        return self

    async def __aexit__(self, *_error: object) -> None:
        self._sock.close()

    async def send(self, header: dict[str, Any], body: Sequence[bytes] = ()) -> None:
        data = b"".join(bytes(part) for part in encode(header, body))
        await asyncio.get_running_loop().sock_sendall(self._sock, data)

    async def stream(self, number: int, asked: dict[str, Any], **fields: Any) -> None:
        header = {"kind": "infer", "id": number, "model": "scale", "content_type": "application/json", "stream": True}
        await self.send({**header, **fields}, [json.dumps(asked).encode()])

    async def receive(self) -> Frame:
        while not self._frames:
            data = await asyncio.get_running_loop().sock_recv(self._sock, 1 << 16)
            if not data:
                raise EOFError
            self._frames += [Frame(frame.header, bytes(frame.body)) for frame in self._decoder.feed(data)]
        return self._frames.pop(0)

    async def end_of(self, number: int) -> Frame:
        """Return what ends an answer; parts and other answers are passed over."""
        while True:
            frame = await self.receive()
            if frame.header["id"] == number and frame.header["kind"] != "part":
                return frame


def body_of(asked: dict[str, Any]) -> bytes:
    return json.dumps(asked).encode()


def blocking(path: Path, work: Callable[[Client], Any], **options: Any) -> Awaitable[Any]:
    def body() -> Any:
        with Client(path, **options) as client:
            return work(client)

    return asyncio.to_thread(body)


async def chunks(peer: WebPeer) -> tuple[bytes, list[bytes], bool]:
    """Return the head of a chunked answer, its chunks, and whether the last of them came."""
    head = await peer.head()
    assert b"transfer-encoding: chunked\r\n" in head
    assert b"content-length" not in head.lower()
    found: list[bytes] = []
    with suppress(EOFError, ConnectionError):
        while True:
            size = int(await peer._reader.readuntil(b"\r\n"), 16)
            data = await peer._reader.readexactly(size + 2)
            assert data[-2:] == b"\r\n"
            if not size:
                return head, found, True
            found.append(data[:-2])
    return head, found, False


# frames


def test_parts_come_numbered_and_end_with_an_empty_result(tmp_path: Path) -> None:
    async def test() -> None:
        async with served(tmp_path) as box, FramePeer(box.edges.frame_path) as peer:
            await peer.stream(9, {"kind": "text"})
            frames = [await peer.receive() for _ in range(4)]
            assert [frame.header["kind"] for frame in frames] == ["part", "part", "part", "result"]
            assert [frame.header.get("seq") for frame in frames] == [0, 1, 2, None]
            assert b"".join(frame.body for frame in frames) == b"2 4 8 "
            first, *others, last = (frame.header for frame in frames)
            assert {first["id"], last["id"]} == {9}
            assert (first["model"], first["version"], first["variant"]) == ("scale", "1.0.0", "v0")
            assert (last["model"], last["version"], last["variant"]) == ("scale", "1.0.0", "v0")
            assert not any("model" in header for header in others)

    run(test)


def test_a_stream_can_be_withdrawn_and_its_id_used_again(tmp_path: Path) -> None:
    async def test() -> None:
        async with served(tmp_path) as box, FramePeer(box.edges.frame_path) as peer:
            await peer.stream(1, ENDLESS)
            assert (await peer.receive()).header["kind"] == "part"
            await peer.send({"kind": "cancel", "id": 1})
            assert (await peer.end_of(1)).header["code"] == "canceled"
            await peer.stream(1, {"kind": "text"})
            assert [(await peer.receive()).body for _ in range(3)] == [b"2 ", b"4 ", b"8 "]
            assert (await box.all_closed())["opened"] == 2
            assert box.version.status()["outstanding"] == 0

    run(test)


@pytest.mark.parametrize("over", ["frames", "http"])
def test_a_client_that_leaves_ends_its_stream(tmp_path: Path, over: str) -> None:
    async def test() -> None:
        async with served(tmp_path) as box:
            if over == "frames":
                async with FramePeer(box.edges.frame_path) as peer:
                    await peer.stream(1, ENDLESS)
                    await peer.receive()
            else:
                async with WebPeer(box.edges.port) as web:
                    await web.send(request("POST", PREDICT, body_of(ENDLESS)))
                    await web.head()
            assert (await box.all_closed())["opened"] == 1

    run(test)


def test_a_deadline_ends_a_stream_with_an_error(tmp_path: Path) -> None:
    async def test() -> None:
        async with served(tmp_path) as box:

            def work(client: Client) -> None:
                for _ in client.stream("scale", body_of(ENDLESS), deadline_ms=300):
                    pass

            with pytest.raises(DeadlineError):
                await blocking(box.edges.frame_path, work)
            await box.all_closed()

    run(test)


def test_streams_and_other_requests_go_on_beside_each_other(tmp_path: Path) -> None:
    async def test() -> None:
        async with served(tmp_path) as box, AsyncClient(box.edges.frame_path) as client:
            seen = [0, 0]

            async def follow(index: int) -> None:
                async for _ in client.stream("scale", body_of(ENDLESS)):
                    seen[index] += 1

            async with asyncio.TaskGroup() as group:
                tasks = [group.create_task(follow(index)) for index in range(2)]
                while min(seen) < 3:
                    await asyncio.sleep(0.001)
                before = list(seen)
                for _ in range(20):
                    answer = await client.infer("scale", X)
                    assert answer.outputs["y"][0, 0] == 2.0
                while not all(now > then for now, then in zip(seen, before, strict=True)):
                    await asyncio.sleep(0.001)
                for task in tasks:
                    task.cancel()
            assert (await box.all_closed())["opened"] == 2

    run(test)


def test_who_reads_nothing_pauses_its_stream_and_nobody_elses(tmp_path: Path) -> None:
    async def test() -> None:
        async with served(tmp_path, write_timeout_s=60.0) as box:
            async with FramePeer(box.edges.frame_path, receive_bytes=4096) as peer:
                size = 128 * 1024
                await peer.stream(1, {"kind": "bytes", "count": 400, "size": size}, deadline_ms=60_000)
                held = await until_still(box)
                assert 0 < held < 400, "the stream ran on though nobody read"
                assert held * size < 16 << 20
                async with AsyncClient(box.edges.frame_path) as other:
                    parts = [part.text() async for part in other.stream("scale", body_of({"kind": "text"}))]
                    assert parts == ["2 ", "4 ", "8 "]
                for number in range(400):
                    frame = await peer.receive()
                    assert (frame.header["kind"], frame.header["seq"]) == ("part", number)
                    assert frame.body == bytes([number % 256]) * size
                assert (await peer.receive()).header["kind"] == "result"

    run(test)


async def until_still(box: Served) -> int:
    """Wait until the handler takes no more steps, and return how many it took."""
    before, same = -1, 0
    while same < 20:
        steps = (await box.report())["steps"]
        same = same + 1 if steps == before else 0
        before = steps
        await asyncio.sleep(0.01)
    return before


@pytest.mark.parametrize("over", ["frames", "http"])
def test_who_reads_nothing_for_too_long_is_cut_and_its_stream_ended(tmp_path: Path, over: str) -> None:
    async def test() -> None:
        asked = {"kind": "bytes", "count": FOREVER, "size": 65536}
        async with served(tmp_path, write_timeout_s=0.4) as box:
            async with AsyncPeer(box, over) as peer:
                await peer.ask(asked)
                counts = await box.reported(lambda counts: 0 < counts["opened"] == counts["closed"])
                assert counts["opened"] == 1
            cut = box.edges.metrics.snapshot()["inferd_connections_cut"]
            assert [row["reason"] for row in cut] == ["slow_reader"]

    run(test)


class AsyncPeer:
    """A client that asks for a stream and reads nothing, over frames or HTTP."""

    def __init__(self, box: Served, over: str) -> None:
        self._box = box
        self._sock = socket.socket(socket.AF_UNIX if over == "frames" else socket.AF_INET)
        self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        self._sock.setblocking(False)
        self._over = over

    async def __aenter__(self) -> AsyncPeer:
        to: Any = str(self._box.edges.frame_path) if self._over == "frames" else ("127.0.0.1", self._box.edges.port)
        await asyncio.get_running_loop().sock_connect(self._sock, to)
        return self

    async def __aexit__(self, *_error: object) -> None:
        self._sock.close()

    async def ask(self, asked: dict[str, Any]) -> None:
        data = request("POST", PREDICT, body_of(asked))
        if self._over == "frames":
            header = {"kind": "infer", "id": 1, "model": "scale", "content_type": "a/b", "stream": True}
            data = b"".join(bytes(part) for part in encode(header, [body_of(asked)]))
        await asyncio.get_running_loop().sock_sendall(self._sock, data)


def test_a_client_may_pause_and_resume_its_own_stream(tmp_path: Path) -> None:
    async def test() -> None:
        async with served(tmp_path) as box, FramePeer(box.edges.frame_path) as peer:
            await peer.stream(1, ENDLESS)
            await peer.receive()
            await peer.send({"kind": "pause", "id": 1})
            steps = await until_still(box)
            await peer.send({"kind": "resume", "id": 1})
            await box.reported(lambda counts: counts["steps"] > steps)
            await peer.send({"kind": "pause", "id": 77})  # there is none: the frames crossed
            await peer.send({"kind": "cancel", "id": 1})
            assert (await peer.end_of(1)).header["code"] == "canceled"

    run(test)


def test_a_paused_stream_is_no_hanging_worker_and_a_hanging_one_is(tmp_path: Path) -> None:
    async def test() -> None:
        async with served(tmp_path, engine={"hang_timeout_s": 3.0}) as box:
            (worker,) = box.version.status()["workers"]
            async with FramePeer(box.edges.frame_path) as peer:
                await peer.stream(1, ENDLESS, deadline_ms=60_000)
                await peer.receive()
                await peer.send({"kind": "pause", "id": 1})
                await until_still(box)
                link = box.version.pool.links[0]  # type: ignore[union-attr]
                much_later = asyncio.get_running_loop().time() + 1000.0
                assert link.silent_s(much_later) == 0.0
                await peer.send({"kind": "resume", "id": 1})
                await peer.receive()
                assert box.version.status()["workers"] == [worker]
                await peer.send({"kind": "cancel", "id": 1})
                await peer.end_of(1)
                await peer.stream(2, {"hang_at": 1}, deadline_ms=60_000)
                assert (await peer.end_of(2)).header["code"] == "worker_died"

    run(test)


def test_a_worker_that_dies_mid_stream_ends_it_and_before_the_first_part_is_retried(tmp_path: Path) -> None:
    async def test() -> None:
        async with served(tmp_path) as box, FramePeer(box.edges.frame_path) as peer:
            await peer.stream(1, ENDLESS)
            await peer.receive()
            os.kill(box.version.status()["workers"][0], signal.SIGKILL)
            assert (await peer.end_of(1)).header["code"] == "worker_died"
            assert (await box.reported(lambda counts: True))["opened"] == 0  # a new one serves, and was asked nothing
            await peer.stream(2, {"die_at": 0})
            end = await peer.end_of(2)
            assert end.header["code"] == "worker_died"
            while box.version.deaths < 3:  # the first, and two tries of the second
                await asyncio.sleep(0.01)

    run(test)


@pytest.mark.parametrize(("timeout_s", "code"), [(30.0, None), (0.05, "worker_died")])
def test_a_version_that_retires_lets_its_streams_end_for_a_while(
    tmp_path: Path, timeout_s: float, code: str | None
) -> None:
    async def test() -> None:
        async with served(tmp_path) as box, FramePeer(box.edges.frame_path) as peer:
            count = 50 if code is None else FOREVER
            await peer.stream(1, {"kind": "bytes", "count": count, "sleep_s": 0.005}, deadline_ms=60_000)
            await peer.receive()
            new = await box.engine.load(scale_version(tmp_path / "new", version="2.0.0", factors=(3.0,)))
            old = box.engine.activate(new)
            assert old is box.version
            async with asyncio.TaskGroup() as group:
                group.create_task(box.engine.retire(old, timeout_s=timeout_s))
                end = await peer.end_of(1) if code else None
                if end is not None:
                    assert end.header["code"] == code
                else:
                    seen = 1
                    while (frame := await peer.receive()).header["kind"] == "part":
                        seen += 1
                    assert seen == count
                    assert frame.header["version"] == "1.0.0"

    run(test)


def test_streams_take_half_of_a_worker_at_most(tmp_path: Path) -> None:
    async def test() -> None:
        async with served(tmp_path) as box, FramePeer(box.edges.frame_path) as peer:
            for number in range(1, 33):
                await peer.stream(number, ENDLESS, deadline_ms=60_000)
            await peer.stream(33, ENDLESS)
            assert (await peer.end_of(33)).header["code"] == "overloaded"
            async with AsyncClient(box.edges.frame_path) as client:
                assert (await client.infer("scale", X)).outputs["y"][0, 0] == 2.0

    run(test)


def test_large_requests_and_answers_stream_and_join(tmp_path: Path) -> None:
    async def test() -> None:
        async with served(tmp_path) as box, AsyncClient(box.edges.frame_path) as client:
            asked = body_of({"kind": "bytes", "size": 400_000, "pad": "x" * 300_000})
            for _ in range(3):
                parts = [part.body async for part in client.stream("scale", asked)]
                assert parts == [bytes([number]) * 400_000 for number in range(3)]
                assert (await client.predict("scale", asked)).body == b"".join(parts)

    run(test)


def test_a_joined_answer_may_take_longer_than_a_hang(tmp_path: Path) -> None:
    async def test() -> None:
        async with served(tmp_path, engine={"hang_timeout_s": 3.0}) as box, AsyncClient(box.edges.frame_path) as client:
            answer = await client.predict("scale", body_of({"kind": "text", "count": 9, "sleep_s": 0.5}))
            assert answer.body == b"2 4 8 16 32 64 128 256 512 "
            assert box.version.deaths == 0

    run(test)


def test_streams_are_counted(tmp_path: Path) -> None:
    async def test() -> None:
        async with served(tmp_path) as box, FramePeer(box.edges.frame_path) as peer:
            await peer.stream(1, {"kind": "text"})
            await peer.end_of(1)
            await peer.stream(2, {"fail_at": 1})
            await peer.end_of(2)
            counts = box.metrics.snapshot()
            assert [row["value"] for row in counts["inferd_stream_parts"]] == [4]
            assert [row["count"] for row in counts["inferd_stream_first_part_seconds"]] == [2]
            assert [row["count"] for row in counts["inferd_request_duration_seconds"]] == [0]
            assert {row["code"]: row["value"] for row in counts["inferd_requests"]} == {"ok": 1, "handler_failed": 1}
            assert box.version.status()["answers"] == {"good": 1, "faults": 1}
            assert box.engine.describe("scale")["streams"] is True

    run(test)


# HTTP


def test_predictions_of_a_streaming_handler_come_in_chunks(tmp_path: Path) -> None:
    async def test() -> None:
        async with served(tmp_path) as box:
            for to in (box.edges.port, box.edges.http_path):
                async with WebPeer(to) as peer:
                    for _ in range(2):  # the connection stays
                        await peer.send(request("POST", PREDICT, body_of({"kind": "text"}), X_Request_Id="r1"))
                        head, found, whole = await chunks(peer)
                        assert (found, whole) == ([b"2 ", b"4 ", b"8 "], True)
                        assert b"content-type: text/plain; charset=utf-8\r\n" in head
                        assert b"x-model-version: 1.0.0\r\n" in head
                        assert b"x-request-id: r1\r\n" in head
                    await peer.send(request("POST", PREDICT, body_of({"kind": "json", "count": 2})))
                    head, found, whole = await chunks(peer)
                    assert b"content-type: application/x-ndjson\r\n" in head
                    assert found == [b'{"number":0,"y":2.0}\n', b'{"number":1,"y":4.0}\n']

    run(test)


def test_an_error_before_the_first_part_is_an_ordinary_answer_and_after_it_cuts_the_chunks(tmp_path: Path) -> None:
    async def test() -> None:
        async with served(tmp_path) as box:
            for path in (PREDICT, GENERATE + "_stream"):
                answer = await ask(box.edges.port, "POST", path, body_of({"refuse_at": 0}))
                assert (answer.status, "asked to refuse" in answer.body.decode()) == (400, True)
            async with WebPeer(box.edges.port) as peer:
                await peer.send(request("POST", PREDICT, body_of({"kind": "text", "fail_at": 2})))
                _, found, whole = await chunks(peer)
                assert (found, whole) == ([b"2 ", b"4 "], False)

    run(test)


def events_of(text: bytes) -> list[tuple[str, str]]:
    """Read server-sent events as their specification says."""
    events = []
    for block in text.decode().split("\n\n")[:-1]:
        name, data = "message", []
        for line in re.split(r"\r\n|\r|\n", block):
            field, _, value = line.partition(":")
            value = value.removeprefix(" ")
            if field == "event":
                name = value
            elif field == "data":
                data.append(value)
        events.append((name, "\n".join(data)))
    return events


@pytest.mark.parametrize(
    ("asked", "events"),
    [
        ({"kind": "text"}, [("message", "2 "), ("message", "4 "), ("message", "8 "), ("end", '{"parts":3}')]),
        ({"kind": "json", "count": 1}, [("message", '{"number":0,"y":2.0}'), ("end", '{"parts":1}')]),
        ({"count": 0}, [("end", '{"parts":0}')]),
        (
            {"kind": "bytes", "count": 1},
            [("message", '{"content_type":"application/octet-stream","base64":"AAAA"}'), ("end", '{"parts":1}')],
        ),
        (
            {"kind": "text", "refuse_at": 1},
            [("message", "2 "), ("error", '{"error":"asked to refuse","code":"invalid_input"}')],
        ),
    ],
)
def test_who_accepts_events_gets_them(tmp_path: Path, asked: dict[str, Any], events: list[tuple[str, str]]) -> None:
    async def test() -> None:
        async with served(tmp_path) as box, WebPeer(box.edges.port) as peer:
            for _ in range(2):
                await peer.send(request("POST", PREDICT, body_of(asked), Accept="text/event-stream"))
                head, found, whole = await chunks(peer)
                assert b"content-type: text/event-stream; charset=utf-8\r\n" in head
                assert b"cache-control: no-cache\r\n" in head
                assert whole
                assert events_of(b"".join(found)) == events
                assert len(found) == len(events)

    run(test)


def test_open_inference_requests_come_as_events_of_answers(tmp_path: Path) -> None:
    async def test() -> None:
        body = {"inputs": [{"name": "x", "shape": [1, 4], "datatype": "FP32", "data": [1, 1, 1, 1]}]}
        async with served(tmp_path) as box, WebPeer(box.edges.port) as peer:
            await peer.send(request("POST", INFER, body_of(body), Accept="text/event-stream"))
            _, found, _ = await chunks(peer)
            *answers, end = events_of(b"".join(found))
            assert [json.loads(data)["outputs"][0]["data"][0] for _, data in answers] == [2.0, 4.0, 8.0]
            assert end == ("end", '{"parts":3}')
            await peer.send(request("POST", INFER, body_of(body)))
            assert (await peer.answer()).json()["outputs"][0]["data"] == [2.0, 2.0, 2.0, 2.0]

    run(test)


def test_tritons_generate_paths(tmp_path: Path) -> None:
    async def test() -> None:
        about = {"model_name": "scale", "model_version": "1.0.0"}
        async with served(tmp_path) as box, WebPeer(box.edges.port) as peer:
            await peer.send(request("POST", GENERATE + "_stream", body_of({"kind": "text", "count": 2, "id": "a"})))
            head, found, whole = await chunks(peer)
            assert b"content-type: text/event-stream; charset=utf-8\r\n" in head
            assert whole
            assert all(re.fullmatch(rb"data: \{.*\}\n\n", event) for event in found)
            assert [json.loads(data) for _, data in events_of(b"".join(found))] == [
                {"id": "a", **about, "text_output": "2 "},
                {"id": "a", **about, "text_output": "4 "},
            ]
            await peer.send(request("POST", GENERATE + "_stream", body_of({"kind": "text", "fail_at": 1})))
            _, found, whole = await chunks(peer)
            assert whole
            assert "asked to fail" in json.loads(events_of(found[-1])[0][1])["error"]
            path = "/v2/models/scale/versions/1.0.0/generate"
            answer = await peer.ask("POST", path, body_of({"kind": "text", "text_input": "?"}))
            assert answer.json() == {**about, "text_output": "2 4 8 "}
            assert (await peer.ask("GET", GENERATE)).status == 405
            described = (await peer.ask("GET", "/v2/models/scale/config")).json()
            assert described["model_transaction_policy"] == {"decoupled": True}
            assert "generate" in (await peer.ask("GET", "/v2")).json()["extensions"]

    run(test)


def test_version_1_0_gets_parts_up_to_the_end_of_the_connection(tmp_path: Path) -> None:
    async def test() -> None:
        async with served(tmp_path) as box:
            for more in (b"", b"Connection: keep-alive\r\n"):
                async with WebPeer(box.edges.port) as peer:
                    body = body_of({"kind": "text"})
                    await peer.send(
                        b"POST /predictions/scale HTTP/1.0\r\n%bContent-Length: %d\r\n\r\n%b" % (more, len(body), body)
                    )
                    head = await peer.head()
                    assert b"chunked" not in head
                    assert b"connection: close\r\n" in head
                    assert await peer._reader.read() == b"2 4 8 "
            async with WebPeer(box.edges.port) as peer:
                await peer.send(request("POST", PREDICT, body_of({"kind": "text"}), Connection="close"))
                _, found, whole = await chunks(peer)
                assert (found, whole) == ([b"2 ", b"4 ", b"8 "], True)
                assert await peer.ended()

    run(test)


def test_requests_behind_a_stream_wait_for_its_end(tmp_path: Path) -> None:
    async def test() -> None:
        async with served(tmp_path) as box, WebPeer(box.edges.port) as peer:
            await peer.send(
                request("POST", PREDICT, body_of({"kind": "text", "sleep_s": 0.02}))
                + request("GET", "/v2/health/live")
                + request("POST", PREDICT, body_of({"kind": "text", "count": 1}))
            )
            assert (await chunks(peer))[1] == [b"2 ", b"4 ", b"8 "]
            assert (await peer.answer()).json() == {"live": True}
            assert (await chunks(peer))[1:] == ([b"2 "], True)

    run(test)


def test_a_model_that_answers_whole_says_so_to_who_demands_parts(tmp_path: Path) -> None:
    async def test() -> None:
        async with served(tmp_path, handler=None) as box:
            body = b"[[1, 1, 1, 1]]"
            json_type = {"Content_Type": "application/json"}
            events = {"Accept": "text/event-stream"}
            answer = await ask(box.edges.port, "POST", PREDICT, body, **json_type, **events)
            assert (answer.status, answer.json()["error"]) == (400, "stream_unsupported")
            for path, more in ((INFER, events), (GENERATE + "_stream", {})):
                answer = await ask(box.edges.port, "POST", path, b"{}", **more)
                assert (answer.status, answer.json()["code"]) == (400, "stream_unsupported")
            answer = await ask(box.edges.port, "POST", PREDICT, body, **json_type)
            assert answer.json() == {"outputs": {"y": [[2.0, 2.0, 2.0, 2.0]]}}
            assert answer.headers["content-length"]

            def work(client: Client) -> None:
                with pytest.raises(StreamUnsupportedError):
                    list(client.stream("scale", X))

            await blocking(box.edges.frame_path, work)

    run(test)


def test_a_slow_http_client_gets_everything(tmp_path: Path) -> None:
    async def test() -> None:
        async with served(tmp_path, write_timeout_s=60.0) as box, WebPeer(box.edges.port) as peer:
            size, count = 100_000, 300
            asked = {"kind": "bytes", "count": count, "size": size}
            await peer.send(request("POST", PREDICT, body_of(asked), X_Deadline_Ms="60000"))
            held = await until_still(box)
            assert 0 < held < count, "the stream ran on though nobody read"
            _, found, whole = await chunks(peer)
            assert whole
            assert [len(chunk) for chunk in found] == [size] * count

    run(test)


# the client library


def test_the_clients_yield_parts(tmp_path: Path) -> None:
    async def test() -> None:
        async with served(tmp_path) as box, AsyncClient(box.edges.frame_path) as client:

            def work(client: Client) -> list[Part]:
                return list(client.stream("scale", X))

            blocked = await blocking(box.edges.frame_path, work)
            for parts in (blocked, [part async for part in client.stream("scale", X)]):
                assert [part.outputs["y"][0, 0] for part in parts] == [2.0, 4.0, 8.0]
                assert [part.seq for part in parts] == [0, 1, 2]
                assert {(part.model, part.version, part.variant) for part in parts} == {("scale", "1.0.0", "v0")}
            parts = [part async for part in client.stream("scale", body_of({"kind": "json", "count": 1}))]
            assert parts[0].json() == {"number": 0, "y": 2.0}
            with pytest.raises(HandlerError):
                async for _ in client.stream("scale", body_of({"fail_at": 1})):
                    pass

    run(test)


def test_other_requests_of_a_blocking_client_go_on_within_a_stream(tmp_path: Path) -> None:
    async def test() -> None:
        async with served(tmp_path) as box:

            def work(client: Client) -> None:
                for part in client.stream("scale", X):
                    assert client.infer("scale", {"x": part.outputs["y"]}).outputs["y"][0, 0] == 4.0 * 2**part.seq

            await blocking(box.edges.frame_path, work)

    run(test)


def test_leaving_early_ends_the_work(tmp_path: Path) -> None:
    async def test() -> None:
        async with served(tmp_path) as box, AsyncClient(box.edges.frame_path) as client:

            def work(client: Client) -> None:
                for _ in client.stream("scale", body_of(ENDLESS)):
                    break
                parts = client.stream("scale", body_of(ENDLESS))
                next(parts)
                parts.close()

            await blocking(box.edges.frame_path, work)
            assert (await box.all_closed())["opened"] == 2
            async with aclosing(client.stream("scale", body_of(ENDLESS))) as parts:
                async for _ in parts:
                    break
            async for _ in client.stream("scale", body_of(ENDLESS)):
                break
            assert (await box.all_closed())["opened"] == 4
            assert (await client.infer("scale", X)).outputs["y"][0, 0] == 2.0

    run(test)


def test_an_asynchronous_client_that_takes_its_time_pauses_the_model(tmp_path: Path) -> None:
    async def test() -> None:
        async with served(tmp_path) as box, AsyncClient(box.edges.frame_path) as client:
            asked = {"kind": "bytes", "count": 200, "size": 65536}
            numbers = []
            async for part in client.stream("scale", body_of(asked), deadline_ms=60_000):
                if not numbers:
                    assert 0 < await until_still(box) < 200, "the stream ran on though nobody took it"
                    assert (await client.infer("scale", X)).outputs["y"][0, 0] == 2.0
                numbers.append(part.seq)
            assert numbers == list(range(200))

    run(test)


def test_a_broken_connection_is_told_and_not_repeated_after_the_first_part(tmp_path: Path) -> None:
    async def test() -> None:
        async with served(tmp_path, drain_timeout_s=0.0) as box:
            client = AsyncClient(box.edges.frame_path, connect_timeout_s=0.2)
            parts = client.stream("scale", body_of(ENDLESS), deadline_ms=60_000)
            assert (await anext(parts)).seq == 0
            for connection in list(box.edges.frames._connections):
                connection.close("test")
            with pytest.raises(UnavailableError):
                async for _ in parts:
                    pass
            counts = await box.all_closed()
            assert counts["opened"] == 1
            await client.close()

            def work(client: Client) -> None:
                stream = client.stream("scale", body_of(ENDLESS), deadline_ms=60_000)
                next(stream)
                os.kill(box.version.status()["workers"][0], signal.SIGKILL)
                for _ in stream:
                    pass

            with pytest.raises(WorkerDiedError):
                await blocking(box.edges.frame_path, work)

    run(test)
