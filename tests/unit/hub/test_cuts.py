"""A power cut at every single write of every verb: readers see the old state or the new, and a repeat finishes.

The reader is python-tuf's own client, which has seen the store before the cut and remembers it: a state that is older
than one it saw, or whose signatures do not hold together, is an error of its own.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from itertools import count
from pathlib import Path

import pytest
from securesystemslib.signer import CryptoSigner
from tuf.api.exceptions import UnsignedMetadataError

from agent.bundles.manifest import Index
from tests.fakes import bundles
from tests.fakes.hub import Centre, Clock, Cut, FailingFolder, PowerCutError, Reader
from tools.hub.bundle import Bundle
from tools.hub.edition import TIMESTAMP
from tools.hub.objects import Folder
from tools.hub.pending import Pending
from tools.hub.rotation import Change, begin, keys_of, publish
from tools.hub.verify import Part, verify

pytestmark = pytest.mark.unit


def packed(tmp_path: Path, version: str, seq: int) -> Bundle:
    return bundles.pack(
        tmp_path / f"bundle-{version}", bundles.plain_files(weights_seed=seq, rows=16), version=version, seq=seq
    )


@pytest.fixture
def centre(tmp_path: Path) -> Centre:
    """A store with two versions, the newer on ``stable``."""
    centre = Centre(tmp_path / "whole", Clock(time.time()))
    centre.initialise()
    centre.publish(packed(tmp_path, "1.0.0", 1))
    centre.publish(packed(tmp_path, "1.1.0", 2), "stable")
    return centre


def cut_everywhere(
    tmp_path: Path, centre: Centre, act: Callable[[Folder], object], *, old: Index, new: Callable[[Index], bool]
) -> int:
    """Cut ``act`` at each write on a copy of the store, look, repeat it, look again; return how many writes it has."""
    whole, device = centre.root, Reader(centre.anchor, tmp_path / "device")
    assert device.look(whole) == old
    for cut in count():
        centre.root = Path(shutil.copytree(whole, tmp_path / f"cut-{cut}"))
        reader = device.copy(tmp_path / f"device-{cut}")
        try:
            act(FailingFolder(centre.root, left=cut))
        except PowerCutError:
            assert reader.look(centre.root) == old
        else:
            assert new(reader.look(centre.root))
            return cut
        centre.clock.seconds += 1
        act(Folder(centre.root))
        assert new(reader.look(centre.root))
        verify(str(centre.root), centre.anchor, deep=True)
    raise AssertionError("count ends")


def index_of(centre: Centre) -> Index:
    return centre.publisher().index(centre.repository().state(), "vision", "tiny")


@pytest.mark.parametrize("signed_files", [False, True])
def test_publish(centre: Centre, tmp_path: Path, signed_files: bool) -> None:
    signer = CryptoSigner.generate_ecdsa() if signed_files else None
    bundle = packed(tmp_path, "1.2.0", 3)
    writes = cut_everywhere(
        tmp_path,
        centre,
        lambda objects: centre.publish(bundle, "stable", objects=objects, oms_signer=signer),
        old=index_of(centre),
        new=lambda index: index.channels == {"stable": "1.2.0"} and len(index.versions) == 3,
    )
    assert writes == 6 + signed_files  # weights, manifest, (its signature,) index, team role, snapshot, timestamp


def test_revoke(centre: Centre, tmp_path: Path) -> None:
    writes = cut_everywhere(
        tmp_path,
        centre,
        lambda objects: centre.revoke("1.1.0", replacement="1.0.0", objects=objects),
        old=index_of(centre),
        new=lambda index: index.channels == {"stable": "1.0.0"} and index.versions[1].status == "revoked",
    )
    assert writes == 4  # index, team role, snapshot, timestamp


@pytest.mark.parametrize("used_before", [False, True])
def test_export(centre: Centre, tmp_path: Path, used_before: bool) -> None:
    """The stick says nothing, what it said before, or the new; the store is never behind a stick that speaks."""
    if used_before:
        centre.export(Folder(tmp_path / "stick"), "1.0.0")
        centre.clock.seconds += 1
    whole, device = centre.root, Reader(centre.anchor, tmp_path / "device")
    old = device.look(whole)
    for cut in count():
        centre.root = Path(shutil.copytree(whole, tmp_path / f"cut-{cut}"))
        stick = tmp_path / f"stick-{cut}"
        if used_before:
            shutil.copytree(tmp_path / "stick", stick)
        power = Cut(cut)
        try:
            centre.export(FailingFolder(stick, power), objects=FailingFolder(centre.root, power), valid_days=90)
        except PowerCutError:
            assert (stick / TIMESTAMP).exists() == used_before
            if used_before:
                verify(str(stick), centre.anchor, deep=True, parts=[Part("vision", "tiny", "1.0.0")])
                sideloaded = Reader(centre.anchor, tmp_path / f"sideloaded-{cut}")
                assert sideloaded.look(stick) == sideloaded.look(centre.root) == old
            assert device.copy(tmp_path / f"device-{cut}").look(centre.root) == old
        else:
            break
        centre.clock.seconds += 1
        centre.export(Folder(stick), objects=Folder(centre.root), valid_days=90)
        verify(str(stick), centre.anchor, deep=True, parts=[Part("vision", "tiny", "1.1.0")])
        sideloaded = Reader(centre.anchor, tmp_path / f"sideloaded-again-{cut}")
        assert sideloaded.look(stick) == sideloaded.look(centre.root) == old
    assert cut > 10


def signed(centre: Centre, role: str, new: CryptoSigner, old: CryptoSigner, *others: CryptoSigner) -> Pending:
    """Return the exchange of a role's key with all signatures it can have."""
    repository = centre.repository()
    change = Change(role=role, add=(new.public_key,), remove=(old.public_key.keyid,))
    pending = begin(Folder(centre.root), repository, repository.state(), change, centre.clock)
    assert pending is not None
    pending.sign([*centre.root_signers, centre.targets, new, *others])
    return pending


