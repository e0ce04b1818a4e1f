"""What a revoked version means for a slot, as a table."""

from __future__ import annotations

from pathlib import Path

import pytest

from agent.deploy.pointer import Pointer, Target
from agent.deploy.ports import Kept
from agent.deploy.revocation import Measure, OnRevoked, decide

pytestmark = pytest.mark.unit


def digest(number: int) -> str:
    return f"{number}" * 64


def target(number: int) -> Target:
    return Target(team="vision", name="tiny", version=f"{number}.0.0", digest=digest(number), path=f"v/{number}")


def kept(number: int, *, name: str = "tiny") -> Kept:
    return Kept(
        team="vision",
        name=name,
        version=f"{number}.0.0",
        digest=digest(number)[:12],
        seq=number,
        path=Path(f"/v/{number}"),
        size_bytes=1,
    )


@pytest.mark.parametrize(
    ("active", "previous", "revoked", "on_disk", "served", "policy", "expected"),  # served < 0: with a former device
    [
        (3, 2, [], [3, 2, 1], [1, 2, 3], "fallback", (Measure.NONE, None)),
        (3, 2, [2], [3, 2, 1], [1, 2, 3], "fallback", (Measure.NONE, None)),
        (3, 2, [3], [3, 2, 1], [1, 2, 3], "fallback", (Measure.FALL_BACK, 2)),
        (3, 2, [3, 2], [3, 2, 1], [1, 2, 3], "fallback", (Measure.FALL_BACK, 1)),
        (3, 2, [3, 2, 1], [3, 2, 1], [1, 2, 3], "fallback", (Measure.STOP, None)),
        (3, 2, [3], [3, 2, 1], [], "fallback", (Measure.FALL_BACK, 2)),  # the journal was lost, the pointer was not
        (3, None, [3], [5, 4, 3], [3], "fallback", (Measure.STOP, None)),  # they never served here
        (3, 2, [3], [3], [1, 2, 3], "fallback", (Measure.STOP, None)),
        (3, 2, [3], [3, 2], [2, 3], "stop", (Measure.STOP, None)),
        (3, 2, [3], [3, 2], [2, 3], "warn", (Measure.WARN, None)),
        (1, 2, [1], [3, 2, 1], [1, 2, 3], "fallback", (Measure.FALL_BACK, 3)),
        (4, None, [4], [3, 2, 1], [4, -3, 2], "fallback", (Measure.FALL_BACK, 2)),
        (4, None, [4], [3, 2, 1], [4, -3, -2], "fallback", (Measure.FALL_BACK, 3)),
    ],
)
def test_the_measure(
    active: int,
    previous: int | None,
    revoked: list[int],
    on_disk: list[int],
    served: list[int],
    policy: OnRevoked,
    expected: tuple[Measure, int | None],
) -> None:
    pointer = Pointer(slot="tiny", active=target(active), previous=target(previous) if previous is not None else None)
    measure, to = decide(
        pointer,
        revoked={digest(number) for number in revoked},
        kept=[kept(9, name="other"), *map(kept, on_disk)],
        served={digest(number) for number in served if number > 0},
        served_before={digest(abs(number)) for number in served},
        policy=policy,
    )
    assert (measure, to.seq if to is not None else None) == expected
