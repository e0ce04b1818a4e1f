"""What models took of this box's memory, kept from one start to the next.

One small file: the highest use of a worker by manifest digest and variant, for each device it was seen on. A file that
cannot be read is set aside: estimates do until it is learned again. Leaves out: measuring (``meter.py``).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import msgspec

from agent.durable import read_json, set_aside, write_json
from agent.errors import StateError
from agent.log import get_logger

_VARIANTS_MAX: Final = 1024  # of one device; the longest known go first
_DEVICES_MAX: Final = 4  # a box whose driver or processor changed, and changed back
_NEWS: Final = 1.02  # less than so much more is no news
_log = get_logger("memory")

Sizes = dict[str, int]  # bytes by place


class Learned:
    """Peaks by digest and variant on one device. ``path`` is ``None`` where nothing is kept."""

    def __init__(self, path: Path | None, fingerprint: str) -> None:
        self._path = path
        self._devices = self._read()
        self._peaks = self._devices.pop(fingerprint, {})
        self._devices[fingerprint] = self._peaks
        self._changed = False

    def of(self, digest: str, variant: str) -> Mapping[str, int] | None:
        """Return the highest use of a worker so far, ``None`` if it has not run here."""
        return self._peaks.get(f"{digest}/{variant}")

    def note(self, digest: str, variant: str, sizes: Mapping[str, int]) -> None:
        """Take what a worker has used; only the highest of each place counts."""
        key = f"{digest}/{variant}"
        known = self._peaks.get(key, {})
        if any(size > known.get(place, 0) * _NEWS for place, size in sizes.items()):
            places = known.keys() | sizes.keys()
            self._peaks.pop(key, None)
            self._peaks[key] = {place: max(known.get(place, 0), sizes.get(place, 0)) for place in places}
            while len(self._peaks) > _VARIANTS_MAX:
                del self._peaks[next(iter(self._peaks))]
            self._changed = True

    def news(self) -> dict[str, dict[str, Sizes]] | None:
        """Return what ``save`` is to write, ``None`` if it is written already."""
        if not self._changed or self._path is None:
            return None
        self._changed = False
        newest = list(self._devices.items())[-_DEVICES_MAX:]
        return {fingerprint: dict(peaks) for fingerprint, peaks in newest}

    def save(self, news: dict[str, dict[str, Sizes]]) -> None:
        """Write durably; may run in a thread.

        Raises:
            DiskFullError, OSError: it is not written; the next news hold it too.
        """
        if self._path is not None:
            write_json(self._path, {"devices": news})

    def _read(self) -> dict[str, dict[str, Sizes]]:
        if self._path is None:
            return {}
        try:
            return _parse(read_json(self._path))
        except StateError as error:
            _log.warning("what models take of memory is learned anew", reason=str(error))
            set_aside(self._path)
            return {}


def _parse(raw: Any) -> dict[str, dict[str, Sizes]]:
    if raw is None:
        return {}
    try:
        return msgspec.convert(raw, dict[str, dict[str, dict[str, Sizes]]])["devices"]
    except (msgspec.ValidationError, KeyError) as error:
        raise StateError(f"malformed: {error}") from error
