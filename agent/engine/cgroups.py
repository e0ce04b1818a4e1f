"""A memory control group for each worker, where systemd or an operator has handed us one to divide.

RLIMIT_AS bounds what a worker reserves; only a control group bounds what it uses, files and device mappings included,
and it is the only bound of a worker on a GPU, whose driver reserves more than any machine has. Version 2 and, for older
boards, version 1. Promises: a group that was not handed to us is never touched; a worker is in its group before it has
loaded anything; what cannot be set up is named once, and workers run without.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Final

from agent.errors import ConfigError
from agent.log import get_logger

_log = get_logger("cgroups")
_MOUNTS: Final = (Path("/sys/fs/cgroup"), Path("/sys/fs/cgroup/unified"))
_DELEGATED: Final = ("user.delegate", "trusted.delegate")  # extended attributes that systemd sets for Delegate=
_OURS: Final = "daemon"
_PREFIX: Final = "worker-"


@dataclass(frozen=True, slots=True)
class Group:
    """One worker's control group."""

    path: Path
    limit_bytes: int

    def procs(self) -> int:
        """Return a descriptor of the file through which a process enters; the caller closes it."""
        return os.open(self.path / "cgroup.procs", os.O_WRONLY | os.O_CLOEXEC)

    def killed(self) -> bool:
        """Whether the kernel has killed the worker because its limit was reached."""
        for name in ("memory.events", "memory.oom_control"):
            with contextlib.suppress(OSError):
                for line in (self.path / name).read_text().splitlines():
                    key, _, value = line.partition(" ")
                    if key == "oom_kill":
                        return value.strip() not in ("", "0")
        return False

    def remove(self) -> None:
        """Remove the group; its process must be gone."""
        with contextlib.suppress(OSError):
            self.path.rmdir()


class Groups:
    """The group that was handed to us, divided.

    Args:
        where: ``auto`` (what systemd delegated to this service), ``never``, or the path of a group made for us.
        own: Returns this process' group of version 2.

    Raises:
        ConfigError: the path is no memory control group, or cannot be written.
    """

    def __init__(self, where: str, *, own: Callable[[], Path | None] | None = None) -> None:
        self.reason = ""  # why workers have none
        self._root: Path | None = None
        self._numbers = count(1)
        if where == "never":
            self.reason = "switched off"
        elif where == "auto":
            self._root = self._delegated((own or _own_group)())
        else:
            self._root = _prepared(Path(where))
        if self._root is not None:
            for left in self._root.glob(f"{_PREFIX}*"):  # of a daemon that was killed
                with contextlib.suppress(OSError):
                    left.rmdir()

    def make(self, limit_bytes: int) -> Group | None:
        """Return a new group that may use so much memory; ``None`` without limit, or where there are no groups."""
        if self._root is None or not limit_bytes:
            return None
        path = self._root / f"{_PREFIX}{os.getpid()}-{next(self._numbers)}"
        try:
            path.mkdir()
            _limit_file(path).write_text(str(limit_bytes))
        except OSError as error:
            _log.warning("no control group for a worker", reason=f"{path}: {error.strerror}")
            with contextlib.suppress(OSError):
                path.rmdir()
            return None
        return Group(path, limit_bytes)

    def _delegated(self, own: Path | None) -> Path | None:
        if own is None or not _is_delegated(own):
            self.reason = "no control group is delegated to this service"
            return None
        try:
            _make_room(own)
        except OSError as error:
            self.reason = f"{own}: {error.strerror}"
            return None
        return own


def _own_group() -> Path | None:
    """Return this process' group of version 2."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/cgroup").read_text().splitlines():
            if line.startswith("0::/"):
                for mount in _MOUNTS:
                    path = mount / line[4:].strip()
                    if (path / "cgroup.controllers").exists():
                        return path
    return None


def _is_delegated(path: Path) -> bool:
    for name in _DELEGATED:
        with contextlib.suppress(OSError):
            if os.getxattr(path, name) == b"1":
                return True
    return False


def _make_room(group: Path) -> None:
    """Move all that runs in a delegated group below it, as a group with processes cannot be divided."""
    ours = group / _OURS
    ours.mkdir(exist_ok=True)
    for pid in (group / "cgroup.procs").read_text().split():
        with contextlib.suppress(ProcessLookupError):
            (ours / "cgroup.procs").write_text(pid)
    (group / "cgroup.subtree_control").write_text("+memory")


def _prepared(path: Path) -> Path:
    try:
        if (path / "cgroup.controllers").exists():
            (path / "cgroup.subtree_control").write_text("+memory")
        elif not (path / "memory.limit_in_bytes").exists():
            raise ConfigError(f"[engine.memory_cgroup] {path} is no control group for memory")
    except OSError as error:
        raise ConfigError(f"[engine.memory_cgroup] {path}: {error.strerror}") from error
    if not os.access(path, os.W_OK):
        raise ConfigError(f"[engine.memory_cgroup] {path} cannot be written by this user")
    return path


def _limit_file(path: Path) -> Path:
    second = path / "memory.max"
    return second if second.exists() else path / "memory.limit_in_bytes"
