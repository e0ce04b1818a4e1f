"""The power goes at any moment of a pull and an activation: the box boots, serves what is verified, and ends right.

Two lives are recorded from the real processes (``tests/fakes/disk.py``): a new box that gets its first version, and a
box that is updated and then offered a version that fails its trial. For each state a cut could leave, the box is
started by the daemon's own boot path, taken to the end of what was asked of it, and looked at. By default a few hundred
states; ``make powercuts STATES=n`` for more.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import shutil
import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from agent.bundles.floor import FloorFile
from agent.bundles.layout import Layout
from agent.bundles.verify import check_version_directory
from agent.bundles.versions import collect_staging
from agent.deploy.pointer import Pointers
from agent.deploy.state import State
from tests.fakes import bundles, disk
from tests.fakes.device import DeviceWorld
from tests.fakes.disk import Disk, Fate, Recording
from tests.fakes.reboot import SLOT, Published, Reboot, puller
from tests.fakes.store import StoreWorld

pytestmark = [
    pytest.mark.sim,
    pytest.mark.skipif(shutil.which("strace") is None, reason="the recorder needs strace"),
]

STATES = int(os.environ.get("INFERD_POWERCUTS", "80"))
ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Life:
    """What happened to a box, and what must come of it whenever the power goes."""

    recording: Recording
    world: StoreWorld
    published: Published
    bad: tuple[str, ...]
    before: str  # the version that served
    after: str  # the version that must serve in the end


def record(folder: Path, *, published: tuple[str, ...], bad: tuple[str, ...], before: str, after: str) -> Life:
    """Publish all versions, prepare a box that serves ``before``, and record how it gets the others."""
    world = StoreWorld(folder)
    hashes = {}
    for number, version in enumerate(published):
        files = bundles.plain_files(rows=160, weights_seed=number)
        packed = world.publish(version, files)
        hashes[version] = {item.path: item.sha256 for item in packed.manifest.files}
    state = folder / "state"
    state.mkdir(mode=0o700)
    description = {"published": hashes, "bad": bad}
    if before:
        first = {"published": {before: hashes[before]}, "bad": ()}
        device = DeviceWorld(state, world)
        asyncio.run(_live(device.state, world, first["published"], before))  # type: ignore[arg-type]
    command = [sys.executable, "-m", "tests.fakes.reboot", str(state), world.url, str(world.anchor)]
    recording = disk.record(state, [*command, json.dumps(description)], cwd=ROOT, log=folder / "trace")
    return Life(recording, world, hashes, bad, before, after)


async def _live(state: Path, world: StoreWorld, published: Published, version: str) -> None:
    box = Reboot(state, puller(state, world.url, world.anchor, inline=True), published)
    async with box.running():
        assert (await box.deploy(version)).state is State.CONFIRMED


@pytest.fixture(scope="module", params=["first version", "update and failed update"])
def life(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Life:
    folder = tmp_path_factory.mktemp("life")
    if request.param == "first version":
        return record(folder, published=("1.0.0",), bad=(), before="", after="1.0.0")
    versions = ("1.0.0", "2.0.0", "3.0.0")
    return record(folder, published=versions, bad=("3.0.0",), before="1.0.0", after="2.0.0")


Cut = tuple[int, dict[int, Fate]]  # changes made before it, and what became of those it could still undo


def whole_cuts(recording: Recording, rng: random.Random) -> Iterator[Cut]:
    """At every moment: nothing of what was not synced is there, or all of it (which is what ``kill -9`` leaves)."""
    for count in _moments(recording, rng):
        for fate in (Fate.MISSING, Fate.THERE):
            yield count, dict.fromkeys(recording.pending(count), fate)


def single_cuts(recording: Recording, rng: random.Random) -> Iterator[Cut]:
    """At every moment each change that was not synced, and that one alone: missing, torn, or zeros."""
    for count in _moments(recording, rng):
        for number in recording.pending(count):
            for fate in _fates(recording, number)[1:]:
                yield count, {number: fate}


def mixed_cuts(recording: Recording, rng: random.Random) -> Iterator[Cut]:
    """At any moment any of what was not synced, without end."""
    while True:
        count = rng.randrange(len(recording.changes) + 1)
        yield count, {number: rng.choice(_fates(recording, number)) for number in recording.pending(count)}


def distinct(recording: Recording, rng: random.Random, count: int) -> Iterator[tuple[int, dict[int, Fate], Disk]]:
    """Yield ``count`` cuts, of the three kinds in turn, that leave different disks."""
    kinds = [kind(recording, rng) for kind in (whole_cuts, single_cuts, mixed_cuts)]
    seen: set[bytes] = set()
    for turn in range(100 * count):
        cut = next(kinds[turn % len(kinds)], None)
        if cut is None:
            continue
        left = recording.after(*cut, rng)
        if (digest := left.digest()) not in seen:
            seen.add(digest)
            yield *cut, left
        if len(seen) == count:
            return


def _moments(recording: Recording, rng: random.Random) -> list[int]:
    moments = list(range(len(recording.changes) + 1))
    rng.shuffle(moments)
    return moments


def _fates(recording: Recording, number: int) -> list[Fate]:
    return list(Fate) if recording.changes[number].tearable else [Fate.THERE, Fate.MISSING]


def test_every_cut_leaves_a_box_that_boots_and_ends_right(life: Life, memory_path: Path) -> None:
    seed = random.randrange(1 << 32)
    print(f"seed={seed} changes={len(life.recording.changes)} syncs={life.recording.syncs}")
    rng = random.Random(seed)
    count, moments, served = 0, set(), Counter[str]()
    for moment, fates, left in distinct(life.recording, rng, STATES // 2):
        count += 1
        moments.add(moment)
        state = memory_path / str(count)
        left.write(state)
        try:
            served[asyncio.run(come_back(life, state))] += 1
        except BaseException:
            shown = {number: (fate.name, life.recording.changes[number]) for number, fate in fates.items()}
            print(f"cut after change {moment}: {str(shown)[:3000]}")
            raise
        shutil.rmtree(state)
        if count % 1000 == 0:
            print(f"{count} states", flush=True)
    print(f"{count} different states, cut at {len(moments)} moments; served at boot: {dict(served)}")
    assert count == STATES // 2


async def come_back(life: Life, state: Path) -> str:
    """Boot from ``state``, finish what was asked, and check all of it; return what served at once."""
    floor_before = FloorFile(Layout(state).floors).read()
    pointer = Pointers(state / "active").read(SLOT)
    box = Reboot(state, puller(state, life.world.url, life.world.anchor, inline=True), life.published, bad=life.bad)
    async with box.running():
        at_once = box.serving()
        told = (pointer.confirmed or pointer.active).version if pointer is not None else life.before
        assert at_once == told, "not what it was told"
        for version in life.published:
            if version == life.before:
                continue
            record = await box.deploy(version)
            assert (record.state is State.CONFIRMED) == (version not in life.bad), record
        assert box.serving() == life.after
    assert not box.heard(".broken"), box.heard(".broken")
    layout = Layout(state)
    for path in layout.versions.glob("*/*/*"):
        check_version_directory(path)
    assert not list(layout.staging.rglob("*.part"))
    collect_staging(layout, now=time.time() + 8 * 86_400)
    assert not list(layout.staging.iterdir()), "an unfinished pull would stay for ever"
    floor = FloorFile(layout.floors).read()
    assert floor is not None
    if floor_before is not None:
        assert all(floor.roles[role] >= version for role, version in floor_before.roles.items())
    return at_once
