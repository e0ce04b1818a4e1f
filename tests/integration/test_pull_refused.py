"""Bad stores, bad bundles, bad disks: each is refused by name, and what serves is not touched.

Every case starts from a box that serves version 1.0.0 and is then offered something.
"""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import msgspec
import pytest

from agent.bundles.layout import Layout
from agent.config import PolicyConfig
from agent.errors import AgentError
from tests.fakes import bundles
from tests.fakes.device import DeviceWorld
from tests.fakes.store import Fault, StoreServer, StoreWorld, serving

pytestmark = pytest.mark.integration


class Scene:
    """A store behind HTTP and a box that serves version 1.0.0 of it."""

    def __init__(self, folder: Path, world: StoreWorld, server: StoreServer) -> None:
        self.folder = folder
        self.world = world
        self.server = server
        world.publish("1.0.0", bundles.plain_files())
        self.device = DeviceWorld(folder / "state", world, [server.url], stall_timeout_s=1.0, metadata_timeout_s=2.0)
        self.first = Path(self.device.here("fetch", team="vision", name="tiny")["path"])
        active = self.device.state / "active" / "tiny.json"
        active.parent.mkdir()
        active.write_text(json.dumps({"slot": "tiny", "active": {"path": str(self.first)}}))

    def fault(self, part: str, kind: str, value: int = 0) -> None:
        self.server.faults.append(Fault(part=part, kind=kind, value=value))

    def blob_fault(self, kind: str, value: int = 0) -> None:
        """Publish version 2.0.0 and let its largest new chunk fail."""
        old = {path.name for path in self.world.blobs()}
        self.world.publish("2.0.0", bundles.plain_files(weights_seed=2))
        self.fault(next(path.name for path in self.world.blobs() if path.name not in old), kind, value)

    def metadata(self, name: str) -> Path:
        return self.world.root / "metadata" / name


@pytest.fixture
def scene(tmp_path: Path) -> Iterator[Scene]:
    world = StoreWorld(tmp_path)
    with serving(world.root) as server:
        yield Scene(tmp_path, world, server)


def offer(scene: Scene, version: str = "2.0.0", **changes: object) -> None:
    scene.world.publish(version, bundles.plain_files(weights_seed=2), **changes)  # type: ignore[arg-type]


def wrong_signature(scene: Scene) -> None:
    offer(scene)
    path = scene.metadata("timestamp.json")
    raw = json.loads(path.read_bytes())
    raw["signed"]["version"] += 1
    path.write_text(json.dumps(raw))


def changed_team_role(scene: Scene) -> None:
    offer(scene)
    path = max(scene.world.root.glob("metadata/*.team-vision.json"), key=lambda item: int(item.name.split(".")[0]))
    raw = json.loads(path.read_bytes())
    raw["signed"]["targets"] = {}
    path.write_text(json.dumps(raw))


def expired(scene: Scene) -> None:
    offer(scene)
    scene.world.stamp(version=int(scene.world.now()) + 5, valid_s=-60)


def replayed_timestamp(scene: Scene) -> None:
    old = scene.metadata("timestamp.json").read_bytes()
    offer(scene)
    scene.world.stamp(version=int(scene.world.now()) + 60)
    scene.device.here("fetch", team="vision", name="tiny", version="1.0.0")
    scene.metadata("timestamp.json").write_bytes(old)


def replayed_after_losing_the_cache(scene: Scene) -> None:
    replayed_timestamp(scene)
    for name in ("timestamp", "snapshot", "targets", "team-vision"):
        (scene.device.state / "trust" / "tuf" / f"{name}.json").write_bytes(b"")


def both_floors_and_the_cache_unreadable(scene: Scene) -> None:
    scene.device.here("fetch", team="vision", name="tiny", version="1.0.0")
    for path in scene.device.layout.floors:
        path.write_bytes(b"\x00" * 64)
    (scene.device.state / "trust" / "tuf" / "timestamp.json").write_bytes(b"\x00" * 64)


def path_escape(scene: Scene) -> None:
    value = bundles.describe(bundles.plain_files(), version="2.0.0", seq=2_000_000)
    value["files"][0]["path"] = "../../../active/tiny.json"
    scene.world.publish_unchecked(value)


def external_data_escape(scene: Scene) -> None:
    files = bundles.plain_files() | {"fp32/model.onnx": bundles.external_model("../../../../1.0.0/secret")}
    scene.world.publish("2.0.0", files)


def another_models_manifest(scene: Scene) -> None:
    scene.world.publish_unchecked(bundles.describe(bundles.plain_files(), name="other", version="2.0.0", seq=2_000_000))


def no_variant(scene: Scene) -> None:
    value = bundles.describe(bundles.plain_files())
    for variant in value["variants"]:
        variant["device"] = {"kind": "cuda"}
    offer(scene, variants=value["variants"])


