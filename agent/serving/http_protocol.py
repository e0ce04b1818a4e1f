"""One HTTP connection: uvicorn's httptools protocol, which answers inference itself, plus the bounds it lacks.

Inference requests never enter ASGI (``http_inference.py``); every other path is the application's. Both wait in one
queue, so that pipelined requests are answered in their order, one at a time.

Added: peer credentials, caps on header and body, a deadline for half-sent requests and for clients that do not read,
TCP_NODELAY, errors as JSON, request ids. Changed: a body is handed over whole, so that it is copied once; reading stops
when the queue is full or answers are not taken, and not before, because only who reads sees that the client has gone;
idle connections end by the server's sweep instead of a timer for each request. Tests pin the parts of uvicorn this
rests on.
"""

from __future__ import annotations

import asyncio
import re
import socket
from typing import Any, Final, Protocol

import httptools
import uvicorn
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle
from uvicorn.server import ServerState

from agent.arena import SHARED_BYTES_MIN, Arena
from agent.config import ServingConfig
from agent.errors import AgentError, InvalidInputError, OverloadedError, TooLargeError
from agent.log import get_logger
from agent.serving import http_inference
from agent.serving.budget import ReceiveBudget
from agent.serving.http_inference import InferenceExchange, Target, target_of
from agent.serving.identity import AccessPolicy, Caller, peer_credentials
from agent.serving.ports import Engine
from agent.serving.replies import error_reply, response_bytes
from agent.wire import Buffer

_log = get_logger("serving.http")

_SMALL_BODY_BYTES: Final = 64 * 1024  # up to here a body needs no room in the shared budget: others cannot take it
_LINGER_S: Final = 2.0  # after a refusal: what the client still sends is dropped, so that it can read the answer
_HEADER_OVERHEAD_BYTES: Final = 4  # ": " and the line end
_QUEUE_REQUESTS_MAX: Final = 16
_QUEUE_BYTES_MAX: Final = 64 * 1024  # of bodies; what one read brings may exceed either
_REQUEST_ID: Final = re.compile(rb"[!-~]{1,128}")
_READ: Final = http_inference.HEADERS | {b"connection", b"content-length", b"transfer-encoding"}

Exchange = InferenceExchange | RequestResponseCycle


class Connection(Protocol):
    """What a request may ask of the connection it came on; in ``scope["state"]["connection"]``."""

    def caller(self, authorization: bytes | None, host: bytes | None) -> Caller:
        """Return who asks, by the request's headers; ``UnauthenticatedError`` if the given credentials are wrong."""


class Owner(Protocol):
    """What a connection needs of its server."""

    engine: Engine
    policy: AccessPolicy
    arena: Arena
    budget: ReceiveBudget
    config: ServingConfig
    state: ServerState
    uvicorn_config: uvicorn.Config

    def opened(self, connection: HttpProtocol) -> bool:
        """Note a new connection; ``False`` if it is one too many."""

    def closed(self) -> None:
        """A connection ended."""

    def cut(self, reason: str) -> None:
        """Count a connection that we ended."""

    def next_request_id(self) -> bytes:
        """Return an id for a request that came without."""


