"""The frame socket with well-behaved clients: answers, order, roles, withdrawal, drain."""

from __future__ import annotations

import asyncio
import os
import socket
import stat
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from agent.config import AuthConfig, ServingConfig
from agent.errors import OverloadedError
from agent.metrics import Metrics
from agent.serving.budget import ReceiveBudget
from agent.serving.frames import FrameServer
from agent.serving.identity import ROLES, AccessPolicy
from agent.serving.listeners import bind_unix
from agent.wire import encode
from tests.fakes.edges import RolesOnly, edges, run, until
from tests.fakes.engine import FakeControl, FakeEngine
from tests.fakes.peer import FramePeer

pytestmark = pytest.mark.integration

X = [{"name": "x", "dtype": "uint8", "shape": [3], "nbytes": 3}]


def infer(request_id: int, **more: Any) -> dict[str, Any]:
    return {"kind": "infer", "id": request_id, "model": "echo", "tensors": X, **more}


@pytest.mark.parametrize("loop", ["uvloop", "asyncio"])
def test_a_request_is_answered_under_its_own_id(tmp_path: Path, loop: str) -> None:
    async def test() -> None:
        async with edges(tmp_path) as served, FramePeer(served.frame_path) as peer:
            await peer.send(infer(2**62, version="1.0.0"), b"abc")
            frame = await peer.frame()
            assert frame.header == {
                "kind": "result",
                "id": 2**62,
                "model": "echo",
                "version": "1.0.0",
                "variant": "fp32",
                "tensors": X,
            }
            assert bytes(frame.body) == b"abc"

    run(test, loop=loop)


def test_the_engine_gets_the_header_as_it_came(tmp_path: Path) -> None:
    async def test() -> None:
        async with edges(tmp_path) as served, FramePeer(served.frame_path) as peer:
            asked = infer(7, priority=3, params={"a": [1]}, outputs=["y"], deadline_ms=60_000, trace="t")
            await peer.send(asked, b"abc")
            await peer.frame()
            (request,) = served.engine.seen
            assert request.header == {name: asked[name] for name in asked if name not in ("id", "deadline_ms")}
            assert (request.model, request.version, request.client) == ("echo", None, f"uid:{os.getuid()}")
            assert 0 < request.deadline - asyncio.get_running_loop().time() <= 60

    run(test)


@pytest.mark.parametrize("size", [0, 1, 65_536, 300_000, 5_000_000])
@pytest.mark.parametrize("loop", ["uvloop", "asyncio"])
def test_bodies_of_any_size_pass_unchanged(tmp_path: Path, size: int, loop: str) -> None:
    async def test() -> None:
        async with edges(tmp_path) as served, FramePeer(served.frame_path) as peer:
            body = os.urandom(size)
            await peer.send({"kind": "infer", "id": 1, "model": "echo", "content_type": "a/b"}, body)
            frame = await peer.frame()
            assert bytes(frame.body) == body
            assert served.budget.held == 0

    run(test, loop=loop)


def test_many_requests_sent_at_once_are_all_answered(tmp_path: Path) -> None:
    async def test() -> None:
        async with edges(tmp_path) as served, FramePeer(served.frame_path) as peer:
            count = 500
            await peer.send_raw(b"".join(b"".join(encode(infer(n), (b"abc",))) for n in range(count)))
            seen = [(await peer.frame()).header["id"] for _ in range(count)]
            assert seen == list(range(count))

    run(test)


def test_answers_overtake_each_other(tmp_path: Path) -> None:
    async def test() -> None:
        async with edges(tmp_path) as served, FramePeer(served.frame_path) as peer:
            served.engine.holding = True
            await peer.send(infer(1), b"abc")
            await until(lambda: len(served.engine.waiting) == 1)
            served.engine.holding = False
            await peer.send(infer(2), b"abc")
            assert (await peer.frame()).header["id"] == 2
            served.engine.release()
            assert (await peer.frame()).header["id"] == 1

    run(test)


