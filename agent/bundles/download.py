"""Bring a bundle's missing chunks into its staging folder: parallel, resumable, each byte hashed before it counts.

Chunks found in versions already on this box are copied (and hashed) instead of fetched; a transfer that is cut goes on
where it was, if the store does ranges. What has come is synced in the background, many chunks at a time. Promises:
nothing outside the staging folder is written; a chunk counts only if its hash holds; at most ``tries`` per chunk and
source; no byte over the budget of a metered link. Absent on purpose: whole-file hashes (``whole.py``), placement
(``assemble.py``), trust in the manifest (``trust.py``). Child process only: uses threads and urllib3.
"""

from __future__ import annotations

import os
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from contextlib import closing
from dataclasses import dataclass
from hashlib import sha256
from typing import Final, Protocol

from agent.backoff import Backoff
from agent.bundles import zstd
from agent.bundles.bodies import Body, RefusedError
from agent.bundles.budget import Budget
from agent.bundles.reuse import Seed
from agent.bundles.staging import Job, Staging
from agent.config import MirrorConfig
from agent.durable import disk_error
from agent.errors import AgentError, BudgetError, ChunkMismatchError, ConfigError, OfflineError, TransientError

_COPY_BYTES: Final = 1 << 20
_REPORT_S: Final = 0.5
_RATE_S: Final = 5.0  # over which the rate is averaged
_UNMETERED_RETRY_S: Final = 600.0  # with the budget spent, a mirror that costs nothing may come back meanwhile

Report = Callable[[int, int, float], None]  # bytes in place or arriving, bytes in all, bytes per second from the store


class Opener(Protocol):
    """The part of ``fetcher.Transport`` used here."""

    def open(self, url: str, *, offset: int = 0, validator: str = "") -> Body: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """How hard a pull may try."""

    connections: int = 4
    tries: int = 3  # per chunk and source
    retry_first_s: float = 0.25
    retry_cap_s: float = 5.0


def download(
    staging: Staging,
    sources: Sequence[MirrorConfig],
    opener: Opener,
    seeds: Mapping[str, Seed],
    limits: Limits,
    budget: Budget,
    report: Report,
    arrived: Callable[[], None] = lambda: None,
) -> int:
    """Complete ``staging`` (which is open); return the bytes that came from the store.

    Args:
        sources: Stores, tried in order.
        seeds: Raw chunk hash to a place on this box that may hold it; hashed again before use.
        budget: Charged for what metered sources bring.
        report: Called every half second, and at the end, from this thread.
        arrived: Called from any thread whenever another chunk counts.

    Raises:
        ChunkMismatchError: every source keeps giving other bytes than were signed.
        BudgetError: only metered sources could give a chunk, and their bytes are spent.
        OfflineError, TransientError, StoreError: no source could give a chunk.
        DiskFullError: the disk filled up meanwhile; finished chunks stay for the next try.
    """
    return _Pull(staging, sources, opener, seeds, limits, budget, report, arrived).run()


class _Tally:
    """What the threads of a pull have done, for people to look at."""

    def __init__(self, placed: int) -> None:
        self.fetched = 0
        self._placed = placed
        self._shown = 0
        self._under_way: set[_Transfer] = set()
        self._lock = threading.Lock()
        self._history: deque[tuple[float, int]] = deque([(time.monotonic(), 0)])

    def add_fetched(self, size: int) -> None:
        """Count bytes of the network."""
        with self._lock:
            self.fetched += size

    def begin(self, transfer: _Transfer) -> None:
        """Count what ``transfer`` has received as arriving."""
        with self._lock:
            self._under_way.add(transfer)

    def end(self, transfer: _Transfer) -> None:
        """Count no more of ``transfer``."""
        with self._lock:
            self._under_way.discard(transfer)

    def add_placed(self, size: int) -> None:
        """Count bytes that are where they belong."""
        with self._lock:
            self._placed += size

    def progress(self) -> int:
        """Return the bytes in place or arriving; a chunk that is begun anew takes nothing back."""
        with self._lock:
            self._shown = max(self._shown, self._placed + sum(transfer.share for transfer in self._under_way))
            return self._shown

    def rate(self) -> float:
        """Return bytes per second from the network, averaged over the last seconds."""
        now = time.monotonic()
        self._history.append((now, self.fetched))
        while len(self._history) > 2 and now - self._history[0][0] > _RATE_S:
            self._history.popleft()
        since, before = self._history[0]
        return (self.fetched - before) / max(now - since, 1e-3)


