"""Clients that never stop asking, by every door of a box, and keep what went wrong."""

from __future__ import annotations

import http.client
import json
import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self

from agent.client import Client
from agent.errors import AgentError

_PAUSE_S = 0.02  # between two requests of one client: the box is to be used, not filled
_FAILURES_KEPT = 20
_HTTP_TIMEOUT_S = 90.0


class Answer(NamedTuple):
    """What one request brought: who answered, and the part of the answer that is compared."""

    version: str
    said: Any


class Way(NamedTuple):
    """One door: how a client asks for a request by its number. ``open`` gives the function and what closes it."""

    model: str
    name: str
    open: Callable[[], tuple[Callable[[int], Answer], Callable[[], None]]]
    count: int  # of different requests


class Load:
    """One thread per way, as long as the block runs. Nobody tries again: a request that fails has failed.

    Args:
        ways: The doors.
        judge: Returns what is wrong with an answer to request number n, empty if nothing.
    """

    def __init__(self, ways: Sequence[Way], judge: Callable[[Way, int, Answer], str]) -> None:
        self.failures: list[str] = []
        self.failed = 0
        self.asked: Counter[str] = Counter()  # by way
        self.versions: Counter[str] = Counter()
        self.slowest_s = 0.0
        self._judge = judge
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=self._ask, args=(way,), name=way.name, daemon=True) for way in ways]

    def __enter__(self) -> Self:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join(_HTTP_TIMEOUT_S)

    def _ask(self, way: Way) -> None:
        rng = random.Random(way.name)
        ask, close = way.open()
        try:
            while not self._stop.wait(_PAUSE_S):
                self._ask_once(way, ask, rng.randrange(way.count))
        finally:
            close()

    def _ask_once(self, way: Way, ask: Callable[[int], Answer], number: int) -> None:
        began = time.monotonic()
        version = ""
        try:
            answer = ask(number)
            version, wrong = answer.version, self._judge(way, number, answer)
        except (AgentError, OSError, http.client.HTTPException) as error:
            wrong = f"{getattr(error, 'code', type(error).__name__)}: {error}"
        took_s = time.monotonic() - began
        with self._lock:
            self.asked[way.name] += 1
            self.versions[version] += 1
            self.slowest_s = max(self.slowest_s, took_s)
            if wrong:
                self.failed += 1
                if len(self.failures) < _FAILURES_KEPT:
                    self.failures.append(
                        f"{time.strftime('%H:%M:%S')} {way.name} {version} after {took_s:.2f} s: {wrong}"
                    )


def by_frames(path: Path, model: str, bodies: Sequence[bytes], told: Callable[[Any], Any]) -> Way:
    """Raw bodies over the unix socket."""

    def open_client() -> tuple[Callable[[int], Answer], Callable[[], None]]:
        client = Client(path, retries=0)

        def ask(number: int) -> Answer:
            result = client.predict(model, bodies[number])
            return Answer(result.version, told(result.json()))

        return ask, client.close

    return Way(model, f"{model}, unix socket", open_client, len(bodies))


def by_tensors(
    path: Path, model: str, inputs: Sequence[Mapping[str, Any]], told: Callable[[Mapping[str, Any]], Any]
) -> Way:
    """Tensors over the unix socket."""

    def open_client() -> tuple[Callable[[int], Answer], Callable[[], None]]:
        client = Client(path, retries=0)

        def ask(number: int) -> Answer:
            result = client.infer(model, inputs[number])
            return Answer(result.version, told(result.outputs))

        return ask, client.close

    return Way(model, f"{model}, unix socket, tensors", open_client, len(inputs))


def by_http(port: int, model: str, bodies: Sequence[bytes], told: Callable[[Any], Any], *, oip: bool = False) -> Way:
    """Bodies over one HTTP connection that is kept: raw ones, or Open Inference Protocol in JSON."""
    path = f"/v2/models/{model}/infer" if oip else f"/predictions/{model}"
    content_type = "application/json" if oip else "application/octet-stream"

    def open_client() -> tuple[Callable[[int], Answer], Callable[[], None]]:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=_HTTP_TIMEOUT_S)

        def ask(number: int) -> Answer:
            connection.request("POST", path, bodies[number], {"Content-Type": content_type})
            response = connection.getresponse()
            body = response.read()
            if response.status != http.HTTPStatus.OK:
                raise http.client.HTTPException(f"{response.status}: {body[:200]!r}")
            said = json.loads(body)
            return Answer(response.headers.get("x-model-version") or said.get("model_version", ""), told(said))

        return ask, connection.close

    return Way(model, f"{model}, HTTP{' OIP' if oip else ''}", open_client, len(bodies))
