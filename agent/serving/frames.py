"""The frame socket: applications' frames in, answers out, on raw non-blocking sockets.

Reader callbacks instead of asyncio transports: transports discard passed descriptors, and cost more than they do here.
What happens on one connection is in ``frame_connection.py``; this is the listener, its bounds and its end.

Promises: a bounded number of connections; half-sent frames and clients that do not read end at their deadline;
leaving ``serving()`` stops intake, lets accepted requests be answered, then closes. A request that was not read yet is
never half-done: its client sees the connection end without an answer and may ask again.
"""

from __future__ import annotations

import asyncio
import errno
import socket
from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager
from typing import Any, Final

from agent.arena import Arena
from agent.config import ServingConfig, SharedMemoryConfig
from agent.errors import OverloadedError
from agent.log import get_logger
from agent.metrics import Metrics
from agent.regions import RegionTable
from agent.serving.budget import ReceiveBudget
from agent.serving.frame_connection import FrameConnection
from agent.serving.identity import AccessPolicy, peer_credentials
from agent.serving.ports import Control, Engine
from agent.wire import Limits, encode, error_header

_log = get_logger("serving.frames")

_ACCEPTS_PER_TURN: Final = 64
_ACCEPT_PAUSE_S: Final = 0.5  # after the process or the box ran out of descriptors
_OUT_OF_RESOURCES: Final = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM})


class FrameServer:
    """Serve frames on one listening unix socket, inherited or from ``listeners.bind_unix``; ours to close.

    Use inside ``serving()``. It owns the tasks of ``call`` frames; everything else runs in the loop's callbacks.
    """

    def __init__(
        self,
        listener: socket.socket,
        *,
        engine: Engine,
        control: Control,
        policy: AccessPolicy,
        budget: ReceiveBudget,
        config: ServingConfig,
        metrics: Metrics,
        shared_memory: SharedMemoryConfig | None = None,
        arena: Arena | None = None,
    ) -> None:
        listener.setblocking(False)
        shared = shared_memory or SharedMemoryConfig()
        self._listener = listener
        self._policy = policy
        self._connections: set[FrameConnection] = set()
        self._empty = asyncio.Event()
        self._empty.set()
        self._sweep_timer: asyncio.TimerHandle | None = None
        self._accept_timer: asyncio.TimerHandle | None = None
        self._group: asyncio.TaskGroup | None = None
        self._refused = metrics.counter("inferd_connections_refused", "Over the connection cap", ("listener",))
        self._cut = metrics.counter("inferd_connections_cut", "Ended by us, by reason", ("listener", "reason"))
        metrics.gauge("inferd_frame_connections", "Open", (), lambda: [((), len(self._connections))])
        self.regions = RegionTable(count_max=shared.total_regions_max, bytes_max=shared.total_bytes_max)
        metrics.gauge("inferd_shared_regions", "That clients attached", (), lambda: [((), self.regions.count)])
        metrics.gauge("inferd_shared_bytes", "Of those regions", (), lambda: [((), self.regions.held_bytes)])
        self.shared_memory = shared
        self.arena = arena or Arena(bytes_max=0, idle_bytes_max=0)
        self.engine = engine
        self.control = control
        self.budget = budget
        self.config = config
        self.limits = Limits(header_bytes_max=config.header_bytes_max, body_bytes_max=config.body_bytes_max)

    @asynccontextmanager
    async def serving(self) -> AsyncIterator[None]:
        """Accept and answer as long as the body runs, then drain for at most ``drain_timeout_s``."""
        loop = asyncio.get_running_loop()
        async with asyncio.TaskGroup() as group:
            self._group = group
            loop.add_reader(self._listener.fileno(), self._accept)
            try:
                yield
            finally:
                await self._drain()
                self._group = None

    # What connections ask of us

    def spawn(self, work: Coroutine[Any, Any, None], name: str) -> asyncio.Task[None]:
        """Start a task that lives no longer than ``serving()``."""
        if self._group is None:
            raise RuntimeError("the frame server is not serving")
        return self._group.create_task(work, name=name)

    def closed(self, connection: FrameConnection, reason: str) -> None:
        """Forget ``connection``; a ``reason`` means that we ended it."""
        self._connections.discard(connection)
        if reason:
            self._cut.add(("frames", reason))
            _log.debug("connection cut", peer=connection.caller.detail, reason=reason)
        if not self._connections:
            self._empty.set()

    # Inside

    def _accept(self) -> None:
        for _ in range(_ACCEPTS_PER_TURN):
            try:
                sock, _ = self._listener.accept()
            except (BlockingIOError, InterruptedError, ConnectionAbortedError):
                return
            except OSError as error:
                if error.errno not in _OUT_OF_RESOURCES:
                    raise
                self._pause_accepting(error)
                return
            self._admit(sock)

    def _admit(self, sock: socket.socket) -> None:
        sock.setblocking(False)
        if len(self._connections) >= self.config.connections_max:
            self._refused.add(("frames",))
            _refuse(sock, OverloadedError(f"{self.config.connections_max} connections are open"))
            return
        caller = self._policy.unix_caller(peer_credentials(sock))
        connection = FrameConnection(self, sock, caller)
        self._connections.add(connection)
        self._empty.clear()
        connection.open()
        if self._sweep_timer is None:
            self._sweep()

    def _pause_accepting(self, error: OSError) -> None:
        """The listener stays readable while we cannot accept; without a pause the loop would spin."""
        _log.warning("cannot accept connections", error=str(error))
        loop = asyncio.get_running_loop()
        loop.remove_reader(self._listener.fileno())
        self._accept_timer = loop.call_later(_ACCEPT_PAUSE_S, loop.add_reader, self._listener.fileno(), self._accept)

    def _sweep(self) -> None:
        """Enforce the deadlines of all connections; runs only while there are some."""
        loop = asyncio.get_running_loop()
        now = loop.time()
        for connection in list(self._connections):
            connection.enforce_deadlines(now)
        self._sweep_timer = None
        if self._connections:
            shortest_s = min(self.config.read_timeout_s, self.config.write_timeout_s)
            self._sweep_timer = loop.call_later(shortest_s / 4, self._sweep)

    async def _drain(self) -> None:
        loop = asyncio.get_running_loop()
        if self._accept_timer is not None:
            self._accept_timer.cancel()
        loop.remove_reader(self._listener.fileno())
        self._listener.close()
        for connection in list(self._connections):
            connection.finish()
        try:
            async with asyncio.timeout(self.config.drain_timeout_s):
                await self._empty.wait()
        except TimeoutError:
            _log.warning("drain timed out", connections=len(self._connections))
        finally:
            for connection in list(self._connections):
                connection.close("drain_timeout")
            if self._sweep_timer is not None:
                self._sweep_timer.cancel()


def _refuse(sock: socket.socket, error: OverloadedError) -> None:
    with sock:
        try:
            sock.send(b"".join(encode(error_header(None, error.code, str(error), retryable=True))))
        except OSError:
            return  # it left before we could tell
