"""Workers that a killed daemon left behind, found by the scratch folder they live in.

A zygote sees out the workers of a daemon that died; one that was lost before can not. Nobody else may use our state
folder, so whatever still works in its scratch is of a daemon that is no more. Best effort: systemd's control group is
the one thing no process can leave.
"""

from __future__ import annotations

import os
import signal
from contextlib import suppress
from pathlib import Path
from typing import Final

_NAME: Final = "inferd-worker"


def kill_left(scratch: Path) -> list[int]:
    """SIGKILL the workers whose working directory lies in ``scratch``; return their pids."""
    killed = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal() and _works_in(entry, scratch):
            with suppress(OSError):
                _kill(entry, scratch)
                killed.append(int(entry.name))
    return killed


def _works_in(process: Path, scratch: Path) -> bool:
    try:
        folder = (process / "cwd").readlink()
        return folder.is_relative_to(scratch) and (process / "comm").read_text().strip() == _NAME
    except OSError:  # another user's, or gone
        return False


def _kill(process: Path, scratch: Path) -> None:
    pidfd = os.pidfd_open(int(process.name))
    try:
        if _works_in(process, scratch):  # still the same process: its number was not used anew before the pidfd
            signal.pidfd_send_signal(pidfd, signal.SIGKILL)
    finally:
        os.close(pidfd)
