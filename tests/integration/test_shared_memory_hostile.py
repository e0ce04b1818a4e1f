"""Shared memory and clients that lie, leave, or mean harm; workers that die. Nobody else notices, nothing leaks."""

from __future__ import annotations

import asyncio
import fcntl
import gc
import os
import signal
import socket
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from agent.client import AsyncClient, Client
from agent.config import SharedMemoryConfig
from agent.errors import InferenceError, InvalidInputError
from agent.tensors import pack, unpack
from agent.wire import encode
from tests.fakes.peer import FramePeer
from tests.shared import (
    SharedBox,
    descriptors,
    double_version,
    mapped,
    mean_version,
    pick_version,
    run,
    shared_box,
    until,
)

pytestmark = pytest.mark.integration

_BOTH = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW


@contextmanager
def memfd(nbytes: int, seals: int = _BOTH, *, fill: int = 0) -> Iterator[int]:
    descriptor = os.memfd_create("test", os.MFD_ALLOW_SEALING | os.MFD_CLOEXEC)
    try:
        os.ftruncate(descriptor, nbytes)
        if fill:
            os.pwrite(descriptor, bytes([fill]) * nbytes, 0)
        if seals:
            fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, seals)
        yield descriptor
    finally:
        os.close(descriptor)


class Attacker(FramePeer):
    """A raw peer that can pass descriptors."""

    async def pass_on(self, header: dict[str, Any], *passed: int, body: bytes = b"") -> None:
        socket.send_fds(self.sock, [b"".join(bytes(part) for part in encode(header, (body,)))], list(passed))

    async def attach(self, number: Any, descriptor: int, nbytes: Any, request_id: int = 1) -> dict[str, Any]:
        await self.pass_on({"kind": "attach", "id": request_id, "region": number, "nbytes": nbytes}, descriptor)
        return (await self.frame()).header

    async def ask(self, header: dict[str, Any], body: bytes = b"") -> dict[str, Any]:
        await self.send(header, body)
        return (await self.frame()).header


def mean(request_id: int, region: Any, offset: Any, nbytes: int, **more: Any) -> dict[str, Any]:
    entry = {"name": "x", "dtype": "uint8", "shape": [1, nbytes], "nbytes": nbytes, "region": region, "offset": offset}
    return {"kind": "infer", "id": request_id, "model": "mean", "tensors": [entry], **more}


@contextmanager
def stopped(pid: int) -> Iterator[None]:
    """Keep a process from running, so that what is sent to it stays in flight."""
    os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGCONT)


async def settled(box: SharedBox, before: int, *models: str) -> None:
    """Everything that was shared is let go, in the daemon and in the workers."""
    await until(lambda: box.frames.regions.count == box.frames.regions.held_bytes == 0)
    await until(lambda: gc.collect() >= 0 and descriptors() <= before)  # clients in this process leave some open
    for model in models:
        await until(lambda model=model: not mapped(box.worker_pid(model)))


async def untaken(box: SharedBox, peer: Attacker, asked: dict[str, Any], body: bytes) -> None:
    """Ask until an answer waits in the daemon because nobody reads: how much a socket takes differs by machine."""
    for request_id in range(100, 200):
        good = box.version("double").good
        await peer.send({**asked, "id": request_id}, body)
        await until(lambda good=good: box.version("double").good > good)
        if box.arena.held_bytes > box.arena.idle_bytes:
            return
    pytest.fail("the socket took a hundred answers")


