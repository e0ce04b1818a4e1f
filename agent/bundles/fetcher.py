"""Bytes from a store over ``file://`` and ``http(s)://``, with every wait bounded and every failure one of ours.

A ``Transport`` opens objects; a ``Body`` hands out what has arrived, never waiting for more than one read. Redirects
are followed between http(s) addresses only (trust comes from signatures, not from the address). ``MetadataFetcher`` is
the same as python-tuf wants it, with a deadline for the *whole* file: a server that drips single bytes is cut off.

Child process only: imports urllib3 and tuf.
"""

from __future__ import annotations

import os
import re
import stat
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from typing import IO, Final, Protocol
from urllib.parse import unquote, urlsplit

import urllib3
from tuf.api.exceptions import DownloadHTTPError
from tuf.ngclient.fetcher import FetcherInterface
from urllib3.exceptions import (
    ConnectTimeoutError,
    HTTPError,
    MaxRetryError,
    NewConnectionError,
    ProxyError,
    ReadTimeoutError,
    SSLError,
)
from urllib3.util import Retry, Timeout

from agent.errors import ConfigError, OfflineError, StoreError, TransientError, UntrustedError

READ_BYTES: Final = 128 * 1024
RATE_BYTES_PER_S_MIN: Final = 1024  # averaged over one stall timeout; slower is a stall
_TRANSIENT: Final = frozenset({408, 425, 429})
_CONTENT_RANGE: Final = re.compile(r"bytes (\d{1,15})-\d{1,15}/(?:\d{1,15}|\*)", re.ASCII)


class RefusedError(StoreError):
    """The store answered, and will answer the same again: 4xx, or a file that cannot be opened."""

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status


class Body(Protocol):
    """An object being read. ``offset``: where in the object its first byte lies."""

    offset: int
    validator: str  # strong ETag, "" if there is none

    def read(self) -> bytes:
        """Return what has arrived, ``b""`` at the end; at most ``READ_BYTES``.

        Raises:
            TransientError: cut or silent for the stall timeout.
        """

    def close(self) -> None: ...


class Transport:
    """Opens objects. One per process; may be used from several threads."""

    def __init__(self, *, stall_timeout_s: float, connections: int = 4) -> None:
        self._stall_timeout_s = stall_timeout_s
        self._pool = urllib3.PoolManager(
            num_pools=8,
            maxsize=connections,
            block=False,
            retries=Retry(total=None, connect=0, read=0, redirect=3, status=0, other=0),
            timeout=Timeout(connect=min(10.0, stall_timeout_s), read=stall_timeout_s),
            headers={"User-Agent": "inferd", "Accept-Encoding": "identity"},
        )

    def open(self, url: str, *, offset: int = 0, validator: str = "") -> Body:
        """Return the object from ``offset`` on, or from its start where the store does not do ranges.

        Args:
            url: ``file://`` or ``http(s)://``.
            offset: First byte wanted.
            validator: Strong ETag that the object must still have for the range to hold.

        Raises:
            OfflineError: the store cannot be reached.
            TransientError: it answers 5xx, 408, 425 or 429.
            RefusedError: it answers anything else but the object.
            ConfigError: another scheme.
        """
        if url.startswith("file://"):
            return _FileBody(url, offset)
        if url.startswith(("http://", "https://")):
            return self._open_http(url, offset, validator)
        raise ConfigError(f"[store.urls] {url[:200]!r} is not file:// or http(s)://")

    def read_all(self, url: str, *, size_bytes_max: int, timeout_s: float) -> bytes:
        """Return a small object whole.

        Raises:
            UntrustedError: more than ``size_bytes_max`` bytes.
            TransientError: not complete within ``timeout_s``, cut, or silent.
            OfflineError, RefusedError, ConfigError: as ``open``.
        """
        parts: list[bytes] = []
        received = 0
        deadline = time.monotonic() + timeout_s
        with closing(self.open(url)) as body:
            while part := body.read():
                received += len(part)
                if received > size_bytes_max:
                    raise UntrustedError(f"{url}: more than the {size_bytes_max} bytes it may have")
                if time.monotonic() > deadline:
                    raise TransientError(f"{url}: not complete after {timeout_s:g} s")
                parts.append(part)
        return b"".join(parts)

    def _open_http(self, url: str, offset: int, validator: str) -> Body:
        headers = {"User-Agent": "inferd", "Accept-Encoding": "identity"}
        if offset:
            headers["Range"] = f"bytes={offset}-"
            if validator:
                headers["If-Range"] = validator
        with _translated(url):
            answer = self._pool.request("GET", url, headers=headers, preload_content=False, decode_content=False)
        try:
            return _HttpBody(url, answer, offset, self._stall_timeout_s)
        except BaseException:
            answer.close()
            raise


class MetadataFetcher(FetcherInterface):
    """python-tuf's view of a ``Transport``. 403 and 404 become ``DownloadHTTPError``, the rest stays ours."""

    def __init__(self, transport: Transport, *, timeout_s: float) -> None:
        self._transport = transport
        self._timeout_s = timeout_s

    def _fetch(self, url: str) -> Iterator[bytes]:
        raise AssertionError("tuf calls download_bytes only, which is overridden")

    def download_bytes(self, url: str, max_length: int) -> bytes:
        """Return the file, in memory throughout; see ``Transport.read_all`` for what it raises."""
        try:
            return self._transport.read_all(url, size_bytes_max=max_length, timeout_s=self._timeout_s)
        except RefusedError as error:
            if error.status in (403, 404):
                raise DownloadHTTPError(str(error), error.status) from error
            raise


