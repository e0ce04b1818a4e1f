"""Signing keys as files: ed25519, PKCS#8 PEM encrypted by a password, the public half beside it.

``KEY`` is the private file (mode 0600), ``KEY.pub`` the public one. Both are plain PEM that openssl reads. For a key in
a KMS or HSM, ``KEY`` holds its URI instead. ECDSA keys are taken too, since that is what most services have; a key for
OpenSSF model signing is P-256.
Promises: a key file is never overwritten; an unencrypted private key is written only when asked for in so many words.
Absent on purpose: services (``keyservice.py``), and where the password comes from (``cli.py`` asks).
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Final, Literal

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ec import (
    SECP256R1,
    EllipticCurvePrivateKey,
    EllipticCurvePublicKey,
    generate_private_key,
)
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    KeySerializationEncryption,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_pem_private_key,
    load_pem_public_key,
)
from securesystemslib.signer import CryptoSigner, SSlibKey

from agent.durable import sync_directory
from tools.hub.errors import SigningKeyError

Role = Literal["root", "targets", "online", "team", "operator", "oms"]
ROLES: Final[tuple[Role, ...]] = ("root", "targets", "online", "team", "operator", "oms")
_KEY_BYTES_MAX: Final = 64 * 1024
_REFERENCE: Final = b"inferhub key reference\n"
_PASSWORD_CHARS_MIN: Final = 12  # PKCS#8 here means 2048 rounds of PBKDF2: the password has to carry the strength


PrivateKey = Ed25519PrivateKey | EllipticCurvePrivateKey


def generate(path: Path, *, role: Role, password: str | None) -> str:
    """Write a new key pair to ``path`` and ``path.pub``; return its key id.

    Args:
        path: Private key file; its folder is made if it is missing.
        role: What the key is for; a remark in the public file, nothing more.
        password: At least 12 characters; ``None`` writes the private key unencrypted.

    Raises:
        SigningKeyError: the password is too short, or one of the files exists.
    """
    if password is not None and len(password) < _PASSWORD_CHARS_MIN:
        raise SigningKeyError(f"password: at least {_PASSWORD_CHARS_MIN} characters")
    private: PrivateKey = generate_private_key(SECP256R1()) if role == "oms" else Ed25519PrivateKey.generate()
    encryption: KeySerializationEncryption = (
        NoEncryption() if password is None else BestAvailableEncryption(password.encode())
    )
    key = SSlibKey.from_crypto(private.public_key())
    _write_pair(path, private.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, encryption), key, role)
    return str(key.keyid)


def refer(path: Path, uri: str, key: SSlibKey, *, role: Role) -> str:
    """Write ``path`` with the URI of a key that a service holds, and ``path.pub``; return its key id.

    Raises:
        SigningKeyError: one of the files exists.
    """
    _write_pair(path, _REFERENCE + uri.encode() + b"\n", key, role)
    return str(key.keyid)


def uri_in(path: Path) -> str:
    """Return the URI that ``refer`` wrote to ``path``, ``""`` if it is an ordinary key file.

    Raises:
        SigningKeyError: the file cannot be read.
    """
    data = _read(path)
    return data.removeprefix(_REFERENCE).decode().strip() if data.startswith(_REFERENCE) else ""


def public_path_of(path: Path) -> Path:
    """Return where ``generate`` writes the public half of ``path``."""
    return path.with_name(path.name + ".pub")


def load_public(path: Path) -> SSlibKey:
    """Return the public key in ``path``, a public PEM or a private file.

    For a private file its ``.pub`` neighbour is read, so no password is needed.

    Raises:
        SigningKeyError: missing, unreadable, or neither ed25519 nor ECDSA.
    """
    data = _read(path)
    if _signs(data):
        data = _read(public_path_of(path))
    try:
        key = load_pem_public_key(data)
    except (ValueError, UnsupportedAlgorithm) as error:
        raise SigningKeyError(f"{path}: not a public key in PEM: {error}") from error
    if not isinstance(key, Ed25519PublicKey | EllipticCurvePublicKey):
        raise SigningKeyError(f"{path}: {type(key).__name__}; only {_KINDS} keys are used", hint=_MAKE_ONE)
    return SSlibKey.from_crypto(key)


def is_private(path: Path) -> bool:
    """Tell whether ``path`` holds a private key, encrypted or not, or refers to one.

    Raises:
        SigningKeyError: the file cannot be read.
    """
    return _signs(_read(path))


def is_encrypted(path: Path) -> bool:
    """Tell whether ``path`` needs a password.

    Raises:
        SigningKeyError: the file cannot be read.
    """
    return b"ENCRYPTED PRIVATE KEY-----" in _read(path)


def load_signer(path: Path, password: str | None) -> CryptoSigner:
    """Return a signer for the private key in ``path``; ``password`` is ignored for an unencrypted one.

    Raises:
        SigningKeyError: missing, unreadable, neither ed25519 nor ECDSA, or the password is missing or wrong.
    """
    data = _read(path)
    if b"PRIVATE KEY-----" not in data:
        raise SigningKeyError(f"{path}: a public key cannot sign", hint="Name the private key file, without .pub.")
    encrypted = b"ENCRYPTED PRIVATE KEY-----" in data
    if encrypted and not password:
        raise SigningKeyError(f"{path}: is encrypted and no password was given", hint=_GIVE_PASSWORD)
    try:
        key = load_pem_private_key(data, password.encode() if encrypted and password else None)
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        reason = "wrong password" if encrypted else "not a private key in PEM"
        raise SigningKeyError(f"{path}: {reason}", hint=_GIVE_PASSWORD if encrypted else _MAKE_ONE) from error
    if not isinstance(key, PrivateKey):
        raise SigningKeyError(f"{path}: {type(key).__name__}; only {_KINDS} keys are used", hint=_MAKE_ONE)
    return CryptoSigner(key)


_KINDS: Final = "ed25519 and ECDSA"
_MAKE_ONE: Final = "Make one with: inferhub keygen --role ROLE --out FILE"
_GIVE_PASSWORD: Final = "Set INFERHUB_KEY_PASSWORD or give --password-file FILE."


def _write_pair(path: Path, secret: bytes, key: SSlibKey, role: Role) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    public_path = public_path_of(path)
    if public_path.exists():
        raise _exists(public_path)
    _create(path, secret, 0o600)
    _create(public_path, f"inferd {role} key {key.keyid}\n".encode() + _pem(key), 0o644)
    sync_directory(path.parent)


def _pem(key: SSlibKey) -> bytes:
    """Return the public half as PEM, whichever way securesystemslib keeps it (ed25519 as hex)."""
    public: str = key.keyval["public"]
    if "BEGIN PUBLIC KEY" in public:
        return public.strip().encode() + b"\n"
    plain = Ed25519PublicKey.from_public_bytes(bytes.fromhex(public))
    return plain.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)


def _signs(data: bytes) -> bool:
    return b"PRIVATE KEY-----" in data or data.startswith(_REFERENCE)


def _read(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            return file.read(_KEY_BYTES_MAX)
    except OSError as error:
        raise SigningKeyError(f"{path}: {error.strerror}", hint=_MAKE_ONE) from error


def _create(path: Path, data: bytes, mode: int) -> None:
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, mode)
    except FileExistsError as error:
        raise _exists(path) from error
    with os.fdopen(descriptor, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _exists(path: Path) -> SigningKeyError:
    return SigningKeyError(f"{path}: exists already", hint="Keys are never overwritten: choose another name.")
