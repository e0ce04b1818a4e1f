"""Shared memory from a client through the daemon to a real worker and back."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from agent.client import AsyncClient, Client
from agent.config import SharedMemoryConfig
from agent.errors import OverloadedError, TensorError, TooLargeError
from agent.tensors import pack, unpack
from tests.fakes.peer import FramePeer
from tests.shared import SharedBox, descriptors, double_version, mapped, mean_version, run, shared_box, until

pytestmark = pytest.mark.integration


async def beside(box: SharedBox, work: Callable[[Client], Any], **options: Any) -> Any:
    """Run ``work`` with a blocking client in a thread."""

    def body() -> Any:
        with Client(box.path, **options) as client:
            return work(client)

    return await asyncio.to_thread(body)


def test_an_array_over_a_region_goes_by_reference(tmp_path: Path) -> None:
    async def story() -> None:
        async with shared_box(tmp_path, mean_version(tmp_path / "m")) as box:

            def work(client: Client) -> None:
                with client.region(1 << 20) as region:
                    frame = region.array((1, 1000), np.uint8, offset=128)
                    for value in (0, 7, 255):
                        frame[:] = value
                        assert client.infer("mean", {"x": frame}).outputs["y"][0] == value
                    assert client.infer("mean", {"x": frame[:, 10:20]}).outputs["y"][0] == 255
                    assert len(mapped(box.worker_pid("mean"))) == 1
                    assert box.frames.regions.count == 1

            await beside(box, work)
            assert box.frames.regions.count == box.frames.regions.held_bytes == 0
            await until(lambda: not mapped(box.worker_pid("mean")))

    run(story)


def test_answers_are_written_where_the_request_says(tmp_path: Path) -> None:
    async def story() -> None:
        async with shared_box(tmp_path, double_version(tmp_path / "m")) as box:

            def work(client: Client) -> None:
                with client.region(8192) as region, client.region(4096) as reply, client.region(64) as tiny:
                    x = region.array((2, 100))
                    x[:] = np.arange(200).reshape(2, 100)
                    y = client.infer("double", {"x": x}, reply=reply).outputs["y"]
                    np.testing.assert_array_equal(y, x * 2)
                    np.testing.assert_array_equal(reply.array((2, 100)), x * 2)
                    np.testing.assert_array_equal(client.infer("double", {"x": x}, reply=tiny).outputs["y"], x * 2)
                    plain = np.ones((1, 10), np.float32)
                    assert client.infer("double", {"x": plain}, reply=reply).outputs["y"].sum() == 20

            await beside(box, work)

    run(story)


def test_plain_large_arrays_are_staged_and_large_answers_come_back_the_same_way(tmp_path: Path) -> None:
    async def story() -> None:
        async with shared_box(tmp_path, double_version(tmp_path / "m")) as box:
            rng = np.random.default_rng(3)

            def work(client: Client) -> None:
                for columns in (100_000, 100_000, 250_000, 30_000, 100_000, 10, 100_000):
                    x = rng.standard_normal((2, columns)).astype(np.float32)
                    y = client.infer("double", {"x": x}).outputs["y"]
                    np.testing.assert_array_equal(y, x * 2)
                    kept = y.copy()
                    client.infer("double", {"x": x + 1})
                    np.testing.assert_array_equal(y, kept)
                strided = rng.standard_normal((2, 200_000)).astype(np.float32)[:, ::2]
                np.testing.assert_array_equal(client.infer("double", {"x": strided}).outputs["y"], strided * 2)
                assert box.frames.regions.count >= 1

            await beside(box, work)
            assert box.frames.regions.count == 0

    run(story)


def test_a_refused_staging_region_costs_nothing_but_the_copy(tmp_path: Path) -> None:
    async def story() -> None:
        async with shared_box(
            tmp_path, double_version(tmp_path / "m"), memory=SharedMemoryConfig(regions_max=0)
        ) as box:

            def work(client: Client) -> None:
                x = np.ones((2, 100_000), np.float32)
                assert client.infer("double", {"x": x}).outputs["y"].sum() == 400_000
                assert client.infer("double", {"x": x}).outputs["y"].sum() == 400_000

            await beside(box, work)

    run(story)


def test_the_asynchronous_client_does_the_same(tmp_path: Path) -> None:
    async def story() -> None:
        async with shared_box(tmp_path, double_version(tmp_path / "m")) as box, AsyncClient(box.path) as client:
            with await client.region(1 << 20) as region, await client.region(1 << 20) as reply:
                x = region.array((2, 1000))
                x[:] = 3
                assert (await client.infer("double", {"x": x})).outputs["y"].sum() == 12_000
                y = (await client.infer("double", {"x": x}, reply=reply)).outputs["y"]
                assert y.sum() == reply.array((2, 1000)).sum() == 12_000

            async def one(number: int) -> None:
                for turn in range(8):
                    plain = np.full((1, 20_000 + 10_000 * (number % 3)), number + turn, np.float32)
                    y = (await client.infer("double", {"x": plain})).outputs["y"]
                    assert (y == 2 * (number + turn)).all()

            async with asyncio.TaskGroup() as group:
                for number in range(12):
                    group.create_task(one(number))
            await client.close()
            await until(lambda: box.frames.regions.count == 0)

    run(story)


def test_withdrawn_requests_leave_nothing_behind(tmp_path: Path) -> None:
    async def story() -> None:
        async with shared_box(tmp_path, double_version(tmp_path / "m")) as box:
            before = descriptors()
            async with AsyncClient(box.path) as client:
                x = np.ones((1, 100_000), np.float32)
                for turn in range(40):
                    task = asyncio.ensure_future(client.infer("double", {"x": x}))
                    for _ in range(turn % 7):
                        await asyncio.sleep(0)
                    task.cancel()
                    await asyncio.wait({task})
                assert (await client.infer("double", {"x": x})).outputs["y"].sum() == 200_000
            await until(lambda: box.frames.regions.count == 0)
            await until(lambda: descriptors() <= before)
            await until(lambda: not mapped(box.worker_pid("double")))

    run(story)


def test_a_new_connection_knows_the_old_regions(tmp_path: Path) -> None:
    async def story() -> None:
        async with shared_box(tmp_path, mean_version(tmp_path / "m")) as box:

            def work(client: Client) -> None:
                with client.region(4096) as region:
                    x = region.array((1, 1000), np.uint8)
                    x[:] = 9
                    plain = np.full((1, 200_000), 5, np.uint8)
                    for _ in range(3):
                        assert client.infer("mean", {"x": x}).outputs["y"][0] == 9
                        assert client.infer("mean", {"x": plain}).outputs["y"][0] == 5
                        for connection in list(box.frames._connections):
                            loop.call_soon_threadsafe(connection.close)
                        while box.frames._connections:
                            pass

            loop = asyncio.get_running_loop()
            await beside(box, work)
            await until(lambda: box.frames.regions.count == 0)

    run(story)


def test_bounds_of_regions_are_told(tmp_path: Path) -> None:
    async def story() -> None:
        bounds = SharedMemoryConfig(
            regions_max=3, region_bytes_max=1 << 16, total_regions_max=4, total_bytes_max=1 << 17
        )
        async with shared_box(tmp_path, mean_version(tmp_path / "m"), memory=bounds) as box:

            def work(client: Client) -> None:
                with pytest.raises(TooLargeError):
                    client.region((1 << 16) + 1)
                held = [client.region(4096) for _ in range(3)]
                with pytest.raises(OverloadedError, match="3 regions"):
                    client.region(4096)
                with Client(box.path) as other:
                    other.region(4096)
                    with pytest.raises(OverloadedError, match="4 regions"):
                        other.region(4096)
                held.pop().close()
                with pytest.raises(OverloadedError, match="65536 bytes"):
                    client.region(1 << 16)
                client.region(4096)

            await beside(box, work)
            assert box.frames.regions.count == box.frames.regions.held_bytes == 0

    run(story)


def test_regions_check_what_is_laid_over_them(tmp_path: Path) -> None:
    async def story() -> None:
        async with shared_box(tmp_path, mean_version(tmp_path / "m")) as box:

            def work(client: Client) -> None:
                region = client.region(1000)
                for shape, dtype, offset in (((251,), np.float32, 0), ((10,), np.uint8, 991), ((1,), object, 0)):
                    with pytest.raises(TensorError):
                        region.array(shape, dtype, offset)
                kept = region.array((10,), np.uint8)
                region.close()
                region.close()
                with pytest.raises(TensorError, match="closed"):
                    region.array((1,), np.uint8)
                kept[:] = 7  # still ours
                assert client.infer("mean", {"x": kept.reshape(1, 10)}).outputs["y"][0] == 7

            await beside(box, work)

    run(story)


async def sent(box: SharedBox, number: int, x: Any) -> Any:
    """Ask over a client that knows nothing of shared memory, so that everything is sent."""
    entries, buffers = pack({"x": x})
    async with FramePeer(box.path) as peer:
        await peer.send(
            {"kind": "infer", "id": number, "model": "double", "tensors": entries},
            b"".join(bytes(part) for part in buffers),
        )
        frame = await peer.frame()
    assert frame.header["id"] == number, frame.header
    return unpack(frame.header["tensors"], frame.body)["y"]


def test_large_bodies_and_answers_that_are_sent_go_through_the_arena(tmp_path: Path) -> None:
    async def story() -> None:
        async with shared_box(tmp_path, double_version(tmp_path / "m")) as box:
            for number, columns in enumerate((20_000, 20_000, 400_000, 400_000, 10, 20_000, 400_000, 2_000_000)):
                x = np.random.default_rng(number).standard_normal((2, columns)).astype(np.float32)
                np.testing.assert_array_equal(await sent(box, number, x), 2 * x)
                await until(lambda: box.arena.held_bytes == box.arena.idle_bytes)
            assert 0 < box.arena.idle_bytes <= SharedMemoryConfig().arena_idle_bytes_max

    run(story)


def test_without_room_in_the_arena_everything_is_sent(tmp_path: Path) -> None:
    async def story() -> None:
        bounds = SharedMemoryConfig(arena_bytes_max=1 << 20)
        async with shared_box(tmp_path, double_version(tmp_path / "m"), memory=bounds) as box:

            async def one(number: int) -> None:
                x = np.full((1, 100_000 + 50_000 * (number % 4)), number, np.float32)
                for turn in range(5):
                    assert (await sent(box, turn, x) == 2 * number).all()

            async with asyncio.TaskGroup() as group:
                for number in range(12):
                    group.create_task(one(number))
            assert box.arena.held_bytes <= 1 << 20
            await until(lambda: box.arena.held_bytes == box.arena.idle_bytes)

    run(story)
