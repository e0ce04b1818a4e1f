"""What status tells of a version's variants, as plain values. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import msgspec

from agent.config import VariantsConfig
from agent.engine.ladder import Falls, Rung, Verdicts, arrange, due_at


def rows_of(
    ranked: Sequence[Rung],
    falls: Falls,
    verdicts: Verdicts,
    config: VariantsConfig,
    *,
    current: str | None,
    dropped: Iterable[tuple[str, str]],
    now: float,
) -> list[dict[str, Any]]:
    """Return each variant, best first: whether it serves, why not, when it is tried again, what was measured.

    Those that cannot run on this box come last. ``retry_s`` is ``None`` for what is not tried again by itself.
    """
    rows: list[dict[str, Any]] = []
    for rung in arrange(ranked, verdicts):
        fall, verdict = falls.get(rung.id), verdicts.get(rung.id)
        row = {
            "variant": rung.id,
            "device": rung.device,
            "precision": rung.precision,
            "state": "serving" if rung.id == current else "standby",
            "kind": None,
            "reason": verdict.reason if verdict is not None else "",
            "failures": 0,
            "retry_s": None,
            "measured": msgspec.to_builtins(verdict) if verdict is not None else None,
        }
        if fall is not None:
            wait_s = due_at(fall, config, serving=current is not None) - now
            again = wait_s < float("inf")
            row |= {"state": "failed", "kind": fall.kind, "reason": fall.reason, "failures": fall.times}
            row["retry_s"] = round(max(0.0, wait_s), 1) if again else None
        rows.append(row)
    for name, reason in dropped:
        rows.append(
            {"variant": name, "state": "dropped", "kind": None, "reason": reason, "failures": 0, "retry_s": None}
        )
    return rows
