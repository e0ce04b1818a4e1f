"""Direct lanes: an application and its model's worker, with the daemon beside and not between them."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from agent.client import AsyncClient, Client
from agent.config import ClientLimitConfig, SharedMemoryConfig
from agent.engine.types import VersionSpec
from agent.errors import DeadlineError, InvalidInputError, TensorError, UnavailableError, UnknownModelError, by_code
from agent.tensors import pack
from agent.wire import Decoder, Frame, encode, encode_head
from tests.models import scale_version
from tests.shared import (
    SharedBox,
    descriptors,
    double_version,
    mapped,
    mean_version,
    run,
    shared_box,
    slow_version,
    until,
)

pytestmark = pytest.mark.integration

X = {"x": np.array([[1.0, 2.0]], np.float32)}
HELD_S = 40.0


async def beside(box: SharedBox, work: Callable[[Client], Any], **options: Any) -> Any:
    """Run ``work`` with a blocking client that wants lanes, in a thread."""

    def body() -> Any:
        with Client(box.path, **{"lanes": True, **options}) as client:
            return work(client)

    return await asyncio.to_thread(body)


def renamed(spec: VersionSpec, version: str) -> VersionSpec:
    """Return the same bundle under another version."""
    variants = (replace(variant, worker={**variant.worker, "version": version}) for variant in spec.variants)
    return replace(spec, version=version, variants=tuple(variants))


def lanes(box: SharedBox, model: str) -> int:
    """Return how many lanes the model has, by the engine's own count."""
    pool = box.version(model).pool
    assert pool is not None
    return pool.lanes


def counted(box: SharedBox, model: str, code: str) -> float:
    """Return how many answers of that code the metrics have."""
    found = box.metrics.snapshot()["inferd_requests"]
    return sum(row["value"] for row in found if row["model"] == model and row["code"] == code)


class RawLane:
    """An application that speaks the protocol by hand."""

    def __init__(self, path: Path, model: str) -> None:
        self.home = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.home.settimeout(HELD_S)
        self.home.connect(str(path))
        self.home.sendall(b"".join(encode({"kind": "lane", "id": 1, "model": model})))
        data, passed, _, _ = socket.recv_fds(self.home, 65536, 4)
        (self.reply,) = Decoder().feed(data)
        self.lane: socket.socket | None = None
        if self.reply.header["kind"] == "reply":
            (number,) = passed
            self.lane = socket.socket(fileno=number)
            self.lane.settimeout(HELD_S)
        self._decoder = Decoder()
        self._frames: list[Frame] = []

    def send(self, header: dict[str, Any], body: list[Any] | None = None) -> None:
        assert self.lane is not None
        self.lane.sendall(b"".join(bytes(part) for part in encode(header, body or [])))

    def ask(self, request_id: int, **more: Any) -> None:
        entries, buffers = pack(X)
        self.send({"kind": "infer", "id": request_id, "model": "double", "tensors": entries, **more}, list(buffers))

    def receive(self) -> Frame | None:
        """Return the next frame, or ``None`` at the end."""
        assert self.lane is not None
        while not self._frames:
            try:
                data = self.lane.recv(65536)
            except ConnectionResetError:  # a worker was killed before it had read everything
                return None
            if not data:
                return None
            self._frames += self._decoder.feed(data)
        return self._frames.pop(0)

    def close(self) -> None:
        self.home.close()
        if self.lane is not None:
            self.lane.close()


def test_requests_go_straight_to_the_worker_and_are_counted(tmp_path: Path) -> None:
    async def story() -> None:
        async with shared_box(tmp_path, double_version(tmp_path / "m")) as box:

            def work(client: Client) -> None:
                for value in range(20):
                    result = client.infer("double", {"x": np.full((1, 3), value, np.float32)})
                    assert result.outputs["y"].tolist() == [[2.0 * value] * 3]
                    assert (result.model, result.version, result.variant) == ("double", "1.0.0", "v0")

            await beside(box, work)
            await until(lambda: counted(box, "double", "ok") == 20)
            assert box.version("double").good == 20
            await until(lambda: lanes(box, "double") == 0)

    run(story)


