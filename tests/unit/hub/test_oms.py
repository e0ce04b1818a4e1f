"""OpenSSF model signatures: one that their own tool made is read, ours say what theirs say, and lies are found."""

from __future__ import annotations

import base64
import json
import time
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_pem_public_key,
)
from securesystemslib.signer import CryptoSigner

from agent.errors import UntrustedError
from tests.fakes import bundles
from tests.fakes.hub import Centre, Clock
from tools.hub import oms
from tools.hub.errors import ConflictError, SigningKeyError, SourceError
from tools.hub.verify import verify

pytestmark = pytest.mark.unit

# Made by model-signing 1.1.1: `model_signing sign key model --signature model.sig --private_key k.pem`.
KEY = b"""\
-----BEGIN PUBLIC KEY-----
MFkwEwYHKoZIzj0CAQYIKoZIzj0DAQcDQgAEAtsB/5DgVyHNY7MPnDog7O2RQrz0
Al7IrvOeXyIZo3MCSpuBPm1CsPn6V09YOXlIV51Ci9+ErBrgFJ1GWvRvEw==
-----END PUBLIC KEY-----
"""
FILES = {"weights.bin": b"weights\n", "sub/config.json": b"cfg\n", "sub-a.txt": b"aa\n"}
PAYLOAD = (
    "ewogICJfdHlwZSI6ICJodHRwczovL2luLXRvdG8uaW8vU3RhdGVtZW50L3YxIiwKICAic3ViamVjdCI6IFsKICAgIHsKICAgICAgIm5hbWUi"
    "OiAibW9kZWwiLAogICAgICAiZGlnZXN0IjogewogICAgICAgICJzaGEyNTYiOiAiN2ZjNjg1N2YyYjNjNzgzODc5MGE0NjNkZjRhZGY0NTg3"
    "MjE2Yzg3MjE2ZTVmZDJlZWZhMDczMWMzMmNkYmFiNCIKICAgICAgfQogICAgfQogIF0sCiAgInByZWRpY2F0ZVR5cGUiOiAiaHR0cHM6Ly9t"
    "b2RlbF9zaWduaW5nL3NpZ25hdHVyZS92MS4wIiwKICAicHJlZGljYXRlIjogewogICAgInNlcmlhbGl6YXRpb24iOiB7CiAgICAgICJtZXRo"
    "b2QiOiAiZmlsZXMiLAogICAgICAiaWdub3JlX3BhdGhzIjogWwogICAgICAgICIuZ2l0aHViIiwKICAgICAgICAiLmdpdGlnbm9yZSIsCiAg"
    "ICAgICAgIi5naXQiLAogICAgICAgICIuZ2l0YXR0cmlidXRlcyIKICAgICAgXSwKICAgICAgImhhc2hfdHlwZSI6ICJzaGEyNTYiLAogICAg"
    "ICAiYWxsb3dfc3ltbGlua3MiOiBmYWxzZQogICAgfSwKICAgICJyZXNvdXJjZXMiOiBbCiAgICAgIHsKICAgICAgICAiYWxnb3JpdGhtIjog"
    "InNoYTI1NiIsCiAgICAgICAgIm5hbWUiOiAic3ViL2NvbmZpZy5qc29uIiwKICAgICAgICAiZGlnZXN0IjogIjRkNTIzZGVlNmJjOGMxN2Ez"
    "ZTI4MzU3MDUyNmQ4ZDZlZDNkMWVkZGEwN2M1M2U5NGM1NWU0OTFiYmY3ODAzMzciCiAgICAgIH0sCiAgICAgIHsKICAgICAgICAiYWxnb3Jp"
    "dGhtIjogInNoYTI1NiIsCiAgICAgICAgIm5hbWUiOiAic3ViLWEudHh0IiwKICAgICAgICAiZGlnZXN0IjogImQ5Y2Q4MTU1NzY0YzM1NDNm"
    "MTBmYWQ4YTQ4MGQ3NDMxMzc0NjZmOGQ1NTIxM2M4ZWFlZmNkMTJmMDZkNDNhODAiCiAgICAgIH0sCiAgICAgIHsKICAgICAgICAiYWxnb3Jp"
    "dGhtIjogInNoYTI1NiIsCiAgICAgICAgIm5hbWUiOiAid2VpZ2h0cy5iaW4iLAogICAgICAgICJkaWdlc3QiOiAiMWI0NjVmYTZiNmJjYmMw"
    "NmEzMTk5ZTNkMmQ4YWVjMzVkMzc0OTRhNzEyZjg4OGI2ZDU1MzY2ODRkZDg5ZDBmMCIKICAgICAgfQogICAgXQogIH0KfQ=="
)
SIG = "MEUCIQCXmnUiN0Yq0UglJEh1cMjH4jHeQwnKtselq/TxXKaXjAIgfIAgpuMMBzIWTKpn6Q36hzwZhXXW7A3LQtz5svIaWRw="
SIGNATURE = {
    "mediaType": "application/vnd.dev.sigstore.bundle.v0.3+json",
    "verificationMaterial": {
        "publicKey": {"hint": "afc3c2fa1a9fe76f22cf1b67c519cd0d1e97dce59b6492a61632ee8545e29cf3"},
        "tlogEntries": [],
    },
    "dsseEnvelope": {
        "payload": PAYLOAD,
        "payloadType": "application/vnd.in-toto+json",
        "signatures": [
            {
                "sig": SIG,
                "keyid": "",
            }
        ],
    },
}


