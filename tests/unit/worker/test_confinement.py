"""The system-call filter, run by a small BPF interpreter, and the shape of the Landlock rules."""

from __future__ import annotations

import re
import struct
from pathlib import Path

import pytest

from agent.worker import landlock, seccomp
from agent.worker.landlock import Right

PID = 4242
X86, ARM = seccomp.MACHINES["x86_64"], seccomp.MACHINES["aarch64"]
HEADERS = (Path("/usr/include/x86_64-linux-gnu/asm/unistd_64.h"), Path("/usr/include/asm-generic/unistd.h"))


def judge(
    machine: seccomp.Machine, number: int, *arguments: int, audit: int | None = None, truncate: bool = False
) -> int:
    """Run the filter on one call and return its verdict."""
    code = seccomp.program(machine, pid=PID, refuse_truncate=truncate)
    steps = list(struct.iter_unpack("=HBBI", code))
    data = struct.pack("<II Q6Q", number, machine.audit if audit is None else audit, 0, *(*arguments, *[0] * 6)[:6])
    at = accumulator = 0
    while True:
        operation, then, otherwise, value = steps[at]
        at += 1
        if operation == 0x20:
            (accumulator,) = struct.unpack_from("<I", data, value)
        elif operation == 0x06:
            return value
        else:
            holds = {0x15: accumulator == value, 0x25: accumulator > value, 0x45: bool(accumulator & value)}[operation]
            at += then if holds else otherwise


@pytest.mark.parametrize("machine", [X86, ARM])
def test_every_listed_call_is_refused(machine: seccomp.Machine) -> None:
    for name, numbers in seccomp.REFUSED.items():
        number = numbers[machine.column]
        if number is not None:
            assert judge(machine, number) == seccomp.REFUSE, name


@pytest.mark.parametrize("machine", [X86, ARM])
def test_a_call_of_another_architecture_kills(machine: seccomp.Machine) -> None:
    assert judge(machine, 0, audit=0x4000_0003) == seccomp.KILL


def test_the_x32_table_kills() -> None:
    assert judge(X86, 0x4000_0000 + 41) == seccomp.KILL


@pytest.mark.parametrize("machine", [X86, ARM])
def test_calls_newer_than_the_review_are_unknown(machine: seccomp.Machine) -> None:
    assert judge(machine, 463) == seccomp.UNKNOWN
    assert judge(machine, 0x3FFF_FFFF) == seccomp.UNKNOWN
    assert judge(machine, 462) == seccomp.ALLOW


@pytest.mark.parametrize(("machine", "clone"), [(X86, 56), (ARM, 220)])
def test_threads_may_start_and_processes_may_not(machine: seccomp.Machine, clone: int) -> None:
    assert judge(machine, clone, 0x3D0F00) == seccomp.ALLOW  # what pthread_create asks for
    assert judge(machine, clone, 17) == seccomp.REFUSE  # fork
    assert judge(machine, clone, 0x4111) == seccomp.REFUSE  # vfork, as posix_spawn does
    assert judge(machine, 435) == seccomp.UNKNOWN  # clone3: libraries fall back to clone


@pytest.mark.parametrize(
    ("machine", "numbers"), [(X86, (62, 234, 129, 297)), (ARM, (129, 131, 138, 240))], ids=["x86_64", "aarch64"]
)
def test_signals_reach_this_process_only(machine: seccomp.Machine, numbers: tuple[int, ...]) -> None:
    for number in numbers:
        assert judge(machine, number, PID) == seccomp.ALLOW
        assert judge(machine, number, PID | 0xFFFF_FFFF_0000_0000) == seccomp.ALLOW  # the kernel reads 32 bits
        for other in (0, 1, PID + 1, 0xFFFF_FFFF, (1 << 64) - PID):
            assert judge(machine, number, other) == seccomp.REFUSE


@pytest.mark.parametrize(("machine", "numbers"), [(X86, (302, 203)), (ARM, (261, 122))])
def test_limits_and_cores_are_its_own(machine: seccomp.Machine, numbers: tuple[int, ...]) -> None:
    for number in numbers:
        assert judge(machine, number, 0) == judge(machine, number, PID) == seccomp.ALLOW
        assert judge(machine, number, 1) == seccomp.REFUSE


@pytest.mark.parametrize(("machine", "fcntl", "ioctl"), [(X86, 72, 16), (ARM, 25, 29)])
def test_descriptor_commands_that_act_on_others_are_refused(machine: seccomp.Machine, fcntl: int, ioctl: int) -> None:
    for command in (8, 10, 15):
        assert judge(machine, fcntl, 3, command) == seccomp.REFUSE
    for command in (1, 2, 3, 4, 1030):
        assert judge(machine, fcntl, 8, command) == seccomp.ALLOW
    for command in (0x5412, 0x541C, 0x8901, 0x8902, 0x40086602):
        assert judge(machine, ioctl, 2, command) == seccomp.REFUSE
    assert judge(machine, ioctl, 2, 0x5401) == seccomp.ALLOW


@pytest.mark.parametrize(("machine", "number"), [(X86, 76), (ARM, 45)])
def test_truncate_is_refused_where_landlock_does_not_govern_it(machine: seccomp.Machine, number: int) -> None:
    assert judge(machine, number) == seccomp.ALLOW
    assert judge(machine, number, truncate=True) == seccomp.REFUSE


def test_what_a_worker_lives_on_is_allowed() -> None:
    names = (
        "read",
        "write",
        "mmap",
        "futex",
        "recvmsg",
        "sendmsg",
        "recvfrom",
        "openat",
        "poll",
        "getrandom",
        "madvise",
    )
    numbers = (0, 1, 9, 202, 47, 46, 45, 257, 7, 318, 28)
    for name, number in zip(names, numbers, strict=True):
        assert judge(X86, number) == seccomp.ALLOW, name


@pytest.mark.parametrize("machine", [X86, ARM], ids=["x86_64", "aarch64"])
def test_the_tables_agree_with_the_kernels_headers(machine: seccomp.Machine) -> None:
    header = HEADERS[machine.column]
    if not header.exists():
        pytest.skip("the kernel's header files are not installed")
    pattern = r"#define __NR(?:3264)?_(\w+)\s+(\d+)"
    known = {name: int(number) for name, number in re.findall(pattern, header.read_text())}
    for table in (seccomp.REFUSED, seccomp.SELF_ONLY, seccomp.SELF_OR_ZERO):
        for name, numbers in table.items():
            number = numbers[machine.column]
            if number is not None and name != "fchmodat2":  # newer than Debian 12's headers
                assert number == known[name], name


@pytest.mark.parametrize(
    ("abi", "last", "attributes"),
    [
        (1, Right.MAKE_SYM, 8),
        (2, Right.REFER, 8),
        (3, Right.TRUNCATE, 8),
        (4, Right.TRUNCATE, 16),
        (5, Right.IOCTL_DEV, 16),
        (6, Right.IOCTL_DEV, 24),
        (7, Right.IOCTL_DEV, 24),
    ],
)
def test_each_landlock_abi_handles_all_it_knows(abi: int, last: Right, attributes: int) -> None:
    assert landlock.handled(abi) == (last << 1) - 1
    assert len(landlock.ruleset_attributes(abi)) == attributes


def test_scratch_may_not_hold_devices_sockets_or_programs() -> None:
    never = Right.EXECUTE | Right.MAKE_CHAR | Right.MAKE_BLOCK | Right.MAKE_SOCK | Right.MAKE_FIFO | Right.IOCTL_DEV
    assert not landlock.READ_WRITE & never