def test_many_at_once_over_one_lane(tmp_path: Path) -> None:
    async def story() -> None:
        async with (
            shared_box(tmp_path, double_version(tmp_path / "m")) as box,
            AsyncClient(box.path, lanes=True) as client,
        ):

            async def ask(value: float) -> float:
                result = await client.infer("double", {"x": np.full((1, 2), value, np.float32)})
                return float(result.outputs["y"][0, 0])

            assert await asyncio.gather(*map(ask, range(200))) == [2.0 * value for value in range(200)]
            assert lanes(box, "double") == 1
            await until(lambda: counted(box, "double", "ok") == 200)

    run(story)


def test_bad_requests_are_refused_one_by_one(tmp_path: Path) -> None:
    async def story() -> None:
        async with shared_box(tmp_path, double_version(tmp_path / "m")) as box:

            def work(client: Client) -> None:
                for _ in range(3):
                    with pytest.raises(TensorError, match="unknown input"):
                        client.infer("double", {"z": X["x"]})
                    with pytest.raises(InvalidInputError, match="unknown output"):
                        client.infer("double", X, outputs=["w"])
                    assert client.infer("double", X).outputs["y"].tolist() == [[2.0, 4.0]]
                with pytest.raises(InvalidInputError, match="priority"):
                    client.infer("double", X, priority=99)
                with pytest.raises(InvalidInputError, match="deadline_ms"):
                    client.infer("double", X, deadline_ms=1e12)
                with pytest.raises(UnknownModelError):
                    client.infer("absent", X)

            await beside(box, work)
            await until(lambda: counted(box, "double", "invalid_input") == 5)
            await until(lambda: counted(box, "double", "bad_tensor") == 3)

    run(story)


@pytest.mark.parametrize("reason", ["code", "limits", "off"])
def test_who_gets_no_lane_is_told_why_and_served_by_the_daemon(tmp_path: Path, reason: str) -> None:
    async def story() -> None:
        spec = double_version(tmp_path / "m")
        options: dict[str, Any] = {}
        if reason == "code":
            spec = replace(spec, variants=tuple(replace(variant, lanes=False) for variant in spec.variants))
        elif reason == "limits":
            options["limits"] = [ClientLimitConfig(client="*", quota_requests=1000)]
        else:
            options["lanes_max"] = 0
        async with shared_box(tmp_path, spec, **options) as box:
            raw = await asyncio.to_thread(RawLane, box.path, "double")
            header = raw.reply.header
            raw.close()
            assert (header["kind"], header["code"]) == ("error", "lane_refused")
            words = {"code": "own code", "limits": "limited", "off": "switched off"}[reason]
            assert words in header["message"]
            result = await beside(box, lambda client: client.infer("double", X))
            assert result.outputs["y"].tolist() == [[2.0, 4.0]]
            assert lanes(box, "double") == 0

    run(story)


def test_a_swap_under_load_loses_no_request(tmp_path: Path) -> None:
    async def story() -> None:
        first, second = double_version(tmp_path / "a"), double_version(tmp_path / "b")
        async with shared_box(tmp_path, first) as box:
            stop = asyncio.Event()
            versions: set[str] = set()

            async def load(client: AsyncClient) -> int:
                done = 0
                while not stop.is_set():
                    result = await client.infer("double", X)
                    assert result.outputs["y"].tolist() == [[2.0, 4.0]]
                    versions.add(result.version)
                    done += 1
                return done

            def alone(client: Client) -> int:
                done = 0
                while not stop.is_set():
                    assert client.infer("double", X).outputs["y"].tolist() == [[2.0, 4.0]]
                    done += 1
                return done

            async with AsyncClient(box.path, lanes=True, retries=0) as client:
                work = [asyncio.create_task(load(client)) for _ in range(8)]
                work.append(asyncio.create_task(beside(box, alone, retries=0)))
                for number in range(6):
                    await asyncio.sleep(0.05)
                    loaded = await box.engine.load(renamed(second, f"2.0.{number}"))
                    previous = box.engine.activate(loaded)
                    assert previous is not None
                    await box.engine.retire(previous)
                await until(lambda: "2.0.5" in versions, limit_s=HELD_S)
                stop.set()
                assert all(done for done in await asyncio.gather(*work))

    run(story)