@pytest.mark.parametrize(
    ("role", "writes"), [("root", 1), ("online", 3), ("targets", 4), ("team:vision", 4), ("operator", 4)]
)
def test_rotate_keys(centre: Centre, tmp_path: Path, role: str, writes: int) -> None:
    """With the old key at hand no reader notices, whichever write it was cut at."""
    new = CryptoSigner.generate_ed25519()
    old = {
        "root": centre.root_signers[0], "online": centre.online, "targets": centre.targets,
        "team:vision": centre.team_signer, "operator": centre.operator,
    }[role]  # fmt: skip
    pending = signed(centre, role, new, old, old)
    online = [new, old] if role == "online" else [centre.online]
    index = index_of(centre)
    counted = cut_everywhere(
        tmp_path,
        centre,
        lambda objects: publish(pending, objects, centre.repository(objects), online, centre.clock),
        old=index,
        new=lambda found: found == index,
    )
    assert counted == writes
    repository = centre.repository()
    held = [key.keyid for key in keys_of(repository, repository.state(), role)]
    assert new.public_key.keyid in held
    assert old.public_key.keyid not in held


@pytest.mark.parametrize("role", ["online", "targets"])
def test_rotate_a_lost_key(centre: Centre, tmp_path: Path, role: str) -> None:
    """Without the old key readers wait between the root and the timestamp, and a repeat heals it."""
    new = CryptoSigner.generate_ed25519()
    pending = signed(centre, role, new, getattr(centre, role))
    if role == "targets":
        pending.next["targets"].signatures.pop(centre.targets.public_key.keyid)
    online = [new] if role == "online" else [centre.online]
    whole, device = centre.root, Reader(centre.anchor, tmp_path / "device")
    old, waited = device.look(whole), 0
    for cut in count():
        centre.root = Path(shutil.copytree(whole, tmp_path / f"cut-{cut}"))
        reader = device.copy(tmp_path / f"device-{cut}")
        try:
            objects = FailingFolder(centre.root, left=cut)
            publish(pending, objects, centre.repository(objects), online, centre.clock)
        except PowerCutError:
            if (centre.root / "metadata/2.root.json").exists():
                waited += 1
                with pytest.raises(UnsignedMetadataError):
                    reader.look(centre.root)
            else:
                assert reader.look(centre.root) == old
        else:
            break
        centre.clock.seconds += 1
        publish(pending, Folder(centre.root), centre.repository(), online, centre.clock)
        assert reader.look(centre.root) == old
        verify(str(centre.root), centre.anchor, deep=True)
    assert waited == 1


@pytest.mark.parametrize("cut", range(5))
def test_a_signature_that_comes_after_a_cut_is_no_obstacle(centre: Centre, tmp_path: Path, cut: int) -> None:
    """What a cut attempt stored is not changed by those who sign later: it is good enough as it is."""
    new, reader = CryptoSigner.generate_ed25519(), Reader(centre.anchor, tmp_path / "device")
    old = reader.look(centre.root)
    pending = signed(centre, "targets", new, centre.targets)
    pending.next["targets"].signatures.pop(centre.targets.public_key.keyid)
    pending.next["root"].signatures.pop(centre.root_signers[2].public_key.keyid)
    for objects in (FailingFolder(centre.root, left=cut), Folder(centre.root)):
        try:
            publish(pending, objects, centre.repository(objects), [centre.online], centre.clock)
        except PowerCutError:
            pending.sign([centre.targets, centre.root_signers[2]])
    assert reader.look(centre.root) == old
    assert not publish(pending, Folder(centre.root), centre.repository(), [centre.online], centre.clock).changed
    assert verify(str(centre.root), centre.anchor, deep=True).root == 2


def test_retire_a_team(centre: Centre, tmp_path: Path) -> None:
    def retire(objects: Folder) -> None:
        repository = centre.repository(objects)
        edition = repository.edition(repository.state())
        edition.retire_team("vision", centre.targets)
        edition.sign_top(centre.targets)
        edition.seal(centre.online)
        edition.write()

    whole = centre.root
    for cut in count():
        centre.root = Path(shutil.copytree(whole, tmp_path / f"cut-{cut}"))
        try:
            retire(FailingFolder(centre.root, left=cut))
        except PowerCutError:
            assert verify(str(centre.root), centre.anchor, deep=True).manifests == 2
        else:
            break
        retire(Folder(centre.root))
        assert verify(str(centre.root), centre.anchor, deep=True).manifests == 0
    assert cut == 4
