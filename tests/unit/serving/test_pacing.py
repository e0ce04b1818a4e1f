"""Which streams of a connection may go on."""

from __future__ import annotations

import pytest

from agent.serving.pacing import Pacing
from agent.serving.ports import InferRequest
from tests.fakes.engine import FakeEngine

pytestmark = pytest.mark.unit


def request(number: int) -> InferRequest:
    header = {"kind": "infer", "id": number}
    return InferRequest(
        model="m", version=None, header=header, body=b"", deadline=1.0, client="c", answer=lambda header, body: None
    )


def paced(engine: FakeEngine) -> list[tuple[int, bool]]:
    said = [(request.header["id"], paused) for request, paused in engine.paced]
    engine.paced.clear()
    return said


def test_all_streams_wait_while_the_client_is_behind() -> None:
    engine = FakeEngine()
    pacing = Pacing(engine)
    pacing.add(1, request(1))
    pacing.add(2, request(2))
    pacing.set_behind(False)
    assert paced(engine) == []
    pacing.set_behind(True)
    pacing.set_behind(True)
    assert paced(engine) == [(1, True), (2, True)]
    pacing.set_behind(False)
    assert paced(engine) == [(1, False), (2, False)]


def test_a_stream_goes_on_when_neither_its_client_nor_the_socket_holds_it() -> None:
    engine = FakeEngine()
    pacing = Pacing(engine)
    pacing.add(1, request(1))
    pacing.hold(1, held=True)
    pacing.set_behind(True)
    pacing.set_behind(False)
    assert paced(engine) == [(1, True), (1, True), (1, True)]
    pacing.hold(1, held=False)
    assert paced(engine) == [(1, False)]


def test_a_stream_that_begins_while_it_should_wait_is_told_at_its_first_part() -> None:
    engine = FakeEngine()
    pacing = Pacing(engine)
    pacing.set_behind(True)
    pacing.add(1, request(1))
    pacing.part_queued(1)
    assert paced(engine) == [(1, True)]
    pacing.set_behind(False)
    paced(engine)
    pacing.part_queued(1)
    assert paced(engine) == []


def test_what_has_ended_is_forgotten() -> None:
    engine = FakeEngine()
    pacing = Pacing(engine)
    pacing.add(1, request(1))
    pacing.hold(1, held=True)
    pacing.remove(1)
    pacing.remove(1)
    paced(engine)
    pacing.hold(1, held=False)
    pacing.set_behind(True)
    assert paced(engine) == []
    pacing.set_behind(False)
    pacing.add(1, request(1))  # the id, used anew
    pacing.part_queued(1)
    assert paced(engine) == []