def test_a_lane_that_is_revoked_answers_what_it_took_and_nothing_more(tmp_path: Path) -> None:
    async def story() -> None:
        async with shared_box(tmp_path, double_version(tmp_path / "m")) as box:
            raw = await asyncio.to_thread(RawLane, box.path, "double")
            worker = box.worker_pid("double")
            os.kill(worker, signal.SIGSTOP)
            for number in range(5):
                raw.ask(number + 1)
            pool = box.version("double").pool
            assert pool is not None
            pool.revoke_lanes()
            await asyncio.sleep(0)
            os.kill(worker, signal.SIGCONT)

            def drain() -> list[Any]:
                found = []
                while (frame := raw.receive()) is not None:
                    found.append(frame.header["kind"] if frame.id is None else frame.id)
                return found

            found = await asyncio.to_thread(drain)
            assert sorted(one for one in found if one != "bye") == [1, 2, 3, 4, 5]
            assert "bye" in found
            with pytest.raises(BrokenPipeError):
                raw.ask(6)
            await until(lambda: lanes(box, "double") == 0)
            raw.close()

    run(story)


def test_a_worker_that_dies_is_replaced_and_its_requests_are_asked_again(tmp_path: Path) -> None:
    async def story() -> None:
        async with shared_box(tmp_path, double_version(tmp_path / "m")) as box:
            async with AsyncClient(box.path, lanes=True) as client:
                await client.infer("double", X)
                os.kill(box.worker_pid("double"), signal.SIGSTOP)
                asked = [asyncio.create_task(client.infer("double", X)) for _ in range(5)]
                await asyncio.sleep(0.05)
                os.kill(box.worker_pid("double"), signal.SIGKILL)
                for result in await asyncio.gather(*asked):
                    assert result.outputs["y"].tolist() == [[2.0, 4.0]]
            async with AsyncClient(box.path, lanes=True, retries=0) as client:
                await client.infer("double", X)
                os.kill(box.worker_pid("double"), signal.SIGSTOP)
                task = asyncio.create_task(client.infer("double", X))
                await asyncio.sleep(0.05)
                os.kill(box.worker_pid("double"), signal.SIGKILL)
                with pytest.raises(UnavailableError):
                    await task

    run(story)


def test_a_worker_that_hangs_on_a_lane_is_killed(tmp_path: Path) -> None:
    async def story() -> None:
        async with shared_box(tmp_path, double_version(tmp_path / "m"), hang_timeout_s=1.0) as box:
            raw = await asyncio.to_thread(RawLane, box.path, "double")
            worker = box.worker_pid("double")
            os.kill(worker, signal.SIGSTOP)
            raw.ask(1)
            assert await asyncio.to_thread(raw.receive) is None
            raw.close()
            version = box.version("double")
            await until(lambda: version.deaths == 1 and version.ready, limit_s=HELD_S)
            assert box.worker_pid("double") != worker

    run(story)


def test_deadlines_hold_on_a_lane(tmp_path: Path) -> None:
    async def story() -> None:
        async with shared_box(tmp_path, double_version(tmp_path / "m")) as box:
            raw = await asyncio.to_thread(RawLane, box.path, "double")
            os.kill(box.worker_pid("double"), signal.SIGSTOP)
            raw.ask(1, deadline_ms=1)
            raw.ask(2)
            await asyncio.sleep(0.01)
            os.kill(box.worker_pid("double"), signal.SIGCONT)
            frames = [await asyncio.to_thread(raw.receive) for _ in range(2)]
            kinds = {frame.id: frame.header["kind"] for frame in frames if frame is not None}
            assert kinds[2] == "result"
            raw.close()
            async with AsyncClient(box.path, lanes=True) as client:
                await client.infer("double", X)
                os.kill(box.worker_pid("double"), signal.SIGSTOP)
                with pytest.raises(DeadlineError):
                    await client.infer("double", X, deadline_ms=50)
                os.kill(box.worker_pid("double"), signal.SIGCONT)

    run(story)


