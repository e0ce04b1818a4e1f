"""What the trust child tells of the store as a whole: its models' versions, and whom this box trusts.

``survey_line`` refreshes; ``trust_line`` reads what is on disk and needs no network. Child process only.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

from tuf.api import exceptions as tuf
from tuf.api.metadata import Metadata, Root

from agent.bundles.attempt import read_attempt
from agent.bundles.floor import BUILD_TIME, FloorFile
from agent.bundles.freshness import judge
from agent.bundles.layout import Layout
from agent.bundles.manifest import Index, IndexEntry, parse_operators
from agent.bundles.resolve import Resolver
from agent.config import StoreConfig
from agent.errors import AgentError, StateError

_LISTED_MAX: Final = 200  # per model and status; the newest


def survey_line(resolver: Resolver, models: Sequence[tuple[str, str]]) -> dict[str, Any]:
    """Refresh and return the ``surveyed`` line; raises as ``Resolver.survey``."""
    found = resolver.survey(models)
    return {
        "event": "surveyed",
        "issued": found.issued,
        "trusted_time": found.trusted_time,
        "origin": str(found.origin),
        "models": [_model(index) for index in found.indexes],
        "missing": [{"team": team, "name": name, "reason": reason} for (team, name), reason in found.missing.items()],
    }


def trust_line(resolver: Resolver, layout: Layout, store: StoreConfig, wall: float) -> dict[str, Any]:
    """Return the ``trust`` line: keys, versions, expiry and floors of the metadata on disk, and where the box stands.

    What cannot be read is named in ``problems``; nothing is guessed.
    """
    problems: list[str] = []
    try:
        floor = FloorFile(layout.floors).read()
    except StateError as error:
        floor = None
        problems.append(str(error))
    attempt = read_attempt(layout.attempt)
    issued = floor.timestamp if floor is not None else 0
    standing = judge(issued=issued, wall=wall, floor=BUILD_TIME, refused=attempt is not None and attempt.refused)
    try:
        resolver.require_sound()
    except AgentError as error:
        problems.append(str(error))
    root, roles = _roles(layout, problems)
    return {
        "event": "trust",
        "freshness": str(standing.freshness),
        "age_s": standing.age_s,
        "clock_trusted": standing.clock_trusted,
        "clock": wall,
        "trusted_time": standing.trusted_time,
        "issued": issued,
        "root": root,
        "roles": roles,
        "floors": dict(floor.roles) if floor is not None else {},
        "operators": _operators(layout, problems),
        "last_refresh": None if attempt is None else {
            "at": attempt.at,
            "source": attempt.source,
            "code": attempt.code,
            "message": attempt.message,
            "refused": attempt.refused,
        },
        "last_verified": floor.refreshed if floor is not None else 0,
        "anchor": store.anchor,
        "urls": [mirror.url for mirror in store.sources],
        "problems": problems,
    }  # fmt: skip


def _model(index: Index) -> dict[str, Any]:
    known = {entry.version: entry for entry in index.versions}
    newest = max((entry for entry in index.versions if entry.status != "revoked"), key=_seq, default=None)
    return {
        "team": index.team,
        "name": index.name,
        "channels": {
            channel: _entry(known[version]) for channel, version in index.channels.items() if version in known
        },
        "newest": _entry(newest) if newest is not None else None,
        "revoked": _listed(index, "revoked"),
        "deprecated": _listed(index, "deprecated"),
    }


def _listed(index: Index, status: str) -> list[dict[str, Any]]:
    entries = sorted((entry for entry in index.versions if entry.status == status), key=_seq, reverse=True)
    return [_entry(entry) for entry in entries[:_LISTED_MAX]]


def _seq(entry: IndexEntry) -> int:
    return entry.seq


def _entry(entry: IndexEntry) -> dict[str, Any]:
    return {
        "version": entry.version,
        "seq": entry.seq,
        "digest": entry.manifest_sha256,
        "bytes": entry.bytes,
        "reason": entry.reason,
    }


def _roles(layout: Layout, problems: list[str]) -> tuple[dict[str, Any] | None, list[dict[str, Any]]]:
    """Return the root and every other role on disk. They were verified before they were stored."""
    found = []
    root: dict[str, Any] | None = None
    for path in sorted(layout.metadata.glob("*.json")):
        try:
            metadata: Metadata[Any] = Metadata.from_bytes(path.read_bytes())
        except (OSError, tuf.RepositoryError) as error:
            problems.append(f"{path.name}: {error}")
            continue
        signed = metadata.signed
        row = {
            "role": path.name.removesuffix(".json"),
            "version": signed.version,
            "expires": int(signed.expires.timestamp()),
        }
        if isinstance(signed, Root):
            keys = {
                role: {"keys": list(held.keyids), "threshold": held.threshold} for role, held in signed.roles.items()
            }
            root = {**row, "keys": keys}
        else:
            found.append(row)
    return root, found


def _operators(layout: Layout, problems: list[str]) -> dict[str, Any] | None:
    try:
        operators = parse_operators(layout.operators.read_bytes())
    except FileNotFoundError:
        return None
    except (OSError, AgentError) as error:
        problems.append(f"operator keys: {error}")
        return None
    return {"tenant": operators.tenant, "keys": [key.keyid for key in operators.keys]}