def test_many_clients_are_served_side_by_side(tmp_path: Path) -> None:
    async def test() -> None:
        async with edges(tmp_path) as served:

            async def one(number: int) -> None:
                async with FramePeer(served.frame_path) as peer:
                    for request_id in range(20):
                        await peer.send(infer(request_id, params={"who": number}), b"abc")
                        frame = await peer.frame()
                        assert (frame.header["id"], frame.header["params"]) == (request_id, {"who": number})

            async with asyncio.TaskGroup() as group:
                for number in range(100):
                    group.create_task(one(number))
            assert served.engine.answers == 2000

    run(test)


def test_errors_of_the_engine_reach_their_request(tmp_path: Path) -> None:
    async def test() -> None:
        async with edges(tmp_path) as served, FramePeer(served.frame_path) as peer:

            def full(_request: object) -> Any:
                raise OverloadedError("the queue is full")

            served.engine.reply = full
            await peer.send(infer(1), b"abc")
            await peer.send({**infer(2), "model": "nobody"}, b"abc")
            first, second = await peer.frame(), await peer.frame()
            assert first.header == {
                "kind": "error",
                "id": 1,
                "code": "overloaded",
                "message": "the queue is full",
                "retryable": True,
            }
            assert (second.header["id"], second.header["code"]) == (2, "unknown_model")

    run(test)


@pytest.mark.parametrize(
    "wrong",
    [
        {"model": None},
        {"model": ""},
        {"model": 7},
        {"model": "m" * 129},
        {"version": 3},
        {"deadline_ms": 0},
        {"deadline_ms": -5},
        {"deadline_ms": "soon"},
        {"deadline_ms": float("nan")},
        {"deadline_ms": True},
        {"deadline_ms": 10**9},
    ],
)
def test_a_wrong_request_is_answered_and_the_connection_goes_on(tmp_path: Path, wrong: dict[str, Any]) -> None:
    async def test() -> None:
        async with edges(tmp_path) as served, FramePeer(served.frame_path) as peer:
            await peer.send({**infer(1), **wrong}, b"abc")
            refused = await peer.frame()
            assert (refused.header["id"], refused.header["code"]) == (1, "invalid_input")
            assert next(iter(wrong)) in refused.header["message"]
            await peer.send(infer(1), b"abc")
            assert (await peer.frame()).header["kind"] == "result"
            assert len(served.engine.seen) == 1

    run(test)


def test_hello_tells_protocol_roles_and_limits(tmp_path: Path) -> None:
    async def test() -> None:
        async with edges(tmp_path) as served, FramePeer(served.frame_path) as peer:
            await peer.send({"kind": "hello", "client": "test", "protocol": 1})
            header = (await peer.frame()).header
            assert (header["kind"], header["protocol"]) == ("hello", 1)
            assert header["roles"] == sorted(ROLES)
            assert header["limits"]["body_bytes_max"] == 64 * 1024 * 1024

    run(test)


def test_a_peer_without_the_role_is_refused(tmp_path: Path) -> None:
    async def test() -> None:
        async with edges(tmp_path, policy=RolesOnly()) as served, FramePeer(served.frame_path) as peer:
            await peer.send(infer(1), b"abc")
            assert (await peer.frame()).header["code"] == "forbidden"
            await peer.send({"kind": "call", "id": 2, "method": "status", "args": {}})
            assert (await peer.frame()).header["code"] == "forbidden"
            assert served.engine.seen == []

    run(test)


def test_calls_reach_the_control_with_roles_and_peer(tmp_path: Path) -> None:
    async def test() -> None:
        async with edges(tmp_path) as served, FramePeer(served.frame_path) as peer:
            await peer.send({"kind": "call", "id": 1, "method": "deploy", "args": {"model": "m"}})
            assert (await peer.frame()).header == {"kind": "reply", "id": 1, "value": {"model": "m"}}
            ((method, args, roles, who),) = served.control.calls
            assert (method, args) == ("deploy", {"model": "m"})
            assert "operate" in roles
            assert f"pid:{os.getpid()}" in who

    run(test)


