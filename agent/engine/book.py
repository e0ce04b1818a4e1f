"""What this box has learned of variants, kept over restarts: falls and measurements by bundle digest.

One small JSON file, replaced durably; it belongs to one device fingerprint and is begun anew when that changes. It is
an aid: unreadable it is set aside, unwritable it is forgotten with the process, and nothing else depends on it.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import msgspec

from agent.durable import read_json, set_aside, write_json
from agent.engine.ladder import Fall, Verdict
from agent.errors import StateError, StoreError
from agent.log import get_logger

_log = get_logger("variants")
_SCHEMA: Final = "inferd-variants/1"
_BUNDLES_MAX: Final = 128  # the ones not noted for longest go first


class _Page(msgspec.Struct, kw_only=True):
    number: int = 0  # the highest was noted last
    falls: dict[str, Fall] = {}
    verdicts: dict[str, Verdict] = {}


class _File(msgspec.Struct, kw_only=True):
    schema: str
    device: str
    bundles: dict[str, _Page] = {}  # by digest


class VariantBook:
    """The file, and what it says.

    Args:
        path: ``None`` keeps nothing.
        device: Fingerprint of the hardware, driver and runtimes that was measured.
    """

    def __init__(self, path: Path | None = None, device: str = "") -> None:
        self._path = path
        self._device = device
        self._bundles = self._read()

    def falls(self, digest: str) -> dict[str, Fall]:
        """Return what is remembered of a bundle's variants, each marked so and as fallen at ``at`` 0."""
        page = self._bundles.get(digest)
        if page is None:
            return {}
        return {
            variant: Fall(
                kind=fall.kind,
                code=fall.code,
                reason=fall.reason,
                times=fall.times,
                remembered=True,
            )
            for variant, fall in page.falls.items()
        }

    def verdicts(self, digest: str) -> dict[str, Verdict]:
        """Return what was measured of a bundle's variants."""
        page = self._bundles.get(digest)
        return dict(page.verdicts) if page is not None else {}

    def note_fall(self, digest: str, variant: str, fall: Fall) -> None:
        """Remember a fall, if it is of a kind that a restart should know of."""
        if fall.kept:
            self._page(digest).falls[variant] = fall
            self._write()

    def forgive(self, digest: str, variant: str) -> None:
        """Forget a variant's falls: it has served well."""
        page = self._bundles.get(digest)
        if page is not None and page.falls.pop(variant, None) is not None:
            self._write()

    def note_verdict(self, digest: str, variant: str, verdict: Verdict) -> None:
        """Remember a measurement."""
        self._page(digest).verdicts[variant] = verdict
        self._write()

    def _page(self, digest: str) -> _Page:
        page = self._bundles.setdefault(digest, _Page())
        page.number = 1 + max(one.number for one in self._bundles.values())
        while len(self._bundles) > _BUNDLES_MAX:
            del self._bundles[min(self._bundles, key=lambda known: self._bundles[known].number)]
        return page

    def _read(self) -> dict[str, _Page]:
        if self._path is None:
            return {}
        try:
            raw: Any = read_json(self._path)
            if raw is None:
                return {}
            found = msgspec.convert(raw, _File)
        except (StateError, msgspec.ValidationError) as error:
            _log.warning("what was learned of variants cannot be read; it is learned again", reason=str(error))
            set_aside(self._path)
            return {}
        if found.schema != _SCHEMA or found.device != self._device:
            _log.info("another device or driver: variants are measured again")
            return {}
        return found.bundles

    def _write(self) -> None:
        if self._path is None:
            return
        bundles: Mapping[str, Any] = msgspec.to_builtins(self._bundles)
        try:
            write_json(self._path, {"schema": _SCHEMA, "device": self._device, "bundles": bundles})
        except (StoreError, OSError) as error:
            _log.warning("what was learned of variants cannot be written", reason=str(error))
