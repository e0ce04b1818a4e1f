"""Signing keys that no file holds: named by a URI and used through securesystemslib's signers.

``awskms:``, ``gcpkms:``, ``azurekms:``, ``hv:`` (HashiCorp Vault) and ``hsm:`` (PKCS#11) need the extra of
securesystemslib that a refusal names; ``file2:`` is a plain unencrypted PEM file. Whatever else is registered in
``SIGNER_FOR_URI_SCHEME`` works too if its class has ``import_``.
Promises: a failure of a service is a ``SigningKeyError``. Absent on purpose: making keys in a service.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from types import TracebackType
from typing import Any, Final
from urllib.parse import parse_qsl, urlsplit

from cryptography.hazmat.primitives.serialization import load_pem_private_key
from securesystemslib.exceptions import UnsupportedLibraryError
from securesystemslib.signer import KEY_TYPE_ECDSA, KEY_TYPE_ED25519, SIGNER_FOR_URI_SCHEME, Signer, SSlibKey

from agent.errors import AgentError
from tools.hub.errors import SigningKeyError

KEY_TYPES: Final = (KEY_TYPE_ED25519, KEY_TYPE_ECDSA)  # what devices are asked to verify
Secrets = Callable[[str], str]  # the name of a secret ("pin") -> the secret

_EXTRAS: Final[Mapping[str, str]] = {
    "awskms": "awskms",
    "azurekms": "azurekms",
    "gcpkms": "gcpkms",
    "hsm": "hsm",
    "hv": "vault",
}


KNOWN_SCHEMES: Final = f"Schemes are {', '.join(sorted(_EXTRAS))} and file2."


def is_uri(key: str) -> bool:
    """Tell whether ``key`` names a key by a URI rather than a file."""
    scheme, colon, _ = key.partition(":")
    return bool(colon) and scheme in SIGNER_FOR_URI_SCHEME


def public_key(uri: str, secrets: Secrets) -> SSlibKey:
    """Return the public half of the key, as the service tells it.

    Raises:
        SigningKeyError: the service or its library is not there, or the key is neither ed25519 nor ECDSA.
    """
    with _translated(uri):
        key = _import(uri, secrets)
    if not isinstance(key, SSlibKey) or key.keytype not in KEY_TYPES:
        raise SigningKeyError(f"{uri}: {key.keytype} key; devices verify {' and '.join(KEY_TYPES)} only")
    return key


def signer(uri: str, key: SSlibKey, secrets: Secrets) -> Signer:
    """Return a signer for ``uri`` whose public half is ``key``; errors while it signs are ours as well.

    Raises:
        SigningKeyError: the service or its library is not there, or ``key`` is not its public half.
    """
    with _translated(uri):
        return _Guarded(uri, Signer.from_priv_key_uri(uri, key, secrets))


class _Guarded(Signer):
    """A service's signer whose failures are ours."""

    def __init__(self, uri: str, inner: Signer) -> None:
        self._uri = uri
        self._inner = inner

    @property
    def public_key(self) -> Any:
        return self._inner.public_key

    def sign(self, payload: bytes) -> Any:
        with _translated(self._uri):
            return self._inner.sign(payload)

    @classmethod
    def from_priv_key_uri(cls, priv_key_uri: str, public_key: Any, secrets_handler: Any = None) -> Signer:
        return cls(priv_key_uri, Signer.from_priv_key_uri(priv_key_uri, public_key, secrets_handler))


class _translated(AbstractContextManager[None]):  # noqa: N801  a context manager that reads as a word
    """Turn whatever a service's library raises into ours.

    Each library has classes of its own, none of which is imported here, and securesystemslib's contract is that a
    signer may raise anything: hence every ``Exception``.
    """

    def __init__(self, uri: str) -> None:
        self._uri = uri

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not isinstance(error, Exception) or isinstance(error, AgentError):
            return
        extra = _EXTRAS.get(self._uri.partition(":")[0], "")
        missing = isinstance(error, UnsupportedLibraryError | ImportError)
        hint = f"Install what it needs: pip install 'securesystemslib[{extra}]'" if missing and extra else ""
        raise SigningKeyError(f"{self._uri}: {str(error) or type(error).__name__}", hint=hint) from error


def _import(uri: str, secrets: Secrets) -> Any:
    scheme, _, rest = uri.partition(":")
    service: Any = SIGNER_FOR_URI_SCHEME[scheme]
    match scheme:
        case "file2":
            return SSlibKey.from_crypto(load_pem_private_key(Path(rest).read_bytes(), None).public_key())
        case "azurekms":  # azurekms://VAULT.vault.azure.net/keys/KEY/VERSION
            parts = urlsplit(uri)
            return service.import_(parts.netloc.partition(".")[0], parts.path.split("/")[2])[1]
        case "hsm":  # hsm:2?label=LABEL
            number, _, query = rest.partition("?")
            label = dict(parse_qsl(query)).get("label")
            return service.import_(int(number) if number else None, label, secrets)[1]
        case "hv":  # hv:NAME/VERSION
            return service.import_(rest.partition("/")[0])[1]
        case _:
            return service.import_(rest)[1]
