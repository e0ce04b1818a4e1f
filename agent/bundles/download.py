"""Bring a bundle's missing chunks into its staging folder: parallel, resumable, each byte hashed before it counts.

Chunks found in versions already on this box are copied (and hashed) instead of fetched; a transfer that is cut goes on
where it was, if the store does ranges. Promises: nothing outside the staging folder is written; a chunk counts only if
its hash holds; at most ``tries`` per chunk and source. Absent on purpose: whole-file hashes and placement
(``assemble.py``), trust in the manifest (``trust.py``). Child process only: uses threads and urllib3.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from contextlib import closing
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Final, Protocol

from agent.backoff import Backoff
from agent.bundles import zstd
from agent.bundles.fetcher import Body, RefusedError
from agent.bundles.manifest import Manifest
from agent.bundles.staging import Job, Staging
from agent.durable import disk_error
from agent.errors import AgentError, ChunkMismatchError, OfflineError, TransientError

_COPY_BYTES: Final = 1 << 20
_REPORT_S: Final = 0.5

Report = Callable[[int, int, float], None]  # bytes in place, bytes in all, bytes per second from the store


class Opener(Protocol):
    """The part of ``fetcher.Transport`` used here."""

    def open(self, url: str, *, offset: int = 0, validator: str = "") -> Body: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """How hard a pull may try."""

    connections: int = 4
    tries: int = 3  # per chunk and source
    disk_reserve_bytes: int = 0
    retry_first_s: float = 0.25
    retry_cap_s: float = 5.0


@dataclass(frozen=True, slots=True)
class Seed:
    """Where on this box a chunk's raw bytes probably are."""

    path: Path
    offset: int


def download(
    staging: Staging,
    sources: Sequence[str],
    opener: Opener,
    seeds: Mapping[str, Seed],
    limits: Limits,
    report: Report,
) -> int:
    """Complete ``staging`` (which is open); return the bytes that came from the store.

    Args:
        sources: Base URLs of stores, tried in order.
        seeds: Raw chunk hash to a place on this box that may hold it; hashed again before use.
        report: Called every half second, and at the end, from this thread.

    Raises:
        ChunkMismatchError: every source keeps giving other bytes than were signed.
        OfflineError, TransientError, StoreError: no source could give a chunk.
        DiskFullError: the disk filled up meanwhile; finished chunks stay for the next try.
    """
    return _Pull(staging, sources, opener, seeds, limits, report).run()


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


