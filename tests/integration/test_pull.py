"""Pulling from a real signed store through the real trust child: what arrives, what is reused, what survives a cut."""

from __future__ import annotations

import asyncio
import os
import signal
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest

from agent.bundles.puller import Puller, StoredBundle
from agent.errors import StoreError
from agent.profile import Hardware
from tests.fakes import bundles
from tests.fakes.device import DeviceWorld
from tests.fakes.store import Fault, StoreWorld, serving

pytestmark = pytest.mark.integration


@pytest.fixture
def world(tmp_path: Path) -> StoreWorld:
    return StoreWorld(tmp_path)


@pytest.fixture
def device(tmp_path: Path, world: StoreWorld) -> DeviceWorld:
    return DeviceWorld(tmp_path / "state", world)


def until(condition: Callable[[], bool], *, what: str) -> None:
    """Wait for ``condition``, at most half a minute."""
    deadline = time.monotonic() + 90
    while not condition():
        assert time.monotonic() < deadline, f"never happened: {what}"
        time.sleep(0.01)


def test_a_published_version_arrives_whole(world: StoreWorld, device: DeviceWorld) -> None:
    files = bundles.plain_files()
    packed = world.publish("1.2.0", files)
    stored = device.fetch()
    assert stored.path == device.state / "versions" / "vision" / "tiny" / f"1.2.0~{packed.sha256[:12]}"
    assert {path: (stored.path / path).read_bytes() for path in files} == files
    assert stored.manifest == packed.manifest
    assert [variant.id for variant in stored.variants] == ["cpu-int8", "cpu-fp32"]
    assert stored.bytes_fetched == packed.manifest.total_size


def test_a_version_is_read_only_with_one_name_per_file(world: StoreWorld, device: DeviceWorld) -> None:
    world.publish()
    stored = device.fetch()
    for path in stored.path.rglob("*"):
        info = path.lstat()
        if path.is_file():
            assert (stat.S_IMODE(info.st_mode), info.st_nlink) == (0o444, 1)
        else:
            assert stat.S_IMODE(info.st_mode) == 0o555
    assert not list((device.state / "staging").iterdir())


def test_progress_is_told(world: StoreWorld, device: DeviceWorld) -> None:
    packed = world.publish()
    device.fetch()
    resolved, *middle = device.lines
    assert resolved["event"] == "resolved"
    assert resolved["manifest_sha256"] == packed.sha256
    assert resolved["bytes_missing"] == resolved["bytes_total"] == packed.manifest.total_size
    finals = [line for line in middle if line["event"] == "progress"]
    assert finals[-1]["bytes_done"] == finals[-1]["bytes_total"]
    assert middle[-1]["event"] == "verifying"


def test_an_exact_version_can_be_asked_for(world: StoreWorld, device: DeviceWorld) -> None:
    world.publish("1.0.0")
    world.publish("2.0.0")
    assert device.fetch("1.0.0").manifest.version == "1.0.0"
    assert device.fetch().manifest.version == "2.0.0"


def test_packed_chunks_are_unpacked(world: StoreWorld, device: DeviceWorld) -> None:
    files = bundles.plain_files() | {"fp32/model.onnx.data": bytes(1024 * 1024)}
    world.publish("1.0.0", files, zstd=True)
    stored = device.fetch()
    assert (stored.path / "fp32/model.onnx.data").read_bytes() == bytes(1024 * 1024)
    assert stored.bytes_fetched < 100_000


def test_a_second_fetch_brings_nothing(world: StoreWorld, device: DeviceWorld) -> None:
    world.publish()
    device.fetch()
    before = device.serving_bytes()
    assert device.fetch().bytes_fetched == 0
    assert device.serving_bytes() == before


def test_an_update_brings_only_what_changed(world: StoreWorld, device: DeviceWorld) -> None:
    files = bundles.plain_files()
    world.publish("1.0.0", files)
    device.fetch()
    weights = files["fp32/model.onnx.data"]
    world.publish("1.1.0", files | {"fp32/model.onnx.data": weights[: -bundles.CHUNK] + bytes(bundles.CHUNK)})
    stored = device.fetch()
    assert stored.manifest.version == "1.1.0"
    assert stored.bytes_fetched == bundles.CHUNK


def test_files_of_variants_that_cannot_run_stay_in_the_store(world: StoreWorld, device: DeviceWorld) -> None:
    value = bundles.describe(bundles.plain_files())
    value["variants"][0]["device"] = {"kind": "cuda", "providers": ["CUDAExecutionProvider"]}
    world.publish("1.0.0", variants=value["variants"])
    stored = device.fetch()
    assert not (stored.path / "fp32").exists()
    assert stored.dropped == (("cpu-fp32", "needs cuda, the profile has cpu"),)
    assert stored.bytes_fetched < 10_000


