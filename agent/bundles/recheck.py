"""Check a version that is on this box, without store, network or expiry.

Apart from ``pull.py`` because it runs at every boot before anything serves: it needs no trust library, whose import
takes longer than hashing a small bundle. Child process only.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final

from agent.bundles.manifest import Manifest
from agent.bundles.variants import Box, Selection, no_variant, select
from agent.bundles.verify import check_version_directory
from agent.durable import disk_errors

Emit = Callable[[dict[str, Any]], None]

_REPORT_S: Final = 0.5


class HashProgress:
    """Counts hashed bytes and reports them twice a second."""

    def __init__(self, emit: Emit, total: int) -> None:
        self._emit = emit
        self._total = total
        self._done = 0
        self._next = time.monotonic() + _REPORT_S

    def begin(self, done: int) -> None:
        """Say that ``done`` bytes are hashed already."""
        self._done = done
        self._tell()

    def add(self, size: int) -> None:
        """Count ``size`` more bytes."""
        self._done += size
        if time.monotonic() >= self._next:
            self._tell()

    def _tell(self) -> None:
        self._next = time.monotonic() + _REPORT_S
        self._emit({"event": "verifying", "bytes_done": self._done, "bytes_total": self._total})


def check(path: Path, box: Box, emit: Emit) -> dict[str, Any]:
    """Verify a version directory again, without store, network or expiry; return the ``done`` line.

    Raises:
        StateError, UntrustedError, UnsafeBundleError: it is not what was activated.
        NoVariantError, PolicyError: nothing of it can or may run here now.
    """
    with disk_errors(path):
        manifest, record = check_version_directory(path, HashProgress(emit, 0).add)
    selection = _on_disk(manifest, select(manifest, box), record.files)
    return done_line(path, manifest, record.manifest_sha256, selection, 0)


def done_line(
    path: Path, manifest: Manifest, manifest_sha256: str, selection: Selection, fetched: int
) -> dict[str, Any]:
    """Return the ``done`` line for the version in ``path``."""
    return {
        "event": "done",
        "path": str(path.absolute()),
        "manifest_sha256": manifest_sha256,
        "version": manifest.version,
        "bytes_fetched": fetched,
        "variants": [variant.id for variant in selection.usable],
        "dropped": [{"id": variant, "reason": reason} for variant, reason in selection.dropped],
    }


def _on_disk(manifest: Manifest, selection: Selection, files: Sequence[str]) -> Selection:
    """Drop the variants whose files were not fetched, as after a change of hardware."""
    here = set(files)
    usable = tuple(variant for variant in selection.usable if here.issuperset(variant.files))
    absent = [(v.id, "its files are not on this box; deploy again") for v in selection.usable if v not in usable]
    dropped = (*selection.dropped, *absent)
    if not usable:
        raise no_variant(manifest, dropped)
    return Selection(usable=usable, dropped=dropped)
