"""What this device says about itself as a whole: its birth message and its ``reported`` document.

Both are retained at the broker and describe a level, so only the newest counts and nothing of it waits in the outbox.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from agent.telemetry.payloads import Plain, encode


class Presence:
    """The document to report, and the wish to report it again.

    Args:
        describe: Facts for the birth message, JSON-able: agent version, active models, applied generation.
    """

    def __init__(self, describe: Callable[[], Mapping[str, Any]]) -> None:
        self.describe = describe
        self._document: Plain | None = None
        self._listeners: list[Callable[[], None]] = []
        self.digest = ""  # of the document; changes exactly when it does
        self.births_asked = 0  # grows with each ``rebirth``

    def report(self, document: Mapping[str, Any], *, generation: int) -> None:
        """Replace the reported document; the same content again is no change.

        Args:
            document: JSON-able.
            generation: The newest fleet command that this state contains.
        """
        digest = hashlib.sha256(encode([generation, document])).hexdigest()
        if digest != self.digest:
            self.digest = digest
            self._document = {"gen_applied": generation, "hash": digest[:16], "doc": dict(document)}
            self._tell()

    def rebirth(self) -> None:
        """Send birth message and document again."""
        self.births_asked += 1
        self._tell()

    def document(self, stamp: Plain) -> bytes | None:
        """Return the payload of ``reported``, or ``None`` as long as there is nothing to report."""
        return None if self._document is None else encode({**self._document, **stamp})

    @contextmanager
    def watched(self, listener: Callable[[], None]) -> Iterator[None]:
        """``listener`` is called after each change, as long as the body runs."""
        self._listeners.append(listener)
        try:
            yield
        finally:
            self._listeners.remove(listener)

    def _tell(self) -> None:
        for listener in self._listeners:
            listener()
