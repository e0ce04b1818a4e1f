"""What a pull costs: bytes of a metered link, requests, chunks fetched twice, blocks on the disk, memory."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import threading
from pathlib import Path

import pytest

from agent.bundles.staging import SYNCED, WRITTEN, Staging
from agent.config import MIB, MirrorConfig
from agent.errors import BudgetError, ConfigError, DiskFullError, StoreError
from tests.fakes import bundles
from tests.fakes.device import DeviceWorld
from tests.fakes.store import Fault, StoreWorld, serving
from tools import bench_pull
from tools.bench_pull_store import LargeStore

pytestmark = pytest.mark.integration


@pytest.fixture
def world(tmp_path: Path) -> StoreWorld:
    return StoreWorld(tmp_path)


def spend(device: DeviceWorld, size: int) -> None:
    device.layout.root.mkdir(exist_ok=True)
    device.layout.budget.write_text(json.dumps({"since": 4e9, "spent": size}))


def test_a_pull_stops_at_its_budget_and_goes_on_in_the_next_window(tmp_path: Path, world: StoreWorld) -> None:
    packed = world.publish()
    with serving(world.root) as server:
        device = DeviceWorld(tmp_path / "state", world, urls=(server.url,), budget_bytes=16 * MIB)
        spend(device, 16 * MIB - 500_000)
        with pytest.raises(BudgetError, match="goes on in") as failure:
            device.fetch()
        assert failure.value.retry_after_s > 0
        assert server.blobs_served() < sum(len(file.chunks) for file in packed.manifest.files)
        kept = (device.layout.staging / packed.sha256 / "journal").read_bytes()
        done = bytes_marked(kept, packed.manifest)
        assert 0 < done <= 500_000
        device.layout.budget.write_text(json.dumps({"since": 0, "spent": 16 * MIB}))
        stored = device.fetch()
    assert stored.bytes_fetched == packed.manifest.total_size - done
    assert json.loads(device.layout.budget.read_text())["spent"] == stored.bytes_fetched


def test_a_mirror_that_costs_nothing_is_not_bound_by_the_budget(tmp_path: Path, world: StoreWorld) -> None:
    world.publish()
    with serving(world.root) as metered, serving(world.root) as near:
        device = DeviceWorld(
            tmp_path / "state",
            world,
            urls=(metered.url,),
            mirrors=(MirrorConfig(url=near.url, metered=False),),
            budget_bytes=16 * MIB,
        )
        spend(device, 16 * MIB)
        assert device.here("fetch", team="vision", name="tiny")["version"] == "1.0.0"
        assert metered.blobs_served() == 0


def test_a_bad_chunk_costs_the_budget_what_it_brought(tmp_path: Path, world: StoreWorld) -> None:
    packed = world.publish()
    blob = world.blobs()[0]
    with serving(world.root) as server:
        server.faults = [Fault(part=blob.name, kind="flip", times=1)]
        device = DeviceWorld(tmp_path / "state", world, urls=(server.url,), budget_bytes=16 * MIB)
        device.here("fetch", team="vision", name="tiny")
    spent = json.loads(device.layout.budget.read_text())["spent"]
    assert spent == packed.manifest.total_size + blob.stat().st_size


def test_chunks_written_and_not_synced_count_after_a_restart_if_they_are_right(tmp_path: Path) -> None:
    """After a kill they are whole; after a power cut some are not."""
    files = bundles.plain_files()
    manifest = bundles.manifest(files)
    number = next(n for n, item in enumerate(manifest.files) if item.path.endswith(".data"))
    path = manifest.files[number].path
    staging = opened(tmp_path, manifest, path)
    for job in staging.jobs()[:3]:
        start = job.places[0].offset
        staging.write(job.places[0], 0, files[path][start : start + job.chunk.size])
        staging.finish(job)
    staging.close()
    first = sum(len(item.chunks) for item in manifest.files[:number])
    journal = tmp_path / "staging" / "journal"
    assert journal.read_bytes()[first : first + 4] == bytes([WRITTEN] * 3 + [0])
    with (tmp_path / "staging" / f"{number}.part").open("r+b") as part:
        part.write(bytes(100))  # the first chunk never reached the disk
    staging = opened(tmp_path, manifest, path)
    staging.close()
    assert journal.read_bytes()[first : first + 4] == bytes([0, SYNCED, SYNCED, 0])


def test_an_unchanged_file_is_copied_in_the_kernel_and_still_hashed(tmp_path: Path, world: StoreWorld) -> None:
    files = bundles.plain_files()
    world.publish("1.0.0", files)
    world.publish("1.1.0", files | {"classes.txt": b"up\ndown\n"})
    with serving(world.root) as server:
        device = DeviceWorld(tmp_path / "state", world, urls=(server.url,), link_mode="copy")
        first = device.fetch("1.0.0")
        weights = first.path / "fp32" / "model.onnx.data"
        os.chmod(weights, 0o644)
        with weights.open("r+b") as file:
            file.seek(3 * bundles.CHUNK)
            file.write(b"worn out")
        os.chmod(weights, 0o444)
        second = device.fetch("1.1.0")
    assert (second.path / "fp32" / "model.onnx.data").read_bytes() == files["fp32/model.onnx.data"]
    assert (second.path / "fp32" / "model.onnx.data").stat().st_nlink == 1
    assert second.bytes_fetched == bundles.CHUNK + len(b"up\ndown\n")


def test_a_file_system_that_cannot_share_blocks_refuses_to_be_told_to(tmp_path: Path, world: StoreWorld) -> None:
    world.publish("1.0.0")
    world.publish("1.1.0", bundles.plain_files() | {"classes.txt": b"up\ndown\n"})
    device = DeviceWorld(tmp_path / "state", world, link_mode="reflink")
    device.here("fetch", team="vision", name="tiny", version="1.0.0")
    if shutil.which("cp") and os.system(f"cp --reflink=always {world.anchor} {tmp_path}/x 2>/dev/null") == 0:
        device.here("fetch", team="vision", name="tiny", version="1.1.0")
        return
    with pytest.raises(ConfigError, match="link_mode"):
        device.here("fetch", team="vision", name="tiny", version="1.1.0")


def test_a_tenth_of_what_is_needed_stays_free(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    manifest = bundles.manifest()
    staging = Staging(tmp_path / "staging", manifest, [item.path for item in manifest.files])
    staging.acquire()
    need = sum(item.size for item in manifest.files)
    stats = list(os.statvfs(tmp_path))
    block = stats[1]
    stats[4] = (need + need // 20) // block  # f_bavail
    monkeypatch.setattr(os, "statvfs", lambda path: os.statvfs_result(stats))
    with pytest.raises(DiskFullError, match="reserve"):
        staging.open(disk_reserve_bytes=0)
    staging.close()


def test_progress_tells_the_rate_and_never_goes_back(tmp_path: Path, world: StoreWorld) -> None:
    world.publish()
    with serving(world.root) as server:
        server.faults = [Fault(part="/blobs/", kind="cut", value=30_000, times=4)]
        device = DeviceWorld(tmp_path / "state", world, urls=(server.url,), tries=3)
        device.fetch()
    lines = [line for line in device.lines if line["event"] == "progress"]
    assert [line["bytes_done"] for line in lines] == sorted(line["bytes_done"] for line in lines)
    assert lines[-1]["rate_bps"] > 0


def test_a_failed_pull_keeps_what_it_has(tmp_path: Path, world: StoreWorld) -> None:
    packed = world.publish()
    with serving(world.root) as server:
        server.faults = [Fault(part=world.blobs()[-1].name, kind="status", value=404)]
        device = DeviceWorld(tmp_path / "state", world, urls=(server.url,), tries=1)
        with pytest.raises(StoreError):
            device.here("fetch", team="vision", name="tiny")
        server.faults = []
        before = server.blobs_served()
        done = bytes_marked((device.layout.staging / packed.sha256 / "journal").read_bytes(), packed.manifest)
        answer = device.here("fetch", team="vision", name="tiny")
        assert answer["bytes_fetched"] == packed.manifest.total_size - done
        assert server.blobs_served() - before >= 1


def test_the_figures_that_can_be_counted(tmp_path: Path) -> None:
    """Whatever the machine does besides: chunks and requests, and no process that stays."""
    store = LargeStore(tmp_path)
    store.publish_random(32, lambda size: None)
    with bench_pull.serving(store.root) as url:
        figures = bench_pull.nothing_new(tmp_path, store, url, runs=1)
        figures += bench_pull.after_a_kill(tmp_path, store, url)
        figures += bench_pull.after_insertion(tmp_path, store, url)
    counted = {"chunks of it", "chunks fetched twice after kill -9", "requests of a refresh with nothing new"}
    assert counted <= {figure.name for figure in figures}
    assert not [str(figure) for figure in figures if figure.name in counted and not figure.met]
    assert not pullers()


def pullers() -> list[str]:
    """Return the command lines of this test's trust children that still run."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            parent = (entry / "stat").read_text().rpartition(")")[2].split()[1]
            command = (entry / "cmdline").read_bytes()
        except OSError:
            continue
        if b"agent.bundles.child" in command and parent == str(os.getpid()):
            found.append(command.decode())
    return found


