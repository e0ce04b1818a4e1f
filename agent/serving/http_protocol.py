"""One HTTP connection: uvicorn's httptools protocol plus what it leaves out.

Added: peer credentials, caps on header and body, a deadline for half-sent requests and for clients that do not read,
TCP_NODELAY, errors as JSON, a word to the request when its client goes. Changed: a body is handed over whole, so that
it is copied once. Tests pin the parts of uvicorn this rests on.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable
from typing import Final, Protocol

import uvicorn
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol
from uvicorn.server import ServerState

from agent.config import ServingConfig
from agent.errors import AgentError, InvalidInputError, OverloadedError, TooLargeError
from agent.serving.budget import ReceiveBudget
from agent.serving.identity import AccessPolicy, Caller, peer_credentials
from agent.serving.replies import error_reply

_SMALL_BODY_BYTES: Final = 64 * 1024  # up to here a body needs no room in the shared budget: others cannot take it
_LINGER_S: Final = 2.0  # after a refusal: what the client still sends is dropped, so that it can read the answer
_HEADER_OVERHEAD_BYTES: Final = 4  # ": " and the line end


class Connection(Protocol):
    """What a request may ask of the connection it came on; in ``scope["state"]["connection"]``."""

    on_lost: Callable[[], None] | None  # called once if the client goes before the answer is complete

    def caller(self, authorization: bytes | None, host: bytes | None) -> Caller:
        """Return who asks, by the request's headers; ``UnauthenticatedError`` if the given credentials are wrong."""


class Owner(Protocol):
    """What a connection needs of its server."""

    policy: AccessPolicy
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


