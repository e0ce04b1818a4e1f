"""All listeners around a fake engine, in the test's own loop, with bounds small enough to reach."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import uvloop

from agent.arena import Arena
from agent.config import AuthConfig, ServingConfig
from agent.metrics import Metrics
from agent.serving.budget import ReceiveBudget
from agent.serving.frames import FrameServer
from agent.serving.http import HttpServer
from agent.serving.identity import AccessPolicy, Caller, PeerCredentials
from agent.serving.listeners import bind_tcp, bind_unix
from agent.serving.routes import Routes
from tests.fakes.engine import FakeControl, FakeEngine

LIMIT_S = 60.0  # no test takes so long; one that does hangs


@dataclass
class Edges:
    """What a test talks to."""

    frame_path: Path
    http_path: Path
    port: int
    engine: FakeEngine
    control: FakeControl
    frames: FrameServer
    http: HttpServer
    http_unix: HttpServer
    budget: ReceiveBudget
    metrics: Metrics


@asynccontextmanager
async def edges(
    folder: Path,
    *,
    engine: FakeEngine | None = None,
    control: FakeControl | None = None,
    auth: AuthConfig | None = None,
    policy: AccessPolicy | None = None,
    arena: Arena | None = None,
    **bounds: Any,
) -> AsyncIterator[Edges]:
    """Serve on sockets in ``folder`` and on a free TCP port; ``bounds`` are fields of ``ServingConfig``."""
    config = ServingConfig(**{"drain_timeout_s": 5.0, **bounds})
    metrics = Metrics()
    fake, verbs = engine or FakeEngine(), control or FakeControl()
    budget = ReceiveBudget(config.receive_bytes_max)
    shared: dict[str, Any] = {
        "policy": policy or AccessPolicy(auth or AuthConfig(), own_uid=os.getuid()),
        "budget": budget,
        "config": config,
        "metrics": metrics,
        "arena": arena,
    }
    app = Routes(engine=fake, control=verbs, metrics=metrics, version="0.0.0").app()
    frame_path, http_path = folder / "inferd.sock", folder / "http.sock"
    frames = FrameServer(bind_unix(frame_path), engine=fake, control=verbs, **shared)
    tcp = bind_tcp("127.0.0.1", 0)
    port = tcp.getsockname()[1]
    http = HttpServer(tcp, engine=fake, app=app, name="http", **shared)
    http_unix = HttpServer(bind_unix(http_path), engine=fake, app=app, name="http-unix", **shared)
    async with frames.serving(), http.serving(), http_unix.serving():
        yield Edges(frame_path, http_path, port, fake, verbs, frames, http, http_unix, budget, metrics)


def run(test: Callable[[], Awaitable[None]], *, loop: str = "uvloop") -> None:
    """Run an asynchronous test to its end, on uvloop as the daemon does or on asyncio's own loop."""

    async def bounded() -> None:
        async with asyncio.timeout(LIMIT_S):
            await test()

    (uvloop.run if loop == "uvloop" else asyncio.run)(bounded())


async def until(condition: Callable[[], bool]) -> None:
    """Return once ``condition`` holds."""
    while not condition():
        await asyncio.sleep(0.002)


class RolesOnly(AccessPolicy):
    """Every unix peer holds ``roles`` and no others, even root."""

    def __init__(self, *roles: str) -> None:
        super().__init__(AuthConfig(), own_uid=os.getuid())
        self._roles = frozenset(roles)

    def unix_caller(self, peer: PeerCredentials) -> Caller:
        return replace(super().unix_caller(peer), roles=self._roles)
