"""Lay a bundle out from its chunks as a box will, so that what is checked and tried is what was packed."""

from __future__ import annotations

from pathlib import Path

import zstandard

from agent.bundles.manifest import Chunk, Manifest
from agent.bundles.verify import check_files, check_tree
from tools.hub.chunks import blob_name
from tools.hub.listener import Listener


def lay_out(manifest: Manifest, blobs: Path, folder: Path, listener: Listener) -> None:
    """Write every file of ``manifest`` to the new ``folder`` and make a box's checks on it.

    Args:
        manifest: What is packed.
        blobs: The bundle's folder.
        folder: Must not exist.
        listener: Told about progress.

    Raises:
        UntrustedError: the chunks do not make up a file.
        UnsafeBundleError: a file's content is never accepted; the message names it.
    """
    listener.stage("lay out and check", 2 * manifest.total_size, "bytes")
    folder.mkdir(parents=True)
    for item in manifest.files:
        path = folder / item.path
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("xb") as file:
            for chunk in item.chunks:
                file.write(raw_chunk((blobs / blob_name(chunk.blob)).read_bytes(), chunk))
                listener.advance(chunk.size)
    paths = {item.path for item in manifest.files}
    check_tree(folder, paths)
    check_files(folder, manifest, paths, listener.advance)


def raw_chunk(data: bytes, chunk: Chunk) -> bytes:
    """Return the raw bytes of one chunk from the ``data`` of its blob; ``ZstdError`` if they are no frame of it."""
    return zstandard.ZstdDecompressor().decompress(data, max_output_size=chunk.size) if chunk.codec else data
