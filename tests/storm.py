"""A daemon that is started and stopped again and again, amid clients, stores and brokers that do not behave."""

from __future__ import annotations

import ctypes
import http.client
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import threading
import time
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from enum import StrEnum
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Self

import numpy as np
import psutil

from agent.client import Client
from agent.errors import AgentError
from agent.wire import encode
from tests.box import MODEL, NearBox
from tests.models import FEATURES
from tools.demo.broker import Mosquitto, find_mosquitto

PLAIN = "plain"  # a model without code of its own, so that it gives direct lanes
STOP_TIMEOUT_S = 60.0  # far above what any stop takes: beyond it hangs
HASTE_S = 20.0  # for a box to serve before it is stopped: one that still does not is stopped without
DRAIN_S = 1.0
X = {"x": np.ones((1, FEATURES), dtype=np.float32)}
ENDLESS = json.dumps({"kind": "bytes", "count": 10**9, "sleep_s": 0.002}).encode()
_BIG_PARTS = json.dumps({"kind": "bytes", "count": 10**9, "size": 60_000}).encode()
_TENSOR = {"name": "x", "dtype": "float32", "shape": [8, FEATURES], "nbytes": 32 * FEATURES}
_INFER = {"kind": "infer", "id": 1, "model": PLAIN, "tensors": [_TENSOR]}
_STREAM = {"kind": "infer", "id": 1, "model": MODEL, "content_type": "application/json", "stream": True}
_TROUBLE = ("Traceback", "never retrieved", "component failed", "Exception ignored")  # in a log
_PR_SET_CHILD_SUBREAPER = 36


class Moment(StrEnum):
    """When a daemon is stopped."""

    START = "as it starts"
    PULL = "as it pulls its first versions"
    SERVING = "as it serves"
    DEPLOYMENT = "in a deployment"
    LOAD = "as a worker hangs in its load"
    ROLLBACK = "in a rollback"
    WORKER = "as its workers hang"
    ZYGOTE = "as its zygote hangs"
    BROKER = "as its broker dies"


