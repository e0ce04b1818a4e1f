"""The verbs about store, trust and disk. ``control.py`` checks roles and carries them out with the others."""

from __future__ import annotations

import time
import uuid
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

from agent.arguments import text_of, wish_of
from agent.config import PolicyConfig
from agent.deploy import sideload
from agent.deploy.ports import Collected, Inventory, Kept, News
from agent.deploy.reconciler import Reconciler
from agent.deploy.sideload import Sideload
from agent.deploy.watch import Watch
from agent.errors import AgentError, NotFoundError

Verb = Callable[[dict[str, Any], str], Awaitable[Any]]


class StoreVerbs:
    """What people may ask about store, trust and disk.

    Args:
        trust: Asks the trust child for the keys and metadata on this box.
    """

    def __init__(
        self,
        policy: PolicyConfig,
        *,
        reconciler: Reconciler,
        watch: Watch,
        sideload: Sideload,
        trust: Callable[[], Awaitable[dict[str, Any]]],
    ) -> None:
        self._policy = policy
        self._reconciler = reconciler
        self._watch = watch
        self._sideload = sideload
        self._trust = trust

    def verbs(self) -> Mapping[str, tuple[str, Verb]]:
        """Return role and function of each verb."""
        return {
            "trust": ("read", self._show_trust),
            "store": ("read", self._show_store),
            "refresh": ("operate", self._refresh),
            "sideload": ("operate", self._take),
            "gc": ("operate", self._collect),
            "unquarantine": ("operate", self._unquarantine),
        }

    def standing(self) -> dict[str, Any]:
        """Return how far this box may trust what it last heard; cheap."""
        now = self._watch.look()
        return {"freshness": now.freshness, "age_s": now.age_s, "clock_trusted": now.clock_trusted}

    async def _show_trust(self, _args: dict[str, Any], _peer: str) -> dict[str, Any]:
        self._watch.look()
        policy = {"on_long_offline": self._policy.on_long_offline, "on_revoked": self._policy.on_revoked}
        return {**await self._trust(), "policy": policy}

    async def _show_store(self, _args: dict[str, Any], _peer: str) -> dict[str, Any]:
        inventory, needed = await self._reconciler.retention.inventory()
        in_use, pinned = self._reconciler.retention.in_use(), self._reconciler.retention.pinned()
        revoked = {item.digest[:12]: item.reason for item in self._reconciler.revocations.all()}
        pending = {digest[:12] for digest in needed.digests} if needed is not None else set()

        def roles(item: Kept) -> list[str]:
            found = list(in_use.get(item.path, ()))
            found += ["pinned"] if (item.team, item.name, item.version) in pinned else []
            found += ["pending"] if item.digest in pending and not found else []
            found += ["revoked"] if item.digest in revoked else []
            return found or ["idle"]

        return {
            "versions": [
                {
                    "team": item.team,
                    "name": item.name,
                    "version": item.version,
                    "digest": item.digest,
                    "size_bytes": item.size_bytes,
                    "roles": roles(item),
                }
                for item in inventory.versions
            ],
            "staging": [
                {
                    "digest": pull.digest,
                    "size_bytes": pull.size_bytes,
                    "idle_s": round(pull.idle_s),
                    "in_progress": pull.held,
                }
                for pull in inventory.pulls
            ],
            "quarantined": await self._quarantined(inventory),
            "revoked": [
                {"team": item.team, "name": item.name, "version": item.version, "reason": item.reason}
                for item in self._reconciler.revocations.all()
            ],
            "free_bytes": inventory.free_bytes,
            "used_share": round(inventory.used_share, 3),
        }

    async def _quarantined(self, inventory: Inventory) -> list[dict[str, Any]]:
        """Return the versions that failed here; the newest deployments and the disk tell what they are called."""
        names = {(item.name, item.digest): item.version for item in inventory.versions}
        for record in await self._reconciler.history(limit=200):
            names.setdefault((record.model, record.digest[:12]), record.version)
        return [
            {"slot": slot, "version": names.get((slot, digest[:12]), ""), "digest": digest, "reason": reason}
            for slot, digest, reason in await self._reconciler.quarantine()
        ]

    async def _unquarantine(self, args: dict[str, Any], _peer: str) -> dict[str, Any]:
        model, wanted = text_of(args, "model"), text_of(args, "version")
        inventory, _ = await self._reconciler.retention.inventory()
        for row in await self._quarantined(inventory):
            if row["slot"] == model and (row["version"] == wanted or row["digest"].startswith(wanted)):
                await self._reconciler.release(model, row["digest"])
                return row
        raise NotFoundError(f"{model}@{wanted} is not quarantined; inferctl store lists what is")

    async def _refresh(self, _args: dict[str, Any], _peer: str) -> dict[str, Any]:
        started = time.monotonic()
        refresh = await self._watch.refresh()
        return {
            **self.standing(),
            "issued": refresh.survey.issued,
            "took_s": round(time.monotonic() - started, 3),
            "models": [self._news(model) for model in refresh.survey.models],
            "missing": dict(refresh.survey.missing),
            "newly_revoked": [f"{item.team}/{item.name} {item.version}" for item in refresh.revoked],
        }

    def _news(self, model: News) -> dict[str, Any]:
        serving = self._reconciler.active_version(model.name)
        gone = {mark.version: ("revoked", mark.reason) for mark in model.revoked}
        gone |= {mark.version: ("deprecated", mark.reason) for mark in model.deprecated}
        status, reason = gone.get(serving or "", ("", ""))
        newest = model.newest.version if model.newest is not None else None
        return {
            "team": model.team,
            "name": model.name,
            "serving": serving,
            "status": status or ("active" if serving else ""),
            "reason": reason,
            "channels": {channel: mark.version for channel, mark in model.channels.items()},
            "newest": newest,
            "new": newest is not None and newest != serving,
        }

    async def _take(self, args: dict[str, Any], _peer: str) -> dict[str, Any]:
        path = text_of(args, "path")
        wish = None
        if args.get("model"):
            team = args.get("team") or self._reconciler.active_team(str(args["model"])) or ""
            wish = wish_of(f"pin-{uuid.uuid4().hex[:12]}", {**args, "team": team}, "pin", medium=path)
        return sideload.plain(await self._sideload.take(path, wish))

    async def _collect(self, args: dict[str, Any], _peer: str) -> dict[str, Any]:
        dry_run = bool(args.get("dry_run"))
        try:
            removed = await self._reconciler.retention.collect(room=bool(args.get("room")), dry_run=dry_run)
        except OSError as error:
            raise AgentError(f"collection stopped half way: {error}") from error
        return {
            "dry_run": dry_run,
            "removed": [_removed(item) for item in removed],
            "bytes": sum(item.size_bytes for item in removed),
        }


def _removed(item: Collected) -> dict[str, Any]:
    return {"what": item.what, "path": str(item.path), "size_bytes": item.size_bytes, "reason": item.reason}
