"""What somebody with the store's disk, and with some of its keys, could make of its metadata."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from securesystemslib.signer import CryptoSigner
from tuf.api.metadata import Metadata, MetaFile, TargetFile
from tuf.api.serialization.json import JSONSerializer

from tests.fakes.store import StoreWorld

Change = Callable[[Any], None]  # takes the signed part


class Thief:
    """Edits the metadata of ``world`` and signs with whichever of its keys a test lends."""

    def __init__(self, world: StoreWorld) -> None:
        self.world = world
        self.folder = world.root / "metadata"

    def version(self, role: str) -> int:
        """Return the newest version of a role that the store holds."""
        return max(int(path.name.split(".")[0]) for path in self.folder.glob(f"*.{role}.json"))

    def path(self, role: str, version: int = 0) -> Path:
        """Return where a role's newest, or that version of it, is stored."""
        if role == "timestamp":
            return self.folder / "timestamp.json"
        return self.folder / f"{version or self.version(role)}.{role}.json"

    def edit(self, role: str, change: Change, *signers: CryptoSigner) -> None:
        """Change a role's newest file in place; without ``signers`` its signatures stay as they are."""
        metadata = self._read(role)
        change(metadata.signed)
        self._write(self.path(role), metadata, signers)

    def next_root(self, change: Change, signers: Sequence[CryptoSigner], *, stored_as: int = 0) -> None:
        """Publish a root that follows the newest."""
        metadata = self._read("root")
        metadata.signed.version += 1
        change(metadata.signed)
        metadata.signatures.clear()
        self._write(self.path("root", stored_as or metadata.signed.version), metadata, signers)

    def team(self, team: str, change: Change) -> None:
        """Publish a next version of a team's role, with the team's key and the online key."""
        self._next(f"team-{team}", change, self.world.teams[team])

    def targets(self, change: Change) -> None:
        """Publish a next version of the top-level role, with its key and the online key."""
        self._next("targets", change, self.world.targets)

    def snapshot(self, change: Change) -> None:
        """Publish a next snapshot and its timestamp with the online key."""
        self._next("snapshot", change, self.world.online)

    def timestamp(self, change: Change) -> None:
        """Publish a next timestamp with the online key."""

        def renew(signed: Any) -> None:
            signed.version += 1
            change(signed)

        self.edit("timestamp", renew, self.world.online)

    def meta(self, role: str, version: int, *, hashes: bool = True) -> MetaFile:
        """Return what names a stored version of a role."""
        data = self.path(role, version).read_bytes()
        return MetaFile.from_data(version, data, ["sha256"]) if hashes else MetaFile(version)

    def _next(self, role: str, change: Change, signer: CryptoSigner) -> None:
        metadata = self._read(role)
        metadata.signed.version += 1
        change(metadata.signed)
        version = metadata.signed.version
        self._write(self.path(role, version), metadata, [signer])
        if role == "snapshot":
            self.timestamp(lambda signed: setattr(signed, "snapshot_meta", self.meta(role, version)))
        else:
            self.snapshot(lambda signed: signed.meta.update({f"{role}.json": self.meta(role, version)}))

    def _read(self, role: str) -> Metadata[Any]:
        return Metadata.from_bytes(self.path(role).read_bytes())

    def _write(self, path: Path, metadata: Metadata[Any], signers: Sequence[CryptoSigner]) -> None:
        for number, signer in enumerate(signers):
            metadata.sign(signer, append=number > 0)
        path.write_bytes(metadata.to_bytes(JSONSerializer()))


def lists(target: str, data: bytes) -> Change:
    """Return the change that lists ``data`` as ``target``."""
    return lambda signed: signed.targets.update({target: TargetFile.from_data(target, data, ["sha256"])})
