"""What arrives of a streamed answer faster than it is taken."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import pytest

from agent.client.inbox import Inbox
from agent.wire import Buffer, Decoder, Frame

pytestmark = pytest.mark.unit


class Told:
    """The daemon's side: the frames it was sent."""

    def __init__(self) -> None:
        self.kinds: list[str] = []

    def __call__(self, frame: Sequence[Buffer]) -> None:
        (decoded,) = Decoder().feed(b"".join(bytes(part) for part in frame))
        assert decoded.header["id"] == 7
        self.kinds.append(decoded.header["kind"])


def part(nbytes: int) -> Frame:
    return Frame({"kind": "part", "id": 7}, bytes(nbytes))


def test_frames_come_out_in_order_and_then_the_error() -> None:
    async def test() -> None:
        inbox = Inbox(7, Told())
        waiting = asyncio.ensure_future(inbox.take())
        await asyncio.sleep(0)
        inbox.put(part(1))
        inbox.put(part(2))
        inbox.fail(ConnectionError("gone"))
        assert len((await waiting).body) == 1
        assert len((await inbox.take()).body) == 2
        for _ in range(2):
            with pytest.raises(ConnectionError, match="gone"):
                await inbox.take()

    asyncio.run(test())


@pytest.mark.parametrize(("nbytes", "count"), [(300_000, 4), (0, 2049)])
def test_above_the_bound_the_daemon_is_asked_to_pause_and_below_half_to_go_on(nbytes: int, count: int) -> None:
    async def test() -> None:
        told = Told()
        inbox = Inbox(7, told)
        for _ in range(count - 1):
            inbox.put(part(nbytes))
        assert told.kinds == []
        inbox.put(part(nbytes))
        inbox.put(part(nbytes))
        assert told.kinds == ["pause"]
        for _ in range(count // 2 - 1):
            await inbox.take()
        assert told.kinds == ["pause"]
        for _ in range(4):
            await inbox.take()
        assert told.kinds == ["pause", "resume"]

    asyncio.run(test())


def test_a_broken_line_is_told_nothing() -> None:
    async def test() -> None:
        told = Told()
        inbox = Inbox(7, told)
        inbox.put(part(1 << 21))
        inbox.fail(ConnectionError())
        await inbox.take()
        assert told.kinds == ["pause"]

    asyncio.run(test())
