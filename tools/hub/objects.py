"""The store as a set of named objects: the files of a folder that any static server can serve, or a bucket.

Promises: ``put`` never changes an object that exists and reads back what it wrote; ``replace`` is atomic; a reader
never sees half an object; one publisher at a time (``lock``).
Absent on purpose: what the objects mean (``repository.py``, ``publish.py``).
"""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol
from urllib.parse import unquote, urlsplit

import msgspec

from agent.config import MirrorConfig
from agent.durable import sync_directory, write_file
from agent.errors import ConfigError, NotFoundError
from tools.hub.errors import ConflictError, StoreStateError

_MODE = 0o644


class Objects(Protocol):
    """Where a repository lives. Names are relative, ``/``-separated."""

    def read(self, name: str) -> bytes:
        """Return the object's bytes; raises ``NotFoundError``."""

    def size(self, name: str) -> int | None:
        """Return the object's size in bytes, ``None`` if there is none."""

    def put(self, name: str, data: bytes) -> bool:
        """Store an immutable object; ``False`` if the same bytes are there already.

        Raises:
            ConflictError: other bytes are stored under this name.
        """

    def put_file(self, name: str, source: Path) -> bool:
        """Store an object that is named by its hash; ``False`` if one of that name and size is there already."""

    def replace(self, name: str, data: bytes) -> None:
        """Replace the one mutable object atomically."""

    def stored(self, folder: str) -> Iterator[Stored]:
        """Yield every object below ``folder``, what a cut left half written included."""

    def remove(self, name: str) -> None:
        """Delete an object; one that is gone is fine."""


class Store(Objects, Protocol):
    """``Objects`` that one publisher at a time may change. ``name``: how people call it."""

    @property
    def name(self) -> str: ...

    def lock(self, *, create: bool = False) -> AbstractContextManager[None]:
        """Hold the store for one publisher; ``create`` makes it where that is possible."""


@dataclass(frozen=True, slots=True)
class Stored:
    """An object as a listing shows it."""

    name: str
    size: int
    modified: float  # Unix seconds


class Folder:
    """``Objects`` in a local folder."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.name = str(root)

    def read(self, name: str) -> bytes:
        try:
            return (self.root / name).read_bytes()
        except (FileNotFoundError, NotADirectoryError) as error:
            raise NotFoundError(f"{self.root / name}: no such object") from error

    def size(self, name: str) -> int | None:
        try:
            return (self.root / name).stat().st_size
        except (FileNotFoundError, NotADirectoryError):
            return None

    def put(self, name: str, data: bytes) -> bool:
        path = self.root / name
        if path.exists():
            if path.read_bytes() != data:
                raise ConflictError(f"{path}: exists with other content, and published objects never change")
            return False
        self._make_folder(path.parent)
        write_file(path, data, mode=_MODE)
        if path.read_bytes() != data:
            raise StoreStateError(f"{path}: reads back other bytes than were written", hint="Check the disk.")
        return True

    def put_file(self, name: str, source: Path) -> bool:
        path = self.root / name
        if self.size(name) == source.stat().st_size:
            return False
        self._make_folder(path.parent)
        beside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        try:
            with source.open("rb") as reader, beside.open("wb") as writer:
                shutil.copyfileobj(reader, writer, 1 << 20)
                writer.flush()
                os.fchmod(writer.fileno(), _MODE)
                os.fsync(writer.fileno())
            os.replace(beside, path)
        finally:
            beside.unlink(missing_ok=True)
        sync_directory(path.parent)
        return True

    def replace(self, name: str, data: bytes) -> None:
        path = self.root / name
        self._make_folder(path.parent)
        write_file(path, data, mode=_MODE)

    def stored(self, folder: str) -> Iterator[Stored]:
        for path, _, files in os.walk(self.root / folder):
            for name in files:
                file = Path(path, name)
                facts = file.lstat()
                yield Stored(file.relative_to(self.root).as_posix(), facts.st_size, facts.st_mtime)

    def remove(self, name: str) -> None:
        (self.root / name).unlink(missing_ok=True)

    @contextmanager
    def lock(self, *, create: bool = False) -> Iterator[None]:
        """Hold the store for one publisher; ``create`` makes the folder.

        Raises:
            StoreStateError: another publisher holds it, or there is no such folder.
        """
        if create:
            self._make_folder(self.root)
        try:
            descriptor = os.open(self.root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except OSError as error:
            hint = "Make a store with: inferhub init DIR ..."
            raise StoreStateError(f"{self.root}: no store: {error.strerror}", hint=hint) from error
        try:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                message = f"{self.root}: another publisher is at work"
                raise StoreStateError(message, hint="Repeat when it is done.") from error
            yield
        finally:
            os.close(descriptor)

    @staticmethod
    def _make_folder(path: Path) -> None:
        path.mkdir(parents=True, exist_ok=True, mode=0o755)


def store_of(store: str, *, s3: Mapping[str, str] | None = None) -> Store:
    """Return what ``store`` names: a path, a ``file://`` URL or ``s3://bucket/prefix``.

    Args:
        s3: Fields of ``MirrorConfig`` for a bucket: endpoint, region, credentials_file.

    Raises:
        StoreStateError: another kind of URL.
        ConfigError: the bucket's address or credentials cannot be used.
    """
    if "://" not in store:
        return Folder(Path(store).absolute())
    parts = urlsplit(store)
    if parts.scheme == "file" and parts.netloc in ("", "localhost"):
        return Folder(Path(unquote(parts.path)))
    if parts.scheme == "s3":
        return _bucket_of(store, s3 or {})
    raise StoreStateError(
        f"{store}: only a folder, file:// or s3:// can be written",
        hint="Publish into a folder and mirror it to the server, metadata/timestamp.json last.",
    )


def _bucket_of(store: str, s3: Mapping[str, str]) -> Store:
    from agent.bundles import s3_store

    if not s3_store.available():
        raise ConfigError(f"{store}: s3:// needs the extra: pip install inferd[s3]")
    from tools.hub.bucket import Bucket  # its library is an extra

    try:
        return Bucket(msgspec.convert({"url": store, **s3}, MirrorConfig))
    except ValueError as error:
        raise ConfigError(f"{store}: {error}") from error
