"""What deployment needs of the rest, in its own words; the composition root supplies the real ones."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol


@dataclass(frozen=True, slots=True, kw_only=True)
class Bundle:
    """A verified bundle on disk. ``content`` is for the host and opaque here."""

    team: str
    name: str
    version: str
    digest: str
    path: Path
    content: Any


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """How far a fetch is. ``phase``: resolved, progress, verifying."""

    phase: str
    version: str = ""
    digest: str = ""
    bytes_done: int = 0
    bytes_total: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Evidence:
    """What a loaded version has shown since it was loaded."""

    good: int = 0
    faults: int = 0  # errors of the model, not of callers
    deaths: int = 0
    ready: bool = True
    reason: str = ""
    variant: str = ""


class Store(Protocol):
    """Fetches and checks bundles. Errors are ``agent.errors`` classes."""

    async def fetch(
        self, *, team: str, name: str, version: str, channel: str, on_progress: Callable[[Progress], None]
    ) -> Bundle:
        """Return the bundle, fetched and verified."""

    async def check(self, path: Path) -> Bundle:
        """Return the bundle in ``path`` after checking every byte again, without network or expiry."""

    async def resolve(self, *, team: str, name: str, version: str, channel: str) -> tuple[str, str]:
        """Return the version and manifest digest the store offers now."""

    async def collect(self, keep: frozenset[Path]) -> None:
        """Remove versions that nothing needs."""


class Loaded(Protocol):
    """A version in memory."""

    def evidence(self) -> Evidence: ...

    async def self_test(self) -> None:
        """Run the golden inputs; raise ``AgentError`` when one fails or nobody answers."""


class Host(Protocol):
    """Loads versions and routes slots to them."""

    async def load(self, bundle: Bundle) -> Loaded:
        """Start the version beside what serves; raise ``AgentError`` if no variant works.

        It stays in memory until it is confirmed, and so does what it replaces until that is retired.
        """

    async def restore(self, bundle: Bundle) -> Loaded:
        """Bring back a version that was confirmed, maybe to be started by its first request only.

        Raises:
            AgentError: it is to be started now, and no variant works.
        """

    def confirm(self, loaded: Loaded) -> None:
        """It has earned trust: it need not stay in memory while nobody uses it."""

    def activate(self, slot: str, loaded: Loaded) -> Loaded | None:
        """Route the slot to ``loaded``; return what served before, still loaded."""

    async def retire(self, loaded: Loaded) -> None:
        """Let it answer what it holds, then unload it."""

    def expect(self, slot: str, reason: str) -> None:
        """Say why a known slot does not serve yet."""
