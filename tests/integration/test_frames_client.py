"""The client library against the frame socket: results, errors, reconnection, many outstanding."""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from agent.client import AsyncClient, Client
from agent.errors import (
    DeadlineError,
    FrameError,
    OverloadedError,
    TooLargeError,
    UnavailableError,
    UnknownModelError,
)
from agent.serving.listeners import bind_unix
from agent.serving.ports import InferRequest
from agent.wire import FIRST_ID, Decoder, encode
from tests.fakes.edges import edges, run, until
from tests.fakes.engine import FakeEngine
from tests.fakes.lanes import lane_server

pytestmark = pytest.mark.integration

X = {"x": np.arange(6, dtype=np.float32).reshape(2, 3), "t": np.array([b"a", b"bc"], dtype=object)}


def blocking(path: Path, work: Callable[[Client], Any], **options: Any) -> Awaitable[Any]:
    """Run ``work`` with a blocking client in a thread beside the loop."""

    def body() -> Any:
        with Client(path, **options) as client:
            return work(client)

    return asyncio.to_thread(body)


def test_tensors_go_and_come_back(tmp_path: Path) -> None:
    async def test() -> None:
        async with edges(tmp_path) as served:
            result = await blocking(served.frame_path, lambda client: client.infer("echo", X))
            np.testing.assert_array_equal(result.outputs["x"], X["x"])
            assert list(result.outputs["t"]) == [b"a", b"bc"]
            assert (result.model, result.version, result.variant) == ("echo", "1.0.0", "fp32")

    run(test)


def test_large_arrays_go_and_come_back(tmp_path: Path) -> None:
    async def test() -> None:
        async with edges(tmp_path) as served:
            frame = np.random.default_rng(1).integers(0, 255, (1080, 1920, 3), dtype=np.uint8)
            result = await blocking(served.frame_path, lambda client: client.infer("echo", {"x": frame}))
            np.testing.assert_array_equal(result.outputs["x"], frame)
            async with AsyncClient(served.frame_path) as client:
                result = await client.infer("echo", {"x": frame})
            np.testing.assert_array_equal(result.outputs["x"], frame)

    run(test)


def test_raw_bodies_and_calls(tmp_path: Path) -> None:
    async def test() -> None:
        async with edges(tmp_path) as served:

            def work(client: Client) -> None:
                result = client.predict("echo", b'{"a": 1}', "application/json", version="1.0.0", params={"k": 5})
                assert (result.json(), result.content_type, result.params) == ({"a": 1}, "application/json", {"k": 5})
                assert client.status()["device"] == "box"
                assert client.call("echo", {"n": [1, None]}) == {"n": [1, None]}

            await blocking(served.frame_path, work)
            async with AsyncClient(served.frame_path) as client:
                assert (await client.predict("echo", b"raw")).body == b"raw"
                assert (await client.status())["device"] == "box"
                assert await client.call("echo", {"n": 1}) == {"n": 1}

    run(test)


def test_errors_are_raised_as_their_class_and_the_client_goes_on(tmp_path: Path) -> None:
    async def test() -> None:
        async with edges(tmp_path) as served:

            def work(client: Client) -> None:
                with pytest.raises(UnknownModelError, match="unknown model"):
                    client.infer("nobody", X)
                assert client.infer("echo", X).model == "echo"

            await blocking(served.frame_path, work)
            async with AsyncClient(served.frame_path) as client:
                with pytest.raises(UnknownModelError):
                    await client.infer("nobody", X)

    run(test)


def test_a_body_above_the_limit_is_told_why(tmp_path: Path) -> None:
    async def test() -> None:
        async with edges(tmp_path, body_bytes_max=100_000) as served:

            def work(client: Client) -> None:
                with pytest.raises(TooLargeError, match="100000"):
                    client.predict("echo", bytes(5_000_000))
                assert client.predict("echo", b"small").body == b"small"

            await blocking(served.frame_path, work)
            async with AsyncClient(served.frame_path) as client:
                with pytest.raises(TooLargeError):
                    await client.predict("echo", bytes(5_000_000))
                assert (await client.predict("echo", b"small")).body == b"small"

    run(test)


