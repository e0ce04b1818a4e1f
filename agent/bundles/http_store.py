"""Objects of a store on any web server or CDN: certificates, tokens and proxies, with every wait bounded.

Redirects are followed between http(s) addresses only (trust comes from signatures, not from the address); the token
stays with the host it was meant for, and what a redirect says besides its address is not read. Headers that drip are
cut off like bodies that do, and so is what frames a chunked body. Without a clock that can be believed the dates of
certificates are not judged; their names and issuers are.

Child process only: imports urllib3.
"""

from __future__ import annotations

import re
import socket
import ssl
import threading
import time
from base64 import b64encode
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from http.client import HTTPException
from pathlib import Path
from typing import Final
from urllib.parse import unquote, urljoin, urlsplit, urlunsplit

import urllib3
from urllib3.connection import HTTPConnection, HTTPSConnection
from urllib3.connectionpool import HTTPConnectionPool, HTTPSConnectionPool
from urllib3.exceptions import (
    ConnectTimeoutError,
    HTTPError,
    MaxRetryError,
    NewConnectionError,
    ProxyError,
    ReadTimeoutError,
    SSLError,
)
from urllib3.util import Retry, Timeout, parse_url

from agent.bundles.bodies import READ_BYTES, RefusedError
from agent.bundles.pace import Pace
from agent.config import MirrorConfig
from agent.errors import ConfigError, OfflineError, TransientError

_TRANSIENT: Final = frozenset({408, 425, 429})
_CONTENT_RANGE: Final = re.compile(r"bytes (\d{1,15})-\d{1,15}/(?:\d{1,15}|\*)", re.ASCII)
_TOKEN: Final = re.compile(r"[\x21-\x7e]{1,8192}", re.ASCII)
_CONNECT_TIMEOUT_S: Final = 10.0
_REDIRECTS_MAX: Final = 3
_NO_CHECK_TIME: Final = 0x200000  # X509_V_FLAG_NO_CHECK_TIME, which the ssl module does not name
_PORTS: Final = {"http": 80, "https": 443}
_HEADERS: Final = {"User-Agent": "inferd", "Accept-Encoding": "identity"}


class HttpStore:
    """``bodies.Source`` over http(s)://.

    Args:
        mirror: How to get there.
        stall_timeout_s: No byte for so long ends a transfer.
        connections: Kept open at most.
        certificate_dates: Whether expired certificates are refused.
    """

    def __init__(
        self, mirror: MirrorConfig, *, stall_timeout_s: float, connections: int, certificate_dates: bool = True
    ) -> None:
        self._stall_timeout_s = stall_timeout_s
        self._headers = {**_HEADERS, **_authorization(mirror)}
        self._pool = _pool(mirror, connections, certificate_dates)

    def open(self, url: str, *, offset: int, validator: str, deadline: float | None) -> HttpBody:
        headers = self._headers.copy()
        if offset:
            headers["Range"] = f"bytes={offset}-"
            if validator:
                headers["If-Range"] = validator
        with _translated(url):
            answer = self._follow(url, headers, deadline)
        try:
            return HttpBody(url, answer, offset, self._stall_timeout_s, deadline)
        except BaseException:
            answer.close()
            raise

    def _follow(self, url: str, headers: dict[str, str], deadline: float | None) -> urllib3.BaseHTTPResponse:
        """Return the answer at the end of the redirects; urllib3 would read their bodies, which may never end."""
        address = url
        for _ in range(_REDIRECTS_MAX + 1):
            wait_s = self._stall_timeout_s
            if deadline is not None:
                wait_s = max(0.001, min(wait_s, deadline - time.monotonic()))
            answer = self._pool.request(
                "GET",
                address,
                headers=headers,
                redirect=False,
                preload_content=False,
                decode_content=False,
                timeout=Timeout(connect=min(_CONNECT_TIMEOUT_S, wait_s), read=wait_s),
            )
            location = answer.get_redirect_location()
            if not location:
                return answer
            answer.close()
            before, address = address, urljoin(address, location)
            if _origin(address) != _origin(before):
                headers.pop("Authorization", None)
        raise RefusedError(f"{url}: more than {_REDIRECTS_MAX} redirects", 310)


