"""Inference over HTTP: requests go from the parser to the engine without ASGI, a task, routing or JSON.

``POST /predictions/{model}[/{version}]`` takes any body for the model's handler, ``POST
/v2/models/{model}[/versions/{version}]/infer`` an Open Inference Protocol request, and ``…/generate`` and
``…/generate_stream`` beside it a document of Triton's generate extension. None is parsed here: the worker does that.
Every other path is the application's. ``http_stream.py`` says which answers come in parts.

Request headers we read: Content-Type, Accept (``text/event-stream``), Content-Encoding (gzip, deflate),
Inference-Header-Content-Length, Authorization, X-Request-Id (echoed), X-Deadline-Ms (queue time included),
X-Routing-Key (what a canary's share goes by, instead of the client).
"""

from __future__ import annotations

import asyncio
import zlib
from collections.abc import Generator, Mapping, Sequence
from enum import StrEnum
from functools import lru_cache
from typing import Any, Final, NamedTuple, Protocol
from urllib.parse import unquote

import httptools

from agent.errors import AgentError, InvalidInputError, OverloadedError, TooLargeError
from agent.serving.budget import ReceiveBudget
from agent.serving.http_stream import PartsReply, Style, accepts_events
from agent.serving.identity import Caller, require
from agent.serving.ports import Engine, InferRequest
from agent.serving.replies import Dialect, Reply, engine_reply, error_reply, response_bytes
from agent.wire import DEADLINE_MS_MAX, Buffer, Header

OIP_CONTENT_TYPE: Final = "application/vnd.oip+json"
GENERATE_CONTENT_TYPE: Final = "application/vnd.triton.generate+json"
HEADERS: Final = frozenset(
    {
        b"accept",
        b"authorization",
        b"content-encoding",
        b"content-type",
        b"host",
        b"inference-header-content-length",
        b"x-deadline-ms",
        b"x-request-id",
        b"x-routing-key",
    }
)
_TEXT_BYTES_MAX: Final = 1024  # of Content-Type
_INFLATE_STEP_BYTES: Final = 256 * 1024  # of output between two turns of the loop: under a millisecond
_WINDOW_BITS: Final = {b"gzip": 31, b"x-gzip": 31, b"deflate": 15}
_CONTINUE: Final = b"HTTP/1.1 100 Continue\r\n\r\n"
_URL_BYTES_CACHED: Final = 256


class Generate(StrEnum):
    """The paths of Triton's generate extension, by their last part."""

    NO = ""
    WHOLE = "generate"
    STREAM = "generate_stream"


class Target(NamedTuple):
    """What an inference path asks for."""

    model: str
    version: str | None
    dialect: Dialect
    generate: Generate = Generate.NO


class Line(Protocol):
    """What a request needs of its connection."""

    @property
    def engine(self) -> Engine: ...

    @property
    def deadline_ms_default(self) -> int: ...

    @property
    def body_bytes_max(self) -> int: ...

    @property
    def loop(self) -> asyncio.AbstractEventLoop: ...

    @property
    def budget(self) -> ReceiveBudget: ...

    def caller(self, authorization: bytes | None, host: bytes | None) -> Caller:
        """Return who asks, by the request's headers; ``UnauthenticatedError`` if the given credentials are wrong."""

    def is_http_1_0(self) -> bool:
        """Whether the newest request is of that version, which knows no chunks."""

    def send(self, data: bytes) -> None:
        """Write a part of the answer."""

    def finish(self, data: bytes, *, keep_alive: bool) -> None:
        """Write the answer, or its last part; the next request's turn comes."""


class NobodyWaits:
    """Stands where uvicorn's protocol expects the event that its applications wait for."""

    @staticmethod
    def set() -> None:
        """Wake nobody."""