class _Pull:
    """One run of ``download``; the threads share it."""

    def __init__(
        self,
        staging: Staging,
        sources: Sequence[MirrorConfig],
        opener: Opener,
        seeds: Mapping[str, Seed],
        limits: Limits,
        budget: Budget,
        report: Report,
        arrived: Callable[[], None],
    ) -> None:
        self._staging = staging
        self._sources = sources
        self._opener = opener
        self._seeds = seeds
        self._limits = limits
        self._budget = budget
        self._report = report
        self._arrived = arrived
        self._faults: Counter[str] = Counter()  # by source
        self._stop = threading.Event()
        self._jobs = staging.jobs()
        missing = sum(job.chunk.size * len(job.places) for job in self._jobs)
        self._tally = _Tally(staging.bytes_total - missing)

    def run(self) -> int:
        with (
            ThreadPoolExecutor(self._limits.connections, thread_name_prefix="chunk") as pool,
            ThreadPoolExecutor(1, thread_name_prefix="sync") as syncer,
        ):
            pending = {pool.submit(self._do, job) for job in self._jobs}
            try:
                self._watch(pending, syncer)
            finally:
                self._stop.set()
                for future in pending:
                    future.cancel()
        self._sync()
        self._report(self._staging.bytes_total, self._staging.bytes_total, self._tally.rate())
        return self._tally.fetched

    def _watch(self, pending: set[Future[None]], syncer: ThreadPoolExecutor) -> None:
        """Tell how it goes, keep one sync under way, raise the first failure."""
        sync = syncer.submit(self._sync)
        while pending:
            done, pending = wait(pending, timeout=_REPORT_S, return_when=FIRST_EXCEPTION)
            for future in done:
                future.result()
            if sync.done():
                sync.result()
                sync = syncer.submit(self._sync)
            self._report(self._tally.progress(), self._staging.bytes_total, self._tally.rate())
        sync.result()

    def _sync(self) -> None:
        try:
            self._staging.sync()
        except OSError as error:
            raise disk_error(self._staging.folder, error) from error

    def _do(self, job: Job) -> None:
        if self._stop.is_set():
            return
        try:
            if not self._from_seed(job):
                self._from_sources(job)
            self._staging.finish(job)
        except OSError as error:
            raise disk_error(self._staging.folder, error) from error
        self._tally.add_placed(job.chunk.size * len(job.places))
        self._arrived()

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
        for source in sorted(self._sources, key=lambda source: self._faults[source.url]):
            try:
                self._from_source(job, source)
                return
            except (TransientError, OfflineError, ChunkMismatchError) as error:
                self._faults[source.url] += 1  # those that work come first from now on
                failure = _graver(failure, error)
                if self._stop.is_set():
                    break
            except (RefusedError, BudgetError, ConfigError) as error:
                failure = _graver(failure, error)
        if isinstance(failure, BudgetError) and not all(map(_is_metered, self._sources)):
            failure.retry_after_s = min(failure.retry_after_s, _UNMETERED_RETRY_S)
        raise failure

    def _from_source(self, job: Job, source: MirrorConfig) -> None:
        """Try one source as often as it is worth it; raise its last failure."""
        url = f"{source.url.rstrip('/')}/blobs/sha256/{job.chunk.blob[:2]}/{job.chunk.blob}"
        backoff = Backoff(first_s=self._limits.retry_first_s, cap_s=self._limits.retry_cap_s)
        budget = self._budget if _is_metered(source) else None
        transfer = _Transfer(job, url, self._staging, self._opener, budget, self._tally.add_fetched, self._stop)
        for tries_left in reversed(range(self._limits.tries)):
            self._tally.begin(transfer)
            try:
                transfer.run()
                break
            except (TransientError, OfflineError, ChunkMismatchError):
                if not tries_left or self._stop.wait(backoff.next()):
                    raise
            finally:
                self._tally.end(transfer)