def test_threads_may_share_a_client(tmp_path: Path) -> None:
    async def test() -> None:
        async with edges(tmp_path) as served:

            def work(client: Client) -> None:
                wrong: list[int] = []

                def ask(number: int) -> None:
                    bodies = [client.predict("echo", b"%d" % number).body for _ in range(30)]
                    wrong.extend(number for body in bodies if body != b"%d" % number)

                threads = [threading.Thread(target=ask, args=(number,)) for number in range(8)]
                for thread in threads:
                    thread.start()
                for thread in threads:
                    thread.join()
                assert wrong == []

            await blocking(served.frame_path, work)
            assert served.engine.answers == 240

    run(test)


@pytest.mark.parametrize("loop", ["uvloop", "asyncio"])
def test_many_requests_of_one_client_wait_side_by_side(tmp_path: Path, loop: str) -> None:
    async def test() -> None:
        async with edges(tmp_path) as served, AsyncClient(served.frame_path) as client:
            served.engine.holding = True
            async with asyncio.TaskGroup() as group:
                asked = [group.create_task(client.predict("echo", b"%d" % number)) for number in range(200)]
                await until(lambda: len(served.engine.waiting) == 200)
                served.engine.waiting.reverse()
                served.engine.release()
            assert [task.result().body for task in asked] == [b"%d" % number for number in range(200)]

    run(test, loop=loop)


def test_a_canceled_task_withdraws_its_request(tmp_path: Path) -> None:
    async def test() -> None:
        async with edges(tmp_path) as served, AsyncClient(served.frame_path) as client:
            served.engine.holding = True
            task = asyncio.ensure_future(client.infer("echo", X))
            await until(lambda: len(served.engine.waiting) == 1)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            await until(lambda: len(served.engine.canceled) == 1)
            served.engine.holding = False
            assert (await client.infer("echo", X)).model == "echo"

    run(test)


def test_a_client_finds_the_next_daemon(tmp_path: Path) -> None:
    async def test() -> None:
        client, patient = Client(tmp_path / "inferd.sock"), AsyncClient(tmp_path / "inferd.sock")
        for _ in range(3):
            async with edges(tmp_path):
                assert (await asyncio.to_thread(client.infer, "echo", X)).version == "1.0.0"
                assert (await asyncio.to_thread(client.call, "echo", {"a": 1})) == {"a": 1}
                assert (await patient.infer("echo", X)).version == "1.0.0"
        client.close()
        await patient.close()

    run(test)


def test_a_client_waits_for_a_daemon_that_is_not_there_yet(tmp_path: Path) -> None:
    async def test() -> None:
        client = Client(tmp_path / "inferd.sock", connect_timeout_s=30)
        early = asyncio.ensure_future(asyncio.to_thread(client.infer, "echo", X))
        async with AsyncClient(tmp_path / "inferd.sock", connect_timeout_s=30) as patient:
            late = asyncio.ensure_future(patient.infer("echo", X))
            await asyncio.sleep(0)
            async with edges(tmp_path):
                assert (await early).model == "echo"
                assert (await late).model == "echo"
                client.close()

    run(test)


def test_no_daemon_is_told_after_the_time_allowed(tmp_path: Path) -> None:
    async def test() -> None:
        def work(client: Client) -> None:
            with pytest.raises(UnavailableError, match="cannot reach"):
                client.infer("echo", X)

        await blocking(tmp_path / "none.sock", work, connect_timeout_s=0.02)
        async with AsyncClient(tmp_path / "none.sock", connect_timeout_s=0.02) as client:
            with pytest.raises(UnavailableError, match="cannot reach"):
                await client.infer("echo", X)

    run(test)