class HttpBody:
    """One HTTP answer."""

    def __init__(
        self, url: str, answer: urllib3.BaseHTTPResponse, offset: int, stall_timeout_s: float, deadline: float | None
    ) -> None:
        _check_status(url, answer.status)
        etag = answer.headers.get("ETag", "")
        self.validator = etag if etag.startswith('"') else ""
        self.offset = _start_of(url, answer, offset)
        self._url = url
        self._answer = answer
        self._left = _length(answer)
        self._wire: socket.socket | None = getattr(answer.connection, "wire", None)
        self._chunked = "chunked" in answer.headers.get("Transfer-Encoding", "").lower()
        self._stall_timeout_s = stall_timeout_s
        self._deadline = deadline
        self._pace = Pace(url, stall_timeout_s)

    def read(self, size: int = READ_BYTES) -> bytes:
        started = time.monotonic()
        wait_s = self._bound_wait(started)
        with _translated(self._url), _cut_after(wait_s, self._wire if self._chunked else None, "a chunk's frame"):
            part = self._answer.read1(size, decode_content=False)
        if not part:
            if self._left:
                raise TransientError(f"{self._url}: cut {self._left} bytes before its end")
            return b""
        if self._left is not None:
            self._left -= len(part)
        self._pace.add(len(part), time.monotonic() - started)
        return part

    def close(self) -> None:
        if self._left == 0:
            self._answer.release_conn()
        else:
            self._answer.close()

    def _bound_wait(self, now: float) -> float:
        """Let the next read wait for no longer than is left of the deadline, and return how long."""
        if self._deadline is None:
            return self._stall_timeout_s
        left_s = self._deadline - now
        if left_s <= 0:
            raise TransientError(f"{self._url}: not complete in time")
        wait_s = min(self._stall_timeout_s, left_s)
        held = getattr(self._answer.connection, "sock", None)
        if held is not None:
            held.settimeout(wait_s)
        return wait_s


@contextmanager
def _cut_after(wait_s: float, wire: socket.socket | None, what: str) -> Iterator[None]:
    """Shut ``wire`` down if the block takes longer: a timeout of its own bounds each read only, and a drip has many."""
    if wire is None:
        yield
        return
    fired = threading.Event()

    def cut() -> None:
        fired.set()
        with suppress(OSError):  # the other side was first
            socket.socket.shutdown(wire, socket.SHUT_RDWR)  # below TLS, whose state is the other thread's

    alarm = threading.Timer(wait_s, cut)
    alarm.daemon = True
    alarm.start()
    try:
        yield
    except (HTTPError, HTTPException, OSError) as error:
        if fired.is_set():
            raise TimeoutError(f"{what} took too long") from error
        raise
    finally:
        alarm.cancel()
    if fired.is_set():
        raise TimeoutError(f"{what} took too long")


class _CutHeaders:
    """Bounds the whole wait for an answer's headers."""

    sock: socket.socket
    timeout: float
    wire: socket.socket  # of the last answer; ``sock`` goes where the server closes the connection after it

    def getresponse(self) -> urllib3.HTTPResponse:
        self.wire = self.sock
        with _cut_after(self.timeout, self.wire, "the answer's headers"):
            answer: urllib3.HTTPResponse = super().getresponse()  # type: ignore[misc]
        return answer


class _PlainConnection(_CutHeaders, HTTPConnection):  # type: ignore[misc]
    """One connection over http://."""


class _TlsConnection(_CutHeaders, HTTPSConnection):  # type: ignore[misc]
    """One connection over https://."""


class _PlainPool(HTTPConnectionPool):
    ConnectionCls = _PlainConnection  # type: ignore[assignment]


class _TlsPool(HTTPSConnectionPool):
    ConnectionCls = _TlsConnection  # type: ignore[assignment]


