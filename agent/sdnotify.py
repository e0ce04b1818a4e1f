"""What systemd and a service tell each other: readiness, watchdog, inherited sockets.

Without systemd every function is a no-op or returns nothing. Source: sd_notify(3), sd_listen_fds(3).
"""

from __future__ import annotations

import os
import socket


def notify(*lines: str, patience_s: float = 0.0) -> bool:
    """Send e.g. ``READY=1`` or ``STATUS=…`` to the service manager; ``False`` if there is none or it does not take it.

    A manager that is busy leaves its socket full; what will be said again anyway is not waited for.

    Args:
        lines: Assignments as sd_notify(3) lists them.
        patience_s: How long to wait for a manager that is behind, at most; the caller waits with it.
    """
    address = os.environ.get("NOTIFY_SOCKET")
    if not address:
        return False
    if address.startswith("@"):
        address = "\0" + address[1:]
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as channel:
        channel.settimeout(patience_s)
        try:
            channel.sendto("\n".join(lines).encode(), address)
        except OSError:
            return False
    return True


def watchdog_interval_s() -> float | None:
    """Return half of systemd's watchdog time, or ``None`` if this process is not watched."""
    microseconds = os.environ.get("WATCHDOG_USEC", "")
    watched = os.environ.get("WATCHDOG_PID", str(os.getpid()))
    if not microseconds.isdigit() or watched != str(os.getpid()):
        return None
    return int(microseconds) / 2e6


def inherited_sockets() -> dict[str, socket.socket]:
    """Return the sockets systemd opened for us, by ``FileDescriptorName=``."""
    if os.environ.get("LISTEN_PID") != str(os.getpid()):
        return {}
    count = int(os.environ.get("LISTEN_FDS", "0"))
    names = os.environ.get("LISTEN_FDNAMES", "").split(":")
    sockets = {}
    for index in range(count):
        descriptor = 3 + index
        os.set_inheritable(descriptor, False)
        name = names[index] if index < len(names) and names[index] else f"fd{index}"
        sockets[name] = socket.socket(fileno=descriptor)
    return sockets


def forget_environment() -> None:
    """Remove systemd's variables, so that no child process answers for us."""
    for name in ("NOTIFY_SOCKET", "WATCHDOG_USEC", "WATCHDOG_PID", "LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES"):
        os.environ.pop(name, None)
