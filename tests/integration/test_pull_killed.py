"""``kill -9`` at random moments of a real pull: the next one goes on, ends in the right bytes, and repeats little.

The trust child is a real process that pulls over HTTP. It is killed at a moment drawn from the whole of its run, from
the first request to the rename, some pulls several times. By default a few kills; ``make kills KILLS=n`` for more.
"""

from __future__ import annotations

import os
import random
import shutil
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from agent.bundles.verify import check_version_directory
from tests.fakes import bundles
from tests.fakes.device import DeviceWorld
from tests.fakes.store import StoreServer, StoreWorld, serving

pytestmark = pytest.mark.integration

KILLS = int(os.environ.get("INFERD_KILLS", "5"))
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


@dataclass
class Timing:
    """How long the ends of an undisturbed pull take (seconds)."""

    before_chunks: float = 0.0
    after_chunks: float = 0.0


def until(condition: Callable[[], bool], child: subprocess.Popen[bytes]) -> bool:
    """Wait for ``condition``; return whether the child was still running then."""
    deadline = time.monotonic() + 90
    while not condition():
        if child.poll() is not None:
            return False
        assert time.monotonic() < deadline, "the child neither goes on nor ends"
        time.sleep(0.0005)
    return child.poll() is None


def kill_somewhere(
    child: subprocess.Popen[bytes], server: StoreServer, missing: int, rng: random.Random, timing: Timing
) -> bool:
    """Kill the child at a random moment of its run; return whether it was not done before.

    One moment in eight lies between its first request and the first chunk, one after the last, the others between two
    requests for chunks.
    """
    requests, chunks = len(server.requests), server.blobs_served()
    part = rng.random()
    if part < 1 / 8:
        until(lambda: len(server.requests) > requests, child)
        delay = rng.uniform(0, timing.before_chunks)
    else:
        wanted = missing if part > 7 / 8 else rng.randint(1, max(1, missing))
        until(lambda: server.blobs_served() - chunks >= wanted, child)
        delay = rng.uniform(0, timing.after_chunks if part > 7 / 8 else 0.002)
    try:
        child.wait(delay)
    except subprocess.TimeoutExpired:
        child.kill()
        child.wait()
        return True
    return False


def undisturbed(child: subprocess.Popen[bytes], server: StoreServer, chunks: int) -> Timing:
    """Let the child come to its end."""
    until(lambda: bool(server.requests), child)
    first = time.monotonic()
    until(lambda: server.blobs_served() > 0, child)
    begun = time.monotonic()
    until(lambda: server.blobs_served() >= chunks, child)
    last = time.monotonic()
    assert child.wait(90) == 0
    return Timing(begun - first, time.monotonic() - last)


def repeated(server: StoreServer) -> int:
    """Return how many requests asked for the beginning of a chunk that had been asked for before."""
    asked = Counter(path for path, _ in server.requests if "/blobs/" in path)
    return sum(count - 1 for count in asked.values())


def marked(device: DeviceWorld, digest: str) -> int:
    """Return how many chunks count as received."""
    journal = device.state / "staging" / digest / "journal"
    return journal.read_bytes().count(1) if journal.exists() else 0


def test_a_pull_killed_anywhere_is_resumed_to_the_right_bytes(tmp_path: Path) -> None:
    seed = random.randrange(1 << 32)
    print(f"seed={seed}")
    rng = random.Random(seed)
    world = StoreWorld(tmp_path)
    files = bundles.plain_files(rows=3072)
    packed = world.publish("1.0.0", files)
    chunks = len(world.blobs())
    killed, late, most, spots = 0, 0, 0, Counter[int]()
    with serving(world.root) as server:
        first = DeviceWorld(tmp_path / "undisturbed", world, [server.url], connections=CONNECTIONS)
        timing = undisturbed(start(first), server, chunks)
        while killed < KILLS:
            device = DeviceWorld(tmp_path / f"state{killed}.{late}", world, [server.url], connections=CONNECTIONS)
            server.requests.clear()
            kills = 0
            for _ in range(rng.randint(1, CHAIN_MAX)):
                missing = chunks - marked(device, packed.sha256)
                if not kill_somewhere(start(device), server, missing, rng, timing):
                    late += 1
                    break
                kills += 1
                spots[10 * marked(device, packed.sha256) // chunks] += 1
            done = Path(device.here("fetch", team="vision", name="tiny")["path"])
            _, record = check_version_directory(done)
            assert record.manifest_sha256 == packed.sha256
            assert {path: (done / path).read_bytes() for path in files} == files
            again = repeated(server)
            assert again <= CONNECTIONS * kills, f"{again} chunks again after {kills} kills"
            killed, most = killed + kills, max(most, again)
            shutil.rmtree(device.state)
            assert late <= 3 * KILLS + 10, "hardly any pull can be killed"
    print(f"{killed} kills, {late} pulls were done before; chunks then on disk, in tenths: {sorted(spots.items())}")
    print(f"at most {most} of {chunks} chunks asked for again in a pull of up to {CHAIN_MAX} kills")