class _FileBody:
    """A regular file."""

    validator = ""

    def __init__(self, url: str, offset: int) -> None:
        parts = urlsplit(url)
        if parts.netloc not in ("", "localhost"):
            raise ConfigError(f"[store.urls] {url[:200]!r}: file:// takes a local path")
        self.offset = offset
        self._url = url
        self._file = _open_regular(unquote(parts.path), url)
        self._file.seek(offset)

    def read(self) -> bytes:
        try:
            return self._file.read(READ_BYTES)
        except OSError as error:
            raise TransientError(f"{self._url}: {error.strerror}") from error

    def close(self) -> None:
        self._file.close()


def _open_regular(path: str, url: str) -> IO[bytes]:
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)  # a FIFO must not hang us
    except FileNotFoundError as error:
        if not os.path.isdir(_store_folder(path)):
            raise OfflineError(f"{url}: the store is not there") from error
        raise RefusedError(f"{url}: no such object", 404) from error
    except NotADirectoryError as error:
        raise RefusedError(f"{url}: no such object", 404) from error
    except OSError as error:
        raise RefusedError(f"{url}: {error.strerror}", 403) from error
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise RefusedError(f"{url}: not a regular file", 403)
    return os.fdopen(descriptor, "rb", buffering=0)


def _store_folder(path: str) -> str:
    """The folder that holds ``metadata``, ``targets`` and ``blobs``: a stick that is pulled out takes it along."""
    for part in ("/metadata/", "/targets/", "/blobs/"):
        head, found, _ = path.rpartition(part)
        if found:
            return head or "/"
    return os.path.dirname(path)


class _HttpBody:
    """One HTTP answer."""

    def __init__(self, url: str, answer: urllib3.BaseHTTPResponse, offset: int, stall_timeout_s: float) -> None:
        _check_status(url, answer.status)
        etag = answer.headers.get("ETag", "")
        self.validator = etag if etag.startswith('"') else ""
        self.offset = _start_of(url, answer, offset)
        self._url = url
        self._answer = answer
        self._left = _length(answer)
        self._pace = Pace(url, stall_timeout_s)

    def read(self) -> bytes:
        with _translated(self._url):
            part = self._answer.read1(READ_BYTES, decode_content=False)
        if not part:
            if self._left:
                raise TransientError(f"{self._url}: cut {self._left} bytes before its end")
            return b""
        if self._left is not None:
            self._left -= len(part)
        self._pace.add(len(part))
        return part

    def close(self) -> None:
        if self._left == 0:
            self._answer.release_conn()
        else:
            self._answer.close()


class Pace:
    """Tells a slow link from a server that drips bytes to hold us."""

    def __init__(self, what: str, stall_timeout_s: float, now: Callable[[], float] = time.monotonic) -> None:
        self._what = what
        self._stall_timeout_s = stall_timeout_s
        self._now = now
        self._since = now()
        self._received = 0

    def add(self, size: int) -> None:
        """Count ``size`` bytes; ``TransientError`` if the last stall timeout brought less than the minimum rate."""
        self._received += size
        elapsed = self._now() - self._since
        if elapsed < self._stall_timeout_s:
            return
        if self._received < elapsed * RATE_BYTES_PER_S_MIN:
            raise TransientError(f"{self._what}: {self._received} bytes in {elapsed:.0f} s: stalled")
        self._since = self._now()
        self._received = 0


def _check_status(url: str, status: int) -> None:
    if status in (200, 206):
        return
    if status >= 500 or status in _TRANSIENT:
        raise TransientError(f"{url}: the store answers {status}")
    raise RefusedError(f"{url}: the store answers {status}", status)


def _start_of(url: str, answer: urllib3.BaseHTTPResponse, wanted: int) -> int:
    if answer.status == 200:
        return 0
    match = _CONTENT_RANGE.fullmatch(answer.headers.get("Content-Range", "").strip())
    if not match or int(match.group(1)) != wanted:
        raise RefusedError(f"{url}: the store answers another range than asked for", 416)
    return wanted


def _length(answer: urllib3.BaseHTTPResponse) -> int | None:
    text = answer.headers.get("Content-Length", "")
    return int(text) if text.isascii() and text.isdigit() and len(text) <= 15 else None


class _translated:  # noqa: N801 - reads as a phrase: ``with _translated(url):``
    """Turn urllib3's and the socket's errors into ours."""

    def __init__(self, url: str) -> None:
        self._url = url

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, MaxRetryError) and error.reason is not None:
            error = error.reason
        if isinstance(error, NewConnectionError | ConnectTimeoutError | ProxyError | SSLError):
            raise OfflineError(f"{self._url}: cannot be reached: {error}") from error
        if isinstance(error, ReadTimeoutError):
            raise TransientError(f"{self._url}: silent: {error}") from error
        if isinstance(error, HTTPError | OSError):
            raise TransientError(f"{self._url}: {error}") from error