def no_handler_code(scene: Scene) -> None:
    files = bundles.plain_files() | {"handler.py": b"class H: ..."}
    scene.world.publish("2.0.0", files, handler={"module": "handler.py", "class": "H"})
    scene.device.policy = PolicyConfig(handler_code="never")


def too_big_for_the_box(scene: Scene) -> None:
    offer(scene)
    scene.device.store = msgspec.structs.replace(scene.device.store, bundle_bytes_max=1000)


def no_space(scene: Scene) -> None:
    offer(scene)
    scene.device.store = msgspec.structs.replace(scene.device.store, disk_reserve_bytes=1 << 60)


def revoked(scene: Scene) -> None:
    offer(scene)
    scene.world.revoke("2.0.0", "wrong labels")


def anchor_missing(scene: Scene) -> None:
    offer(scene)
    scene.device.store = msgspec.structs.replace(scene.device.store, anchor="/nowhere/root.json")


def another_anchor(scene: Scene) -> None:
    other = scene.folder / "other"
    other.mkdir()
    offer(scene)
    scene.device.store = msgspec.structs.replace(scene.device.store, anchor=str(StoreWorld(other).anchor))


def unreachable(scene: Scene) -> None:
    scene.device.store = msgspec.structs.replace(scene.device.store, urls=("http://127.0.0.1:9",))


def no_such_version(scene: Scene) -> None:
    """The store stays as it is."""


CASES: dict[str, tuple[Callable[[Scene], None], str, bool]] = {
    "a flipped byte in a chunk": (lambda s: s.blob_fault("flip"), "chunk_mismatch", False),
    "an endless chunk": (lambda s: s.blob_fault("endless"), "chunk_mismatch", False),
    "a chunk answered 404": (lambda s: s.blob_fault("status", 404), "store_failed", False),
    "a chunk answered 403": (lambda s: s.blob_fault("status", 403), "store_failed", False),
    "a chunk answered 503": (lambda s: s.blob_fault("status", 503), "store_transient", True),
    "a chunk that stalls": (lambda s: s.blob_fault("stall", 1000), "store_transient", True),
    "a chunk always cut": (lambda s: s.blob_fault("cut", 0), "store_transient", True),
    "a timestamp answered 404": (lambda s: s.fault("timestamp", "status", 404), "store_failed", False),
    "a timestamp answered 503": (lambda s: s.fault("timestamp", "status", 503), "store_transient", True),
    "a timestamp that is cut": (lambda s: s.fault("timestamp", "cut", 10), "store_transient", True),
    "a timestamp that drips": (lambda s: s.fault("timestamp", "drip", 10), "store_transient", True),
    "an endless timestamp": (lambda s: s.fault("timestamp", "endless"), "untrusted", False),
    "a server error on the next root": (lambda s: s.fault("2.root", "status", 500), "store_transient", True),
    "a wrong signature": (wrong_signature, "untrusted", False),
    "another model's manifest": (another_models_manifest, "untrusted", False),
    "a changed team role": (changed_team_role, "untrusted", False),
    "an expired timestamp": (expired, "metadata_expired", False),
    "a replayed timestamp": (replayed_timestamp, "rollback_detected", False),
    "a replay to a box whose cache was lost": (replayed_after_losing_the_cache, "rollback_detected", False),
    "floors and cache both unreadable": (both_floors_and_the_cache_unreadable, "bad_state", False),
    "a path escape": (path_escape, "unsafe_bundle", False),
    "external data that leads out": (external_data_escape, "unsafe_bundle", False),
    "no variant for this box": (no_variant, "no_variant", False),
    "handler code where none is allowed": (no_handler_code, "policy_refused", False),
    "a bundle above the box's bound": (too_big_for_the_box, "policy_refused", False),
    "a revoked version": (revoked, "policy_refused", False),
    "no space above the reserve": (no_space, "disk_full", True),
    "no anchor": (anchor_missing, "bad_config", False),
    "another store's anchor": (another_anchor, "untrusted", False),
    "a store that cannot be reached": (unreachable, "offline", True),
    "a version that was never published": (no_such_version, "bundle_not_found", False),
}


@pytest.mark.parametrize(("prepare", "code", "retryable"), CASES.values(), ids=CASES.keys())
def test_refused_with_a_code_and_nothing_touched(
    scene: Scene, prepare: Callable[[Scene], None], code: str, retryable: bool
) -> None:
    prepare(scene)
    before = scene.device.serving_bytes()
    with pytest.raises(AgentError) as caught:
        scene.device.fetch("2.0.0")
    assert (caught.value.code, caught.value.retryable) == (code, retryable), str(caught.value)
    assert scene.device.serving_bytes() == before
    assert scene.device.here("check", path=str(scene.first))["version"] == "1.0.0"


def test_no_variant_lists_the_reason_of_each(scene: Scene) -> None:
    no_variant(scene)
    with pytest.raises(AgentError) as caught:
        scene.device.fetch()
    assert "cpu-fp32: needs cuda" in str(caught.value)
    assert "cpu-int8: needs cuda" in str(caught.value)


