"""The part of a box that pulls, activates and boots: the real journal, pointers, reconciler and trust code.

The engine alone is false: its host takes a version only if every byte of it is what was published. Run as a program
(``python -m tests.fakes.reboot``) it is what the power-cut tests record; ``Reboot`` opens what a cut left behind.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping, Sequence
from contextlib import asynccontextmanager
from hashlib import sha256
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from agent.adapters import BundleStore
from agent.bundles import child
from agent.bundles.puller import OnProgress, Puller
from agent.clock import Clock, SystemClock
from agent.config import DeployConfig, PolicyConfig, StoreConfig
from agent.deploy.desired import Desired
from agent.deploy.journal import Journal
from agent.deploy.ports import Bundle
from agent.deploy.reconciler import Reconciler
from agent.deploy.state import Record
from agent.errors import AgentError, by_code
from agent.events import EventBus
from tests.fakes.clock import FakeClock
from tests.fakes.deploy import FakeHost, FakeLoaded
from tests.fakes.device import HARDWARE, PROFILE

SLOT = "tiny"
DEPLOY = DeployConfig(probation_s=0.05, probation_calls_min=1, probation_limit_s=30)
T = TypeVar("T")
Published = Mapping[str, Mapping[str, str]]  # version to the sha256 of each of its files


class InlinePuller(Puller):
    """A puller whose trust child is this process: thousands of restarts need no thousands of interpreters.

    ``wall`` is the system clock of the box (Unix seconds).
    """

    def __init__(self, *arguments: Any, wall: Callable[[], float] = time.time, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._wall = wall

    async def _ask(
        self, request: dict[str, Any], wanted: str, on_line: OnProgress = lambda line: None
    ) -> dict[str, Any]:
        def emit(line: dict[str, Any]) -> None:
            if line["event"] == "refused":
                self._tell_refused(line, request)
            else:
                on_line(line)

        value = msgspec.json.decode(json.dumps(self._request | request), type=child.Request)
        try:
            return child.handle(value, child.Surroundings(wall=self._wall, synchronised=None, emit=emit))
        except AgentError as error:
            raise by_code(error.code, str(error)) from error  # as it crosses from the child


class StrictHost(FakeHost):
    """Loads a version only if all its files are as published; ``bad`` ones die on trial."""

    def __init__(self, published: Published, bad: Sequence[str]) -> None:
        super().__init__(behaviour=dict.fromkeys(bad, "dies"))
        self._published = published

    async def load(self, slot: str, bundle: Bundle) -> FakeLoaded:
        files = self._published[bundle.version]
        for path, digest in files.items():
            assert sha256((bundle.path / path).read_bytes()).hexdigest() == digest, f"{path} would serve damaged"
        return await super().load(slot, bundle)


class Reboot:
    """One life of the box in ``state``."""

    def __init__(
        self, state: Path, puller: Puller, published: Published, *, bad: Sequence[str] = (), clock: Clock | None = None
    ) -> None:
        self.clock = clock or FakeClock()
        self.host = StrictHost(published, bad)
        self.events: list[dict[str, Any]] = []
        self.journal = Journal(state / "journal.db")
        bus = EventBus(self.clock)
        self._heard = bus.subscribed(lambda event: self.events.append(event.plain()))
        self._heard.__enter__()
        self.reconciler = Reconciler(
            DEPLOY,
            store=BundleStore(puller, state, keep_versions=2),
            host=self.host,
            journal=self.journal,
            events=bus,
            clock=self.clock,
            state_dir=state,
            configured=(),
            poll_interval_s=0,
        )

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Boot; the block begins once what is on disk serves."""
        await self.reconciler.open()
        self._task = asyncio.ensure_future(self.reconciler.run())
        try:
            await self._while_alive(self.reconciler.booted.wait())
            yield
        finally:
            self._task.cancel()
            await asyncio.wait({self._task})
            self.reconciler.stopped()
            await self.journal.close()
            self._heard.__exit__(None, None, None)

    async def deploy(self, version: str) -> Record:
        """Ask for ``version``, unless that was asked for before, and return how it ended."""
        wish = Desired(id=f"wish-{version}", slot=SLOT, team="vision", version=version, source="fleet")
        known = await self.journal.wanted()
        if all(item.id != wish.id for item in known) and await self.reconciler.find(wish.id) is None:
            await self.reconciler.want(wish)
        return await self._while_alive(self.reconciler.outcome(wish.id))

    async def _while_alive(self, waited: Coroutine[Any, Any, T]) -> T:
        """Return what comes, unless the reconciler ends before or a minute and a half passes."""
        task = asyncio.ensure_future(waited)
        try:
            await asyncio.wait({self._task, task}, timeout=90, return_when=asyncio.FIRST_COMPLETED)
            if self._task.done():
                self._task.result()
            assert task.done(), "the reconciler neither comes to an end nor fails"
            return task.result()
        finally:
            task.cancel()

    def serving(self) -> str:
        """Return the version that answers requests, ``""`` if there is none."""
        loaded = self.host.active.get(SLOT)
        return loaded.bundle.version if loaded is not None else ""

    def heard(self, kind: str) -> list[dict[str, Any]]:
        """Return the data of the events whose stream or type ends in ``kind``."""
        return [event["data"] for event in self.events if event["stream"] == kind or event["type"].endswith(kind)]


def puller(state: Path, url: str, anchor: Path, *, inline: bool) -> Puller:
    """Return a puller from ``url`` into ``state``."""
    store = StoreConfig(urls=(url,), anchor=str(anchor), disk_reserve_bytes=0, stall_timeout_s=5.0)
    return (InlinePuller if inline else Puller)(store, PolicyConfig(), state, HARDWARE, PROFILE)


async def main(state: Path, url: str, anchor: Path, published: Published, bad: Sequence[str]) -> None:
    """Bring the published versions one after the other."""
    box = Reboot(state, puller(state, url, anchor, inline=False), published, bad=bad, clock=SystemClock())
    async with box.running():
        for version in published:
            if version != box.serving():
                await box.deploy(version)


if __name__ == "__main__":
    folder, store, root, description = sys.argv[1:]
    value = json.loads(description)
    asyncio.run(main(Path(folder), store, Path(root), value["published"], value["bad"]))
