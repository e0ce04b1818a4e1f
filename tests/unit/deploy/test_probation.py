"""Evidence confirms or condemns a version on trial."""

from __future__ import annotations

import pytest

from agent.config import DeployConfig
from agent.deploy.ports import Evidence
from agent.deploy.probation import Verdict, judge

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
    assert judge(evidence, 10, GATES, baseline_faults=0.15).verdict is Verdict.CONFIRM
