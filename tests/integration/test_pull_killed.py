"""``kill -9`` at random moments of a real pull: the next one goes on, ends in the right bytes, and repeats little.

The trust child is a real process that pulls over HTTP. It is killed at a moment drawn from the whole of its run, from
the first request to the rename, some pulls several times. By default a few kills; ``make kills KILLS=n`` for more.
"""

from __future__ import annotations

import os
import random
import subprocess
import sys
import time
from collections import Counter
from hashlib import sha256
from pathlib import Path

import pytest

from agent.bundles.manifest import Manifest
from agent.bundles.verify import check_version_directory
from tests.fakes import bundles
from tests.fakes.device import DeviceWorld
from tests.fakes.store import StoreServer, StoreWorld, serving

pytestmark = pytest.mark.integration

KILLS = int(os.environ.get("INFERD_KILLS", "6"))
CONNECTIONS = 4
CHAIN_MAX = 3  # kills in a row of one pull


def start(device: DeviceWorld) -> subprocess.Popen[bytes]:
    """Start a pull as the daemon does."""
    child = subprocess.Popen(
        [sys.executable, "-m", "agent.bundles.child"],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        cwd=Path(__file__).parents[2],
    )
    assert child.stdin is not None
    child.stdin.write(device.request("fetch", team="vision", name="tiny"))
    child.stdin.close()
    return child


def wait_for_request(server: StoreServer, child: subprocess.Popen[bytes], seen: int) -> None:
    """Wait until the child has asked the store for something; ``seen`` requests came before."""
    deadline = time.monotonic() + 90
    while len(server.requests) == seen and child.poll() is None:
        assert time.monotonic() < deadline, "the child asks for nothing"
        time.sleep(0.001)


def repeated(server: StoreServer) -> int:
    """Return how many requests asked for the beginning of a chunk that had been asked for before."""
    asked = Counter(path for path, _ in server.requests if "/blobs/" in path)
    return sum(count - 1 for count in asked.values())


def marked(device: DeviceWorld, digest: str, manifest: Manifest) -> float:
    """Return the share of chunks that count as received."""
    journal = device.state / "staging" / digest / "journal"
    total = sum(len(item.chunks) for item in manifest.files)
    return journal.read_bytes().count(1) / total if journal.exists() else 0.0


def test_a_pull_killed_anywhere_is_resumed_to_the_right_bytes(tmp_path: Path) -> None:
    seed = random.randrange(1 << 32)
    print(f"seed={seed}")
    rng = random.Random(seed)
    world = StoreWorld(tmp_path)
    files = bundles.plain_files(rows=3072)
    packed = world.publish("1.0.0", files)
    killed, late, spots, most = 0, 0, Counter[int](), 0
    run_s = 0.0  # of a whole pull, from its first request on
    with serving(world.root) as server:
        for number in range(10 * KILLS + 10):
            device = DeviceWorld(tmp_path / f"state{number}", world, [server.url], connections=CONNECTIONS)
            server.requests.clear()
            kills = 0
            while killed < KILLS and kills < rng.randint(1, CHAIN_MAX):
                seen = len(server.requests)
                child = start(device)
                wait_for_request(server, child, seen)
                begun = time.monotonic()
                try:
                    child.wait(rng.uniform(0, run_s) if run_s else 90)
                except subprocess.TimeoutExpired:
                    child.kill()
                    child.wait()
                    kills, killed = kills + 1, killed + 1
                    spots[int(10 * marked(device, packed.sha256, packed.manifest))] += 1
                else:
                    late += bool(run_s)
                    run_s = max(run_s, time.monotonic() - begun)
                    break
            done = device.here("fetch", team="vision", name="tiny")
            _, record = check_version_directory(Path(done["path"]))
            assert record.manifest_sha256 == packed.sha256
            for path, data in files.items():
                assert sha256((Path(done["path"]) / path).read_bytes()).digest() == sha256(data).digest()
            assert not list((device.state / "staging").iterdir())
            assert repeated(server) <= CONNECTIONS * kills, f"{repeated(server)} chunks again after {kills} kills"
            most = max(most, repeated(server))
            if killed == KILLS:
                break
    assert killed == KILLS
    print(f"{killed} kills, {late} came too late; chunks received before, in tenths: {sorted(spots.items())}")
    print(f"at most {most} chunks asked for again by one pull of {len(world.blobs())}")
