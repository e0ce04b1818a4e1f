"""The lowest signed versions this box still accepts, kept apart from the metadata they came from.

Torn or deleted metadata caches make a TUF client forget what it has seen, and a replayed old state is then new to it.
The floor remembers. ``timestamp`` is Unix seconds of signing as well, hence also the clock's floor: time never runs
before the newest verified signature. It is moved by signed data only, never by the system clock.

Two copies are written in turn, each with a checksum, so that one of them survives any power cut. The floor is bound to
the keys that sign timestamp and snapshot: when root replaces them, a far-future version signed by a stolen key goes
with them.
"""

from __future__ import annotations

import json
from hashlib import sha256
from pathlib import Path
from typing import Final

import msgspec

from agent.durable import read_json, write_json
from agent.errors import StateError

# No clock is believed to be before this release: 2026-11-01T00:00:00Z.
BUILD_TIME: Final = 1_793_491_200


class Floor(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What has been verified under ``keys``. Roles are named without ``.json``."""

    keys: str = ""  # digest of the timestamp and snapshot keys
    roles: dict[str, int] = {}  # role to the highest version seen
    refreshed: int = 0  # Unix seconds of the last complete refresh, in trusted time

    @property
    def timestamp(self) -> int:
        """Unix seconds when the newest seen timestamp was signed; 0: none seen."""
        return self.roles.get("timestamp", 0)

    def bound_to(self, keys: str) -> Floor:
        """Return this floor, or an empty one if other keys are in force."""
        return self if self.keys == keys else Floor(keys=keys)

    def raised(self, roles: dict[str, int], *, refreshed: int | None = None) -> Floor:
        """Return a floor that also remembers ``roles``; no version gets lower."""
        merged = {name: max(self.roles.get(name, 0), roles.get(name, 0)) for name in self.roles | roles}
        return Floor(keys=self.keys, roles=merged, refreshed=self.refreshed if refreshed is None else refreshed)


class FloorFile:
    """The two copies on disk."""

    def __init__(self, paths: tuple[Path, Path]) -> None:
        self._paths = paths
        self._sequence = 0

    def read(self) -> Floor | None:
        """Return the newest readable floor, ``None`` on a box that has never had one.

        Raises:
            StateError: copies exist and none can be read.
        """
        found: list[tuple[int, Floor]] = []
        faults: list[str] = []
        for path in self._paths:
            try:
                copy = _read_copy(path)
            except StateError as error:
                faults.append(str(error))
                continue
            if copy is not None:
                found.append(copy)
        if not found:
            if faults:
                raise StateError(f"the version floor cannot be read: {'; '.join(faults)}")
            return None
        self._sequence, floor = max(found, key=lambda copy: copy[0])
        return floor

    def write(self, floor: Floor) -> None:
        """Replace the older copy by ``floor``; ``DiskFullError`` leaves the newer one as it was."""
        self._sequence += 1
        path = self._paths[self._sequence % 2]
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        body = {"sequence": self._sequence, "floor": msgspec.to_builtins(floor)}
        write_json(path, {**body, "sha256": _checksum(body)})


def _read_copy(path: Path) -> tuple[int, Floor] | None:
    raw = read_json(path)
    if raw is None:
        return None
    try:
        body = {"sequence": raw["sequence"], "floor": raw["floor"]}
        if raw["sha256"] != _checksum(body):
            raise StateError(f"{path}: checksum differs")
        return int(raw["sequence"]), msgspec.convert(raw["floor"], Floor)
    except (KeyError, TypeError, ValueError, msgspec.ValidationError) as error:
        raise StateError(f"{path}: {error!r}") from error


def _checksum(body: dict[str, object]) -> str:
    return sha256(json.dumps(body, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
