"""Objects of a store in an S3 bucket, Amazon's or any service that speaks its protocol.

``obstore`` (the extra ``s3``) signs the requests. Credentials come from a file in the format of ``~/.aws/credentials``,
else from the environment (``AWS_ACCESS_KEY_ID``, ``AWS_WEB_IDENTITY_TOKEN_FILE``, ...), else from the machine's role.
Trust comes from signatures of the metadata alone, so a bucket may as well be public.

Child process and publisher only: obstore is large.
"""

from __future__ import annotations

import configparser
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import unquote, urlsplit

from agent.bundles.bodies import READ_BYTES, RefusedError
from agent.bundles.pace import Pace
from agent.config import MirrorConfig
from agent.errors import ConfigError, OfflineError, TransientError

if TYPE_CHECKING:
    from obstore import GetOptions

try:
    import obstore
    from obstore.exceptions import BaseError, PermissionDeniedError, PreconditionError, UnauthenticatedError
    from obstore.store import S3Store as Bucket
except ImportError:  # pragma: no cover - depends on the installation
    obstore = None  # type: ignore[assignment]

_CONNECT_TIMEOUT_S: Final = 10.0
_CREDENTIALS: Final = {  # in the file -> of obstore
    "aws_access_key_id": "access_key_id",
    "aws_secret_access_key": "secret_access_key",
    "aws_session_token": "session_token",
}


class S3Store:
    """``bodies.Source`` over ``s3://bucket/prefix``."""

    def __init__(self, mirror: MirrorConfig, *, stall_timeout_s: float) -> None:
        self._bucket = open_bucket(mirror, timeout_s=stall_timeout_s)
        self._base = mirror.url.rstrip("/")
        self._stall_timeout_s = stall_timeout_s

    def open(self, url: str, *, offset: int, validator: str, deadline: float | None) -> S3Body:
        options: GetOptions = {}
        if offset:
            options["range"] = {"offset": offset}
            if validator:
                options["if_match"] = validator
        with translated(url):
            answer = obstore.get(self._bucket, unquote(url.removeprefix(self._base).lstrip("/")), options=options)
        return S3Body(url, answer, self._stall_timeout_s, deadline)


class S3Body:
    """One object that is being read; what one wait brings may be handed out in several reads."""

    def __init__(self, url: str, answer: Any, stall_timeout_s: float, deadline: float | None) -> None:
        start, end = answer.range
        self.offset = int(start)
        self.validator = str(answer.meta.get("e_tag") or "")
        self._url = url
        self._parts = iter(answer.stream(min_chunk_size=1))
        self._part = memoryview(b"")
        self._left = int(end) - self.offset
        self._deadline = deadline
        self._pace = Pace(url, stall_timeout_s)

    def read(self, size: int = READ_BYTES) -> bytes:
        if not self._part:
            self._wait_for_more()
        part, self._part = bytes(self._part[:size]), self._part[size:]
        return part

    def close(self) -> None:
        self._parts, self._part = iter(()), memoryview(b"")

    def _wait_for_more(self) -> None:
        started = time.monotonic()
        if self._deadline is not None and started > self._deadline:
            raise TransientError(f"{self._url}: not complete in time")
        with translated(self._url):
            self._part = memoryview(next(self._parts, b""))
        if self._part:
            self._left -= len(self._part)
            self._pace.add(len(self._part), time.monotonic() - started)
        elif self._left > 0:
            raise TransientError(f"{self._url}: cut {self._left} bytes before its end")


def available() -> bool:
    """Say whether the extra is installed."""
    return obstore is not None


def open_bucket(mirror: MirrorConfig, *, timeout_s: float) -> Bucket:
    """Return the bucket and prefix that ``mirror`` names. Nothing is asked of it yet.

    Raises:
        ConfigError: the extra is not installed, or the credentials, region or certificates cannot be used.
    """
    if obstore is None:
        raise ConfigError(f"{mirror.url}: s3:// needs the extra: pip install inferd[s3]")
    parts = urlsplit(mirror.url)
    config: dict[str, Any] = _credentials(mirror)
    if mirror.endpoint:
        config["endpoint"] = mirror.endpoint
    if mirror.region:
        config["region"] = mirror.region
    odd = [name for name, value in config.items() if not (value.isascii() and value.isprintable())]
    if odd:  # the library ends the process over them
        raise ConfigError(f"{mirror.url}: {', '.join(odd)}: only printable ASCII can be sent")
    client: dict[str, Any] = {
        "connect_timeout": timedelta(seconds=min(_CONNECT_TIMEOUT_S, timeout_s)),
        "read_timeout": timedelta(seconds=timeout_s),
        "user_agent": "inferd",
    }
    if mirror.endpoint.startswith("http://"):
        client["allow_http"] = True
    if mirror.proxy:
        client["proxy_url"] = mirror.proxy
    if mirror.tls_ca_file:
        client["root_certificate"] = _read(mirror.tls_ca_file, "tls_ca_file")
    try:
        return Bucket(
            parts.netloc,
            prefix=unquote(parts.path).strip("/") or None,
            config=config,  # type: ignore[arg-type]
            client_options=client,  # type: ignore[arg-type]
            retry_config={"max_retries": 0, "retry_timeout": timedelta(seconds=timeout_s)},  # whoever asks tries again
        )
    except (BaseError, ValueError) as error:
        raise ConfigError(f"{mirror.url}: {_first_line(error)}") from None


@contextmanager
def translated(url: str) -> Iterator[None]:
    """Turn obstore's errors into ours; messages of theirs are cut to the line that says what happened."""
    try:
        yield
    except FileNotFoundError as error:
        raise RefusedError(f"{url}: no such object", 404) from error
    except (PermissionDeniedError, UnauthenticatedError, PermissionError) as error:
        raise RefusedError(f"{url}: the credentials do not suffice: {_first_line(error)}", 403) from error
    except PreconditionError as error:
        raise RefusedError(f"{url}: it has changed meanwhile", 412) from error
    except (BaseError, OSError) as error:
        text = str(error)
        if "kind: Connect" in text or "dns error" in text:
            raise OfflineError(f"{url}: cannot be reached: {_first_line(error)}") from error
        raise TransientError(f"{url}: {_first_line(error)}") from error


def _credentials(mirror: MirrorConfig) -> dict[str, Any]:
    if not mirror.credentials_file:
        return {}
    parser = configparser.RawConfigParser()
    try:
        parser.read_string(_read(mirror.credentials_file, "credentials_file").decode())
        section = parser[mirror.credentials_profile]
    except (configparser.Error, UnicodeDecodeError):  # their messages quote the file
        raise ConfigError(
            f"[store.mirrors] credentials_file {mirror.credentials_file}: not a credentials file"
        ) from None
    except KeyError:
        raise ConfigError(
            f"[store.mirrors] credentials_file {mirror.credentials_file}: no section [{mirror.credentials_profile}]"
        ) from None
    return {ours: section[theirs] for theirs, ours in _CREDENTIALS.items() if theirs in section}


def _read(path: str, key: str) -> bytes:
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise ConfigError(f"[store.mirrors] {key} {path}: {error.strerror}") from error


def _first_line(error: BaseException) -> str:
    return str(error).partition("\n")[0][:300]
