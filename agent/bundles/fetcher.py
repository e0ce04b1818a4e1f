"""Bytes from a store over ``file://``, ``http(s)://`` and ``s3://``, every wait bounded and every failure one of ours.

A ``Transport`` opens objects by their full address, in the way that is configured for the mirror they lie on; a
``Body`` hands out what has arrived, never waiting for more than one read. ``MetadataFetcher`` is the same as python-tuf
wants it, with a deadline for the *whole* file: a server that drips single bytes is cut off.

Child process only: imports urllib3 and tuf.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import closing
from urllib.parse import urlsplit

from tuf.api.exceptions import DownloadHTTPError
from tuf.ngclient.fetcher import FetcherInterface

from agent.bundles.bodies import READ_BYTES, Body, RefusedError, Source
from agent.bundles.file_store import FileStore
from agent.bundles.http_store import HttpStore
from agent.bundles.pace import Throttle
from agent.config import MirrorConfig
from agent.errors import ConfigError, TransientError, UntrustedError


class Transport:
    """Opens objects. One per process; may be used from several threads.

    Args:
        mirrors: How to reach the stores that need more than an address.
        stall_timeout_s: No byte for so long ends a transfer.
        connections: Kept open at most, per mirror.
        rate_bytes_per_s_max: Over the network, from all mirrors together; 0: no limit.
        certificate_dates: Whether expired TLS certificates are refused; not when this box does not know the time.
    """

    def __init__(
        self,
        mirrors: Sequence[MirrorConfig] = (),
        *,
        stall_timeout_s: float,
        connections: int = 4,
        rate_bytes_per_s_max: int = 0,
        certificate_dates: bool = True,
    ) -> None:
        self._mirrors = sorted(mirrors, key=lambda mirror: -len(mirror.url))
        self._stall_timeout_s = stall_timeout_s
        self._connections = connections
        self._certificate_dates = certificate_dates
        self._limit = Throttle(rate_bytes_per_s_max)
        self._unlimited = Throttle(0)
        self._sources: dict[str, tuple[Source, Throttle]] = {}
        self._lock = threading.Lock()

    def open(self, url: str, *, offset: int = 0, validator: str = "", deadline: float | None = None) -> Body:
        """Return the object from ``offset`` on, or from its start where the store does not do ranges.

        Args:
            url: ``file://``, ``http(s)://`` or ``s3://``.
            offset: First byte wanted.
            validator: Strong ETag that the object must still have for the range to hold.
            deadline: Monotonic seconds by which the whole object must have been read; no rate limit holds for it.

        Raises:
            OfflineError: the store cannot be reached.
            TransientError: it answers 5xx, 408, 425 or 429.
            RefusedError: it answers anything else but the object.
            ConfigError: another scheme, or credentials that cannot be used.
        """
        source, limit = self._source(url)
        body = source.open(url, offset=offset, validator=validator, deadline=deadline)
        if deadline is not None:
            return body  # small, and late if it had to wait for its turn
        shared = self._unlimited if url.startswith("file://") else self._limit
        return _LimitedBody(body, (shared, limit))

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
        with closing(self.open(url, deadline=deadline)) as body:
            while part := body.read():
                received += len(part)
                if received > size_bytes_max:
                    raise UntrustedError(f"{url}: more than the {size_bytes_max} bytes it may have")
                if time.monotonic() > deadline:
                    raise TransientError(f"{url}: not complete after {timeout_s:g} s")
                parts.append(part)
        return b"".join(parts)

    def _source(self, url: str) -> tuple[Source, Throttle]:
        mirror = next((mirror for mirror in self._mirrors if _lies_on(url, mirror.url)), None) or _plain_mirror(url)
        with self._lock:
            if mirror.url not in self._sources:
                self._sources[mirror.url] = self._make(mirror), Throttle(mirror.rate_bytes_per_s_max)
            return self._sources[mirror.url]

    def _make(self, mirror: MirrorConfig) -> Source:
        scheme = mirror.url.partition("://")[0]
        if scheme == "file":
            return FileStore()
        if scheme in ("http", "https"):
            return HttpStore(
                mirror,
                stall_timeout_s=self._stall_timeout_s,
                connections=self._connections,
                certificate_dates=self._certificate_dates,
            )
        from agent.bundles.s3_store import S3Store  # here, because its library is an extra and large

        return S3Store(mirror, stall_timeout_s=self._stall_timeout_s)


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


class _LimitedBody:
    """A body whose bytes are paid for at each limit."""

    def __init__(self, body: Body, limits: Sequence[Throttle]) -> None:
        self.offset = body.offset
        self.validator = body.validator
        self._body = body
        self._limits = limits
        self._read_bytes = min(limit.read_bytes for limit in limits)

    def read(self, size: int = READ_BYTES) -> bytes:
        part = self._body.read(min(size, self._read_bytes))
        for limit in self._limits:
            limit.spend(len(part))
        return part

    def close(self) -> None:
        self._body.close()


def _plain_mirror(url: str) -> MirrorConfig:
    """Return the mirror of an address that none is configured for."""
    parts = urlsplit(url)
    try:
        return MirrorConfig(url=f"{parts.scheme}://{parts.netloc}" if parts.scheme != "file" else "file:///")
    except ValueError as error:
        raise ConfigError(f"[store.urls] {error}") from error


def _lies_on(url: str, mirror: str) -> bool:
    base = mirror.rstrip("/")
    return url == base or url.startswith(f"{base}/")
