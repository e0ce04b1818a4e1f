"""How much memory there is, how much is free, and what a worker takes: the host's, and each GPU's by NVML.

A worker is asked nothing: it runs foreign code. What a worker takes is what it does not share with its zygote and its
fellows, at its highest so far; that is what comes back when it leaves.
Leaves out: what follows from it (``memory.py``).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Final, Protocol

import psutil

from agent.engine.memory import HOST, Room
from agent.log import get_logger
from agent.nvml import Nvml, Reading, Unread
from agent.probe import processes, readings
from agent.profile import Hardware
from agent.question import Question

_log = get_logger("memory")
_PROC: Final = Path("/proc")
_CONTROL_GROUPS: Final = Path("/sys/fs/cgroup")
_ROLLUP: Final = "smaps_rollup"
_PATIENCE_S: Final = 5.0  # with a driver that has answered so far
_SILENT_S: Final = 0.1  # with one that has not: models of the CPU wait for it too


class Meter(Protocol):
    """What can be known of memory. Calls may take milliseconds and run in a thread."""

    def rooms(self) -> Mapping[str, Room]:
        """Return each place's budget and what is free in it."""

    def worker(self, pid: int) -> Mapping[str, int]:
        """Return the highest use of one process by place (bytes); empty when it is gone."""


class Devices(Protocol):
    """The memory of GPUs, by their names (``cuda:0``)."""

    def read(self) -> Mapping[str, tuple[int, int]]:
        """Return total and free bytes of each."""

    def used_by(self, pid: int) -> Mapping[str, int]:
        """Return what a process holds of each now (bytes)."""


class SystemMeter:
    """This machine.

    Args:
        budget_bytes: What all models may take of host memory; 0: no bound.
        device_share: How much of a GPU's memory models may take.
        devices: The GPUs, if there are any.
    """

    def __init__(self, *, budget_bytes: int = 0, device_share: float = 0.8, devices: Devices | None = None) -> None:
        self._budget_bytes = budget_bytes
        self._device_share = device_share
        self._devices = devices

    def rooms(self) -> Mapping[str, Room]:
        """See ``Meter``."""
        rooms = {HOST: Room(budget_bytes=self._budget_bytes, available_bytes=available_bytes())}
        for name, (total, free) in (self._devices.read() if self._devices is not None else {}).items():
            rooms[name] = Room(budget_bytes=int(self._device_share * total), available_bytes=free)
        return rooms

    def worker(self, pid: int) -> Mapping[str, int]:
        """See ``Meter``."""
        try:
            status, rollup = ((_PROC / str(pid) / name).read_text() for name in ("status", _ROLLUP))
        except OSError:
            return {}
        private = sum(_kib(rollup, name) for name in ("Private_Clean", "Private_Dirty", "Private_Hugetlb"))
        shared = max(0, _kib(rollup, "Rss") - private)
        sizes = {HOST: max(private, _kib(status, "VmHWM") - shared) * 1024}
        return sizes | dict(self._devices.used_by(pid) if self._devices is not None else {})


class NvmlDevices:
    """GPUs as NVML sees them. One that does not answer has nothing free; one that NVML cannot name bounds nothing."""

    def __init__(self, hardware: Hardware, nvml: Callable[[], Nvml] = Nvml, *, patience_s: float = _PATIENCE_S) -> None:
        self._patience_s = patience_s
        self._names = {gpu.uuid: f"cuda:{gpu.index}" for gpu in hardware.gpus if gpu.uuid}
        self._sizes = {gpu.uuid: gpu.memory_bytes for gpu in hardware.gpus}
        self._silent = False
        self._readings = Question(lambda: readings(hardware, nvml), name="nvml")
        self._processes = Question(lambda: processes(hardware, nvml), name="nvml")

    def read(self) -> Mapping[str, tuple[int, int]]:
        """See ``Devices``."""
        seen: Mapping[str, Reading | Unread] = {}
        try:
            seen = self._readings.answer_here(_SILENT_S if self._silent else self._patience_s)
            self._silent = False
        except TimeoutError:
            if not self._silent:
                _log.warning("the GPU driver gives no answer, so nothing is loaded on a GPU")
            self._silent = True
        found = {}
        for uuid, name in self._names.items():
            reading = seen.get(uuid)
            free = reading.memory_free_bytes if isinstance(reading, Reading) else None
            found[name] = (self._sizes[uuid], free) if free is not None else (0, 0)
        return found

    def used_by(self, pid: int) -> Mapping[str, int]:
        """See ``Devices``."""
        try:
            held = self._processes.answer_here(_SILENT_S if self._silent else self._patience_s)
        except TimeoutError:
            return {}
        return {self._names[uuid]: sizes[pid] for uuid, sizes in held.items() if sizes.get(pid)}


def available_bytes() -> int:
    """Return what this process and its children may still take of the host's memory, control groups included."""
    free = int(psutil.virtual_memory().available)
    for group in _own_groups():
        limit, used = _number(group / "memory.max"), _number(group / "memory.current")
        if limit is not None and used is not None:
            free = min(free, limit - used + _reclaimable(group))
    return max(0, free)


def _own_groups() -> list[Path]:
    """Return our control group and those around it (version 2); none where they cannot be seen."""
    try:
        lines = (_PROC / "self/cgroup").read_text().splitlines()
    except OSError:
        return []
    own = next((line.partition("::")[2] for line in lines if line.startswith("0::")), "")
    parts = [part for part in own.split("/") if part not in ("", "..")]
    groups = [_CONTROL_GROUPS.joinpath(*parts[:depth]) for depth in range(len(parts), -1, -1)]
    return [group for group in groups if group.is_dir()]


def _reclaimable(group: Path) -> int:
    """File pages that nobody uses: the kernel takes them back before it refuses anything."""
    try:
        lines = (group / "memory.stat").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) for line in lines if line.startswith("inactive_file ")), 0)


def _number(path: Path) -> int | None:
    try:
        text = path.read_text().strip()
    except OSError:
        return None
    return int(text) if text.isdigit() else None  # "max" is no limit


def _kib(text: str, name: str) -> int:
    """Return the number of a line ``Name:   12 kB``, 0 if there is none."""
    line = next((line for line in text.splitlines() if line.startswith(f"{name}:")), "")
    return int(line.split()[1]) if line else 0
