"""A model's process that lies, hangs or holds everybody up: the daemon keeps its bounds and its other clients."""

from __future__ import annotations

import asyncio
import json
import os
import signal
from pathlib import Path
from typing import Any

import msgpack
import numpy as np
import psutil
import pytest

from agent.engine.orphans import kill_left
from agent.engine.version import Version
from agent.engine.zygote import Zygote
from agent.errors import LoadError
from agent.tensors import pack
from tests.integration.test_engine import Bench, bench, run, until
from tests.models import FEATURES, scale_version

pytestmark = pytest.mark.integration


def held_request(box: Bench, nbytes: int = 0) -> tuple[Any, Any]:
    """Submit a request of ``nbytes`` or, with 0, a good one; nothing is awaited."""
    if nbytes:
        return box.request(bytes(nbytes), {"id": 1, "content_type": "text/plain"}, deadline_s=600.0, version=None)
    entries, buffers = pack({"x": np.ones((1, FEATURES), dtype=np.float32)})
    body = b"".join(bytes(buffer) for buffer in buffers)
    return box.request(body, {"id": 2, "tensors": entries}, deadline_s=600.0, version=None)


def test_canceled_requests_hold_their_place_until_a_stuck_worker_lets_go(tmp_path: Path) -> None:
    """Asking and canceling must not pile bodies up before a worker that reads nothing."""

    async def story() -> None:
        async with bench(tmp_path) as box:
            version = await box.engine.load(scale_version(tmp_path / "bundle", handler="odd", window=4))
            box.engine.activate(version)
            assert version.pool is not None
            (link,) = version.pool.links
            os.kill(link.process.pid, signal.SIGSTOP)
            for _ in range(64):
                request, _ = held_request(box, 1 << 20)
                box.engine.cancel(request)
            assert len(link.owed) <= 4
            assert version.pool.held_bytes <= 4 << 20
            _, answer = held_request(box)
            os.kill(link.process.pid, signal.SIGCONT)
            assert (await answer)[0]["kind"] == "result"
            await until(lambda: not link.owed)
            assert link.held_bytes == 0

    run(story)


def test_who_waits_behind_requests_that_are_canceled_gets_its_turn(tmp_path: Path) -> None:
    async def story() -> None:
        async with bench(tmp_path) as box:
            version = await box.engine.load(scale_version(tmp_path / "bundle", window=4))
            box.engine.activate(version)
            assert version.pool is not None
            (link,) = version.pool.links
            os.kill(link.process.pid, signal.SIGSTOP)
            first = [held_request(box)[0] for _ in range(4)]
            later = [held_request(box)[1] for _ in range(8)]
            for request in first:
                box.engine.cancel(request)
            os.kill(link.process.pid, signal.SIGCONT)
            assert {header["kind"] for header, _ in await asyncio.gather(*later)} == {"result"}

    run(story)


def test_a_stopped_worker_is_killed_although_no_request_waits_so_long(tmp_path: Path) -> None:
    async def story() -> None:
        async with bench(tmp_path, hang_timeout_s=0.3) as box:
            version = await box.engine.load(scale_version(tmp_path / "bundle"))
            box.engine.activate(version)
            assert version.pool is not None
            pid = version.pool.links[0].process.pid
            os.kill(pid, signal.SIGSTOP)
            while (header := await box.ask(deadline_s=0.1))["kind"] != "result":
                assert header["code"] in ("deadline_exceeded", "worker_died")
            assert not psutil.pid_exists(pid)

    run(story)


@pytest.mark.parametrize(
    "lie",
    [
        {},
        {"signature": [1]},
        {"variant": b"\xff"},
        {"device": msgpack.ExtType(5, b"x")},
        {"golden": "fine"},
        {"memory": 1},
        {"max_batch": "many"},
        {"sandbox": {"level": "full"}},
    ],
)
def test_a_hello_that_is_none_fails_the_load(tmp_path: Path, lie: dict[str, Any]) -> None:
    async def story() -> None:
        async with bench(tmp_path) as box:
            spec = scale_version(tmp_path / "bundle", handler="liar")
            (tmp_path / "bundle/lie").write_bytes(msgpack.packb(lie))
            with pytest.raises(LoadError, match="hello is malformed"):
                await box.engine.load(spec)

    run(story)


def test_invented_error_codes_reach_neither_client_nor_metrics(tmp_path: Path) -> None:
    async def story() -> None:
        async with bench(tmp_path) as box:
            box.engine.activate(await box.engine.load(scale_version(tmp_path / "bundle", handler="liar")))
            for number in range(5):
                header = await box.say(json.dumps({"kind": "error", "code": f"code{number}", "retryable": True}))
                assert (header["code"], header["retryable"]) == ("internal", False)
            assert b"code0" not in box.metrics.render()

    run(story)


