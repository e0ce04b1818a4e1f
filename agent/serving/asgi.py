"""The HTTP fast path: inference requests go from the socket to the engine without routing or JSON.

``POST /predictions/{model}[/{version}]`` takes any body for the model's handler, ``POST
/v2/models/{model}[/versions/{version}]/infer`` an Open Inference Protocol request. Neither is parsed here: the worker
does that. Every other path is the application's behind us.

Request headers we read: Content-Type, Accept, Content-Encoding (gzip, deflate), Inference-Header-Content-Length,
Authorization, X-Request-Id (echoed), X-Deadline-Ms (queue time included).
"""

from __future__ import annotations

import asyncio
import itertools
import os
import re
import zlib
from collections.abc import Awaitable, Callable, MutableMapping, Sequence
from typing import Any, Final, NamedTuple
from urllib.parse import unquote

from agent.config import ServingConfig
from agent.errors import AgentError, InvalidInputError, OverloadedError, TooLargeError
from agent.serving.budget import ReceiveBudget
from agent.serving.http_protocol import Connection
from agent.serving.identity import require
from agent.serving.ports import DEADLINE_MS_MAX, Engine, InferRequest
from agent.serving.replies import Dialect, Reply, engine_reply, error_reply
from agent.wire import Buffer

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

OIP_CONTENT_TYPE: Final = "application/vnd.oip+json"
_TEXT_BYTES_MAX: Final = 1024  # of Content-Type and Accept
_REQUEST_ID: Final = re.compile(rb"[!-~]{1,128}")
_INFLATE_STEP_BYTES: Final = 256 * 1024  # of output between two turns of the loop: under a millisecond
_WINDOW_BITS: Final = {b"gzip": 31, b"x-gzip": 31, b"deflate": 15}

Answered = tuple[dict[str, Any], Sequence[Buffer]]


class Target(NamedTuple):
    """What an inference path asks for."""

    model: str
    version: str | None
    dialect: Dialect


class InferenceApp:
    """An ASGI application: inference itself, everything else by ``rest``.

    Args:
        engine: Answers requests.
        rest: The application for all other paths.
        config: Bounds and the default deadline.
        budget: Counts what compressed bodies become, together with what is being received.
    """

    def __init__(self, *, engine: Engine, rest: App, config: ServingConfig, budget: ReceiveBudget) -> None:
        self._engine = engine
        self._rest = rest
        self._budget = budget
        self._body_bytes_max = config.body_bytes_max
        self._deadline_ms_default = config.deadline_ms_default
        self._run = os.urandom(4).hex().encode()  # makes the request ids of this process distinct
        self._numbers = itertools.count(1)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one HTTP request."""
        asked = {name: value for name, value in scope["headers"] if name in _HEADERS}
        request_id = asked.get(b"x-request-id", b"")
        if not _REQUEST_ID.fullmatch(request_id):
            request_id = b"%b-%x" % (self._run, next(self._numbers))
        target = parse_target(scope["raw_path"])
        if target is None:
            await self._rest(scope, receive, _with_header(send, (b"x-request-id", request_id)))
            return
        if scope["method"] != "POST":
            reply = error_reply(InvalidInputError("use POST"), target.dialect, status=405)
            reply.headers.append((b"allow", b"POST"))
        else:
            try:
                answered = await self._infer(target, asked, request_id, scope["state"]["connection"], receive)
            except AgentError as error:
                reply = error_reply(error, target.dialect)
            else:
                if answered is None:
                    return
                reply = engine_reply(answered[0], b"".join(answered[1]), target.dialect)
        reply.headers.append((b"x-request-id", request_id))
        await send_reply(send, reply)

    async def _infer(
        self, target: Target, asked: dict[bytes, bytes], request_id: bytes, connection: Connection, receive: Receive
    ) -> Answered | None:
        """Return the engine's answer, or ``None`` when the client left before its request was complete."""
        caller = connection.caller(asked.get(b"authorization"), asked.get(b"host"))
        require(caller, "infer")
        body = await read_body(receive)
        if body is None:
            return None
        encoding = asked.get(b"content-encoding", b"identity").strip().lower()
        if encoding != b"identity":
            body = await inflate(body, encoding, bytes_max=self._body_bytes_max, budget=self._budget)
        deadline_ms = _integer(asked, b"x-deadline-ms", 1, DEADLINE_MS_MAX) or self._deadline_ms_default
        request = InferRequest(
            model=target.model,
            version=target.version,
            header=_engine_header(target, asked, request_id, len(body)),
            body=body,
            deadline=asyncio.get_running_loop().time() + deadline_ms / 1000,
            client=caller.key,
            answer=_ignore,
        )
        return await self._ask(request, connection)

    async def _ask(self, request: InferRequest, connection: Connection) -> Answered | None:
        future: asyncio.Future[Answered | None] = asyncio.get_running_loop().create_future()

        def answer(header: dict[str, Any], body: Sequence[Buffer]) -> None:
            if not future.done():
                future.set_result((header, body))

        def lost() -> None:
            self._engine.cancel(request)
            if not future.done():
                future.set_result(None)

        request.answer = answer
        connection.on_lost = lost
        self._engine.submit(request)
        try:
            return await future
        except asyncio.CancelledError:
            self._engine.cancel(request)
            raise
        finally:
            connection.on_lost = None


