"""Applications that abuse direct lanes and what goes beside them: nobody else may notice."""

from __future__ import annotations

import asyncio
import os
import socket
import struct
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from agent.config import SharedMemoryConfig
from agent.engine.types import VersionSpec
from agent.tensors import pack
from agent.wire import Decoder, Frame, encode, encode_head
from tests.integration.test_lanes import HELD_S, RawLane, counted, lanes, renamed, run, streaming_version
from tests.integration.test_shared_memory_hostile import memfd, stopped
from tests.shared import SharedBox, double_version, mean_version, shared_box, slow_version, until

pytestmark = pytest.mark.integration

NBYTES = 4096


class Peer(RawLane):
    """An application with a lane and its own connection to the daemon; its methods block."""

    def order(self, header: dict[str, Any], *passed: int, body: bytes = b"") -> Frame:
        """Send one frame on the daemon's connection and return the answer."""
        self.tell(header, *passed, body=body)
        return self.answer()

    def tell(self, header: dict[str, Any], *passed: int, body: bytes = b"") -> None:
        """Send one frame on the daemon's connection."""
        data = b"".join(bytes(part) for part in encode({"id": 1, **header}, (body,)))
        sent = socket.send_fds(self.home, [data], list(passed))
        self.home.sendall(data[sent:])

    def answer(self) -> Frame:
        """Return the next frame of the daemon's connection."""
        decoder, frames = Decoder(), list[Frame]()
        while not frames:
            data = self.home.recv(65536)
            assert data, "the daemon has closed the connection"
            frames = decoder.feed(data)
        (frame,) = frames
        return frame

    def lend(self, descriptor: int, *, number: int = 0, nbytes: int = NBYTES) -> Frame:
        """Attach a region and lend it to the lane's worker: when that is answered, all is in the worker's socket."""
        self.order({"kind": "attach", "region": number, "nbytes": nbytes}, descriptor)
        return self.order({"kind": "lend", "lane": self.reply.header["value"]["lane"], "region": number})

    def ask_mean(self, request_id: int, *, region: int = 0) -> None:
        """Ask on the lane for the mean of a whole region."""
        self.send({"kind": "infer", "id": request_id, "model": "mean", "tensors": [entry(region)]})

    def outcome(self) -> Any:
        """Return an answer's code, or the first value of the result."""
        frame = self.receive()
        if frame is None or frame.header["kind"] != "result":
            return None if frame is None else frame.header.get("code", frame.header["kind"])
        return struct.unpack_from("<f", bytes(frame.body))[0]


def entry(region: int, nbytes: int = NBYTES) -> dict[str, Any]:
    return {"name": "x", "dtype": "uint8", "shape": [1, nbytes], "nbytes": nbytes, "region": region, "offset": 0}


def connections(box: SharedBox) -> float:
    """Return how many connections the daemon has open."""
    (row,) = box.metrics.snapshot()["inferd_frame_connections"]
    return float(row["value"])


def outstanding(box: SharedBox, model: str) -> int:
    """Return how many requests the daemon has for the model."""
    pool = box.version(model).pool
    assert pool is not None
    return pool.outstanding


async def peers(path: Path, model: str, count: int) -> list[Peer]:
    return [await asyncio.to_thread(Peer, path, model) for _ in range(count)]


def test_garbage_on_a_lane_that_is_being_revoked_concerns_nobody_else(tmp_path: Path) -> None:
    async def story() -> None:
        async with shared_box(tmp_path, mean_version(tmp_path / "m")) as box:
            worker = box.worker_pid("mean")
            bad, good = await peers(box.path, "mean", 2)
            assert bad.lane is not None
            with memfd(NBYTES, fill=7) as region:
                with stopped(worker):
                    bad.home.close()  # ends the lane; the worker hears of it first, and then sees the garbage
                    await until(lambda: connections(box) == 1)
                    await asyncio.to_thread(good.lend, region)
                    bad.lane.sendall(b"GET / HTTP/1.1\r\n\r\n")
                good.ask_mean(1)
                assert await asyncio.to_thread(good.outcome) == 7.0
            assert box.version("mean").deaths == 0
            bad.close()
            good.close()

    run(story)