def test_new_hardware_brings_the_missing_files_into_the_same_version(world: StoreWorld, device: DeviceWorld) -> None:
    value = bundles.describe(bundles.plain_files())
    value["variants"][0]["device"] = {"kind": "cpu", "features_any": ["avx512f"]}
    world.publish("1.0.0", variants=value["variants"])
    first = device.fetch()
    assert not (first.path / "fp32").exists()
    device.hardware = Hardware(arch="x86_64", cores=2, memory_bytes=8 << 30, cpu_features=("avx512f",))
    assert [reason for _, reason in device.check(first.path).dropped] == ["its files are not on this box; deploy again"]
    second = device.fetch()
    assert second.path == first.path
    assert (second.path / "fp32" / "model.onnx.data").stat().st_size == 1024 * 1024
    assert not second.dropped
    assert not list((device.state / "staging").iterdir())


def test_http_serves_as_well_and_an_idle_poll_costs_two_requests(world: StoreWorld, device: DeviceWorld) -> None:
    world.publish()
    with serving(world.root) as server:
        device.store = msgspec.structs.replace(device.store, urls=(server.url,))
        device.fetch()
        server.requests.clear()
        resolved = asyncio.run(device.puller().resolve("vision", "tiny", "", "stable"))
        assert [path for path, _ in server.requests] == ["/metadata/2.root.json", "/metadata/timestamp.json"]
    assert resolved.version == "1.0.0"
    assert resolved.bytes_missing == 0


def test_a_cut_transfer_goes_on_where_it_was_cut(world: StoreWorld, device: DeviceWorld) -> None:
    world.publish()
    blob = world.blobs()[0].name
    with serving(world.root) as server:
        server.faults = [Fault(part=blob, kind="cut", value=40_000, times=1)]
        device.store = msgspec.structs.replace(device.store, urls=(server.url,))
        stored = device.fetch()
        assert [wanted for path, wanted in server.requests if blob in path] == ["", "bytes=40000-"]
    assert stored.bytes_fetched == stored.manifest.total_size


def test_a_server_without_ranges_starts_the_chunk_again(world: StoreWorld, device: DeviceWorld) -> None:
    world.publish()
    blob = world.blobs()[0].name
    with serving(world.root, ranges=False) as server:
        server.faults = [Fault(part=blob, kind="cut", value=40_000, times=1)]
        device.store = msgspec.structs.replace(device.store, urls=(server.url,))
        stored = device.fetch()
    assert stored.bytes_fetched == stored.manifest.total_size + 40_000


@pytest.mark.parametrize("fault", ["flip", "status"])
def test_one_bad_answer_is_tried_again(world: StoreWorld, device: DeviceWorld, fault: str) -> None:
    world.publish()
    with serving(world.root) as server:
        server.faults = [Fault(part=world.blobs()[0].name, kind=fault, value=503, times=1)]
        device.store = msgspec.structs.replace(device.store, urls=(server.url,))
        assert device.fetch().manifest.version == "1.0.0"


def test_a_mirror_steps_in(world: StoreWorld, device: DeviceWorld) -> None:
    world.publish()
    with serving(world.root) as server:
        server.faults = [
            Fault(part=world.blobs()[0].name, kind="flip"),
            Fault(part="targets/", kind="status", value=404),
        ]
        device.store = msgspec.structs.replace(
            device.store, urls=("http://127.0.0.1:9", server.url, world.url), stall_timeout_s=10.0, tries=1
        )
        assert device.fetch().manifest.version == "1.0.0"


def test_a_killed_pull_goes_on_where_it_was(world: StoreWorld, device: DeviceWorld) -> None:
    packed = world.publish()
    with serving(world.root) as server:
        server.gate, server.gate_after = threading.Event(), 9
        device.store = msgspec.structs.replace(device.store, urls=(server.url,))
        child = subprocess.Popen(
            [sys.executable, "-m", "agent.bundles.child"], stdin=subprocess.PIPE, stdout=subprocess.DEVNULL
        )
        assert child.stdin is not None
        child.stdin.write(device.request("fetch", team="vision", name="tiny"))
        child.stdin.close()
        journal = device.state / "staging" / packed.sha256 / "journal"
        until(lambda: journal.exists() and journal.read_bytes().count(1) >= 5, what="five chunks are journaled")
        os.kill(child.pid, signal.SIGKILL)
        child.wait()
        assert not device.serving_bytes()
        done = _bytes_marked(journal, packed.manifest)
        server.gate.set()
        stored = device.fetch()
    assert stored.bytes_fetched == packed.manifest.total_size - done
    assert (stored.path / "fp32/model.onnx.data").read_bytes() == bundles.plain_files()["fp32/model.onnx.data"]


