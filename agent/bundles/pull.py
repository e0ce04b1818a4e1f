"""Bring one resolved version to this box.

The steps and their order: choose variants, stage, download, hash whole files, check contents, rename into
``versions/``. Promises: ``versions/`` changes by that one rename or not at all; nothing that cannot or may not run here
is downloaded. Child process only.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final

from agent.bundles.assemble import install, recover
from agent.bundles.budget import Budget
from agent.bundles.download import Limits, download
from agent.bundles.fetcher import Transport
from agent.bundles.layout import Layout
from agent.bundles.recheck import Emit, HashProgress, done_line
from agent.bundles.resolve import Resolved
from agent.bundles.reuse import find_seeds, take_whole_files
from agent.bundles.staging import Staging
from agent.bundles.variants import Box, files_needed, select
from agent.bundles.verify import VERIFIED_SCHEMA, Verified, check_version_directory
from agent.bundles.versions import collect_staging, discard, empty_trash, local_manifests
from agent.bundles.whole import WholeHashes
from agent.config import StoreConfig
from agent.durable import disk_errors
from agent.errors import AgentError, ChunkMismatchError, PolicyError, UnsafeBundleError, UntrustedError

_REPAIR_ROUNDS: Final = 2  # downloads after which the parts still do not add up


def fetch(
    resolved: Resolved, box: Box, layout: Layout, store: StoreConfig, transport: Transport, emit: Emit
) -> dict[str, Any]:
    """Bring ``resolved`` to this box and return the ``done`` line; a version that is here and whole is not fetched.

    Raises:
        NoVariantError, PolicyError: nothing of it can or may run here; nothing was downloaded.
        DiskFullError: not enough space, before or during the pull; finished chunks stay for the next try.
        ChunkMismatchError, UntrustedError, UnsafeBundleError: refused.
        OfflineError, TransientError, BudgetError, StoreError: no source gave a chunk.
    """
    manifest = resolved.manifest
    selection = select(manifest, box)
    wanted = files_needed(manifest, selection.usable)
    size = sum(manifest.file(path).size for path in wanted)
    if size > store.bundle_bytes_max:
        raise PolicyError(f"{size} bytes, and [store] bundle_bytes_max is {store.bundle_bytes_max}")
    path = layout.version(manifest.team, manifest.name, manifest.version, resolved.manifest_sha256)
    fetched = 0
    with disk_errors(layout.root):
        if _is_complete(path, wanted, emit):
            emit(resolved_line(resolved, size, 0))
        else:
            collect_staging(layout, now=time.time())
            staging = Staging(layout.staging / resolved.manifest_sha256, manifest, wanted)
            fetched = _bring(staging, resolved, layout, store, transport, emit)
    return done_line(path, manifest, resolved.manifest_sha256, selection, fetched)


def resolved_line(resolved: Resolved, bytes_total: int, bytes_missing: int) -> dict[str, Any]:
    """Return the ``resolved`` line. ``bytes_missing`` are expected to come over the wire."""
    manifest = resolved.manifest
    return {
        "event": "resolved",
        "team": manifest.team,
        "name": manifest.name,
        "version": manifest.version,
        "seq": manifest.seq,
        "manifest_sha256": resolved.manifest_sha256,
        "bytes_total": bytes_total,
        "bytes_missing": bytes_missing,
    }


def _bring(
    staging: Staging, resolved: Resolved, layout: Layout, store: StoreConfig, transport: Transport, emit: Emit
) -> int:
    """Download and install; return the bytes that came from the store."""
    staging.acquire()
    try:
        recover(staging)
        staging.open(disk_reserve_bytes=store.disk_reserve_bytes)
        fetched = _complete(staging, resolved, layout, store, transport, emit)
        paths = [resolved.manifest.files[number].path for number in staging.numbers]
        install(staging, resolved.manifest_bytes, _record(resolved, paths), layout)
    except (UnsafeBundleError, UntrustedError):
        discard(layout, staging.folder)  # nothing of it is worth resuming
        empty_trash(layout)
        raise
    finally:
        staging.close()
    return fetched


def _complete(
    staging: Staging, resolved: Resolved, layout: Layout, store: StoreConfig, transport: Transport, emit: Emit
) -> int:
    """Download until every part is what was signed; return the bytes that came from the store."""
    manifest = resolved.manifest
    limits = Limits(connections=store.connections, tries=store.tries)
    budget = Budget(layout.budget, size_bytes=store.budget_bytes, window_s=store.budget_window_s)
    fetched = 0
    for number in range(_REPAIR_ROUNDS):
        local = list(local_manifests(layout, team=manifest.team, name=manifest.name))
        if number == 0:
            take_whole_files(staging, local, store.link_mode)
        jobs = staging.jobs()
        seeds = find_seeds(local, (job.chunk.sha256 for job in jobs))
        if number == 0:
            missing = sum(job.chunk.blob_size for job in jobs if job.chunk.sha256 not in seeds)
            emit(resolved_line(resolved, staging.bytes_total, missing))
        with WholeHashes(staging) as hashes:
            fetched += download(
                staging, store.sources, transport, seeds, limits, budget, _progress(emit), arrived=hashes.wake
            )
            progress = HashProgress(emit, staging.bytes_total)
            progress.begin(hashes.hashed)
            damaged = hashes.damaged(progress.add)
        if not damaged:
            return fetched
        for file_number in damaged:
            if not staging.forget(file_number):
                path = manifest.files[file_number].path
                raise UntrustedError(f"{path}: each chunk is as signed, the whole is not")
    raise ChunkMismatchError("this disk does not keep what is written to it")


def _is_complete(path: Path, wanted: Sequence[str], emit: Emit) -> bool:
    if not path.exists():
        return False
    try:
        _, record = check_version_directory(path, HashProgress(emit, 0).add)
    except AgentError:
        return False  # damaged: it is built anew, its good chunks serve as seeds
    return set(wanted) <= set(record.files)


def _record(resolved: Resolved, files: Sequence[str]) -> Verified:
    manifest = resolved.manifest
    return Verified(
        schema=VERIFIED_SCHEMA,
        team=manifest.team,
        name=manifest.name,
        version=manifest.version,
        seq=manifest.seq,
        manifest_sha256=resolved.manifest_sha256,
        files=tuple(files),
        timestamp=resolved.issued,
        verified=resolved.trusted_time,
        approved_until=resolved.approved_until,
    )


def _progress(emit: Emit) -> Callable[[int, int, float], None]:
    def report(done: int, total: int, rate: float) -> None:
        emit({"event": "progress", "bytes_done": done, "bytes_total": total, "rate_bps": round(rate)})

    return report