def parse_target(raw_path: bytes) -> Target | None:
    """Return what a path (as sent, still percent-encoded) asks to infer, or ``None`` if it is no inference path."""
    parts = raw_path.split(b"/")
    match parts:
        case [b"", b"predictions", model]:
            version, dialect = b"", Dialect.TORCHSERVE
        case [b"", b"predictions", model, version]:
            dialect = Dialect.TORCHSERVE
        case [b"", b"v2", b"models", model, b"infer"]:
            version, dialect = b"", Dialect.INFERENCE
        case [b"", b"v2", b"models", model, b"versions", version, b"infer"]:
            dialect = Dialect.INFERENCE
        case _:
            return None
    if not model:
        return None
    return Target(_unquote(model), _unquote(version) or None, dialect)


async def read_body(receive: Receive) -> bytes | None:
    """Return the whole body, or ``None`` if the client left. The protocol below bounds it."""
    parts: list[bytes] = []
    while True:
        message = await receive()
        if message["type"] != "http.request":
            return None
        parts.append(message.get("body", b""))
        if not message.get("more_body", False):
            return b"".join(parts)


async def inflate(data: bytes, encoding: bytes, *, bytes_max: int, budget: ReceiveBudget) -> bytes:
    """Return ``data`` decompressed, letting other requests run in between.

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
            await asyncio.sleep(0)
    finally:
        budget.give_back(reserved)
    if inflater.unused_data:
        raise InvalidInputError(f"bytes follow the end of the {encoding.decode()} body")
    return b"".join(parts)


async def send_reply(send: Send, reply: Reply) -> None:
    """Send a whole answer."""
    await send({"type": "http.response.start", "status": reply.status, "headers": reply.headers})
    await send({"type": "http.response.body", "body": reply.body})


_HEADERS: Final = frozenset(
    {
        b"accept",
        b"authorization",
        b"content-encoding",
        b"content-type",
        b"host",
        b"inference-header-content-length",
        b"x-deadline-ms",
        b"x-request-id",
    }
)


def _engine_header(target: Target, asked: dict[bytes, bytes], request_id: bytes, body_bytes: int) -> dict[str, Any]:
    header: dict[str, Any] = {"kind": "infer", "model": target.model, "trace": request_id.decode("ascii")}
    if target.version is not None:
        header["version"] = target.version
    if target.dialect is Dialect.INFERENCE:
        header["content_type"] = OIP_CONTENT_TYPE
        json_bytes = _integer(asked, b"inference-header-content-length", 0, body_bytes)
        if json_bytes is not None:
            header["params"] = {"oip_header_bytes": json_bytes}
    else:
        header["content_type"] = _text(asked, b"content-type") or "application/octet-stream"
    accept = _text(asked, b"accept")
    if accept is not None:
        header["accept"] = accept
    return header


def _text(asked: dict[bytes, bytes], name: bytes) -> str | None:
    """Return a header that travels on to the worker; bounded, for there it counts against the frame's header."""
    value = asked.get(name)
    if value is not None and len(value) > _TEXT_BYTES_MAX:
        raise InvalidInputError(f"{name.decode()} of {len(value)} bytes; the limit is {_TEXT_BYTES_MAX}")
    return None if value is None else value.decode("latin-1")


def _integer(asked: dict[bytes, bytes], name: bytes, low: int, high: int) -> int | None:
    value = asked.get(name)
    if value is None:
        return None
    if not (value.isdigit() and len(value) <= 19 and low <= int(value) <= high):
        raise InvalidInputError(f"{name.decode()} must be an integer, {low}..{high}")
    return int(value)


def _unquote(part: bytes) -> str:
    return unquote(part.decode("ascii", "replace")) if b"%" in part else part.decode("ascii", "replace")


def _with_header(send: Send, header: tuple[bytes, bytes]) -> Send:
    async def wrapped(message: Message) -> None:
        if message["type"] == "http.response.start":
            message["headers"] = [*message.get("headers", ()), header]
        await send(message)

    return wrapped


def _ignore(_header: dict[str, Any], _body: Sequence[Buffer]) -> None:
    """The answer before anybody waits for it."""