@pytest.fixture
def upstream(tmp_path: Path) -> Path:
    """The folder that was signed, with ``k.pub`` and ``model.sig`` beside it."""
    for name, data in FILES.items():
        path = tmp_path / "model" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    (tmp_path / "k.pub").write_bytes(KEY)
    (tmp_path / "model.sig").write_text(json.dumps(SIGNATURE))
    return tmp_path


def record(folder: Path, key: str = "k.pub") -> dict[str, str]:
    return oms.upstream_record(folder / "model", folder / "model.sig", folder / key, verified_at="2026-11-21T08:00:00Z")


def test_a_signature_of_the_reference_tool_holds(upstream: Path) -> None:
    hint = SIGNATURE["verificationMaterial"]["publicKey"]["hint"]  # type: ignore[index]
    assert record(upstream) == {
        "identity": f"key sha256:{hint}",
        "verified_at": "2026-11-21T08:00:00Z",
        "files": "3",
    }
    (upstream / "model/README.md").write_text("not signed")  # what a publisher adds is not its business
    record(upstream)


@pytest.mark.parametrize("name", list(FILES))
def test_a_changed_missing_or_linked_file_is_found(upstream: Path, name: str) -> None:
    path = upstream / "model" / name
    data = path.read_bytes()
    path.write_bytes(data + b"!")
    with pytest.raises(UntrustedError, match="other bytes"):
        record(upstream)
    path.unlink()
    with pytest.raises(SourceError, match="no file"):
        record(upstream)
    (upstream / "elsewhere").write_bytes(data)
    path.symlink_to(upstream / "elsewhere")
    with pytest.raises(SourceError, match="no file"):
        record(upstream)


def changed(**paths: Any) -> bytes:
    value = json.loads(json.dumps(SIGNATURE))
    for path, new in paths.items():
        part = value
        *folders, last = path.split("__")
        for name in folders:
            part = part[int(name) if name.isdigit() else name]
        part[int(last) if last.isdigit() else last] = new
    return json.dumps(value).encode()


STATEMENT = json.loads(base64.b64decode(PAYLOAD))


def payload(**changes: Any) -> str:
    return base64.b64encode(json.dumps(STATEMENT | changes).encode()).decode()


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"[]",
        b"{}",
        b"[" * 20_000,
        changed(mediaType="application/json"),
        changed(dsseEnvelope__payloadType="text/plain"),
        changed(dsseEnvelope__payload="%%%"),
        changed(dsseEnvelope__payload=payload(subject=[])),
        changed(dsseEnvelope__payload=payload(_type="other")),
        changed(dsseEnvelope__payload=payload(predicateType="other")),
        changed(dsseEnvelope__payload=payload(extra=1)),  # well-formed, and not what was signed
        changed(dsseEnvelope__payload=payload(predicate={"serialization": {"method": "shards"}, "resources": []})),
        changed(dsseEnvelope__signatures=[]),
        changed(dsseEnvelope__signatures__0__sig="AAAA"),
        changed(verificationMaterial__publicKey__hint="0" * 64),
    ],
)
def test_what_is_no_signature_of_the_key_is_refused(data: bytes) -> None:
    key = load_pem_public_key(KEY)
    assert isinstance(key, ec.EllipticCurvePublicKey)
    with pytest.raises(UntrustedError):
        oms.verify(data, key)


def test_another_key_is_not_believed_even_without_a_hint(upstream: Path) -> None:
    other = ec.generate_private_key(ec.SECP256R1()).public_key()
    (upstream / "other.pub").write_bytes(other.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo))
    with pytest.raises(UntrustedError, match="signed by the key"):
        record(upstream, "other.pub")
    (upstream / "model.sig").write_bytes(changed(verificationMaterial__publicKey__hint=""))
    with pytest.raises(UntrustedError, match="not that of the key"):
        record(upstream, "other.pub")
    record(upstream)


