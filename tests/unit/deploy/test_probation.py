"""Evidence confirms or condemns a version on trial."""

from __future__ import annotations

from dataclasses import replace

import pytest

from agent.config import DeployConfig
from agent.deploy.ports import Copies, Evidence
from agent.deploy.probation import Verdict, judge, judge_share, summary
from agent.deploy.rollout import Course
from agent.spread import counts_of

pytestmark = pytest.mark.unit

GATES = DeployConfig(probation_s=10, probation_calls_min=5, probation_limit_s=60, probation_errors_max=0.1)


@pytest.mark.parametrize(
    ("evidence", "elapsed_s", "verdict"),
    [
        (Evidence(good=100), 9.9, Verdict.WAIT),
        (Evidence(good=5), 10.0, Verdict.CONFIRM),
        (Evidence(good=4), 10.0, Verdict.WAIT),
        (Evidence(good=4), 60.0, Verdict.ROLL_BACK),
        (Evidence(good=100, deaths=1), 1.0, Verdict.ROLL_BACK),
        (Evidence(good=0, faults=2), 1.0, Verdict.WAIT),
        (Evidence(good=10, faults=3), 1.0, Verdict.ROLL_BACK),
        (Evidence(good=97, faults=3), 10.0, Verdict.CONFIRM),
        (Evidence(good=50, ready=False, reason="no variant loads"), 1.0, Verdict.ROLL_BACK),
        (Evidence(good=50, ready=False), 11.0, Verdict.WAIT),
    ],
)
def test_verdicts(evidence: Evidence, elapsed_s: float, verdict: Verdict) -> None:
    assert judge(evidence, elapsed_s, GATES).verdict is verdict


def test_faults_count_above_what_the_version_before_showed() -> None:
    evidence = Evidence(good=80, faults=20)
    assert judge(evidence, 10, GATES).verdict is Verdict.ROLL_BACK
    assert judge(evidence, 10, GATES, before=Evidence(good=85, faults=15)).verdict is Verdict.CONFIRM


def latencies(good: int, each_s: float) -> Evidence:
    return Evidence(good=good, latency=counts_of([each_s] * good))


@pytest.mark.parametrize(
    ("ours_s", "theirs_s", "verdict"),
    [
        (0.100, 0.050, Verdict.CONFIRM),
        (0.160, 0.050, Verdict.ROLL_BACK),
        (0.015, 0.001, Verdict.CONFIRM),  # within the slack
        (0.050, 0.001, Verdict.ROLL_BACK),
        (0.010, 0.050, Verdict.CONFIRM),
    ],
)
def test_a_version_much_slower_than_the_one_before_goes(ours_s: float, theirs_s: float, verdict: Verdict) -> None:
    judgement = judge(latencies(40, ours_s), 10, GATES, before=latencies(40, theirs_s))
    assert judgement.verdict is verdict
    assert (verdict is Verdict.ROLL_BACK) == ("95 %" in judgement.reason)


def test_few_answers_say_nothing_about_latency() -> None:
    for ours, theirs in ((4, 40), (40, 4)):
        evidence = replace(latencies(ours, 9.0), good=40)
        assert judge(evidence, 10, GATES, before=latencies(theirs, 0.01)).verdict is Verdict.CONFIRM


def test_one_late_answer_of_few_says_nothing() -> None:
    once = Evidence(good=6, latency=counts_of([0.01] * 5 + [9.0]))
    assert judge(once, 10, GATES, before=latencies(40, 0.01)).verdict is Verdict.CONFIRM
    twice = Evidence(good=6, latency=counts_of([0.01] * 4 + [9.0] * 2))
    assert judge(twice, 10, GATES, before=latencies(40, 0.01)).verdict is Verdict.ROLL_BACK


def test_a_version_before_that_is_asked_too_little_meanwhile_is_known_by_its_last_minutes() -> None:
    before = replace(latencies(2, 0.01), recent=counts_of([0.01] * 40))
    assert judge(latencies(40, 9.0), 10, GATES, before=before).verdict is Verdict.ROLL_BACK


