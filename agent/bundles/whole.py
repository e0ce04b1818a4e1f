"""The whole-file hashes of a pull, computed behind the download while the bytes are still in memory.

Reads the parts, not what the network brought: what the file system will give a model is what is hashed, and a journal
that lied is found here. A file is hashed in order, as far as its chunks have come.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from hashlib import sha256
from typing import Final

from agent.bundles.staging import Staging

_READ_BYTES: Final = 1 << 20
_LOOK_S: Final = 0.5  # chunks are looked for so often if nobody says that one has come

Report = Callable[[int], None]  # bytes hashed since the last call


class WholeHashes:
    """Hashes ``staging``'s wanted files in a thread of its own; each instance once.

    Use as a context around the download; ``damaged`` comes after it.
    """

    def __init__(self, staging: Staging) -> None:
        self._staging = staging
        self._come = threading.Event()
        self._last_lap = threading.Event()  # nothing more will come
        self._stop = threading.Event()
        self._hashed = 0
        self._damaged: list[int] = []
        self._failure: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="whole files", daemon=True)

    @property
    def hashed(self) -> int:
        """Bytes hashed so far."""
        return self._hashed

    def __enter__(self) -> WholeHashes:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._come.set()
        self._thread.join()

    def wake(self) -> None:
        """Tell that another chunk counts."""
        self._come.set()

    def damaged(self, report: Report) -> list[int]:
        """Return the numbers of the files that are not what was signed; every chunk counts by now.

        Raises:
            OSError: a part cannot be read.
        """
        self._last_lap.set()
        self._come.set()
        told = 0
        while self._thread.is_alive():
            self._thread.join(_LOOK_S)
            report(self._hashed - told)
            told = self._hashed
        if self._failure is not None:
            raise self._failure
        return self._damaged

    def _run(self) -> None:
        try:
            for number in self._staging.numbers:
                if not self._hash(number):
                    return
        except BaseException as error:  # noqa: BLE001 - the thread that asks for the result raises it
            self._failure = error

    def _hash(self, number: int) -> bool:
        """Hash one file; ``False`` if told to stop."""
        file = self._staging.manifest.files[number]
        hasher = sha256()
        offset = 0
        for mark, chunk in zip(self._staging.marks(number), file.chunks, strict=True):
            if not self._wait_for(mark):
                return False
            end = offset + chunk.size
            while offset < end:
                data = self._staging.read(number, offset, min(_READ_BYTES, end - offset))
                if not data or self._stop.is_set():
                    break
                hasher.update(data)
                offset += len(data)
                self._hashed += len(data)
        if hasher.hexdigest() != file.sha256:
            self._damaged.append(number)
        return not self._stop.is_set()

    def _wait_for(self, mark: int) -> bool:
        while not self._staging.is_done(mark) and not self._last_lap.is_set():
            self._come.wait(_LOOK_S)
            self._come.clear()
            if self._stop.is_set():
                return False
        return True