def test_a_certificate_stands_for_its_key_and_release_0_2_is_read(upstream: Path) -> None:
    """As vendors that sign with a certificate published before release 1.0: no hint, digests as subjects."""
    private = ec.generate_private_key(ec.SECP384R1())
    files = oms.verify(json.dumps(SIGNATURE).encode(), oms.load_key(upstream / "k.pub"))
    statement = json.dumps(
        {
            "_type": oms.STATEMENT_TYPE,
            "subject": [{"name": name, "digest": {"sha256": digest}} for name, digest in files.items()],
            "predicateType": "https://model_signing/Digests/v0.1",
            "predicate": {},
        }
    ).encode()
    kind = oms.PAYLOAD_TYPE
    signed = f"DSSEV1 {len(kind)} {kind} {len(statement)} {statement!r}".encode()
    bundle = json.loads(changed(verificationMaterial={"x509CertificateChain": {"certificates": []}}))
    bundle["dsseEnvelope"]["payload"] = base64.b64encode(statement).decode()
    signature = private.sign(signed, ec.ECDSA(oms._HASHES["secp384r1"]))
    bundle["dsseEnvelope"]["signatures"][0]["sig"] = base64.b64encode(signature).decode()
    (upstream / "model.sig").write_text(json.dumps(bundle))
    (upstream / "vendor.pem").write_bytes(certificate(private).public_bytes(Encoding.PEM))
    assert record(upstream, "vendor.pem")["files"] == "3"


def certificate(private: ec.EllipticCurvePrivateKey) -> x509.Certificate:
    from datetime import UTC, datetime, timedelta

    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "vendor")])
    builder = x509.CertificateBuilder(name, name, private.public_key(), x509.random_serial_number())
    now = datetime.now(UTC)
    return builder.not_valid_before(now).not_valid_after(now + timedelta(days=1)).sign(private, SHA256())


def test_keys_of_other_kinds_are_refused(tmp_path: Path) -> None:
    with pytest.raises(SigningKeyError, match="P-256"):
        oms.key_id(CryptoSigner.generate_ed25519())
    with pytest.raises(SigningKeyError):
        oms.load_key(tmp_path / "missing")
    (tmp_path / "junk").write_bytes(b"junk")
    with pytest.raises(SigningKeyError, match="neither"):
        oms.load_key(tmp_path / "junk")
    odd = ec.generate_private_key(ec.SECP256K1())
    (tmp_path / "odd").write_bytes(odd.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo))
    with pytest.raises(SigningKeyError, match="ECDSA keys only"):
        oms.load_key(tmp_path / "odd")
    private = odd.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    (tmp_path / "private").write_bytes(private)
    with pytest.raises(SigningKeyError, match="neither"):
        oms.load_key(tmp_path / "private")


@pytest.fixture
def centre(tmp_path: Path) -> Centre:
    centre = Centre(tmp_path / "store", Clock(time.time()))
    centre.initialise()
    return centre


def public(signer: CryptoSigner) -> ec.EllipticCurvePublicKey:
    key = load_pem_public_key(signer.public_key.keyval["public"].encode())
    assert isinstance(key, ec.EllipticCurvePublicKey)
    return key


def test_a_published_version_carries_a_signature_over_its_files(centre: Centre, tmp_path: Path) -> None:
    signer = CryptoSigner.generate_ecdsa()
    bundle = bundles.pack(tmp_path / "bundle", bundles.plain_files(rows=16))
    done = centre.publish(bundle, "stable", oms_signer=signer)
    assert done.changed
    assert done.manifest_sha256 != bundle.sha256  # it names the signature
    assert verify(str(centre.root), centre.anchor, deep=True, oms_key=public(signer)).model_signatures == 1
    assert not centre.publish(bundle, "stable", oms_signer=signer).changed
    with pytest.raises(ConflictError, match="another manifest"):
        centre.publish(bundle, "stable")
    with pytest.raises(UntrustedError, match="signed by the key"):
        verify(str(centre.root), centre.anchor, deep=False, oms_key=public(CryptoSigner.generate_ecdsa()))
    with pytest.raises(SigningKeyError):
        centre.publish(bundle, oms_signer=centre.online)


def test_the_signature_is_a_bundle_as_the_reference_tool_writes_it(tmp_path: Path) -> None:
    signer = CryptoSigner.generate_ecdsa()
    bundle = bundles.pack(tmp_path / "bundle", bundles.plain_files(rows=16))
    data = oms.sign(bundle.manifest, signer)
    ours = json.loads(data)
    assert oms.verify(data, public(signer)) == {file.path: file.sha256 for file in bundle.manifest.files}
    assert ours["verificationMaterial"]["publicKey"]["hint"] == oms.key_id(signer)
    assert shape(ours) == shape(SIGNATURE)
    statement = json.loads(base64.b64decode(ours["dsseEnvelope"]["payload"]))
    assert shape(statement) == shape(STATEMENT)
    assert statement["predicate"]["serialization"] == {
        "method": "files",
        "hash_type": "sha256",
        "allow_symlinks": False,
        "ignore_paths": ["manifest.json", "VERIFIED.json"],
    }


def shape(value: Any) -> Any:
    """Return which keys a JSON value has, with lists as their first item's shape."""
    if isinstance(value, dict):
        return {key: shape(item) for key, item in value.items()}
    return [shape(value[0])] if isinstance(value, list) and value else type(value)
