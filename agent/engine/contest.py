"""Two variants of one version measured in turn on this box, and the verdict."""

from __future__ import annotations

import time
from typing import Final

from agent.config import VariantsConfig
from agent.engine.claims import measured_of
from agent.engine.ladder import Measured, Verdict, judge
from agent.engine.pool import Pool

_TIMEOUT_S: Final = 60.0
_ROUNDS: Final = 2  # of each variant, in turn, so that noise meets both


async def contest(pool: Pool, rival: Pool, config: VariantsConfig) -> Verdict:
    """Return whether the approximate variant in ``pool`` beats the exact one in ``rival``; the quicker round counts.

    Raises:
        WorkerDiedError: one of them died or did not answer.
    """
    best: dict[Pool, Measured] = {}
    for _ in range(_ROUNDS):
        for one in (rival, pool):
            value = await one.call("measure", timeout_s=_TIMEOUT_S, budget_ms=config.measure_ms / _ROUNDS)
            found = measured_of(value)
            if isinstance(found, str):
                return _undecided(found, rival.spec.id)
            before = best.get(one)
            best[one] = found if before is None or found.p50_ms < before.p50_ms else before
    return judge(best[pool], best[rival], rival.spec.id, config, wall_s=time.time())


def _undecided(reason: str, rival_id: str) -> Verdict:
    nothing = Measured(p50_ms=0.0, cosine=0.0)
    return Verdict(
        preferred=False,
        reason=f"cannot be compared: {reason}",
        own=nothing,
        rival=nothing,
        rival_id=rival_id,
        wall_s=time.time(),
    )
