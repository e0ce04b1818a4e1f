"""Bytes on their way to one peer of the frame socket: small ones joined, large ones sent from where they lie.

Leaves out: the event loop. Who owns the socket says when to try.
"""

from __future__ import annotations

import array
import socket
from collections import deque
from collections.abc import Sequence
from itertools import islice
from typing import Final

from agent.wire import Buffer

_JOIN_BYTES_MAX: Final = 64 * 1024  # below it one copy is cheaper than another iovec
_IOVECS_MAX: Final = 512  # of the kernel's 1024


class Outbound:
    """A queue of buffers. ``size`` is what has not been handed to the kernel yet, in bytes."""

    __slots__ = ("_buffers", "_passing", "size")

    def __init__(self) -> None:
        self._buffers: deque[Buffer] = deque()
        self._passing: deque[tuple[Buffer, socket.socket]] = deque()  # the buffers a socket goes with
        self.size = 0

    def add(self, parts: Sequence[Buffer]) -> None:
        """Queue one frame. Its buffers must not change until they are sent."""
        if len(parts) == 1 and isinstance(parts[0], bytes):
            self.size += len(parts[0])
            self._buffers.append(parts[0])
            return
        sizes = [memoryview(part).nbytes for part in parts]
        size = sum(sizes)
        self.size += size
        if size <= _JOIN_BYTES_MAX:
            self._buffers.append(b"".join(parts))
        else:
            self._buffers.extend(
                memoryview(part).cast("B") for part, nbytes in zip(parts, sizes, strict=True) if nbytes
            )

    def add_with(self, frame: bytes, passed: socket.socket) -> None:
        """Queue one frame that a socket goes with, which is ours to close from here on."""
        self._passing.append((frame, passed))
        self._buffers.append(frame)
        self.size += len(frame)

    def send(self, sock: socket.socket) -> int:
        """Hand over as much as the kernel takes at once; return how many bytes that was.

        Raises:
            OSError: the peer is gone.
        """
        total = 0
        while self._buffers:
            chunk = list(islice(self._buffers, _IOVECS_MAX))
            try:
                if self._passing:
                    chunk, sent = self._send_passing(sock, chunk)
                else:
                    sent = sock.sendmsg(chunk) if len(chunk) > 1 else sock.send(chunk[0])
            except (BlockingIOError, InterruptedError):
                break
            total += sent
            if not self._advance(sent, len(chunk)):
                break  # the kernel took less than offered: it is full
        self.size -= total
        return total

    def _send_passing(self, sock: socket.socket, chunk: list[Buffer]) -> tuple[list[Buffer], int]:
        """Send up to the next frame that a socket goes with, or that frame alone with it; return what was offered."""
        frame, passed = self._passing[0]
        place = next((index for index, part in enumerate(chunk) if part is frame), len(chunk))
        if place:
            return chunk[:place], sock.sendmsg(chunk[:place])
        rights = array.array("i", [passed.fileno()])
        sent = sock.sendmsg(chunk[:1], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, rights)])
        self._passing.popleft()
        passed.close()
        return chunk[:1], sent

    def drop(self) -> None:
        """Let go of what was not sent: nobody takes it any more."""
        self._buffers.clear()
        self.size = 0
        while self._passing:
            self._passing.popleft()[1].close()

    def _advance(self, count: int, offered: int) -> bool:
        for _ in range(offered):
            first = self._buffers[0]
            if len(first) > count:
                self._buffers[0] = memoryview(first)[count:]
                return False
            count -= len(first)
            self._buffers.popleft()
        return True
