"""The system-call filter of a worker: which calls it loses, and the BPF program that takes them away.

Promises: the program is a pure function of machine and pid; a call from another architecture's table kills the
process; everything refused answers EPERM, or ENOSYS where a library is to fall back (``clone3``, calls newer than
the list below). Threads stay possible, processes do not. It closes what Landlock leaves open: every kind of socket,
process creation, signals and tracing, and file metadata (mode, owner, times, attributes), which Landlock never
governs and which matters because a worker may run as root.
Leaves out: files and directories (``landlock.py``); names and sizes of files elsewhere, which ``stat`` still tells;
the decision whether a worker may run without (``sandbox.py``).
"""

from __future__ import annotations

import ctypes
import errno
import os
import platform
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Final

_LOAD: Final = 0x20  # BPF_LD | BPF_W | BPF_ABS
_JUMP_EQUAL: Final = 0x15  # BPF_JMP | BPF_JEQ | BPF_K
_JUMP_GREATER: Final = 0x25  # BPF_JMP | BPF_JGT | BPF_K
_JUMP_ANY_BIT: Final = 0x45  # BPF_JMP | BPF_JSET | BPF_K
_RETURN: Final = 0x06  # BPF_RET | BPF_K
_INSTRUCTION: Final = struct.Struct("=HBBI")

_NUMBER_AT: Final = 0  # offsets in struct seccomp_data; arguments are u64, and pids, flags and commands their low half
_ARCH_AT: Final = 4
_ARGUMENT_AT: Final = (16, 24)

KILL: Final = 0x8000_0000
ALLOW: Final = 0x7FFF_0000
REFUSE: Final = 0x0005_0000 | errno.EPERM
UNKNOWN: Final = 0x0005_0000 | errno.ENOSYS

_NEWEST: Final = 462  # mseal; later calls have the same numbers everywhere and were not reviewed
_X32_BIT: Final = 0x4000_0000
_CLONE_THREAD: Final = 0x0001_0000
_FCNTLS_REFUSED: Final = (8, 10, 15)  # fcntl F_SETOWN, F_SETSIG, F_SETOWN_EX: a signal to anyone by way of an fd
# ioctl TIOCSTI, TIOCLINUX: typing into the terminal; FIOSETOWN, SIOCSPGRP: as above; FS_IOC_SETFLAGS (two widths),
# FS_IOC_FSSETXATTR, FS_IOC_ENABLE_VERITY: attributes of files that are only open for reading
_IOCTLS_REFUSED: Final = (0x5412, 0x541C, 0x8901, 0x8902, 0x4008_6602, 0x4004_6602, 0x401C_5820, 0x4080_6685)
_SET_FILTER: Final = 1
_ALL_THREADS: Final = 1  # SECCOMP_FILTER_FLAG_TSYNC


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """One architecture: its audit number and the column of the tables below."""

    audit: int
    column: int
    seccomp: int  # number of seccomp(2)
    has_x32: bool


MACHINES: Final[Mapping[str, Machine]] = {
    "x86_64": Machine(audit=0xC000_003E, column=0, seccomp=317, has_x32=True),
    "aarch64": Machine(audit=0xC000_00B7, column=1, seccomp=277, has_x32=False),
}

# name: (x86_64, aarch64); None where the architecture has no such call.
Table = Mapping[str, tuple[int | None, int | None]]

