"""A client of the frame socket with no manners of its own: it sends what the test says."""

from __future__ import annotations

import asyncio
import socket
from pathlib import Path
from typing import Any, Self

from agent.client.messages import ANSWER_LIMITS
from agent.wire import Buffer, Decoder, Frame, encode


class FramePeer:
    """One raw connection; use as an asynchronous context."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._decoder = Decoder(ANSWER_LIMITS)
        self._frames: list[Frame] = []
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)

    async def __aenter__(self) -> Self:
        self.sock.setblocking(False)
        await asyncio.get_running_loop().sock_connect(self.sock, str(self._path))
        return self

    async def __aexit__(self, *_error: object) -> None:
        self.sock.close()

    async def send(self, header: dict[str, Any], body: Buffer = b"") -> None:
        """Send one frame."""
        await self.send_raw(b"".join(bytes(part) for part in encode(header, (body,))))

    async def send_raw(self, data: bytes) -> None:
        """Send bytes as they are."""
        await asyncio.get_running_loop().sock_sendall(self.sock, data)

    async def frame(self) -> Frame:
        """Return the next frame; ``ConnectionError`` if there will be none."""
        while not self._frames:
            data = await asyncio.get_running_loop().sock_recv(self.sock, 1 << 18)
            if not data:
                raise ConnectionResetError("closed")
            self._frames += self._decoder.feed(data)
        return self._frames.pop(0)

    async def ended(self) -> bool:
        """Wait for the end of the connection; ``False`` if a frame comes first."""
        try:
            await self.frame()
        except ConnectionError:
            return True
        return False

    async def last_words(self) -> dict[str, Any]:
        """Return the header of the last frame before the connection ended."""
        header: dict[str, Any] = {}
        try:
            while True:
                header = (await self.frame()).header
        except ConnectionError:
            return header
