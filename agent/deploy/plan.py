"""How a wish is to be carried out, beside what it is for. Pure.

A plan travels with the wish and with its deployment's record, so that a restart goes on as was asked. Fields that a
journal of another program version has or lacks are ignored or stand at their defaults.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, Final

from agent.deploy.rollout import Rollout


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """Each field's default is what a wish that says nothing means."""

    stage_only: bool = False  # end once the bytes are here and verified; nothing is loaded
    ignore_window: bool = False  # wait for no window and no lock
    force_after_s: float | None = None  # seconds of waiting for windows and locks after which nothing is waited for
    not_after: float | None = None  # Unix seconds; not loaded any more after that
    allow_incompatible: bool = False  # although callers of what serves would notice (``interface.py``)
    rollout: Rollout | None = None  # how it meets its first requests; None: as manifest and configuration say

    def plain(self) -> dict[str, Any]:
        """Return JSON-able fields that differ from their defaults."""
        plain = {field.name: value for field in fields(self) if (value := getattr(self, field.name)) != field.default}
        return plain | ({"rollout": self.rollout.plain()} if self.rollout is not None else {})


ORDINARY: Final = Plan()