@pytest.mark.parametrize(
    ("call", "code"),
    [
        ({"method": "no-such-verb"}, "internal"),
        ({"method": "crash"}, "internal"),
        ({"method": "unpackable"}, "bad_frame"),
        ({"method": "wait", "deadline_ms": 20}, "deadline_exceeded"),
        ({"method": ""}, "invalid_input"),
        ({"method": "echo", "args": [1]}, "invalid_input"),
    ],
)
def test_a_failed_call_is_answered_and_the_connection_goes_on(tmp_path: Path, call: dict[str, Any], code: str) -> None:
    async def test() -> None:
        async with edges(tmp_path) as served, FramePeer(served.frame_path) as peer:
            await peer.send({"kind": "call", "id": 1, **call})
            assert (await peer.frame()).header["code"] == code
            await peer.send({"kind": "call", "id": 2, "method": "status"})
            assert (await peer.frame()).header["kind"] == "reply"

    run(test)


def test_calls_at_once_are_bounded(tmp_path: Path) -> None:
    async def test() -> None:
        async with edges(tmp_path) as served, FramePeer(served.frame_path) as peer:
            for number in range(17):
                await peer.send({"kind": "call", "id": number, "method": "wait"})
            header = (await peer.frame()).header
            assert (header["id"], header["code"]) == (16, "overloaded")

    run(test)


def test_a_withdrawn_request_is_answered_canceled_at_once(tmp_path: Path) -> None:
    async def test() -> None:
        async with edges(tmp_path) as served, FramePeer(served.frame_path) as peer:
            served.engine.holding = True
            await peer.send(infer(1), b"abc")
            await peer.send({"kind": "cancel", "id": 1})
            assert (await peer.frame()).header["code"] == "canceled"
            assert len(served.engine.canceled) == 1
            served.engine.release()
            served.engine.holding = False
            await peer.send(infer(1), b"abc")
            assert (await peer.frame()).header["kind"] == "result"

    run(test)


def test_a_late_answer_never_reaches_the_next_user_of_its_id(tmp_path: Path) -> None:
    """The contract lets an engine answer a canceled request; nobody may hear it."""

    async def test() -> None:
        async with edges(tmp_path) as served, FramePeer(served.frame_path) as peer:
            served.engine.holding = True
            await peer.send(infer(1, params={"which": "old"}), b"abc")
            await peer.send({"kind": "cancel", "id": 1})
            await peer.frame()
            await peer.send(infer(1, params={"which": "new"}), b"abc")
            await until(lambda: len(served.engine.seen) == 2)
            served.engine.seen[0].answer({"kind": "result", "id": 1, "params": {"which": "old"}}, ())
            served.engine.release()
            assert (await peer.frame()).header["params"] == {"which": "new"}

    run(test)


def test_a_withdrawn_call_is_ended(tmp_path: Path) -> None:
    async def test() -> None:
        async with edges(tmp_path) as served, FramePeer(served.frame_path) as peer:
            await peer.send({"kind": "call", "id": 1, "method": "wait"})
            await until(lambda: len(served.control.calls) == 1)
            await peer.send({"kind": "cancel", "id": 1})
            assert (await peer.frame()).header["code"] == "canceled"
            await until(lambda: served.control.canceled == 1)
            call, cancel = {"kind": "call", "id": 1, "method": "wait"}, {"kind": "cancel", "id": 1}
            await peer.send_raw(b"".join([*encode(call), *encode(cancel)]))  # withdrawn before its task ever ran
            assert (await peer.frame()).header["code"] == "canceled"
            await peer.send({"kind": "cancel", "id": 99})  # crossed its answer: no fault
            await peer.send({"kind": "call", "id": 2, "method": "status"})
            assert (await peer.frame()).header["id"] == 2

    run(test)


