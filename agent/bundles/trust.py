"""The TUF client: which targets the store's signers vouch for, as of now.

python-tuf's ``Updater`` with what an appliance needs on top: every write is synced and renamed; the anchor root of the
read-only package is always the start, so torn files heal; the reference time is trusted time, never before the newest
verified signature; versions below the floor are refused even when the metadata cache was lost; all failures are classes
of ``agent.errors``.

Promises: nothing is stored before it is verified, and nothing verified is replaced by something older. One refresh per
object. Online the caller holds ``Layout.lock``; offline nothing is written. Child process only: imports tuf.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from hashlib import sha256
from pathlib import Path
from typing import Final

from tuf.api import exceptions as tuf
from tuf.api.metadata import Metadata, Root, Snapshot, TargetFile, Targets, Timestamp
from tuf.ngclient.config import UpdaterConfig
from tuf.ngclient.fetcher import FetcherInterface
from tuf.ngclient.updater import Updater

from agent.bundles.bodies import RefusedError
from agent.bundles.fetcher import MetadataFetcher, Transport
from agent.bundles.floor import BUILD_TIME, Floor, FloorFile
from agent.bundles.freshness import OFFLINE_AGE_S_MAX
from agent.bundles.layout import Layout
from agent.durable import write_file
from agent.errors import (
    ConfigError,
    DiskFullError,
    ExpiredError,
    RollbackDetectedError,
    StateError,
    TargetNotFoundError,
    TransientError,
    UnsafeBundleError,
    UntrustedError,
)

AHEAD_S_MAX: Final = 86_400  # a signature may be dated so far ahead of a synchronised clock
_DISK_FULL: Final = frozenset({28, 122})  # ENOSPC, EDQUOT
_CONFIG: Final = UpdaterConfig(max_root_rotations=256, max_delegations=32)


class TrustedStore:
    """One store as its signers describe it.

    Args:
        layout: Where verified files are kept.
        anchor: The root metadata that this box was built with.
        url: Base of the store, without its ``metadata/``; empty for offline use.
        transport: How to reach it; ``None``: offline, from what is on disk.
        wall: Unix seconds as the system clock has them.
        synchronised: Whether the system clock follows a time server.
        build_time: Unix seconds no clock is believed to be before.
        metadata_timeout_s: For the whole of one metadata file.
        own_metadata: The metadata on this box counts, as it does offline; ``transport`` only gives bytes of targets.
    """

    def __init__(
        self,
        layout: Layout,
        anchor: bytes,
        *,
        url: str = "",
        transport: Transport | None = None,
        wall: float,
        synchronised: bool = False,
        build_time: int = BUILD_TIME,
        metadata_timeout_s: float = 30.0,
        own_metadata: bool = False,
    ) -> None:
        self._offline = own_metadata or transport is None
        self._layout = layout
        self._url = url.rstrip("/")
        self._transport = transport
        self._timeout_s = metadata_timeout_s
        self._floors = FloorFile(layout.floors)
        fetcher: FetcherInterface = (
            MetadataFetcher(transport, timeout_s=metadata_timeout_s)
            if transport is not None and not own_metadata
            else _LocalFetcher(layout.metadata)
        )
        with _translated(self._url or "local metadata"):
            if not self._offline:
                layout.metadata.mkdir(parents=True, exist_ok=True, mode=0o700)
            self._updater = _DurableUpdater(
                layout,
                "local:/" if self._offline else f"{self._url}/metadata/",
                fetcher,
                anchor,
                floor=self._read_floor(),
                wall=wall,
                synchronised=synchronised,
                build_time=build_time,
                offline=self._offline,
            )

    @property
    def issued(self) -> int:
        """Unix seconds when the trusted timestamp was signed."""
        return self._updater.issued

    @property
    def trusted_time(self) -> int:
        """Unix seconds against which expiry was judged."""
        return self._updater.trusted_time

    @property
    def consistent_snapshot(self) -> bool:
        """Whether targets are stored under names that begin with their hash."""
        return self._updater.consistent_snapshot

    def refresh(self) -> None:
        """Bring root, timestamp, snapshot and targets up to date and raise the floor.

        Raises:
            ExpiredError: the store, or offline what is on disk, is out of date.
            RollbackDetectedError: older than what was verified before.
            UntrustedError: a signature, threshold, hash, length or date does not hold.
            OfflineError, TransientError, StoreError: the store cannot be reached or lacks a file.
            DiskFullError, StateError: the local files.
        """
        with _translated(self._url or "local metadata"):
            self._updater.refresh()
            self._remember()

    def target(self, path: str, cache: Path, *, size_bytes_max: int) -> bytes:
        """Return a target's verified bytes, from ``cache`` if it holds them, else from the store and then cached.

        ``size_bytes_max`` bounds what is fetched into memory.

        Raises:
            TargetNotFoundError: nobody who may sign ``path`` lists it.
            UnsafeBundleError: larger than ``size_bytes_max``.
            StoreError, ...: as ``refresh``.
        """
        with _translated(f"{self._url}: {path}"):
            info = self.target_info(path)
            if info.length > size_bytes_max:
                raise UnsafeBundleError(f"{path}: {info.length} bytes, at most {size_bytes_max} are allowed")
            if (data := _cached(cache, info)) is not None:
                return data
            if self._transport is None:
                raise TargetNotFoundError(f"{path}: not on this box, or not what the signed metadata names")
            digest = info.hashes["sha256"]
            folder, _, name = path.rpartition("/")
            url = f"{self._url}/targets/{folder}/{digest}.{name}"
            data = self._transport.read_all(url, size_bytes_max=info.length, timeout_s=self._timeout_s)
            info.verify_length_and_hashes(data)
            cache.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            write_file(cache, data)
            return data

    def target_info(self, path: str) -> TargetFile:
        """Return the signed length and sha256 of ``path``; ``TargetNotFoundError`` if nobody may vouch for it."""
        with _translated(f"{self._url}: {path}"):
            info = self._updater.get_targetinfo(path)
            self._remember()
        if info is None:
            raise TargetNotFoundError(f"{path}: the store has no such target, or its team may not sign it")
        if "sha256" not in info.hashes:
            raise UntrustedError(f"{path}: signed without a sha256")
        return info

    def _read_floor(self) -> Floor | StateError:
        try:
            return self._floors.read() or Floor()
        except StateError as error:
            return error

    def _remember(self) -> None:
        if self._offline:
            return
        before = self._updater.floor
        after = before.raised(self._updater.versions(), refreshed=self._updater.trusted_time)
        if after.roles != before.roles or after.refreshed - before.refreshed >= 60:
            self._floors.write(after)
            self._updater.floor = after


class _DurableUpdater(Updater):
    """python-tuf's workflow with our writes, our floor and our time.

    ``_trusted_set`` and the overridden methods are private to tuf 7: ``test_pull_trust.py`` holds each.
    """

    def __init__(
        self,
        layout: Layout,
        metadata_url: str,
        fetcher: FetcherInterface,
        anchor: bytes,
        *,
        floor: Floor | StateError,
        wall: float,
        synchronised: bool,
        build_time: int,
        offline: bool,
    ) -> None:
        self.floor = Floor()  # in force from the walk to the newest root on
        self._stored_floor = floor
        self._wall = wall
        self._synchronised = synchronised
        self._build_time = build_time
        self._offline = offline
        self.trusted_time = int(max(wall, build_time))
        super().__init__(str(layout.metadata), metadata_url, fetcher=fetcher, config=_CONFIG, bootstrap=anchor)

    @property
    def issued(self) -> int:
        return int(self._trusted_set.timestamp.version)

    @property
    def consistent_snapshot(self) -> bool:
        return bool(self._trusted_set.root.consistent_snapshot)

    def versions(self) -> dict[str, int]:
        """Return the versions of all trusted roles but root, and those the trusted snapshot promises."""
        found: dict[str, int] = {}
        if Timestamp.type in self._trusted_set:
            found["timestamp"] = self._trusted_set.timestamp.version
        if Snapshot.type in self._trusted_set:
            snapshot = self._trusted_set.snapshot
            found["snapshot"] = snapshot.version
            found |= {name.removesuffix(".json"): meta.version for name, meta in snapshot.meta.items()}
        return found

    # Durable writes.

    def _persist_root(self, version: int, data: bytes) -> None:
        if not self._offline:
            super()._persist_root(version, data)

    def _persist_file(self, filename: str, data: bytes) -> None:
        path = Path(filename)
        try:
            if path.read_bytes() == data and not path.is_symlink():
                return  # spare the flash
        except OSError:
            pass
        write_file(path, data)

    def _update_root_symlink(self) -> None:
        if self._offline:
            return
        version = self._trusted_set.root.version
        self._persist_file(
            os.path.join(self._dir, "root.json"),
            Path(self._dir, "root_history", f"{version}.root.json").read_bytes(),
        )

    def _persist_metadata(self, rolename: str, data: bytes) -> None:
        self._check_role(rolename)  # before it is stored
        if not self._offline:
            super()._persist_metadata(rolename, data)

    # The floor and trusted time. Both belong to the keys in force, hence after the walk to the newest root.

    def _load_root(self) -> None:
        super()._load_root()
        keys = _key_digest(self._trusted_set.root)
        if isinstance(self._stored_floor, StateError):
            self.floor = self._floor_from_cache(keys, self._stored_floor)
        else:
            self.floor = self._stored_floor.bound_to(keys)
        if self._offline:
            self.trusted_time = self._moment_on_disk()
        else:
            self.trusted_time = int(max(self._wall, self._build_time, self.floor.timestamp))
        self._trusted_set.reference_time = datetime.fromtimestamp(self.trusted_time, UTC)

    def _load_timestamp(self) -> None:
        super()._load_timestamp()
        self._check_role(Timestamp.type)

    def _load_snapshot(self) -> None:
        super()._load_snapshot()
        self._check_role(Snapshot.type)

    def _load_targets(self, role: str, parent_role: str) -> Targets:
        if f"{role}.json" not in self._trusted_set.snapshot.meta:
            if role in self.floor.roles:
                raise RollbackDetectedError(f"{role} has vanished from the snapshot")
            raise TargetNotFoundError(f"{role} has published nothing yet")
        targets = super()._load_targets(role, parent_role)
        self._check_role(role)
        return targets

    def _check_role(self, role: str) -> None:
        version = self._trusted_set[role].version
        lowest = self.floor.roles.get(role, 0)
        if version < lowest:
            raise RollbackDetectedError(f"{role} version {version} is offered, {lowest} was verified before")
        if role == Timestamp.type and self._synchronised and version > self.trusted_time + AHEAD_S_MAX:
            raise UntrustedError(f"timestamp is dated {version - self.trusted_time} s ahead of a synchronised clock")

    def _floor_from_cache(self, keys: str, lost: StateError) -> Floor:
        """Return a floor made of the cached timestamp, for a box whose floor files are both broken.

        Without a timestamp that verifies, a replay could not be told from news: a person has to decide.
        """
        try:
            timestamp = Metadata[Timestamp].from_bytes(self._load_local_metadata(Timestamp.type))
            self._trusted_set.root.verify_delegate(Timestamp.type, timestamp.signed_bytes, timestamp.signatures)
        except (OSError, tuf.RepositoryError) as error:
            raise StateError(f"{lost}; nor can the cached timestamp: {error}") from error
        return Floor(keys=keys, roles={Timestamp.type: timestamp.signed.version})

    def _moment_on_disk(self) -> int:
        """Return the moment at which the metadata on disk is judged: now, or the last at which it was in force."""
        now = int(max(self._wall, self._build_time, self.floor.timestamp))
        try:
            data = self._load_local_metadata(Timestamp.type)
        except FileNotFoundError as error:
            raise StateError("no store was ever verified on this box") from error
        timestamp = Metadata[Timestamp].from_bytes(data).signed
        if now - timestamp.version > OFFLINE_AGE_S_MAX:
            days = (now - timestamp.version) // 86_400
            raise ExpiredError(
                f"the metadata on this box is {days} days old; refresh from the store or a newer medium first"
            )
        return min(now, int(timestamp.expires.timestamp()) - 1)


class _LocalFetcher(FetcherInterface):
    """No network: the timestamp that is on disk is the newest there is, and so is the root."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def _fetch(self, url: str) -> Iterator[bytes]:
        raise AssertionError("tuf calls download_bytes only, which is overridden")

    def download_bytes(self, url: str, max_length: int) -> bytes:
        name = url.rpartition("/")[2]
        if name == "timestamp.json":
            return (self._folder / name).read_bytes()
        if name.endswith(".root.json"):  # there is no newer one
            raise tuf.DownloadHTTPError(f"{url}: offline", 404)
        raise StateError(f"a refresh of this box's metadata was cut short: {name} is missing until the next")


