"""The repository's promises: who must sign, what a cut leaves, and numbers that only grow."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
from securesystemslib.signer import CryptoSigner

from agent.errors import ExpiredError, OfflineError, TargetNotFoundError, UntrustedError
from tests.fakes import bundles
from tests.fakes.hub import Centre, Clock, FailingFolder, PowerCutError
from tools.hub.bundle import Bundle
from tools.hub.edition import TIMESTAMP, expiring, team_role
from tools.hub.errors import ConflictError, KeyNotAllowedError, SourceError, StoreStateError
from tools.hub.objects import Folder
from tools.hub.verify import Verified, verify

pytestmark = pytest.mark.unit


@pytest.fixture
def clock() -> Clock:
    return Clock(time.time())


@pytest.fixture
def centre(tmp_path: Path, clock: Clock) -> Centre:
    centre = Centre(tmp_path / "store", clock)
    centre.initialise()
    return centre


def seen(centre: Centre, *, deep: bool = True) -> Verified:
    """Return what python-tuf's own client sees from the anchor."""
    return verify(str(centre.root), centre.anchor, deep=deep)


def bundle(tmp_path: Path, version: str = "1.0.0", seq: int = 1, seed: int = 1) -> Bundle:
    files = bundles.plain_files(weights_seed=seed, rows=16)
    return bundles.pack(tmp_path / f"bundle-{version}-{seq}-{seed}", files, version=version, seq=seq)


def test_a_client_reads_every_manifest_and_blob_from_the_anchor(centre: Centre, tmp_path: Path) -> None:
    one = bundle(tmp_path)
    done = centre.publish(one, "stable")
    found = seen(centre)
    assert (found.manifests, found.operators, found.teams) == (1, 1, ["vision"])
    assert found.models[0]["channels"] == {"stable": "1.0.0"}
    assert (found.blobs, found.bytes) == (done.blobs, done.bytes)
    assert done.manifest_sha256 == one.sha256


def test_publishing_again_changes_not_one_byte(centre: Centre, tmp_path: Path, clock: Clock) -> None:
    one = bundle(tmp_path)
    centre.publish(one, "stable")
    before = {path: path.read_bytes() for path in centre.root.rglob("*") if path.is_file()}
    clock.seconds += 100
    assert not centre.publish(one, "stable").changed
    assert {path: path.read_bytes() for path in centre.root.rglob("*") if path.is_file()} == before


def test_a_cut_init_can_be_repeated_with_the_same_keys_only(tmp_path: Path, clock: Clock) -> None:
    centre = Centre(tmp_path / "store", clock)
    for cut in range(6):
        clock.seconds += 1
        with pytest.raises(PowerCutError):
            centre.initialise(FailingFolder(centre.root, left=cut))
        with pytest.raises(TargetNotFoundError):
            verify(str(centre.root), Centre(tmp_path / f"other{cut}", clock).initialise(), deep=True)
    with pytest.raises(StoreStateError, match="other keys"):
        Centre(centre.root, clock).initialise()
    centre.initialise()
    assert seen(centre).root == 1


def test_a_finished_store_is_not_initialised_again(centre: Centre) -> None:
    with pytest.raises(StoreStateError, match="already"):
        centre.initialise()


@pytest.mark.parametrize("signers", [0, 1])
def test_too_few_root_signatures_make_no_store(tmp_path: Path, clock: Clock, signers: int) -> None:
    centre = Centre(tmp_path / "store", clock)
    with pytest.raises(KeyNotAllowedError):
        centre.initialise(signers=signers)
    assert not centre.root.exists()


def test_a_client_demands_two_of_three_root_signatures(tmp_path: Path, clock: Clock) -> None:
    centre = Centre(tmp_path / "store", clock)
    anchor = json.loads(centre.initialise(signers=2))
    assert verify(str(centre.root), json.dumps(anchor).encode(), deep=True).root == 1
    anchor["signatures"].pop()
    with pytest.raises(UntrustedError, match="1/2"):
        verify(str(centre.root), json.dumps(anchor).encode(), deep=True)


def test_another_key_cannot_publish_and_uploads_nothing(centre: Centre, tmp_path: Path) -> None:
    stranger = CryptoSigner.generate_ed25519()
    for role in ("team_signer", "online_signer"):
        with pytest.raises(KeyNotAllowedError):
            centre.publish(bundle(tmp_path / role), **{role: stranger})
    assert not (centre.root / "blobs").exists()


def test_a_team_cannot_publish_into_another_teams_folder(centre: Centre) -> None:
    repository = centre.repository()
    edition = repository.edition(repository.state())
    with pytest.raises(KeyNotAllowedError, match="may not sign"):
        edition.add_team_target("vision", "models/audio/vad/1.0.0.json", b"{}")
    with pytest.raises(KeyNotAllowedError, match="no team"):
        edition.add_team_target("audio", "models/audio/vad/1.0.0.json", b"{}")


