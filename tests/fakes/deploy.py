"""A store and a host that keep the deployment ports' full contracts, with faults on order."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path

from agent.deploy.ports import Bundle, Evidence, Progress
from agent.errors import AgentError, LoadError, TargetNotFoundError, WorkerDiedError


def digest_of(name: str, version: str) -> str:
    return sha256(f"{name}@{version}".encode()).hexdigest()


class FakeStore:
    """Versions by name; ``fetch_errors`` are raised one per try, then the fetch works."""

    def __init__(self, state_dir: Path, *, offered: dict[str, list[str]]) -> None:
        self.state_dir = state_dir
        self.offered = offered
        self.fetch_errors: list[AgentError] = []
        self.check_errors: dict[str, AgentError] = {}
        self.fetched: list[str] = []
        self.kept: frozenset[Path] = frozenset()

    async def fetch(
        self, *, team: str, name: str, version: str, channel: str, on_progress: Callable[[Progress], None]
    ) -> Bundle:
        await asyncio.sleep(0)
        if self.fetch_errors:
            raise self.fetch_errors.pop(0)
        version, digest = await self.resolve(team=team, name=name, version=version, channel=channel)
        on_progress(Progress(phase="resolved", version=version, digest=digest, bytes_total=100))
        await asyncio.sleep(0)
        on_progress(Progress(phase="progress", bytes_done=50, bytes_total=100))
        await asyncio.sleep(0)
        on_progress(Progress(phase="verifying"))
        path = self.state_dir / "versions" / team / name / f"{version}~{digest[:12]}"
        path.mkdir(parents=True, exist_ok=True)
        self.fetched.append(version)
        return Bundle(team=team, name=name, version=version, digest=digest, path=path, content=None)

    async def check(self, path: Path) -> Bundle:
        await asyncio.sleep(0)
        version = path.name.partition("~")[0]
        if version in self.check_errors:
            raise self.check_errors[version]
        if not path.is_dir():
            raise TargetNotFoundError(f"{path} is gone")
        name, team = path.parent.name, path.parent.parent.name
        return Bundle(team=team, name=name, version=version, digest=digest_of(name, version), path=path, content=None)

    async def resolve(self, *, team: str, name: str, version: str, channel: str) -> tuple[str, str]:
        await asyncio.sleep(0)
        if self.fetch_errors:
            raise self.fetch_errors.pop(0)
        offered = self.offered.get(name, [])
        wanted = version or (offered[-1] if offered else "")
        if wanted not in offered:
            raise TargetNotFoundError(f"{name}@{wanted}")
        return wanted, digest_of(name, wanted)

    async def collect(self, keep: frozenset[Path]) -> None:
        self.kept = keep


@dataclass
class FakeLoaded:
    """A version in memory, as well behaved as ``host.behaviour`` says."""

    host: FakeHost
    bundle: Bundle
    retired: bool = False
    confirmed: bool = False
    good: int = 0
    faults: int = 0
    deaths: int = 0

    def evidence(self) -> Evidence:
        return Evidence(good=self.good, faults=self.faults, deaths=self.deaths, variant="cpu-fp32")

    async def self_test(self) -> None:
        await asyncio.sleep(0)
        behaviour = self.host.behaviour.get(self.bundle.version, "good")
        if behaviour == "dies":
            self.deaths += 1
            raise WorkerDiedError("died")
        if behaviour == "faulty":
            self.faults += 1
            raise WorkerDiedError("faulty")
        self.good += 1


@dataclass
class FakeHost:
    """Routes slots; loading a version whose behaviour is ``unloadable`` fails."""

    behaviour: dict[str, str] = field(default_factory=dict)
    active: dict[str, FakeLoaded] = field(default_factory=dict)
    expected: dict[str, str] = field(default_factory=dict)
    loaded: list[FakeLoaded] = field(default_factory=list)

    async def load(self, bundle: Bundle) -> FakeLoaded:
        await asyncio.sleep(0)
        if self.behaviour.get(bundle.version) == "unloadable":
            raise LoadError("no variant loads")
        loaded = FakeLoaded(self, bundle)
        self.loaded.append(loaded)
        return loaded

    async def restore(self, bundle: Bundle) -> FakeLoaded:
        restored = await self.load(bundle)
        restored.confirmed = True
        return restored

    def confirm(self, loaded: FakeLoaded) -> None:
        assert not loaded.retired
        loaded.confirmed = True

    def activate(self, slot: str, loaded: FakeLoaded) -> FakeLoaded | None:
        previous = self.active.get(slot)
        self.active[slot] = loaded
        return previous

    async def retire(self, loaded: FakeLoaded) -> None:
        await asyncio.sleep(0)
        assert not loaded.retired, "retired twice"
        loaded.retired = True
        for slot, active in list(self.active.items()):
            if active is loaded:
                del self.active[slot]

    def expect(self, slot: str, reason: str) -> None:
        self.expected[slot] = reason
