"""A store and a host that keep the deployment ports' full contracts, with faults on order."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any

from agent.deploy.interface import Extent, Interface, Port
from agent.deploy.ports import (
    Bundle,
    Collected,
    Copies,
    Evidence,
    Inventory,
    Kept,
    Mark,
    Needed,
    News,
    Progress,
    Survey,
)
from agent.errors import (
    AgentError,
    LoadError,
    OfflineError,
    OverloadedError,
    SelfTestError,
    TargetNotFoundError,
    WorkerDiedError,
)
from agent.spread import NOTHING, Counts, counts_of

ROWS = Port(dtype="float32", shape=(Extent(low=1, high=8, name="N"),))
INTERFACE = Interface(inputs={"x": ROWS}, outputs={"y": ROWS}, handler="tensors/v1")


def digest_of(name: str, version: str) -> str:
    return sha256(f"{name}@{version}".encode()).hexdigest()


def _seq(version: str) -> int:
    return int(version.split(".")[0])


class FakeStore:
    """Versions by name; ``fetch_errors`` are raised one per try, then the fetch works."""

    def __init__(self, state_dir: Path, *, offered: dict[str, list[str]]) -> None:
        self.state_dir = state_dir
        self.offered = offered
        self.fetch_errors: list[AgentError] = []
        self.offline = False
        self.check_errors: dict[str, AgentError] = {}
        self.fetched: list[str] = []
        self.media: dict[str, dict[str, list[str]]] = {}
        self.revoked: dict[str, str] = {}  # version to reason
        self.deprecated: dict[str, str] = {}
        self.interfaces: dict[str, Interface] = {}  # of versions that differ from the rest
        self.needed = Needed()
        self.collectable: list[Collected] = []

    async def fetch(
        self,
        *,
        team: str,
        name: str,
        version: str,
        channel: str,
        on_progress: Callable[[Progress], None],
        medium: str = "",
    ) -> Bundle:
        await asyncio.sleep(0)
        self._maybe_fail(medium)
        offered = await self.resolve(team=team, name=name, version=version, channel=channel, medium=medium)
        version, digest = offered.version, offered.digest
        on_progress(Progress(phase="resolved", version=version, digest=digest, bytes_total=100))
        await asyncio.sleep(0)
        on_progress(Progress(phase="progress", bytes_done=50, bytes_total=100))
        await asyncio.sleep(0)
        on_progress(Progress(phase="verifying"))
        path = self.state_dir / "versions" / team / name / f"{version}~{digest[:12]}"
        path.mkdir(parents=True, exist_ok=True)
        self.fetched.append(version)
        return self._bundle(path)

    async def check(self, path: Path) -> Bundle:
        await asyncio.sleep(0)
        version = path.name.partition("~")[0]
        if version in self.check_errors:
            raise self.check_errors[version]
        if not path.is_dir():
            raise TargetNotFoundError(f"{path} is gone")
        return self._bundle(path)

    async def resolve(self, *, team: str, name: str, version: str, channel: str, medium: str = "") -> Mark:
        await asyncio.sleep(0)
        self._maybe_fail(medium)
        offered = (self.media[medium] if medium else self.offered).get(name, [])
        wanted = version or (offered[-1] if offered else "")
        if wanted not in offered:
            raise TargetNotFoundError(f"{name}@{wanted}")
        return Mark(version=wanted, digest=digest_of(name, wanted), seq=_seq(wanted))

    async def survey(self, models: Sequence[tuple[str, str]], *, medium: str = "") -> Survey:
        await asyncio.sleep(0)
        self._maybe_fail(medium)
        news = [
            News(
                team=team,
                name=name,
                channels={},
                newest=None,
                revoked=self._marks(name, self.revoked),
                deprecated=self._marks(name, self.deprecated),
            )
            for team, name in models
        ]
        return Survey(issued=1, origin="stick" if medium else "network", models=tuple(news), missing={})

    async def heard(self) -> Sequence[News]:
        return ()

    async def inventory(self) -> Inventory:
        versions = []
        for path in sorted(self.state_dir.glob("versions/*/*/*"), reverse=True):
            version, _, digest = path.name.partition("~")
            team, name = path.parent.parent.name, path.parent.name
            seq = _seq(version)
            versions.append(
                Kept(team=team, name=name, version=version, digest=digest, seq=seq, path=path, size_bytes=1)
            )
        return Inventory(versions=tuple(versions))

    async def collect(
        self, needed: Callable[[], Coroutine[Any, Any, Needed]], *, room: bool = False, dry_run: bool = False
    ) -> list[Collected]:
        self.needed = await needed()
        found, self.collectable = self.collectable, self.collectable if dry_run else []
        return found

    def _bundle(self, path: Path) -> Bundle:
        version, name = path.name.partition("~")[0], path.parent.name
        return Bundle(
            team=path.parent.parent.name,
            name=name,
            version=version,
            digest=digest_of(name, version),
            path=path,
            interface=self.interfaces.get(version, INTERFACE),
            content=None,
        )

    def _maybe_fail(self, medium: str) -> None:
        if medium:
            return
        if self.fetch_errors:
            raise self.fetch_errors.pop(0)
        if self.offline:
            raise OfflineError("no route")

    def _marks(self, name: str, versions: dict[str, str]) -> tuple[Mark, ...]:
        return tuple(
            Mark(version=version, digest=digest_of(name, version), reason=reason)
            for version, reason in versions.items()
        )


@dataclass
class FakeLoaded:
    """A version in memory, as well behaved as ``host.behaviour`` says.

    A ``late`` one answers in half a second, others in a millisecond; beside a ``busy`` one every other is as slow, too.
    """

    host: FakeHost
    bundle: Bundle
    retired: bool = False
    confirmed: bool = False
    good: int = 0
    faults: int = 0
    deaths: int = 0
    copies: int = 0  # of requests that what serves got at the same time

    def evidence(self) -> Evidence:
        crowded = self.host.behaviour.get(self.bundle.version) == "crowded"
        ready = not crowded or all(other is self or other.retired for other in self.host.loaded)
        if self.host.tried.get(self.bundle.name, (None, 0, 0))[::2] == (self, 100.0):
            self.copies += 10
        slow = self.host.behaviour.get(self.bundle.version) in ("late", "busy")
        return Evidence(
            good=self.good,
            faults=self.faults,
            deaths=self.deaths,
            ready=ready,
            variant="cpu-fp32",
            latency=self._counted(0.5 if slow else 0.001, self.good),
            recent=self._counted(0.001, self.good),
            copies=Copies(
                compared=self.copies,
                durations=self._counted(0.5 if "busy" in self._beside() else 0.001, self.copies),
                originals=self._counted(self._original_s(), self.copies),
            ),
        )

    def _counted(self, duration_s: float, times: int) -> Counts:
        if not {"late", "busy"} & set(self.host.behaviour.values()):
            return NOTHING  # nobody asks, and histories are long
        return Counts(tuple(times * amount for amount in counts_of([duration_s]).buckets))

    def _original_s(self) -> float:
        """How long an answer of what serves takes now."""
        active = self.host.active.get(self.bundle.name)
        slow = active is not None and self.host.behaviour.get(active.bundle.version) in ("late", "busy")
        return 0.5 if slow else 0.001

    def _beside(self) -> set[str | None]:
        others = (other.bundle.version for other in self.host.loaded if other is not self and not other.retired)
        return {self.host.behaviour.get(version) for version in others}

    async def self_test(self) -> None:
        await asyncio.sleep(0)
        behaviour = self.host.behaviour.get(self.bundle.version, "good")
        if behaviour == "crowded" and not self.evidence().ready:
            raise OverloadedError("memory holds one of them only")
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
    tried: dict[str, tuple[FakeLoaded, float, float]] = field(default_factory=dict)  # by slot
    shares: list[tuple[str, float, float]] = field(default_factory=list)  # every one that was given

    async def load(self, slot: str, bundle: Bundle) -> FakeLoaded:
        await asyncio.sleep(0)
        if self.behaviour.get(bundle.version) == "unloadable":
            raise LoadError("no variant loads")
        if self.behaviour.get(bundle.version) == "wrong":
            raise SelfTestError("a golden output differs")
        if self.behaviour.get(bundle.version) == "short":
            raise OverloadedError("memory does not hold it now")
        loaded = FakeLoaded(self, bundle)
        self.loaded.append(loaded)
        return loaded

    async def restore(self, slot: str, bundle: Bundle) -> FakeLoaded:
        restored = await self.load(slot, bundle)
        restored.confirmed = True
        return restored

    def confirm(self, loaded: FakeLoaded) -> None:
        assert not loaded.retired
        loaded.confirmed = True

    def try_out(self, loaded: FakeLoaded, *, canary_percent: float, shadow_percent: float) -> None:
        assert not loaded.retired
        assert self.active[loaded.bundle.name] is not loaded, "what serves is no candidate"
        self.tried[loaded.bundle.name] = (loaded, canary_percent, shadow_percent)
        self.shares.append((loaded.bundle.version, canary_percent, shadow_percent))

    def end_try(self, loaded: FakeLoaded) -> None:
        if loaded.bundle.name in self.tried and self.tried[loaded.bundle.name][0] is loaded:
            del self.tried[loaded.bundle.name]

    def activate(self, slot: str, loaded: FakeLoaded) -> FakeLoaded | None:
        self.end_try(loaded)
        previous = self.active.get(slot)
        self.active[slot] = loaded
        return previous

    async def retire(self, loaded: FakeLoaded) -> None:
        await asyncio.sleep(0)
        assert not loaded.retired, "retired twice"
        self.end_try(loaded)
        loaded.retired = True
        for slot, active in list(self.active.items()):
            if active is loaded:
                del self.active[slot]

    def expect(self, slot: str, reason: str) -> None:
        self.expected[slot] = reason

    def forget(self, slot: str) -> None:
        self.expected.pop(slot, None)
