"""An HTTP client with no manners of its own: it sends the bytes the test says and reads what comes."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any, NamedTuple, Self


class Answer(NamedTuple):
    """One HTTP answer."""

    status: int
    headers: dict[str, str]  # names in lower case
    body: bytes

    def json(self) -> Any:
        """Return the body parsed."""
        return json.loads(self.body)


class WebPeer:
    """One connection to a TCP port or a unix socket; use as an asynchronous context."""

    def __init__(self, to: int | Path) -> None:
        self._to = to
        self._reader: asyncio.StreamReader
        self.writer: asyncio.StreamWriter

    async def __aenter__(self) -> Self:
        if isinstance(self._to, int):
            self._reader, self.writer = await asyncio.open_connection("127.0.0.1", self._to)
        else:
            self._reader, self.writer = await asyncio.open_unix_connection(self._to)
        return self

    async def __aexit__(self, *_error: object) -> None:
        self.writer.close()

    async def send(self, data: bytes) -> None:
        """Send bytes as they are."""
        self.writer.write(data)
        await self.writer.drain()

    async def head(self) -> bytes:
        """Return the next answer's status line and headers; ``EOFError`` or ``ConnectionError`` if there is none."""
        return await self._reader.readuntil(b"\r\n\r\n")

    async def answer(self) -> Answer:
        """Return the next answer; ``EOFError`` or ``ConnectionError`` if there will be none."""
        head = (await self.head()).decode("latin-1").split("\r\n")
        headers = {name.lower(): value for name, _, value in (line.partition(": ") for line in head[1:] if line)}
        body = await self._reader.readexactly(int(headers.get("content-length", 0)))
        return Answer(int(head[0].split()[1]), headers, body)

    async def ended(self) -> bool:
        """Wait for the end of the connection; ``False`` if bytes come first."""
        try:
            return await self._reader.read(1) == b""
        except ConnectionError:
            return True

    async def ask(self, method: str, path: str, body: bytes = b"", **headers: str) -> Answer:
        """Send one request and return its answer; underscores in header names become dashes."""
        await self.send(request(method, path, body, **headers))
        return await self.answer()


def request(method: str, path: str, body: bytes = b"", **headers: str) -> bytes:
    """Return one HTTP/1.1 request."""
    lines = [f"{method} {path} HTTP/1.1", "Host: box", f"Content-Length: {len(body)}"]
    lines += [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
    return "\r\n".join([*lines, "", ""]).encode("latin-1") + body


async def ask(to: int | Path, method: str, path: str, body: bytes = b"", **headers: str) -> Answer:
    """One request on a connection of its own."""
    async with WebPeer(to) as peer:
        return await peer.ask(method, path, body, **headers)