class _Pull:
    """One run of ``download``; the threads share it."""

    def __init__(
        self,
        staging: Staging,
        sources: Sequence[str],
        opener: Opener,
        seeds: Mapping[str, Seed],
        limits: Limits,
        report: Report,
    ) -> None:
        self._staging = staging
        self._sources = tuple(source.rstrip("/") for source in sources)
        self._opener = opener
        self._seeds = seeds
        self._limits = limits
        self._report = report
        self._stop = threading.Event()
        self._count = threading.Lock()
        self._fetched = 0
        self._placed = 0

    def run(self) -> int:
        jobs = self._staging.jobs()
        self._placed = self._staging.bytes_total - sum(job.chunk.size * len(job.places) for job in jobs)
        with ThreadPoolExecutor(self._limits.connections, thread_name_prefix="chunk") as pool:
            pending = {pool.submit(self._do, job) for job in jobs}
            try:
                self._watch(pending)
            finally:
                self._stop.set()
                for future in pending:
                    future.cancel()
        self._report(self._placed, self._staging.bytes_total, 0.0)
        return self._fetched

    def _watch(self, pending: set[Future[None]]) -> None:
        before, since = 0, time.monotonic()
        while pending:
            done, pending = wait(pending, timeout=_REPORT_S, return_when=FIRST_EXCEPTION)
            for future in done:
                future.result()
            now = time.monotonic()
            self._report(self._placed, self._staging.bytes_total, (self._fetched - before) / max(now - since, 1e-3))
            before, since = self._fetched, now

    def _do(self, job: Job) -> None:
        if self._stop.is_set():
            return
        try:
            if not self._from_seed(job):
                self._from_sources(job)
            self._staging.finish(job)
        except OSError as error:
            raise disk_error(self._staging.folder, error) from error
        with self._count:
            self._placed += job.chunk.size * len(job.places)

    def _from_seed(self, job: Job) -> bool:
        seed = self._seeds.get(job.chunk.sha256)
        if seed is None:
            return False
        hasher = sha256()
        try:
            descriptor = os.open(seed.path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
        except OSError:
            return False  # collected meanwhile: the store has it
        try:
            for offset in range(0, job.chunk.size, _COPY_BYTES):
                data = os.pread(descriptor, min(_COPY_BYTES, job.chunk.size - offset), seed.offset + offset)
                hasher.update(data)
                self._staging.write(job.places[0], offset, data)
        finally:
            os.close(descriptor)
        return hasher.hexdigest() == job.chunk.sha256

    def _from_sources(self, job: Job) -> None:
        failure: AgentError = OfflineError("no store is configured")
        for source in self._sources:
            url = f"{source}/blobs/sha256/{job.chunk.blob[:2]}/{job.chunk.blob}"
            backoff = Backoff(first_s=self._limits.retry_first_s, cap_s=self._limits.retry_cap_s)
            transfer = _Transfer(job, url, self._staging, self._opener, self._add_fetched, self._stop)
            for _ in range(self._limits.tries):
                try:
                    transfer.run()
                    return
                except RefusedError as error:
                    failure = _graver(failure, error)
                    break
                except (TransientError, OfflineError, ChunkMismatchError) as error:
                    failure = _graver(failure, error)
                    if self._stop.wait(backoff.next()):
                        raise failure from None
        raise failure

    def _add_fetched(self, size: int) -> None:
        with self._count:
            self._fetched += size


class _Transfer:
    """One chunk from one source; a repeated ``run`` goes on where the last one was cut, if the store does ranges."""

    def __init__(
        self,
        job: Job,
        url: str,
        staging: Staging,
        opener: Opener,
        add_fetched: Callable[[int], None],
        stop: threading.Event,
    ) -> None:
        self._job = job
        self._url = url
        self._staging = staging
        self._opener = opener
        self._add_fetched = add_fetched
        self._stop = stop
        self._validator = ""
        self._restart()

    def run(self) -> None:
        """Receive the rest and check it.

        Raises:
            ChunkMismatchError: too long, or the hash differs; the next run starts from nothing.
            TransientError, OfflineError, RefusedError: as the transport.
        """
        chunk = self._job.chunk
        with closing(self._open()) as body:
            if body.offset != self._received:
                self._restart()
            self._validator = body.validator
            while data := body.read():
                if self._stop.is_set():
                    raise TransientError(f"{self._url}: abandoned")
                self._add_fetched(len(data))
                if self._received + len(data) > chunk.blob_size:
                    self._restart()
                    raise ChunkMismatchError(f"{self._url}: more than the signed {chunk.blob_size} bytes")
                self._take(data)
        if self._received < chunk.blob_size:
            raise TransientError(f"{self._url}: ended after {self._received} of {chunk.blob_size} bytes")
        if self._hasher.hexdigest() != chunk.blob:
            self._restart()
            raise ChunkMismatchError(f"{self._url}: the bytes differ from the signed hash")
        if chunk.codec:
            self._unpack()

    def _open(self) -> Body:
        try:
            return self._opener.open(self._url, offset=self._received, validator=self._validator)
        except RefusedError as error:
            if not self._received:
                raise
            self._restart()  # the rest alone is not to be had
            raise TransientError(str(error)) from error

    def _take(self, data: bytes) -> None:
        self._hasher.update(data)
        if self._job.chunk.codec:
            self._stored += data
        else:
            self._staging.write(self._job.places[0], self._received, data)
        self._received += len(data)

    def _unpack(self) -> None:
        chunk = self._job.chunk
        raw = zstd.decompress(bytes(self._stored), size=chunk.size)
        self._restart()
        if sha256(raw).hexdigest() != chunk.sha256:
            raise ChunkMismatchError(f"{self._url}: the unpacked bytes differ from the signed hash")
        self._staging.write(self._job.places[0], 0, raw)

    def _restart(self) -> None:
        self._received = 0
        self._hasher = sha256()
        self._stored = bytearray()


def _graver(before: AgentError, error: AgentError) -> AgentError:
    """Return the one to report: wrong bytes tell more than no bytes."""
    return before if isinstance(before, ChunkMismatchError) else error
