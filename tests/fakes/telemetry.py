"""A device's telemetry side in one process, with a false commander, for tests against a real broker."""

from __future__ import annotations

import asyncio
import itertools
import json
import random
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from agent.clock import SystemClock
from agent.config import TelemetryConfig
from agent.errors import CommandError
from agent.events import EventBus
from agent.metrics import Metrics
from agent.supervisor import Supervisor
from agent.telemetry.commands import CommandInbox
from agent.telemetry.link import MqttLink
from agent.telemetry.outbox import Outbox
from agent.telemetry.payloads import Stamper
from agent.telemetry.presence import Presence
from agent.telemetry.reporter import Reporter
from agent.telemetry.topics import Topics

GOOD_SIGNATURE = "good"


@dataclass(frozen=True)
class FakeVerified:
    payload: dict[str, Any]
    keyid: str


class FakeVerifier:
    """Takes ``{"signature": "good", "payload": {...}}`` for a signed command."""

    def __init__(self) -> None:
        self.calls = 0

    async def verify_command(self, envelope: bytes) -> FakeVerified:
        self.calls += 1
        try:
            value = json.loads(envelope)
        except ValueError as error:
            raise CommandError("not a DSSE envelope") from error
        if value.get("signature") != GOOD_SIGNATURE:
            raise CommandError("not signed by a current operator key")
        return FakeVerified(value["payload"], "key-1")


@dataclass
class FakeCommander:
    """Remembers what it carried out; ``gate`` holds commands back until it is set."""

    done: list[tuple[str, dict[str, Any], str]] = field(default_factory=list)
    gate: asyncio.Event | None = None
    error: Exception | None = None

    async def execute(
        self, name: str, args: dict[str, Any], command_id: str, on_progress: Callable[[dict[str, Any]], None]
    ) -> dict[str, Any]:
        on_progress({"state": "FETCHING"})
        if self.gate is not None:
            await self.gate.wait()
        if self.error is not None:
            raise self.error
        self.done.append((name, args, command_id))
        return {"state": "CONFIRMED", "model": args.get("model", "")}


class Device:
    """Outbox, link, inbox and reporter of one device, joined as the daemon joins them."""

    def __init__(
        self,
        state_dir: Path,
        config: TelemetryConfig,
        *,
        device: str = "box-1",
        verifier: Any = None,
        boot_id: str = "boot-1",
    ) -> None:
        self.clock = SystemClock()
        self.metrics = Metrics()
        self.events = EventBus(self.clock)
        self.topics = Topics("default", device)
        self.stamper = Stamper(self.clock, boot_id=boot_id, synchronized=lambda: True)
        self.outbox = Outbox(state_dir / "outbox.db", config.outbox, boot_id=boot_id, metrics=self.metrics)
        self.presence = Presence(lambda: {"agent": "test", "active": []})
        self.commander = FakeCommander()
        self.verifier = verifier or FakeVerifier()
        self.supervisor = Supervisor(self.clock)
        sids = itertools.count(1)
        self.inbox = CommandInbox(
            state_dir / "commands.db",
            config,
            topics=self.topics,
            verifier=self.verifier,
            commander=self.commander,
            outbox=self.outbox,
            presence=self.presence,
            stamper=self.stamper,
            events=self.events,
            clock=self.clock,
            metrics=self.metrics,
        )
        self.reporter = Reporter(
            config,
            events=self.events,
            outbox=self.outbox,
            metrics=self.metrics,
            stamper=self.stamper,
            clock=self.clock,
            rng=random.Random(1),
        )
        self.link = MqttLink(
            config,
            topics=self.topics,
            outbox=self.outbox,
            presence=self.presence,
            stamper=self.stamper,
            clock=self.clock,
            metrics=self.metrics,
            on_command=self.inbox.offer,
            rng=random.Random(1),
            new_sid=lambda: f"{boot_id}-{next(sids)}",
        )

    @asynccontextmanager
    async def running(self, *, reporter: bool = False, link: bool = True) -> AsyncIterator[Device]:
        """All of it runs as long as the body does; stops in the daemon's order."""
        async with AsyncExitStack() as stack:
            await stack.enter_async_context(self.outbox.opened())
            await stack.enter_async_context(self.inbox.opened())
            stack.enter_context(self.reporter.listening())
            components: list[Any] = [self.inbox]
            components += [self.link] if link else []
            components += [self.reporter] if reporter else []
            await stack.enter_async_context(self.supervisor.running(*components))
            yield self


async def until(condition: Callable[[], Any], *, timeout_s: float = 90.0, what: str = "") -> Any:
    """Return the first true value of ``condition``, polled; fail after ``timeout_s``."""
    async with asyncio.timeout(timeout_s):
        while True:
            value = condition()
            if value:
                return value
            await asyncio.sleep(0.01)
    raise AssertionError(what)
