"""Lock a freshly forked worker in, before it opens anything of its bundle.

In order: raised ``oom_score_adj``, resource limits, no capabilities, ``no_new_privs``, Landlock, seccomp, then a
probe that tries what must fail. Holds for root. Call it with one thread running: Landlock binds the calling thread
and those it starts.
There is one profile for the CPU and one for CUDA, whose driver needs its own nodes (``devices.py``) and one more call,
and whose address space cannot be limited.
Promises: the report says what is true after the probe, never what was hoped for.
Leaves out: the memory really used, which a control group limits (``agent/engine/cgroups.py``).
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import os
import resource
import socket
import struct
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import agent
import handlers
from agent.errors import SandboxError
from agent.worker import devices, landlock, seccomp
from agent.worker.landlock import Rule

LEVELS: Final = ("none", "partial", "full")  # in order
_OOM_SCORE: Final = 500  # of 1000: under memory pressure the kernel takes a model before the daemon
_PR_SET_NO_NEW_PRIVS: Final = 38
_PR_CAPBSET_DROP: Final = 24
_CAPABILITY_LAST: Final = 63
_CAPABILITY_VERSION: Final = 0x2008_0522
_SYSTEM_LIBRARIES: Final = ("/lib", "/lib64", "/usr/lib", "/usr/lib64", "/usr/local/lib")
_READABLE: Final = (
    "/proc/self", "/proc/cpuinfo", "/proc/meminfo", "/sys/devices/system/cpu", "/dev/urandom", "/etc/ld.so.cache",
    "/etc/localtime", "/usr/share/zoneinfo",
)  # fmt: skip
_WRITABLE_DEVICE: Final = "/dev/null"


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """What confines this process: ``full`` is seccomp and Landlock, ``partial`` one of them."""

    seccomp: bool
    landlock: int  # ABI, 0 = none
    level: str  # full | partial | none
    detail: str  # what is missing and why; empty at ``full``
    profile: str  # cpu | cuda: what the rules leave open

    def as_dict(self) -> dict[str, Any]:
        """Return the report as the worker's hello carries it."""
        return dataclasses.asdict(self)


def enter(
    *,
    bundle_dir: Path,
    scratch_dir: Path,
    memory_bytes: int,
    open_files: int,
    mode: str,
    code_level: str = "none",
    device: str = "cpu",
    code_dirs: Sequence[str] = (),
) -> Report:
    """Confine this process for good.

    Args:
        bundle_dir: May be read.
        scratch_dir: May be read and written.
        memory_bytes: Limit of the address space; 0 for none. CUDA has none.
        open_files: Limit of open descriptors.
        mode: ``enforce`` (level ``full``, whatever is to run) or ``best_effort``.
        code_level: The lowest level under ``best_effort``, since code of the bundle is to run.
        device: ``cpu`` or ``cuda``.
        code_dirs: Further directories that may be read and executed (tests with their own interpreter layout).

    Raises:
        SandboxError: the level is below what is demanded.
    """
    _limit(0 if device == "cuda" else memory_bytes, open_files)
    missing: list[str] = []
    _drop_capabilities()
    _libc().prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    rules = [*_rules(bundle_dir, scratch_dir, code_dirs), *(devices.cuda_rules() if device == "cuda" else ())]
    try:
        landlock_abi = landlock.restrict(rules)
    except OSError as error:
        landlock_abi = 0
        missing.append(f"landlock: {error.strerror or error}")
    filtered = True
    try:
        seccomp.install(refuse_truncate=landlock_abi < 3, memory_files=device == "cuda")
    except OSError as error:
        filtered = False
        missing.append(f"seccomp: {error.strerror or error}")
    if landlock_abi and not _outside_is_refused():
        landlock_abi = 0
        missing.append("landlock: the root directory can still be read")
    if filtered and not _sockets_are_refused():
        filtered = False
        missing.append("seccomp: a socket can still be made")
    level = LEVELS[int(filtered) + int(landlock_abi > 0)]
    report = Report(seccomp=filtered, landlock=landlock_abi, level=level, detail="; ".join(missing), profile=device)
    demanded = "full" if mode == "enforce" else code_level
    if LEVELS.index(level) < LEVELS.index(demanded):
        what = "" if mode == "enforce" else " for code of a bundle"
        raise SandboxError(f"isolation is {level}, policy demands {demanded}{what}: {report.detail}")
    return report


def _rules(bundle_dir: Path, scratch_dir: Path, code_dirs: Sequence[str]) -> Iterator[Rule]:
    for path in _CODE_DIRECTORIES:
        yield Rule(path, landlock.READ_EXECUTE)
    for path in (*_SYSTEM_LIBRARIES, *code_dirs):
        yield Rule(path, landlock.READ_EXECUTE)
    for path in (*_READABLE, str(bundle_dir)):
        yield Rule(path, landlock.READ)
    yield Rule(str(scratch_dir), landlock.READ_WRITE)
    yield Rule(_WRITABLE_DEVICE, landlock.READ | landlock.Right.WRITE_FILE)


def _code_directories() -> frozenset[str]:
    """Return where Python code comes from; never a bare source checkout, whose siblings may be state."""
    found = {str(Path(package.__path__[0]).resolve()) for package in (agent, handlers)}
    found.add(str(Path(os.__file__).parent))  # the standard library
    found |= {prefix for prefix in (sys.prefix, sys.base_prefix) if prefix not in ("/", "/usr", "/usr/local")}
    found |= {path for path in sys.path if path.endswith(("site-packages", "dist-packages"))}
    return frozenset(found)


def _limit(memory_bytes: int, open_files: int) -> None:
    with contextlib.suppress(OSError):  # an unprivileged process in some containers may not
        Path("/proc/self/oom_score_adj").write_text(str(_OOM_SCORE))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_NOFILE, (open_files, open_files))
    if memory_bytes:
        resource.setrlimit(resource.RLIMIT_AS, (memory_bytes, memory_bytes))


def _drop_capabilities() -> None:
    """Give up every capability, so that a worker of root is an ordinary owner of root's files."""
    libc = _libc()
    for capability in range(_CAPABILITY_LAST + 1):
        libc.prctl(_PR_CAPBSET_DROP, capability, 0, 0, 0)  # beyond the kernel's last one it only says EINVAL
    libc.capset(struct.pack("=Ii", _CAPABILITY_VERSION, 0), bytes(24))


def _outside_is_refused() -> bool:
    try:
        os.close(os.open("/", os.O_RDONLY | os.O_DIRECTORY))
    except PermissionError:
        return True
    return False


def _sockets_are_refused() -> bool:
    try:
        socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM).close()
    except PermissionError:
        return True
    return False


def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)


_CODE_DIRECTORIES: Final = _code_directories()  # found once, by the zygote
