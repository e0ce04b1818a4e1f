"""What deployment needs of the rest, in its own words; the composition root supplies the real ones."""

from __future__ import annotations

from collections.abc import Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from agent.deploy.interface import Interface
from agent.deploy.rollout import Rollout
from agent.spread import NOTHING, Counts


@dataclass(frozen=True, slots=True, kw_only=True)
class Bundle:
    """A verified bundle on disk. ``content`` is for the host and opaque here."""

    team: str
    name: str
    version: str
    digest: str
    path: Path
    interface: Interface
    content: Any
    rollout: Rollout | None = None  # what its publisher asks for


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """How far a fetch is. ``phase``: resolved, progress, verifying."""

    phase: str
    version: str = ""
    digest: str = ""
    bytes_done: int = 0
    bytes_total: int = 0
    rate_bps: int = 0  # bytes per second from the store


@dataclass(frozen=True, slots=True, kw_only=True)
class Copies:
    """What copies of requests have shown of a candidate; its answers to them went nowhere."""

    compared: int = 0
    agreed: float = 0.0  # of those; a copy may agree in part
    skipped: int = 0  # chosen, but not copied
    durations: Counts = NOTHING  # of its answers
    originals: Counts = NOTHING  # of the answers that clients got
    difference: str = ""  # the last one

    @property
    def agreement(self) -> float:
        """The share of the copies that agree, 0..1."""
        return self.agreed / self.compared if self.compared else 1.0

    def since(self, earlier: Copies) -> Copies:
        """Return what was added after ``earlier``; copies that were begun anew count whole."""
        if earlier.compared > self.compared or earlier.skipped > self.skipped:
            return self
        return replace(
            self,
            compared=self.compared - earlier.compared,
            agreed=self.agreed - earlier.agreed,
            skipped=self.skipped - earlier.skipped,
            durations=self.durations.since(earlier.durations),
            originals=self.originals.since(earlier.originals),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Evidence:
    """What a loaded version has shown since it was loaded, or since a moment."""

    good: int = 0
    faults: int = 0  # errors of the model, not of callers
    late: int = 0  # requests whose deadline passed
    short: int = 0  # requests that memory did not suffice for
    deaths: int = 0
    under_way: int = 0  # requests that it has not answered yet, at this moment
    ready: bool = True
    reason: str = ""
    variant: str = ""
    latency: Counts = NOTHING  # of clients' requests, but for those on direct lanes
    recent: Counts = NOTHING  # the same of the last minutes
    copies: Copies = Copies()

    @property
    def failed(self) -> int:
        """Requests that a client would call failed."""
        return self.faults + self.late

    @property
    def fault_share(self) -> float:
        """The failed ones' share of all, 0..1."""
        answered = self.good + self.failed
        return self.failed / answered if answered else 0.0

    def since(self, earlier: Evidence) -> Evidence:
        """Return what was added after ``earlier``."""
        return replace(
            self,
            good=self.good - earlier.good,
            faults=self.faults - earlier.faults,
            late=self.late - earlier.late,
            short=self.short - earlier.short,
            deaths=self.deaths - earlier.deaths,
            latency=self.latency.since(earlier.latency),
            copies=self.copies.since(earlier.copies),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Kept:
    """A version on this box, not checked."""

    team: str
    name: str
    version: str
    digest: str  # the first 12 digits
    seq: int
    path: Path
    size_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Pull:
    """An unfinished pull on this box."""

    digest: str
    size_bytes: int
    idle_s: float
    held: bool  # a process is at it


@dataclass(frozen=True, slots=True, kw_only=True)
class Inventory:
    """What is on this box's disk; ``versions`` by model, the newest first."""

    versions: tuple[Kept, ...] = ()
    pulls: tuple[Pull, ...] = ()
    free_bytes: int = 0
    used_share: float = 0.0  # of the whole disk, 0..1


@dataclass(frozen=True, slots=True, kw_only=True)
class Needed:
    """What a collection must leave: paths in use, and the digests of unfinished deployments."""

    paths: frozenset[Path] = frozenset()
    digests: frozenset[str] = frozenset()
    revoked: frozenset[str] = frozenset()  # these go first once they are not in use


@dataclass(frozen=True, slots=True, kw_only=True)
class Collected:
    """One thing that was removed, or would be."""

    what: str  # team/name version, or a pull's digest
    path: Path
    size_bytes: int
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Mark:
    """A version as a signed index names it."""

    version: str
    digest: str
    seq: int = 0
    size_bytes: int = 0
    reason: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class News:
    """What the store says of one model."""

    team: str
    name: str
    channels: Mapping[str, Mark]
    newest: Mark | None
    revoked: tuple[Mark, ...]
    deprecated: tuple[Mark, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Survey:
    """One refresh. ``missing``: why the store says nothing of a model, by ``team/name``."""

    issued: int  # Unix seconds
    origin: str  # network; stick: newer than this box was; mirror: older, only bytes were taken
    models: tuple[News, ...]
    missing: Mapping[str, str]


@dataclass(frozen=True, slots=True, kw_only=True)
class Standing:
    """How far this box may trust what it last heard."""

    freshness: str  # fresh, stale, long_offline, unknown
    clock_trusted: bool
    age_s: int


class Store(Protocol):
    """Fetches and checks bundles. Errors are ``agent.errors`` classes.

    ``medium`` is a folder that holds a store; it is asked instead of the configured ones.
    """

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
        """Return the bundle, fetched and verified."""

    async def check(self, path: Path) -> Bundle:
        """Return the bundle in ``path`` after checking every byte again, without network or expiry."""

    async def resolve(self, *, team: str, name: str, version: str, channel: str, medium: str = "") -> Mark:
        """Return the version that the store offers now."""

    async def survey(self, models: Sequence[tuple[str, str]], *, medium: str = "") -> Survey:
        """Refresh, and return what the store says of these models (team, name)."""

    async def heard(self) -> Sequence[News]:
        """Return what was revoked by what this box has verified so far, without network; never fails."""

    async def inventory(self) -> Inventory:
        """Return what is on disk."""

    async def collect(
        self, needed: Callable[[], Coroutine[Any, Any, Needed]], *, room: bool = False, dry_run: bool = False
    ) -> list[Collected]:
        """Remove what nothing needs, and more of it if ``room`` is short; ``dry_run`` only says what would go.

        ``needed`` is asked when nobody else is at the store's files any more; what it raises ends the collection.
        """


class Loaded(Protocol):
    """A version in memory."""

    def evidence(self) -> Evidence: ...

    async def self_test(self) -> None:
        """Run the golden inputs; raise ``AgentError`` when one fails or nobody answers."""


class Host(Protocol):
    """Loads versions and routes slots to them."""

    async def load(self, slot: str, bundle: Bundle) -> Loaded:
        """Start the version beside what serves; raise ``AgentError`` if no variant works.

        It stays in memory until it is confirmed, and so does what it replaces until that is retired. One that another
        slot has loaded is not loaded again; the two then end apart.
        """

    async def restore(self, slot: str, bundle: Bundle) -> Loaded:
        """Bring back a version that was confirmed, maybe to be started by its first request only.

        Raises:
            AgentError: it is to be started now, and no variant works.
        """

    def try_out(self, loaded: Loaded, *, canary_percent: float, shadow_percent: float) -> None:
        """Let a candidate answer a share of its slot's requests, and copy others to it; may be repeated."""

    def end_try(self, loaded: Loaded) -> None:
        """Let what serves answer everything again; repeating it does nothing."""

    def confirm(self, loaded: Loaded) -> None:
        """It has earned trust: it need not stay in memory while nobody uses it."""

    def activate(self, slot: str, loaded: Loaded) -> Loaded | None:
        """Route the slot to ``loaded``; return what served before, still loaded."""

    async def retire(self, loaded: Loaded) -> None:
        """Let it answer what it holds, then unload it."""

    def expect(self, slot: str, reason: str) -> None:
        """Say why a known slot does not serve yet."""

    def forget(self, slot: str) -> None:
        """Let a slot be unknown once nothing of it is loaded."""
