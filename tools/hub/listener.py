"""How long work tells what it is doing, without knowing who looks."""

from __future__ import annotations

from typing import Literal

Unit = Literal["bytes", "steps"]


class Listener:
    """Told about progress; this one stays silent."""

    def stage(self, title: str, total: int, unit: Unit) -> None:
        """A stage of ``total`` units begins; the one before has ended."""

    def advance(self, amount: int) -> None:
        """So many units of the stage are done."""
