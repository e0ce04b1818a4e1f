"""The store lets go of what nothing names, and of nothing else."""

from __future__ import annotations

import os
import time
from itertools import count
from pathlib import Path

import pytest

from tests.fakes import bundles
from tests.fakes.hub import Centre, Clock, FailingFolder, PowerCutError
from tools.hub.errors import StoreStateError
from tools.hub.gc import Plan, collect, plan
from tools.hub.objects import Folder
from tools.hub.verify import verify

pytestmark = pytest.mark.unit
DAY_S = 86_400


@pytest.fixture
def centre(tmp_path: Path) -> Centre:
    """A store with two versions, both current, and a team that is about to leave."""
    centre = Centre(tmp_path / "store", Clock(time.time()))
    centre.initialise()
    for version, seq in (("1.0.0", 1), ("1.1.0", 2)):
        files = bundles.plain_files(weights_seed=seq, rows=16)
        centre.publish(bundles.pack(tmp_path / version, files, version=version, seq=seq), "stable")
    return centre


def age(centre: Centre, days: float) -> None:
    """Make every file so much older."""
    for path in centre.root.rglob("*"):
        facts = path.stat()
        os.utime(path, (facts.st_atime - days * DAY_S, facts.st_mtime - days * DAY_S))


def found(centre: Centre, grace_days: int = 90, objects: Folder | None = None) -> Plan:
    objects = objects or Folder(centre.root)
    return plan(objects, centre.repository(objects).state(), now=centre.clock(), grace_days=grace_days)


def retire(centre: Centre) -> None:
    repository = centre.repository()
    edition = repository.edition(repository.state())
    edition.retire_team("vision", centre.targets)
    edition.sign_top(centre.targets)
    edition.seal(centre.online)
    edition.write()


def test_what_the_store_offers_stays_however_old_it_is(centre: Centre) -> None:
    age(centre, 1000)
    centre.revoke("1.0.0")
    age(centre, 89)
    assert found(centre).blobs == ()
    collect(Folder(centre.root), found(centre))
    assert verify(str(centre.root), centre.anchor, deep=True).manifests == 2


def test_blobs_of_a_retired_team_go_after_the_grace_time(centre: Centre) -> None:
    age(centre, 200)
    retire(centre)
    age(centre, 30)
    assert found(centre).blobs == ()  # whoever began a pull can end it
    impatient = found(centre, grace_days=20)
    assert len(impatient.blobs) > 0
    assert impatient.targets == found(centre).targets  # manifests stay with the metadata that names them
    age(centre, 61)
    doomed = found(centre)
    assert len(doomed.blobs) == sum(path.is_file() for path in (centre.root / "blobs").rglob("*"))
    assert doomed.blobs_kept == 0
    collect(Folder(centre.root), doomed)
    assert not [path for path in (centre.root / "blobs").rglob("*") if path.is_file()]
    assert verify(str(centre.root), centre.anchor, deep=True).models == []
    assert found(centre).all() == ()


def test_superseded_metadata_goes_by_the_age_of_what_came_after_it(centre: Centre) -> None:
    age(centre, 200)
    centre.revoke("1.0.0")
    names = {path.name for path in (centre.root / "metadata").iterdir()}
    doomed = {item.name.rpartition("/")[2] for item in found(centre, grace_days=0).metadata}
    assert doomed == {"1.snapshot.json", "2.snapshot.json", "1.team-vision.json"}  # 3 and 2 were in force until now
    assert {"1.root.json", "timestamp.json", "1.targets.json"} <= names - doomed
    collect(Folder(centre.root), found(centre))
    verify(str(centre.root), centre.anchor, deep=True)


def test_an_upload_that_was_cut_is_spared_for_its_repetition(centre: Centre, tmp_path: Path) -> None:
    files = bundles.plain_files(weights_seed=3, rows=16)
    new = bundles.pack(tmp_path / "1.2.0", files, version="1.2.0", seq=3)
    with pytest.raises(PowerCutError):
        centre.publish(new, objects=FailingFolder(centre.root, left=3))
    half = centre.root / "blobs/sha256/aa/.half.1.tmp"
    half.parent.mkdir(exist_ok=True)
    half.write_bytes(b"half")
    assert found(centre).all() == ()
    age(centre, 91)
    doomed = found(centre)
    assert {item.name for item in doomed.cut} == {"blobs/sha256/aa/.half.1.tmp"}
    assert len(doomed.blobs) == 1
    assert len(doomed.targets) == 3  # manifest and index of the cut attempt, and the index before the one in force
    collect(Folder(centre.root), doomed)
    centre.publish(new)
    assert verify(str(centre.root), centre.anchor, deep=True).manifests == 3


def test_a_cut_collection_can_be_repeated(centre: Centre) -> None:
    age(centre, 200)
    retire(centre)
    age(centre, 91)
    for cut in count():  # noqa: B007
        try:
            collect(FailingFolder(centre.root, left=1), found(centre))
        except PowerCutError:
            verify(str(centre.root), centre.anchor, deep=True)
        else:
            break
    assert cut > 3
    assert found(centre).all() == ()


def test_nothing_goes_while_it_is_not_known_what_is_named(centre: Centre) -> None:
    manifest = next((centre.root / "targets/models/vision/tiny").glob("*.1.0.0.json"))
    manifest.unlink()
    with pytest.raises(StoreStateError, match=r"1\.0\.0\.json"):
        found(centre)
