"""What a store hands out: an object that is being read, or one of two refusals.

The kinds of store (``file_store.py``, ``http_store.py``, ``s3_store.py``) implement ``Source``; ``fetcher.Transport``
chooses among them. Leaves out: how bytes travel, and whether they are the right ones.
"""

from __future__ import annotations

from typing import Final, Protocol

from agent.errors import StoreError

READ_BYTES: Final = 512 * 1024


class RefusedError(StoreError):
    """The store answered, and will answer the same again: 4xx, or a file that cannot be opened."""

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status


class Body(Protocol):
    """An object being read. ``offset``: where in the object its first byte lies."""

    offset: int
    validator: str  # strong ETag, "" if there is none

    def read(self, size: int = READ_BYTES) -> bytes:
        """Return what has arrived, ``b""`` at the end; at most ``size`` bytes.

        Raises:
            TransientError: cut, silent for the stall timeout, or past its deadline.
        """

    def close(self) -> None: ...


class Source(Protocol):
    """One store. May be used from several threads."""

    def open(self, url: str, *, offset: int, validator: str, deadline: float | None) -> Body:
        """Return the object from ``offset`` on, or from its start where the store does not do ranges.

        Args:
            validator: Strong ETag that the object must still have for the range to hold.
            deadline: Monotonic seconds by which the whole object must have been read.

        Raises:
            OfflineError: the store cannot be reached.
            TransientError: it fails for now.
            RefusedError: it answers anything else but the object.
            ConfigError: the credentials or certificates configured for it cannot be used.
        """
