"""How the last refresh ended, kept across restarts: one small file beside the version floors.

Written by the trust child under ``Layout.lock``, read by the daemon. Not signed and not security: a refused answer only
makes a box more careful, and without the file it is as careful as its newest signature is old.
"""

from __future__ import annotations

from pathlib import Path
from typing import Final

import msgspec

from agent.durable import read_json, write_json
from agent.errors import StateError, StoreError

_REWRITE_S: Final = 60  # equal outcomes are not written more often: flash wears out


class Attempt(msgspec.Struct, frozen=True, kw_only=True):
    """One refresh. ``code`` is empty if it was verified."""

    at: int  # Unix seconds, trusted time
    source: str = ""
    code: str = ""
    message: str = ""
    refused: bool = False  # an answer came and did not hold


def read_attempt(path: Path) -> Attempt | None:
    """Return the last refresh, ``None`` if there was none or its record cannot be read."""
    try:
        raw = read_json(path)
        return None if raw is None else msgspec.convert(raw, Attempt)
    except (StateError, msgspec.ValidationError):
        return None


def write_attempt(path: Path, attempt: Attempt) -> None:
    """Keep ``attempt``; what the disk does not take is no reason to fail."""
    before = read_attempt(path)
    if before is not None and _outcome(before) == _outcome(attempt) and abs(attempt.at - before.at) < _REWRITE_S:
        return
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        write_json(path, msgspec.to_builtins(attempt))
    except (OSError, StoreError):
        return


def _outcome(attempt: Attempt) -> tuple[str, str, bool]:
    return attempt.source, attempt.code, attempt.refused
