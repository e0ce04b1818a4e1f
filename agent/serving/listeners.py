"""Listening sockets that nobody handed us: bound here with the right mode, stale files removed.

Sockets inherited from systemd need nothing of this. A live daemon's socket is never taken over. Nothing is removed at
the end: between two daemons a stale file refuses connections, and removing it could hit the successor's.
"""

from __future__ import annotations

import os
import socket
import stat
from pathlib import Path
from typing import Final

from agent.errors import ConfigError

BACKLOG: Final = 1024  # capped by net.core.somaxconn


def bind_unix(path: Path, *, mode: int = 0o660) -> socket.socket:
    """Return a listening stream socket at ``path``, made with ``mode``; its folder is made if missing.

    Raises:
        ConfigError: the path is too long, not writable, not a socket, or another process serves there.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _remove_stale(path)
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            listener.bind(str(path))
            os.chmod(path, mode)  # before listen(): nobody can connect under the umask's mode
            listener.listen(BACKLOG)
        except OSError:
            listener.close()
            raise
    except OSError as error:
        raise ConfigError(f"cannot listen on {path}: {error.strerror or error}") from error
    listener.setblocking(False)
    return listener


def bind_tcp(host: str, port: int) -> socket.socket:
    """Return a listening TCP socket; port 0 takes a free one.

    Raises:
        ConfigError: no such address, or the port is taken.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listener = socket.socket(family, kind, protocol)
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(address)
            listener.listen(BACKLOG)
        except OSError:
            listener.close()
            raise
    except OSError as error:
        raise ConfigError(f"cannot listen on {host}:{port}: {error.strerror or error}") from error
    listener.setblocking(False)
    return listener


def _remove_stale(path: Path) -> None:
    try:
        if not stat.S_ISSOCK(path.lstat().st_mode):
            raise ConfigError(f"cannot listen on {path}: it exists and is not a socket")
    except FileNotFoundError:
        return
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.setblocking(False)
        try:
            probe.connect(str(path))
        except ConnectionRefusedError:
            path.unlink(missing_ok=True)
            return
        except BlockingIOError:  # a full backlog: somebody listens
            pass
    raise ConfigError(f"cannot listen on {path}: another process serves there")