REFUSED: Final[Table] = {
    # sockets. socketpair too: an unconnected datagram pair can address any socket of the file system
    "socket": (41, 198), "socketpair": (53, 199), "connect": (42, 203), "bind": (49, 200), "listen": (50, 201),
    "accept": (43, 202), "accept4": (288, 242),
    # processes
    "execve": (59, 221), "execveat": (322, 281), "fork": (57, None), "vfork": (58, None), "setpgid": (109, 154),
    # other processes
    "ptrace": (101, 117), "process_vm_readv": (310, 270), "process_vm_writev": (311, 271),
    "process_madvise": (440, 440), "process_mrelease": (448, 448), "kcmp": (312, 272), "pidfd_open": (434, 434),
    "pidfd_getfd": (438, 438), "pidfd_send_signal": (424, 424), "tkill": (200, 130), "move_pages": (279, 239),
    "migrate_pages": (256, 238), "sched_setscheduler": (144, 119), "sched_setparam": (142, 118),
    "sched_setattr": (314, 274), "setpriority": (141, 140), "ioprio_set": (251, 30),
    # mounts and namespaces
    "mount": (165, 40), "umount2": (166, 39), "pivot_root": (155, 41), "chroot": (161, 51), "open_tree": (428, 428),
    "move_mount": (429, 429), "fsopen": (430, 430), "fsconfig": (431, 431), "fsmount": (432, 432),
    "fspick": (433, 433), "mount_setattr": (442, 442), "unshare": (272, 97), "setns": (308, 268),
    "quotactl": (179, 60), "quotactl_fd": (443, 443), "swapon": (167, 224), "swapoff": (168, 225),
    # kernel surfaces that handlers and runtimes never need
    "bpf": (321, 280), "perf_event_open": (298, 241), "userfaultfd": (323, 282), "keyctl": (250, 219),
    "add_key": (248, 217), "request_key": (249, 218), "io_uring_setup": (425, 425), "io_uring_enter": (426, 426),
    "io_uring_register": (427, 427), "fanotify_init": (300, 262), "fanotify_mark": (301, 263),
    "open_by_handle_at": (304, 265), "name_to_handle_at": (303, 264), "lookup_dcookie": (212, 18),
    "personality": (135, 92),
    # the machine
    "init_module": (175, 105), "finit_module": (313, 273), "delete_module": (176, 106), "kexec_load": (246, 104),
    "kexec_file_load": (320, 294), "reboot": (169, 142), "syslog": (103, 116), "iopl": (172, None),
    "ioperm": (173, None), "acct": (163, 89), "settimeofday": (164, 170), "clock_settime": (227, 112),
    "clock_adjtime": (305, 266), "adjtimex": (159, 171), "sethostname": (170, 161), "setdomainname": (171, 162),
    "vhangup": (153, 58),
    # file metadata: not governed by Landlock
    "chmod": (90, None), "fchmod": (91, 52), "fchmodat": (268, 53), "fchmodat2": (452, 452), "chown": (92, None),
    "fchown": (93, 55), "lchown": (94, None), "fchownat": (260, 54), "setxattr": (188, 5), "lsetxattr": (189, 6),
    "fsetxattr": (190, 7), "removexattr": (197, 14), "lremovexattr": (198, 15), "fremovexattr": (199, 16),
    "utime": (132, None), "utimes": (235, None), "futimesat": (261, None), "utimensat": (280, 88),
    "mknod": (133, None), "mknodat": (259, 33),
    # memory that RLIMIT_AS does not count and no one's death gives back to the right account
    "memfd_create": (319, 279), "memfd_secret": (447, 447),
    # what goes on in directories that Landlock hides
    "inotify_add_watch": (254, 27),
    # memory and messages shared with other processes of the same uid
    "shmget": (29, 194), "shmat": (30, 196), "shmctl": (31, 195), "msgget": (68, 186), "msgsnd": (69, 189),
    "msgrcv": (70, 188), "msgctl": (71, 187), "semget": (64, 190), "semop": (65, 193), "semtimedop": (220, 192),
    "semctl": (66, 191), "mq_open": (240, 180), "mq_unlink": (241, 181),
}  # fmt: skip

# Allowed only when the first argument names this process.
SELF_ONLY: Final[Table] = {
    "kill": (62, 129), "tgkill": (234, 131), "rt_sigqueueinfo": (129, 138), "rt_tgsigqueueinfo": (297, 240),
}  # fmt: skip
SELF_OR_ZERO: Final[Table] = {"prlimit64": (302, 261), "sched_setaffinity": (203, 122)}

_CLONE: Final = (56, 220)
_CLONE3: Final = (435, 435)
_FCNTL: Final = (72, 25)
_IOCTL: Final = (16, 29)
_TRUNCATE: Final = (76, 45)