def test_a_lane_is_its_own_clients_whatever_another_asks_while_it_is_revoked(tmp_path: Path) -> None:
    async def story() -> None:
        async with shared_box(tmp_path, mean_version(tmp_path / "m")) as box:
            worker = box.worker_pid("mean")
            (ending,) = await peers(box.path, "mean", 1)
            assert ending.lane is not None
            with memfd(NBYTES, fill=7) as region:
                with stopped(worker):
                    ending.home.close()
                    await until(lambda: connections(box) == 0)
                    owner, other = await peers(box.path, "mean", 2)
                    await asyncio.to_thread(owner.lend, region)
                    ending.ask_mean(1, region=99)  # the worker looks for it among what the daemon has said since
                owner.ask_mean(1)
                assert await asyncio.to_thread(owner.outcome) == 7.0
                other.ask_mean(1)
                assert await asyncio.to_thread(other.outcome) == "bad_tensor"
            assert box.version("mean").deaths == 0
            for peer in (ending, owner, other):
                peer.close()

    run(story)


def test_a_region_that_cannot_be_mapped_fails_only_who_names_it(tmp_path: Path) -> None:
    async def story() -> None:
        async with shared_box(tmp_path, mean_version(tmp_path / "m")) as box:
            (peer,) = await peers(box.path, "mean", 1)
            with memfd(NBYTES, fill=7) as region:
                write_only = os.open(f"/proc/self/fd/{region}", os.O_WRONLY)
                lent = await asyncio.to_thread(peer.lend, write_only)
                assert lent.header["kind"] == "reply"
                peer.ask_mean(1)
                assert await asyncio.to_thread(peer.outcome) == "bad_tensor"
                await asyncio.to_thread(peer.lend, region, number=1)
                peer.ask_mean(2, region=1)
                assert await asyncio.to_thread(peer.outcome) == 7.0
                os.close(write_only)
            assert box.version("mean").deaths == 0
            peer.close()

    run(story)


def test_lent_regions_leave_room_for_those_of_one_request(tmp_path: Path) -> None:
    async def story() -> None:
        async with shared_box(tmp_path, mean_version(tmp_path / "m"), open_files_max=16) as box:
            holder, asker = await peers(box.path, "mean", 2)
            with memfd(NBYTES, fill=7) as region:
                kinds = []
                for number in range(8):
                    lent = await asyncio.to_thread(holder.lend, region, number=number)
                    kinds.append(lent.header["kind"])
                assert "error" in kinds  # no more than the worker may have
                for number in range(2):
                    attach = {"kind": "attach", "region": number, "nbytes": NBYTES}
                    await asyncio.to_thread(asker.order, attach, region)
                reply = {"region": 1, "offset": 0, "nbytes": NBYTES}
                header = {"kind": "infer", "model": "mean", "tensors": [entry(0)], "reply": reply}
                answer = await asyncio.to_thread(asker.order, header)
                assert answer.header["kind"] == "result"
            assert box.version("mean").deaths == 0
            holder.close()
            asker.close()

    run(story)


def test_requests_that_hold_more_regions_than_the_worker_has_descriptors_fail_alone(tmp_path: Path) -> None:
    async def story() -> None:
        spec = slow_version(tmp_path / "m")
        limits = {"memory_bytes": 0, "open_files": 64}
        spec = replace(spec, variants=tuple(replace(v, worker={**v.worker, "limits": limits}) for v in spec.variants))
        async with shared_box(tmp_path, spec, open_files_max=64) as box:
            slow, hostile = await peers(box.path, "slow", 2)
            entries, buffers = pack({"x": np.ones((1, 1024), np.float32)})

            def ask(request_id: int) -> None:
                slow.send({"kind": "infer", "id": request_id, "model": "slow", "tensors": entries}, list(buffers))

            for number in range(3):  # from here on it is known to be slow
                ask(number)
                await asyncio.to_thread(slow.outcome)
            with memfd(NBYTES) as region:
                for number in range(64):
                    attach = {"kind": "attach", "region": number, "nbytes": NBYTES}
                    await asyncio.to_thread(hostile.order, attach, region)
                with stopped(box.worker_pid("slow")):
                    for number in range(20):
                        ask(number)
                    for first in range(0, 64, 32):
                        tensors = [entry(number) for number in range(first, first + 32)]
                        hostile.tell({"kind": "infer", "id": 100 + first, "model": "slow", "tensors": tensors})
                    await until(lambda: outstanding(box, "slow") == 2)
                    more = await peers(box.path, "slow", 3)  # whose lanes take the last
                assert [await asyncio.to_thread(slow.outcome) for _ in range(20)] == [1.0] * 20
                await until(lambda: outstanding(box, "slow") == 0, limit_s=HELD_S)
            assert box.version("slow").deaths == 0
            await until(lambda: lanes(box, "slow") < 5)  # one that found no place is known to have ended
            for peer in (slow, hostile, *more):
                peer.close()

    run(story)


