"""The attack table: each row is an attack, and what a box says to it.

Every row meets a box that serves version 1.0.0 and is told to deploy 2.0.0: the daemon's own reconciler, journal and
pointers, the puller and all of the trust child's code, a real store over HTTP whose keys the attacker has as far as the
row says. Refused means: that code and those words, nothing that serves touched, no version floor lower than before, and
a ``security`` event that names code, team, model and version.
"""

from __future__ import annotations

import asyncio
import json
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import msgspec
import pytest
from securesystemslib.signer import CryptoSigner

from agent.bundles.floor import FloorFile
from agent.bundles.layout import Layout
from agent.config import PolicyConfig, StoreConfig
from agent.deploy.state import Record, State
from agent.errors import AgentError
from tests.fakes import bundles
from tests.fakes.device import HARDWARE, PROFILE
from tests.fakes.reboot import InlinePuller, Reboot
from tests.fakes.store import Fault, StoreServer, StoreWorld, serving
from tests.fakes.thief import Thief, lists

pytestmark = pytest.mark.integration

PAST = datetime.now(UTC).replace(microsecond=0) - timedelta(days=1)
INDEX = "models/vision/tiny/index.json"
MANIFEST = "models/vision/tiny/2.0.0.json"


class Scene:
    """A store with version 1.0.0, a box that serves it, and a thief."""

    def __init__(self, folder: Path, server: StoreServer, world: StoreWorld) -> None:
        self.state = folder / "state"
        self.state.mkdir(mode=0o700)
        self.server = server
        self.world = world
        self.thief = Thief(world)
        self.wall: Callable[[], float] = time.time
        self.published: dict[str, dict[str, str]] = {}
        self.offer("1.0.0", seed=1)
        self.store = StoreConfig(
            urls=(server.url,),
            anchor=str(world.anchor),
            disk_reserve_bytes=0,
            stall_timeout_s=10.0,
            metadata_timeout_s=20.0,
            tries=2,
        )

    def offer(self, version: str = "2.0.0", *, seed: int = 2, **changes: Any) -> None:
        """Publish a version as the team would."""
        packed = self.world.publish(version, changes.pop("files", None) or _files(seed), **changes)
        self.published[version] = {item.path: item.sha256 for item in packed.manifest.files}

    def fault(self, part: str, kind: str, value: int = 0) -> None:
        """Let every request for a path with ``part`` in it go wrong."""
        self.server.faults.append(Fault(part=part, kind=kind, value=value))

    def new_chunk(self) -> Path:
        """Publish version 2.0.0; return the largest chunk that only it has."""
        old = {path.name for path in self.world.blobs()}
        self.offer()
        return next(path for path in self.world.blobs() if path.name not in old)

    def use(self, *urls: str) -> None:
        """Let the box ask these stores, in this order."""
        self.store = msgspec.structs.replace(self.store, urls=urls)

    def refresh(self) -> None:
        """Let the box see the store as it is now."""
        asyncio.run(self.puller().resolve("vision", "tiny", "1.0.0", ""))

    def puller(self) -> InlinePuller:
        return InlinePuller(self.store, PolicyConfig(), self.state, HARDWARE, PROFILE, wall=lambda: self.wall())

    def box(self) -> Reboot:
        return Reboot(self.state, self.puller(), self.published)

    def deploy(self, version: str) -> tuple[Record, Reboot]:
        """Boot, deploy ``version`` to its end and stop."""

        async def live() -> Record:
            async with box.running():
                return await box.deploy(version)

        box = self.box()
        return asyncio.run(live()), box

    def serving(self) -> dict[str, bytes]:
        """Return everything the box serves from: version folders and pointers."""
        folders = (self.state / "versions", self.state / "active")
        return {str(path): path.read_bytes() for folder in folders for path in folder.rglob("*") if path.is_file()}

    def floors(self) -> dict[str, int]:
        floor = FloorFile(Layout(self.state).floors).read()
        return dict(floor.roles) if floor is not None else {}

    def forget(self, *roles: str) -> None:
        """Tear the box's cached metadata, as a power cut could on a disk that lies."""
        for role in roles:
            (self.state / "trust" / "tuf" / f"{role}.json").write_bytes(b"")


def _files(seed: int) -> dict[str, bytes]:
    return bundles.plain_files(rows=96, weights_seed=seed)


@pytest.fixture
def scene(memory_path: Path) -> Iterator[Scene]:
    world = StoreWorld(memory_path)
    with serving(world.root) as server:
        scene = Scene(memory_path, server, world)
        record, _ = scene.deploy("1.0.0")
        assert record.state is State.CONFIRMED, record
        yield scene