class HttpProtocol(HttpToolsProtocol):
    """State of one connection beyond uvicorn's. Times are loop seconds, 0 = not so."""

    def __init__(self, owner: Owner) -> None:
        super().__init__(owner.uvicorn_config, owner.state, {"connection": self})
        self._owner = owner
        self._unix_caller: Caller | None = None
        self._host = ""
        self._in_head = False  # a request line has begun and its headers are not complete
        self._fed_bytes = 0  # of the message under way, without the read that began it
        self._body: list[bytes] = []
        self._body_bytes = 0  # of the message under way
        self._reserved = 0  # of them in the shared budget: none while they are few
        self._fault: tuple[AgentError, int] | None = None  # why the parser was stopped: error, status
        self._refused_since = 0.0  # an error was the last answer on this connection
        self._ends_after_answers = False  # the message under way is refused; those before it are still answered
        self._reading_since = 0.0
        self._unsent_bytes = 0  # in the transport, at the last sweep
        self._blocked_since = self.loop.time()  # when that last changed, or there was none
        self._opened_at = self.loop.time()
        self._served = False  # a request has begun; from then on uvicorn watches for idleness
        self.on_lost: Callable[[], None] | None = None

    def caller(self, authorization: bytes | None, host: bytes | None) -> Caller:
        """Return who asks: the unix peer, or the bearer of a token, or nobody known."""
        if self._unix_caller is not None:
            return self._unix_caller
        text = None if authorization is None else authorization.decode("latin-1")
        return self._owner.policy.tcp_caller(self._host, text, asked_host=(host or b"").decode("latin-1"))

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
        lost, self.on_lost = self.on_lost, None
        if lost is not None:
            lost()
        super().connection_lost(exc)
        self._owner.closed()

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
        elif not self._served and now - self._opened_at > config.idle_timeout_s:
            self.transport.close()

    # Reading, under bounds

    def data_received(self, data: bytes) -> None:
        if self._refused_since or self._ends_after_answers:
            return
        if self._reading_since:
            self._fed_bytes += len(data)
        super().data_received(data)
        config = self._owner.config
        if not self._reading_since:
            return
        if self._in_head and self._fed_bytes > config.header_bytes_max:
            self._refuse(*_head_too_large(config))
        elif self._fed_bytes > config.header_bytes_max + config.body_bytes_max:  # framing and trailers count too
            self._refuse(*_body_too_large(config))

    def send_400_response(self, msg: str) -> None:
        """Called by uvicorn when the parser stopped, by itself or by a ``_stop`` of ours."""
        error, status = self._fault or (InvalidInputError("this is not a valid HTTP/1.1 request"), 400)
        self._refuse(error, status)

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._served = True
        self._in_head = True
        self._fed_bytes = 0
        self._reading_since = self.loop.time()

    def on_headers_complete(self) -> None:
        self._in_head = False
        self._body = []
        self._body_bytes = 0
        config = self._owner.config
        head_bytes, announced = len(self.url), 0
        for name, value in self.headers:
            head_bytes += len(name) + len(value) + _HEADER_OVERHEAD_BYTES
            if name == b"content-length":
                announced = int(value)
            elif name == b"transfer-encoding":
                announced = announced or 1
        if head_bytes > config.header_bytes_max:
            self._stop(*_head_too_large(config))
        if announced > config.body_bytes_max:
            self._stop(*_body_too_large(config))
        if self.parser.should_upgrade() and announced:  # its body would be taken for the other protocol
            self._stop(InvalidInputError("protocol upgrades are not supported"), 400)
        super().on_headers_complete()
        if self.parser.should_upgrade():
            self.cycle.keep_alive = False

    def on_body(self, body: bytes) -> None:
        if self.cycle.response_complete:
            return
        if self._body_bytes + len(body) > self._owner.config.body_bytes_max:
            self._stop(*_body_too_large(self._owner.config))
        self._body_bytes += len(body)
        uncounted = self._body_bytes - self._reserved
        if self._body_bytes > _SMALL_BODY_BYTES and uncounted:
            if not self._owner.budget.take(uncounted):
                self._stop(OverloadedError("too many large bodies are being received"), 503)
            self._reserved += uncounted
        self._body.append(body)

    def on_message_complete(self) -> None:
        self._reading_since = 0.0
        self._release_budget()
        self.cycle.body = b"".join(self._body)  # type: ignore[assignment]  # uvicorn makes bytes of it: now for free
        self._body = []
        super().on_message_complete()
        self.cycle.more_body = False  # uvicorn leaves it when the answer came before the whole body

    def on_response_complete(self) -> None:
        self.on_lost = None
        last = not self.pipeline
        super().on_response_complete()  # starts the next of the pipeline
        if self._reading_since:
            self._reading_since = self.loop.time()
        if self._ends_after_answers and last:
            self.transport.close()

    # Refusing

    def _stop(self, error: AgentError, status: int) -> None:
        """End parsing from inside one of the parser's callbacks."""
        self._fault = (error, status)
        raise error

    def _refuse(self, error: AgentError, status: int) -> None:
        """Answer the message under way with an error and end the connection after what was asked before it."""
        self._reading_since = 0.0
        self._release_budget()
        own_cycle = self.cycle is not None and self.cycle.more_body and not self._in_head
        if self._earlier_unanswered():
            self._ends_after_answers = True
            if own_cycle:
                self.pipeline.popleft()  # the newest
            return
        self._refused_since = self.loop.time()
        if own_cycle:
            self.cycle.disconnected = True  # the application is told that nobody waits
            self.cycle.message_event.set()
        if not (own_cycle and self.cycle.response_started):
            reply = error_reply(error, status=status)
            head = [STATUS_LINE[reply.status], b"connection: close\r\n"]
            head += [b"%b: %b\r\n" % header for header in reply.headers]
            self.transport.write(b"".join([*head, b"\r\n", reply.body]))
        if self.transport.can_write_eof():
            self.transport.write_eof()

    def _takes_nothing(self, now: float) -> bool:
        """Whether the client has left its answer lying for too long; called once a sweep."""
        unsent = self.transport.get_write_buffer_size()
        if unsent != self._unsent_bytes or not (unsent or self.transport.is_closing()):
            self._unsent_bytes = unsent
            self._blocked_since = now
        return now - self._blocked_since > self._owner.config.write_timeout_s

    def _earlier_unanswered(self) -> bool:
        """Whether a request before the message under way still waits for its answer."""
        if self.pipeline:
            return True
        return self.cycle is not None and not self.cycle.response_complete and not self.cycle.more_body

    def _release_budget(self) -> None:
        self._owner.budget.give_back(self._reserved)
        self._reserved = 0


def _head_too_large(config: ServingConfig) -> tuple[AgentError, int]:
    return TooLargeError(f"request line and headers above {config.header_bytes_max} bytes"), 431


def _body_too_large(config: ServingConfig) -> tuple[AgentError, int]:
    return TooLargeError(f"body above {config.body_bytes_max} bytes"), 413