def test_what_is_no_sealed_memory_of_that_size_is_refused(tmp_path: Path) -> None:
    async def story() -> None:
        async with shared_box(tmp_path, mean_version(tmp_path / "m")) as box, Attacker(box.path) as peer:
            before = descriptors()
            with memfd(4096) as good, memfd(4096, 0) as open_one, memfd(4096, fcntl.F_SEAL_GROW) as shrinking:
                for number, descriptor, nbytes in (
                    (1, good, 8192), (1, good, 4095), (1, good, 0), (1, good, -1), (1, good, 2**63), (1, good, True),
                    (1, good, "4096"), (1, good, None), (1, open_one, 4096), (1, shrinking, 4096), (-1, good, 4096),
                    (2**31, good, 4096), (None, good, 4096), ("a", good, 4096), (1.0, good, 4096),
                ):  # fmt: skip
                    answer = await peer.attach(number, descriptor, nbytes)
                    assert answer["code"] in ("invalid_input", "bad_tensor", "too_large"), (number, nbytes, answer)
                read, write = os.pipe()
                with tempfile.TemporaryFile() as file, socket.socket() as sock:
                    for other in (read, write, file.fileno(), sock.fileno(), os.open("/dev/null", os.O_RDWR)):
                        assert (await peer.attach(1, other, 4096))["code"] == "invalid_input"
                        if other not in (file.fileno(), sock.fileno()):
                            os.close(other)
                assert (await peer.attach(2**31 - 1, good, 4096))["value"] == {"region": 2**31 - 1}
                assert (await peer.attach(2**31 - 1, good, 4096))["code"] == "invalid_input"  # the number is taken
                with pytest.raises(PermissionError):
                    os.ftruncate(good, 0)
                assert (await peer.ask(mean(5, 2**31 - 1, 0, 4096)))["kind"] == "result"
            peer.sock.close()
            await settled(box, before, "mean")

    run(story)


def test_descriptors_where_none_belong_end_the_connection(tmp_path: Path) -> None:
    async def story() -> None:
        async with shared_box(tmp_path, mean_version(tmp_path / "m")) as box:
            before = descriptors()
            with memfd(4096) as good:
                for header, passed in (
                    ({"kind": "hello"}, [good]),
                    (mean(1, 1, 0, 10), [good]),
                    ({"kind": "cancel", "id": 1}, [good]),
                    ({"kind": "attach", "id": 1, "region": 1, "nbytes": 4096}, [good, good]),
                    ({"kind": "attach", "id": 1, "region": 1, "nbytes": 4096}, []),
                    ({"kind": "attach", "id": 1, "region": 1, "nbytes": 4096}, [good] * 253),
                ):
                    async with Attacker(box.path) as peer:
                        await peer.pass_on(header, *passed)
                        assert (await peer.last_words())["code"] == "bad_frame"
                async with Attacker(box.path) as peer:  # half a frame, then nothing more
                    socket.send_fds(peer.sock, [b"IFD1"], [good])
                    await asyncio.sleep(0.05)
                async with Attacker(box.path) as peer:  # with every byte of a large body
                    head = b"".join(encode({"kind": "infer", "id": 1, "model": "mean"}, ()))
                    head = head[:8] + (1 << 20).to_bytes(8, "little") + head[16:]
                    await peer.send_raw(head)
                    for _ in range(20):
                        await asyncio.sleep(0)
                        try:
                            socket.send_fds(peer.sock, [b"x"], [good])
                        except OSError:
                            break
                    assert (await peer.last_words())["code"] == "bad_frame"
            await settled(box, before, "mean")

    run(story)


BAD_PLACES = [
    (1, 4096, 1), (1, 4000, 97), (1, 0, 4097), (1, 2**63 - 1, 10), (1, 2**63, 10), (1, 2**64 - 1, 1), (1, -1, 10),
    (1, 1.0, 10), (1, None, 10), (1, True, 10), (2, 0, 10), (-1, 0, 10), (2**31, 0, 10), (2**63, 0, 10), ("1", 0, 10),
    (None, 0, 10), ([1], 0, 10), (1.0, 0, 10),
]  # fmt: skip


def test_places_outside_a_region_are_refused_and_the_worker_lives(tmp_path: Path) -> None:
    async def story() -> None:
        async with shared_box(tmp_path, mean_version(tmp_path / "m")) as box, Attacker(box.path) as peer:
            pid = box.worker_pid("mean")
            with memfd(4096, fill=7) as good:
                for region, offset, nbytes in BAD_PLACES:  # nothing is attached yet
                    assert (await peer.ask(mean(1, region, offset, nbytes)))["code"] == "bad_tensor"
                await peer.attach(1, good, 4096)
                for region, offset, nbytes in BAD_PLACES:
                    answer = await peer.ask(mean(1, region, offset, nbytes))
                    assert answer["code"] == "bad_tensor", (region, offset, nbytes, answer)
                    window = {"region": region, "offset": offset, "nbytes": nbytes}
                    answer = await peer.ask(mean(1, 1, 0, 100, reply=window))
                    assert answer["code"] == "bad_tensor", (window, answer)
                for window in (7, [], {"region": 1}, {"region": 1, "offset": 0, "nbytes": 2**63}, {"nbytes": 1}):
                    assert (await peer.ask(mean(1, 1, 0, 100, reply=window)))["code"] == "bad_tensor"
                wrong = mean(1, 1, 0, 100)
                wrong["tensors"][0]["nbytes"] = 99
                assert (await peer.ask(wrong))["code"] == "bad_tensor"
                text = {"name": "x", "dtype": "bytes", "shape": [1], "nbytes": 8, "region": 1, "offset": 0}
                assert (await peer.ask({**mean(1, 1, 0, 1), "tensors": [text]}))["code"] == "bad_tensor"
                assert (await peer.ask(mean(1, 1, 0, 100), b"extra"))["code"] == "bad_tensor"
                assert (await peer.ask(mean(1, 1, 4095, 1)))["kind"] == "result"
            assert box.worker_pid("mean") == pid

    run(story)


