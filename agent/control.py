"""The verbs of the box: what people, programs and the fleet may ask for, and the role each needs.

One door for ``inferctl``, HTTP management and fleet commands, so that there is one policy. Values in and out are
plain (JSON-able). Leaves out: transport and authentication.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import time
import uuid
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final, Protocol

from agent import __version__
from agent.config import Config
from agent.deploy.desired import Desired
from agent.deploy.reconciler import Reconciler
from agent.deploy.state import FINAL, State
from agent.engine.engine import Engine, pss_bytes
from agent.errors import (
    AgentError,
    CommandError,
    ForbiddenError,
    InvalidInputError,
    NotFoundError,
    UnavailableError,
    by_code,
)
from agent.events import EventBus, Severity, Stream
from agent.profile import Hardware, Profile

Roles = frozenset[str]
Verb = Callable[[dict[str, Any], str], Awaitable[Any]]
_IMPLIED: Final[Mapping[str, Roles]] = {
    "infer": frozenset({"infer", "operate", "admin"}),
    "read": frozenset({"read", "operate", "admin"}),
    "operate": frozenset({"operate", "admin"}),
    "admin": frozenset({"admin"}),
}
_WAIT_S_MAX: Final = 60.0
_NAME: Final = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}")
_VERSION: Final = re.compile(r"\d{1,9}\.\d{1,9}\.\d{1,9}(-[0-9A-Za-z.-]{1,32})?")
_GOOD_ENDS: Final = frozenset({State.CONFIRMED})


class TelemetryView(Protocol):
    """What status tells about the link and the outbox."""

    async def status(self) -> dict[str, Any]:
        """Return plain values: connected, broker, rows waiting, …"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Box:
    """What does not change while the daemon runs."""

    config: Config
    hardware: Hardware
    profile: Profile
    started_wall_s: float
    started_monotonic_s: float


