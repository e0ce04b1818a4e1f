"""A TCP port for a server that is started later."""

from __future__ import annotations

import secrets
import socket
from typing import Final

_FIRST: Final = 20_000
_COUNT: Final = 12_000  # below the ports that the kernel gives to connections, which come and go meanwhile


def free_port() -> int:
    """Return a port of the loopback address that is free now, and that probably nobody takes before it is used.

    Raises:
        OSError: none is to be had.
    """
    for _ in range(100):
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", _FIRST + secrets.randbelow(_COUNT)))
            except OSError:
                continue
            return int(probe.getsockname()[1])
    raise OSError("no free port")
