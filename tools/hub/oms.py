"""OpenSSF model signatures (OMS): which files, byte for byte, did somebody put their name to?

A signature is a Sigstore bundle around a DSSE envelope around an in-toto statement that lists every file with its
sha256. Here it is made and checked with one ECDSA key, as ``model_signing sign key`` and ``verify key`` do; the list is
our manifest's own, so nothing is hashed twice. The format of release 0.2, which is still about, is read, not written.

Promises: what ``verify`` returns was signed by the key given. Absent on purpose: Sigstore identities, certificate
chains and signatures over parts of files (``shards``).
"""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping
from hashlib import sha256
from pathlib import Path, PurePosixPath
from typing import Any, Final

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ec import ECDSA, EllipticCurvePublicKey
from cryptography.hazmat.primitives.hashes import SHA256, SHA384, SHA512, HashAlgorithm
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat, load_pem_public_key
from securesystemslib.signer import ECDSA_SHA2_NISTP256, Signer

from agent.bundles.layout import MANIFEST_FILE, VERIFIED_FILE
from agent.bundles.manifest import Manifest
from agent.errors import UntrustedError
from tools.hub.errors import SigningKeyError, SourceError

MEDIA_TYPE: Final = "application/vnd.dev.sigstore.bundle.v0.3+json"
PAYLOAD_TYPE: Final = "application/vnd.in-toto+json"
STATEMENT_TYPE: Final = "https://in-toto.io/Statement/v1"
PREDICATE_TYPE: Final = "https://model_signing/signature/v1.0"
_PREDICATE_TYPE_0_2: Final = "https://model_signing/Digests/v0.1"
_SIZE_BYTES_MAX: Final = 16 << 20
_READ_BYTES: Final = 1 << 20
_HASHES: Final[Mapping[str, HashAlgorithm]] = {"secp256r1": SHA256(), "secp384r1": SHA384(), "secp521r1": SHA512()}


def target_path(manifest: Manifest) -> str:
    """Return the TUF target that holds the signature of a version's files."""
    return f"models/{manifest.team}/{manifest.name}/{manifest.version}.oms.json"


def key_id(signer: Signer) -> str:
    """Return how OMS names a key: the sha256 of its PEM.

    Raises:
        SigningKeyError: it is no P-256 key.
    """
    key = signer.public_key
    if key.scheme != ECDSA_SHA2_NISTP256:
        raise SigningKeyError(
            f"{key.scheme}: OpenSSF model signatures are made with ECDSA P-256",
            hint="Make a key with: inferhub keygen --role oms --out FILE",
        )
    public = load_pem_public_key(key.keyval["public"].encode())
    assert isinstance(public, EllipticCurvePublicKey)
    return _hint(public)


def sign(manifest: Manifest, signer: Signer) -> bytes:
    """Return the signature over the files that ``manifest`` lists; raises ``SigningKeyError`` as ``key_id``."""
    resources = [
        {"name": file.path, "algorithm": "sha256", "digest": file.sha256}
        for file in sorted(manifest.files, key=lambda file: PurePosixPath(file.path))
    ]
    statement = {
        "_type": STATEMENT_TYPE,
        "subject": [{"name": f"{manifest.name}-{manifest.version}", "digest": {"sha256": _root_digest(resources)}}],
        "predicateType": PREDICATE_TYPE,
        "predicate": {
            "serialization": {
                "method": "files",
                "hash_type": "sha256",
                "allow_symlinks": False,
                "ignore_paths": [MANIFEST_FILE, VERIFIED_FILE],  # a box adds these
            },
            "resources": resources,
        },
    }
    hint = key_id(signer)
    payload = json.dumps(statement).encode()
    signature = signer.sign(_pae(payload))
    bundle = {
        "mediaType": MEDIA_TYPE,
        "verificationMaterial": {"publicKey": {"hint": hint}, "tlogEntries": []},
        "dsseEnvelope": {
            "payload": base64.b64encode(payload).decode(),
            "payloadType": PAYLOAD_TYPE,
            "signatures": [{"sig": base64.b64encode(bytes.fromhex(signature.signature)).decode(), "keyid": ""}],
        },
    }
    return json.dumps(bundle).encode()


def load_key(path: Path) -> EllipticCurvePublicKey:
    """Return the ECDSA key in ``path``: a public key or a certificate, in PEM.

    Raises:
        SigningKeyError: missing, unreadable or another kind of key.
    """
    try:
        data = path.read_bytes()
        certificate = b"BEGIN CERTIFICATE" in data
        key = x509.load_pem_x509_certificate(data).public_key() if certificate else load_pem_public_key(data)
    except OSError as error:
        raise SigningKeyError(f"{path}: {error.strerror}") from error
    except (ValueError, UnsupportedAlgorithm) as error:
        raise SigningKeyError(f"{path}: neither a public key nor a certificate in PEM: {error}") from error
    if not isinstance(key, EllipticCurvePublicKey) or key.curve.name not in _HASHES:
        raise SigningKeyError(f"{path}: OpenSSF model signatures are checked with ECDSA keys only")
    return key


