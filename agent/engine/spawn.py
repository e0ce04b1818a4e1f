"""Starting a zygote's process: little enough to import that it can be done before all else.

A zygote spends most of its start importing its runtime. Started first, it does so while the daemon imports itself.
Leaves out: speaking with it (``zygote.py``).
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from typing import Final, NamedTuple

_ENVIRONMENT_KEPT: Final = (
    "PATH",
    "LANG",
    "LC_ALL",
    "TZ",
    "PYTHONPATH",
    "PYTHONPYCACHEPREFIX",
    "PYTHONDONTWRITEBYTECODE",
    "CUDA_VISIBLE_DEVICES",
)


class Spawned(NamedTuple):
    """A process that may not be ready yet, and our end of its control: it leaves when that closes."""

    process: subprocess.Popen[bytes]
    control: socket.socket


def spawn(runtime: str) -> Spawned:
    """Start the zygote of ``runtime``.

    Raises:
        OSError: no process or no socket to be had.
    """
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    ours.setblocking(False)
    try:
        process = subprocess.Popen(
            [sys.executable, "-m", "agent.worker.zygote", "--runtime", runtime, "--control-fd", str(theirs.fileno())],
            pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL,
            stdout=sys.stderr,
            env={name: os.environ[name] for name in _ENVIRONMENT_KEPT if name in os.environ},
            start_new_session=True,
        )
    except BaseException:
        ours.close()
        raise
    finally:
        theirs.close()
    return Spawned(process, ours)
