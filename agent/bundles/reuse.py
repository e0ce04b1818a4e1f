"""What this box need not fetch: whole files and chunks that versions already on it probably hold.

A whole unchanged file shares the old one's blocks where the file system can (a reflink: Btrfs, XFS), else it is copied
inside the kernel. It never becomes a second name of the same file: runtimes refuse weights with two, and a version
directory owns its files. Promises nothing about the bytes: whoever takes them hashes them.
"""

from __future__ import annotations

import errno
import fcntl
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

from agent.bundles.manifest import Manifest
from agent.bundles.staging import Staging
from agent.errors import ConfigError

LinkMode = Literal["auto", "reflink", "copy"]

_FICLONE: Final = 0x40049409  # linux/fs.h
_COPY_BYTES: Final = 64 << 20
_CANNOT: Final = frozenset(
    {errno.EOPNOTSUPP, errno.ENOTTY, errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EPERM, errno.ETXTBSY}
)


@dataclass(frozen=True, slots=True)
class Seed:
    """Where on this box a chunk's raw bytes probably are."""

    path: Path
    offset: int


def find_seeds(manifests: Iterable[tuple[Path, Manifest]], wanted: Iterable[str]) -> dict[str, Seed]:
    """Return where the raw chunks ``wanted`` probably are in local version folders; whether they are is not checked."""
    missing = set(wanted)
    found: dict[str, Seed] = {}
    for folder, manifest in manifests:
        for item in manifest.files:
            path, offset = folder / item.path, 0
            for chunk in item.chunks:
                if chunk.sha256 in missing and chunk.sha256 not in found:
                    found[chunk.sha256] = Seed(path, offset)
                offset += chunk.size
    return found


def take_whole_files(staging: Staging, manifests: Sequence[tuple[Path, Manifest]], mode: LinkMode) -> int:
    """Fill the untouched parts that an older version has as they are; return their bytes.

    Raises:
        ConfigError: ``mode`` is ``reflink`` and this file system cannot.
    """
    known = {
        (item.sha256, item.size): folder / item.path
        for folder, manifest in reversed(manifests)
        for item in manifest.files
        if item.size
    }
    taken = 0
    for number in staging.numbers:
        item = staging.manifest.files[number]
        source = known.get((item.sha256, item.size))
        if source is not None and staging.take_over(number, _copier(source, item.size, mode)):
            taken += item.size
    return taken


class _copier:  # noqa: N801 - reads as the function it stands for
    """Brings the bytes of ``source`` into a descriptor; ``False`` if it is gone or another size."""

    def __init__(self, source: Path, size: int, mode: LinkMode) -> None:
        self._source = source
        self._size = size
        self._mode = mode

    def __call__(self, target: int) -> bool:
        try:
            descriptor = os.open(self._source, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
        except OSError:
            return False  # collected meanwhile, or its variant was never fetched
        try:
            if os.fstat(descriptor).st_size != self._size:
                return False
            if self._mode != "copy" and _reflink(descriptor, target):
                return True
            if self._mode == "reflink":
                raise ConfigError(
                    f"[store] link_mode is 'reflink' and the file system of {self._source} shares no blocks; use 'auto'"
                )
            return _copy(descriptor, target, self._size)
        finally:
            os.close(descriptor)


def _reflink(source: int, target: int) -> bool:
    try:
        fcntl.ioctl(target, _FICLONE, source)
    except OSError as error:
        if error.errno in _CANNOT:
            return False
        raise
    return True


def _copy(source: int, target: int, size: int) -> bool:
    done = 0
    while done < size:
        try:
            copied = os.copy_file_range(source, target, min(_COPY_BYTES, size - done), done, done)
        except OSError as error:
            if error.errno in _CANNOT:
                return False  # the chunks are seeds all the same
            raise
        if not copied:
            return False
        done += copied
    return True