def test_regions_reach_the_worker_through_the_daemon_and_are_let_go(tmp_path: Path) -> None:
    async def story() -> None:
        async with shared_box(tmp_path, mean_version(tmp_path / "m"), double_version(tmp_path / "d")) as box:

            def work(client: Client) -> None:
                with client.region(1 << 20) as region:
                    frame = region.array((1, 1000), np.uint8, offset=64)
                    for value in (1, 9):
                        frame[:] = value
                        assert client.infer("mean", {"x": frame}).outputs["y"][0] == value
                    assert len(mapped(box.worker_pid("mean"))) == 1
                    assert box.frames.regions.count == 1
                    answer = region.array((1, 100), np.float32, offset=4096)
                    answer[:] = 3
                    assert (client.infer("double", {"x": answer}, reply=region).outputs["y"] == 6).all()
                large = np.full((1, 500_000), 4, np.uint8)  # staged by the client
                for _ in range(3):
                    assert client.infer("mean", {"x": large}).outputs["y"][0] == 4
                wide = np.full((1, 100_000), 4, np.float32)
                for _ in range(3):
                    assert (client.infer("double", {"x": wide}).outputs["y"] == 8).all()

            await beside(box, work)
            await until(lambda: box.frames.regions.count == box.frames.regions.held_bytes == 0)
            await until(lambda: not mapped(box.worker_pid("mean")) and not mapped(box.worker_pid("double")))
            async with AsyncClient(box.path, lanes=True) as client:
                for _ in range(3):
                    results = await asyncio.gather(
                        *(client.infer("mean", {"x": np.full((1, 300_000), v, np.uint8)}) for v in range(4))
                    )
                    assert [result.outputs["y"][0] for result in results] == [0, 1, 2, 3]
            await until(lambda: box.frames.regions.count == 0)

    run(story)


def test_a_region_that_is_not_lent_is_refused_and_one_beyond_the_bound_too(tmp_path: Path) -> None:
    async def story() -> None:
        memory = SharedMemoryConfig(regions_max=1)
        async with shared_box(tmp_path, mean_version(tmp_path / "m"), memory=memory) as box:
            raw = await asyncio.to_thread(RawLane, box.path, "mean")
            entry = {"name": "x", "dtype": "uint8", "shape": [1, 8], "nbytes": 8, "region": 7, "offset": 0}
            raw.send({"kind": "infer", "id": 1, "model": "mean", "tensors": [entry]})
            frame = await asyncio.to_thread(raw.receive)
            assert frame is not None
            assert by_code(frame.header["code"], "").code == "bad_tensor"
            raw.home.sendall(b"".join(encode({"kind": "lend", "id": 5, "lane": 3, "region": 0})))
            (answer,) = Decoder().feed(await asyncio.to_thread(raw.home.recv, 65536))
            assert answer.header["code"] == "invalid_input"
            raw.close()

    run(story)


@pytest.mark.parametrize("garbage", [b"GET / HTTP/1.1\r\n\r\n", b"\x00" * 64, b"IFD1\xff\xff\xff\xff" + b"\xff" * 8])
def test_garbage_on_a_lane_ends_that_lane_only(tmp_path: Path, garbage: bytes) -> None:
    async def story() -> None:
        async with shared_box(tmp_path, double_version(tmp_path / "m")) as box:
            worker = box.worker_pid("double")
            good = await asyncio.to_thread(RawLane, box.path, "double")
            bad = await asyncio.to_thread(RawLane, box.path, "double")
            assert bad.lane is not None
            bad.lane.sendall(garbage)
            first = await asyncio.to_thread(bad.receive)
            assert first is not None
            assert first.header["code"] in ("bad_frame", "too_large")
            assert await asyncio.to_thread(bad.receive) is None
            good.ask(1)
            frame = await asyncio.to_thread(good.receive)
            assert frame is not None
            assert frame.header["kind"] == "result"
            for kind in ("call", "attach", "hello", "lane"):
                other = await asyncio.to_thread(RawLane, box.path, "double")
                other.send({"kind": kind, "id": 1, "method": "selftest"})
                refused = await asyncio.to_thread(other.receive)
                assert refused is not None
                assert refused.header["code"] == "bad_frame"
                other.close()
            assert box.worker_pid("double") == worker
            good.close()
            bad.close()
            await until(lambda: lanes(box, "double") == 0)

    run(story)


