"""HTTP on one listening socket, TCP or unix: inference answered by the protocol itself, the rest by an application.

uvicorn's own server is not used: it takes over the process's signals and wakes up ten times a second. What happens on
one connection is in ``http_protocol.py``; this is the listener, its sweep and its end.

Promises: a bounded number of connections; silent, half-sent and unread connections end at their deadline; leaving
``serving()`` stops intake, lets accepted requests be answered, then closes.
"""

from __future__ import annotations

import asyncio
import itertools
import os
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from functools import partial
from typing import Any, Final

import uvicorn
from uvicorn.server import ServerState

from agent.arena import Arena
from agent.config import ServingConfig
from agent.log import get_logger
from agent.metrics import Metrics
from agent.serving.budget import ReceiveBudget
from agent.serving.http_protocol import HttpProtocol
from agent.serving.identity import AccessPolicy
from agent.serving.listeners import BACKLOG
from agent.serving.ports import Engine

_log = get_logger("serving.http")

_FLUSH_S: Final = 1.0  # for aborted connections and their requests to notice, after the drain


class HttpServer:
    """Serve inference and an ASGI application on ``listener``, inherited or from ``listeners``; ours to close.

    Args:
        listener: A listening TCP or unix socket.
        engine: Answers inference requests.
        app: Called for all other paths; ``scope["state"]["connection"]`` is its ``http_protocol.Connection``.
        name: Label of this listener in metrics and logs: ``http`` or ``http-unix``.
    """

    def __init__(
        self,
        listener: socket.socket,
        *,
        engine: Engine,
        app: Any,
        name: str,
        policy: AccessPolicy,
        budget: ReceiveBudget,
        config: ServingConfig,
        metrics: Metrics,
        arena: Arena | None = None,
    ) -> None:
        listener.setblocking(False)
        self._listener = listener
        self._sweep_timer: asyncio.TimerHandle | None = None
        self._draining = False
        self._empty = asyncio.Event()
        self._empty.set()
        self._accepted = metrics.counter("inferd_http_connections", "Accepted connections", ("listener",))
        self._refused = metrics.counter("inferd_connections_refused", "Over the connection cap", ("listener",))
        self._cut = metrics.counter("inferd_connections_cut", "Ended by us, by reason", ("listener", "reason"))
        self._run = os.urandom(4).hex().encode()  # makes the request ids of this listener distinct
        self._numbers = itertools.count(1)
        self.name = name
        self.engine = engine
        self.policy = policy
        self.budget = budget
        self.arena = arena or Arena(bytes_max=0, idle_bytes_max=0)
        self.config = config
        self.state = ServerState()
        self.uvicorn_config = uvicorn.Config(
            app,
            http=HttpProtocol,
            ws="none",
            lifespan="off",
            interface="asgi3",
            log_config=None,
            log_level="error",
            access_log=False,
            server_header=False,
            date_header=False,
            proxy_headers=False,
        )
        self.uvicorn_config.load()

    @asynccontextmanager
    async def serving(self) -> AsyncIterator[None]:
        """Accept and answer as long as the body runs, then drain for at most ``drain_timeout_s``."""
        loop = asyncio.get_running_loop()
        server = await loop.create_server(partial(HttpProtocol, self), sock=self._listener, backlog=BACKLOG)
        try:
            yield
        finally:
            server.close()
            self._listener.close()
            await self._drain()

    # What connections ask of us

    def opened(self, connection: HttpProtocol) -> bool:
        """Note a new connection; ``False`` if it is one too many."""
        self._accepted.add((self.name,))
        self._empty.clear()
        if self._draining:  # accepted, but not opened, before intake stopped
            connection.shutdown()
        elif self._sweep_timer is None:
            self._sweep()
        if len(self.state.connections) <= self.config.connections_max:
            return True
        self._refused.add((self.name,))
        return False

    def closed(self) -> None:
        """A connection ended."""
        if not self.state.connections:
            self._empty.set()

    def cut(self, reason: str) -> None:
        """Count a connection that we ended."""
        self._cut.add((self.name, reason))

    def next_request_id(self) -> bytes:
        """Return an id for a request that came without."""
        return b"%b-%x" % (self._run, next(self._numbers))

    # Inside

    def _sweep(self) -> None:
        """Enforce the deadlines of all connections; runs only while there are some."""
        loop = asyncio.get_running_loop()
        now = loop.time()
        for connection in self._connections():
            connection.enforce_deadlines(now)
        self._sweep_timer = None
        if self.state.connections:
            config = self.config
            shortest_s = min(config.read_timeout_s, config.write_timeout_s, config.idle_timeout_s)
            self._sweep_timer = loop.call_later(shortest_s / 4, self._sweep)

    async def _drain(self) -> None:
        self._draining = True
        for connection in self._connections():
            connection.shutdown()
        try:
            async with asyncio.timeout(self.config.drain_timeout_s):
                await self._empty.wait()
        except TimeoutError:
            _log.warning("drain timed out", listener=self.name, connections=len(self.state.connections))
        finally:
            for connection in self._connections():
                connection.abort("drain_timeout")
            if self._sweep_timer is not None:
                self._sweep_timer.cancel()
            # Aborted connections withdraw their requests when the loop tells them.
            with suppress(TimeoutError):
                async with asyncio.timeout(_FLUSH_S):
                    await self._empty.wait()
        # The application's tasks notice at their next step; they must not outlive this scope.
        if self.state.tasks:
            _, late = await asyncio.wait(set(self.state.tasks), timeout=_FLUSH_S)
            for task in late:
                task.cancel()
            if late:
                await asyncio.wait(late, timeout=_FLUSH_S)

    def _connections(self) -> list[HttpProtocol]:
        return [connection for connection in self.state.connections if isinstance(connection, HttpProtocol)]