def test_want_of_memory_and_late_answers_speak_against_a_version() -> None:
    assert judge(Evidence(good=100, short=1), 1, GATES).verdict is Verdict.ROLL_BACK
    late = Evidence(good=10, late=5)
    assert judge(late, 1, GATES).verdict is Verdict.ROLL_BACK
    assert judge(late, 10, GATES, before=Evidence(good=10, late=5)).verdict is Verdict.CONFIRM


COURSE = Course(shares=(0.0, 25.0), shadow=50.0, step_s=10, calls_min=30, limit_s=60, agreement_min=0.9)


def copied(compared: int, agreed: float, *, ours_s: float = 0.01, theirs_s: float = 0.01) -> Copies:
    durations, originals = counts_of([ours_s] * compared), counts_of([theirs_s] * compared)
    return Copies(compared=compared, agreed=agreed, durations=durations, originals=originals, difference="y: another")


@pytest.mark.parametrize(
    ("share", "evidence", "elapsed_s", "verdict"),
    [
        (25, Evidence(good=30), 10, Verdict.CONFIRM),
        (25, Evidence(good=30), 9, Verdict.WAIT),
        (25, Evidence(good=29), 10, Verdict.WAIT),
        (25, Evidence(good=29), 60, Verdict.ROLL_BACK),
        (25, Evidence(good=300, deaths=1), 1, Verdict.ROLL_BACK),
        (25, Evidence(good=300, short=1), 1, Verdict.ROLL_BACK),
        (25, Evidence(good=30, faults=30), 1, Verdict.ROLL_BACK),
        (0, Evidence(good=60), 10, Verdict.WAIT),
        (0, Evidence(good=60, copies=copied(30, 30)), 10, Verdict.CONFIRM),
        (0, Evidence(good=60, copies=copied(30, 20)), 1, Verdict.ROLL_BACK),
        (0, Evidence(good=60, copies=copied(19, 0)), 1, Verdict.WAIT),
        (0, Evidence(good=60, copies=copied(30, 30, ours_s=1.0)), 1, Verdict.ROLL_BACK),
        (25, Evidence(good=60, copies=copied(30, 20)), 1, Verdict.ROLL_BACK),
        (25, Evidence(good=30, ready=False), 10, Verdict.WAIT),
    ],
)
def test_verdicts_of_a_share(share: float, evidence: Evidence, elapsed_s: float, verdict: Verdict) -> None:
    judgement = judge_share(evidence, elapsed_s, share, COURSE, GATES, before=Evidence(good=100))
    assert judgement.verdict is verdict, judgement.reason


def test_too_little_evidence_is_no_fault_of_the_version() -> None:
    undecided = judge_share(Evidence(good=90), 60, 0, COURSE, GATES, before=Evidence())
    assert (undecided.verdict, undecided.undecided) == (Verdict.ROLL_BACK, True)
    assert "0 of 30 comparisons" in undecided.reason
    guilty = judge_share(Evidence(deaths=1), 60, 0, COURSE, GATES, before=Evidence())
    assert (guilty.verdict, guilty.undecided) == (Verdict.ROLL_BACK, False)


def test_both_versions_are_seen_over_the_same_time() -> None:
    long_ago = latencies(1000, 0.001)
    now = Evidence(good=1040, latency=counts_of([0.001] * 1000 + [0.5] * 40))
    assert now.since(long_ago).latency.quantile_s(0.5) == pytest.approx(0.5, rel=0.03)
    assert now.since(long_ago).good == 40


def test_the_summary_tells_what_decided() -> None:
    evidence = Evidence(good=30, faults=1, latency=counts_of([0.01] * 30), copies=copied(30, 27))
    told = summary(evidence, latencies(90, 0.005), 12.34, 25)
    assert told["percent"] == 25
    assert told["elapsed_s"] == 12.3
    assert (told["good"], told["failed"], told["compared"], told["agreement"]) == (30, 1, 30, 0.9)
    assert told["p95_ms"] == pytest.approx(10, rel=0.03)
    assert told["before_p95_ms"] == pytest.approx(5, rel=0.03)