def program(machine: Machine, *, pid: int, refuse_truncate: bool, memory_files: bool = False) -> bytes:
    """Return the BPF program.

    Args:
        machine: The architecture whose calls it judges.
        pid: The only process that may be signalled.
        refuse_truncate: Also refuse ``truncate(2)``, for kernels whose Landlock does not govern it (ABI below 3).
        memory_files: Allow ``memfd_create``, which the CUDA driver shares memory by.
    """
    column = machine.column
    code = [
        _step(_LOAD, _ARCH_AT),
        _step(_JUMP_EQUAL, machine.audit, then=1),
        _step(_RETURN, KILL),
        _step(_LOAD, _NUMBER_AT),
    ]
    if machine.has_x32:
        code += [_step(_JUMP_GREATER, _X32_BIT - 1, otherwise=1), _step(_RETURN, KILL)]
    code += [_step(_JUMP_GREATER, _NEWEST, otherwise=1), _step(_RETURN, UNKNOWN)]
    refused = {name: numbers for name, numbers in REFUSED.items() if not (memory_files and name == "memfd_create")}
    for number in _numbers(refused, column):
        code += _when(number, [_step(_RETURN, REFUSE)])
    if refuse_truncate:
        code += _when(_TRUNCATE[column], [_step(_RETURN, REFUSE)])
    code += _when(_CLONE3[column], [_step(_RETURN, UNKNOWN)])
    code += _when(
        _CLONE[column],
        [_step(_LOAD, _ARGUMENT_AT[0]), _step(_JUMP_ANY_BIT, _CLONE_THREAD, otherwise=1), *_verdict()],
    )
    for number in _numbers(SELF_ONLY, column):
        code += _when(number, _only_if_argument_in((pid,)))
    for number in _numbers(SELF_OR_ZERO, column):
        code += _when(number, _only_if_argument_in((0, pid)))
    code += _when(_FCNTL[column], _unless_command_in(_FCNTLS_REFUSED))
    code += _when(_IOCTL[column], _unless_command_in(_IOCTLS_REFUSED))
    code.append(_step(_RETURN, ALLOW))
    return b"".join(code)


def install(*, refuse_truncate: bool, memory_files: bool = False) -> None:
    """Filter every thread of this process, for good; see ``program``. ``no_new_privs`` must be set.

    Raises:
        OSError: no filter for this architecture, or the kernel refuses it.
    """
    machine = MACHINES.get(platform.machine())
    if machine is None:
        raise OSError(errno.ENOSYS, f"no system-call table for {platform.machine()}")
    code = program(machine, pid=os.getpid(), refuse_truncate=refuse_truncate, memory_files=memory_files)
    buffer = ctypes.create_string_buffer(code, len(code))
    header = _Program(len(code) // _INSTRUCTION.size, ctypes.cast(buffer, ctypes.c_void_p))
    libc = ctypes.CDLL(None, use_errno=True)
    result = libc.syscall(machine.seccomp, _SET_FILTER, _ALL_THREADS, ctypes.byref(header))
    if result < 0:
        raise OSError(ctypes.get_errno(), f"seccomp: {os.strerror(ctypes.get_errno())}")
    if result > 0:
        raise OSError(errno.EBUSY, f"seccomp: thread {result} could not be brought under the filter")


class _Program(ctypes.Structure):
    _fields_ = (("length", ctypes.c_ushort), ("filter", ctypes.c_void_p))


def _step(code: int, value: int, *, then: int = 0, otherwise: int = 0) -> bytes:
    return _INSTRUCTION.pack(code, then, otherwise, value)


def _numbers(table: Table, column: int) -> Iterable[int]:
    return (numbers[column] for numbers in table.values() if numbers[column] is not None)  # type: ignore[misc]


def _when(number: int, body: list[bytes]) -> list[bytes]:
    """Run ``body``, which must return, for this call; the accumulator holds the call's number before and after."""
    return [_step(_JUMP_EQUAL, number, otherwise=len(body)), *body]


def _verdict() -> list[bytes]:
    return [_step(_RETURN, ALLOW), _step(_RETURN, REFUSE)]


def _only_if_argument_in(values: tuple[int, ...]) -> list[bytes]:
    tests = [_step(_JUMP_EQUAL, value, then=len(values) - 1 - index) for index, value in enumerate(values)]
    tests[-1] = _step(_JUMP_EQUAL, values[-1], otherwise=1)
    return [_step(_LOAD, _ARGUMENT_AT[0]), *tests, *_verdict()]


def _unless_command_in(commands: tuple[int, ...]) -> list[bytes]:
    tests = [_step(_JUMP_EQUAL, command, then=len(commands) - index) for index, command in enumerate(commands)]
    return [_step(_LOAD, _ARGUMENT_AT[1]), *tests, *_verdict()]