# The attacks, in the order of the table


def old_timestamp(scene: Scene) -> None:
    old = scene.thief.path("timestamp").read_bytes()
    scene.offer()
    scene.refresh()
    scene.thief.path("timestamp").write_bytes(old)


def older_snapshot(scene: Scene) -> None:
    """With the stolen online key: a new timestamp that names an old snapshot."""
    old = scene.thief.version("snapshot")
    scene.offer()
    scene.refresh()
    scene.thief.timestamp(lambda signed: setattr(signed, "snapshot_meta", scene.thief.meta("snapshot", old)))


def older_targets(scene: Scene) -> None:
    """With the stolen online key: a new snapshot that names an old team role."""
    old = scene.thief.version("team-vision")
    scene.offer()
    scene.refresh()
    scene.thief.snapshot(lambda signed: signed.meta.update({"team-vision.json": scene.thief.meta("team-vision", old)}))


def dropped_role(scene: Scene) -> None:
    scene.offer()
    scene.refresh()
    scene.thief.snapshot(lambda signed: signed.meta.pop("team-vision.json"))


def _expire(signed: Any) -> None:
    signed.expires = PAST


def expired_timestamp(scene: Scene) -> None:
    scene.offer()
    scene.thief.timestamp(_expire)


def expired_snapshot(scene: Scene) -> None:
    scene.offer()
    scene.thief.snapshot(_expire)


def expired_targets(scene: Scene) -> None:
    scene.offer()
    scene.thief.targets(_expire)


def expired_team_role(scene: Scene) -> None:
    scene.offer()
    scene.thief.team("vision", _expire)


def expired_root(scene: Scene) -> None:
    scene.offer()
    scene.thief.next_root(_expire, scene.world.root_signers[:2])


def old_role_under_the_new_name(scene: Scene) -> None:
    old = scene.thief.path("team-vision").read_bytes()
    scene.offer()
    scene.thief.path("team-vision").write_bytes(old)


def old_snapshot_under_the_new_name(scene: Scene) -> None:
    old = scene.thief.path("snapshot").read_bytes()
    scene.offer()
    scene.thief.path("snapshot").write_bytes(old)


def old_role_under_the_new_name_without_hashes(scene: Scene) -> None:
    old = scene.thief.path("team-vision").read_bytes()
    scene.offer()
    new = scene.thief.meta("team-vision", scene.thief.version("team-vision"), hashes=False)
    scene.thief.snapshot(lambda signed: signed.meta.update({"team-vision.json": new}))
    scene.thief.path("team-vision").write_bytes(old)


def altered(scene: Scene) -> None:
    scene.offer()
    scene.thief.edit("timestamp", lambda signed: setattr(signed, "version", signed.version + 1))


def unsigned(scene: Scene) -> None:
    scene.offer()
    path = scene.thief.path("timestamp")
    path.write_bytes(json.dumps(json.loads(path.read_bytes()) | {"signatures": []}).encode())


def wrong_key(scene: Scene) -> None:
    scene.offer()
    scene.thief.edit("timestamp", lambda signed: None, CryptoSigner.generate_ed25519())


def root_signed_by_one_of_two(scene: Scene) -> None:
    scene.offer()
    scene.thief.next_root(lambda signed: None, scene.world.root_signers[:1])


def root_signed_by_a_revoked_key(scene: Scene) -> None:
    scene.offer()
    revoked, kept, third = scene.world.root_signers
    scene.thief.next_root(lambda signed: signed.revoke_key(revoked.public_key.keyid, "root"), [kept, third])
    scene.thief.next_root(lambda signed: None, [revoked, kept])


def skipped_root(scene: Scene) -> None:
    """Version 5 served as version 3."""
    scene.offer()
    signers = scene.world.root_signers[:2]
    scene.thief.next_root(lambda signed: None, signers)
    scene.thief.next_root(lambda signed: setattr(signed, "version", 5), signers, stored_as=3)


def another_teams_path(scene: Scene) -> None:
    """Team audio signs what belongs to vision; an index that names it is no help."""
    scene.offer()
    manifest = next((scene.world.root / "targets/models/vision/tiny").glob("*.2.0.0.json")).read_bytes()
    scene.world.publish("1.0.0", _files(3), team="audio", name="tiny")
    scene.thief.team("vision", lambda signed: signed.targets.pop(MANIFEST))
    scene.thief.team("audio", lists(MANIFEST, manifest))


