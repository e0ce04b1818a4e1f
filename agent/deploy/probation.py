"""Whether a new version on trial has earned trust. Pure: evidence in, verdict out.

Evidence, not start-up, confirms a version: time served, good answers, no death, no more faults than before.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from agent.config import DeployConfig
from agent.deploy.ports import Evidence

_FAULTS_MIN = 3  # fewer failed answers prove nothing


class Verdict(StrEnum):
    """The decision about a version on trial."""

    WAIT = "wait"
    CONFIRM = "confirm"
    ROLL_BACK = "roll_back"


@dataclass(frozen=True, slots=True, kw_only=True)
class Judgement:
    """A verdict and its reason."""

    verdict: Verdict
    reason: str = ""


def judge(now: Evidence, elapsed_s: float, config: DeployConfig, *, baseline_faults: float = 0.0) -> Judgement:
    """Return what to do with a version that has served ``elapsed_s`` seconds on trial.

    Args:
        now: Evidence since it was loaded.
        elapsed_s: Time on trial (seconds, monotonic).
        config: The gates.
        baseline_faults: Share of faults of the version before it (0..1).
    """
    if now.deaths:
        return Judgement(verdict=Verdict.ROLL_BACK, reason=f"{now.deaths} worker death(s) on trial")
    if not now.ready and now.reason:
        return Judgement(verdict=Verdict.ROLL_BACK, reason=now.reason)
    answered = now.good + now.faults
    share = now.faults / answered if answered else 0.0
    if now.faults >= _FAULTS_MIN and share > baseline_faults + config.probation_errors_max:
        return Judgement(verdict=Verdict.ROLL_BACK, reason=f"{now.faults} of {answered} answers failed")
    if elapsed_s >= config.probation_s and now.good >= config.probation_calls_min and now.ready:
        return Judgement(verdict=Verdict.CONFIRM, reason=f"{now.good} good answers in {elapsed_s:.1f} s")
    if elapsed_s >= config.probation_limit_s:
        return Judgement(
            verdict=Verdict.ROLL_BACK,
            reason=f"only {now.good} good answers within {config.probation_limit_s:g} s",
        )
    return Judgement(verdict=Verdict.WAIT)
