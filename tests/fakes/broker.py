"""Brokers that are none: one swallows what it is sent, one never completes a connection, one says nonsense."""

from __future__ import annotations

import contextlib
import select
import socket
import threading
from collections.abc import Iterator


@contextlib.contextmanager
def black_hole() -> Iterator[int]:
    """Yield the port of a listener that accepts and never answers."""
    with scripted(None) as port:
        yield port


@contextlib.contextmanager
def unfinished_handshake() -> Iterator[int]:
    """Yield a port where a TCP handshake never completes: its accept queue is full and nobody empties it."""
    with contextlib.ExitStack() as stack:
        listener = stack.enter_context(socket.socket())
        listener.bind(("127.0.0.1", 0))
        listener.listen(0)
        port = listener.getsockname()[1]
        for _ in range(8):  # more than the kernel's queue for a backlog of 0
            filler = stack.enter_context(socket.socket())
            filler.setblocking(False)
            filler.connect_ex(("127.0.0.1", port))
        yield port


@contextlib.contextmanager
def refusing() -> Iterator[int]:
    """Yield a port where nobody listens."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        yield probe.getsockname()[1]


@contextlib.contextmanager
def scripted(answer: bytes | None) -> Iterator[int]:
    """Yield the port of a listener that sends ``answer`` to whoever speaks first, then keeps silent."""
    stop, wake = socket.socketpair()
    with contextlib.ExitStack() as stack:
        listener = stack.enter_context(socket.socket())
        listener.bind(("127.0.0.1", 0))
        listener.listen(64)
        open_sockets: list[socket.socket] = []

        def serve() -> None:
            while True:
                ready, _, _ = select.select([listener, stop, *open_sockets], [], [])
                if stop in ready:
                    return
                for one in ready:
                    if one is listener:
                        open_sockets.append(listener.accept()[0])
                        continue
                    with contextlib.suppress(OSError):
                        if one.recv(65536):
                            if answer is not None:
                                one.sendall(answer)
                            continue
                    one.close()
                    open_sockets.remove(one)

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        try:
            yield listener.getsockname()[1]
        finally:
            wake.send(b"x")
            thread.join()
            for one in (stop, wake, *open_sockets):
                one.close()
