"""Whether a new version has earned trust, or its next share. Pure: evidence in, verdict out.

Evidence, not start-up, speaks for a version: time, good answers, no death, no want of memory, no more faults than the
version before, no answers much later than its, and agreement with it where requests were copied. Both versions are
seen over the same time; where the one before was asked too little then, its last minutes count.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Final

from agent.config import DeployConfig
from agent.deploy.ports import Evidence
from agent.deploy.rollout import Course
from agent.spread import Counts

_FAULTS_MIN: Final = 3  # fewer failed answers prove nothing
_SAMPLES: Final = (5, 20)  # nor do fewer durations or copies, by how many answers are asked for
_Q: Final = 0.95


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
    undecided: bool = False  # nothing speaks against the version: evidence did not come
    late: bool = False  # only that it answers later than the version before did, at another time


def judge(now: Evidence, elapsed_s: float, config: DeployConfig, *, before: Evidence | None = None) -> Judgement:
    """Return what to do with a version that has served ``elapsed_s`` seconds on trial.

    Args:
        now: Evidence since its trial began.
        elapsed_s: Time on trial (seconds, monotonic).
        config: The gates.
        before: What the version before it has shown lately.
    """
    if reason := fault_of(now, before, config):
        return Judgement(verdict=Verdict.ROLL_BACK, reason=reason)
    if reason := lateness_of(now, before, config, config.probation_calls_min):
        return Judgement(verdict=Verdict.ROLL_BACK, reason=reason, late=True)
    if elapsed_s >= config.probation_s and now.good >= config.probation_calls_min and now.ready:
        return Judgement(verdict=Verdict.CONFIRM, reason=f"{now.good} good answers in {elapsed_s:.1f} s")
    if elapsed_s >= config.probation_limit_s:
        return Judgement(
            verdict=Verdict.ROLL_BACK,
            reason=f"only {now.good} good answers within {config.probation_limit_s:g} s",
        )
    return Judgement(verdict=Verdict.WAIT)


def judge_share(
    now: Evidence, elapsed_s: float, share: float, course: Course, config: DeployConfig, *, before: Evidence
) -> Judgement:
    """Return what to do with a candidate that has had its ``share`` (percent) for ``elapsed_s`` seconds.

    Args:
        now: Evidence since it has that share, also of copies.
        elapsed_s: Seconds, monotonic.
        share: 0 if it gets copies only.
        course: What it must show for the next share.
        config: The gates.
        before: What the version that serves has shown over the same time.
    """
    copies = now.copies
    reason = (
        fault_of(now, before, config)
        or lateness_of(now, before, config, course.calls_min)
        or later(copies.durations, copies.originals, config, course.calls_min, "copies")
    )
    if not reason and copies.compared >= samples_min(course.calls_min) and copies.agreement < course.agreement_min:
        reason = (
            f"{copies.agreement:.1%} of {copies.compared} copies agree, {course.agreement_min:.1%} must"
            f" (last: {copies.difference or 'no reason'})"
        )
    if reason:
        return Judgement(verdict=Verdict.ROLL_BACK, reason=reason)
    wanted = course.calls_min if not share else 0
    if elapsed_s >= course.step_s and now.good >= course.calls_min and copies.compared >= wanted and now.ready:
        return Judgement(verdict=Verdict.CONFIRM, reason=_shown(now, share, elapsed_s))
    if elapsed_s < course.limit_s:
        return Judgement(verdict=Verdict.WAIT)
    had = f"{copies.compared} of {wanted} comparisons" if wanted else f"{now.good} of {course.calls_min} good answers"
    return Judgement(
        verdict=Verdict.ROLL_BACK, reason=f"only {had} within {course.limit_s:g} s at {share:g} %", undecided=True
    )


def fault_of(now: Evidence, before: Evidence | None, config: DeployConfig) -> str:
    """Return what speaks against a version, but for lateness; empty if nothing does."""
    if now.deaths:
        return f"{now.deaths} worker death(s) on trial"
    if not now.ready and now.reason:
        return now.reason
    if now.short:
        return f"memory did not suffice for {now.short} request(s)"
    failed, answered = now.failed, now.good + now.failed
    share, usual = failed / answered if answered else 0.0, before.fault_share if before is not None else 0.0
    if failed >= _FAULTS_MIN and share > usual + config.probation_errors_max:
        return f"{failed} of {answered} answers failed"
    return ""


def lateness_of(now: Evidence, before: Evidence | None, config: DeployConfig, calls_min: int) -> str:
    """Return by how much a version that is to give ``calls_min`` good answers gives them too late; else empty.

    Where the version before was asked too little meanwhile, its last minutes count.
    """
    if before is None:
        return ""
    usual = before.latency if before.latency.total >= samples_min(calls_min) else before.recent
    return later(now.latency, usual, config, calls_min, "answers") or ""


def later(now: Counts, before: Counts, config: DeployConfig, calls_min: int, what: str) -> str | None:
    """Return by how much these durations are too long, empty if they are not; ``None`` if they are too few to say."""
    if min(now.total, before.total) < samples_min(calls_min):
        return None
    q = min(_Q, 1 - 1 / now.total)  # of few answers the last one alone says nothing
    ours_ms, theirs_ms = now.quantile_s(q) * 1000, before.quantile_s(_Q) * 1000
    if ours_ms <= theirs_ms * config.latency_factor_max + config.latency_slack_ms:
        return ""
    return f"95 % of the {what} came within {ours_ms:.1f} ms, those of the version before within {theirs_ms:.1f} ms"


def summary(now: Evidence, before: Evidence | None, elapsed_s: float, share: float) -> dict[str, Any]:
    """Return the evidence of one share or of a probation as people and programs want to read it."""
    found: dict[str, Any] = {"percent": share, "elapsed_s": round(elapsed_s, 1), "good": now.good}
    found |= {"failed": now.failed, "deaths": now.deaths, "short": now.short}
    found |= _latency("", now.latency)
    if before is not None:
        found |= _latency("before_", before.latency)
        found |= {"before_failed": before.failed, "before_good": before.good}
    copies = now.copies
    if copies.compared or copies.skipped:
        found |= {"compared": copies.compared, "agreement": round(copies.agreement, 4), "skipped": copies.skipped}
        found |= _latency("copies_", copies.durations) | _latency("originals_", copies.originals)
        for q in (50, 95) if copies.durations.total else ():
            delta = found[f"copies_p{q}_ms"] - found[f"originals_p{q}_ms"]
            found[f"delta_p{q}_ms"] = round(delta, 3)
        found |= {"difference": copies.difference} if copies.difference else {}
    return found


def samples_min(calls_min: int) -> int:
    """Return how many durations, or copies, say anything where ``calls_min`` good answers are asked for."""
    low, high = _SAMPLES
    return max(low, min(high, calls_min))


def _latency(prefix: str, counts: Counts) -> dict[str, float]:
    if not counts.total:
        return {}
    return {f"{prefix}p{q}_ms": round(counts.quantile_s(q / 100) * 1000, 3) for q in (50, 95)}


def _shown(now: Evidence, share: float, elapsed_s: float) -> str:
    copies = now.copies
    text = f"{now.good} good answers in {elapsed_s:.1f} s " + (f"at {share:g} %" if share else "to copies")
    return f"{text}, {copies.agreement:.1%} of {copies.compared} copies agree" if copies.compared else text
