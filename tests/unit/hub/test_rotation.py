"""Who may sign changes without a device noticing, and not before enough people have said so."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from securesystemslib.signer import CryptoSigner

from agent.errors import InvalidInputError, TargetNotFoundError, UntrustedError
from tests.fakes import bundles
from tests.fakes.hub import Centre, Clock, Reader
from tools.hub.edition import TIMESTAMP
from tools.hub.errors import ConflictError, KeyNotAllowedError, StoreStateError
from tools.hub.objects import Folder
from tools.hub.pending import Pending, load
from tools.hub.rotation import Change, Rotated, begin, keys_of, publish
from tools.hub.verify import verify

pytestmark = pytest.mark.unit
DAY_S = 86_400


@pytest.fixture
def centre(tmp_path: Path) -> Centre:
    centre = Centre(tmp_path / "store", Clock(time.time()))
    centre.initialise()
    centre.publish(bundles.pack(tmp_path / "bundle", bundles.plain_files(rows=16)), "stable")
    return centre


@pytest.fixture
def reader(centre: Centre, tmp_path: Path) -> Reader:
    """A device that has seen the store as it was."""
    reader = Reader(centre.anchor, tmp_path / "device")
    reader.look(centre.root)
    return reader


def started(centre: Centre, change: Change) -> Pending:
    repository = centre.repository()
    pending = begin(Folder(centre.root), repository, repository.state(), change, centre.clock)
    assert pending is not None
    return pending


def finish(centre: Centre, pending: Pending, *online: CryptoSigner) -> Rotated:
    return publish(pending, Folder(centre.root), centre.repository(), online, centre.clock)


def key() -> CryptoSigner:
    return CryptoSigner.generate_ed25519()


def changed(role: str, new: CryptoSigner | None = None, old: CryptoSigner | None = None, **more: int) -> Change:
    return Change(
        role=role,
        add=(new.public_key,) if new else (),
        remove=(old.public_key.keyid,) if old else (),
        **more,
    )


def check(centre: Centre, reader: Reader) -> None:
    """A device that knows the old state and one that only has the anchor both see a good store."""
    reader.look(centre.root)
    verify(str(centre.root), centre.anchor, deep=True)


def test_a_root_needs_the_old_threshold_and_the_new_one(centre: Centre, reader: Reader, tmp_path: Path) -> None:
    a, b, c = centre.root_signers
    d = key()
    pending = started(centre, changed("root", d, a))
    told = [str(need) for need in pending.needs()]
    assert told[0].startswith("root: 0 of 2 signatures by the keys of root 1, still needed: 2 of ")
    assert told[1].startswith("root: 0 of 2 signatures by the keys of root 2, still needed: 2 of ")

    pending.sign([a, b])  # enough for the old root, not for the new one, which a is no key of
    assert [(len(need.signed), need.met) for need in pending.needs()] == [(2, True), (1, False)]
    with pytest.raises(KeyNotAllowedError, match="1 of 2 signatures by the keys of root 2"):
        finish(centre, pending)

    pending.save(tmp_path / "root.pending.json")  # to the next machine
    pending = load(tmp_path / "root.pending.json")
    assert not pending.complete
    assert pending.sign([c]) == []
    assert pending.complete
    assert finish(centre, pending).changed
    assert not finish(centre, pending).changed
    assert reader.root_version(centre.root) == 2
    check(centre, reader)


def test_the_file_says_what_a_signature_would_put_into_force(centre: Centre) -> None:
    a, new = centre.root_signers[0], key()
    lines = "\n".join(started(centre, changed("root", new, a, threshold=3)).changes())
    assert f"+ {new.public_key.keyid[:12]}, - {a.public_key.keyid[:12]}, threshold 2 to 3" in lines
    lines = "\n".join(started(centre, changed("operator", new)).changes())
    assert "fleet/operators.json: replaced" in lines
    lines = "\n".join(started(centre, changed("team:vision", new)).changes())
    assert f"keys of team vision: + {new.public_key.keyid[:12]}" in lines


@pytest.mark.parametrize("lost", [False, True])
def test_a_new_online_key_takes_over(centre: Centre, reader: Reader, lost: bool) -> None:
    """Lost: the old key cannot sign any more, and readers wait between two writes."""
    old, centre.online = centre.online, key()
    pending = started(centre, changed("online", centre.online, old))
    pending.sign(centre.root_signers[1:])
    finish(centre, pending, *([centre.online] if lost else [old, centre.online]))
    check(centre, reader)
    repository = centre.repository()
    with pytest.raises(KeyNotAllowedError):
        repository.edition(repository.state()).seal(old)
    repository.edition(repository.state()).seal(centre.online)


def test_without_an_online_key_nothing_is_published(centre: Centre) -> None:
    before = (centre.root / TIMESTAMP).read_bytes()
    pending = started(centre, changed("online", key(), centre.online))
    pending.sign(centre.root_signers)
    with pytest.raises(KeyNotAllowedError, match="snapshot"):
        finish(centre, pending, centre.online)  # the old one alone
    assert (centre.root / TIMESTAMP).read_bytes() == before
    assert not (centre.root / "metadata/2.root.json").exists()


@pytest.mark.parametrize("lost", [False, True])
def test_a_new_targets_key_takes_over(centre: Centre, reader: Reader, lost: bool) -> None:
    old, centre.targets = centre.targets, key()
    pending = started(centre, changed("targets", centre.targets, old))
    pending.sign([*centre.root_signers[:2], centre.targets] + ([] if lost else [old]))
    assert pending.complete
    finish(centre, pending, centre.online)
    check(centre, reader)
    repository = centre.repository()
    with pytest.raises(KeyNotAllowedError):
        repository.edition(repository.state()).sign_top(old)


def test_a_teams_key_changes_with_what_it_signed(centre: Centre, reader: Reader, tmp_path: Path) -> None:
    old, centre.team_signer = centre.team_signer, key()
    pending = started(centre, changed("team:vision", centre.team_signer, old))
    assert set(pending.next) == {"targets", "team-vision"}
    pending.sign([centre.targets])
    assert not pending.complete
    pending.sign([centre.team_signer])
    finish(centre, pending, centre.online)
    check(centre, reader)
    two = bundles.pack(tmp_path / "two", bundles.plain_files(rows=16), version="1.1.0", seq=2)
    with pytest.raises(KeyNotAllowedError):
        centre.publish(two, team_signer=old)
    centre.publish(two)
    check(centre, reader)


def test_a_second_team_key_leaves_what_is_published_alone(centre: Centre, reader: Reader) -> None:
    pending = started(centre, changed("team:vision", key()))
    assert set(pending.next) == {"targets"}
    pending.sign([centre.targets])
    finish(centre, pending, centre.online)
    check(centre, reader)


def test_operators_come_and_go(centre: Centre, reader: Reader) -> None:
    new = key()
    for change in (changed("operator", new), changed("operator", None, centre.operator)):
        pending = started(centre, change)
        pending.sign([centre.targets])
        finish(centre, pending, centre.online)
    repository = centre.repository()
    assert [item.keyid for item in keys_of(repository, repository.state(), "operator")] == [new.public_key.keyid]
    check(centre, reader)


def test_the_store_recovers_from_a_stolen_online_key_that_signed_far_ahead(centre: Centre, reader: Reader) -> None:
    thief = centre.repository()
    centre.clock.seconds += 30 * 365 * DAY_S
    edition = thief.edition(thief.state())
    edition.seal(centre.online)
    ahead = edition.write()
    centre.clock.seconds -= 30 * 365 * DAY_S
    reader.look(centre.root)  # the device has believed it
    with pytest.raises(StoreStateError, match="future"):
        centre.publish(bundles.pack(centre.root.parent / "x", bundles.plain_files(rows=16), version="2.0.0", seq=9))
    stolen, centre.online = centre.online, key()
    pending = started(centre, changed("online", centre.online, stolen))
    pending.sign(centre.root_signers[:2])
    assert finish(centre, pending, centre.online).timestamp_version < ahead
    check(centre, reader)


@pytest.mark.parametrize("role", ["root", "targets", "team:vision"])
def test_what_expires_is_renewed_by_the_keys_it_has(tmp_path: Path, role: str) -> None:
    clock = Clock(time.time() - 170 * DAY_S)
    centre = Centre(tmp_path / "old", clock)
    centre.initialise()
    centre.publish(bundles.pack(tmp_path / "bundle", bundles.plain_files(rows=16)), "stable")
    clock.seconds += 170 * DAY_S
    name = role.replace("team:", "team-")
    pending = started(centre, Change(role=role, renew=True))
    pending.sign([*centre.root_signers, centre.targets, centre.team_signer])
    finish(centre, pending, centre.online)
    if role == "root":  # nothing of the online key was needed
        edition = centre.repository().edition(centre.repository().state())
        edition.seal(centre.online)
        edition.write()
    found = verify(str(centre.root), centre.anchor, deep=True)
    assert found.expires_by_role[name] > f"{time.strftime('%Y-%m-%d', time.gmtime(clock() + 179 * DAY_S))}"


def test_a_change_that_is_in_force_is_none(centre: Centre) -> None:
    repository = centre.repository()
    state = repository.state()
    for change in (
        changed("root", centre.root_signers[0], key()),
        changed("online", centre.online),
        changed("operator", centre.operator, key()),
        changed("team:vision", centre.team_signer),
        Change(role="root", threshold=2),
    ):
        assert begin(Folder(centre.root), repository, state, change, centre.clock) is None


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        (lambda c: changed("root", None, key()), None, ""),
        (lambda c: changed("root", key(), key()), ConflictError, "none of its keys"),
        (lambda c: Change(role="root", remove=tuple(s.public_key.keyid for s in c.root_signers[:2])),
         KeyNotAllowedError, "1 keys left"),
        (lambda c: Change(role="root", threshold=4), KeyNotAllowedError, "4 signatures needed"),
        (lambda c: changed("targets", None, c.targets), KeyNotAllowedError, "0 keys left"),
        (lambda c: changed("online", key(), threshold=2), InvalidInputError, "only the root"),
        (lambda c: changed("snapshot", key()), InvalidInputError, "--role snapshot"),
        (lambda c: changed("team:audio", key()), TargetNotFoundError, "no team audio"),
        (lambda c: Change(role="online", renew=True), InvalidInputError, "renewed"),
    ],
)  # fmt: skip
def test_impossible_changes_are_refused_before_anyone_signs(
    centre: Centre, change: object, error: type[Exception] | None, words: str
) -> None:
    repository = centre.repository()
    wanted = change(centre)  # type: ignore[operator]
    if error is None:
        assert begin(Folder(centre.root), repository, repository.state(), wanted, centre.clock) is None
        return
    with pytest.raises(error, match=words):
        begin(Folder(centre.root), repository, repository.state(), wanted, centre.clock)


def test_a_stranger_signs_nothing(centre: Centre) -> None:
    pending, stranger = started(centre, changed("root", key())), key()
    assert pending.sign([stranger]) == [stranger]
    assert all(not need.signed for need in pending.needs())


def test_a_change_begun_before_another_is_refused(centre: Centre, tmp_path: Path) -> None:
    first, second = started(centre, changed("root", key())), started(centre, changed("root", key()))
    for pending in (first, second):
        pending.sign(centre.root_signers)
    finish(centre, first)
    with pytest.raises(StoreStateError, match="made for another"):
        finish(centre, second)

    new = key()
    team = started(centre, changed("team:vision", new, centre.team_signer))
    team.sign([centre.targets, new])
    centre.publish(bundles.pack(tmp_path / "two", bundles.plain_files(rows=16), version="1.1.0", seq=2))
    with pytest.raises(StoreStateError, match="published anew"):
        finish(centre, team, centre.online)
    verify(str(centre.root), centre.anchor, deep=True)


def test_a_file_that_somebody_changed_is_refused(centre: Centre, tmp_path: Path) -> None:
    path = tmp_path / "p.json"
    pending = started(centre, changed("operator", key()))
    pending.sign([centre.targets])
    pending.save(path)
    text = path.read_text()
    for old, new in (
        ('"schema": "inferhub-pending/1"', '"schema": "other"'),
        ('"threshold": 2', '"threshold": 1'),
        ('"_type": "targets"', '"_type": "snapshot"'),
        ('"fleet/operators.json": "ey', '"fleet/operators.json": "fy'),
    ):
        assert old in text
        path.write_text(text.replace(old, new))
        with pytest.raises(InvalidInputError):
            load(path)
    path.write_text(text)
    assert load(path).complete
    with pytest.raises(InvalidInputError):
        load(tmp_path / "nowhere.json")


def test_a_file_that_compares_with_a_made_up_state_is_refused(centre: Centre, tmp_path: Path) -> None:
    """A thief could hide a change by calling it part of what is in force."""
    path = tmp_path / "p.json"
    pending = started(centre, changed("operator", key()))
    pending.follows(centre.anchor)
    pending.base["targets"] = pending.next["targets"]  # nobody has signed it
    pending.save(path)
    with pytest.raises(InvalidInputError):
        load(path)

    thief = Centre(tmp_path / "other", centre.clock)
    foreign = Centre(tmp_path / "other", centre.clock)
    foreign.root_signers = [centre.root_signers[0], *thief.root_signers[1:]]
    foreign.initialise()
    lure = started(foreign, changed("root", key()))
    lure.save(path)
    with pytest.raises(UntrustedError, match="none of this store's"):
        load(path).follows(centre.anchor)
    with pytest.raises(InvalidInputError):
        lure.follows(b"{}")


def _swap_old_key(pending: Pending) -> None:
    root = pending.next["root"].signed
    root.keys[root.roles["timestamp"].keyids[0]].keyval["public"] = key().public_key.keyval["public"]


def _swap_new_key(pending: Pending) -> None:
    root = pending.next["root"].signed
    root.keys[root.roles["root"].keyids[-1]].keyval["public"] = key().public_key.keyval["public"]


def _give_up_snapshots(pending: Pending) -> None:
    pending.next["root"].signed.consistent_snapshot = False


@pytest.mark.parametrize("hide", [_swap_old_key, _swap_new_key, _give_up_snapshots])
def test_a_change_that_nobody_would_see_is_refused(centre: Centre, tmp_path: Path, hide: object) -> None:
    pending = started(centre, changed("root", key()))
    pending.save(tmp_path / "p.json")
    load(tmp_path / "p.json")
    hide(pending)  # type: ignore[operator]
    pending.save(tmp_path / "p.json")
    with pytest.raises(InvalidInputError):
        load(tmp_path / "p.json")


def test_a_team_gets_no_more_paths_by_a_rotation(centre: Centre, tmp_path: Path) -> None:
    pending = started(centre, changed("team:vision", key()))
    held = pending.next["targets"].signed.delegations
    assert held is not None
    assert held.roles is not None
    held.roles["team-vision"].paths = ["models/*/*/*"]
    pending.save(tmp_path / "p.json")
    with pytest.raises(InvalidInputError, match="other paths"):
        load(tmp_path / "p.json")


def test_the_roots_lead_from_any_trusted_one_to_the_next(centre: Centre, tmp_path: Path) -> None:
    for _ in range(2):
        pending = started(centre, changed("root", key()))
        pending.sign(centre.root_signers)
        finish(centre, pending)
    pending = started(centre, changed("root", key()))
    path = tmp_path / "p.json"
    pending.save(path)
    for version in (1, 2, 3):
        load(path).follows((centre.root / f"metadata/{version}.root.json").read_bytes())
    del pending.roots[1]
    pending.save(path)
    with pytest.raises(InvalidInputError):
        load(path)


def test_a_root_that_skips_one_is_refused(centre: Centre, tmp_path: Path) -> None:
    pending = started(centre, changed("root", key()))
    pending.next["root"].signed.version = 3
    pending.save(tmp_path / "p.json")
    with pytest.raises(StoreStateError, match="does not follow"):
        load(tmp_path / "p.json")
    assert verify(str(centre.root), centre.anchor, deep=True).root == 1


def test_a_retired_team_leaves_an_empty_role_that_its_keys_cannot_fill(
    centre: Centre, reader: Reader, tmp_path: Path
) -> None:
    repository = centre.repository()
    edition = repository.edition(repository.state())
    edition.retire_team("vision", centre.targets)
    edition.sign_top(centre.targets)
    edition.seal(centre.online)
    edition.write()
    found = verify(str(centre.root), centre.anchor, deep=True)
    assert (found.teams, found.models) == (["vision"], [])
    with pytest.raises(AssertionError):  # the device refreshes, and the model is gone
        reader.look(centre.root)
    two = bundles.pack(tmp_path / "two", bundles.plain_files(rows=16), version="1.1.0", seq=2)
    with pytest.raises(KeyNotAllowedError):
        centre.publish(two)
    pending = started(centre, changed("team:vision", centre.team_signer, centre.targets))
    pending.sign([centre.targets, centre.team_signer])
    finish(centre, pending, centre.online)
    centre.publish(two, "stable")
    check(centre, reader)


def test_another_stores_anchor_does_not_walk_these_roots(centre: Centre, tmp_path: Path) -> None:
    pending = started(centre, changed("root", key(), centre.root_signers[0]))
    pending.sign(centre.root_signers)
    finish(centre, pending)
    stranger = Centre(tmp_path / "other", centre.clock).initialise()
    with pytest.raises(UntrustedError):
        verify(str(centre.root), stranger, deep=False)
