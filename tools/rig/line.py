"""A client of the frame socket with no manners of its own, and a ledger: it sends what it is told, and counts."""

from __future__ import annotations

import fcntl
import os
import select
import socket
import time
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from itertools import count
from pathlib import Path
from typing import Any, Final, Self

import numpy as np

from agent.client.messages import ANSWER_LIMITS
from agent.tensors import Array, pack
from agent.wire import Buffer, Decoder, Frame, encode
from tools.rig.ledger import Ledger

MODEL: Final = "times"
SEALS: Final = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW
_READ_BYTES: Final = 1 << 18
ANSWER_TIMEOUT_S: Final = 60.0  # for one answer, on a loaded machine


class Line:
    """One raw connection. Use it in a ``with`` block.

    Args:
        path: The frame socket.
        name: Of its ledger.
    """

    def __init__(self, path: Path, name: str) -> None:
        self.ledger = Ledger(name=name)
        self.ids = count(1)
        self._decoder = Decoder(ANSWER_LIMITS)
        self._sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._sock.connect(str(path))
        self._sock.settimeout(ANSWER_TIMEOUT_S)
        self._outside: set[int] = set()  # ids that the ledger does not know
        self._others: deque[Frame] = deque()  # answers to those, and what the daemon says of the whole connection

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_error: object) -> None:
        self._sock.close()

    def send(self, header: Mapping[str, Any], body: Buffer = b"", *, passed: tuple[int, ...] = ()) -> None:
        """Send one frame, with descriptors."""
        self.send_raw(b"".join(bytes(part) for part in encode(header, (body,))), passed=passed)

    def send_raw(self, data: bytes, *, passed: tuple[int, ...] = ()) -> None:
        """Send bytes, taking answers meanwhile: who does not listen is cut."""
        if passed:
            sent = socket.send_fds(self._sock, [data], list(passed))
            data = data[sent:]
        view = memoryview(data)
        while view:
            readable, writable, _ = select.select([self._sock], [self._sock], [], ANSWER_TIMEOUT_S)
            if not readable and not writable:
                raise TimeoutError("the daemon neither reads nor answers")
            if readable:
                self.take()
            if writable:
                with suppress(BlockingIOError):
                    view = view[self._sock.send(view, socket.MSG_DONTWAIT) :]

    def infer(self, values: Array, **more: Any) -> int:
        """Ask for ``values`` times the factor; return the request's id."""
        request_id = next(self.ids)
        entries, parts = pack({"x": values})
        self.ledger.ask(request_id, values, hurried="deadline_ms" in more)
        self.send(
            {"kind": "infer", "id": request_id, "model": MODEL, "tensors": entries, **more},
            b"".join(bytes(part) for part in parts),
        )
        return request_id

    def take(self) -> None:
        """Take what has come; ``ConnectionError`` at its end."""
        data = self._sock.recv(_READ_BYTES)
        if not data:
            raise ConnectionResetError("the daemon closed the connection")
        for frame in self._decoder.feed(data):
            request_id = frame.header.get("id")
            if request_id is None or request_id in self._outside:
                self._outside.discard(request_id)
                self._others.append(Frame(frame.header, bytes(frame.body)))
            else:
                self.ledger.frame(frame.header, frame.body)

    def other(self) -> Frame:
        """Return the next answer that is none of the ledger's."""
        while not self._others:
            self.take()
        return self._others.popleft()

    def ask(self, header: Mapping[str, Any], body: Buffer = b"", *, passed: tuple[int, ...] = ()) -> dict[str, Any]:
        """Send a frame that the ledger does not know and return the header of the next such answer."""
        request_id = next(self.ids)
        self._outside.add(request_id)
        self.send({"id": request_id, **header}, body, passed=passed)
        return self.other().header

    def settle(self, *, at_most: int = 0, timeout_s: float = ANSWER_TIMEOUT_S) -> None:
        """Take answers until at most ``at_most`` requests are outstanding; what does not come is a fault."""
        deadline = time.monotonic() + timeout_s
        try:
            while len(self.ledger.outstanding) > at_most:
                self._sock.settimeout(max(0.001, deadline - time.monotonic()))
                self.take()
        except OSError as error:
            self.ledger.close(str(error) or type(error).__name__)
        finally:
            self._sock.settimeout(ANSWER_TIMEOUT_S)
        for frame in self._others:
            self.ledger.fault(f"nobody asked for {frame.header}")

    def last_words(self) -> list[dict[str, Any]]:
        """Close our half and return the headers of what came until the daemon closed its own."""
        found = []
        with suppress(OSError):
            self._sock.shutdown(socket.SHUT_WR)
        try:
            while True:
                found.append(self.other().header)
        except ConnectionError:
            return list(found)


@contextmanager
def memfd(nbytes: int, *, seals: int = SEALS) -> Iterator[int]:
    """Yield a descriptor of shared memory; it is closed afterwards."""
    descriptor = os.memfd_create("rig", os.MFD_ALLOW_SEALING | os.MFD_CLOEXEC)
    try:
        os.ftruncate(descriptor, nbytes)
        if seals:
            fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, seals)
        yield descriptor
    finally:
        os.close(descriptor)


def place(region: int, offset: int, columns: int) -> dict[str, Any]:
    """Return the entry of an input that lies in shared memory."""
    entry = {"name": "x", "dtype": "float32", "shape": [1, columns], "nbytes": 4 * columns}
    return {**entry, "region": region, "offset": offset}


def values(number: int, columns: int) -> Array:
    """Return one row that no other request has: its number, and that it belongs at each place."""
    row = np.arange(columns, dtype=np.float32) % 1000
    row[0] = number % (1 << 22)  # float32 holds it exactly, also times three
    return row.reshape(1, columns)