def test_refused_content_leaves_nothing_to_resume(scene: Scene) -> None:
    external_data_escape(scene)
    with pytest.raises(AgentError):
        scene.device.fetch()
    assert not list(Layout(scene.device.state).staging.iterdir())


def tamper_append(path: Path) -> None:
    with (path / "classes.txt").open("ab") as file:
        file.write(b"!")


def tamper_flip(path: Path) -> None:
    with (path / "fp32" / "model.onnx.data").open("r+b") as file:
        file.seek(500_000)
        byte = file.read(1)
        file.seek(500_000)
        file.write(bytes([byte[0] ^ 1]))


def tamper_extra(path: Path) -> None:
    (path / "fp32" / "extra.onnx").write_bytes(b"x")


def tamper_missing(path: Path) -> None:
    (path / "classes.txt").unlink()


def tamper_link(path: Path) -> None:
    (path / "classes.txt").unlink()
    (path / "classes.txt").symlink_to("/etc/passwd")


def tamper_manifest(path: Path) -> None:
    manifest = path / "manifest.json"
    manifest.write_bytes(manifest.read_bytes().replace(b'"priority":20', b'"priority":1'))


def tamper_record(path: Path) -> None:
    (path / "VERIFIED.json").write_bytes(b"{")


@pytest.mark.parametrize(
    ("tamper", "code"),
    [
        (tamper_append, "untrusted"),
        (tamper_flip, "untrusted"),
        (tamper_extra, "unsafe_bundle"),
        (tamper_missing, "unsafe_bundle"),
        (tamper_link, "unsafe_bundle"),
        (tamper_manifest, "untrusted"),
        (tamper_record, "bad_state"),
    ],
)
def test_check_finds_a_tampered_version_and_a_fetch_heals_it(
    scene: Scene, tamper: Callable[[Path], None], code: str
) -> None:
    for path in (scene.first, *scene.first.rglob("*")):
        path.chmod(0o755)
    tamper(scene.first)
    with pytest.raises(AgentError) as caught:
        scene.device.check(scene.first)
    assert caught.value.code == code
    scene.device.here("fetch", team="vision", name="tiny", version="1.0.0")
    assert scene.device.here("check", path=str(scene.first))["version"] == "1.0.0"


def test_check_needs_neither_store_nor_fresh_metadata(scene: Scene) -> None:
    scene.world.stamp(version=int(scene.world.now()) + 5, valid_s=-1)
    unreachable(scene)
    assert scene.device.check(scene.first).manifest.version == "1.0.0"


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 4 MiB."""
    if os.geteuid() != 0:
        pytest.skip("mounting a tmpfs needs root")
    mount = tmp_path / "small"
    mount.mkdir()
    outcome = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(mount)], capture_output=True, text=True, check=False
    )
    if outcome.returncode:
        pytest.skip(f"mounting a tmpfs is not allowed here: {outcome.stderr.strip()}")
    try:
        yield mount
    finally:
        subprocess.run(["umount", "-l", str(mount)], check=True)


def test_a_disk_too_small_is_noticed_before_the_first_byte(tmp_path: Path, small_disk: Path) -> None:
    world = StoreWorld(tmp_path)
    world.publish("1.0.0")
    device = DeviceWorld(small_disk / "state", world)
    device.fetch()
    before = device.serving_bytes()
    world.publish("2.0.0", bundles.plain_files(rows=8192, weights_seed=2))
    with pytest.raises(AgentError) as caught:
        device.fetch()
    assert caught.value.code == "disk_full"
    assert device.serving_bytes() == before
    assert not list((device.state / "staging").glob("*/*.part"))


def test_a_disk_that_fills_up_during_the_pull(tmp_path: Path, small_disk: Path) -> None:
    """Another writer takes the space between the first chunk and the last; later the pull goes on."""
    world = StoreWorld(tmp_path)
    world.publish("1.0.0")
    device = DeviceWorld(small_disk / "state", world)
    device.fetch()
    before = device.serving_bytes()
    world.publish("2.0.0", bundles.plain_files(weights_seed=2))
    filler = small_disk / "filler"
    device.lines = Filler(filler)
    with serving(world.root) as server:
        device.store = msgspec.structs.replace(device.store, urls=(server.url,))
        with pytest.raises(AgentError) as caught:
            device.fetch()
        assert caught.value.code == "disk_full", str(caught.value)
        assert device.serving_bytes() == before
        filler.unlink()
        device.lines = []
        fetched = device.fetch()
    assert fetched.manifest.version == "2.0.0"
    assert fetched.bytes_fetched < fetched.manifest.total_size


class Filler(list[dict[str, Any]]):
    """Takes progress lines and fills the disk to the last byte at the first one."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def append(self, line: dict[str, Any]) -> None:
        if self._path.exists():
            return
        with self._path.open("wb", buffering=0) as file:
            for size in (1 << 16, 1 << 12, 1):
                with suppress(OSError):
                    while True:
                        file.write(bytes(size))
