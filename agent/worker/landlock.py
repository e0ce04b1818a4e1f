"""Landlock through ctypes: this thread and all it starts see only the listed parts of the file system.

Promises: each right the running kernel knows is handled, so what no rule grants is refused, for root too; a path
that does not exist is skipped; network and scope rights are used where the kernel has them.
Leaves out: which paths a worker needs (``sandbox.py``), and sockets and processes (``seccomp.py``).
"""

from __future__ import annotations

import ctypes
import os
import stat
import struct
from collections.abc import Iterable
from enum import IntFlag
from typing import Final, NamedTuple

_CREATE_RULESET: Final = 444  # the three calls have one number on every architecture
_ADD_RULE: Final = 445
_RESTRICT_SELF: Final = 446
_QUERY_ABI: Final = 1
_RULE_PATH_BENEATH: Final = 1
_PATH_RULE: Final = struct.Struct("=Qi")  # struct landlock_path_beneath_attr is packed
_NEWEST_ABI: Final = 7  # later ones are used as this one


class Right(IntFlag):
    """File-system rights, by their kernel values."""

    EXECUTE = 1 << 0
    WRITE_FILE = 1 << 1
    READ_FILE = 1 << 2
    READ_DIR = 1 << 3
    REMOVE_DIR = 1 << 4
    REMOVE_FILE = 1 << 5
    MAKE_CHAR = 1 << 6
    MAKE_DIR = 1 << 7
    MAKE_REG = 1 << 8
    MAKE_SOCK = 1 << 9
    MAKE_FIFO = 1 << 10
    MAKE_BLOCK = 1 << 11
    MAKE_SYM = 1 << 12
    REFER = 1 << 13  # ABI 2
    TRUNCATE = 1 << 14  # ABI 3
    IOCTL_DEV = 1 << 15  # ABI 5


READ: Final = Right.READ_FILE | Right.READ_DIR
READ_EXECUTE: Final = READ | Right.EXECUTE
READ_WRITE: Final = (
    READ
    | Right.WRITE_FILE
    | Right.TRUNCATE
    | Right.REMOVE_DIR
    | Right.REMOVE_FILE
    | Right.MAKE_DIR
    | Right.MAKE_REG
    | Right.MAKE_SYM
    | Right.REFER
)
_OF_A_FILE: Final = Right.EXECUTE | Right.WRITE_FILE | Right.READ_FILE | Right.TRUNCATE | Right.IOCTL_DEV
_TCP: Final = 0b11  # bind and connect, ABI 4
_SCOPES: Final = 0b11  # abstract unix sockets and signals, ABI 6


class Rule(NamedTuple):
    """``rights`` on ``path`` and everything below it."""

    path: str
    rights: Right


def abi() -> int:
    """Return the kernel's Landlock ABI version, 0 where there is none."""
    return max(0, int(_libc().syscall(_CREATE_RULESET, None, 0, _QUERY_ABI)))


def handled(version: int) -> Right:
    """Return every file-system right that ABI ``version`` knows."""
    last = Right.MAKE_SYM
    for right, since in ((Right.REFER, 2), (Right.TRUNCATE, 3), (Right.IOCTL_DEV, 5)):
        if version >= since:
            last = right
    return Right((last << 1) - 1)


def ruleset_attributes(version: int) -> bytes:
    """Return ``struct landlock_ruleset_attr`` as long as ABI ``version`` expects it."""
    fields = [int(handled(version))]
    if version >= 4:
        fields.append(_TCP)
    if version >= 6:
        fields.append(_SCOPES)
    return struct.pack(f"={len(fields)}Q", *fields)


def restrict(rules: Iterable[Rule]) -> int:
    """Confine the calling thread to ``rules``, for good; ``no_new_privs`` must be set. Return the ABI used.

    Raises:
        OSError: no Landlock in this kernel, or it refuses the rules.
    """
    version = min(abi(), _NEWEST_ABI)
    if version == 0:
        raise OSError("Landlock is not enabled in this kernel")
    attributes = ruleset_attributes(version)
    ruleset = _call(_CREATE_RULESET, attributes, len(attributes), 0)
    try:
        for rule in rules:
            _add(ruleset, rule, handled(version))
        _call(_RESTRICT_SELF, ruleset, 0)
    finally:
        os.close(ruleset)
    return version


def _add(ruleset: int, rule: Rule, known: Right) -> None:
    try:
        place = os.open(rule.path, os.O_PATH | os.O_CLOEXEC)
    except (FileNotFoundError, NotADirectoryError):
        return
    try:
        rights = rule.rights & known
        if not stat.S_ISDIR(os.fstat(place).st_mode):
            rights &= _OF_A_FILE
        _call(_ADD_RULE, ruleset, _RULE_PATH_BENEATH, _PATH_RULE.pack(rights, place), 0)
    finally:
        os.close(place)


def _call(number: int, *arguments: int | bytes) -> int:
    result = int(_libc().syscall(number, *arguments))
    if result < 0:
        raise OSError(ctypes.get_errno(), f"Landlock: {os.strerror(ctypes.get_errno())}")
    return result


def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)
