"""The files of one pull: parts with their space allocated, and the journal of finished chunks.

One preallocated ``<n>.part`` per wanted file, and ``journal`` with one byte per chunk of the manifest: 0 missing,
``WRITTEN`` once its bytes are in the file, ``SYNCED`` after these were synced. Syncs are for many chunks at once, so a
kill loses nothing that was written, and a power cut what was written since the last sync: after a restart a chunk that
is only ``WRITTEN`` counts if its bytes still have its hash. A journal that lies (a disk that lost a confirmed write) is
found by ``forget`` once a whole file's hash does not hold.

One process at a time holds a staging folder. Absent on purpose: where chunks come from (``download.py``) and where
files go (``assemble.py``).
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from hashlib import sha256
from itertools import accumulate
from pathlib import Path
from typing import Final

from agent.bundles.manifest import Chunk, Manifest
from agent.durable import disk_error, sync_directory
from agent.errors import DiskFullError, TransientError

WRITTEN: Final = 2
SYNCED: Final = 1
_COPY_BYTES: Final = 1 << 20
_FREE_SHARE: Final = 10  # a pull leaves a tenth of what it needs free, if that is more than the reserve
_FLAGS: Final = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC


@dataclass(frozen=True, slots=True)
class Place:
    """A chunk's place: file number in the manifest, byte offset in it, byte of the journal."""

    file: int
    offset: int
    mark: int


@dataclass(frozen=True, slots=True)
class Job:
    """One distinct chunk and all the places it belongs to; the first is filled first."""

    chunk: Chunk
    places: tuple[Place, ...]