def test_what_expires_behind_a_long_batch_is_answered_before_it_ends(tmp_path: Path) -> None:
    async def story() -> None:
        async with shared_box(tmp_path, slow_version(tmp_path / "m")) as box:
            raw = await asyncio.to_thread(RawLane, box.path, "slow")
            x = {"x": np.ones((1, 1024), np.float32)}
            entries, buffers = pack(x)

            def ask(request_id: int, **more: Any) -> None:
                raw.send(
                    {"kind": "infer", "id": request_id, "model": "slow", "tensors": entries, **more}, list(buffers)
                )

            for request_id in range(3):  # from here on it is known to be slow
                ask(request_id)
                await asyncio.to_thread(raw.receive)
            for request_id in range(10, 20):
                ask(request_id)
            ask(1, deadline_ms=1)
            found = [await asyncio.to_thread(raw.receive) for _ in range(11)]
            kinds = [(frame.id, frame.header.get("code", "ok")) for frame in found if frame is not None]
            assert (1, "deadline_exceeded") in kinds[:-1]
            assert sorted(kinds) == [(1, "deadline_exceeded"), *((number, "ok") for number in range(10, 20))]
            raw.close()

    run(story)


def test_a_busy_worker_still_answers_calls(tmp_path: Path) -> None:
    async def story() -> None:
        async with (
            shared_box(tmp_path, slow_version(tmp_path / "m")) as box,
            AsyncClient(box.path, lanes=True) as client,
        ):
            pool = box.version("slow").pool
            assert pool is not None
            x = {"x": np.ones((1, 1024), np.float32)}
            for _ in range(3):
                await client.infer("slow", x)
            asked = [asyncio.create_task(client.infer("slow", x)) for _ in range(20)]
            await until(lambda: any(task.done() for task in asked), limit_s=HELD_S)
            value = await pool.call("ping", timeout_s=HELD_S)
            assert value["ok"]
            assert not all(task.done() for task in asked)
            for result in await asyncio.gather(*asked):
                assert (result.outputs["y"] == 1).all()

    run(story)


def test_descriptors_that_come_on_a_lane_are_not_kept(tmp_path: Path) -> None:
    async def story() -> None:
        async with shared_box(tmp_path, double_version(tmp_path / "m")) as box:
            raw = await asyncio.to_thread(RawLane, box.path, "double")
            assert raw.lane is not None
            raw.ask(1)
            await asyncio.to_thread(raw.receive)
            before = descriptors(box.worker_pid("double"))
            entries, buffers = pack(X)
            for number in range(2, 12):
                header = {"kind": "infer", "id": number, "model": "double", "tensors": entries}
                frame = b"".join(bytes(part) for part in encode(header, list(buffers)))
                socket.send_fds(raw.lane, [frame], [0, 1, 2])
                answer = await asyncio.to_thread(raw.receive)
                assert answer is not None
                assert answer.header["kind"] == "result"
            assert descriptors(box.worker_pid("double")) == before
            raw.close()

    run(story)


@pytest.mark.parametrize("other", [{"model": "another"}, {"version": "2.0.0"}])
def test_a_lane_answers_for_its_own_model_and_version_only(tmp_path: Path, other: dict[str, str]) -> None:
    async def story() -> None:
        async with shared_box(tmp_path, double_version(tmp_path / "m")) as box:
            raw = await asyncio.to_thread(RawLane, box.path, "double")
            raw.ask(1, **other)
            raw.ask(2, version="1.0.0")
            refused = await asyncio.to_thread(raw.receive)
            answered = await asyncio.to_thread(raw.receive)
            assert refused is not None
            assert answered is not None
            assert (refused.header["id"], refused.header["code"]) == (1, "unknown_model")
            assert (answered.header["id"], answered.header["kind"]) == (2, "result")
            raw.close()

    run(story)