def test_a_new_team_can_publish_and_a_second_key_for_it_is_refused(centre: Centre, tmp_path: Path) -> None:
    repository, key = centre.repository(), CryptoSigner.generate_ed25519()
    edition = repository.edition(repository.state())
    edition.add_team("audio", key.public_key)
    edition.sign_top(centre.targets)
    edition.seal(centre.online)
    edition.write()
    with pytest.raises(ConflictError):
        repository.edition(repository.state()).add_team("audio", key.public_key)
    audio = bundles.pack(tmp_path / "audio", bundles.plain_files(rows=16), team="audio", seq=1)
    centre.publish(audio, team_signer=key)
    assert seen(centre).teams == ["audio"]  # vision holds a delegation and has not published


def test_the_timestamp_is_unix_seconds_and_grows_even_within_one(centre: Centre, clock: Clock) -> None:
    repository = centre.repository()
    versions = [repository.state().timestamp.signed.version]
    for step in (0, 0, 60, 0):
        clock.seconds += step
        edition = repository.edition(repository.state())
        edition.seal(centre.online)
        versions.append(edition.write())
    assert versions == sorted(set(versions))
    assert versions[3] == int(clock.seconds)


@pytest.mark.parametrize(("age_days", "version"), [(10, 1), (70, 2)])
def test_the_snapshot_is_renewed_with_the_timestamp_before_it_expires(
    tmp_path: Path, clock: Clock, age_days: int, version: int
) -> None:
    clock.seconds -= age_days * 86_400
    centre = Centre(tmp_path / "store", clock)
    centre.initialise()
    clock.seconds += age_days * 86_400
    repository = centre.repository()
    edition = repository.edition(repository.state())
    edition.seal(centre.online)
    edition.write()
    assert repository.state().snapshot.signed.version == version
    seen(centre)


@pytest.mark.parametrize(
    ("days", "due"),
    [
        (0, []),
        (149, []),
        (151, ["team-vision"]),
        (276, ["root", "team-vision"]),
        (336, ["root", "targets", "team-vision"]),
    ],
)
def test_a_role_is_due_while_its_people_can_still_be_gathered(
    centre: Centre, tmp_path: Path, clock: Clock, days: int, due: list[str]
) -> None:
    centre.publish(bundle(tmp_path))
    state = centre.repository().state()
    roles = {"root": state.root, "targets": state.targets, "team-vision": state.teams["vision"]}
    dates = {role: metadata.signed.expires for role, metadata in roles.items()}
    assert list(expiring(dates, clock.seconds + days * 86_400)) == due


def test_a_clock_far_behind_the_store_signs_nothing(centre: Centre, clock: Clock) -> None:
    before = (centre.root / TIMESTAMP).read_bytes()
    clock.seconds -= 86_400
    repository = centre.repository()
    with pytest.raises(StoreStateError, match="future"):
        repository.edition(repository.state()).seal(centre.online)
    assert (centre.root / TIMESTAMP).read_bytes() == before


def test_an_expired_timestamp_is_refused_until_it_is_refreshed(tmp_path: Path, clock: Clock) -> None:
    clock.seconds -= 8 * 86_400
    centre = Centre(tmp_path / "store", clock)
    centre.initialise()
    with pytest.raises(ExpiredError, match="timestamp"):
        seen(centre)
    clock.seconds += 8 * 86_400
    repository = centre.repository()
    edition = repository.edition(repository.state())
    edition.seal(centre.online)
    edition.write()
    assert seen(centre).timestamp == int(clock.seconds)


def test_a_published_version_never_changes(centre: Centre, tmp_path: Path) -> None:
    centre.publish(bundle(tmp_path))
    with pytest.raises(ConflictError, match="another manifest"):
        centre.publish(bundle(tmp_path, seq=2, seed=2))


def test_seq_has_to_grow(centre: Centre, tmp_path: Path) -> None:
    centre.publish(bundle(tmp_path, "1.0.0", seq=5))
    with pytest.raises(ConflictError, match="seq"):
        centre.publish(bundle(tmp_path, "1.1.0", seq=5, seed=2))


def test_a_damaged_blob_of_the_bundle_is_not_published(centre: Centre, tmp_path: Path) -> None:
    one = bundle(tmp_path)
    victim = one.blob_path(one.manifest.files[0].chunks[0])
    victim.write_bytes(victim.read_bytes()[:-1] + b"?")
    with pytest.raises(SourceError, match="differs"):
        centre.publish(one)
    assert seen(centre).manifests == 0


def test_metadata_that_somebody_changed_is_not_built_upon(centre: Centre, tmp_path: Path) -> None:
    centre.publish(bundle(tmp_path))
    path = next((centre.root / "metadata").glob(f"*.{team_role('vision')}.json"))
    path.write_bytes(path.read_bytes().replace(b'"length":', b'"length":1', 1))
    with pytest.raises(StoreStateError, match="damaged"):
        centre.repository().state()


def test_no_store_is_named_as_such(tmp_path: Path, clock: Clock) -> None:
    with pytest.raises(StoreStateError, match="no complete store"):
        Centre(tmp_path / "nothing", clock).repository().state()
    with pytest.raises((TargetNotFoundError, OfflineError)):
        verify(str(tmp_path / "nothing"), Centre(tmp_path / "any", clock).initialise(), deep=False)


def test_two_publishers_do_not_write_at_once(centre: Centre) -> None:
    with Folder(centre.root).lock(), pytest.raises(StoreStateError, match="another publisher"):
        with Folder(centre.root).lock():
            pass