class Staging:
    """The files of one pull. ``wanted`` are the paths to bring, a subset of the manifest's."""

    def __init__(self, folder: Path, manifest: Manifest, wanted: Sequence[str]) -> None:
        self.folder = folder
        self.manifest = manifest
        paths = frozenset(wanted)
        self.numbers = tuple(number for number, item in enumerate(manifest.files) if item.path in paths)
        self._descriptors: dict[int, int] = {}
        self._journal = -1
        self._folder_lock = -1
        self._done = bytearray()
        chunks = [len(item.chunks) for item in manifest.files]
        self._first_marks = tuple(accumulate(chunks, initial=0))

    @property
    def bytes_total(self) -> int:
        """Raw bytes of the wanted files."""
        return sum(self.manifest.files[number].size for number in self.numbers)

    def part(self, number: int) -> Path:
        """Return the staging file of file ``number``."""
        return self.folder / f"{number}.part"

    def marks(self, number: int) -> range:
        """Return the bytes of the journal that belong to the chunks of file ``number``."""
        first = self._first_marks[number]
        return range(first, first + len(self.manifest.files[number].chunks))

    def acquire(self) -> None:
        """Create the folder and hold it for this process until ``close``.

        Raises:
            TransientError: another process pulls the same bundle.
            DiskFullError: not even a folder can be made.
        """
        try:
            self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            self._folder_lock = os.open(self.folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            fcntl.flock(self._folder_lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if not os.path.samestat(os.fstat(self._folder_lock), os.stat(self.folder)):
                raise FileNotFoundError  # replaced while we waited
        except (BlockingIOError, FileNotFoundError) as error:  # held, or removed by the process that held it
            self.close()
            raise TransientError(f"{self.folder}: another process pulls this bundle") from error
        except OSError as error:
            raise disk_error(self.folder, error) from error

    def open(self, *, disk_reserve_bytes: int) -> None:
        """Create or reopen the files with all their space allocated; ``acquire`` comes first.

        Raises:
            DiskFullError: the reserve would be touched; nothing of this pull is left on disk that was not there.
        """
        marks = sum(len(item.chunks) for item in self.manifest.files)
        try:
            self._check_space(disk_reserve_bytes)
            self._journal = os.open(self.folder / "journal", _FLAGS, 0o600)
            os.ftruncate(self._journal, marks)
            os.posix_fallocate(self._journal, 0, max(1, marks))
            self._done = bytearray(os.pread(self._journal, marks, 0))
            for number in self.numbers:
                self._open_part(number)
            self._judge_unsynced()
            os.fsync(self._journal)
            sync_directory(self.folder)
        except OSError as error:
            self._give_back_space()
            raise disk_error(self.folder, error) from error

    def close(self) -> None:
        """Close all files; what is journaled stays."""
        for descriptor in (*self._descriptors.values(), self._journal, self._folder_lock):
            if descriptor >= 0:
                os.close(descriptor)
        self._descriptors, self._journal, self._folder_lock = {}, -1, -1

    def jobs(self) -> list[Job]:
        """Return the chunks still missing, each once."""
        places: dict[str, list[Place]] = {}
        chunks: dict[str, Chunk] = {}
        mark = 0
        wanted = set(self.numbers)
        for number, item in enumerate(self.manifest.files):
            offset = 0
            for chunk in item.chunks:
                if number in wanted and not self._done[mark]:
                    chunks.setdefault(chunk.sha256, chunk)
                    places.setdefault(chunk.sha256, []).append(Place(number, offset, mark))
                offset += chunk.size
                mark += 1
        return [Job(chunks[key], tuple(found)) for key, found in places.items()]

    def write(self, place: Place, offset: int, data: bytes | memoryview) -> None:
        """Write ``data`` at ``offset`` within the chunk at ``place``; it does not count yet."""
        descriptor = self._descriptors[place.file]
        position = place.offset + offset
        view = memoryview(data)
        while view:
            written = os.pwrite(descriptor, view, position)
            view, position = view[written:], position + written

    def take_over(self, number: int, copy: Callable[[int], bool]) -> bool:
        """Let ``copy`` fill the untouched file ``number`` through its descriptor; ``True``: all its bytes are there.

        They are not hashed yet: whoever hashes whole files does it.
        """
        marks = self.marks(number)
        if any(self._done[mark] for mark in marks) or not copy(self._descriptors[number]):
            return False
        for mark in marks:
            self._mark(mark, WRITTEN)
        return True

    def finish(self, job: Job) -> None:
        """Copy the first place, whose bytes are written and right, to the others; the chunk now counts."""
        first = job.places[0]
        for other in job.places[1:]:
            for offset in range(0, job.chunk.size, _COPY_BYTES):
                size = min(_COPY_BYTES, job.chunk.size - offset)
                self.write(other, offset, os.pread(self._descriptors[first.file], size, first.offset + offset))
        for place in job.places:
            self._mark(place.mark, WRITTEN)

    def sync(self) -> None:
        """Make all that is finished survive a power cut. Others may finish more meanwhile."""
        unsynced: dict[int, list[int]] = {}
        for number in self.numbers:
            for mark in self.marks(number):
                if self._done[mark] == WRITTEN:
                    unsynced.setdefault(number, []).append(mark)
        for number, marks in unsynced.items():
            os.fdatasync(self._descriptors[number])
            for mark in marks:
                self._mark(mark, SYNCED)

    def is_done(self, mark: int) -> bool:
        """Say whether the chunk with this byte of the journal counts."""
        return self._done[mark] != 0

    def read(self, number: int, offset: int, size: int) -> bytes:
        """Return ``size`` bytes of file ``number``; fewer at its end."""
        return os.pread(self._descriptors[number], size, offset)

    def forget(self, number: int) -> int:
        """Hash the chunks of file ``number`` and unmark the bad ones; return how many those are."""
        bad = self._unmark_bad(number, among=(WRITTEN, SYNCED))
        os.fsync(self._journal)
        return bad

    def _judge_unsynced(self) -> None:
        """After a restart, keep of what was written and not synced that which is still right."""
        for number in self.numbers:
            self._unmark_bad(number, among=frozenset(range(1, 256)) - {SYNCED})
        self.sync()

    def _unmark_bad(self, number: int, *, among: Collection[int]) -> int:
        offset = bad = 0
        for chunk, mark in zip(self.manifest.files[number].chunks, self.marks(number), strict=True):
            if self._done[mark] in among:
                good = _hash_range(self._descriptors[number], offset, chunk.size) == chunk.sha256
                self._mark(mark, WRITTEN if good else 0)
                bad += not good
            offset += chunk.size
        return bad

    def _mark(self, mark: int, value: int) -> None:
        os.pwrite(self._journal, bytes((value,)), mark)
        self._done[mark] = value

    def _check_space(self, reserve: int) -> None:
        stats = os.statvfs(self.folder)
        free = stats.f_bavail * stats.f_frsize
        need = 0
        for number in self.numbers:
            path = self.part(number)
            allocated = path.stat().st_blocks * 512 if path.exists() else 0
            need += max(0, self.manifest.files[number].size - allocated)
        reserve = max(reserve, need // _FREE_SHARE)
        if free < need + reserve:
            raise DiskFullError(f"{need} bytes are needed beside the reserve of {reserve}, {free} are free")

    def _open_part(self, number: int) -> None:
        size = self.manifest.files[number].size
        descriptor = os.open(self.part(number), _FLAGS, 0o600)
        self._descriptors[number] = descriptor
        if os.fstat(descriptor).st_size > size:
            os.ftruncate(descriptor, size)
        if size:
            os.posix_fallocate(descriptor, 0, size)

    def _give_back_space(self) -> None:
        """Remove the parts that hold no finished chunk, after an allocation failed half way."""
        for number in self._descriptors:
            if not any(self._done[mark] for mark in self.marks(number)):
                self.part(number).unlink(missing_ok=True)


def _hash_range(descriptor: int, offset: int, size: int) -> str:
    hasher = sha256()
    end = offset + size
    while offset < end:
        data = os.pread(descriptor, min(_COPY_BYTES, end - offset), offset)
        if not data:
            break
        hasher.update(data)
        offset += len(data)
    return hasher.hexdigest()
