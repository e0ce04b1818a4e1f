"""Which versions on this box's disk are needed, as what, and letting the store remove the others."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Protocol

from agent.deploy.desired import Desired
from agent.deploy.journal import Journal
from agent.deploy.pointer import Pointer
from agent.deploy.ports import Collected, Inventory, Needed, Store
from agent.deploy.revocation import Revoked
from agent.deploy.slots import version_beside
from agent.deploy.state import FINAL, State
from agent.errors import AgentError, OverloadedError
from agent.log import get_logger

_log = get_logger("deploy")


class Slot(Protocol):
    """What a slot's performer tells."""

    busy: bool
    pointer: Pointer | None


class Retention:
    """Collects for all slots.

    Args:
        slots: By lane; the caller's own, so that it is always current.
        staged: The lanes in which somebody wants a version to be on disk.
        wishes, revoked: What holds now.
    """

    def __init__(
        self,
        *,
        store: Store,
        journal: Journal,
        state_dir: Path,
        slots: Mapping[str, Slot],
        wishes: Callable[[], Mapping[str, Desired]],
        revoked: Callable[[], list[Revoked]],
        staged: Callable[[], set[str]],
    ) -> None:
        self._store = store
        self._journal = journal
        self._state_dir = state_dir
        self._slots = slots
        self._wishes = wishes
        self._revoked = revoked
        self._staged = staged

    async def tidy(self) -> None:
        """Remove what nothing needs, unless a deployment is under way."""
        try:
            await self._needed_at_rest()  # else a collection would only be in a deployment's way
            await self._store.collect(self._needed_at_rest)
        except OverloadedError:
            return
        except (AgentError, OSError) as error:
            _log.warning("collection failed", reason=str(error))

    async def collect(self, *, room: bool = False, dry_run: bool = False) -> list[Collected]:
        """Remove what nothing needs, and more of it if ``room`` is short; return what went, or would go.

        Raises:
            OverloadedError: a deployment is under way whose version is not known yet.
            OSError: the disk; what went before is gone.
        """
        await self._needed_now()
        return await self._store.collect(self._needed_now, room=room, dry_run=dry_run)

    async def make_room(self, digests: frozenset[str]) -> bool:
        """Let go what nothing needs, for a deployment of ``digests``; return whether anything went."""
        try:
            removed = await self._store.collect(lambda: self._needed_now(digests), room=True)
        except (AgentError, OSError) as error:
            _log.warning("collection failed", reason=str(error))
            return False
        return bool(removed)

    async def _needed_now(self, more: frozenset[str] = frozenset()) -> Needed:
        needed = await self.needed(more)
        if needed is None:
            raise OverloadedError("a deployment is under way; try again when it is further")
        return needed

    async def _needed_at_rest(self) -> Needed:
        if any(slot.busy for slot in self._slots.values()):
            raise OverloadedError("a deployment is under way")  # its version may be staged and named by nothing yet
        return await self._needed_now()

    async def inventory(self) -> tuple[Inventory, Needed | None]:
        """Return what is on disk and what of it is needed; ``None``: a deployment has just begun."""
        return await self._store.inventory(), await self.needed()

    def in_use(self) -> dict[Path, list[str]]:
        """Return the version directories that pointers name, and as what."""
        found: dict[Path, list[str]] = {}
        for name, slot in self._slots.items():
            pointer = slot.pointer
            if pointer is None:
                continue
            role = "on trial" if pointer.trial else ("beside" if version_beside(name) else "active")
            found.setdefault(self._state_dir / pointer.active.path, []).append(role)
            if pointer.previous is not None:
                found.setdefault(self._state_dir / pointer.previous.path, []).append("previous")
        return found

    def pinned(self) -> set[tuple[str, str, str]]:
        """Return team, name and version of every pin that names one."""
        wishes = self._wishes().values()
        return {(wish.team, wish.model, wish.version) for wish in wishes if wish.source == "pin" and wish.version}

    async def needed(self, more: frozenset[str] = frozenset()) -> Needed | None:
        """Return what must stay on disk; ``None`` if a deployment is under way whose version is not known yet.

        ``more``: digests that stay, too; deployments without a digest are then taken to be of these.
        """
        paths, digests, pinned = set(self.in_use()), more, self.pinned()
        staged, revoked = self._staged(), frozenset(item.digest for item in self._revoked())
        for lane in staged | self._slots.keys():
            latest = await self._journal.latest(lane)
            if (
                latest is not None
                and latest.state is State.PREPARED
                and lane in staged
                and latest.digest not in revoked
            ):
                digests |= {latest.digest}
            elif latest is not None and latest.state not in FINAL:
                if not latest.digest and not more and latest.state is not State.QUEUED:
                    return None
                digests |= {latest.digest}
        if pinned:
            inventory = await self._store.inventory()
            paths |= {item.path for item in inventory.versions if (item.team, item.name, item.version) in pinned}
        return Needed(paths=frozenset(paths), digests=digests - {""}, revoked=revoked)
