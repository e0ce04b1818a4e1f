"""The verbs about a model's versions: which is the default, which go, how many workers they have.

``deploy`` with ``beside`` brings a version in; these cost no bytes and no trial. ``control.py`` checks roles.
"""

from __future__ import annotations

import asyncio
import contextlib
import uuid
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

from agent.arguments import flag_of, integer_of, name_of, version_of, wait_s_of
from agent.deploy.desired import Desired
from agent.deploy.plan import Plan
from agent.deploy.reconciler import Reconciler
from agent.deploy.slots import slot_of
from agent.deploy.state import State
from agent.engine.engine import Engine
from agent.engine.growth import Bounds
from agent.errors import CommandError, InvalidInputError, UnknownModelError
from agent.scales import WORKERS_MAX, Scale, Scales
from agent.waits import Waits

Verb = Callable[[dict[str, Any], str], Awaitable[Any]]


class VersionVerbs:
    """What people and the fleet may ask about versions side by side, and about the workers that they have.

    Args:
        bounds_of: Between what a model's number of workers may change, by ``scales`` and the configuration.
    """

    def __init__(
        self,
        reconciler: Reconciler,
        engine: Engine,
        scales: Scales,
        bounds_of: Callable[[str], Bounds],
        *,
        waits: Waits,
    ) -> None:
        self._waits = waits
        self._reconciler = reconciler
        self._engine = engine
        self._scales = scales
        self._bounds_of = bounds_of

    def verbs(self) -> Mapping[str, tuple[str, Verb]]:
        """Return role and function of each verb."""
        return {
            "default": ("operate", self._default),
            "remove": ("operate", self._remove),
            "scale": ("operate", self._scale),
        }

    async def default_wish(self, args: dict[str, Any], wish_id: str, source: str) -> Desired:
        """Return the wish that makes a version on this box its model's default at once.

        With ``keep`` the version that is the default now is first kept beside it.

        Raises:
            InvalidInputError: no version is named.
            NotFoundError, CommandError: it is not here, or has not earned trust.
        """
        model, version, keep = name_of(args, "model"), version_of(args), flag_of(args, "keep")
        plan = Plan(allow_incompatible=flag_of(args, "allow_incompatible"))
        if not version:
            raise InvalidInputError("'version' is missing: which one is to be the default?")
        known = await self._reconciler.find(wish_id)
        team = known.team if known is not None else await self._reconciler.earned_trust(model, version)
        if keep and known is None:
            await self._keep(model, version, wish_id, source)
        return Desired(id=wish_id, slot=model, team=team, version=version, source=source, local=True, plan=plan)

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
            async with asyncio.timeout(None) if by_fleet else self._waits.up_to(wait_s_of(args)):
                await self._reconciler.removed(slots)
        if not version:
            await asyncio.to_thread(self._scales.change, model, None)
        going = self._reconciler.going(slots)
        return {"model": model, "version": version, "slots": sorted(slots), "removed": not going}

    async def _remove(self, args: dict[str, Any], _peer: str) -> dict[str, Any]:
        return await self.remove(args, by_fleet=False)

    async def _default(self, args: dict[str, Any], _peer: str) -> dict[str, Any]:
        wish = await self.default_wish(args, f"pin-{uuid.uuid4().hex[:12]}", "pin")
        await self._reconciler.want(wish)
        return {"deployment": wish.id, "version": wish.version}

    async def _scale(self, args: dict[str, Any], _peer: str) -> dict[str, Any]:
        """Let a model's versions have from ``min`` to ``max`` workers each, until ``reset``; return at once."""
        model = name_of(args, "model")
        if model not in self._engine.models():
            raise UnknownModelError(f"there is no model {model!r} here")
        scale = None
        if not flag_of(args, "reset"):
            least = integer_of(args, "min", 1, least=1, most=WORKERS_MAX)
            scale = Scale(least=least, most=integer_of(args, "max", least, least=least, most=WORKERS_MAX))
        await asyncio.to_thread(self._scales.change, model, scale)
        bounds = self._bounds_of(model)
        self._engine.scale(model, bounds)
        now = {
            row["version"]: len(row["workers"])
            for row in self._engine.status()
            if row["model"] == model and "version" in row
        }
        return {"model": model, "min": bounds.least, "max": bounds.most, "configured": scale is None, "workers": now}