class Storm:
    """One box, stopped at chosen moments on the same state.

    Args:
        folder: For everything.
        rng: Chooses circumstances and delays.
    """

    def __init__(self, folder: Path, rng: random.Random) -> None:
        self.exits: Counter[int] = Counter()
        self.took_s: list[float] = []  # each stop
        self._folder = folder
        self._rng = rng
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            self._box = box = stack.enter_context(NearBox(self._folder / "box", fresh=True))
            box.make_store()
            box.publish_scale("1.0.0", handler="steps")
            box.publish_scale("2.0.0", factor=3.0, handler="steps", channel="")
            box.publish_scale("1.0.0", name=PLAIN)
            self._store = stack.enter_context(_Store(box.store, random.Random(self._rng.random())))
            self._silent = stack.enter_context(silent_listener())
            self._broker = Mosquitto(self._folder / "broker") if find_mosquitto() else None
            if self._broker is not None:
                stack.enter_context(self._broker)
            stack.enter_context(_adopting())
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_error: object) -> None:
        self._stack.close()

    def round(self, moment: Moment) -> str:
        """Start, stop at that moment, check; return the circumstances and how long the stop took.

        Raises:
            AssertionError: the daemon did not stop, not well, or left something.
        """
        rng = self._rng
        store, broker = rng.choice(("folder", "web", "stalling")), rng.choice(("no", "silent", "real"))
        fresh = moment is Moment.PULL or rng.random() < 0.25
        peers = rng.choice((self._askers, self._streamers, self._lane_askers, self._rude, None))
        if moment in (Moment.START, Moment.PULL):
            peers = None
        if fresh:
            _remove(self._box.state)
        self._configure(store, broker)
        what = f"{moment}, {store} store, {broker} broker, {'fresh' if fresh else 'kept'}, " + (
            peers.__name__.strip("_") if peers is not None else "nobody"
        )
        logged = self._box.log.stat().st_size if self._box.log.exists() else 0
        self._box.start()
        with peers() if peers is not None else ExitStack():
            self._come_to(moment, stalls=store == "stalling")
            took_s = self._stop(what, logged)
        self._leaves_nothing(what)
        return f"{what}: {took_s:.2f} s"

    def ends_serving(self) -> None:
        """After all that the box serves as if nothing had been."""
        self._configure("folder", "no")
        self._box.start()
        self._box.until(self._serves, what="both models answer", timeout_s=90.0)
        assert self._box.stop_daemon() == 0
        self._leaves_nothing("the end")

    # Up to the stop

    def _configure(self, store: str, broker: str) -> None:
        box = self._box
        real = self._broker.port if self._broker is not None else None
        box.write_config(
            store_url=box.store.as_uri() if store == "folder" else self._store.url,
            broker_port={"no": None, "silent": self._silent, "real": real}[broker],
            models=(MODEL, PLAIN),
            more="[engine]\nselftest_interval_s = 0.2\nselftest_share_max = 0.9\n[engine.variants]\nidle_s = 0.1\n",
        )
        text = box.config.read_text()
        box.config.write_text(text.replace("[serving]", f"[serving]\ndrain_timeout_s = {DRAIN_S}", 1))

    def _come_to(self, moment: Moment, *, stalls: bool) -> None:
        rng = self._rng
        if moment in (Moment.START, Moment.PULL):
            self._store.stalls = stalls
            time.sleep(rng.uniform(0.0, 3.0))
            return
        self._store.stalls = False
        deadline = time.monotonic() + HASTE_S
        while time.monotonic() < deadline and not self._serves():
            time.sleep(0.05)
        self._store.stalls = stalls
        with suppress(AgentError, OSError):
            self._bring_about(moment)
        time.sleep(rng.uniform(0.0, 2.0 if moment in (Moment.DEPLOYMENT, Moment.LOAD, Moment.ROLLBACK) else 0.5))

    def _serves(self) -> bool:
        with suppress(AgentError, OSError), self._box.client() as client:
            client.infer(PLAIN, X)
            return bool(client.predict(MODEL, b'{"report": true}').body) and not self._slot()["trial"]
        return False

    def _slot(self) -> dict[str, Any]:
        slot: dict[str, Any] = next(row for row in self._box.status()["slots"] if row["slot"] == MODEL)
        return slot

    def _bring_about(self, moment: Moment) -> None:
        match moment:
            case Moment.DEPLOYMENT | Moment.LOAD:
                before = self._processes("inferd-worker") if moment is Moment.LOAD else set()
                with self._box.client() as client:
                    other = "1.0.0" if self._slot()["active"] == "2.0.0" else "2.0.0"
                    client.call("deploy", {"model": MODEL, "version": other})
                deadline = time.monotonic() + HASTE_S / 4
                while moment is Moment.LOAD and time.monotonic() < deadline:
                    if new := self._processes("inferd-worker") - before:
                        _suspend(new)
                        return
            case Moment.ROLLBACK:
                with self._box.client() as client:
                    client.call("rollback", {"model": MODEL})
            case Moment.WORKER | Moment.ZYGOTE:
                _suspend(self._processes("inferd-worker" if moment is Moment.WORKER else "inferd-zygote"))
            case Moment.BROKER if self._broker is not None:
                self._broker.kill()

    def _processes(self, name: str) -> set[psutil.Process]:
        assert self._box.daemon is not None
        found = set()
        for process in psutil.Process(self._box.daemon.pid).children(recursive=True):
            with suppress(psutil.Error):
                found |= {process} if process.name() == name else set()
        return found

    # Peers

    def _askers(self) -> AbstractContextManager[None]:
        box = self._box

        def by_frames(stop: threading.Event) -> None:
            with self._client() as client:
                while not stop.wait(0.01):
                    client.infer(PLAIN, X)
                    client.predict(MODEL, b'{"count": 1, "kind": "json"}')

        def by_http(stop: threading.Event) -> None:
            tensor = {"name": "x", "shape": [1, FEATURES], "datatype": "FP32", "data": [1.0] * FEATURES}
            url = f"http://127.0.0.1:{box.http_port}/v2/models/{PLAIN}/infer"
            while not stop.wait(0.01):
                urllib.request.urlopen(url, json.dumps({"inputs": [tensor]}).encode(), timeout=5.0).read()

        def for_events(stop: threading.Event) -> None:
            with self._client() as client:
                while not stop.wait(0.01):
                    client.call("events", {"wait_s": 30.0, "after": 10**9})

        def for_the_end(stop: threading.Event) -> None:
            with self._client() as client:
                while not stop.wait(0.01):
                    (newest, *_) = client.call("deployments", {"limit": 1})
                    client.call("deployment", {"id": newest["id"], "after_step": 1 << 40, "wait_s": 30.0})

        def as_operator(stop: threading.Event) -> None:
            with self._client() as client:
                while not stop.wait(0.05):
                    client.status()
                    client.call("selftest", {"model": MODEL})

        return _working(by_frames, by_http, for_events, for_the_end, as_operator)

    def _streamers(self) -> AbstractContextManager[None]:
        url = f"http://127.0.0.1:{self._box.http_port}/predictions/{MODEL}"

        def by_frames(stop: threading.Event) -> None:
            with self._client() as client:
                for _ in client.stream(MODEL, ENDLESS, deadline_ms=60_000):
                    if stop.is_set():
                        return

        def by_http(stop: threading.Event) -> None:
            with urllib.request.urlopen(urllib.request.Request(url, ENDLESS), timeout=5.0) as answer:
                while not stop.is_set() and answer.read(3):
                    pass

        return _working(by_frames, by_http)

    def _lane_askers(self) -> AbstractContextManager[None]:
        def ask(stop: threading.Event) -> None:
            with self._client(lanes=True) as client:
                while not stop.wait(0.001):
                    client.infer(PLAIN, X)

        return _working(ask, ask)

    def _rude(self) -> AbstractContextManager[None]:
        """Clients that do not read, or send half, and stay."""
        infer = b"".join(map(bytes, encode(_INFER, (bytes(32 * FEATURES),))))
        stream = b"".join(map(bytes, encode(_STREAM, (_BIG_PARTS,))))
        post = b"POST /predictions/%b HTTP/1.1\r\nHost: box\r\nContent-Length: %d\r\n\r\n%b"
        post %= MODEL.encode(), len(_BIG_PARTS), _BIG_PARTS
        web = ("127.0.0.1", self._box.http_port)

        def rude(stop: threading.Event) -> None:
            with ExitStack() as stack:
                for address, data in ((str(self._box.socket), infer * 200), (str(self._box.socket), stream)):
                    _say(stack, address, data)
                _say(stack, str(self._box.socket), infer[:-5])
                for data in (post, post[:-5], b""):
                    _say(stack, web, data)
                stop.wait()

        return _working(rude)

    def _client(self, *, lanes: bool = False) -> Client:
        return Client(self._box.socket, retries=0, connect_timeout_s=0.2, timeout_s=5.0, lanes=lanes)

    # The stop and what is left

    def _stop(self, what: str, logged: int) -> float:
        daemon, self._box.daemon = self._box.daemon, None
        assert daemon is not None
        began = time.monotonic()
        daemon.send_signal(signal.SIGTERM)
        try:
            code = daemon.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            daemon.kill()
            daemon.wait()
            raise AssertionError(f"{what}: the daemon does not stop: {self._box.tail()}") from None
        took_s = time.monotonic() - began
        with self._box.log.open("rb") as file:
            file.seek(logged)
            said = file.read().decode(errors="replace")
        early = code == -signal.SIGTERM and not said  # still importing: to systemd that is a good end, too
        assert code == 0 or early, f"{what}: exit status {code}: {said[-3000:]}"
        assert not [word for word in _TROUBLE if word in said], f"{what}: {said[-6000:]}"
        self.exits[code] += 1
        self.took_s.append(round(took_s, 2))
        return took_s

    def _leaves_nothing(self, what: str) -> None:
        deadline = time.monotonic() + STOP_TIMEOUT_S
        while left := _left():
            assert time.monotonic() < deadline, f"{what}: {left}"
            time.sleep(0.05)
        scratch = self._box.state / "scratch"
        assert not scratch.exists() or not list(scratch.iterdir()), what
        if self._broker is not None and not self._broker.running:
            self._broker.start()


