"""What this box knows of revoked versions, for good, and what it tells of them.

Kept twice, in the journal and in a file of its own, because a box that loses either must not load a revoked version
again. What follows from it is decided in ``revocation.py`` and carried out by the reconciler.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path

import msgspec

from agent.deploy.desired import Desired
from agent.deploy.journal import Journal
from agent.deploy.pointer import Pointer
from agent.deploy.ports import Kept, News, Store
from agent.deploy.revocation import Measure, OnRevoked, Revoked, decide
from agent.deploy.state import FINAL, State
from agent.durable import read_json, set_aside, write_json
from agent.errors import StateError, StoreError
from agent.events import EventBus, Severity, Stream
from agent.log import get_logger

_log = get_logger("deploy")


class Revocations:
    """The revoked versions by digest.

    Args:
        path: Of the second copy.
        policy: What happens to a slot that serves one.
    """

    def __init__(self, journal: Journal, path: Path, events: EventBus, policy: OnRevoked) -> None:
        self._journal = journal
        self._path = path
        self._events = events
        self._policy: OnRevoked = policy
        self._known: dict[str, Revoked] = {}
        self._told: set[str] = set()  # digests about which this process has told

    async def load(self) -> None:
        """Read both copies; the journal's may come later, when its disk is well again."""
        self._known |= {item.digest: item for item in self._read_copy()}
        self._known |= {item.digest: item for item in await self._journal.revoked()}

    async def learn(self, news: Iterable[News]) -> list[Revoked]:
        """Remember for good what is revoked, and return what was not known."""
        fresh = [
            Revoked(
                team=model.team,
                name=model.name,
                version=mark.version,
                digest=mark.digest,
                reason=mark.reason or "no reason given",
            )
            for model in news
            for mark in model.revoked
            if mark.digest not in self._known
        ]
        for item in fresh:
            self._known[item.digest] = item
        if fresh:
            self._write_copy()
        for item in fresh:
            await self._journal.revoke(item)
        return fresh

    def all(self) -> list[Revoked]:
        """Return every version that is known to be revoked."""
        return list(self._known.values())

    def forbidden(self, digest: str) -> str:
        """Return why a version may not be loaded, an empty text if it may."""
        found = self._known.get(digest)
        return found.reason if found is not None and self._policy != "warn" else ""

    def against(self, wish: Desired) -> str:
        """Return why what the wish names may not be loaded, an empty text if it may."""
        named = (wish.team, wish.model, wish.version)
        found = (item for item in self._known.values() if (item.team, item.name, item.version) == named)
        return next((self.forbidden(item.digest) for item in found), "")

    async def measure(self, pointer: Pointer | None, store: Store) -> tuple[Measure, Kept | None]:
        """Return what is to be done about what a slot serves; a fallback that failed is not tried again."""
        if pointer is None or pointer.active.digest not in self._known:
            return Measure.NONE, None
        model = pointer.active.name
        failed = {digest for name, digest, _ in await self._journal.all_refused() if name == model}
        measure, kept = decide(
            pointer,
            revoked=self._known,
            kept=(await store.inventory()).versions,
            served=await self._journal.served(model) - failed,
            served_before=await self._journal.ever_served(model) - failed,
            policy=self._policy,
        )
        before = await self._journal.get(fall_back_id(pointer, kept)) if kept is not None else None
        in_vain = before is not None and before.state in FINAL - {State.CONFIRMED, State.SUPERSEDED}
        return (Measure.STOP, None) if in_vain else (measure, kept)

    def tell(self, digest: str, measure: Measure) -> Revoked:
        """Report once that a slot serves a revoked version, and what is done; return that version."""
        revoked = self._known[digest]
        if digest not in self._told:
            self._told.add(digest)
            about = {"team": revoked.team, "name": revoked.name, "version": revoked.version}
            _log.error("active version was revoked", measure=str(measure), reason=revoked.reason, **about)
            self._events.emit(
                Stream.SECURITY,
                "version.revoked",
                Severity.ERROR,
                code="revoked",
                message=revoked.reason,
                measure=str(measure),
                **about,
            )
        return revoked

    def tell_deprecated(self, model: News, pointer: Pointer | None) -> None:
        """Warn once if what serves is deprecated."""
        for mark in model.deprecated:
            if pointer is not None and mark.digest == pointer.active.digest and mark.digest not in self._told:
                self._told.add(mark.digest)
                self._events.emit(
                    Stream.DEPLOY,
                    "version.deprecated",
                    Severity.WARNING,
                    team=model.team,
                    name=model.name,
                    version=mark.version,
                    message=mark.reason,
                )

    def _read_copy(self) -> list[Revoked]:
        try:
            raw = read_json(self._path)
            return [] if raw is None else msgspec.convert(raw, list[Revoked])
        except (StateError, msgspec.ValidationError) as error:
            _log.error("copy of the revoked versions set aside", reason=str(error))
            set_aside(self._path)
            return []

    def _write_copy(self) -> None:
        try:
            write_json(self._path, [asdict(item) for item in self._known.values()])
        except (OSError, StoreError) as error:
            _log.error("copy of the revoked versions not written", reason=str(error))


def fall_back_id(pointer: Pointer, kept: Kept) -> str:
    """Return the id of the deployment that leaves a revoked version for ``kept``."""
    return f"revoked-{pointer.slot}-{pointer.active.digest[:12]}-{kept.digest}"
