"""Keys that no file of ours holds: by URI, wherever a key is asked for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from cryptography.hazmat.primitives.asymmetric import ec, ed448
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat
from securesystemslib.signer import SIGNER_FOR_URI_SCHEME, CryptoSigner, Signature, Signer, SSlibKey

from tools.hub import keys, keyservice
from tools.hub.errors import SigningKeyError
from tools.inferhub import main

pytestmark = pytest.mark.unit
PIN = "0000"


class Token(Signer):
    """A token in memory with named P-256 keys that asks for a PIN, as ``hsm:`` does."""

    held: dict[str, CryptoSigner] = {}  # noqa: RUF012  the one token of the machine
    broken = False

    def __init__(self, name: str, key: SSlibKey, secrets: Any) -> None:
        self._name, self._key, self._secrets = name, key, secrets

    @property
    def public_key(self) -> SSlibKey:
        return self._key

    def sign(self, payload: bytes) -> Signature:
        if self.broken:
            raise ConnectionError("the token was pulled out")
        if self._secrets("pin") != PIN:
            raise ValueError("wrong PIN")
        return self.held[self._name].sign(payload)

    @classmethod
    def import_(cls, name: str) -> tuple[str, SSlibKey]:
        return f"token:{name}", cls.held[name].public_key

    @classmethod
    def from_priv_key_uri(cls, priv_key_uri: str, public_key: Any, secrets_handler: Any = None) -> Signer:
        return cls(priv_key_uri.partition(":")[2], public_key, secrets_handler)


@pytest.fixture(autouse=True)
def token(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SIGNER_FOR_URI_SCHEME, "token", Token)
    names = ("root", "targets", "online", "online-2", "team", "operator")
    monkeypatch.setattr(Token, "held", {name: CryptoSigner.generate_ecdsa() for name in names})


def hub(*words: str, fails: str = "", pin: str | None = PIN) -> dict[str, Any]:
    done = CliRunner().invoke(main, [*words, "--json"], env={"INFERHUB_KEY_PASSWORD": pin})
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    answer: dict[str, Any] = json.loads(done.stdout)
    assert done.exit_code == (1 if fails else 0), answer
    if fails:
        assert answer["error"]["code"] == fails, answer
    return answer


INIT = (
    "init", "store", "--root-key", "token:root", "--threshold", "1", "--targets-key", "token:targets",
    "--online-key", "token:online", "--team", "vision=token:team", "--operator-key", "token:operator",
)  # fmt: skip


def test_a_whole_store_lives_on_a_token(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    hub(*INIT)
    hub("refresh-timestamp", "--store", "store", "--online-key", "token:online")
    assert hub("verify", "--store", "store")["operators"] == 1
    done = hub(
        "rotate-keys", "--role", "online", "--add", "token:online-2", "--remove", "token:online", "--store", "store",
        "--sign-with", "token:root", "--sign-with", "token:online", "--sign-with", "token:online-2",
    )  # fmt: skip
    assert done["published"]
    hub("refresh-timestamp", "--store", "store", "--online-key", "token:online", fails="key_not_allowed")
    hub("refresh-timestamp", "--store", "store", "--online-key", "token:online-2")


def test_a_key_file_may_be_a_reference(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    hub(*INIT)
    made = hub("keygen", "--role", "online", "--kms", "token:online", "--out", "keys/online")
    assert made["keyid"] == Token.held["online"].public_key.keyid
    assert (tmp_path / "keys/online").read_text() == "inferhub key reference\ntoken:online\n"
    assert keys.load_public(tmp_path / "keys/online") == keys.load_public(tmp_path / "keys/online.pub")
    hub("refresh-timestamp", "--store", "store", "--online-key", "keys/online")
    hub("keygen", "--role", "online", "--kms", "token:online", "--out", "keys/online", fails="bad_key")
    hub("keygen", "--role", "online", "--kms", "nothing:online", "--out", "keys/new", fails="bad_key")


def test_a_plain_file_by_uri(tmp_path: Path) -> None:
    signer = CryptoSigner.generate_ed25519()
    path = tmp_path / "plain.pem"
    path.write_bytes(signer.private_bytes)
    uri = f"file2:{path}"
    key = keyservice.public_key(uri, lambda _: "")
    assert key == signer.public_key
    key.verify_signature(keyservice.signer(uri, key, lambda _: "").sign(b"data"), b"data")


@pytest.mark.parametrize("trouble", ["wrong PIN", "no PIN", "pulled out", "no such key"])
def test_a_service_that_fails_is_named_and_nothing_is_published(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, trouble: str
) -> None:
    monkeypatch.chdir(tmp_path)
    hub(*INIT)
    before = (tmp_path / "store/metadata/timestamp.json").read_bytes()
    monkeypatch.setattr(Token, "broken", trouble == "pulled out")
    name = "token:nowhere" if trouble == "no such key" else "token:online"
    pin = {"wrong PIN": "1111", "no PIN": None}.get(trouble, PIN)
    answer = hub("refresh-timestamp", "--store", "store", "--online-key", name, fails="bad_key", pin=pin)
    assert answer["error"]["message"]
    assert (tmp_path / "store/metadata/timestamp.json").read_bytes() == before


@pytest.mark.parametrize(
    ("uri", "extra"),
    [
        ("awskms:alias/online", "awskms"),
        ("gcpkms:projects/p/locations/l/keyRings/r/cryptoKeys/k/cryptoKeyVersions/1", "gcpkms"),
        ("azurekms://vault.vault.azure.net/keys/online/1", "azurekms"),
        ("hsm:2?label=token", "hsm"),
        ("hv:online/1", "vault"),
    ],
)
def test_a_service_whose_library_is_missing_says_what_to_install(uri: str, extra: str) -> None:
    assert keyservice.is_uri(uri)
    with pytest.raises(SigningKeyError) as caught:
        keyservice.public_key(uri, lambda _: "")
    if "install" in caught.value.hint:  # unless somebody has installed it
        assert caught.value.hint == f"Install what it needs: pip install 'securesystemslib[{extra}]'"
    assert uri in str(caught.value)


def test_kinds_of_key_that_no_device_is_asked_to_verify_are_refused(tmp_path: Path) -> None:
    private = ed448.Ed448PrivateKey.generate()
    path = tmp_path / "other.pem"
    path.write_bytes(private.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    with pytest.raises(SigningKeyError, match="ed448"):
        keyservice.public_key(f"file2:{path}", lambda _: "")
    with pytest.raises(SigningKeyError, match="only ed25519 and ECDSA"):
        keys.load_signer(path, None)
    (tmp_path / "other.pub").write_bytes(
        private.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    )
    with pytest.raises(SigningKeyError, match="only ed25519 and ECDSA"):
        keys.load_public(tmp_path / "other.pub")


@pytest.mark.parametrize("curve", [ec.SECP256R1(), ec.SECP384R1()])
def test_ecdsa_key_files_sign(tmp_path: Path, curve: ec.EllipticCurve) -> None:
    path = tmp_path / "ec.pem"
    path.write_bytes(ec.generate_private_key(curve).private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    signer = keys.load_signer(path, None)
    signer.public_key.verify_signature(signer.sign(b"data"), b"data")


def test_a_path_is_no_uri() -> None:
    for path in ("keys/online", "./file2", "C:\\keys", "unknown:thing"):
        assert not keyservice.is_uri(path)
