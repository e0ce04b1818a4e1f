"""A lane's end, as the engine sees it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from agent.engine.lanes import Lane, Terms
from agent.regions import Region


class Link:
    """A worker's link that passes everything on at once."""

    def __init__(self) -> None:
        self.lanes: dict[int, Lane] = {}

    def post(self, header: dict[str, Any]) -> bytes:
        return repr(header).encode()

    def pass_on(self, header: dict[str, Any], descriptor: int, release: Callable[[], None]) -> None:
        release()

    def pin(self, region: Region) -> None: ...

    def unpin(self, region: Region) -> None: ...

    def when_sent(self, done: Callable[[], None]) -> None:
        done()


def test_the_applications_end_stays_open_for_whoever_passes_it_on() -> None:
    terms = Terms(client="c", deadline_ms=1, queue_requests_max=1, queue_bytes_max=1, bounds_s=(1.0,))
    ended: list[Lane] = []
    lane = Lane(1, Link(), terms, model="m", version="1")
    lane.on_end = ended.append
    lane.ended()  # its worker died before the application was told of the lane
    assert ended == [lane]
    assert lane.socket.recv(1) == b""
    lane.socket.close()