@asynccontextmanager
async def rude_daemon(path: Path, manners: list[str]) -> AsyncIterator[list[int]]:
    """A server whose n-th connection behaves as ``manners[n]`` says; yields the ids it saw."""
    seen: list[int] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        manner = manners.pop(0) if manners else "answer"
        decoder = Decoder()
        while data := await reader.read(65536):
            for frame in decoder.feed(data):
                seen.append(frame.header["id"])
                answer = b"".join(
                    encode({"kind": "result", "id": frame.header["id"], "content_type": "a/b", "model": "m"}, (b"ok",))
                )
                if manner == "answer":
                    writer.write(answer)
                elif manner == "half":
                    writer.write(answer[:-1])
                elif manner == "garbage":
                    writer.write(b"garbage")
                elif manner == "refuse":
                    writer.write(b"".join(encode({"kind": "error", "code": "overloaded", "message": "full"})))
                if manner == "silence":
                    continue
                await writer.drain()
                if manner != "answer":
                    writer.close()
                    return
        writer.close()

    server = await asyncio.start_unix_server(serve, sock=bind_unix(path))
    try:
        yield seen
    finally:
        server.close()


@pytest.mark.parametrize(
    ("manners", "retries", "tries"),
    [(["drop"], 2, 2), (["drop", "half"], 2, 3), (["drop"] * 3, 2, 3), (["drop"], 0, 1), (["answer"], 0, 1)],
)
def test_an_unanswered_request_is_repeated_so_often_and_no_more(
    tmp_path: Path, manners: list[str], retries: int, tries: int
) -> None:
    async def test() -> None:
        for flavour in ("blocking", "async"):
            path = tmp_path / flavour
            async with rude_daemon(path, list(manners)) as seen:
                survives = len([manner for manner in manners if manner != "answer"]) <= retries
                async with AsyncClient(path, retries=retries) as patient:
                    client = Client(path, retries=retries)

                    async def ask(
                        client: Client = client, patient: AsyncClient = patient, flavour: str = flavour
                    ) -> Any:
                        if flavour == "async":
                            return await patient.predict("m", b"x")
                        return await asyncio.to_thread(client.predict, "m", b"x")

                    if survives:
                        assert (await ask()).body == b"ok"
                    else:
                        with pytest.raises(UnavailableError, match="broke"):
                            await ask()
                    client.close()
                assert seen == [FIRST_ID] * tries

    run(test)


def test_management_calls_are_not_repeated(tmp_path: Path) -> None:
    async def test() -> None:
        async with rude_daemon(tmp_path / "s", ["drop", "drop"]) as seen:

            def work(client: Client) -> None:
                with pytest.raises(UnavailableError):
                    client.call("deploy", {})

            await blocking(tmp_path / "s", work)
            async with AsyncClient(tmp_path / "s") as client:
                with pytest.raises(UnavailableError):
                    await client.call("deploy", {})
            assert seen == [FIRST_ID, FIRST_ID]

    run(test)


@pytest.mark.parametrize(("manner", "error"), [("garbage", FrameError), ("refuse", OverloadedError)])
def test_a_refusal_or_nonsense_is_raised_and_the_next_request_starts_anew(
    tmp_path: Path, manner: str, error: type[Exception]
) -> None:
    async def test() -> None:
        async with rude_daemon(tmp_path / "s", [manner, "answer", manner, "answer"]):

            def work(client: Client) -> None:
                with pytest.raises(error):
                    client.predict("m", b"x")
                assert client.predict("m", b"x").body == b"ok"

            await blocking(tmp_path / "s", work)
            async with AsyncClient(tmp_path / "s") as client:
                with pytest.raises(error):
                    await client.predict("m", b"x")
                assert (await client.predict("m", b"x")).body == b"ok"

    run(test)


def test_no_answer_in_time_is_a_deadline_error(tmp_path: Path) -> None:
    async def test() -> None:
        async with rude_daemon(tmp_path / "s", ["silence", "answer", "silence", "answer"]):

            def work(client: Client) -> None:
                with pytest.raises(DeadlineError):
                    client.predict("m", b"x")
                assert client.predict("m", b"x", deadline_ms=60_000).body == b"ok"

            await blocking(tmp_path / "s", work, timeout_s=0.02)
        async with edges(tmp_path) as served:
            served.engine.holding = True
            async with AsyncClient(served.frame_path, timeout_s=0.02) as client:
                with pytest.raises(DeadlineError):
                    await client.infer("echo", X)
                await until(lambda: len(served.engine.canceled) == 1)

    run(test)