def _pool(mirror: MirrorConfig, connections: int, certificate_dates: bool) -> urllib3.PoolManager:
    options = {
        "num_pools": 8,
        "maxsize": connections,
        "block": False,
        "retries": Retry(total=None, connect=0, read=0, redirect=0, status=0, other=0),
    }
    if mirror.url.startswith("https://") or mirror.tls_ca_file:
        options["ssl_context"] = tls_context(mirror, certificate_dates=certificate_dates)
    if mirror.proxy:
        address, headers = _proxy(mirror.proxy)
        pool: urllib3.PoolManager = urllib3.ProxyManager(address, proxy_headers=headers, **options)  # type: ignore[arg-type]
    else:
        pool = urllib3.PoolManager(**options)  # type: ignore[arg-type]
    pool.pool_classes_by_scheme = {"http": _PlainPool, "https": _TlsPool}
    return pool


def tls_context(mirror: MirrorConfig, *, certificate_dates: bool) -> ssl.SSLContext:
    """Return how to speak TLS to ``mirror``.

    Raises:
        ConfigError: a certificate or key file cannot be used.
    """
    try:
        context = ssl.create_default_context(cafile=mirror.tls_ca_file or None)
    except (OSError, ssl.SSLError) as error:
        raise ConfigError(f"[store.mirrors] tls_ca_file {mirror.tls_ca_file}: {error}") from error
    if mirror.tls_certificate_file:
        try:
            context.load_cert_chain(
                mirror.tls_certificate_file, mirror.tls_key_file or None, password=lambda: b""
            )  # without the password an encrypted key would make a prompt
        except (OSError, ssl.SSLError) as error:
            raise ConfigError(
                f"[store.mirrors] tls_certificate_file {mirror.tls_certificate_file}: {error}; "
                "both must be PEM and the key not encrypted"
            ) from error
    if not certificate_dates:
        context.verify_flags |= ssl.VerifyFlags(_NO_CHECK_TIME)
    return context


def _authorization(mirror: MirrorConfig) -> Mapping[str, str]:
    """Return the header with the token; no message ever repeats the token."""
    if not mirror.token_file:
        return {}
    try:
        token = Path(mirror.token_file).read_text("ascii").partition("\n")[0].strip()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not ASCII text"
        raise ConfigError(f"[store.mirrors] token_file {mirror.token_file}: {reason}") from None
    if not _TOKEN.fullmatch(token):
        raise ConfigError(f"[store.mirrors] token_file {mirror.token_file}: its first line is not a token")
    return {"Authorization": f"Bearer {token}"}


def _proxy(url: str) -> tuple[str, Mapping[str, str]]:
    """Return the proxy's address without its password, and the headers that carry it."""
    parts = urlsplit(url)
    host = parts.netloc.rpartition("@")[2]
    address = urlunsplit((parts.scheme, host, "", "", ""))
    if parts.username is None:
        return address, {}
    pair = f"{unquote(parts.username)}:{unquote(parts.password or '')}"
    return address, {"Proxy-Authorization": f"Basic {b64encode(pair.encode()).decode()}"}


def _origin(url: str) -> tuple[str | None, str | None, int | None]:
    """Return whom a token is meant for."""
    parts = parse_url(url)
    return parts.scheme, parts.host, parts.port or _PORTS.get(parts.scheme or "")


def _check_status(url: str, status: int) -> None:
    if status in (200, 206):
        return
    if status >= 500 or status in _TRANSIENT:
        raise TransientError(f"{url}: the store answers {status}")
    hint = {401: ": the mirror's token_file is missing or not accepted", 407: ": the proxy wants a password"}
    raise RefusedError(f"{url}: the store answers {status}{hint.get(status, '')}", status)


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


@contextmanager
def _translated(url: str) -> Iterator[None]:
    """Turn urllib3's and the socket's errors into ours."""
    try:
        yield
    except (HTTPError, HTTPException, OSError) as raised:
        error = raised.reason if isinstance(raised, MaxRetryError) and raised.reason is not None else raised
        if isinstance(error, NewConnectionError | ConnectTimeoutError | ProxyError | SSLError):
            raise OfflineError(f"{url}: cannot be reached: {error}") from error
        if isinstance(error, ReadTimeoutError):
            raise TransientError(f"{url}: silent: {error}") from error
        raise TransientError(f"{url}: {error}") from error