def wrong_type(scene: Scene) -> None:
    scene.offer()
    scene.thief.path("timestamp").write_bytes(scene.thief.path("snapshot").read_bytes())


def truncated_json(scene: Scene) -> None:
    scene.offer()
    path = scene.thief.path("timestamp")
    path.write_bytes(path.read_bytes()[:200])


def nested_json(scene: Scene) -> None:
    scene.offer()
    scene.thief.path("timestamp").write_bytes(b"[" * 16_000)


def next_specification(scene: Scene) -> None:
    scene.offer()
    scene.thief.edit("timestamp", lambda signed: setattr(signed, "spec_version", "2.0.0"), scene.world.online)


def endless(part: str) -> Callable[[Scene], None]:
    def attack(scene: Scene) -> None:
        scene.offer()
        if part == "2.root":
            scene.thief.next_root(lambda signed: None, scene.world.root_signers[:2])
        scene.fault(part, "endless")

    return attack


def target_file(kind: str) -> Callable[[Scene], None]:
    def attack(scene: Scene) -> None:
        scene.offer()
        path = next((scene.world.root / "targets/models/vision/tiny").glob("*.2.0.0.json"))
        data = path.read_bytes()
        if kind == "wrong":
            path.write_bytes(data.replace(b'"cpu-int8"', b'"cpu-fp16"'))
        elif kind == "short":
            path.write_bytes(data[:-1])
        elif kind == "long":
            path.write_bytes(data + b" ")
        else:
            path.unlink()

    return attack


def bad_link(part: str, kind: str, value: int = 0) -> Callable[[Scene], None]:
    def attack(scene: Scene) -> None:
        chunk = scene.new_chunk().name
        scene.fault(part or chunk, kind, value)
        if kind in ("stall", "drip"):
            scene.store = msgspec.structs.replace(scene.store, stall_timeout_s=0.3, metadata_timeout_s=0.6)

    return attack


def flipped_chunk(scene: Scene) -> None:
    scene.fault(scene.new_chunk().name, "flip")


def oversize_chunk(scene: Scene) -> None:
    scene.fault(scene.new_chunk().name, "endless")


def swapped_chunk(scene: Scene) -> None:
    other = scene.world.blobs()[0].read_bytes()
    scene.new_chunk().write_bytes(other)


def replay_to_a_torn_cache(scene: Scene) -> None:
    old_timestamp(scene)
    scene.forget("timestamp", "snapshot", "targets", "team-vision")


def replay_at_1970(scene: Scene) -> None:
    replay_to_a_torn_cache(scene)
    scene.wall = lambda: 0.0


def frozen_store_at_1970(scene: Scene) -> None:
    """The box has lost its clock, and is kept from news by metadata that ran out since it last looked."""
    scene.offer()
    scene.thief.timestamp(
        lambda signed: setattr(signed, "expires", datetime.fromtimestamp(scene.floors()["timestamp"] - 1, UTC))
    )
    scene.wall = lambda: 0.0


def unsafe_path(scene: Scene) -> None:
    value = bundles.describe(_files(2), version="2.0.0", seq=2_000_000)
    value["files"][0]["path"] = "../../../../active/tiny.json"
    scene.world.publish_unchecked(value)


def external_data_escape(scene: Scene) -> None:
    scene.offer(files=_files(2) | {"fp32/model.onnx": bundles.external_model("../../1.0.0/secret", rows=96)})


def pickle_by_name(scene: Scene) -> None:
    value = bundles.describe(_files(2) | {"weights.pkl": b"\x80\x04\x95."}, version="2.0.0", seq=2_000_000)
    scene.world.publish_unchecked(value)


def pickle_in_disguise(scene: Scene) -> None:
    scene.offer(files=_files(2) | {"notes.bin": b"\x80\x04\x95\x0a\x00\x00\x00\x00\x00\x00\x00\x8c\x02os\x94."})


@dataclass(frozen=True)
class Row:
    """``refused``: the store gave something wrong, hence a security event; otherwise it gave too little."""

    attack: Callable[[Scene], None]
    code: str
    words: str
    refused: bool = True