def test_an_invented_answer_is_reduced_to_what_an_answer_may_say(tmp_path: Path) -> None:
    async def story() -> None:
        async with bench(tmp_path) as box:
            box.engine.activate(await box.engine.load(scale_version(tmp_path / "bundle", handler="liar")))
            lie = {"kind": "result", "content_type": ["x"], "params": 5, "tensors": "no", "version": 9, "more": {}}
            asked = {"content_type": "text/plain"}
            _, answer = box.request(json.dumps(lie).encode(), asked, deadline_s=30.0, version=None)
            header, _ = await answer
            assert header == {"kind": "result", "model": "scale", "version": "1.0.0", "variant": "v0"}

    run(story)


def test_a_zygote_that_hangs_is_replaced(tmp_path: Path) -> None:
    async def story() -> None:
        zygote = Zygote("onnx", fork_timeout_s=1.0)
        await zygote.start()
        stuck = zygote.pid
        assert stuck is not None
        os.kill(stuck, signal.SIGSTOP)
        with pytest.raises(LoadError, match="cannot fork"):
            await zygote.fork({})
        await until(lambda: zygote.pid is None)
        await zygote.start()
        assert zygote.pid not in (None, stuck)
        await zygote.stop()

    run(story)


def stuck_worker(folder: Path) -> dict[str, Any]:
    """Return the order for a worker that never gets as far as to hear that its channel closes."""
    (folder / "scratch").mkdir()
    worker = scale_version(folder / "bundle", handler="stuck").variants[0].worker
    return {**worker, "scratch_dir": str(folder / "scratch"), "cores": []}


async def give_up(zygote: Zygote, order: dict[str, Any]) -> None:
    """Ask for a worker and withdraw once the order is with the zygote."""
    fork = asyncio.create_task(zygote.fork(order))
    await asyncio.sleep(0)
    fork.cancel()
    await asyncio.wait({fork})
    assert fork.cancelled()


def test_a_worker_that_nobody_waits_for_any_more_is_ended_although_it_hangs(tmp_path: Path) -> None:
    async def story() -> None:
        zygote = Zygote("onnx")
        await zygote.start()
        order = stuck_worker(tmp_path)
        await give_up(zygote, order)
        next_one = await zygote.fork(order)  # orders are obeyed one after the other
        next_one.kill()
        next_one.close()
        await until(lambda: not psutil.Process(zygote.pid).children())
        await zygote.stop()

    run(story)


def test_a_zygote_that_is_stopped_in_the_middle_of_a_fork_leaves_no_worker(tmp_path: Path) -> None:
    async def story() -> None:
        zygote = Zygote("onnx")
        await zygote.start()
        await give_up(zygote, stuck_worker(tmp_path))
        await zygote.stop()
        assert not kill_left(tmp_path / "scratch")

    run(story)


def test_a_worker_that_hangs_holds_up_the_end_of_no_other_model(tmp_path: Path) -> None:
    async def story() -> None:
        gone: list[str] = []

        async def see_go(version: Version) -> None:
            assert version.pool is not None
            (link,) = version.pool.links
            await link.gone.wait()
            gone.append(version.version)

        async with asyncio.TaskGroup() as group, bench(tmp_path) as box:
            for number in "1234":
                spec = scale_version(tmp_path / number, version=number)
                version = await box.engine.load(spec, beside=True)
                assert version.pool is not None
                if number == "2":
                    os.kill(version.pool.pids[0], signal.SIGSTOP)
                group.create_task(see_go(version))
        assert (len(gone), gone[-1]) == (4, "2")

    run(story)


@pytest.mark.parametrize("lie", [{"content_type": "text/plain"}, {"tensors": 3, "seq": "x"}, {}])
def test_parts_that_nobody_asked_for_end_the_worker_and_reach_nobody(tmp_path: Path, lie: dict[str, Any]) -> None:
    async def story() -> None:
        async with bench(tmp_path) as box:
            version = await box.engine.load(scale_version(tmp_path / "bundle", handler="liar"))
            box.engine.activate(version)
            answer = await box.say(json.dumps({"kind": "part", **lie}))  # its own, written before the worker was killed
            assert answer["kind"] == "result" or answer["code"] == "worker_died"
            await until(lambda: version.deaths > 0)
            while (await box.ask(2.0)).get("y") != 4.0:
                await asyncio.sleep(0.01)

    run(story)
