"""The device's TUF client: clocks, floors, torn caches, stolen keys. Real metadata, in this process."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest

from agent.bundles.fetcher import Transport
from agent.bundles.floor import BUILD_TIME, FloorFile
from agent.bundles.layout import Layout
from agent.bundles.trust import TrustedStore
from agent.errors import (
    AgentError,
    ExpiredError,
    OfflineError,
    RollbackDetectedError,
    StateError,
    TargetNotFoundError,
    UntrustedError,
)
from tests.fakes.device import DeviceWorld
from tests.fakes.store import StoreWorld

pytestmark = pytest.mark.integration

DAY = 86_400
TARGET = "models/vision/tiny/1.0.0.json"


class Box:
    """A state folder with its own clock."""

    def __init__(self, folder: Path, world: StoreWorld) -> None:
        self.layout = Layout(folder / "state")
        self.world = world

    def refresh(self, *, wall: float | None = None, synchronised: bool = False, folder: Path | None = None) -> None:
        """Refresh and look up the one published version."""
        trusted = TrustedStore(
            self.layout,
            self.world.anchor.read_bytes(),
            url=f"file://{folder or self.world.root}",
            transport=Transport(stall_timeout_s=5.0),
            wall=time.time() if wall is None else wall,
            synchronised=synchronised,
        )
        trusted.refresh()
        trusted.target_info(TARGET)

    def offline(self, *, wall: float | None = None) -> TrustedStore:
        """Verify what is on disk."""
        trusted = TrustedStore(self.layout, self.world.anchor.read_bytes(), wall=time.time() if wall is None else wall)
        trusted.refresh()
        return trusted

    def cached(self, name: str) -> Path:
        return self.layout.metadata / f"{name}.json"


@pytest.fixture
def world(tmp_path: Path) -> StoreWorld:
    world = StoreWorld(tmp_path)
    world.publish()
    return world


@pytest.fixture
def box(tmp_path: Path, world: StoreWorld) -> Box:
    return Box(tmp_path, world)


def test_a_refresh_remembers_every_role(box: Box) -> None:
    box.refresh()
    floor = FloorFile(box.layout.floors).read()
    assert floor is not None
    assert set(floor.roles) == {"timestamp", "snapshot", "targets", "team-vision"}
    assert abs(floor.timestamp - time.time()) < 3600


def test_the_cached_root_is_a_plain_file(box: Box) -> None:
    box.refresh()
    assert not box.cached("root").is_symlink()
    assert box.cached("root").read_bytes() == box.world.anchor.read_bytes()


@pytest.mark.parametrize("name", ["root", "timestamp", "snapshot", "targets", "team-vision", "root_history/1.root"])
@pytest.mark.parametrize("damage", [b"", b"{}", b"\x00" * 64])
def test_a_torn_cache_file_heals(box: Box, name: str, damage: bytes) -> None:
    box.refresh()
    good = box.cached(name).read_bytes()
    box.cached(name).write_bytes(damage)
    box.refresh()
    assert box.cached(name).read_bytes() == good


def test_a_replay_to_a_torn_cache_meets_the_floor(box: Box) -> None:
    old = box.world.copy("old")
    box.world.stamp(version=int(time.time()) + 10)
    box.refresh()
    for name in ("timestamp", "snapshot"):
        box.cached(name).write_bytes(b"")
    with pytest.raises(RollbackDetectedError):
        box.refresh(folder=old)
    box.refresh()


def test_a_refused_timestamp_is_not_kept(box: Box) -> None:
    old = box.world.copy("old")
    box.world.stamp(version=int(time.time()) + 10)
    box.refresh()
    box.cached("timestamp").unlink()
    with pytest.raises(RollbackDetectedError):
        box.refresh(folder=old)
    assert not box.cached("timestamp").exists()


def test_one_lost_floor_is_no_matter(box: Box) -> None:
    box.refresh()
    box.layout.floors[0].write_bytes(b"?")
    box.layout.floors[1].unlink(missing_ok=True)
    box.refresh()


def test_two_lost_floors_are_rebuilt_from_the_verified_cache(box: Box) -> None:
    old = box.world.copy("old")
    box.world.stamp(version=int(time.time()) + 10)
    box.refresh()
    for path in box.layout.floors:
        path.write_bytes(b"?")
    with pytest.raises(RollbackDetectedError):
        box.refresh(folder=old)
    box.refresh()
    assert FloorFile(box.layout.floors).read() is not None


def test_two_lost_floors_and_a_forged_cache_need_a_person(box: Box) -> None:
    box.refresh()
    for path in box.layout.floors:
        path.write_bytes(b"?")
    raw = json.loads(box.cached("timestamp").read_bytes())
    raw["signed"]["version"] -= 1000
    box.cached("timestamp").write_text(json.dumps(raw))
    with pytest.raises(StateError, match="floor"):
        box.refresh()


def test_a_clock_in_1970_does_not_revive_old_metadata(box: Box) -> None:
    """Freeze attack on a box that lost its clock: the floor of the build refuses what had expired before it."""
    box.world.stamp(age_s=time.time() - BUILD_TIME + 200 * DAY)
    with pytest.raises(ExpiredError):
        box.refresh(wall=0.0)


def test_a_clock_in_1970_works_once_signed_time_is_known(box: Box) -> None:
    box.refresh(wall=0.0)
    floor = FloorFile(box.layout.floors).read()
    assert floor is not None
    assert floor.refreshed >= BUILD_TIME


def test_a_clock_in_2090_accepts_nothing_and_heals(box: Box) -> None:
    box.refresh()
    with pytest.raises(ExpiredError):
        box.refresh(wall=time.time() + 64 * 365 * DAY)
    box.refresh()


def test_a_signature_from_the_future_is_refused_by_a_synchronised_box(box: Box) -> None:
    box.world.stamp(version=int(time.time()) + 10 * DAY)
    with pytest.raises(UntrustedError, match="ahead"):
        box.refresh(synchronised=True)
    assert not box.cached("timestamp").exists()


def test_a_far_future_version_goes_with_the_key_that_signed_it(box: Box) -> None:
    box.world.stamp(version=4_133_980_800, valid_s=100 * 365 * DAY)  # 2101, by a stolen online key
    box.refresh()
    with pytest.raises(ExpiredError):  # trusted time is 2101 now, and all else has expired by then
        box.refresh()
    box.world.rotate_online_key()
    box.refresh()
    floor = FloorFile(box.layout.floors).read()
    assert floor is not None
    assert floor.timestamp < time.time() + DAY


def test_a_team_cannot_sign_for_another(box: Box) -> None:
    trusted = TrustedStore(
        box.layout,
        box.world.anchor.read_bytes(),
        url=box.world.url,
        transport=Transport(stall_timeout_s=5.0),
        wall=time.time(),
    )
    trusted.refresh()
    for path in ("models/audio/tiny/1.0.0.json", "models/vision/tiny/9.9.9.json", "elsewhere.json"):
        with pytest.raises(TargetNotFoundError):
            trusted.target_info(path)


def test_offline_verification_outlives_the_timestamp(box: Box) -> None:
    box.refresh()
    assert box.offline(wall=time.time() + 20 * DAY).target_info(TARGET).length > 0


def test_offline_verification_ends_after_thirty_days(box: Box) -> None:
    box.refresh()
    with pytest.raises(ExpiredError, match="31 days"):
        box.offline(wall=time.time() + 31.5 * DAY)


def test_offline_verification_writes_nothing(box: Box) -> None:
    box.refresh()
    before = {path: path.stat().st_mtime_ns for path in box.layout.root.rglob("*")}
    box.offline()
    assert {path: path.stat().st_mtime_ns for path in box.layout.root.rglob("*")} == before


def test_offline_verification_notices_a_forged_file(box: Box) -> None:
    box.refresh()
    for name in ("timestamp", "snapshot", "targets"):
        good = box.cached(name).read_bytes()
        raw = json.loads(good)
        raw["signed"]["expires"] = "2090-01-01T00:00:00Z"
        box.cached(name).write_text(json.dumps(raw))
        with pytest.raises(AgentError):
            box.offline()
        box.cached(name).write_bytes(good)
    box.offline()


def test_offline_verification_needs_a_refresh_once(box: Box) -> None:
    with pytest.raises(StateError):
        box.offline()


def test_a_refresh_that_was_cut_short_makes_a_box_offline_and_nothing_worse(tmp_path: Path, world: StoreWorld) -> None:
    device = DeviceWorld(tmp_path / "state", world)
    device.fetch("1.0.0")
    world.publish("2.0.0")
    newer = (world.root / "metadata" / "timestamp.json").read_bytes()
    (device.layout.metadata / "timestamp.json").write_bytes(newer)  # and the power went before the snapshot came
    hidden = world.root.rename(world.root.with_name("hidden"))
    with pytest.raises(OfflineError):
        device.fetch("2.0.0")
    with pytest.raises(StateError, match="cut short"):
        device.resolver().local_operators()
    hidden.rename(world.root)
    assert device.fetch("2.0.0").manifest.version == "2.0.0"
