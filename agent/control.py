"""The verbs of the box: what people, programs and the fleet may ask for, and the role each needs.

One door for ``inferctl``, HTTP management and fleet commands, so that there is one policy. Values in and out are
plain (JSON-able). Leaves out: transport and authentication.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
import uuid
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final, Protocol

from agent import __version__
from agent.arguments import flag_of, integer_of, shortened, text_of, version_of, wait_s_of, wish_of
from agent.config import Config
from agent.control_holds import AtEnd, HoldVerbs
from agent.control_store import StoreVerbs
from agent.control_versions import VersionVerbs
from agent.deploy.desired import Desired
from agent.deploy.reconciler import Reconciler
from agent.deploy.slots import version_beside
from agent.deploy.state import FINAL, State
from agent.engine.engine import Engine, pss_bytes
from agent.errors import (
    AgentError,
    CommandError,
    ForbiddenError,
    NotFoundError,
    by_code,
)
from agent.events import EventBus, Severity, Stream
from agent.gpus import GpuWatch
from agent.probe import described
from agent.profile import Choice, Hardware
from agent.waits import Waits

Roles = frozenset[str]
Verb = Callable[[dict[str, Any], str], Awaitable[Any]]
_IMPLIED: Final[Mapping[str, Roles]] = {
    "infer": frozenset({"infer", "operate", "admin"}),
    "read": frozenset({"read", "operate", "admin"}),
    "operate": frozenset({"operate", "admin"}),
    "admin": frozenset({"admin"}),
}
_GOOD_ENDS: Final = frozenset({State.CONFIRMED, State.PREPARED})
_HOLD: Final = "hold"


class TelemetryView(Protocol):
    """What status tells about the link and the outbox."""

    async def status(self) -> dict[str, Any]:
        """Return plain values: connected, broker, rows waiting, …"""


class Inspector(Protocol):
    """What a version on this box says about itself."""

    async def inspect(self, team: str, name: str, version: str) -> dict[str, Any]:
        """Return plain values; ``NotFoundError`` if it is not here. ``team`` may be empty."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Box:
    """What does not change while the daemon runs."""

    config: Config
    hardware: Hardware
    choice: Choice
    started_wall_s: float
    started_monotonic_s: float


