"""One share of a canary, watched: the candidate answers some requests beside what serves, or copies of them.

The pointer is untouched meanwhile, so a restart, a cut or a cancel leaves what served. Leaves out: what is enough
(``probation.py``) and which shares there are (``rollout.py``).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

from agent.clock import Clock
from agent.config import DeployConfig
from agent.deploy.ports import Evidence, Host, Loaded
from agent.deploy.probation import Judgement, Verdict, judge_share, summary
from agent.deploy.rollout import Course
from agent.errors import AgentError
from agent.log import get_logger

_log = get_logger("deploy")
_LOOK_S: Final = (0.1, 1.0)  # least and most between two looks


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """How a share ended; ``judgement`` is ``None`` if it was interrupted."""

    judgement: Judgement | None
    evidence: dict[str, Any]


async def watch_share(
    candidate: Loaded,
    serving: Loaded,
    share: float,
    course: Course,
    *,
    config: DeployConfig,
    host: Host,
    clock: Clock,
    interrupted: Callable[[], str],
) -> Outcome:
    """Give the candidate its share until there is a verdict or a reason to stop; it keeps it if it has earned the next.

    Args:
        candidate: Loaded, on trial.
        serving: What answers the other requests.
        share: Percent of the routing keys; 0: copies only.
        course: Of which it is a step.
        config: The gates.
        host: Routes.
        clock: Monotonic time.
        interrupted: Why to stop; empty: go on.
    """
    host.try_out(candidate, canary_percent=share, shadow_percent=course.shadow)
    began = clock.monotonic()
    first, before = candidate.evidence(), serving.evidence()
    least, most = _LOOK_S
    look_s = min(most, max(least, course.step_s / max(1, course.calls_min) / 2))
    while True:
        elapsed_s = clock.monotonic() - began
        shown, usual = candidate.evidence().since(first), serving.evidence().since(before)
        judgement = judge_share(shown, elapsed_s, share, course, config, before=usual)
        stop = "" if judgement.verdict is not Verdict.WAIT else interrupted()
        if stop or judgement.verdict is not Verdict.WAIT:
            if judgement.verdict is not Verdict.CONFIRM:
                host.end_try(candidate)
            evidence = {**summary(shown, usual, elapsed_s, share), "verdict": stop or judgement.reason}
            return Outcome(judgement=None if stop else judgement, evidence=evidence)
        await probe_if_idle(candidate, clock, look_s)


async def probe_if_idle(loaded: Loaded, clock: Clock, wait_s: float) -> None:
    """Wait; then ask a version its golden inputs if nobody asked it anything meanwhile: a slow one is not idle."""
    before = loaded.evidence()
    await clock.sleep(wait_s)
    now = loaded.evidence()
    if _answers(now) == _answers(before) and not now.under_way:
        try:
            await loaded.self_test()
        except AgentError as error:
            _log.warning("self-test on trial failed", error=str(error))


def _answers(evidence: Evidence) -> int:
    return evidence.good + evidence.failed