def test_an_idle_connection_that_ended_costs_no_retry(tmp_path: Path) -> None:
    async def test() -> None:
        client = Client(tmp_path / "inferd.sock", retries=0)
        for _ in range(2):
            async with edges(tmp_path):
                assert (await asyncio.to_thread(client.infer, "echo", X)).model == "echo"
        client.close()

    run(test)


def test_closing_fails_those_who_wait(tmp_path: Path) -> None:
    async def test() -> None:
        engine = FakeEngine()
        engine.holding = True
        async with edges(tmp_path, engine=engine) as served:
            client = AsyncClient(served.frame_path)
            task = asyncio.ensure_future(client.infer("echo", X))
            await until(lambda: len(engine.waiting) == 1)
            await client.close()
            with pytest.raises(UnavailableError, match="closed"):
                await task

    run(test)


def test_a_socket_that_is_a_file_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UnavailableError), Client(tmp_path / "file", connect_timeout_s=0.01) as client:
        client.status()
    with socket.socket(socket.AF_UNIX) as stranger:
        stranger.bind(str(tmp_path / "dead.sock"))
    with pytest.raises(UnavailableError), Client(tmp_path / "dead.sock", connect_timeout_s=0.01) as client:
        client.status()


@pytest.mark.parametrize("kind", ["blocking", "asynchronous"])
def test_a_stream_is_asked_again_when_the_connection_breaks_before_its_first_part(tmp_path: Path, kind: str) -> None:
    async def test() -> None:
        engine = FakeEngine()
        engine.holding = True
        async with edges(tmp_path, engine=engine) as served:
            if kind == "blocking":
                asked = asyncio.ensure_future(
                    blocking(served.frame_path, lambda client: list(client.stream("echo", b"x")))  # type: ignore[arg-type]
                )
            else:

                async def follow() -> list[Any]:
                    async with AsyncClient(served.frame_path) as client:
                        return [part async for part in client.stream("echo", b"x")]

                asked = asyncio.ensure_future(follow())
            await until(lambda: bool(engine.waiting))
            (first,) = engine.waiting
            assert first.header["stream"] is True
            assert first.part is not None
            engine.holding = False
            engine.reply = answer_in_parts
            for connection in list(served.frames._connections):
                connection.close("test")
            assert [(part.seq, part.body, part.version) for part in await asked] == [(0, b"a", "1"), (1, b"b", "1")]
            assert (len(engine.seen), engine.canceled) == (2, [first])

    run(test)


def answer_in_parts(request: InferRequest) -> tuple[dict[str, Any], tuple[bytes, ...]]:
    assert request.part is not None
    for seq, body in enumerate((b"a", b"b")):
        about = {"model": "echo", "version": "1", "variant": "v"} if not seq else {}
        request.part({"kind": "part", "seq": seq, "content_type": "text/plain", **about}, (body,))
    return {"kind": "result", "model": "echo", "version": "1", "variant": "v"}, ()


@pytest.mark.parametrize("kind", ["blocking", "asyncio"])
def test_a_wish_for_a_lane_that_is_not_answered_in_time_costs_no_request(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "inferd.sock"
    with lane_server(path, silent_for="slow") as server:
        if kind == "blocking":
            with Client(path, lanes=True, timeout_s=0.2) as client:
                assert client.infer("slow", {}, deadline_ms=60_000).model == "slow"
        else:

            async def test() -> None:
                async with AsyncClient(path, lanes=True, timeout_s=0.2) as client:
                    assert (await client.infer("slow", {}, deadline_ms=60_000)).model == "slow"

            run(test)
        assert server.answered["lane"] == 0


def test_a_lane_that_comes_too_late_is_not_taken_for_another_models(tmp_path: Path) -> None:
    async def test() -> None:
        path = tmp_path / "inferd.sock"
        with lane_server(path, silent_for="slow") as server:
            async with AsyncClient(path, lanes=True) as client:
                canceled = asyncio.create_task(client.infer("slow", {}))
                await until(lambda: bool(server.unanswered))
                canceled.cancel()
                with suppress(asyncio.CancelledError):
                    await canceled
                assert (await client.infer("double", {})).model == "double"
                await until(lambda: server.asked_by == {"double": {"double"}})

    run(test)
