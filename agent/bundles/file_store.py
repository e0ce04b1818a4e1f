"""Objects of a store that is a local folder, a mounted share or a stick."""

from __future__ import annotations

import os
import stat
from typing import IO
from urllib.parse import unquote, urlsplit

from agent.bundles.bodies import READ_BYTES, RefusedError
from agent.errors import ConfigError, OfflineError, TransientError


class FileStore:
    """``bodies.Source`` over ``file://``."""

    def open(self, url: str, *, offset: int, validator: str, deadline: float | None) -> FileBody:
        parts = urlsplit(url)
        if parts.netloc not in ("", "localhost"):
            raise ConfigError(f"[store.urls] {url[:200]!r}: file:// takes a local path")
        return FileBody(url, _open_regular(unquote(parts.path), url), offset)


class FileBody:
    """A regular file."""

    validator = ""

    def __init__(self, url: str, file: IO[bytes], offset: int) -> None:
        self.offset = offset
        self._url = url
        self._file = file
        self._file.seek(offset)

    def read(self, size: int = READ_BYTES) -> bytes:
        try:
            return self._file.read(size)
        except OSError as error:
            raise TransientError(f"{self._url}: {error.strerror}") from error

    def close(self) -> None:
        self._file.close()


def _open_regular(path: str, url: str) -> IO[bytes]:
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)  # a FIFO must not hang us
    except FileNotFoundError as error:
        if not os.path.isdir(_store_folder(path)):
            raise OfflineError(f"{url}: the store is not there") from error
        raise RefusedError(f"{url}: no such object", 404) from error
    except NotADirectoryError as error:
        raise RefusedError(f"{url}: no such object", 404) from error
    except OSError as error:
        raise RefusedError(f"{url}: {error.strerror}", 403) from error
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise RefusedError(f"{url}: not a regular file", 403)
    return os.fdopen(descriptor, "rb", buffering=0)


def _store_folder(path: str) -> str:
    """The folder that holds ``metadata``, ``targets`` and ``blobs``: a stick that is pulled out takes it along."""
    for part in ("/metadata/", "/targets/", "/blobs/"):
        head, found, _ = path.rpartition(part)
        if found:
            return head or "/"
    return os.path.dirname(path)
