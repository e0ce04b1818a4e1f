"""Clients that keep asking while something happens to the box, and what they saw."""

from __future__ import annotations

import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Self

from agent.client import Client
from agent.errors import AgentError
from tools.demo import magika


@dataclass(slots=True)
class Seen:
    """What a load saw: answers by version, errors by text, seconds per request."""

    versions: Counter[str] = field(default_factory=Counter)
    errors: Counter[str] = field(default_factory=Counter)
    seconds: list[float] = field(default_factory=list)
    last_version: str = ""

    @property
    def asked(self) -> int:
        """Requests that ended, well or badly."""
        return sum(self.versions.values()) + sum(self.errors.values())


class Load:
    """``clients`` threads, each with its own connection, asking in a closed loop as long as the block runs.

    The client library's own repetition is switched off: a request that fails is counted as failed.
    """

    def __init__(self, socket_path: Path, body: bytes, *, clients: int = 4) -> None:
        self.seen = Seen()
        self._path = socket_path
        self._body = body
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=self._ask, daemon=True) for _ in range(clients)]

    def __enter__(self) -> Self:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join(60.0)

    def _ask(self) -> None:
        with Client(self._path, retries=0) as client:
            while not self._stop.is_set():
                started = time.perf_counter()
                try:
                    result = client.predict(magika.NAME, self._body)
                except AgentError as error:
                    with self._lock:
                        self.seen.errors[f"{error.code}: {error}"] += 1
                    continue
                with self._lock:
                    self.seen.seconds.append(time.perf_counter() - started)
                    self.seen.versions[result.version] += 1
                    self.seen.last_version = result.version