class _Transfer:
    """One chunk from one source; a repeated ``run`` goes on where the last one was cut, if the store does ranges."""

    def __init__(
        self,
        job: Job,
        url: str,
        staging: Staging,
        opener: Opener,
        budget: Budget | None,
        add_fetched: Callable[[int], None],
        stop: threading.Event,
    ) -> None:
        self._job = job
        self._url = url
        self._staging = staging
        self._opener = opener
        self._budget = budget
        self._add_fetched = add_fetched
        self._stop = stop
        self._validator = ""
        self._come = 0  # bytes of all runs together
        self._restart()

    @property
    def share(self) -> int:
        """How much of the raw chunk has been received, in its bytes."""
        chunk = self._job.chunk
        return self._received * chunk.size // chunk.blob_size * len(self._job.places)

    def run(self) -> None:
        """Receive the rest and check it.

        Raises:
            ChunkMismatchError: too long, or the hash differs; the next run starts from nothing.
            BudgetError: the rest is over the budget.
            TransientError, OfflineError, RefusedError: as the transport.
        """
        if self._budget is None:
            self._receive()
        else:
            self._receive_charged(self._budget)
        chunk = self._job.chunk
        if self._received < chunk.blob_size:
            raise TransientError(f"{self._url}: ended after {self._received} of {chunk.blob_size} bytes")
        if self._hasher.hexdigest() != chunk.blob:
            self._restart()
            raise ChunkMismatchError(f"{self._url}: the bytes differ from the signed hash")
        if chunk.codec:
            self._unpack()

    def _receive_charged(self, budget: Budget) -> None:
        charged = self._job.chunk.blob_size - self._received
        budget.charge(charged)
        before = self._come
        try:
            self._receive()
        finally:
            budget.settle(charged, self._come - before)

    def _receive(self) -> None:
        chunk = self._job.chunk
        with closing(self._open()) as body:
            if body.offset != self._received:
                self._restart()
            self._validator = body.validator
            while data := body.read():
                if self._stop.is_set():
                    raise TransientError(f"{self._url}: abandoned")
                self._come += len(data)
                self._add_fetched(len(data))
                if self._received + len(data) > chunk.blob_size:
                    self._restart()
                    raise ChunkMismatchError(f"{self._url}: more than the signed {chunk.blob_size} bytes")
                self._take(data)

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
        stored = self._stored
        self._restart()
        hasher, offset = sha256(), 0
        for piece in zstd.pieces(stored, size=chunk.size):
            hasher.update(piece)
            self._staging.write(self._job.places[0], offset, piece)
            offset += len(piece)
        if hasher.hexdigest() != chunk.sha256:
            raise ChunkMismatchError(f"{self._url}: the unpacked bytes differ from the signed hash")

    def _restart(self) -> None:
        self._received = 0
        self._hasher = sha256()
        self._stored = bytearray()


def _is_metered(source: MirrorConfig) -> bool:
    return source.metered and not source.url.startswith("file://")


def _graver(before: AgentError, error: AgentError) -> AgentError:
    """Return the one to report: wrong bytes tell more than a spent budget, and that more than no bytes."""
    if isinstance(before, ChunkMismatchError):
        return before
    return before if isinstance(before, BudgetError) and not isinstance(error, ChunkMismatchError) else error