class _Store(ThreadingHTTPServer):
    """A store's folder on a web server; while it ``stalls`` it leaves some requests without an answer."""

    daemon_threads = True

    def __init__(self, folder: Path, rng: random.Random) -> None:
        self.stalls = False
        self.rng = rng
        self.over = threading.Event()
        super().__init__(("127.0.0.1", 0), partial(_StoreHandler, directory=str(folder)))
        self.url = f"http://127.0.0.1:{self.server_address[1]}"

    def __enter__(self) -> Self:
        threading.Thread(target=self.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_error: object) -> None:
        self.over.set()
        self.shutdown()
        self.server_close()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A puller that was killed."""


class _StoreHandler(SimpleHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: _Store

    def do_GET(self) -> None:
        if self.server.stalls and self.server.rng.random() < 0.3:
            self.server.over.wait()
            self.close_connection = True
        else:
            super().do_GET()

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002
        """Silent."""


@contextmanager
def silent_listener() -> Iterator[int]:
    """A port that takes connections and never says a word."""
    with socket.create_server(("127.0.0.1", 0), backlog=128) as listener:
        yield int(listener.getsockname()[1])


@contextmanager
def _working(*works: Callable[[threading.Event], None]) -> Iterator[None]:
    """One thread for each, begun anew whenever its daemon sends it away."""
    stop = threading.Event()

    def run(work: Callable[[threading.Event], None]) -> None:
        while not stop.wait(0.01):
            with suppress(AgentError, OSError, http.client.HTTPException):
                work(stop)

    threads = [threading.Thread(target=run, args=(work,), daemon=True) for work in works]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        stop.set()
        for thread in threads:
            thread.join(STOP_TIMEOUT_S)


def _say(stack: ExitStack, address: str | tuple[str, int], data: bytes) -> None:
    """Connect, send as much as is taken at once, and keep the connection."""
    sock = stack.enter_context(socket.socket(socket.AF_UNIX if isinstance(address, str) else socket.AF_INET))
    sock.settimeout(0.5)
    with suppress(TimeoutError):
        sock.connect(address)
        sock.sendall(data)


def _suspend(processes: set[psutil.Process]) -> None:
    for process in processes:
        with suppress(psutil.Error):
            process.suspend()


@contextmanager
def _adopting() -> Iterator[None]:
    """What a daemon leaves behind becomes a child of this process."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    try:
        yield
    finally:
        libc.prctl(_PR_SET_CHILD_SUBREAPER, 0, 0, 0, 0)


def _left() -> list[str]:
    """Return what is left of a daemon's processes, collecting those that have ended."""
    found = []
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.Error, ChildProcessError):
            if process.status() != psutil.STATUS_ZOMBIE:
                line = " ".join(process.cmdline())
                found += [f"{process.pid} {line}"] if "agent." in line else []
            elif process.name().startswith("inferd-"):
                os.waitpid(process.pid, os.WNOHANG)
    return found


def _remove(folder: Path) -> None:
    """Remove a tree whose folders may be read-only."""
    for place, _, _ in os.walk(folder):
        os.chmod(place, 0o700)
    shutil.rmtree(folder, ignore_errors=True)