class InferenceExchange:
    """One inference request, from its complete headers to its answer.

    It takes the place of uvicorn's request-response cycle in a connection's queue and has the attributes that its
    protocol looks at. Order of calls: ``begin`` and ``complete`` once each, in either order; ``abandon`` at any time.
    """

    __slots__ = (
        "_asked", "_body", "_client", "_expects_continue", "_line", "_method", "_parts", "_request", "_request_id",
        "_style", "_target", "disconnected", "keep_alive", "more_body", "response_complete",
    )  # fmt: skip
    message_event: Final = NobodyWaits()

    def __init__(
        self,
        line: Line,
        target: Target,
        asked: Mapping[bytes, bytes],
        *,
        method: bytes,
        request_id: bytes,
        keep_alive: bool,
        expects_continue: bool,
    ) -> None:
        self._line = line
        self._target = target
        self._asked = asked
        self._method = method
        self._request_id = request_id
        self._expects_continue = expects_continue
        self._client = ""  # who asks, once that is known to be allowed
        self._body: Buffer = b""
        self._request: InferRequest | None = None  # while the engine has it
        self._style: Style | None = None  # how parts of the answer look, if it may come in parts
        self._parts: PartsReply | None = None  # once the first has come
        self.keep_alive = keep_alive
        self.more_body = True
        self.disconnected = False
        self.response_complete = False

    @property
    def response_started(self) -> bool:
        """Whether a part of the answer is written."""
        return self.response_complete or self._parts is not None

    def begin(self) -> None:
        """All before it is answered: refuse it, have its body sent, or hand it to the engine."""
        if self._method != b"POST":
            self._fail(InvalidInputError("use POST"), status=405)
            return
        try:
            caller = self._line.caller(self._asked.get(b"authorization"), self._asked.get(b"host"))
            require(caller, "infer")
        except AgentError as error:
            self._fail(error)
            return
        self._client = caller.key
        if not self.more_body:
            self._ask()
        elif self._expects_continue:
            self._line.send(_CONTINUE)

    def complete(self, body: Buffer) -> None:
        """The whole body is here."""
        self.more_body = False
        self._body = body
        if self._client and not self.response_complete:
            self._ask()

    def abandon(self) -> None:
        """The client has gone: nobody waits for an answer."""
        self.disconnected = True
        request, self._request = self._request, None
        if request is not None:
            self._line.engine.cancel(request)

    def pace(self, *, paused: bool) -> None:
        """The client does not take the answer as fast as it comes, or has caught up."""
        if self._parts is not None and self._request is not None:
            self._line.engine.pace(self._request, paused=paused)

    # To the engine

    def _ask(self) -> None:
        encoding = self._asked.get(b"content-encoding")
        body, self._body = self._body, b""
        if encoding is None:
            self._submit(body)
        else:
            line, data = self._line, bytes(body)
            self._inflate_on(inflate(data, encoding.strip().lower(), bytes_max=line.body_bytes_max, budget=line.budget))

    def _inflate_on(self, steps: Generator[None, None, bytes]) -> None:
        """Inflate one step a turn of the loop, so that others are served in between."""
        if self.disconnected:
            steps.close()
            return
        try:
            next(steps)
        except StopIteration as done:
            self._submit(done.value)
        except AgentError as error:
            self._fail(error)
        else:
            self._line.loop.call_soon(self._inflate_on, steps)

    def _submit(self, body: Buffer) -> None:
        line, target, asked = self._line, self._target, self._asked
        try:
            deadline_ms = _integer(asked, b"x-deadline-ms", 1, DEADLINE_MS_MAX) or line.deadline_ms_default
            self._style = _style(target, asked)
            header = _engine_header(target, asked, len(body), self._style)
            routing_key = _routing_key(asked)
        except AgentError as error:
            self._fail(error)
            return
        request = self._request = InferRequest(
            model=target.model,
            version=target.version,
            header=header,
            body=body,
            deadline=line.loop.time() + deadline_ms / 1000,
            client=self._client,
            answer=self._answer,
            routing_key=routing_key,
        )
        if self._style is not None:
            request.part = self._part
        line.engine.submit(request)

    def _answer(self, header: Header, body: Sequence[Buffer]) -> None:
        if self._request is None:  # abandoned
            return
        self._request = None
        if self._parts is not None:
            self._end(self._parts, b"", header)
        elif self._style in (None, Style.PLAIN) or header["kind"] != "result":
            self._finish(engine_reply(header, b"".join(body), self._target.dialect))
        else:
            parts = self._parts = self._begin(self._style)
            self._end(parts, parts.head(header, request_id=self._request_id, keep_alive=self.keep_alive), header)

    def _part(self, header: dict[str, Any], body: Sequence[Buffer]) -> None:
        if self._request is None or self._style is None:
            return
        head = b""
        parts = self._parts
        if parts is None:
            parts = self._parts = self._begin(self._style)
            head = parts.head(header, request_id=self._request_id, keep_alive=self.keep_alive)
        self._line.send(head + parts.part(header, body))

    def _begin(self, style: Style) -> PartsReply:
        # Version 1.0 is never kept alive; and without that nothing follows, so the newest request is this one.
        return PartsReply(style, chunked=self.keep_alive or not self._line.is_http_1_0())

    def _end(self, parts: PartsReply, head: bytes, header: Mapping[str, Any]) -> None:
        self.response_complete = True
        data, whole = parts.end(header)
        self._line.finish(head + data, keep_alive=self.keep_alive and whole)

    # To the client

    def _fail(self, error: AgentError, *, status: int = 0) -> None:
        reply = error_reply(error, self._target.dialect, status=status)
        if status == 405:
            reply.headers.append((b"allow", b"POST"))
        self._finish(reply)

    def _finish(self, reply: Reply) -> None:
        self.response_complete = True
        reply.headers.append((b"x-request-id", self._request_id))
        data = response_bytes(reply, keep_alive=self.keep_alive, with_body=self._method != b"HEAD")
        self._line.finish(data, keep_alive=self.keep_alive)