class Control:
    """Carries out verbs after checking the caller's roles."""

    def __init__(
        self, box: Box, *, engine: Engine, reconciler: Reconciler, events: EventBus, telemetry: TelemetryView
    ) -> None:
        self._box = box
        self._engine = engine
        self._reconciler = reconciler
        self._events = events
        self._telemetry = telemetry
        self._verbs: Mapping[str, tuple[str, Verb]] = {
            "ping": ("infer", self._ping),
            "status": ("read", self._status),
            "models": ("read", self._models),
            "events": ("read", self._recent_events),
            "deployments": ("read", self._deployments),
            "deployment": ("read", self._deployment),
            "selftest": ("operate", self._self_test),
            "deploy": ("operate", self._deploy),
            "rollback": ("operate", self._rollback),
            "unpin": ("operate", self._unpin),
            "load": ("operate", self._load),
            "unload": ("operate", self._unload),
        }

    async def call(self, method: str, args: dict[str, Any], roles: Roles, peer: str) -> Any:
        """Return the verb's plain value.

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
            self._events.emit(Stream.AUDIT, f"call.{method}", peer=peer, args=_short(args))
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
        if name not in ("deploy", "rollback"):
            raise CommandError(f"no command {name!r}")
        model = _text(args, "model")
        if name == "deploy":
            wish = _wish(command_id, args, "fleet")
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
                "profile": box.profile.name,
                "arch": box.hardware.arch,
                "cores": box.hardware.cores,
                "memory_bytes": box.hardware.memory_bytes,
                "gpus": [gpu.name for gpu in box.hardware.gpus],
                "gpu_reason": box.hardware.gpu_reason,
            },
            "models": self._engine.status(),
            "memory": await self._engine.memory(),
            "slots": self._reconciler.slots(),
            "telemetry": await self._telemetry.status(),
            "processes": await asyncio.to_thread(self._processes),
        }

    def _processes(self) -> list[dict[str, Any]]:
        pid = os.getpid()
        return [{"pid": pid, "role": "daemon", "pss_bytes": pss_bytes(pid)}, *self._engine.processes()]

    async def _models(self, _args: dict[str, Any], _peer: str) -> list[dict[str, Any]]:
        rows = []
        for slot in self._reconciler.slots():
            name = str(slot["slot"])
            try:
                state = self._engine.model_state(name)
                rows.append({**slot, "ready": state.ready, "reason": state.reason})
            except AgentError as error:
                rows.append({**slot, "ready": False, "reason": str(error)})
            try:
                rows[-1] |= {"metadata": self._engine.describe(name)}
            except AgentError:
                rows[-1] |= {"metadata": None}
            version = self._engine.active(name)
            rows[-1] |= {"residency": version.residency() if version is not None else None}
        return rows

    async def _recent_events(self, args: dict[str, Any], _peer: str) -> list[dict[str, Any]]:
        after, wait_s = _integer(args, "after", 0), _wait_s(args)
        found = self._events.recent(after=after)
        if not found and wait_s:
            heard = asyncio.Event()
            with self._events.subscribed(lambda _: heard.set()), contextlib.suppress(TimeoutError):
                await asyncio.wait_for(heard.wait(), wait_s)
            found = self._events.recent(after=after)
        return [event.plain() for event in found]

    async def _deployments(self, args: dict[str, Any], _peer: str) -> list[dict[str, Any]]:
        return [
            {**record.plain(), "final": record.state in FINAL}
            for record in await self._reconciler.history(limit=_integer(args, "limit", 50, least=1, most=200))
        ]

    async def _deployment(self, args: dict[str, Any], _peer: str) -> dict[str, Any]:
        """Return the deployment as soon as it is past ``after_step`` or its bytes moved, at most ``wait_s`` later."""
        seen = (_integer(args, "after_step", -1, least=-1), _integer(args, "after_bytes", -1, least=-1))
        deployment_id = _text(args, "id")
        try:
            record = await asyncio.wait_for(self._reconciler.beyond(deployment_id, seen), _wait_s(args) or 0.05)
        except TimeoutError:
            known = await self._reconciler.find(deployment_id)
            if known is None:
                raise NotFoundError(f"deployment {deployment_id!r} has not begun or is not known") from None
            record = known
        return {**record.plain(), "final": record.state in FINAL}

    async def _self_test(self, args: dict[str, Any], _peer: str) -> dict[str, Any]:
        version = self._engine.active(_text(args, "model"))
        if version is None:
            raise UnavailableError(f"{args['model']!r} serves nothing")
        return await version.self_test(timeout_s=30.0)

    async def _deploy(self, args: dict[str, Any], _peer: str) -> dict[str, Any]:
        model = _text(args, "model")
        team = str(args.get("team") or self._reconciler.active_team(model) or "")
        if not team:
            raise InvalidInputError(f"{model!r} is new on this box: name its team (inferctl deploy --team TEAM)")
        wish = _wish(f"pin-{uuid.uuid4().hex[:12]}", {**args, "model": model, "team": team}, "pin")
        await self._reconciler.want(wish)
        return {"deployment": wish.id}

    async def _rollback(self, args: dict[str, Any], _peer: str) -> dict[str, Any]:
        wish = await self._rollback_wish(_text(args, "model"), f"pin-{uuid.uuid4().hex[:12]}", "pin")
        await self._reconciler.want(wish)
        return {"deployment": wish.id, "version": wish.version}

    async def _unpin(self, args: dict[str, Any], _peer: str) -> dict[str, Any]:
        await self._reconciler.unpin(_text(args, "model"))
        return {"model": args["model"]}

    async def _load(self, args: dict[str, Any], _peer: str) -> dict[str, Any]:
        """Return once the model is in memory."""
        model = _text(args, "model")
        await self._engine.load_now(model)
        return self._residency_of(model)

    async def _unload(self, args: dict[str, Any], _peer: str) -> dict[str, Any]:
        """Return once the model has left memory; its next request loads it again."""
        model = _text(args, "model")
        await self._engine.unload_now(model)
        return self._residency_of(model)

    def _residency_of(self, model: str) -> dict[str, Any]:
        version = self._engine.active(model)
        return {"model": model, **(version.residency() if version is not None else {"loaded": False})}

    async def _rollback_wish(self, model: str, wish_id: str, source: str) -> Desired:
        known = await self._reconciler.find(wish_id)
        if known is not None:  # the command is repeated after a restart: keep its meaning
            team, version = known.team, known.wanted
        else:
            team, version = self._reconciler.previous_version(model)
        return Desired(id=wish_id, slot=model, team=team, version=version, source=source, local=True)


def _wish(wish_id: str, args: dict[str, Any], source: str) -> Desired:
    """Return the wish of a deploy; checked here, because what is stored stays in force.

    Raises:
        InvalidInputError: a name or version that no store can hold.
    """
    version = args.get("version") or ""
    channel = args.get("channel") or "stable"
    names = {"model": _text(args, "model"), "team": _text(args, "team"), "channel": channel}
    for what, value in names.items():
        if not isinstance(value, str) or not _NAME.fullmatch(value):
            raise InvalidInputError(f"{what} {value!r}: lower-case letters, digits, '.', '_', '-', at most 64")
    if not isinstance(version, str) or (version and not _VERSION.fullmatch(version)):
        raise InvalidInputError(f"version {version!r}: three numbers such as 1.4.0, or 1.4.0-rc.1")
    return Desired(
        id=wish_id,
        slot=names["model"],
        team=names["team"],
        version=version,
        channel=names["channel"],
        source=source,
        force=bool(args.get("force")),
    )


def _text(args: dict[str, Any], name: str) -> str:
    value = args.get(name)
    if not isinstance(value, str) or not value:
        raise InvalidInputError(f"{name!r} is missing")
    return value


def _wait_s(args: dict[str, Any]) -> float:
    value = args.get("wait_s", 0.0)
    if type(value) not in (int, float) or not 0 <= value <= _WAIT_S_MAX:
        raise InvalidInputError(f"'wait_s' must be a number from 0 to {_WAIT_S_MAX:g}")
    return float(value)


def _integer(args: dict[str, Any], name: str, default: int, *, least: int = 0, most: int = 1 << 62) -> int:
    value = args.get(name, default)
    if type(value) is not int or not least <= value <= most:
        raise InvalidInputError(f"{name!r} must be an integer from {least} to {most}")
    return value


def _short(args: dict[str, Any]) -> dict[str, str]:
    return {name: str(value)[:200] for name, value in list(args.items())[:16]}