def test_the_end_of_an_idle_lane_is_told_at_once(tmp_path: Path) -> None:
    async def story() -> None:
        async with shared_box(tmp_path, double_version(tmp_path / "m"), hang_timeout_s=3600.0) as box:
            (peer,) = await peers(box.path, "double", 1)
            peer.ask(1)
            await asyncio.to_thread(peer.outcome)
            await until(lambda: counted(box, "double", "ok") == 1)  # nothing is left to be told of it
            assert peer.lane is not None
            peer.lane.close()
            await until(lambda: lanes(box, "double") == 0)
            peer.close()
            (peer,) = await peers(box.path, "double", 1)
            previous = box.engine.activate(await box.engine.load(renamed(double_version(tmp_path / "n"), "2.0.0")))
            assert previous is not None
            async with asyncio.timeout(HELD_S):
                await box.engine.retire(previous)
            peer.close()

    run(story)


def test_what_was_lent_is_found_behind_a_frame_of_many_reads(tmp_path: Path) -> None:
    async def story() -> None:
        memory = SharedMemoryConfig(arena_bytes_max=0)  # so bodies are sent
        async with shared_box(tmp_path, mean_version(tmp_path / "m"), memory=memory) as box:
            asker, peer = await peers(box.path, "mean", 2)
            with memfd(NBYTES, fill=7) as region:
                with stopped(box.worker_pid("mean")):
                    entries, buffers = pack({"x": np.full((1, 140_000), 3, np.uint8)})
                    header = {"kind": "infer", "id": 9, "model": "mean", "tensors": entries}
                    await asyncio.to_thread(asker.tell, header, body=bytes(buffers[0]))
                    await until(lambda: outstanding(box, "mean") == 1)
                    await asyncio.to_thread(peer.lend, region)
                    peer.ask_mean(1)
                assert await asyncio.to_thread(peer.outcome) == 7.0
                assert (await asyncio.to_thread(asker.answer)).header["kind"] == "result"
            asker.close()
            peer.close()

    run(story)


def test_a_body_that_no_request_takes_is_not_counted_as_under_way(tmp_path: Path) -> None:
    async def story() -> None:
        async with shared_box(tmp_path, double_version(tmp_path / "m"), queue_bytes_max=1 << 20) as box:
            bad, good = await peers(box.path, "double", 2)
            assert bad.lane is not None
            for header in ({"kind": "cancel", "id": 1}, {"kind": "infer", "id": 2, "content_type": 3}):
                bad.lane.sendall(encode_head(header, 600_000) + bytes(600_000))
            assert await asyncio.to_thread(bad.outcome) == "invalid_input"
            entries, buffers = pack({"x": np.ones((1, 150_000), np.float32)})
            good.send({"kind": "infer", "id": 1, "model": "double", "tensors": entries}, list(buffers))
            large = await asyncio.to_thread(good.receive)
            assert large is not None
            assert large.header["kind"] == "result"
            bad.close()
            good.close()

    run(story)


