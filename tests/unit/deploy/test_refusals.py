"""What was refused is heard once an hour, with what is known of it."""

from __future__ import annotations

import asyncio

import pytest

from agent.deploy.refusals import REPEAT_S, Refusals
from agent.errors import BundleError, PolicyError, RollbackDetectedError, TargetNotFoundError, UntrustedError
from agent.events import EventBus
from tests.fakes.clock import FakeClock

pytestmark = pytest.mark.unit


def scene() -> tuple[Refusals, EventBus, FakeClock]:
    clock = FakeClock()
    events = EventBus(clock)
    return Refusals(events, clock), events, clock


@pytest.mark.parametrize(
    ("error", "severity"),
    [
        (UntrustedError("forged"), "error"),
        (RollbackDetectedError("old"), "error"),
        (TargetNotFoundError("no such version"), "warning"),
        (PolicyError("native"), "warning"),
    ],
)
def test_a_refused_bundle_is_a_security_event(error: BundleError, severity: str) -> None:
    refusals, events, _ = scene()
    refusals.bundle(error, team="vision", name="tiny", version="2.0.0")
    (event,) = events.recent()
    assert (event.stream, event.type, event.severity) == ("security", "bundle.refused", severity)
    assert event.data == {
        "code": error.code,
        "message": str(error),
        "team": "vision",
        "name": "tiny",
        "version": "2.0.0",
    }


def test_the_same_refusal_of_a_poll_is_repeated_once_an_hour_and_counted() -> None:
    refusals, events, clock = scene()
    for _ in range(5):
        refusals.bundle(UntrustedError("forged"), team="vision", name="tiny", version="", polled=True)
    assert len(events.recent()) == 1
    refusals.bundle(UntrustedError("forged"), team="vision", name="other", version="", polled=True)
    assert len(events.recent()) == 2
    asyncio.run(clock.sleep(REPEAT_S))
    refusals.bundle(UntrustedError("forged"), team="vision", name="tiny", version="", polled=True)
    assert events.recent()[-1].data["repeated"] == 4


def test_each_refusal_of_a_deployment_is_told() -> None:
    refusals, events, _ = scene()
    for _ in range(3):
        refusals.bundle(UntrustedError("forged"), team="vision", name="tiny", version="2.0.0")
    assert len(events.recent()) == 3


def test_a_source_names_itself() -> None:
    refusals, events, _ = scene()
    refusals.source(UntrustedError("forged"), source="http://mirror")
    (event,) = events.recent()
    assert (event.type, event.data["source"]) == ("source.refused", "http://mirror")