def test_another_clients_regions_cannot_be_named(tmp_path: Path) -> None:
    async def story() -> None:
        async with (
            shared_box(tmp_path, mean_version(tmp_path / "m")) as box,
            Attacker(box.path) as owner,
            Attacker(box.path) as thief,
        ):
            with memfd(4096, fill=200) as secret, memfd(64, fill=1) as own:
                await owner.attach(5, secret, 4096)
                assert (await owner.ask(mean(1, 5, 0, 10)))["kind"] == "result"
                for attached in (False, True):
                    if attached:
                        await thief.attach(77, own, 64)
                    for number in range(50):  # the owner's number and every number the daemon may have given
                        asked = mean(1, number, 0, 10, shared={"regions": [[number, number]]}, regions=[[number, 1]])
                        assert (await thief.ask(asked))["code"] == "bad_tensor"
                        assert (await thief.ask({"kind": "detach", "id": 2, "region": number}))["kind"] == "error"
                assert (await owner.ask(mean(2, 5, 0, 10)))["kind"] == "result"

    run(story)


def test_memory_that_cannot_be_written_serves_inputs_only(tmp_path: Path) -> None:
    async def story() -> None:
        async with shared_box(tmp_path, mean_version(tmp_path / "m")) as box, Attacker(box.path) as peer:
            with memfd(4096, fill=3) as writable, memfd(4096, _BOTH | fcntl.F_SEAL_WRITE) as frozen:
                for number, descriptor in ((1, os.open(f"/proc/self/fd/{writable}", os.O_RDONLY)), (2, frozen)):
                    assert (await peer.attach(number, descriptor, 4096))["kind"] == "reply"
                    assert (await peer.ask(mean(1, number, 0, 100)))["kind"] == "result"
                    window = {"region": number, "offset": 0, "nbytes": 4096}
                    answer = await peer.ask(mean(1, number, 0, 100, reply=window))
                    assert (answer["code"], "written" in answer["message"]) == ("bad_tensor", True)

    run(story)


def test_detaching_under_a_running_request_changes_nothing_for_it(tmp_path: Path) -> None:
    async def story() -> None:
        async with shared_box(tmp_path, mean_version(tmp_path / "m")) as box:
            before = descriptors()
            async with Attacker(box.path) as peer:
                with memfd(4096, fill=9) as good:
                    await peer.attach(1, good, 4096)
                    with stopped(box.worker_pid("mean")):
                        await peer.send(mean(1, 1, 0, 4096))
                        assert (await peer.ask({"kind": "detach", "id": 2, "region": 1}))["value"] == {"region": 1}
                        await peer.send(mean(3, 1, 0, 4096))  # too late for this one
                        assert box.frames.regions.count == 1
                    answers = {(frame := await peer.frame()).header["id"]: frame for _ in range(2)}
                    assert np.frombuffer(answers[1].body, "<f4")[0] == 9
                    assert answers[3].header["code"] == "bad_tensor"
            await settled(box, before, "mean")

    run(story)


def test_a_client_that_dies_in_the_middle_leaves_nothing(tmp_path: Path) -> None:
    async def story() -> None:
        async with shared_box(tmp_path, mean_version(tmp_path / "m"), hang_timeout_s=30.0) as box:
            before, worker = descriptors(), descriptors(box.worker_pid("mean"))
            for _ in range(20):
                with stopped(box.worker_pid("mean")):
                    async with Attacker(box.path) as peer:
                        with memfd(1 << 20) as good:
                            await peer.attach(1, good, 1 << 20)
                            for request_id in range(5):
                                await peer.send(mean(request_id, 1, 0, 1 << 20))
                            await until(lambda: box.version("mean").pool.outstanding == 5)
                    await until(lambda: box.version("mean").pool.outstanding == 0)
                async with AsyncClient(box.path) as other:
                    plain = np.full((1, 100), 4, np.uint8)
                    assert (await other.infer("mean", {"x": plain})).outputs["y"][0] == 4
            await settled(box, before, "mean")
            await until(lambda: descriptors(box.worker_pid("mean")) <= worker)

    run(story)


