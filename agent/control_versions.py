"""The verbs about a model's versions: which one is the default, and which go. ``control.py`` checks roles.

``deploy`` with ``beside`` brings a version in; these two cost no bytes and no trial.
"""

from __future__ import annotations

import asyncio
import contextlib
import uuid
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

from agent.arguments import name_of, version_of, wait_s_of
from agent.deploy.desired import Desired
from agent.deploy.reconciler import Reconciler
from agent.deploy.slots import slot_of
from agent.deploy.state import State
from agent.errors import CommandError, InvalidInputError

Verb = Callable[[dict[str, Any], str], Awaitable[Any]]


class VersionVerbs:
    """What people and the fleet may ask about versions side by side."""

    def __init__(self, reconciler: Reconciler) -> None:
        self._reconciler = reconciler

    def verbs(self) -> Mapping[str, tuple[str, Verb]]:
        """Return role and function of each verb."""
        return {"default": ("operate", self._default), "remove": ("operate", self._remove)}

    async def default_wish(self, args: dict[str, Any], wish_id: str, source: str) -> Desired:
        """Return the wish that makes a version on this box its model's default at once.

        With ``keep`` the version that is the default now is first kept beside it.

        Raises:
            InvalidInputError: no version is named.
            NotFoundError, CommandError: it is not here, or has not earned trust.
        """
        model, version = name_of(args, "model"), version_of(args)
        if not version:
            raise InvalidInputError("'version' is missing: which one is to be the default?")
        known = await self._reconciler.find(wish_id)
        team = known.team if known is not None else await self._reconciler.earned_trust(model, version)
        if args.get("keep") and known is None:
            await self._keep(model, version, wish_id, source)
        return Desired(id=wish_id, slot=model, team=team, version=version, source=source, local=True)

    async def _keep(self, model: str, following: str, wish_id: str, source: str) -> None:
        now = self._reconciler.active_version(model)
        if now is None or now == following:
            return
        slot = slot_of(model, now)
        if self._reconciler.active_version(slot) is not None:
            return
        team = await self._reconciler.earned_trust(model, now)
        keeping = f"{wish_id}-keep"
        await self._reconciler.want(Desired(id=keeping, slot=slot, team=team, version=now, source=source, local=True))
        record = await self._reconciler.outcome(keeping)
        if record.state is not State.CONFIRMED:
            raise CommandError(f"{slot} could not be kept, so {model} stays as it is: {record.message}")

    async def remove(self, args: dict[str, Any], *, by_fleet: bool) -> dict[str, Any]:
        """Remove a version beside the default, or a whole model; return once it is gone, or after ``wait_s``."""
        model, version = name_of(args, "model"), version_of(args)
        slots = await self._reconciler.remove(model, version, by_fleet=by_fleet)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(None if by_fleet else wait_s_of(args)):
                await self._reconciler.removed(slots)
        going = self._reconciler.going(slots)
        return {"model": model, "version": version, "slots": sorted(slots), "removed": not going}

    async def _remove(self, args: dict[str, Any], _peer: str) -> dict[str, Any]:
        return await self.remove(args, by_fleet=False)

    async def _default(self, args: dict[str, Any], _peer: str) -> dict[str, Any]:
        wish = await self.default_wish(args, f"pin-{uuid.uuid4().hex[:12]}", "pin")
        await self._reconciler.want(wish)
        return {"deployment": wish.id, "version": wish.version}
