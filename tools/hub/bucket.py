"""The store as objects of an S3 bucket, which boxes read as ``s3://`` or through any CDN in front of it.

Promises what ``objects.Folder`` does: what exists never changes (conditional writes), what was written is looked at
once, and one publisher works at a time, by an object that only one can create.
"""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final

import obstore
from obstore.exceptions import AlreadyExistsError

from agent.bundles.bodies import RefusedError
from agent.bundles.s3_store import open_bucket, translated
from agent.config import MirrorConfig
from agent.errors import NotFoundError
from tools.hub.errors import ConflictError, StoreStateError
from tools.hub.objects import Stored

_LOCK: Final = "publisher.lock"
_TIMEOUT_S: Final = 60.0


class Bucket:
    """``objects.Store`` in a bucket and prefix."""

    def __init__(self, mirror: MirrorConfig) -> None:
        self.name = mirror.url.rstrip("/")
        self._bucket = open_bucket(mirror, timeout_s=_TIMEOUT_S)

    def read(self, name: str) -> bytes:
        with self._translated(name):
            return bytes(obstore.get(self._bucket, name).bytes())

    def size(self, name: str) -> int | None:
        try:
            with self._translated(name):
                return int(obstore.head(self._bucket, name)["size"])
        except NotFoundError:
            return None

    def put(self, name: str, data: bytes) -> bool:
        created = self._create(name, data)
        if self.read(name) != data:
            if created:
                raise StoreStateError(f"{self._url(name)}: reads back other bytes than were written")
            raise ConflictError(f"{self._url(name)}: exists with other content, and published objects never change")
        return created

    def put_file(self, name: str, source: Path) -> bool:
        size = source.stat().st_size
        if self.size(name) == size:
            return False
        if not self._create(name, source.read_bytes()):  # at most one chunk of 16 MiB
            raise ConflictError(f"{self._url(name)}: exists with another size, and published objects never change")
        if self.size(name) != size:
            raise StoreStateError(f"{self._url(name)}: has another size than was written")
        return True

    def replace(self, name: str, data: bytes) -> None:
        with self._translated(name):
            obstore.put(self._bucket, name, data)

    def stored(self, folder: str) -> Iterator[Stored]:
        with self._translated(folder):
            for batch in obstore.list(self._bucket, folder):
                for item in batch:
                    yield Stored(item["path"], item["size"], item["last_modified"].timestamp())

    def remove(self, name: str) -> None:
        with suppress(NotFoundError), self._translated(name):
            obstore.delete(self._bucket, name)

    @contextmanager
    def lock(self, *, create: bool = False) -> Iterator[None]:
        """Hold the store for one publisher; a bucket is never created here.

        Raises:
            StoreStateError: another publisher holds it, or one was cut off while it did.
        """
        holder = {"host": socket.gethostname(), "pid": os.getpid(), "since": int(time.time())}
        if not self._create(_LOCK, json.dumps(holder).encode()):
            raise StoreStateError(
                f"{self.name}: another publisher is at work: {self._holder()}",
                hint=f"Repeat when it is done. If it was cut off, delete {self._url(_LOCK)} first.",
            )
        try:
            yield
        finally:
            self.remove(_LOCK)

    def _create(self, name: str, data: bytes) -> bool:
        """Write an object that does not exist yet; ``False`` if it does."""
        try:
            with self._translated(name):
                obstore.put(self._bucket, name, data, mode="create")
        except FileExistsError:
            return False
        return True

    def _holder(self) -> str:
        try:
            return self.read(_LOCK).decode(errors="replace")[:200]
        except NotFoundError:
            return "it has just ended"

    def _url(self, name: str) -> str:
        return f"{self.name}/{name}"

    @contextmanager
    def _translated(self, name: str) -> Iterator[None]:
        try:
            with translated(self._url(name)):
                try:
                    yield
                except AlreadyExistsError as error:
                    existing = error
                else:
                    return
            raise FileExistsError(self._url(name)) from existing
        except RefusedError as error:
            if error.status == 404:
                raise NotFoundError(f"{self._url(name)}: no such object") from error
            raise