def test_a_body_for_which_memory_does_not_suffice_ends_its_lane_only(tmp_path: Path) -> None:
    def bounded(folder: Path, memory_bytes: int) -> VersionSpec:
        spec = double_version(folder)
        limits = {"memory_bytes": memory_bytes, "open_files": 256}
        return replace(spec, variants=tuple(replace(v, worker={**v.worker, "limits": limits}) for v in spec.variants))

    async def story() -> None:
        async with shared_box(tmp_path, bounded(tmp_path / "m", 0)) as box:
            pages = int(Path(f"/proc/{box.worker_pid('double')}/statm").read_text().split()[0])
        limit = pages * os.sysconf("SC_PAGESIZE") + (48 << 20)
        async with shared_box(tmp_path, bounded(tmp_path / "n", limit)) as box:
            bad, good = await peers(box.path, "double", 2)
            assert bad.lane is not None
            bad.lane.sendall(encode_head({"kind": "infer", "id": 1, "model": "double"}, 1 << 26) + bytes(10_000))
            assert await asyncio.to_thread(bad.outcome) == "overloaded"
            assert await asyncio.to_thread(bad.outcome) is None
            good.ask(1)
            assert await asyncio.to_thread(good.outcome) == 2.0
            assert box.version("double").deaths == 0
            bad.close()
            good.close()

    run(story)


def test_a_header_that_grows_when_it_is_passed_on_is_no_fault_of_the_worker(tmp_path: Path) -> None:
    async def story() -> None:
        async with shared_box(tmp_path, double_version(tmp_path / "m")) as box:
            (peer,) = await peers(box.path, "double", 1)
            entries, buffers = pack({"x": np.ones((1, 2), np.float32)})
            header = encode_head({"kind": "infer", "id": 5, "model": "double", "tensors": entries, "params": 0}, 8)
            floats = b"\xdd" + struct.pack(">I", 13_000) + b"\xca\x3f\x8c\xcc\xcd" * 13_000  # become twice as long
            packed = header[16:-1] + floats
            peer.home.sendall(struct.pack("<4sIQ", b"IFD1", len(packed), 8) + packed + bytes(buffers[0]))
            assert (await asyncio.to_thread(peer.answer)).header["kind"] == "result"
            assert box.version("double").deaths == 0
            peer.close()

    run(story)


def test_large_documents_are_not_remembered(tmp_path: Path) -> None:
    async def story() -> None:
        async with shared_box(tmp_path, double_version(tmp_path / "m")) as box:
            (peer,) = await peers(box.path, "double", 1)

            def ask(number: int) -> str:
                document = (
                    b'{"inputs":[{"name":"x","datatype":"FP32","shape":[1,2],"parameters":{"binary_data_size":8}}],'
                    b'"parameters":{"binary_data_output":true}}' + b" " * ((4 << 20) + number)
                )
                params = {"oip_header_bytes": len(document)}
                header = {"kind": "infer", "model": "double", "content_type": "application/vnd.oip+json"}
                body = document + bytes(8)
                return str(peer.order({**header, "params": params}, body=body).header["kind"])

            def resident_bytes() -> int:
                pages = int(Path(f"/proc/{box.worker_pid('double')}/statm").read_text().split()[1])
                return pages * os.sysconf("SC_PAGESIZE")

            assert await asyncio.to_thread(ask, 0) == "result"
            before = resident_bytes()
            for number in range(1, 41):
                assert await asyncio.to_thread(ask, number) == "result"
            assert resident_bytes() - before < 64 << 20
            peer.close()

    run(story)


def test_what_is_asked_of_a_worker_that_takes_nothing_does_not_pile_up(tmp_path: Path) -> None:
    async def story() -> None:
        async with shared_box(tmp_path, streaming_version(tmp_path / "m")) as box:
            (peer,) = await peers(box.path, "scale", 1)
            pool = box.version("scale").pool
            assert pool is not None
            samples = np.arange(400_000, dtype="<i2").tobytes()
            header = {"kind": "infer", "id": 5, "model": "scale", "content_type": "audio/pcm", "stream": True}
            await asyncio.to_thread(peer.tell, header, body=samples)
            await asyncio.to_thread(peer.home.recv, 1000)
            paces = b"".join(bytes(part) for kind in ("resume", "pause") for part in encode({"kind": kind, "id": 5}))
            with stopped(box.worker_pid("scale")):

                def flood() -> None:
                    for _ in range(200):
                        peer.home.sendall(paces * 200)

                peer.home.settimeout(HELD_S)
                await asyncio.to_thread(flood)
                (link,) = pool.links
                assert link.unsent_bytes < 1 << 18
            peer.close()
            await until(lambda: outstanding(box, "scale") == 0)
            assert box.version("scale").deaths == 0

    run(story)
