"""Answers in parts over HTTP: which requests get them, and how they look.

Three styles, each under chunked transfer encoding, or up to the connection's end for HTTP/1.0:

- plain, ``/predictions`` of a model that streams, as TorchServe's clients expect: each part is one chunk of its own
  bytes, a JSON part one line. An error after the first part cuts the answer off before its last chunk.
- events, for ``Accept: text/event-stream``: ``data:`` holds a part, ``event: error`` or ``event: end`` comes last.
- generate, for Triton's ``/v2/models/{model}/generate_stream``: ``data:`` holds an object, that of an error is
  ``{"error": …}``, and nothing marks the end.

Values in, bytes out; no server, no sockets. Errors before the first part are ordinary answers, and not made here.
"""

from __future__ import annotations

import re
from base64 import b64encode
from collections.abc import Mapping, Sequence
from enum import Enum
from typing import Any, Final, NamedTuple

import msgspec

from agent.errors import by_code
from agent.serving.replies import error_reply, response_bytes, stream_reply
from agent.wire import Buffer

_EVENTS: Final = "text/event-stream; charset=utf-8"
_JSON: Final = "application/json"
_JSON_LINES: Final = "application/x-ndjson"
_LINE_END: Final = re.compile(rb"\r\n|\r|\n")
_LAST_CHUNK: Final = b"0\r\n\r\n"


class Style(Enum):
    """How parts look."""

    PLAIN = "plain"
    EVENTS = "events"
    GENERATE = "generate"


class Ending(NamedTuple):
    """The last bytes of an answer, and whether they say that it is whole."""

    data: bytes
    whole: bool


class PartsReply:
    """One answer in parts on its way out.

    Args:
        style: How parts look.
        chunked: Whether the client knows chunked transfer encoding; else the end of the connection ends the answer.
    """

    __slots__ = ("_chunked", "_count", "_style")

    def __init__(self, style: Style, *, chunked: bool) -> None:
        self._style = style
        self._chunked = chunked
        self._count = 0

    def head(self, header: Mapping[str, Any], *, request_id: bytes, keep_alive: bool) -> bytes:
        """Return status line and headers; ``header`` is the engine's first."""
        content_type = str(header.get("content_type") or "application/octet-stream")
        if self._style is not Style.PLAIN:
            content_type = _EVENTS
        elif content_type == _JSON:
            content_type = _JSON_LINES
        reply = stream_reply(header, content_type)
        if self._style is not Style.PLAIN:
            reply.headers.append((b"cache-control", b"no-cache"))
        if self._chunked:
            reply.headers.append((b"transfer-encoding", b"chunked"))
        reply.headers.append((b"x-request-id", request_id))
        return response_bytes(reply, keep_alive=keep_alive)

    def part(self, header: Mapping[str, Any], body: Sequence[Buffer]) -> bytes:
        """Return one part."""
        self._count += 1
        content_type = str(header.get("content_type") or "")
        data = b"".join(body)
        if self._style is not Style.PLAIN:
            return self._framed(_event(_shown(content_type, data)))
        return self._framed(data + b"\n" if content_type == _JSON else data)

    def end(self, header: Mapping[str, Any]) -> Ending:
        """Return what follows the last part: ``header`` is the engine's ``result`` or ``error``."""
        last = _LAST_CHUNK if self._chunked else b""
        if header["kind"] == "result":
            closing = _event(msgspec.json.encode({"parts": self._count}), b"end")
            return Ending((self._framed(closing) if self._style is Style.EVENTS else b"") + last, whole=True)
        if self._style is Style.PLAIN:
            return Ending(b"", whole=False)
        error = by_code(str(header.get("code")), str(header.get("message", "")))
        name = b"error" if self._style is Style.EVENTS else b""
        return Ending(self._framed(_event(error_reply(error).body, name)) + last, whole=True)

    def _framed(self, data: bytes) -> bytes:
        if not self._chunked or not data:  # an empty chunk would be the last
            return data
        return b"%x\r\n%b\r\n" % (len(data), data)


def accepts_events(accept: bytes | None) -> bool:
    """Return whether an Accept header asks for server-sent events."""
    return accept is not None and b"text/event-stream" in accept.lower()


def _shown(content_type: str, data: bytes) -> bytes:
    """Return a part as text: what is none becomes a JSON object with its bytes in base64."""
    if content_type == _JSON or content_type.startswith("text/"):
        return data
    return msgspec.json.encode({"content_type": content_type, "base64": b64encode(data).decode()})


def _event(data: bytes, name: bytes = b"") -> bytes:
    """Return one server-sent event; each line of ``data`` is a line of it, which its reader joins again."""
    head = b"event: %b\n" % name if name else b""
    return b"%bdata: %b\n\n" % (head, _LINE_END.sub(b"\ndata: ", data))