TABLE: dict[str, Row] = {
    "an old timestamp replayed": Row(old_timestamp, "rollback_detected", "New timestamp version"),
    "stolen online key: an older snapshot": Row(older_snapshot, "rollback_detected", "New snapshot version"),
    "stolen online key: an older team role": Row(older_targets, "rollback_detected", "team-vision.json version"),
    "stolen online key: a role dropped": Row(dropped_role, "untrusted", "missing info for 'team-vision.json'"),
    "expired timestamp": Row(expired_timestamp, "metadata_expired", "timestamp.json is expired"),
    "expired snapshot": Row(expired_snapshot, "metadata_expired", "snapshot.json is expired"),
    "expired targets": Row(expired_targets, "metadata_expired", "targets is expired"),
    "expired team role": Row(expired_team_role, "metadata_expired", "team-vision is expired"),
    "expired final root": Row(expired_root, "metadata_expired", "root.json is expired"),
    "mix and match: an old role": Row(old_role_under_the_new_name, "untrusted", "length|hash"),
    "mix and match: an old snapshot": Row(old_snapshot_under_the_new_name, "untrusted", "length|hash"),
    "mix and match: an old role, no hashes": Row(
        old_role_under_the_new_name_without_hashes, "rollback_detected", "Expected team-vision v"
    ),
    "altered metadata": Row(altered, "untrusted", "signed by 0/1 keys"),
    "unsigned metadata": Row(unsigned, "untrusted", "signed by 0/1 keys"),
    "the wrong key": Row(wrong_key, "untrusted", "signed by 0/1 keys"),
    "a root with one of two signatures": Row(root_signed_by_one_of_two, "untrusted", "signed by 1/2 keys"),
    "a root signed by a revoked key": Row(root_signed_by_a_revoked_key, "untrusted", "signed by 1/2 keys"),
    "a skipped root version": Row(skipped_root, "rollback_detected", "Expected root version 3"),
    "a team signs for another": Row(another_teams_path, "bundle_not_found", "its team may not sign it"),
    "metadata of the wrong type": Row(wrong_type, "untrusted", "timestamp"),
    "truncated JSON": Row(truncated_json, "untrusted", "deserialize"),
    "16,000 nested brackets": Row(nested_json, "untrusted", "deserialize|nested"),
    "specification 2.0": Row(next_specification, "untrusted", "deserialize"),
    "an endless timestamp": Row(endless("timestamp"), "untrusted", "more than the [0-9]+ bytes"),
    "an endless snapshot": Row(endless("snapshot"), "untrusted", "more than the [0-9]+ bytes"),
    "an endless root": Row(endless("2.root"), "untrusted", "more than the [0-9]+ bytes"),
    "an endless target": Row(endless("2.0.0.json"), "untrusted", "more than the [0-9]+ bytes"),
    "a target with wrong bytes": Row(target_file("wrong"), "untrusted", "hash"),
    "a target too short": Row(target_file("short"), "untrusted", "length"),
    "a target too long": Row(target_file("long"), "untrusted", "more than the [0-9]+ bytes"),
    "a target missing": Row(target_file("missing"), "store_failed", "404", refused=False),
    "a server that stalls": Row(bad_link("timestamp", "stall", 10), "store_transient", "", refused=False),
    "a server that drips": Row(bad_link("timestamp", "drip", 10), "store_transient", "", refused=False),
    "a stream that is cut": Row(
        bad_link("timestamp", "cut", 10), "store_transient", "IncompleteRead|cut", refused=False
    ),
    "a server that answers 503": Row(bad_link("timestamp", "status", 503), "store_transient", "503", refused=False),
    "a chunk that stalls": Row(bad_link("", "stall", 1000), "store_transient", "", refused=False),
    "a chunk that is cut": Row(bad_link("", "cut", 0), "store_transient", "IncompleteRead|cut", refused=False),
    "a flipped chunk": Row(flipped_chunk, "chunk_mismatch", "differ from the signed hash"),
    "an oversize chunk": Row(oversize_chunk, "chunk_mismatch", "more than the signed"),
    "a swapped chunk": Row(swapped_chunk, "chunk_mismatch", ""),
    "a replay to a torn cache": Row(replay_to_a_torn_cache, "rollback_detected", "was verified before"),
    "a replay to a torn cache, clock at 1970": Row(replay_at_1970, "rollback_detected", "was verified before"),
    "a frozen store, clock at 1970": Row(frozen_store_at_1970, "metadata_expired", "timestamp.json is expired"),
    "an unsafe path": Row(unsafe_path, "unsafe_bundle", "not a plain file name"),
    "external data that leads out": Row(external_data_escape, "unsafe_bundle", "external data"),
    "a pickle by its name": Row(pickle_by_name, "unsafe_bundle", "may run code"),
    "a pickle in disguise": Row(pickle_in_disguise, "unsafe_bundle", "is a pickle"),
}