@pytest.mark.parametrize("after_a_small_one", [False, True])
def test_large_bodies_under_way_are_bounded(tmp_path: Path, after_a_small_one: bool) -> None:
    entries, buffers = pack(X)
    small = b"".join(encode({"kind": "infer", "id": 2, "model": "double", "tensors": entries}, buffers))

    async def story() -> None:
        async with shared_box(tmp_path, double_version(tmp_path / "m"), queue_bytes_max=1 << 20) as box:
            raws = [await asyncio.to_thread(RawLane, box.path, "double") for _ in range(3)]
            head = encode_head({"kind": "infer", "id": 1, "model": "double", "tensors": []}, 600_000)
            for raw in raws:
                assert raw.lane is not None
                raw.lane.sendall((small if after_a_small_one else b"") + head + bytes(300_000))
            refused = 0
            for raw in raws[1:]:
                answer = await asyncio.to_thread(raw.receive)
                assert answer is not None
                refused += answer.header.get("code") == "overloaded"
            assert refused == 2
            raws[0].close()
            await until(lambda: lanes(box, "double") == 0)
            good = await asyncio.to_thread(RawLane, box.path, "double")
            assert good.lane is not None
            good.lane.sendall(head + bytes(600_000))
            answer = await asyncio.to_thread(good.receive)
            assert answer is not None
            assert answer.header["code"] == "bad_tensor"
            for raw in (*raws, good):
                raw.close()

    run(story)


def streaming_version(folder: Path, handler: str | None = None) -> VersionSpec:
    """Return the scale model behind a handler that streams: the built-in one, or a test's."""
    spec = scale_version(folder, handler=handler)
    if handler is not None:
        return spec
    windows = {"id": "windows/v1", "params": {"samples": "int16"}}
    variants = tuple(replace(one, worker={**one.worker, "handler": windows}) for one in spec.variants)
    return replace(spec, variants=variants)


def test_a_lane_gives_whole_answers_of_a_model_that_streams_and_the_daemon_its_parts(tmp_path: Path) -> None:
    async def story() -> None:
        async with shared_box(tmp_path, streaming_version(tmp_path / "m")) as box:
            samples = np.arange(10, dtype="<i2").tobytes()
            x = {"x": np.ones((1, 4), np.float32)}

            def work(client: Client) -> None:
                whole = client.predict("scale", samples).json()
                assert [window["start"] for window in whole] == [0, 4, 8]
                assert client.infer("scale", x).outputs["y"].tolist() == [[2.0] * 4]
                assert lanes(box, "scale") == 1
                assert [part.json() for part in client.stream("scale", samples)] == whole
                assert client.predict("scale", samples).json() == whole

            await beside(box, work)
            async with AsyncClient(box.path, lanes=True) as client:
                whole = (await client.predict("scale", samples)).json()
                assert [part.json() async for part in client.stream("scale", samples)] == whole
            await until(lambda: counted(box, "scale", "ok") == 6)

    run(story)


@pytest.mark.parametrize("stream", [True, "auto"])
def test_parts_are_refused_on_a_lane(tmp_path: Path, stream: Any) -> None:
    async def story() -> None:
        async with shared_box(tmp_path, streaming_version(tmp_path / "m")) as box:
            raw = await asyncio.to_thread(RawLane, box.path, "scale")
            header = {"kind": "infer", "model": "scale", "content_type": "audio/pcm"}
            for number in (1, 2):
                raw.send({**header, "id": number, "stream": stream}, [b"12345678"])
                refused = await asyncio.to_thread(raw.receive)
                assert refused is not None
                assert (refused.id, refused.header["code"]) == (number, "stream_unsupported")
                assert "daemon" in refused.header["message"]
            raw.send({**header, "id": 3}, [b"12345678"])
            whole = await asyncio.to_thread(raw.receive)
            assert whole is not None
            assert (whole.id, whole.header["kind"]) == (3, "result")
            raw.close()

    run(story)


