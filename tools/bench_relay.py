"""The bare mechanism: two Python processes that pass frames on and run the model, and do nothing else.

A relay on the daemon's event loop that gives each request a number of its own, and a worker that takes whatever has
arrived as one batch: no admission, deadlines, metrics, checks or sandbox. How inferd compares with it is the price of
its features; how it compares with in-process inference is the price of processes on this machine, at this moment.

``python -m tools.bench_relay MODEL SOCKET WORKER_SOCKET`` serves a model with one input and one output, both float32,
through both processes on ``SOCKET`` and by the worker alone on ``WORKER_SOCKET``, until it is killed.
"""

from __future__ import annotations

import asyncio
import os
import select
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final, NamedTuple

import msgpack
import numpy as np
import uvloop

from agent.wire import MAGIC, PREFIX
from tools.bench_ways import open_session

_BATCH_MAX: Final = 32
_READ_BYTES: Final = 1 << 18
_START_TIMEOUT_S: Final = 30.0


class _Request(NamedTuple):
    header: dict[str, Any]
    body: bytes


class _Line:
    """One peer: what has arrived of it, and what leaves for it with the next send."""

    def __init__(self, sock: socket.socket) -> None:
        sock.setblocking(False)
        self.sock = sock
        self._rest = b""
        self._out: list[bytes] = []

    def receive(self) -> list[_Request]:
        """Return the frames that one read completed; ``OSError`` if the peer is gone."""
        data = self._rest + self.sock.recv(_READ_BYTES)
        if len(data) == len(self._rest):
            raise ConnectionResetError("the peer closed")
        frames, offset = [], 0
        while len(data) - offset >= PREFIX.size:
            _, header_bytes, body_bytes = PREFIX.unpack_from(data, offset)
            middle = offset + PREFIX.size + header_bytes
            if len(data) < middle + body_bytes:
                break
            header = msgpack.unpackb(data[offset + PREFIX.size : middle])
            frames.append(_Request(header, data[middle : middle + body_bytes]))
            offset = middle + body_bytes
        self._rest = data[offset:]
        return frames

    def put(self, header: dict[str, Any], body: bytes) -> None:
        """Queue one frame."""
        packed = msgpack.packb(header)
        self._out.append(PREFIX.pack(MAGIC, len(packed), len(body)) + packed + body)

    def flush(self) -> None:
        """Send what is queued; a bench keeps less outstanding than a socket takes."""
        data, self._out = b"".join(self._out), []
        self.sock.send(data)


def _work(model: Path, lines: list[_Line], listener: socket.socket) -> None:
    """Answer whatever arrives on ``lines`` and on connections to ``listener``."""
    session = open_session(model)
    name, shape = session.get_inputs()[0].name, session.get_inputs()[0].shape[1:]
    watched = {line.sock.fileno(): line for line in lines}
    poll = select.epoll()
    for number in (*watched, listener.fileno()):
        poll.register(number, select.EPOLLIN)
    while True:
        asked: list[tuple[_Line, _Request]] = []
        for number, _ in poll.poll():
            if number == listener.fileno():
                line = _Line(listener.accept()[0])
                watched[line.sock.fileno()] = line
                poll.register(line.sock.fileno(), select.EPOLLIN)
                continue
            try:
                asked += [(watched[number], request) for request in watched[number].receive()]
            except OSError:
                if watched[number] in lines:
                    return  # the relay has ended
                watched.pop(number).sock.close()
        for start in range(0, len(asked), _BATCH_MAX):
            part = asked[start : start + _BATCH_MAX]
            rows = np.frombuffer(b"".join([request.body for _, request in part]), np.float32).reshape(-1, *shape)
            answers = session.run(None, {name: rows})[0]
            entry = {"name": "y", "dtype": "float32", "shape": [1, *answers.shape[1:]], "nbytes": answers[0].nbytes}
            for (line, request), answer in zip(part, answers, strict=True):
                line.put({"kind": "result", "id": request.header["id"], "tensors": [entry]}, answer.tobytes())
            for line in {line for line, _ in part}:
                line.flush()


async def _relay(worker: _Line, listener: socket.socket) -> None:
    """Pass frames between connections to ``listener`` and ``worker``."""
    loop = asyncio.get_running_loop()
    pending: dict[int, tuple[_Line, int]] = {}
    number, due = 0, False

    def flush() -> None:
        nonlocal due
        due = False
        worker.flush()

    def asked(line: _Line) -> None:
        nonlocal number, due
        try:
            requests = line.receive()
        except OSError:
            loop.remove_reader(line.sock.fileno())
            line.sock.close()
            return
        for header, body in requests:
            number += 1
            pending[number] = line, header["id"]
            header["id"] = number
            worker.put(header, body)
        if requests and not due:
            due = True
            loop.call_soon(flush)

    def answered() -> None:
        lines = set()
        for header, body in worker.receive():
            line, header["id"] = pending.pop(header["id"])
            line.put(header, body)
            lines.add(line)
        for line in lines:
            line.flush()

    def accept() -> None:
        line = _Line(listener.accept()[0])
        loop.add_reader(line.sock.fileno(), asked, line)

    ended = asyncio.Event()
    loop.add_reader(worker.sock.fileno(), answered)
    loop.add_reader(listener.fileno(), accept)
    loop.add_reader(sys.stdin.fileno(), ended.set)  # closed when whoever started us is gone
    await ended.wait()


class Relay(NamedTuple):
    """Where the bare processes listen."""

    through: Path  # relay and worker
    worker: Path  # the worker alone


@contextmanager
def relay(model: Path, folder: Path) -> Iterator[Relay]:
    """Run both processes for the length of the block."""
    folder.mkdir(parents=True, exist_ok=True)
    found = Relay(folder / "relay.sock", folder / "worker.sock")
    for path in found:
        path.unlink(missing_ok=True)
    command = [sys.executable, "-m", "tools.bench_relay", str(model), *map(str, found)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE)
    try:
        deadline = time.monotonic() + _START_TIMEOUT_S
        while not found.through.exists() and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.01)
        yield found
    finally:
        process.kill()  # its worker leaves when its channel closes
        process.communicate()


def _listening(path: str) -> socket.socket:
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(f"{path}.new")
    listener.listen(64)
    os.rename(f"{path}.new", path)  # from here on it can be connected to
    return listener


def main() -> None:
    """Serve until killed."""
    model, through, alone = sys.argv[1:]
    ours, theirs = socket.socketpair()
    for end in (ours, theirs):
        end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 20)
    own = _listening(alone)
    if os.fork() == 0:
        ours.close()
        _work(Path(model), [_Line(theirs)], own)
        sys.exit()
    theirs.close()
    uvloop.run(_relay(_Line(ours), _listening(through)))


if __name__ == "__main__":
    main()