class Control:
    """Carries out verbs after checking the caller's roles."""

    def __init__(
        self,
        box: Box,
        *,
        engine: Engine,
        reconciler: Reconciler,
        events: EventBus,
        telemetry: TelemetryView,
        store: StoreVerbs,
        versions: VersionVerbs,
        inspector: Inspector,
        gpus: GpuWatch,
        waits: Waits,
    ) -> None:
        self._waits = waits
        self._store = store
        self._versions = versions
        self._box = box
        self._engine = engine
        self._reconciler = reconciler
        self._events = events
        self._telemetry = telemetry
        self._inspector = inspector
        self._gpus = gpus
        self._holds = HoldVerbs(reconciler)
        self._verbs: Mapping[str, tuple[str, Verb]] = {
            "ping": ("infer", self._ping),
            "status": ("read", self._status),
            "models": ("read", self._models),
            "events": ("read", self._recent_events),
            "deployments": ("read", self._deployments),
            "deployment": ("read", self._deployment),
            "inspect": ("read", self._inspect),
            "selftest": ("operate", self._self_test),
            "deploy": ("operate", self._deploy),
            "rollback": ("operate", self._rollback),
            "pin": ("operate", self._pin),
            "unpin": ("operate", self._unpin),
            **self._versions.verbs(),
            **store.verbs(),
            "cancel": ("operate", self._cancel),
            _HOLD: ("infer", self._hold_nothing),
            "release": ("infer", self._holds.release),
            "load": ("operate", self._load),
            "unload": ("operate", self._unload),
        }

    async def call(
        self, method: str, args: dict[str, Any], roles: Roles, peer: str, at_end: AtEnd | None = None
    ) -> Any:
        """Return the verb's plain value.

        ``at_end`` takes what is to be done when the caller's connection ends, if there is one.

        Raises:
            NotFoundError: no such verb.
            ForbiddenError: the caller lacks the role; the attempt is an audit event.
            AgentError: as the verb says.
        """
        if method not in self._verbs:
            raise NotFoundError(f"no verb {method!r}; there are {', '.join(self._verbs)}")
        role, verb = self._verbs[method]
        if not roles & _IMPLIED[role]:
            self._events.emit(Stream.AUDIT, "call.refused", Severity.WARNING, method=method, peer=peer)
            raise ForbiddenError(f"{method} needs the role {role!r}; {peer} has {', '.join(sorted(roles)) or 'none'}")
        if role in ("operate", "admin"):
            self._events.emit(Stream.AUDIT, f"call.{method}", peer=peer, args=shortened(args))
        if method == _HOLD:
            return self._holds.take(args, peer, at_end)
        return await verb(args, peer)

    # The fleet's side: telemetry's Commander port

    async def execute(
        self, name: str, args: dict[str, Any], command_id: str, on_progress: Callable[[dict[str, Any]], None]
    ) -> dict[str, Any]:
        """Carry out a verified fleet command and return its result once it has ended.

        Repeating a command id follows the deployment it made instead of making another.

        Raises:
            CommandError: refused, or the deployment did not end well; the code is the deployment's.
        """
        if name == "report":
            return await self._status({}, "fleet")
        if name == "remove":
            return await self._versions.remove(args, by_fleet=True)
        if name == "cancel":
            return await self._cancel_for_fleet(text_of(args, "model"))
        if name not in ("deploy", "default", "rollback"):
            raise CommandError(f"no command {name!r}")
        model = text_of(args, "model")
        if name == "deploy":
            wish = wish_of(command_id, args, "fleet")
        elif name == "default":
            wish = await self._versions.default_wish(args, command_id, "fleet")
        else:
            wish = await self._rollback_wish(model, command_id, "fleet")
        await self._reconciler.want(wish)
        record = await self._reconciler.outcome(command_id, lambda record: on_progress(record.plain()))
        if record.state not in _GOOD_ENDS:
            raise (
                by_code(record.code, record.message)
                if record.code
                else CommandError(f"{record.state}: {record.message}")
            )
        return record.plain()

    async def _cancel_for_fleet(self, model: str) -> dict[str, Any]:
        record = await self._reconciler.outcome(await self._reconciler.cancel(model, source="fleet"))
        if record.state is not State.CANCELED and record.state is not State.PREPARED:
            raise CommandError(f"too late: {model} ended {record.state}: {record.message}")
        return record.plain()

    # Verbs

    async def _ping(self, _args: dict[str, Any], _peer: str) -> dict[str, Any]:
        return {"pong": True, "version": __version__}

    async def _status(self, _args: dict[str, Any], _peer: str) -> dict[str, Any]:
        box = self._box
        pid = os.getpid()
        return {
            "agent": {
                "version": __version__,
                "pid": pid,
                "uptime_s": round(time.monotonic() - box.started_monotonic_s, 1),
                "started": box.started_wall_s,
                "state_dir": box.config.device.state_dir,
            },
            "device": {
                "id": box.config.device.effective_id,
                "tenant": box.config.device.tenant,
                "profile": box.choice.profile.name,
                "profile_reason": box.choice.reason,
                "arch": box.hardware.arch,
                "cores": box.hardware.cores,
                "memory_bytes": box.hardware.memory_bytes,
                "gpus": [gpu.name for gpu in box.hardware.gpus],
                "gpu_readings": described(box.hardware, self._gpus.seen),
                "gpu_reason": box.hardware.gpu_reason,
                "cpu_features": list(box.hardware.cpu_features),
            },
            "models": self._engine.status(),
            "memory": await self._engine.memory(),
            "slots": self._reconciler.slots(),
            "holds": self._reconciler.holds.plain(),
            "trust": self._store.standing(),
            "telemetry": await self._telemetry.status(),
            "processes": await asyncio.to_thread(self._processes),
        }

    def _processes(self) -> list[dict[str, Any]]:
        pid = os.getpid()
        return [{"pid": pid, "role": "daemon", "pss_bytes": pss_bytes(pid)}, *self._engine.processes()]

    async def _models(self, _args: dict[str, Any], _peer: str) -> list[dict[str, Any]]:
        rows = []
        for slot in self._reconciler.slots():
            model, version = str(slot["model"]), version_beside(str(slot["slot"]))
            try:
                state = self._engine.model_state(model, version)
                rows.append({**slot, "ready": state.ready, "reason": state.reason})
            except AgentError as error:
                rows.append({**slot, "ready": False, "reason": str(error)})
            found = self._engine.find(model, version)
            rows[-1] |= {
                "variants": found.status()["variants"] if found is not None else [],
                "metadata": self._engine.describe(model, version) if found is not None else None,
                "residency": found.residency() if found is not None else None,
            }
        return rows

    async def _recent_events(self, args: dict[str, Any], _peer: str) -> list[dict[str, Any]]:
        after, wait_s = integer_of(args, "after", 0), wait_s_of(args)
        found = self._events.recent(after=after)
        if not found and wait_s:
            heard = asyncio.Event()
            with self._events.subscribed(lambda _: heard.set()), contextlib.suppress(TimeoutError):
                async with self._waits.up_to(wait_s):
                    await heard.wait()
            found = self._events.recent(after=after)
        return [event.plain() for event in found]

    async def _deployments(self, args: dict[str, Any], _peer: str) -> list[dict[str, Any]]:
        return [
            {**record.plain(), "final": record.state in FINAL}
            for record in await self._reconciler.history(limit=integer_of(args, "limit", 50, least=1, most=200))
        ]

    async def _deployment(self, args: dict[str, Any], _peer: str) -> dict[str, Any]:
        """Return the deployment as soon as it is past ``after_step`` or its bytes moved, at most ``wait_s`` later."""
        seen = (integer_of(args, "after_step", -1, least=-1), integer_of(args, "after_bytes", -1, least=-1))
        deployment_id = text_of(args, "id")
        try:
            async with self._waits.up_to(wait_s_of(args) or 0.05):
                record = await self._reconciler.beyond(deployment_id, seen)
        except TimeoutError:
            known = await self._reconciler.find(deployment_id)
            if known is None:
                raise NotFoundError(f"deployment {deployment_id!r} has not begun or is not known") from None
            record = known
        trying = self._engine.canary(record.slot) if record.state is State.CANARY else None
        return {**record.plain(), "final": record.state in FINAL, **({"trying": trying} if trying else {})}

    async def _inspect(self, args: dict[str, Any], _peer: str) -> dict[str, Any]:
        """Return what the named version, or the active one, and its models say about themselves."""
        model, version = text_of(args, "model"), version_of(args)
        active = next((row["active"] for row in self._reconciler.slots() if row["slot"] == model), None)
        if not version and not active:
            raise NotFoundError(f"{model!r} serves nothing here; name a version: {model}@VERSION")
        team = str(args.get("team") or self._reconciler.active_team(model) or "")
        return await self._inspector.inspect(team, model, version or str(active))

    async def _self_test(self, args: dict[str, Any], _peer: str) -> dict[str, Any]:
        model, named = text_of(args, "model"), version_of(args)
        return await self._engine.self_test(model, named, wake=flag_of(args, "wake", default=True))

    async def _deploy(self, args: dict[str, Any], _peer: str) -> dict[str, Any]:
        model = text_of(args, "model")
        team = str(args.get("team") or self._reconciler.active_team(model) or "")
        wish = wish_of(f"pin-{uuid.uuid4().hex[:12]}", {**args, "model": model, "team": team}, "pin")
        await self._reconciler.want(wish)
        return {"deployment": wish.id}

    async def _rollback(self, args: dict[str, Any], _peer: str) -> dict[str, Any]:
        wish = await self._rollback_wish(text_of(args, "model"), f"pin-{uuid.uuid4().hex[:12]}", "pin")
        await self._reconciler.want(wish)
        return {"deployment": wish.id, "version": wish.version}

    async def _pin(self, args: dict[str, Any], peer: str) -> dict[str, Any]:
        """Pin what serves, or the version named: a deployment that finds its version serving already just ends."""
        model = text_of(args, "model")
        if not args.get("version"):
            serving = self._reconciler.active_version(model)
            if serving is None:
                raise NotFoundError(f"{model!r} serves nothing: name a version (inferctl pin {model}@VERSION)")
            args = {**args, "version": serving}
        return await self._deploy(args, peer)

    async def _unpin(self, args: dict[str, Any], _peer: str) -> dict[str, Any]:
        await self._reconciler.unpin(text_of(args, "model"))
        return {"model": args["model"]}

    async def _cancel(self, args: dict[str, Any], _peer: str) -> dict[str, Any]:
        return {"deployment": await self._reconciler.cancel(text_of(args, "model"))}

    async def _hold_nothing(self, args: dict[str, Any], peer: str) -> dict[str, Any]:
        return self._holds.take(args, peer, None)

    async def _load(self, args: dict[str, Any], _peer: str) -> dict[str, Any]:
        """Return once the model is in memory."""
        model, version = text_of(args, "model"), version_of(args)
        await self._engine.load_now(model, version)
        return self._residency_of(model, version)

    async def _unload(self, args: dict[str, Any], _peer: str) -> dict[str, Any]:
        """Return once the model has left memory; its next request loads it again."""
        model, version = text_of(args, "model"), version_of(args)
        await self._engine.unload_now(model, version)
        return self._residency_of(model, version)

    def _residency_of(self, model: str, version: str) -> dict[str, Any]:
        found = self._engine.find(model, version)
        named = {"model": model, "version": found.version if found is not None else version}
        return {**named, **(found.residency() if found is not None else {"loaded": False})}

    async def _rollback_wish(self, model: str, wish_id: str, source: str) -> Desired:
        known = await self._reconciler.find(wish_id)
        if known is not None:  # the command is repeated after a restart: keep its meaning
            team, version = known.team, known.wanted
        else:
            team, version = self._reconciler.previous_version(model)
        return Desired(id=wish_id, slot=model, team=team, version=version, source=source, local=True)