def target_of(url: bytes) -> Target | None:
    """Return what a request line's target asks to infer, or ``None`` if it is no inference path.

    Raises:
        httptools.HttpParserInvalidURLError: it is not a URL.
    """
    return _cached_target(url) if len(url) <= _URL_BYTES_CACHED else _target(url)


def parse_target(raw_path: bytes) -> Target | None:
    """Return what a path (as sent, still percent-encoded) asks to infer, or ``None`` if it is no inference path."""
    parts = raw_path.split(b"/")
    generate = Generate.NO
    match parts:
        case [b"", b"predictions", model]:
            version, dialect = b"", Dialect.TORCHSERVE
        case [b"", b"predictions", model, version]:
            dialect = Dialect.TORCHSERVE
        case [b"", b"v2", b"models", model, b"infer"]:
            version, dialect = b"", Dialect.INFERENCE
        case [b"", b"v2", b"models", model, b"versions", version, b"infer"]:
            dialect = Dialect.INFERENCE
        case [b"", b"v2", b"models", model, (b"generate" | b"generate_stream") as verb]:
            version, dialect, generate = b"", Dialect.INFERENCE, Generate(verb.decode())
        case [b"", b"v2", b"models", model, b"versions", version, (b"generate" | b"generate_stream") as verb]:
            dialect, generate = Dialect.INFERENCE, Generate(verb.decode())
        case _:
            return None
    if not model:
        return None
    return Target(_unquote(model), _unquote(version) or None, dialect, generate)


