"""What the daemon holds, from outside: processes, descriptors, memory, gauges. And whether it returned to where it was.

Descriptors of the daemon's own arena are counted apart, by bytes: it keeps some slots on purpose.
"""

from __future__ import annotations

import os
import urllib.request
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

import psutil

from tools.rig.box import Rig

ARENA_IDLE_BYTES_MAX: Final = 1 << 20  # as the boxes here are configured
PSS_GROWTH_MAX: Final = 12_000_000  # bytes of the daemon: a heap that held a burst keeps some of it
DESCRIPTORS_GROWTH_MAX: Final = 4
_ZERO: Final = ("inferd_queue_requests", "inferd_shared_regions", "inferd_shared_bytes")


@dataclass(frozen=True, kw_only=True)
class Holding:
    """One look at the daemon."""

    pid: int
    started: float  # when the daemon says it started
    pss_bytes: int
    own_bytes: int  # of them what is no file: pages of files count less the more others run the same program
    descriptors: int  # without the arena's
    arena_bytes: int
    children: int  # without trust children, which come and go with each look at the store
    workers: int  # that the daemon knows
    gauges: Mapping[str, float]  # sums over labels, without those that are zero by nature

    def plain(self) -> dict[str, Any]:
        """Return everything for a report."""
        return {**asdict(self), "gauges": dict(self.gauges)}


def look(rig: Rig) -> Holding:
    """Return what the daemon holds now."""
    pid = rig.daemon_pid
    status = rig.status()
    descriptors, arena_bytes = _descriptors(pid)
    process, pss = psutil.Process(pid), _pss(pid)
    gauges = _gauges(rig.http_port)
    return Holding(
        pid=int(status["agent"]["pid"]),
        started=float(status["agent"]["started"]),
        pss_bytes=pss["Pss"],
        own_bytes=pss["Pss_Anon"] + pss["Pss_Shmem"],
        descriptors=descriptors,
        arena_bytes=arena_bytes,
        children=sum(map(_lasts, process.children(recursive=True))),
        workers=sum(len(row.get("workers", ())) for row in status["models"]),
        gauges={name: gauges.get(name, 0.0) for name in (*_ZERO, "inferd_frame_connections", "inferd_worker_deaths")},
    )


def not_settled(before: Holding, now: Holding) -> list[str]:
    """Return what differs from before though nobody asks anything any more; empty: all is as it was."""
    found = []
    if (before.pid, before.started) != (now.pid, now.started):
        found.append(f"the daemon restarted: {before.pid} became {now.pid}")
    found += [f"{name} is {now.gauges[name]:g}, not 0" for name in _ZERO if now.gauges[name]]
    if now.gauges["inferd_frame_connections"] > 1:  # the one that asked for the status
        found.append(f"{now.gauges['inferd_frame_connections']:g} connections are open")
    # Fewer are no fault: at the first look a worker may still be leaving.
    if now.children > before.children or now.workers != before.workers:
        found.append(f"{now.children} processes and {now.workers} workers, not {before.children} and {before.workers}")
    if now.descriptors > before.descriptors + DESCRIPTORS_GROWTH_MAX:
        found.append(f"{now.descriptors} descriptors, not {before.descriptors} (+{DESCRIPTORS_GROWTH_MAX} at most)")
    if now.arena_bytes > ARENA_IDLE_BYTES_MAX:
        found.append(f"the arena holds {now.arena_bytes} bytes, idle slots {ARENA_IDLE_BYTES_MAX} at most")
    if now.own_bytes > before.own_bytes + PSS_GROWTH_MAX:
        was, most = before.own_bytes / 1e6, PSS_GROWTH_MAX / 1e6
        found.append(f"{now.own_bytes / 1e6:.1f} MB PSS without files, not {was:.1f} (+{most:g} at most)")
    return found


def _lasts(process: psutil.Process) -> bool:
    try:
        return "agent.bundles.child" not in process.cmdline()
    except psutil.Error:
        return False  # it has ended


def descendants(pid: int) -> set[tuple[int, float]]:
    """Return pid and start time of every process below ``pid``."""
    with suppress(psutil.Error):
        return {(process.pid, process.create_time()) for process in psutil.Process(pid).children(recursive=True)}
    return set()


def crashes(rig: Rig) -> list[str]:
    """Return the lines of the daemon's log that tell of an exception nobody expected."""
    if not rig.log.exists():
        return []
    lines = rig.log.read_text(errors="replace").splitlines()
    return [line[-2000:] for line in lines if "Traceback" in line]


def alive(processes: set[tuple[int, float]]) -> list[int]:
    """Return the pids of those that still run."""
    found = []
    for pid, started in processes:
        with suppress(psutil.Error):
            process = psutil.Process(pid)
            if process.create_time() == started and process.status() != psutil.STATUS_ZOMBIE:
                found.append(pid)
    return sorted(found)


def _pss(pid: int) -> dict[str, int]:
    """Return proportional set sizes in bytes, by the kernel's names."""
    found: dict[str, int] = {}
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
        name, _, value = line.partition(":")
        if name.startswith("Pss"):
            found[name] = int(value.split()[0]) * 1024
    return found


def _descriptors(pid: int) -> tuple[int, int]:
    count, slots = 0, dict[int, int]()  # by inode: a mapping keeps a descriptor of its own
    for entry in Path(f"/proc/{pid}/fd").iterdir():
        with suppress(OSError):  # closed meanwhile
            if "inferd-arena" in os.readlink(entry):
                status = entry.stat()
                slots[status.st_ino] = status.st_size
            else:
                count += 1
    return count, sum(slots.values())


def _gauges(port: int) -> dict[str, float]:
    found: dict[str, float] = {}
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=30.0) as response:
        for line in response.read().decode().splitlines():
            if line and not line.startswith("#"):
                name, _, value = line.rpartition(" ")
                name = name.partition("{")[0]
                found[name] = found.get(name, 0.0) + float(value)
    return found