def read_anchor(path: str) -> bytes:
    """Return the root metadata that came with the package.

    Raises:
        ConfigError: it cannot be read; without it nothing can be trusted.
    """
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise ConfigError(f"[store.anchor] {path}: {error.strerror}") from error


def clock_synchronised() -> bool:
    """Say whether the kernel's clock follows a time server (``adjtimex``); ``False`` if it cannot be told."""
    try:
        libc = ctypes.CDLL(None, use_errno=True)
        return int(libc.adjtimex(ctypes.create_string_buffer(512))) in range(5)  # 5: TIME_ERROR, unsynchronised
    except (OSError, AttributeError):
        return False


def _key_digest(root: Root) -> str:
    lines = [f"{name}:{','.join(sorted(root.roles[name].keyids))}" for name in (Timestamp.type, Snapshot.type)]
    return sha256("\n".join(lines).encode()).hexdigest()


def _cached(path: Path, info: TargetFile) -> bytes | None:
    try:
        data = path.read_bytes() if path.stat().st_size == info.length else None
    except OSError:
        return None
    return data if data is not None and sha256(data).hexdigest() == info.hashes["sha256"] else None


@contextmanager
def _translated(what: str) -> Iterator[None]:
    """Turn tuf's and the disk's errors into ours; ours pass."""
    try:
        yield
    except tuf.ExpiredMetadataError as error:
        raise ExpiredError(f"{what}: {error}") from error
    except tuf.BadVersionNumberError as error:
        raise RollbackDetectedError(f"{what}: {error}") from error
    except (tuf.RepositoryError, tuf.DownloadLengthMismatchError) as error:
        raise UntrustedError(f"{what}: {error}") from error
    except tuf.DownloadHTTPError as error:
        raise RefusedError(f"{what}: {error}", error.status_code) from error
    except tuf.DownloadError as error:
        raise TransientError(f"{what}: {error}") from error
    except OSError as error:
        if error.errno in _DISK_FULL:
            raise DiskFullError(f"{what}: {error.strerror}") from error
        raise StateError(f"{what}: {error}") from error
    except RecursionError as error:
        raise UntrustedError(f"{what}: nested too deeply") from error