def test_a_client_that_leaves_withdraws_everything(tmp_path: Path) -> None:
    async def test() -> None:
        async with edges(tmp_path) as served:
            served.engine.holding = True
            async with FramePeer(served.frame_path) as peer:
                for number in range(3):
                    await peer.send(infer(number), b"abc")
                await peer.send({"kind": "call", "id": 9, "method": "wait"})
                await until(lambda: len(served.engine.waiting) == 3 and len(served.control.calls) == 1)
            await until(lambda: len(served.engine.canceled) == 3 and served.control.canceled == 1)

    run(test)


def test_a_client_that_closes_its_half_has_left(tmp_path: Path) -> None:
    async def test() -> None:
        async with edges(tmp_path) as served, FramePeer(served.frame_path) as peer:
            served.engine.holding = True
            await peer.send(infer(1), b"abc")
            peer.sock.shutdown(socket.SHUT_WR)
            assert await peer.ended()
            assert len(served.engine.canceled) == 1

    run(test)


def test_the_end_waits_for_accepted_requests_and_takes_no_new_ones(tmp_path: Path) -> None:
    async def test() -> None:
        engine = FakeEngine()
        engine.holding = True
        async with asyncio.TaskGroup() as group:
            idle, busy = FramePeer(tmp_path / "inferd.sock"), FramePeer(tmp_path / "inferd.sock")
            stop = asyncio.Event()

            async def serve() -> None:
                async with edges(tmp_path, engine=engine):
                    started.set()
                    await stop.wait()

            started = asyncio.Event()
            server = group.create_task(serve())
            await started.wait()
            async with idle, busy:
                await busy.send(infer(1), b"abc")
                await busy.send({"kind": "call", "id": 2, "method": "echo", "args": {"a": 1}})
                await until(lambda: len(engine.waiting) == 1)
                assert (await busy.frame()).header["kind"] == "reply"
                stop.set()
                assert await idle.ended()
                assert not server.done()
                engine.release()
                assert (await busy.frame()).header["kind"] == "result"
                assert await busy.ended()

    run(test)


def test_the_end_is_bounded(tmp_path: Path) -> None:
    async def test() -> None:
        engine = FakeEngine()
        engine.holding = True
        async with edges(tmp_path, engine=engine, drain_timeout_s=0.05) as served:
            peer = FramePeer(served.frame_path)
            await peer.__aenter__()
            await peer.send(infer(1), b"abc")
            await until(lambda: len(engine.waiting) == 1)
        assert await peer.ended()
        await peer.__aexit__()
        assert len(engine.canceled) == 1

    run(test)


def test_an_inherited_socket_keeps_its_backlog_between_two_daemons(tmp_path: Path) -> None:
    """systemd holds the listening socket: who connects while the daemon is away is served by the next."""

    async def test() -> None:
        held = bind_unix(tmp_path / "held.sock")

        async def generation(work: Callable[[], Awaitable[None]]) -> None:
            server = FrameServer(
                held.dup(),
                engine=FakeEngine(),
                control=FakeControl(),
                policy=AccessPolicy(AuthConfig(), own_uid=os.getuid()),
                budget=ReceiveBudget(1 << 30),
                config=ServingConfig(),
                metrics=Metrics(),
            )
            async with server.serving():
                await work()

        async def nothing() -> None:
            return

        await generation(nothing)
        async with FramePeer(tmp_path / "held.sock") as early:
            await early.send(infer(1), b"abc")

            async def answered() -> None:
                assert (await early.frame()).header["kind"] == "result"

            await generation(answered)
        held.close()

    run(test)


def test_the_socket_file_is_for_owner_and_group(tmp_path: Path) -> None:
    async def test() -> None:
        async with edges(tmp_path) as served:
            for path in (served.frame_path, served.http_path):
                assert stat.S_IMODE(path.stat().st_mode) == 0o660

    run(test)
