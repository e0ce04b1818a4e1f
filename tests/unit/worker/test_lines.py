"""When an application on a lane counts as one that takes no answers."""

from __future__ import annotations

import socket

from agent.wire import Limits
from agent.worker.lines import Grant, Lane, LaneBook


def test_only_who_takes_nothing_at_all_is_blocked() -> None:
    ours, theirs = socket.socketpair()
    grant = Grant(lane=1, client="c", deadline_ms=1000, queue_requests_max=8, queue_bytes_max=1 << 20)
    lane = Lane(grant, ours, Limits(), LaneBook((1.0,)), {})
    lane.watch(1.0)
    assert not lane.blocked_since
    lane.channel.post({"kind": "result", "id": 1}, [bytes(8 << 20)])
    lane.channel.flush()
    for now, taken_bytes, since in (
        (2.0, 0, 2.0),
        (3.0, 0, 2.0),
        (4.0, 1 << 16, 4.0),
        (5.0, 1 << 18, 5.0),
        (6.0, 0, 5.0),
    ):
        while taken_bytes > 0:
            taken_bytes -= len(theirs.recv(taken_bytes))
            lane.channel.flush()
        lane.watch(now)
        assert lane.blocked_since == since
    while lane.channel.pending:
        theirs.recv(1 << 20)
        lane.channel.flush()
    lane.watch(7.0)
    assert not lane.blocked_since
    theirs.close()
    lane.channel.close()