def test_many_regions_and_clients_leak_no_descriptor(tmp_path: Path) -> None:
    async def story() -> None:
        options = {"open_files_max": 32}
        async with shared_box(tmp_path, mean_version(tmp_path / "m"), **options) as box:
            before, worker = descriptors(), descriptors(box.worker_pid("mean"))

            def work() -> None:
                for turn in range(12):
                    client = Client(box.path)
                    regions = [client.region(4096 * (1 + number)) for number in range(40)]
                    for number, region in enumerate(regions * 2):
                        x = region.array((1, 4096), np.uint8)
                        x[:] = number
                        assert client.infer("mean", {"x": x}).outputs["y"][0] == number
                        assert len(mapped(box.worker_pid("mean"))) <= 17
                    if turn % 2:
                        for region in regions:
                            region.close()
                    client.close()

            await asyncio.to_thread(work)
            await settled(box, before, "mean")
            await until(lambda: descriptors(box.worker_pid("mean")) <= worker)

    run(story)


def test_a_killed_workers_requests_find_their_memory_at_the_next(tmp_path: Path) -> None:
    async def work(box: SharedBox) -> None:
        async with AsyncClient(box.path) as client:
            with await client.region(1 << 20) as region, await client.region(1 << 20) as reply:
                rows = [region.array((1, 1000), np.float32, offset=4096 * number) for number in range(20)]
                for number, row in enumerate(rows):
                    row[:] = number
                plain = np.full((1, 100_000), 3, np.float32)
                for _ in range(5):
                    pid = box.worker_pid("double")
                    with stopped(pid):
                        tasks = [asyncio.ensure_future(client.infer("double", {"x": row})) for row in rows]
                        tasks.append(asyncio.ensure_future(client.infer("double", {"x": rows[5]}, reply=reply)))
                        tasks.append(asyncio.ensure_future(client.infer("double", {"x": plain})))
                        await until(lambda: box.version("double").pool.outstanding == 22)
                        os.kill(pid, signal.SIGKILL)
                    for number, task in enumerate(tasks[:20]):
                        assert ((await task).outputs["y"] == 2 * number).all()
                    assert ((await tasks[20]).outputs["y"] == 10).all()
                    assert ((await tasks[21]).outputs["y"] == 6).all()
                    await until(lambda pid=pid: box.version("double").ready and box.worker_pid("double") != pid)

    async def story() -> None:
        async with shared_box(tmp_path, double_version(tmp_path / "m"), deaths_max=100) as box:
            before = descriptors()
            await work(box)  # whose arrays keep the regions mapped in this process
            await settled(box, before, "double")

    run(story)


def test_the_data_of_two_clients_never_mix(tmp_path: Path) -> None:
    async def story() -> None:
        async with shared_box(tmp_path, double_version(tmp_path / "m")) as box:

            async def one(mark: int) -> None:
                async with AsyncClient(box.path) as client:
                    with await client.region(1 << 22) as region:
                        arrays = [region.array((1, 20_000), offset=80_000 * number) for number in range(8)]
                        for turn in range(15):
                            for array in arrays:
                                array[:] = 1000 * mark + turn
                            plain = np.full((1, 20_000), 1000 * mark + turn, np.float32)
                            tasks = [client.infer("double", {"x": array}) for array in (*arrays, plain, plain)]
                            for task in asyncio.as_completed(tasks):
                                assert ((await task).outputs["y"] == 2 * (1000 * mark + turn)).all()

            async with asyncio.TaskGroup() as group:
                for mark in range(1, 7):
                    group.create_task(one(mark))

    run(story)


