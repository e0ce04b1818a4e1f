"""Files that survive a power cut: written beside, synced, renamed, directory synced.

Absent on purpose: locking and formats. A reader sees the old bytes or the new, never a mixture.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

from agent.errors import DiskFullError, StateError, StoreError

_DISK_FULL: Final = frozenset({28, 122})  # ENOSPC, EDQUOT


def write_file(path: Path, data: bytes, *, mode: int = 0o600) -> None:
    """Replace ``path`` by ``data`` atomically and durably.

    Raises:
        DiskFullError: no space; the old file is untouched.
    """
    beside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        descriptor = os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC, mode)
        try:
            view = memoryview(data)
            while view:
                view = view[os.write(descriptor, view) :]
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        os.replace(beside, path)
    except OSError as error:
        beside.unlink(missing_ok=True)
        if error.errno in _DISK_FULL:
            raise DiskFullError(f"{path}: {error.strerror}") from error
        raise
    sync_directory(path.parent)


def write_json(path: Path, value: Any, *, mode: int = 0o600) -> None:
    """``write_file`` with readable JSON."""
    write_file(path, json.dumps(value, indent=1, sort_keys=True).encode() + b"\n", mode=mode)


def read_json(path: Path) -> Any:
    """Return the parsed file, or ``None`` if there is none.

    Raises:
        StateError: the file exists and cannot be read or parsed.
    """
    try:
        return json.loads(path.read_bytes())
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError) as error:
        raise StateError(f"{path}: {error}") from error


def set_aside(path: Path) -> Path | None:
    """Rename what cannot be read to ``<name>.broken`` so that it can be looked at.

    Returns:
        Its new name; ``None`` if it is gone, or stays because the disk denies that: nobody's start fails for it.
    """
    for name in (f"{path.name}.broken", f"{path.name}.{os.getpid()}.broken"):  # a folder cannot replace a file
        target = path.with_name(name)
        try:
            os.replace(path, target)
            sync_directory(path.parent)
        except FileNotFoundError:
            return None
        except OSError:
            continue
        return target
    return None


def disk_error(what: object, error: OSError) -> StoreError:
    """Return ``error`` as one of ours: ``DiskFullError`` if space or quota ran out; ``what`` begins the message."""
    message = f"{what}: {error.strerror or error}"
    return DiskFullError(message) if error.errno in _DISK_FULL else StoreError(message)


@contextmanager
def disk_errors(what: object) -> Iterator[None]:
    """Turn each ``OSError`` of the block into ``disk_error``."""
    try:
        yield
    except OSError as error:
        raise disk_error(what, error) from error


def sync_directory(path: Path) -> None:
    """Make renames and creations inside ``path`` durable."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