class HttpProtocol(HttpToolsProtocol):
    """State of one connection beyond uvicorn's, whose ``cycle`` is the newest request and ``pipeline`` what waits.

    Times are loop seconds, 0 = not so.
    """

    def __init__(self, owner: Owner) -> None:
        super().__init__(owner.uvicorn_config, owner.state, {"connection": self})
        # What follows a "Connection: close" is no request; uvicorn would parse it.
        self.parser.set_dangerous_leniencies(lenient_data_after_close=False)
        self._owner = owner
        self._unix_caller: Caller | None = None
        self._anonymous_caller: Caller | None = None
        self._asked_host: bytes | None = None  # whom it was made for
        self._host = ""
        self._active: Exchange | None = None  # whose turn it is; it began and is not answered
        self._advancing = False  # ``_advance`` is at work further up the stack
        self._waiting_bytes = 0  # of bodies received since the queue was last empty
        self._mid_message = False  # a message has begun and is not complete
        self._in_head = False  # a request line has begun and its headers are not complete
        self._fed_bytes = 0  # of the message under way, without the read that began it
        self._body: list[bytes] = []
        self._place: memoryview | None = None  # where a large body goes that a worker can be given
        self._body_bytes = 0  # of the message under way
        self._reserved = 0  # of them in the shared budget: none while they are few
        self._fault: tuple[AgentError, int] | None = None  # why the parser was stopped: error, status
        self._refused_since = 0.0  # an error was the last answer on this connection
        self._ends_after_answers = False  # the message under way is refused; those before it are still answered
        self._reading_since = 0.0  # the message under way was not complete at the end of a read
        self._unsent_bytes = 0  # in the transport, at the last sweep
        self._blocked_since = self.loop.time()  # when that last changed, or there was none
        self._idle_since = self._blocked_since  # when the last answer was complete
        self.engine = owner.engine
        self.deadline_ms_default = owner.config.deadline_ms_default
        self.body_bytes_max = owner.config.body_bytes_max
        self.budget = owner.budget

    # The connection's life

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        sock = transport.get_extra_info("socket")
        if sock.family == socket.AF_UNIX:
            self._unix_caller = self._owner.policy.unix_caller(peer_credentials(sock))
        else:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self._host = str(transport.get_extra_info("peername")[0])
        if not self._owner.opened(self):
            if len(self.connections) > 2 * self._owner.config.connections_max:
                self.abort("connections")
                return
            self._refuse(OverloadedError("too many connections"), 503)

    def connection_lost(self, exc: Exception | None) -> None:
        self._release_budget()
        self._place = None
        self.pipeline.clear()
        active, self._active = self._active, None
        if active is not None:
            _tell_gone(active)
        super().connection_lost(exc)
        self._owner.closed()

    def shutdown(self) -> None:
        """Answer what was asked, then close."""
        if self._active is None and not self.pipeline:
            self.transport.close()
        else:
            self.cycle.keep_alive = False  # the newest

    def abort(self, reason: str) -> None:
        """Close now, unsent bytes are lost."""
        self._owner.cut(reason)
        self.transport.abort()

    def enforce_deadlines(self, now: float) -> None:
        """End the connection if its client is silent, too slow or does not read; ``now`` in loop seconds."""
        config = self._owner.config
        if self._refused_since and now - self._refused_since > _LINGER_S:
            self.abort("refused")
        elif self._takes_nothing(now):
            self.abort("slow_reader")
        elif self._reading_since:
            if now - self._reading_since > config.read_timeout_s and not self._earlier_unanswered():
                self._owner.cut("half_sent")
                text = f"the request was not completed within {config.read_timeout_s} s"
                self._refuse(InvalidInputError(text), 408)
        elif self._active is None and not self.pipeline and now - self._idle_since > config.idle_timeout_s:
            self.transport.close()

    # What requests need of us

    def caller(self, authorization: bytes | None, host: bytes | None) -> Caller:
        """Return who asks: the unix peer, or the bearer of a token, or nobody known."""
        if self._unix_caller is not None:
            return self._unix_caller
        if authorization is not None:
            return self._owner.policy.tcp_caller(self._host, authorization.decode("latin-1"))
        if self._anonymous_caller is None or self._asked_host != host:
            asked_host = (host or b"").decode("latin-1")
            self._anonymous_caller = self._owner.policy.tcp_caller(self._host, None, asked_host=asked_host)
            self._asked_host = host
        return self._anonymous_caller

    def is_http_1_0(self) -> bool:
        """Whether the newest request is of that version, which knows no chunks."""
        return bool(self.parser.get_http_version() == "1.0")

    def send(self, data: bytes) -> None:
        """Write a part of the answer."""
        self.transport.write(data)

    def finish(self, data: bytes, *, keep_alive: bool) -> None:
        """Write the answer, or its last part; the next request's turn comes."""
        self.transport.write(data)
        if not keep_alive:
            self.transport.close()
        self.on_response_complete()

    # Reading, under bounds

    def data_received(self, data: bytes) -> None:
        if self._refused_since or self._ends_after_answers:
            return
        if self._reading_since:
            self._fed_bytes += len(data)
        try:
            self.parser.feed_data(data)
        except httptools.HttpParserUpgrade:
            pass  # answered as if it had not been asked for
        except httptools.HttpParserError as error:
            self._parser_stopped(error)
            return
        if not self._mid_message:
            return
        config = self._owner.config
        if not self._reading_since:
            self._reading_since = self.loop.time()
        if self._in_head and self._fed_bytes > config.header_bytes_max:
            self._refuse(*_head_too_large(config))
        elif self._fed_bytes > config.header_bytes_max + config.body_bytes_max:  # framing and trailers count too
            self._refuse(*_body_too_large(config))

    def on_message_begin(self) -> None:
        """Begin anew. uvicorn would make a scope here: that is left to the requests that need one."""
        self.url = b""
        self.headers = []
        self.expect_100_continue = False
        self._mid_message = True
        self._in_head = True
        self._fed_bytes = 0

    def on_headers_complete(self) -> None:
        if self.transport.is_closing():
            self._stop(InvalidInputError("this follows the last request of the connection"), 400)
        self._in_head = False
        self._body = []
        self._place = None
        self._body_bytes = 0
        config = self._owner.config
        asked: dict[bytes, bytes] = {}
        head_bytes = len(self.url)
        for name, value in self.headers:
            head_bytes += len(name) + len(value) + _HEADER_OVERHEAD_BYTES
            if name in _READ:
                asked[name] = value
        announced = int(asked.get(b"content-length", b"transfer-encoding" in asked))
        if head_bytes > config.header_bytes_max:
            self._stop(*_head_too_large(config))
        if announced > config.body_bytes_max:
            self._stop(*_body_too_large(config))
        upgrade = self.parser.should_upgrade()
        if upgrade and announced:  # its body would be taken for the other protocol
            self._stop(InvalidInputError("protocol upgrades are not supported"), 400)
        request_id = asked.get(b"x-request-id")
        if request_id is None or not _REQUEST_ID.fullmatch(request_id):
            request_id = self._owner.next_request_id()
        target = target_of(self.url)
        if target is None:
            self._to_application(request_id)
            if upgrade:
                self.cycle.keep_alive = False
        else:
            self._to_inference(target, asked, request_id, upgrade=upgrade)
            if announced > SHARED_BYTES_MIN and self._active is self.cycle and not self.cycle.response_complete:
                self._place = self._place_of(target.model, announced, asked)

    def on_body(self, body: bytes) -> None:
        if self.cycle.response_complete:
            return
        if self._body_bytes + len(body) > self.body_bytes_max:
            self._stop(*_body_too_large(self._owner.config))
        self._body_bytes += len(body)
        uncounted = self._body_bytes - self._reserved
        if self._body_bytes > _SMALL_BODY_BYTES and uncounted:
            if not self._owner.budget.take(uncounted):
                self._stop(OverloadedError("too many large bodies are being received"), 503)
            self._reserved += uncounted
        if self._place is not None:
            self._place[self._body_bytes - len(body) : self._body_bytes] = body
        else:
            self._body.append(body)
        if self._active is not self.cycle:
            self._waiting_bytes += len(body)
            self._pause_or_read()

    def on_message_complete(self) -> None:
        self._mid_message = False
        self._reading_since = 0.0
        self._release_budget()
        place, self._place = self._place, None
        body: Buffer = b"".join(self._body) if place is None else place
        self._body = []
        cycle: Exchange = self.cycle
        if isinstance(cycle, InferenceExchange):
            cycle.complete(body)
            return
        cycle.body = bytes(body)  # type: ignore[assignment]  # uvicorn makes bytes of it: now for free
        super().on_message_complete()
        cycle.more_body = False  # uvicorn leaves it when the answer came before the whole body

    def _place_of(self, model: str, nbytes: int, asked: dict[bytes, bytes]) -> memoryview | None:
        """Return memory that the model's worker can be given, for a body that needs no decoding."""
        if b"content-encoding" in asked:
            return None
        slot = self._owner.arena.take(model, nbytes)
        if slot is None:
            return None
        place = slot.lease(nbytes)
        slot.release()  # the lease holds it from here on
        return place

    # The queue

    def _to_inference(self, target: Target, asked: dict[bytes, bytes], request_id: bytes, *, upgrade: bool) -> None:
        keep_alive = self.parser.should_keep_alive() and not upgrade
        if keep_alive and b"connection" in asked:  # version 1.0 must ask for it, and is not given it
            keep_alive = self.parser.get_http_version() != "1.0"
        exchange = InferenceExchange(
            self,
            target,
            asked,
            method=self.parser.get_method(),
            request_id=request_id,
            keep_alive=keep_alive,
            expects_continue=self.expect_100_continue,
        )
        self.cycle = exchange  # type: ignore[assignment]
        if self._active is None and not self.pipeline:
            self._active = exchange
            exchange.begin()
        else:
            self.pipeline.appendleft((exchange, self.app))  # type: ignore[arg-type]
            self._pause_or_read()

    def _to_application(self, request_id: bytes) -> None:
        url, headers, expects_continue = self.url, self.headers, self.expect_100_continue
        super().on_message_begin()
        self.url, self.expect_100_continue = url, expects_continue
        self.headers[:] = headers  # the scope's
        super().on_headers_complete()
        self.cycle.default_headers = [(b"x-request-id", request_id)]
        self._pause_or_read()  # uvicorn pauses for a single one that waits

    def _start_asgi_task(self, cycle: Exchange, app: Any) -> None:
        """Called by uvicorn and by us when it is a request's turn."""
        self._active = cycle
        if isinstance(cycle, InferenceExchange):
            cycle.begin()
        else:
            super()._start_asgi_task(cycle, app)

    def on_response_complete(self) -> None:
        """The active request is answered."""
        self._active = None
        if self.transport.is_closing():
            return
        if self._reading_since:  # the rest of a refused body, or of the next request
            self._reading_since = self.loop.time()
        self._advance()

    def pause_writing(self) -> None:
        """The client is behind: nothing new is read or begun."""
        self.flow.pause_writing()
        self._pause_or_read()
        self._pace(paused=True)

    def resume_writing(self) -> None:
        self.flow.resume_writing()
        self._pace(paused=False)
        self._advance()

    def _pace(self, *, paused: bool) -> None:
        """Hold the answer that is being sent in parts, if there is one, or let it go on."""
        if isinstance(self._active, InferenceExchange):
            self._active.pace(paused=paused)

    def _advance(self) -> None:
        """Begin what waits. A loop, not a chain of calls, because requests may be answered at once."""
        if self._advancing:
            return
        self._advancing = True
        flow, pipeline = self.flow, self.pipeline
        while pipeline and self._active is None and not flow.write_paused and not self.transport.is_closing():
            self._start_asgi_task(*pipeline.pop())
        self._advancing = False
        if not pipeline:
            self._waiting_bytes = 0
            if self._active is None:
                self._idle_since = self.loop.time()
                if self._ends_after_answers:
                    self.transport.close()
        self._pause_or_read()

    def _pause_or_read(self) -> None:
        flow = self.flow
        full = len(self.pipeline) >= _QUEUE_REQUESTS_MAX or self._waiting_bytes >= _QUEUE_BYTES_MAX
        if full or flow.write_paused:
            flow.pause_reading()
        else:
            flow.resume_reading()

    # Refusing

    def _stop(self, error: AgentError, status: int) -> None:
        """End parsing from inside one of the parser's callbacks."""
        self._fault = (error, status)
        raise error

    def _parser_stopped(self, error: httptools.HttpParserError) -> None:
        cause = error.__context__
        if self._fault is not None:
            self._refuse(*self._fault)
        elif cause is None or isinstance(cause, httptools.HttpParserError | UnicodeDecodeError):
            self._refuse(InvalidInputError("this is not a valid HTTP/1.1 request"), 400)
        else:
            _log.error("a request failed", exc_info=cause)
            self.abort("fault")

    def _refuse(self, error: AgentError, status: int) -> None:
        """Answer the message under way with an error and end the connection after what was asked before it."""
        own = self._under_way()
        self._mid_message = False
        self._reading_since = 0.0
        self._release_budget()
        if self.pipeline and self.pipeline[0][0] is own:
            self.pipeline.popleft()
        if self.pipeline or self._active not in (None, own):
            self._ends_after_answers = True
            return
        if self.transport.is_closing():
            return
        self._refused_since = self.loop.time()
        if own is not None:
            _tell_gone(own)
        if own is None or not own.response_started:
            self.transport.write(response_bytes(error_reply(error, status=status), keep_alive=False))
        if self.transport.can_write_eof():
            self.transport.write_eof()

    def _under_way(self) -> Exchange | None:
        """Return the request whose body is being received."""
        newest: Exchange | None = self.cycle
        return newest if newest is not None and newest.more_body and not self._in_head else None

    def _earlier_unanswered(self) -> bool:
        """Whether a request before the message under way still waits for its answer."""
        own = self._under_way()
        return self._active not in (None, own) or bool(self.pipeline and self.pipeline[-1][0] is not own)

    def _takes_nothing(self, now: float) -> bool:
        """Whether the client has left its answer lying for too long; called once a sweep."""
        unsent = self.transport.get_write_buffer_size()
        if unsent != self._unsent_bytes or not (unsent or self.transport.is_closing()):
            self._unsent_bytes = unsent
            self._blocked_since = now
        return now - self._blocked_since > self._owner.config.write_timeout_s

    def _release_budget(self) -> None:
        self._owner.budget.give_back(self._reserved)
        self._reserved = 0
        self._body_bytes = 0


def _tell_gone(exchange: Exchange) -> None:
    """Tell a request that nobody waits for its answer."""
    if isinstance(exchange, InferenceExchange):
        exchange.abandon()
    else:
        exchange.disconnected = True
        exchange.message_event.set()


def _head_too_large(config: ServingConfig) -> tuple[AgentError, int]:
    return TooLargeError(f"request line and headers above {config.header_bytes_max} bytes"), 431


def _body_too_large(config: ServingConfig) -> tuple[AgentError, int]:
    return TooLargeError(f"body above {config.body_bytes_max} bytes"), 413
