"""Ask the store's signed metadata: which version is it, what does its manifest say, who may command this fleet.

Mirrors are tried in order. One that is away, behind or lying costs time, not the answer; when all fail, wrong
signatures are reported before missing answers. A medium (a USB stick) that is newer than what this box has is a store
like any other; of an older one the metadata is ignored, and it only gives bytes for which the box's own vouches.
Trust files are used by one process at a time (``Layout.lock``). Child process only.
"""

from __future__ import annotations

import fcntl
import json
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Final, TypeVar

from agent.bundles.attempt import Attempt, write_attempt
from agent.bundles.bodies import RefusedError
from agent.bundles.fetcher import Transport
from agent.bundles.floor import BUILD_TIME
from agent.bundles.freshness import Origin, approved_until, judge, obstacle
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
    ExpiredError,
    OfflineError,
    PolicyError,
    RollbackDetectedError,
    StateError,
    StoreError,
    TargetNotFoundError,
    TransientError,
    UntrustedError,
)

_LOCK_WAIT_S: Final = 60.0
_OPERATORS_BYTES_MAX: Final = 256 * 1024

OnRefused = Callable[[str, BundleError], None]
T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class Resolved:
    """A version that signed metadata vouches for."""

    manifest: Manifest
    manifest_bytes: bytes
    manifest_sha256: str
    issued: int  # the timestamp that vouched, Unix seconds
    trusted_time: int  # Unix seconds
    origin: Origin = Origin.NETWORK

    @property
    def approved_until(self) -> int:
        """Until when it may be activated once it was fetched, Unix seconds."""
        return approved_until(self.origin, self.issued)


@dataclass(frozen=True, slots=True, kw_only=True)
class Surveyed:
    """The indexes of some models. ``missing``: why a model has none, by team and name."""

    issued: int
    trusted_time: int
    origin: Origin
    indexes: tuple[Index, ...]
    missing: Mapping[tuple[str, str], str]