def test_positions_that_change_under_the_runtime_harm_nobody(tmp_path: Path) -> None:
    async def story() -> None:
        async with shared_box(tmp_path, pick_version(tmp_path / "m"), deaths_max=100) as box:
            pid = box.worker_pid("pick")
            stop = threading.Event()

            def flip(view: Any) -> None:
                while not stop.is_set():
                    view[:] = 2**62
                    view[:] = 3

            async with AsyncClient(box.path) as client:
                with await client.region(8 * 60_000) as region:
                    x = region.array((60_000,), np.int64)
                    x[:] = 3
                    thread = threading.Thread(target=flip, args=(x,))
                    thread.start()
                    try:
                        for _ in range(60):
                            try:
                                result = await client.infer("pick", {"x": x})
                            except (InvalidInputError, InferenceError):
                                continue
                            else:
                                assert set(result.outputs["y"]) == {3.0}
                    finally:
                        stop.set()
                        thread.join()
            assert box.worker_pid("pick") == pid

    run(story)


def test_rows_that_lie_back_to_back_become_one_batch(tmp_path: Path) -> None:
    async def story() -> None:
        async with shared_box(tmp_path, double_version(tmp_path / "m")) as box, AsyncClient(box.path) as client:
            with await client.region(1 << 20) as region:
                whole = region.array((8, 1000))
                whole[:] = np.arange(8)[:, None]
                for order in (range(8), reversed(range(8)), [0, 1, 2, 4, 3, 5, 6, 7], [1, 1, 2, 3]):
                    rows = list(order)
                    with stopped(box.worker_pid("double")):
                        tasks = [
                            asyncio.ensure_future(client.infer("double", {"x": whole[row : row + 1]})) for row in rows
                        ]
                        await until(lambda: box.version("double").pool.outstanding == len(rows))  # noqa: B023
                    for row, task in zip(rows, tasks, strict=True):
                        assert ((await task).outputs["y"] == 2 * row).all()

    run(story)


_NUMBERS = st.one_of(st.integers(0, 3), st.integers(-(2**63), 2**64 - 1), st.none(), st.booleans(), st.text(max_size=3))
_FIELDS = st.fixed_dictionaries(
    {}, optional={"region": _NUMBERS, "nbytes": st.one_of(st.just(4096), _NUMBERS), "offset": _NUMBERS}
)
_STEPS = st.lists(
    st.tuples(
        st.sampled_from(["attach", "attach", "detach", "infer", "infer", "reply", "cancel"]),
        _FIELDS,
        st.sampled_from(["none", "sealed", "sealed", "open", "two", "pipe"]),
    ),
    max_size=12,
)


def test_no_sequence_of_frames_breaks_it(tmp_path: Path) -> None:
    async def story() -> None:
        bounds = SharedMemoryConfig(regions_max=2, region_bytes_max=1 << 16, total_bytes_max=1 << 18)
        async with shared_box(tmp_path, mean_version(tmp_path / "m"), memory=bounds) as box:
            pid, before = box.worker_pid("mean"), descriptors()

            async def one(steps: list[tuple[str, dict[str, Any], str]]) -> None:
                read, write = os.pipe()
                with memfd(4096) as sealed, memfd(4096, 0) as unsealed:
                    kinds = {
                        "none": [], "sealed": [sealed], "open": [unsealed], "two": [sealed, sealed], "pipe": [read],
                    }  # fmt: skip
                    async with Attacker(box.path) as peer:
                        for number, (kind, fields, passed) in enumerate(steps):
                            header: dict[str, Any] = {"kind": kind, "id": number, **fields}
                            if kind in ("infer", "reply"):
                                header = mean(number, fields.get("region"), fields.get("offset"), 10)
                            if kind == "reply":
                                header["reply"] = fields
                            if kind == "attach" and passed == "none" and number % 3:
                                passed = "sealed"
                            try:
                                if kind == "attach" or number % 5 == 4:
                                    await peer.pass_on(header, *kinds[passed])
                                else:
                                    await peer.send(header)
                            except OSError:
                                break
                        if len(steps) % 2:
                            await asyncio.sleep(0)
                os.close(read)
                os.close(write)

            loop = asyncio.get_running_loop()

            @settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
            @given(_STEPS)
            def fuzz(steps: list[tuple[str, dict[str, Any], str]]) -> None:
                asyncio.run_coroutine_threadsafe(one(steps), loop).result(30)

            await asyncio.to_thread(fuzz)
            async with AsyncClient(box.path) as client:
                x = np.full((1, 100), 4, np.uint8)
                assert (await client.infer("mean", {"x": x})).outputs["y"][0] == 4
            assert box.worker_pid("mean") == pid
            await settled(box, before, "mean")

    run(story)


