"""The frames of one streamed answer between the connection that receives them and the task that takes them.

A taker that is slower than the model is not drowned: above a bound the daemon is asked to pause the stream, and to go
on once half of it is taken. Asyncio only; the blocking client lets the socket do this.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Sequence
from typing import Final

from agent.client.messages import pace_frame
from agent.wire import Buffer, Frame

_BYTES_MAX: Final = 1 << 20
_FRAME_BYTES: Final = 512  # the least that a frame counts


class Inbox:
    """What has arrived of one answer. ``tell`` sends a frame to the daemon."""

    def __init__(self, request_id: int, tell: Callable[[Sequence[Buffer]], None]) -> None:
        self._request_id = request_id
        self._tell = tell
        self._frames: deque[Frame] = deque()
        self._bytes = 0
        self._paused = False
        self._error: Exception | None = None
        self._arrived = asyncio.Event()

    def put(self, frame: Frame) -> None:
        """Add a frame."""
        self._frames.append(frame)
        self._bytes += max(_FRAME_BYTES, len(frame.body))
        self._arrived.set()
        if self._bytes > _BYTES_MAX:
            self._pace(paused=True)

    def fail(self, error: Exception) -> None:
        """Nothing more will come; what has arrived can still be taken."""
        self._error = error
        self._arrived.set()

    async def take(self) -> Frame:
        """Return the next frame; raises what ``fail`` was given when there is none."""
        while not self._frames:
            if self._error is not None:
                raise self._error
            self._arrived.clear()
            await self._arrived.wait()
        frame = self._frames.popleft()
        self._bytes -= max(_FRAME_BYTES, len(frame.body))
        if self._bytes <= _BYTES_MAX // 2:
            self._pace(paused=False)
        return frame

    def _pace(self, *, paused: bool) -> None:
        if paused != self._paused and self._error is None:
            self._paused = paused
            self._tell(pace_frame(self._request_id, paused=paused))