def verify(data: bytes, key: EllipticCurvePublicKey) -> dict[str, str]:
    """Return the files that ``key`` signed: path to sha256.

    Raises:
        UntrustedError: the signature is not ``key``'s, or ``data`` is no such signature.
    """
    hint, payload, signature, files = _parse(data)
    if hint and hint != _hint(key):
        raise UntrustedError(f"signed by the key {hint[:12]}, not by {_hint(key)[:12]}")
    _check_signature(key, payload, signature)
    return files


def signed_files(data: bytes) -> dict[str, str]:
    """Return the files that a signature lists, whoever made it; ``UntrustedError`` if ``data`` is none."""
    return _parse(data)[3]


def verify_folder(folder: Path, signature: Path, key: EllipticCurvePublicKey) -> dict[str, str]:
    """Return the signed files after comparing each with ``folder``; files beyond them are not looked at.

    Raises:
        SourceError: the signature cannot be read, or a signed file is missing.
        UntrustedError: as ``verify``, or a file has other bytes than were signed.
    """
    try:
        with signature.open("rb") as file:
            data = file.read(_SIZE_BYTES_MAX)
    except OSError as error:
        raise SourceError(f"{signature}: {error.strerror}") from error
    files = verify(data, key)
    for name, digest in files.items():
        parts = PurePosixPath(name)
        path = folder / parts
        if parts.is_absolute() or ".." in parts.parts or path.is_symlink() or not path.is_file():
            raise SourceError(f"{signature} covers {name!r}, which is no file of {folder}")
        if _digest(path) != digest:
            raise UntrustedError(f"{path}: other bytes than {signature} was made for")
    return files


def upstream_record(folder: Path, signature: Path, key_file: Path, *, verified_at: str) -> dict[str, str]:
    """Check a signature that came with a model; return what a manifest says about it. Raises as the parts do."""
    key = load_key(key_file)
    files = verify_folder(folder, signature, key)
    return {"identity": f"key sha256:{_hint(key)}", "verified_at": verified_at, "files": str(len(files))}


def _parse(data: bytes) -> tuple[str, bytes, bytes, dict[str, str]]:
    """Return the key's name, the payload, its signature and the files it lists."""
    try:
        bundle = json.loads(data)
        material, envelope = bundle["verificationMaterial"], bundle["dsseEnvelope"]
        if bundle["mediaType"] != MEDIA_TYPE or envelope["payloadType"] != PAYLOAD_TYPE:
            raise UntrustedError(f"{bundle['mediaType']} with {envelope['payloadType']} is no OpenSSF model signature")
        hint = (material.get("publicKey") or {}).get("hint") or ""
        payload = base64.b64decode(envelope["payload"], validate=True)
        signature = base64.b64decode(envelope["signatures"][0]["sig"], validate=True)
        return hint, payload, signature, _files(json.loads(payload))
    except (ValueError, KeyError, IndexError, TypeError, AttributeError, RecursionError) as error:
        raise UntrustedError(f"not an OpenSSF model signature: {error!r}") from error


def _files(statement: Any) -> dict[str, str]:
    if statement["_type"] != STATEMENT_TYPE:
        raise UntrustedError(f"statement of type {statement['_type']!r}")
    kind = statement["predicateType"]
    if kind == _PREDICATE_TYPE_0_2:
        return {str(item["name"]): str(item["digest"]["sha256"]) for item in statement["subject"]}
    if kind != PREDICATE_TYPE:
        raise UntrustedError(f"predicate of type {kind!r}")
    method = statement["predicate"]["serialization"]["method"]
    resources = statement["predicate"]["resources"]
    if method != "files" or any(item["algorithm"] != "sha256" for item in resources):
        raise UntrustedError(f"signed by {method!r}; only whole files with sha256 can be checked")
    if statement["subject"][0]["digest"]["sha256"] != _root_digest(resources):
        raise UntrustedError("the digest over all files is not that of the list")
    return {str(item["name"]): str(item["digest"]) for item in resources}


def _check_signature(key: EllipticCurvePublicKey, payload: bytes, signature: bytes) -> None:
    algorithm = ECDSA(_HASHES[key.curve.name])
    # Release 0.2 signed the Python text of the bytes by mistake; its signatures are still served.
    mistaken = f"DSSEV1 {len(PAYLOAD_TYPE)} {PAYLOAD_TYPE} {len(payload)} {payload!r}".encode()
    for signed in (_pae(payload), mistaken):
        try:
            key.verify(signature, signed, algorithm)
        except InvalidSignature:
            continue
        return
    raise UntrustedError(f"the signature is not that of the key {_hint(key)[:12]}")


def _pae(payload: bytes) -> bytes:
    return b"DSSEv1 %d %s %d %s" % (len(PAYLOAD_TYPE), PAYLOAD_TYPE.encode(), len(payload), payload)


def _root_digest(resources: list[dict[str, str]]) -> str:
    return sha256(b"".join(bytes.fromhex(item["digest"]) for item in resources)).hexdigest()


def _hint(key: EllipticCurvePublicKey) -> str:
    return sha256(key.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)).hexdigest()


def _digest(path: Path) -> str:
    digest = sha256()
    with path.open("rb") as file:
        while piece := file.read(_READ_BYTES):
            digest.update(piece)
    return digest.hexdigest()