def inflate(data: bytes, encoding: bytes, *, bytes_max: int, budget: ReceiveBudget) -> Generator[None, None, bytes]:
    """Return ``data`` decompressed, in steps of bounded work.

    Args:
        data: The body as sent.
        encoding: Content-Encoding, lower case.
        bytes_max: Bound of the result (bytes).
        budget: Holds what has been decompressed so far, beyond the first step, until the result is whole.

    Raises:
        InvalidInputError: an unknown encoding, damaged or cut data, or bytes behind its end.
        TooLargeError: the result would exceed the bound.
        OverloadedError: the budget is used up.
    """
    if encoding == b"identity":
        return data
    if encoding not in _WINDOW_BITS:
        raise InvalidInputError(f"Content-Encoding {encoding.decode('latin-1')!r} is not supported; use gzip, deflate")
    inflater = zlib.decompressobj(_WINDOW_BITS[encoding])
    parts: list[bytes] = []
    size = reserved = 0
    rest = data
    try:
        while not inflater.eof:
            try:
                part = inflater.decompress(rest, _INFLATE_STEP_BYTES)
            except zlib.error as error:
                raise InvalidInputError(f"the body is not valid {encoding.decode()}") from error
            if not part and not inflater.eof:
                raise InvalidInputError(f"the {encoding.decode()} body is cut")
            if size + len(part) > bytes_max:
                raise TooLargeError(f"the decompressed body is above {bytes_max} bytes")
            if size:  # one step needs no room in the budget, so that small requests always get through
                if not budget.take(len(part)):
                    raise OverloadedError("too many large bodies are being received")
                reserved += len(part)
            size += len(part)
            parts.append(part)
            rest = inflater.unconsumed_tail
            yield
    finally:
        budget.give_back(reserved)
    if inflater.unused_data:
        raise InvalidInputError(f"bytes follow the end of the {encoding.decode()} body")
    return b"".join(parts)


def _target(url: bytes) -> Target | None:
    return parse_target(httptools.parse_url(url).path or b"") if url.isascii() else None


_cached_target = lru_cache(maxsize=256)(_target)  # a box serves few models, and asks for them do not vary


def _engine_header(target: Target, asked: Mapping[bytes, bytes], body_bytes: int, style: Style | None = None) -> Header:
    if target.generate:
        return _known_header(target, GENERATE_CONTENT_TYPE, None, style)
    if target.dialect is Dialect.INFERENCE:
        json_bytes = _integer(asked, b"inference-header-content-length", 0, body_bytes)
        return _known_header(target, OIP_CONTENT_TYPE, json_bytes, style)
    return _known_header(target, _text(asked, b"content-type") or "application/octet-stream", None, style)


@lru_cache(maxsize=256)
def _known_header(target: Target, content_type: str, json_bytes: int | None, style: Style | None) -> Header:
    header: dict[str, Any] = {"kind": "infer", "model": target.model, "content_type": content_type}
    if target.version is not None:
        header["version"] = target.version
    if style is not None:
        header["stream"] = "auto" if style is Style.PLAIN else True
    if json_bytes is not None:
        header["params"] = {"oip_header_bytes": json_bytes}
    return Header(header)


def _style(target: Target, asked: Mapping[bytes, bytes]) -> Style | None:
    """Return how the answer looks if it comes in parts; ``None`` if it must not."""
    if target.generate:
        return Style.GENERATE if target.generate is Generate.STREAM else None
    if accepts_events(asked.get(b"accept")):
        return Style.EVENTS
    return Style.PLAIN if target.dialect is Dialect.TORCHSERVE else None


def _text(asked: Mapping[bytes, bytes], name: bytes) -> str | None:
    """Return a header that travels on to the worker; bounded, for there it counts against the frame's header."""
    value = asked.get(name)
    if value is not None and len(value) > _TEXT_BYTES_MAX:
        raise InvalidInputError(f"{name.decode()} of {len(value)} bytes; the limit is {_TEXT_BYTES_MAX}")
    return None if value is None else value.decode("latin-1")


def _routing_key(asked: Mapping[bytes, bytes]) -> str:
    """Return the same text as a frame would bring; of bytes that are none, one that differs where they do."""
    return (_text(asked, b"x-routing-key") or "").encode("latin-1").decode(errors="surrogateescape")


def _integer(asked: Mapping[bytes, bytes], name: bytes, low: int, high: int) -> int | None:
    value = asked.get(name)
    if value is None:
        return None
    if not (value.isdigit() and len(value) <= 19 and low <= int(value) <= high):
        raise InvalidInputError(f"{name.decode()} must be an integer, {low}..{high}")
    return int(value)


def _unquote(part: bytes) -> str:
    return unquote(part.decode("ascii", "replace")) if b"%" in part else part.decode("ascii", "replace")