@pytest.mark.parametrize("row", TABLE.values(), ids=TABLE.keys())
def test_an_attack_is_refused_by_name_and_touches_nothing_that_serves(scene: Scene, row: Row) -> None:
    row.attack(scene)
    before, floors = scene.serving(), scene.floors()
    if row.refused:
        record, box = scene.deploy("2.0.0")
        assert (record.state, record.code) == (State.REJECTED, row.code), record
        message = record.message
        assert box.serving() == "1.0.0"
        events = [event for event in box.heard("security") if event.get("version") == "2.0.0"]
        assert {(event["code"], event["team"], event["name"]) for event in events} == {(row.code, "vision", "tiny")}
        assert message in [event["message"] for event in events]
    else:
        with pytest.raises(AgentError) as caught:
            asyncio.run(scene.puller().fetch("vision", "tiny", "2.0.0", ""))
        assert caught.value.code == row.code, caught.value
        message = str(caught.value)
    assert re.search(row.words, message), message
    assert scene.serving() == before
    after = scene.floors()
    assert all(after.get(role, 0) >= version for role, version in floors.items()), (floors, after)


def test_a_fast_forward_is_undone_by_rotating_the_key_that_made_it(scene: Scene) -> None:
    """The one attack that is taken in: a stolen key may date a timestamp ahead, and locks out its owner until then."""
    ahead = int(time.time()) + 20 * 3600
    owners = scene.thief.path("timestamp").read_bytes()
    scene.world.stamp(version=ahead)
    scene.refresh()
    assert scene.floors()["timestamp"] == ahead
    scene.thief.path("timestamp").write_bytes(owners)
    scene.offer()
    before = scene.serving()
    record, box = scene.deploy("2.0.0")
    assert (record.state, record.code) == (State.REJECTED, "rollback_detected")
    assert box.heard("bundle.refused")[0]["code"] == "rollback_detected"
    assert scene.serving() == before

    scene.world.rotate_online_key()
    scene.offer("2.1.0", seed=3)
    record, _ = scene.deploy("2.1.0")
    assert record.state is State.CONFIRMED
    assert scene.floors()["timestamp"] < ahead


@pytest.mark.parametrize("fault", ["flip", "endless"])
def test_a_bad_chunk_is_tried_so_often_at_each_source_and_then_refused(scene: Scene, fault: str) -> None:
    chunk = scene.new_chunk().name
    scene.fault(chunk, fault)
    with serving(scene.world.root) as second:
        second.faults = [Fault(part=chunk, kind=fault)]
        scene.use(scene.server.url, second.url)
        record, _ = scene.deploy("2.0.0")
        assert (record.state, record.code) == (State.REJECTED, "chunk_mismatch")
        for server in (scene.server, second):
            assert sum(chunk in path for path, _ in server.requests) == scene.store.tries

        second.faults = []
        scene.offer("2.1.0", seed=2)
        record, _ = scene.deploy("2.1.0")
        assert record.state is State.CONFIRMED, "another source has it whole"


def extra_file(version: Path) -> None:
    (version / "fp32" / "extra.onnx").write_bytes(b"x")


def link(version: Path) -> None:
    (version / "classes.txt").unlink()
    (version / "classes.txt").symlink_to("/etc/passwd")


def second_name(version: Path) -> None:
    (version.parent.parent / "held").hardlink_to(version / "fp32" / "model.onnx.data")


def changed_byte(version: Path) -> None:
    path = version / "fp32" / "model.onnx.data"
    path.write_bytes(path.read_bytes()[:-1] + b"!")


@pytest.mark.parametrize(
    ("attack", "code"),
    [
        (extra_file, "unsafe_bundle"),
        (link, "unsafe_bundle"),
        (second_name, "unsafe_bundle"),
        (changed_byte, "untrusted"),
    ],
)
def test_what_is_tampered_with_on_disk_is_not_served_again(
    scene: Scene, attack: Callable[[Path], None], code: str
) -> None:
    scene.offer()
    scene.deploy("2.0.0")
    (version,) = (scene.state / "versions/vision/tiny").glob("2.0.0~*")
    for path in (version, *version.rglob("*")):
        path.chmod(0o755)
    attack(version)

    async def boot() -> str:
        async with box.running():
            return box.serving()

    box = scene.box()
    assert asyncio.run(boot()) == "1.0.0"
    (event,) = box.heard("bundle.refused")
    assert (event["code"], event["name"], event["version"]) == (code, "tiny", "2.0.0")
