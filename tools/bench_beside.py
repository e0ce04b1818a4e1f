"""The bare mechanism for large tensors: the model in another process, and nothing else between.

By memory that both share, or through a TCP connection on loopback, blocking on both sides and pinned to a core each.
What a way through inferd costs beyond it is inferd's; what it costs beyond in-process inference is the machine's: the
wake-up of the other core, caches that are not warm there, and for TCP the kernel's two copies.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from mmap import mmap
from pathlib import Path
from typing import Final, NoReturn

import numpy as np

from agent.tensors import Array
from tools.bench_ways import Ask, Work, open_session

_NOTE: Final = b"ask!"
_ANSWER_BYTES: Final = 64


@dataclass(frozen=True)
class Beside:
    """One tensor for a model in a child process; the answer is a note that it has run."""

    model_file: Path
    work: Work
    name: str
    tcp: bool = False

    @contextmanager
    def blocking(self) -> Iterator[Ask]:
        ((name, value),) = self.work.inputs.items()
        shared: Array = np.frombuffer(mmap(-1, value.nbytes), value.dtype).reshape(value.shape)
        shared[...] = value
        allowed = os.sched_getaffinity(0)
        cores = sorted(allowed)
        ours, theirs = _tcp_pair() if self.tcp else socket.socketpair()
        child = os.fork()
        if child == 0:
            ours.close()
            os.sched_setaffinity(0, {cores[-1]})
            _answer_forever(theirs, self.model_file, name, shared, receive=self.tcp)
        theirs.close()
        os.sched_setaffinity(0, {cores[0]})
        asked = value.tobytes() if self.tcp else _NOTE

        def ask() -> None:
            ours.sendall(asked)
            ours.recv(_ANSWER_BYTES, socket.MSG_WAITALL)

        try:
            yield ask
        finally:
            os.sched_setaffinity(0, allowed)
            ours.close()  # ends the child
            os.waitpid(child, 0)


def _answer_forever(sock: socket.socket, model_file: Path, name: str, value: Array, *, receive: bool) -> NoReturn:
    session = open_session(model_file)
    place = memoryview(value.data).cast("B") if receive else memoryview(bytearray(len(_NOTE)))
    while _receive_exactly(sock, place):
        session.run(None, {name: value})
        sock.sendall(bytes(_ANSWER_BYTES))
    os._exit(0)


def _receive_exactly(sock: socket.socket, place: memoryview) -> bool:
    filled = 0
    while filled < len(place):
        count = sock.recv_into(place[filled:])
        if not count:
            return False
        filled += count
    return True


def _tcp_pair() -> tuple[socket.socket, socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        ours = socket.create_connection(listener.getsockname())
        theirs, _ = listener.accept()
    for end in (ours, theirs):
        end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return ours, theirs
