"""How much of a worker streams may take, and what a worker may still send after a pause."""

from __future__ import annotations

from typing import Any

import pytest

from agent.engine.job import Job
from agent.engine.streams import OVERRUN_BYTES_MAX, Paused, StreamCounts, check_room
from agent.errors import FrameError, OverloadedError
from agent.metrics import Metrics
from agent.serving.ports import InferRequest
from agent.wire import PART_BYTES_MAX

pytestmark = pytest.mark.unit


def job(*, parts: bool) -> Job:
    def ignore(header: Any, body: Any) -> None:
        """Nobody listens."""

    header = {"kind": "infer", "id": 1}
    request = InferRequest(model="m", version=None, header=header, body=b"", deadline=1.0, client="c", answer=ignore)
    request.part = ignore if parts else None
    return Job(request, 1, 10.0)


def test_a_pause_is_asked_for_once() -> None:
    paused = Paused()
    assert paused.ask(1, paused=True)
    assert not paused.ask(1, paused=True)
    assert paused.ask(1, paused=False)
    assert not paused.ask(1, paused=False)


def test_what_was_under_way_may_still_come_after_a_pause_and_no_more() -> None:
    paused = Paused()
    part = bytes(PART_BYTES_MAX)
    for _ in range(20):
        paused.check(1, part)
    paused.ask(1, paused=True)
    for _ in range(OVERRUN_BYTES_MAX // PART_BYTES_MAX):
        paused.check(1, part)
    with pytest.raises(FrameError, match="asked to pause"):
        paused.check(1, part)
    paused.check(2, part)


def test_a_part_above_its_bound_breaks_the_protocol() -> None:
    with pytest.raises(FrameError, match="a part of"):
        Paused().check(1, bytes(PART_BYTES_MAX + 1))


def test_streams_may_fill_half_of_the_window() -> None:
    check_room([job(parts=True)] * 3 + [job(parts=False)] * 9, window=8)
    with pytest.raises(OverloadedError):
        check_room([job(parts=True)] * 4, window=8)
    check_room([], window=1)
    with pytest.raises(OverloadedError):
        check_room([job(parts=True)], window=1)


def test_the_first_part_is_timed_and_all_are_counted() -> None:
    metrics = Metrics()
    counts = StreamCounts(metrics, ("m", "1"))
    streamed = job(parts=True)
    for now in (10.25, 11.0, 99.0):
        counts.count(streamed, now)
    assert streamed.parts == 3
    snapshot = metrics.snapshot()
    assert snapshot["inferd_stream_parts"] == [{"model": "m", "version": "1", "value": 3.0}]
    (row,) = snapshot["inferd_stream_first_part_seconds"]
    assert (row["count"], row["sum"]) == (1, 0.25)