def test_answers_that_nobody_took_give_their_slots_back_without_the_collector(tmp_path: Path) -> None:
    async def story() -> None:
        async with shared_box(tmp_path, double_version(tmp_path / "m")) as box:
            entries, (body,) = pack({"x": np.ones((1, 50_000), np.float32)})
            asked: dict[str, Any] = {"kind": "infer", "model": "double", "tensors": entries}
            gc.collect()
            gc.disable()
            try:
                async with Attacker(box.path) as peer:
                    assert (await peer.ask({**asked, "id": 1}, bytes(body)))["kind"] == "result"
                    await untaken(box, peer, asked, bytes(body))
                await until(lambda: box.arena.held_bytes == box.arena.idle_bytes)
            finally:
                gc.enable()

    run(story)


def test_slots_come_back_once_whatever_happens_to_their_requests(tmp_path: Path) -> None:
    """Deadlines, cancellation, deaths of clients and workers; and no answer is ever another request's."""

    async def story() -> None:
        options = {"deaths_max": 1000, "hang_timeout_s": 30.0}
        async with shared_box(tmp_path, double_version(tmp_path / "m"), **options) as box:
            taken: set[int] = set()

            async def one(mark: int) -> None:
                x = np.full((1, 30_000), mark, np.float32)
                entries, (body,) = pack({"x": x})
                for turn in range(30):
                    async with Attacker(box.path) as peer:
                        header: dict[str, Any] = {"kind": "infer", "id": turn, "model": "double", "tensors": entries}
                        if (mark + turn) % 4 == 1:
                            header["deadline_ms"] = 1
                        await peer.send(header, bytes(body))
                        if (mark + turn) % 4 == 2:
                            await peer.send({"kind": "cancel", "id": turn})
                        if (mark + turn) % 4 == 3:
                            continue  # and is gone
                        frame = await peer.frame()
                        if frame.header["kind"] == "result":
                            y = unpack(frame.header["tensors"], frame.body)["y"]
                            assert (y == 2 * mark).all()
                            taken.add(mark)
                        else:
                            assert frame.header["code"] in ("deadline_exceeded", "canceled", "worker_died")

            async def disturb() -> None:
                for _ in range(6):
                    await asyncio.sleep(0.15)
                    if box.version("double").ready:
                        pid = box.worker_pid("double")
                        with stopped(pid):
                            await asyncio.sleep(0.05)
                            os.kill(pid, signal.SIGKILL)

            async with asyncio.TaskGroup() as group:
                for mark in range(1, 11):
                    group.create_task(one(mark))
                group.create_task(disturb())
            assert taken == set(range(1, 11))
            await until(lambda: box.version("double").pool.outstanding == 0)
            await until(lambda: box.arena.held_bytes == box.arena.idle_bytes)
            assert box.arena.idle_bytes <= SharedMemoryConfig().arena_idle_bytes_max

    run(story)


def test_a_slot_is_not_used_again_while_a_worker_may_touch_it(tmp_path: Path) -> None:
    async def story() -> None:
        async with shared_box(tmp_path, double_version(tmp_path / "m"), hang_timeout_s=60.0) as box:
            x = np.ones((1, 30_000), np.float32)
            entries, (body,) = pack({"x": x})
            with stopped(box.worker_pid("double")):
                async with Attacker(box.path) as peer:
                    asked = {"kind": "infer", "id": 1, "model": "double", "tensors": entries, "deadline_ms": 1}
                    await peer.send(asked, bytes(body))
                    assert (await peer.frame()).header["code"] == "deadline_exceeded"
                gc.collect()
                assert (box.arena.held_bytes, box.arena.idle_bytes) == (1 << 17, 0)
            await until(lambda: box.arena.idle_bytes == 1 << 17)

    run(story)


def test_answers_that_nobody_took_give_their_memory_back_at_once(tmp_path: Path) -> None:
    async def story() -> None:
        async with shared_box(tmp_path, double_version(tmp_path / "m")) as box:
            entries, (body,) = pack({"x": np.ones((1, 40_000), dtype=np.float32)})
            async with Attacker(box.path) as peer:
                await untaken(box, peer, {"kind": "infer", "model": "double", "tensors": entries}, bytes(body))
            await until(lambda: box.arena.held_bytes == box.arena.idle_bytes)

    gc.disable()  # nobody may have to wait for it
    try:
        run(story)
    finally:
        gc.enable()
