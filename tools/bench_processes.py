"""What the daemon's processes use: CPU time between two moments, and memory, by what they are."""

from __future__ import annotations

from typing import Any, Final

import psutil

_ROLES: Final = {"inferd-zygote": "zygote", "inferd-worker": "worker"}  # as processes name themselves
_OTHER: Final = "other"

Times = dict[int, tuple[str, float]]  # by pid: role, CPU seconds so far


class Processes:
    """The daemon and everything below it.

    Args:
        pid: The daemon's.
    """

    def __init__(self, pid: int) -> None:
        self._root = psutil.Process(pid)

    def times(self) -> Times:
        """Return the CPU time of each process that runs now; its resolution is the kernel's tick, 10 ms."""
        found: Times = {}
        for role, process in self._all():
            try:
                used = process.cpu_times()
            except psutil.Error:
                continue  # it ended meanwhile
            found[process.pid] = (role, used.user + used.system)
        return found

    def memory(self) -> list[dict[str, Any]]:
        """Return pid, role and PSS (proportional set size, bytes) of each process."""
        found = []
        for role, process in self._all():
            try:
                found.append({"pid": process.pid, "role": role, "pss_bytes": process.memory_full_info().pss})
            except psutil.Error:
                continue  # it ended meanwhile, or is not ours to look into
        return found

    def _all(self) -> list[tuple[str, psutil.Process]]:
        found = [("daemon", self._root)]
        for process in self._root.children(recursive=True):
            try:
                found.append((_ROLES.get(process.name(), _OTHER), process))
            except psutil.Error:
                continue
        return found


def used_between(before: Times, after: Times) -> dict[str, float]:
    """Return CPU seconds by role; a process that came in between counts whole."""
    used: dict[str, float] = {}
    for pid, (role, seconds) in after.items():
        used[role] = used.get(role, 0.0) + seconds - before.get(pid, (role, 0.0))[1]
    return used