@pytest.mark.parametrize("op", ["resolve", "fetch"])
def test_a_child_whose_daemon_is_gone_ends_without_a_word(world: StoreWorld, device: DeviceWorld, op: str) -> None:
    world.publish()
    reader, writer = os.pipe()
    os.close(reader)  # what the kernel does to a killed daemon before it signals that daemon's children
    try:
        ended = subprocess.run(
            [sys.executable, "-m", "agent.bundles.child"],
            input=device.request(op, team="vision", name="tiny"),
            stdout=writer,
            stderr=subprocess.PIPE,
            timeout=90,
            check=False,
        )
    finally:
        os.close(writer)
    assert (ended.returncode, ended.stderr) == (1, b"")
    assert device.fetch().manifest.version == "1.0.0"


def test_a_journal_that_lies_is_found_out(world: StoreWorld, device: DeviceWorld) -> None:
    """A disk that lost a write it had confirmed: the mark is there, the data is not."""
    packed = world.publish()
    with serving(world.root) as server:
        device.store = msgspec.structs.replace(device.store, urls=(server.url,), tries=1)
        server.faults = [Fault(part=world.blobs()[-1].name, kind="status", value=404)]
        with pytest.raises(StoreError, match="404"):
            device.fetch()
        server.faults = []
        staging = device.state / "staging" / packed.sha256
        number = next(n for n, item in enumerate(packed.manifest.files) if item.path.endswith(".data"))
        with (staging / f"{number}.part").open("r+b") as part:
            part.seek(3 * bundles.CHUNK)
            part.write(bytes(bundles.CHUNK))
        (staging / "journal").write_bytes(b"\x01" * (staging / "journal").stat().st_size)
        stored = device.fetch()
    assert (stored.path / "fp32/model.onnx.data").read_bytes() == bundles.plain_files()["fp32/model.onnx.data"]


def test_an_installation_cut_half_way_is_taken_up(world: StoreWorld, device: DeviceWorld) -> None:
    """Some parts have moved to their places, read-only already, when the power goes."""
    packed = world.publish()
    with serving(world.root) as server:
        device.store = msgspec.structs.replace(device.store, urls=(server.url,), tries=1)
        server.faults = [Fault(part=world.blobs()[-1].name, kind="status", value=404)]
        with pytest.raises(StoreError, match="404"):
            device.fetch()
        staging = device.state / "staging" / packed.sha256
        done = _bytes_marked(staging / "journal", packed.manifest)
        number = next(n for n, item in enumerate(packed.manifest.files) if item.path.endswith(".data"))
        (staging / "tree" / "fp32").mkdir(parents=True)
        placed = staging / "tree" / "fp32" / "model.onnx.data"
        (staging / f"{number}.part").rename(placed)
        placed.chmod(0o444)
        placed.parent.chmod(0o555)
        server.faults = []
        stored = device.fetch()
    assert stored.bytes_fetched == packed.manifest.total_size - done
    assert not list((device.state / "staging").iterdir())


def test_cancelling_a_fetch_ends_its_child(world: StoreWorld, device: DeviceWorld) -> None:
    world.publish()

    async def run(puller: Puller) -> None:
        started = asyncio.Event()

        def on_progress(line: object) -> None:
            started.set()

        async with asyncio.timeout(90):
            task: asyncio.Task[StoredBundle] = asyncio.create_task(
                puller.fetch("vision", "tiny", "", "stable", on_progress=on_progress)
            )
            await started.wait()
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task

    before = _children()
    with serving(world.root) as server:
        server.gate = threading.Event()
        device.store = msgspec.structs.replace(device.store, urls=(server.url,))
        asyncio.run(run(device.puller()))
        assert _children() <= before
        server.gate.set()


def test_two_pulls_of_one_version_do_not_meet(world: StoreWorld, device: DeviceWorld) -> None:
    world.publish()

    async def run() -> list[StoredBundle | BaseException]:
        puller = device.puller()
        return await asyncio.gather(
            *(puller.fetch("vision", "tiny", "", "stable") for _ in range(3)), return_exceptions=True
        )

    outcomes = asyncio.run(run())
    assert any(isinstance(outcome, StoredBundle) for outcome in outcomes)
    assert {getattr(outcome, "code", "store_transient") for outcome in outcomes} == {"store_transient"}
    assert device.fetch().bytes_fetched == 0


def _bytes_marked(journal: Path, manifest: bundles.Manifest) -> int:
    chunks = [chunk for item in manifest.files for chunk in item.chunks]
    return sum(chunk.size for chunk, mark in zip(chunks, journal.read_bytes(), strict=True) if mark)


def _children() -> set[str]:
    """Return the pids of this process's children that are no zombies."""
    found = set()
    for status in Path("/proc").glob("[0-9]*/status"):
        try:
            text = status.read_text()
        except OSError:
            continue
        if f"PPid:\t{os.getpid()}\n" in text and "State:\tZ" not in text:
            found.add(status.parent.name)
    return found
