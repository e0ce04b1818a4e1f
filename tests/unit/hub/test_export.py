"""A stick is a complete small store, younger than the device and older than the store it came from."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
from securesystemslib.signer import CryptoSigner
from tuf.api.exceptions import BadVersionNumberError

from agent.errors import ChunkMismatchError, InvalidInputError, TargetNotFoundError
from tests.fakes import bundles
from tests.fakes.hub import Centre, Clock, Reader
from tools.hub.edition import TIMESTAMP
from tools.hub.errors import ConflictError, KeyNotAllowedError, StoreStateError
from tools.hub.export import held_chunks
from tools.hub.gc import collect, plan
from tools.hub.listener import Listener, Unit
from tools.hub.objects import Folder
from tools.hub.verify import Part, verify

pytestmark = pytest.mark.unit
DAY_S = 86_400


@pytest.fixture
def centre(tmp_path: Path) -> Centre:
    """A store with 1.0.0, which ``stable`` points to, and 1.1.0, which shares half of its weights."""
    centre = Centre(tmp_path / "store", Clock(time.time()))
    centre.initialise()
    for version, seq, rows in (("1.0.0", 1, 256), ("1.1.0", 2, 512)):
        files = bundles.plain_files(rows=rows)
        bundle = bundles.pack(tmp_path / f"bundle-{version}", files, version=version, seq=seq)
        centre.publish(bundle, *(["stable"] if seq == 1 else []))
    return centre


@pytest.fixture
def stick(tmp_path: Path) -> Folder:
    return Folder(tmp_path / "stick")


def signed(root: Path) -> dict[str, object]:
    value: dict[str, object] = json.loads((root / TIMESTAMP).read_bytes())["signed"]
    return value


def test_a_stick_stands_alone(centre: Centre, stick: Folder) -> None:
    done = centre.export(stick, "1.1.0")
    centre.root.rename(centre.root.with_name("gone"))
    found = verify(str(stick.root), centre.anchor, deep=True, parts=[Part("vision", "tiny", "1.1.0")])
    assert (found.blobs, found.bytes) == (done.blobs, done.bytes) == (done.blobs_new, done.bytes_new)
    assert found.operators == 1
    assert found.models == [{"team": "vision", "name": "tiny", "channels": {"stable": "1.0.0"}, "versions": ["1.1.0"]}]
    with pytest.raises(TargetNotFoundError):
        verify(str(stick.root), centre.anchor, deep=False)  # 1.0.0 stayed at home


def test_without_a_version_the_channel_names_it(centre: Centre, stick: Folder) -> None:
    assert centre.export(stick).models[0]["version"] == "1.0.0"
    centre.revoke("1.0.0", drop_channels=True)
    with pytest.raises(TargetNotFoundError, match="no channel 'stable'"):
        centre.export(stick)


def test_the_store_is_stamped_one_second_after_the_stick_and_lives_as_long_as_before(
    centre: Centre, stick: Folder
) -> None:
    done = centre.export(stick, valid_days=90)
    assert signed(stick.root)["version"] == done.issued
    assert signed(centre.root)["version"] == done.issued + 1
    assert done.expires.timestamp() == pytest.approx(centre.clock() + 90 * DAY_S, abs=2)  # so the snapshot was renewed
    assert str(signed(centre.root)["expires"]) < str(signed(stick.root)["expires"])


def test_a_box_fed_by_the_stick_goes_on_with_the_store_and_not_back(
    centre: Centre, stick: Folder, tmp_path: Path
) -> None:
    centre.export(stick)
    reader = Reader(centre.anchor, tmp_path / "device")
    assert reader.look(stick.root) == reader.look(centre.root)
    with pytest.raises(BadVersionNumberError):
        reader.look(stick.root)


def test_what_the_boxes_hold_is_left_out(centre: Centre, stick: Folder, tmp_path: Path) -> None:
    held = held_chunks(tmp_path / "bundle-1.0.0")
    done = centre.export(stick, "1.1.0", held=held)
    assert done.blobs_left_out > 0
    assert done.blobs_new == done.blobs - done.blobs_left_out
    assert done.bytes_new < done.bytes
    part = [Part("vision", "tiny", "1.1.0")]
    verify(str(stick.root), centre.anchor, deep=True, parts=part, held=held)
    with pytest.raises(TargetNotFoundError, match="blob is missing"):
        verify(str(stick.root), centre.anchor, deep=False, parts=part)
    assert json.loads((stick.root / "store.json").read_bytes())["export"]["complete"] is False


def test_a_version_folder_says_which_files_the_box_really_has(tmp_path: Path) -> None:
    bundle = bundles.pack(tmp_path / "version", bundles.plain_files())
    record = {
        "schema": "inferd-verified/1", "team": "vision", "name": "tiny", "version": "1.0.0", "seq": 1,
        "manifest_sha256": bundle.sha256, "files": ["int8/model.onnx"], "timestamp": 1, "verified": 1,
    }  # fmt: skip
    assert len(held_chunks(tmp_path / "version")) > 1
    (tmp_path / "version/VERIFIED.json").write_text(json.dumps(record))
    assert len(held_chunks(tmp_path / "version")) == len(held_chunks(tmp_path / "version/manifest.json")) == 1
    with pytest.raises(InvalidInputError, match="--have"):
        held_chunks(tmp_path / "nowhere")


def test_an_older_export_is_brought_up_to_date_and_heals(centre: Centre, stick: Folder) -> None:
    centre.export(stick)
    blob = max((path for path in (stick.root / "blobs").rglob("*") if path.is_file()), key=lambda p: p.stat().st_size)
    blob.write_bytes(blob.read_bytes()[:100])
    done = centre.export(stick)
    assert done.blobs_new == 1
    parts = [Part("vision", "tiny", "1.0.0")]
    verify(str(stick.root), centre.anchor, deep=True, parts=parts)
    data = bytearray(blob.read_bytes())
    data[0] ^= 1
    blob.write_bytes(data)
    with pytest.raises(ChunkMismatchError):
        verify(str(stick.root), centre.anchor, deep=True, parts=parts)


def test_what_expires_before_the_stick_is_named(tmp_path: Path, stick: Folder) -> None:
    clock = Clock(time.time() - 100 * DAY_S)
    centre = Centre(tmp_path / "old", clock)
    centre.initialise()
    centre.publish(bundles.pack(tmp_path / "bundle", bundles.plain_files(rows=16)), "stable")
    clock.seconds += 100 * DAY_S
    done = centre.export(stick, valid_days=90)
    assert done.expires_role == "team-vision"
    assert done.expires.timestamp() == pytest.approx(clock() + 80 * DAY_S, abs=2)


def test_a_refused_export_writes_nothing(centre: Centre, stick: Folder, tmp_path: Path) -> None:
    before = (centre.root / TIMESTAMP).read_bytes()
    centre_of_another = Centre(tmp_path / "other", centre.clock)
    centre_of_another.initialise()
    for attempt, error in (
        (lambda: centre.export(stick, "7.0.0"), TargetNotFoundError),
        (lambda: centre.export(stick, valid_days=91), InvalidInputError),
        (lambda: centre.export(stick, valid_days=0), InvalidInputError),
        (lambda: centre.export(Folder(centre_of_another.root)), ConflictError),
    ):
        with pytest.raises(error):
            attempt()
    centre.online = CryptoSigner.generate_ed25519()
    with pytest.raises(KeyNotAllowedError):
        centre.export(stick)
    assert (centre.root / TIMESTAMP).read_bytes() == before
    assert not stick.root.exists()


def test_a_revoked_version_leaves_the_house_no_more(centre: Centre, stick: Folder) -> None:
    centre.revoke("1.0.0", replacement="1.1.0")
    with pytest.raises(ConflictError, match="revoked"):
        centre.export(stick, "1.0.0")
    assert centre.export(stick).models[0]["version"] == "1.1.0"


def test_a_damaged_blob_is_not_passed_on(centre: Centre, stick: Folder) -> None:
    blob = next(path for path in (centre.root / "blobs").rglob("*") if path.is_file())
    blob.write_bytes(b"?" * blob.stat().st_size)
    with pytest.raises(StoreStateError, match="damaged"):
        centre.export(stick, "1.0.0", "1.1.0")
    assert not (stick.root / TIMESTAMP).exists()


class Counted(Listener):
    """Keeps what it is told: each stage's total, and how far it came."""

    def __init__(self) -> None:
        self.stages: dict[str, list[int]] = {}
        self._now: list[int] = []

    def stage(self, title: str, total: int, unit: Unit) -> None:
        self._now = self.stages[title] = [0, total]

    def advance(self, amount: int) -> None:
        self._now[0] += amount


def test_long_work_says_how_far_it_is(centre: Centre, stick: Folder) -> None:
    told = Counted()
    done = centre.export(stick, "1.0.0", "1.1.0", listener=told)
    verify(str(stick.root), centre.anchor, deep=True, listener=told)
    collect(stick, plan(stick, centre.repository(stick).state(), now=centre.clock(), grace_days=0, listener=told), told)
    assert told.stages["copy"] == [done.bytes, done.bytes]
    assert told.stages["verify blobs"] == [done.bytes, done.bytes]
    assert all(reached == total for reached, total in told.stages.values())
    assert set(told.stages) == {"copy", "verify blobs", "read manifests", "remove"}
