"""Key files: what is written, what is refused."""

from __future__ import annotations

import stat
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed448 import Ed448PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat

from tools.hub import keys
from tools.hub.errors import SigningKeyError

pytestmark = pytest.mark.unit
PASSWORD = "correct horse battery"


@pytest.mark.parametrize("password", [PASSWORD, None])
def test_a_new_key_signs_what_its_public_half_verifies(tmp_path: Path, password: str | None) -> None:
    path = tmp_path / "new/team"
    keyid = keys.generate(path, role="team", password=password)
    signer = keys.load_signer(path, password)
    keys.load_public(keys.public_path_of(path)).verify_signature(signer.sign(b"data"), b"data")
    assert signer.public_key.keyid == keyid == keys.load_public(path).keyid


def test_the_private_file_is_for_its_owner_only_and_encrypted(tmp_path: Path) -> None:
    keys.generate(tmp_path / "k", role="root", password=PASSWORD)
    assert stat.S_IMODE((tmp_path / "k").stat().st_mode) == 0o600
    assert keys.is_encrypted(tmp_path / "k")
    assert keys.is_private(tmp_path / "k")
    assert not keys.is_private(tmp_path / "k.pub")


@pytest.mark.parametrize("password", [None, "", "another password"])
def test_an_encrypted_key_needs_its_password(tmp_path: Path, password: str | None) -> None:
    keys.generate(tmp_path / "k", role="root", password=PASSWORD)
    with pytest.raises(SigningKeyError):
        keys.load_signer(tmp_path / "k", password)


@pytest.mark.parametrize("existing", ["k", "k.pub"])
def test_a_key_file_is_never_overwritten(tmp_path: Path, existing: str) -> None:
    (tmp_path / existing).write_text("mine")
    with pytest.raises(SigningKeyError, match="exists already"):
        keys.generate(tmp_path / "k", role="root", password=None)
    assert (tmp_path / existing).read_text() == "mine"


def test_a_short_password_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SigningKeyError, match="characters"):
        keys.generate(tmp_path / "k", role="root", password="short")
    assert list(tmp_path.iterdir()) == []


def test_a_public_key_cannot_sign(tmp_path: Path) -> None:
    keys.generate(tmp_path / "k", role="root", password=None)
    with pytest.raises(SigningKeyError, match="cannot sign"):
        keys.load_signer(tmp_path / "k.pub", None)


def test_other_kinds_of_key_and_other_files_are_refused(tmp_path: Path) -> None:
    other = Ed448PrivateKey.generate()
    (tmp_path / "k").write_bytes(other.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    (tmp_path / "k.pub").write_bytes(other.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo))
    (tmp_path / "junk").write_bytes(b"\x00junk")
    for load in (lambda: keys.load_signer(tmp_path / "k", None), lambda: keys.load_public(tmp_path / "k.pub")):
        with pytest.raises(SigningKeyError, match="only ed25519"):
            load()
    for name in ("junk", "missing"):
        with pytest.raises(SigningKeyError):
            keys.load_public(tmp_path / name)