def test_a_cancelled_pull_keeps_what_it_has(tmp_path: Path, world: StoreWorld) -> None:
    packed = world.publish()
    with serving(world.root) as server:
        server.gate, server.gate_after = threading.Event(), 9
        device = DeviceWorld(tmp_path / "state", world, urls=(server.url,))
        journal = device.layout.staging / packed.sha256 / "journal"

        async def cancel_half_way() -> None:
            async with asyncio.timeout(90):
                fetch = asyncio.create_task(device.puller().fetch("vision", "tiny", "", "stable"))
                while not (journal.exists() and sum(map(bool, journal.read_bytes())) >= 5):
                    await asyncio.sleep(0.01)
                fetch.cancel()
                await asyncio.wait({fetch})

        asyncio.run(cancel_half_way())
        assert not pullers()
        done = bytes_marked(journal.read_bytes(), packed.manifest)
        server.gate.set()
        answer = device.here("fetch", team="vision", name="tiny")
    assert done
    assert answer["bytes_fetched"] == packed.manifest.total_size - done


def opened(folder: Path, manifest: bundles.Manifest, path: str) -> Staging:
    staging = Staging(folder / "staging", manifest, [path])
    staging.acquire()
    staging.open(disk_reserve_bytes=0)
    return staging


def bytes_marked(journal: bytes, manifest: bundles.Manifest) -> int:
    chunks = [chunk for item in manifest.files for chunk in item.chunks]
    return sum(chunk.size for chunk, mark in zip(chunks, journal, strict=True) if mark)
