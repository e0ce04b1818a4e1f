"""How answers and errors look over HTTP: the one table from error class to status, and the bodies of each dialect.

Values in, status, headers and bytes out; no server, no sockets.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from enum import StrEnum
from functools import lru_cache
from http import HTTPStatus
from typing import Any, Final, NamedTuple

import msgspec

from agent.errors import (
    AgentError,
    BundleError,
    CanceledError,
    CommandError,
    DeadlineError,
    DeviceLostError,
    DiskFullError,
    ForbiddenError,
    InvalidInputError,
    LaneRefusedError,
    NotFoundError,
    OfflineError,
    OutOfMemoryError,
    OverloadedError,
    PolicyError,
    RateLimitedError,
    StoreError,
    TargetNotFoundError,
    TooLargeError,
    TransientError,
    UnauthenticatedError,
    UnavailableError,
    WorkerDiedError,
    by_code,
)

# The nearest ancestor in the table counts. A full queue is 503, as both protocols we speak have it.
STATUS: Final[Mapping[type[AgentError], int]] = {
    AgentError: 500,
    InvalidInputError: 400,
    TooLargeError: 413,
    NotFoundError: 404,
    UnauthenticatedError: 401,
    ForbiddenError: 403,
    OverloadedError: 503,
    RateLimitedError: 429,
    UnavailableError: 503,
    LaneRefusedError: 409,
    DeadlineError: 504,
    CanceledError: 400,
    WorkerDiedError: 503,
    DeviceLostError: 503,
    OutOfMemoryError: 507,
    BundleError: 422,
    PolicyError: 403,
    TargetNotFoundError: 404,
    StoreError: 502,
    OfflineError: 503,
    TransientError: 503,
    DiskFullError: 507,
    CommandError: 409,
}
_STATUS_LINES: Final = {status.value: f"HTTP/1.1 {status.value} {status.phrase}\r\n".encode() for status in HTTPStatus}
_RETRY_AFTER_S: Final = 1  # where nobody knows better
_JSON: Final = b"application/json"

Headers = list[tuple[bytes, bytes]]


class Dialect(StrEnum):
    """Whose error bodies a route speaks."""

    INFERENCE = "oip"  # Open Inference Protocol and everything of our own: {"error": text, "code": code}
    TORCHSERVE = "torchserve"  # {"code": status, "type": class, "message": text}, and our code under "error"


class Reply(NamedTuple):
    """One HTTP answer, whole."""

    status: int
    headers: Headers  # content-length included
    body: bytes


def status_of(error: type[AgentError]) -> int:
    """Return the HTTP status of an error class."""
    return next(STATUS[base] for base in error.__mro__ if base in STATUS)


def json_reply(value: Any, *, status: int = 200) -> Reply:
    """Return ``value`` as JSON."""
    return _reply(status, _JSON, msgspec.json.encode(value))


def error_reply(error: AgentError, dialect: Dialect = Dialect.INFERENCE, *, status: int = 0) -> Reply:
    """Return the answer to a failed request.

    Args:
        error: What went wrong.
        dialect: Whose body.
        status: Overrides the table, for faults of HTTP itself (408, 405, 431, …).
    """
    status = status or status_of(type(error))
    message = str(error)
    body: dict[str, Any] = {"error": message, "code": error.code}
    if dialect is Dialect.TORCHSERVE:
        body = {"code": status, "type": type(error).__name__, "message": message, "error": error.code}
    reply = json_reply(body, status=status)
    if status in (429, 503):
        reply.headers.append((b"retry-after", b"%d" % max(_RETRY_AFTER_S, math.ceil(error.retry_after_s))))
    if status == 401:
        reply.headers.append((b"www-authenticate", b"Bearer"))
    return reply


def engine_reply(header: Mapping[str, Any], body: bytes, dialect: Dialect) -> Reply:
    """Return the engine's ``result`` or ``error`` as an HTTP answer."""
    if header["kind"] != "result":
        error = by_code(str(header.get("code")), str(header.get("message", "")), header.get("retry_after_s"))
        return error_reply(error, dialect)
    said = _said(*(str(header.get(key) or "") for key in ("content_type", "version", "variant")))
    reply = Reply(200, [*said, (b"content-length", b"%d" % len(body))], body)
    json_bytes = (header.get("params") or {}).get("oip_header_bytes")
    if json_bytes is not None:
        reply.headers.append((b"inference-header-content-length", b"%d" % json_bytes))
    return reply


def stream_reply(header: Mapping[str, Any], content_type: str) -> Reply:
    """Return what precedes an answer in parts, of which ``header`` is the engine's first; its length is not known."""
    return Reply(200, [*_said(content_type, *(str(header.get(key) or "") for key in ("version", "variant")))], b"")


def response_bytes(reply: Reply, *, keep_alive: bool, with_body: bool = True) -> bytes:
    """Return an answer as HTTP/1.1, for one write. ``with_body`` is ``False`` for HEAD."""
    lines = [b"%b: %b\r\n" % header for header in reply.headers]
    end = b"\r\n" if keep_alive else b"connection: close\r\n\r\n"
    return b"".join((_STATUS_LINES[reply.status], *lines, end, reply.body if with_body else b""))


def _reply(status: int, content_type: bytes, body: bytes) -> Reply:
    return Reply(status, [(b"content-type", content_type), (b"content-length", b"%d" % len(body))], body)


@lru_cache(maxsize=64)  # a worker says the same each time
def _said(content_type: str, version: str, variant: str) -> Headers:
    headers = [(b"content-type", _latin(content_type or "application/octet-stream"))]
    if version:
        headers.append((b"x-model-version", _latin(version)))
    if variant:
        headers.append((b"x-model-variant", _latin(variant)))
    return headers


def _latin(text: str) -> bytes:
    """Text from a worker on its way into a header: one line of printable characters."""
    return "".join(c for c in text if " " <= c <= "~").encode("ascii")