def test_streams_that_are_joined_on_a_lane_end_with_it_and_at_their_time(tmp_path: Path) -> None:
    async def story() -> None:
        async with shared_box(tmp_path, streaming_version(tmp_path / "m", "steps"), hang_timeout_s=3.0) as box:
            worker = box.worker_pid("scale")
            header = {"kind": "infer", "model": "scale", "content_type": "application/json"}
            endless = b'{"kind": "text", "count": 1000000, "sleep_s": 0.001}'

            async def opened() -> dict[str, int]:
                async with AsyncClient(box.path) as client:
                    (counts,) = (await client.predict("scale", b'{"report": true}')).json()
                return dict(counts)

            raw = await asyncio.to_thread(RawLane, box.path, "scale")
            raw.send({**header, "id": 1, "deadline_ms": 6000}, [endless])  # longer than a worker may be silent
            raw.send({**header, "id": 2}, [endless])
            raw.send({"kind": "cancel", "id": 2})
            found = [await asyncio.to_thread(raw.receive) for _ in range(2)]
            codes = {frame.id: frame.header["code"] for frame in found if frame is not None}
            assert codes == {1: "deadline_exceeded", 2: "canceled"}
            raw.send({**header, "id": 3, "deadline_ms": 600_000}, [endless])
            before = (await opened())["opened"]
            while (await opened())["opened"] == before and before < 2:
                await asyncio.sleep(0.01)
            raw.close()
            await until(lambda: lanes(box, "scale") == 0, limit_s=HELD_S)
            async with asyncio.timeout(HELD_S):
                while (counts := await opened())["opened"] != counts["closed"]:
                    await asyncio.sleep(0.01)
            assert box.worker_pid("scale") == worker

    run(story)


def test_a_lane_that_is_revoked_answers_the_streams_it_took(tmp_path: Path) -> None:
    async def story() -> None:
        spec = streaming_version(tmp_path / "m", "steps")
        async with shared_box(tmp_path, spec) as box:
            raw = await asyncio.to_thread(RawLane, box.path, "scale")
            header = {"kind": "infer", "model": "scale", "content_type": "application/json"}
            raw.send({**header, "id": 1}, [b'{"kind": "text", "count": 40, "sleep_s": 0.02}'])
            raw.send({**header, "id": 2}, [b'{"kind": "text"}'])
            frame = await asyncio.to_thread(raw.receive)
            assert frame is not None
            assert (frame.id, bytes(frame.body)) == (2, b"2 4 8 ")
            box.engine.activate(await box.engine.load(renamed(spec, "2.0.0")))
            kinds = []
            while (frame := await asyncio.to_thread(raw.receive)) is not None:
                kinds.append((frame.id, frame.header["kind"]))
            assert sorted(kinds, key=str) == [(1, "result"), (None, "bye")]
            raw.close()

    run(story)


def test_lanes_leave_no_descriptor_behind(tmp_path: Path) -> None:
    async def story() -> None:
        async with shared_box(tmp_path, double_version(tmp_path / "m")) as box:
            await beside(box, lambda client: client.infer("double", X))
            await until(lambda: lanes(box, "double") == 0)
            ours, theirs = descriptors(), descriptors(box.worker_pid("double"))
            for _ in range(10):
                await beside(box, lambda client: client.infer("double", X))
            await until(lambda: lanes(box, "double") == 0)
            await until(lambda: (descriptors(), descriptors(box.worker_pid("double"))) == (ours, theirs))

    run(story)


def test_one_applications_flood_does_not_keep_anothers_request_out(tmp_path: Path) -> None:
    async def story() -> None:
        spec = double_version(tmp_path / "m")
        async with shared_box(tmp_path, spec, queue_requests_max=16) as box:
            flood = await asyncio.to_thread(RawLane, box.path, "double")
            os.kill(box.worker_pid("double"), signal.SIGSTOP)
            for number in range(100):
                flood.ask(number)
            os.kill(box.worker_pid("double"), signal.SIGCONT)
            frames = [await asyncio.to_thread(flood.receive) for _ in range(100)]
            codes = [frame.header.get("code", "ok") for frame in frames if frame is not None]
            assert set(codes) <= {"ok", "overloaded"}
            assert codes.count("ok") >= 16
            await until(lambda: counted(box, "double", "overloaded") == codes.count("overloaded"))
            flood.close()

    run(story)
