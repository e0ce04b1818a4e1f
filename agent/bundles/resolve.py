"""Ask the store's signed metadata: which version is it, what does its manifest say, who may command this fleet.

Mirrors are tried in order. One that is away, behind or lying costs time, not the answer; when all fail, wrong
signatures are reported before missing answers. Trust files are used by one process at a time (``Layout.lock``).
Child process only.
"""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from hashlib import sha256
from typing import Final, TypeVar

from agent.bundles.fetcher import Transport
from agent.bundles.layout import Layout
from agent.bundles.manifest import (
    OPERATORS_TARGET,
    Index,
    IndexEntry,
    Manifest,
    Operators,
    parse_index,
    parse_manifest,
    parse_operators,
)
from agent.bundles.names import check_name, check_version, index_target, manifest_target
from agent.bundles.strictjson import SIZE_BYTES_MAX
from agent.bundles.trust import TrustedStore, clock_synchronised, read_anchor
from agent.config import StoreConfig
from agent.durable import disk_errors
from agent.errors import (
    AgentError,
    BundleError,
    ConfigError,
    OfflineError,
    PolicyError,
    StoreError,
    TargetNotFoundError,
    TransientError,
    UntrustedError,
)

_LOCK_WAIT_S: Final = 60.0
_OPERATORS_BYTES_MAX: Final = 256 * 1024

T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class Resolved:
    """A version that signed metadata vouches for."""

    manifest: Manifest
    manifest_bytes: bytes
    manifest_sha256: str
    issued: int  # the timestamp that vouched, Unix seconds
    trusted_time: int  # Unix seconds


class Resolver:
    """Questions to one store.

    Args:
        transport: How to reach it.
        wall: Unix seconds as the system clock has them.
    """

    def __init__(
        self, layout: Layout, store: StoreConfig, transport: Transport, *, wall: Callable[[], float] = time.time
    ) -> None:
        self._layout = layout
        self._store = store
        self._transport = transport
        self._wall = wall

    def version(self, team: str, name: str, version: str, channel: str) -> Resolved:
        """Return the version asked for, or the one ``channel`` points to if ``version`` is empty.

        A refresh also brings the operator keys up to date. When nothing is new it costs two requests.

        Raises:
            TargetNotFoundError: no such model, version or channel, or its team may not sign it.
            PolicyError: the version was revoked.
            ExpiredError, RollbackDetectedError, UntrustedError, UnsafeBundleError: refused.
            OfflineError, TransientError, StoreError, DiskFullError, StateError: store or disk failed.
        """
        check_name(team, "team")
        check_name(name, "name")
        if version:
            check_version(version)

        def ask(trusted: TrustedStore) -> Resolved:
            self._keep_operators(trusted)
            return self._read_version(trusted, team, name, version, channel)

        return self._ask_mirrors(ask)

    def operators(self) -> Operators:
        """Return the operator keys the store names now; raises as ``version``."""
        return self._ask_mirrors(self._read_operators)

    def local_operators(self) -> Operators:
        """Return the operator keys on this box, checked against the metadata on this box.

        Raises:
            StateError: this box has never refreshed.
            TargetNotFoundError: the store names no operators, or what is on disk is not what was signed.
            ExpiredError: the metadata is more than 30 days old.
            UntrustedError: the files on disk do not hold.
        """
        try:
            return self._read_local_operators()
        except BundleError:
            with self._locked():  # a refresh in another process may have been half way
                return self._read_local_operators()

    def _read_local_operators(self) -> Operators:
        trusted = TrustedStore(self._layout, read_anchor(self._store.anchor), wall=self._wall())
        trusted.refresh()
        return self._read_operators(trusted)

    def _read_operators(self, trusted: TrustedStore) -> Operators:
        data = trusted.target(OPERATORS_TARGET, self._layout.operators, size_bytes_max=_OPERATORS_BYTES_MAX)
        return parse_operators(data)

    def _keep_operators(self, trusted: TrustedStore) -> None:
        try:
            self._read_operators(trusted)
        except TargetNotFoundError:
            self._layout.operators.unlink(missing_ok=True)  # withdrawn, or a store without a fleet

    def _read_version(self, trusted: TrustedStore, team: str, name: str, version: str, channel: str) -> Resolved:
        index = parse_index(
            trusted.target(index_target(team, name), self._layout.index(team, name), size_bytes_max=SIZE_BYTES_MAX)
        )
        if (index.team, index.name) != (team, name):
            raise UntrustedError(f"the index of {team}/{name} is {index.team}/{index.name}'s")
        entry = _pick(index, version, channel)
        path = manifest_target(team, name, entry.version)
        digest = trusted.target_info(path).hashes["sha256"]
        if digest != entry.manifest_sha256:
            raise UntrustedError(f"{path}: the index names another manifest than the team's role")
        data = trusted.target(path, self._layout.manifest(digest), size_bytes_max=SIZE_BYTES_MAX)
        manifest = parse_manifest(data)
        if (manifest.team, manifest.name, manifest.version, manifest.seq) != (team, name, entry.version, entry.seq):
            raise UntrustedError(f"{path}: holds {manifest.team}/{manifest.name} {manifest.version} #{manifest.seq}")
        return Resolved(
            manifest=manifest,
            manifest_bytes=data,
            manifest_sha256=sha256(data).hexdigest(),
            issued=trusted.issued,
            trusted_time=trusted.trusted_time,
        )

    def _ask_mirrors(self, ask: Callable[[TrustedStore], T]) -> T:
        anchor = read_anchor(self._store.anchor)
        failure: AgentError = OfflineError("[store] names no urls and no mirrors")
        with self._locked():
            for number, mirror in enumerate(self._store.sources):
                try:
                    trusted = TrustedStore(
                        self._layout,
                        anchor,
                        url=mirror.url,
                        transport=self._transport,
                        wall=self._wall(),
                        synchronised=clock_synchronised(),
                        metadata_timeout_s=self._store.metadata_timeout_s,
                    )
                    trusted.refresh()
                    return ask(trusted)
                except PolicyError:
                    raise
                except (BundleError, StoreError, ConfigError) as error:
                    if number == 0 or (isinstance(error, BundleError) and not isinstance(failure, BundleError)):
                        failure = error
        raise failure

    @contextmanager
    def _locked(self) -> Iterator[None]:
        with disk_errors(self._layout.root):
            self._layout.root.mkdir(parents=True, exist_ok=True, mode=0o700)
            descriptor = os.open(self._layout.lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            try:
                _wait_for_lock(descriptor)
                yield
            finally:
                os.close(descriptor)


def _wait_for_lock(descriptor: int) -> None:
    deadline = time.monotonic() + _LOCK_WAIT_S
    while True:
        try:
            return fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            if time.monotonic() > deadline:
                raise TransientError("another process has been using the trust files for a minute") from error
        time.sleep(0.02)


def _pick(index: Index, version: str, channel: str) -> IndexEntry:
    if not version:
        version = index.channels.get(channel, "")
        if not version:
            raise TargetNotFoundError(f"{index.team}/{index.name} has no channel {channel!r}")
    for entry in index.versions:
        if entry.version == version:
            if entry.status == "revoked":
                raise PolicyError(
                    f"{index.team}/{index.name} {version} was revoked: {entry.reason or 'no reason given'}"
                )
            return entry
    raise TargetNotFoundError(f"{index.team}/{index.name} has no version {version}")
