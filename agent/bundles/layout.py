"""Where bundles live below the state folder: names only, no disk.

::

    lock                         flock: one user of the trust files at a time
    trust/tuf/                   verified metadata          trust/targets/   verified indexes and operator keys
    trust/floor.{a,b}.json       the lowest versions still accepted
    trust/refresh.json           how the last refresh ended
    manifests/<sha256>.json      verified manifests
    staging/<manifest sha256>/   a pull in progress
    versions/<team>/<name>/<version>~<first 12 of the manifest's sha256>/
    trash/                       being deleted
    budget.json                  bytes that metered mirrors brought in this window
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Final

MANIFEST_FILE: Final = "manifest.json"
VERIFIED_FILE: Final = "VERIFIED.json"


@dataclass(frozen=True, slots=True)
class Layout:
    """The paths of one box. ``root`` is the state folder."""

    root: Path

    @property
    def lock(self) -> Path:
        return self.root / "lock"

    @property
    def metadata(self) -> Path:
        return self.root / "trust" / "tuf"

    @property
    def floors(self) -> tuple[Path, Path]:
        return self.root / "trust" / "floor.a.json", self.root / "trust" / "floor.b.json"

    @property
    def attempt(self) -> Path:
        return self.root / "trust" / "refresh.json"

    @property
    def operators(self) -> Path:
        return self.root / "trust" / "targets" / "operators.json"

    @property
    def staging(self) -> Path:
        return self.root / "staging"

    @property
    def versions(self) -> Path:
        return self.root / "versions"

    @property
    def budget(self) -> Path:
        return self.root / "budget.json"

    @property
    def trash(self) -> Path:
        return self.root / "trash"

    def indexes(self) -> list[Path]:
        """Return the indexes that were verified on this box."""
        return sorted((self.root / "trust" / "targets").glob("*.index.json"))

    def index(self, team: str, name: str) -> Path:
        return self.root / "trust" / "targets" / f"{team}~{name}.index.json"

    def manifest(self, manifest_sha256: str) -> Path:
        return self.root / "manifests" / f"{manifest_sha256}.json"

    def version(self, team: str, name: str, version: str, manifest_sha256: str) -> Path:
        return self.versions / team / name / f"{version}~{manifest_sha256[:12]}"
