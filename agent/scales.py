"""How many workers each model may have, where an operator has said so at run time: kept until that is taken back.

It stands before the configuration's ``workers``. A file that cannot be read is set aside, and the configuration holds.
"""

from __future__ import annotations

from pathlib import Path
from typing import Final

import msgspec

from agent.durable import disk_errors, read_json, set_aside, write_json
from agent.errors import StateError
from agent.log import get_logger

WORKERS_MAX: Final = 64
_log = get_logger("scales")


class Scale(msgspec.Struct, frozen=True, kw_only=True):
    """Between so many workers a model has."""

    least: int
    most: int


class Scales:
    """What was said of each model; ``path`` is the file."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._scales = self._read()

    def of(self, model: str) -> Scale | None:
        """Return what was said of the model; ``None``: the configuration holds."""
        return self._scales.get(model)

    def change(self, model: str, scale: Scale | None) -> None:
        """Keep what is said of the model, or take it back.

        Raises:
            StoreError: the disk does not take it; nothing changed.
        """
        scales = {name: known for name, known in self._scales.items() if name != model}
        if scale is not None:
            scales[model] = scale
        if scales != self._scales:
            with disk_errors(self._path.name):
                write_json(self._path, msgspec.to_builtins(scales))
            self._scales = scales

    def _read(self) -> dict[str, Scale]:
        try:
            raw = read_json(self._path)
            return {} if raw is None else msgspec.convert(raw, dict[str, Scale])
        except (StateError, msgspec.ValidationError) as error:
            _log.error("scales set aside; the configuration holds", reason=str(error))
            set_aside(self._path)
            return {}