class Resolver:
    """Questions to one store.

    Args:
        transport: How to reach it.
        wall: Unix seconds as the system clock has them.
        synchronised: Whether that clock follows a time server; default: as the kernel says.
        on_refused: Told of each mirror whose answer was refused and is not what is raised.
        from_medium: ``store`` names one medium.
    """

    def __init__(
        self,
        layout: Layout,
        store: StoreConfig,
        transport: Transport,
        *,
        wall: Callable[[], float] = time.time,
        synchronised: Callable[[], bool] | None = None,
        on_refused: OnRefused = lambda url, error: None,
        from_medium: bool = False,
    ) -> None:
        self._from_medium = from_medium
        self._layout = layout
        self._store = store
        self._transport = transport
        self._wall = wall
        self._synchronised = synchronised or clock_synchronised
        self._on_refused = on_refused

    def version(self, team: str, name: str, version: str, channel: str, *, activate: bool = False) -> Resolved:
        """Return the version asked for, or the one ``channel`` points to if ``version`` is empty.

        A refresh also brings the operator keys up to date. When nothing is new it costs two requests. With ``activate``
        what vouches must be fresh enough for a version that has not served before.

        Raises:
            TargetNotFoundError: no such model, version or channel, or its team may not sign it.
            PolicyError: the version was revoked.
            ExpiredError, RollbackDetectedError, UntrustedError, UnsafeBundleError: refused.
            OfflineError, TransientError, StoreError, DiskFullError, StateError: store or disk failed.
        """
        _check_names(team, name, version)

        def ask(trusted: TrustedStore, origin: Origin) -> Resolved:
            self._keep_operators(trusted)
            resolved = self._read_version(trusted, origin, team, name, version, channel)
            if activate:
                self.require_timely(resolved)
            return resolved

        return self._ask(ask)

    def local_version(self, team: str, name: str, version: str, channel: str) -> Resolved:
        """Return a version as the metadata on this box has it, without network.

        Raises:
            TargetNotFoundError, PolicyError, UntrustedError: as ``version``.
            ExpiredError: the metadata is more than 30 days old.
            StateError: this box has never refreshed.
        """
        _check_names(team, name, version)
        with self._locked():
            trusted = self._local()
            return self._read_version(trusted, Origin.APPROVED, team, name, version, channel)

    def require_timely(self, resolved: Resolved) -> None:
        """Raise ``ExpiredError`` if ``resolved`` may not be activated now by what was known when it was resolved."""
        if resolved.origin is Origin.APPROVED:
            return  # judged by what was recorded when it was fetched
        standing = judge(
            issued=resolved.issued, wall=self._wall(), floor=max(BUILD_TIME, resolved.trusted_time), refused=False
        )
        reason = obstacle(resolved.origin, standing)
        if reason:
            raise ExpiredError(f"{resolved.manifest.name} {resolved.manifest.version}: {reason}")

    def require_sound(self) -> None:
        """Check the signatures of what is on disk, without network.

        Raises:
            StateError, ExpiredError, UntrustedError, ...: as ``local_operators``.
        """
        with self._locked():
            self._local()

    def survey(self, models: Sequence[tuple[str, str]]) -> Surveyed:
        """Refresh and return the indexes of ``models`` (team, name); raises as ``version``."""
        for team, name in models:
            _check_names(team, name, "")

        def ask(trusted: TrustedStore, origin: Origin) -> Surveyed:
            self._keep_operators(trusted)
            indexes, missing = [], {}
            for team, name in models:
                try:
                    indexes.append(self._read_index(trusted, team, name))
                except TargetNotFoundError as error:
                    missing[team, name] = str(error)
            return Surveyed(
                issued=trusted.issued,
                trusted_time=trusted.trusted_time,
                origin=origin,
                indexes=tuple(indexes),
                missing=missing,
            )

        return self._ask(ask)

    def operators(self) -> Operators:
        """Return the operator keys the store names now; raises as ``version``."""
        return self._ask(lambda trusted, origin: self._read_operators(trusted))

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
        except (BundleError, StateError):
            with self._locked():  # a refresh in another process may have been half way
                return self._read_local_operators()

    def _read_local_operators(self) -> Operators:
        return self._read_operators(self._local())

    def _local(self) -> TrustedStore:
        """Return what is on disk, verified without network."""
        trusted = TrustedStore(self._layout, read_anchor(self._store.anchor), wall=self._wall())
        trusted.refresh()
        return trusted

    def _read_operators(self, trusted: TrustedStore) -> Operators:
        data = trusted.target(OPERATORS_TARGET, self._layout.operators, size_bytes_max=_OPERATORS_BYTES_MAX)
        return parse_operators(data)

    def _keep_operators(self, trusted: TrustedStore) -> None:
        try:
            self._read_operators(trusted)
        except TargetNotFoundError:
            self._layout.operators.unlink(missing_ok=True)  # withdrawn, or a store without a fleet
        except StoreError:
            if not self._from_medium:
                raise  # a medium need not carry them

    def _read_index(self, trusted: TrustedStore, team: str, name: str) -> Index:
        index = parse_index(self._target(trusted, index_target(team, name), self._layout.index(team, name)))
        if (index.team, index.name) != (team, name):
            raise UntrustedError(f"the index of {team}/{name} is {index.team}/{index.name}'s")
        return index

    def _target(self, trusted: TrustedStore, path: str, cache: Path) -> bytes:
        """Return a target; a medium need not hold all that its metadata lists."""
        try:
            return trusted.target(path, cache, size_bytes_max=SIZE_BYTES_MAX)
        except RefusedError as error:
            if self._from_medium:
                raise TargetNotFoundError(f"{path} is not on this medium") from error
            raise

    def _read_version(
        self, trusted: TrustedStore, origin: Origin, team: str, name: str, version: str, channel: str
    ) -> Resolved:
        index = self._read_index(trusted, team, name)
        entry = _pick(index, version, channel)
        path = manifest_target(team, name, entry.version)
        digest = trusted.target_info(path).hashes["sha256"]
        if digest != entry.manifest_sha256:
            raise UntrustedError(f"{path}: the index names another manifest than the team's role")
        data = self._target(trusted, path, self._layout.manifest(digest))
        manifest = parse_manifest(data)
        if (manifest.team, manifest.name, manifest.version, manifest.seq) != (team, name, entry.version, entry.seq):
            raise UntrustedError(f"{path}: holds {manifest.team}/{manifest.name} {manifest.version} #{manifest.seq}")
        return Resolved(
            manifest=manifest,
            manifest_bytes=data,
            manifest_sha256=sha256(data).hexdigest(),
            issued=trusted.issued,
            trusted_time=trusted.trusted_time,
            origin=origin,
        )

    def _ask(self, ask: Callable[[TrustedStore, Origin], T]) -> T:
        return self._ask_medium(ask) if self._from_medium else self._ask_mirrors(ask)

    def _ask_medium(self, ask: Callable[[TrustedStore, Origin], T]) -> T:
        url = self._store.sources[0].url
        with self._locked():
            try:
                answer = self._refreshed(url, Origin.STICK, ask)
            except (RollbackDetectedError, ExpiredError):
                if not self._is_older(url):
                    raise
                return self._refreshed(url, Origin.MIRROR, ask)
            self._note(url, None)
            return answer

    def _is_older(self, url: str) -> bool:
        """Say whether the medium itself claims to be no newer than this box; its metadata is ignored then."""
        try:
            data = self._transport.read_all(
                f"{url}/metadata/timestamp.json",
                size_bytes_max=SIZE_BYTES_MAX,
                timeout_s=self._store.metadata_timeout_s,
            )
            return _claimed_version(data) <= _claimed_version((self._layout.metadata / "timestamp.json").read_bytes())
        except (AgentError, OSError, ValueError, TypeError, KeyError, RecursionError):
            return False

    def _refreshed(self, url: str, origin: Origin, ask: Callable[[TrustedStore, Origin], T]) -> T:
        trusted = TrustedStore(
            self._layout,
            read_anchor(self._store.anchor),
            url=url,
            transport=self._transport,
            wall=self._wall(),
            synchronised=self._synchronised(),
            metadata_timeout_s=self._store.metadata_timeout_s,
            own_metadata=origin is Origin.MIRROR,
        )
        trusted.refresh()
        return ask(trusted, origin)

    def _note(self, url: str, error: AgentError | None) -> None:
        at = int(max(self._wall(), BUILD_TIME))
        if error is None:
            write_attempt(self._layout.attempt, Attempt(at=at, source=url))
        else:
            refused = isinstance(error, BundleError)
            attempt = Attempt(at=at, source=url, code=error.code, message=str(error), refused=refused)
            write_attempt(self._layout.attempt, attempt)

    def _ask_mirrors(self, ask: Callable[[TrustedStore, Origin], T]) -> T:
        failure: AgentError = OfflineError("[store] names no urls and no mirrors")
        refused: list[tuple[str, BundleError]] = []
        verified = False
        with self._locked():
            for number, mirror in enumerate(self._store.sources):
                try:
                    answer = self._refreshed(mirror.url, Origin.NETWORK, ask)
                except (PolicyError, TargetNotFoundError) as error:  # the metadata holds
                    self._note(mirror.url, None)
                    verified = True
                    if isinstance(error, PolicyError):
                        raise
                    failure = failure if isinstance(failure, BundleError) else error
                except (BundleError, StoreError, ConfigError) as error:
                    if isinstance(error, BundleError):
                        refused.append((mirror.url, error))
                    if number == 0 or (isinstance(error, BundleError) and not isinstance(failure, BundleError)):
                        failure = error
                else:
                    self._note(mirror.url, None)
                    self._tell(refused)
                    return answer
            if self._store.sources and not verified:
                self._note(", ".join(mirror.url for mirror in self._store.sources), failure)
        self._tell([(url, error) for url, error in refused if error is not failure])
        raise failure

    def _tell(self, refused: Sequence[tuple[str, BundleError]]) -> None:
        for url, error in refused:
            self._on_refused(url, error)

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


def _check_names(team: str, name: str, version: str) -> None:
    check_name(team, "team")
    check_name(name, "name")
    if version:
        check_version(version)


def _claimed_version(data: bytes) -> int:
    return int(json.loads(data)["signed"]["version"])


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
