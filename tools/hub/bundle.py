"""A packed bundle on disk: ``manifest.json`` and its blobs, not signed yet.

BUNDLE/manifest.json
BUNDLE/blobs/sha256/<hh>/<hex>       one chunk as the store will hold it
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Final

from agent.bundles.manifest import Chunk, Manifest, parse_manifest
from tools.hub.chunks import blob_name
from tools.hub.errors import SourceError

MANIFEST: Final = "manifest.json"


@dataclass(frozen=True, slots=True)
class Bundle:
    """A packed bundle whose manifest has been checked."""

    folder: Path
    manifest: Manifest
    manifest_bytes: bytes

    @property
    def sha256(self) -> str:
        """The manifest's hash: the identity of this version."""
        return sha256(self.manifest_bytes).hexdigest()

    @property
    def title(self) -> str:
        """``team/name@version``."""
        return f"{self.manifest.team}/{self.manifest.name}@{self.manifest.version}"

    def blob_path(self, chunk: Chunk) -> Path:
        """Return the file that holds the stored bytes of ``chunk``."""
        return self.folder / blob_name(chunk.blob)


def open_bundle(folder: Path) -> Bundle:
    """Return the bundle in ``folder``.

    Raises:
        SourceError: there is none.
        UnsafeBundleError: its manifest is refused.
    """
    try:
        data = (folder / MANIFEST).read_bytes()
    except OSError as error:
        raise SourceError(
            f"{folder}: no bundle here: {error.strerror}", hint="Make one with: inferhub pack SRC --out BUNDLE"
        ) from error
    return Bundle(folder, parse_manifest(data), data)


def distinct_chunks(manifest: Manifest) -> Iterator[Chunk]:
    """Yield each blob of the manifest once, in order of first use."""
    seen: set[str] = set()
    for file in manifest.files:
        for chunk in file.chunks:
            if chunk.blob not in seen:
                seen.add(chunk.blob)
                yield chunk


def check_blob(path: Path, chunk: Chunk) -> None:
    """Check the stored bytes of one chunk.

    Raises:
        SourceError: missing, or its size or hash differs.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise SourceError(f"{path}: {error.strerror}", hint="Pack the bundle again.") from error
    if len(data) != chunk.blob_size or sha256(data).hexdigest() != chunk.blob:
        raise SourceError(f"{path}: differs from the hash in the manifest", hint="Pack the bundle again.")
