"""The ways one inference can be asked for, and the yardsticks beside them.

A way gives a blocking function that asks once, for latency without the load generator's own event loop in it, and an
asynchronous one for many outstanding. ``InProcess`` and ``Floor`` are blocking only: what the work costs without a
server, and what two processes cost without work.
"""

from __future__ import annotations

import asyncio
import json
import os
import socket
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from contextlib import AsyncExitStack, ExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Protocol, cast
from urllib.parse import quote, urlsplit

import numpy as np
import onnxruntime

from agent.client import AsyncClient, Client
from agent.client.messages import infer_frame, predict_frame
from agent.client.regions import Plan
from agent.errors import AgentError
from agent.tensors import Array, pack
from tools.bench_lanes import open_sockets, require_lanes

_LANE_TIMEOUT_S: Final = 2.0  # for the client library to have its lanes; measured is only what comes after

Ask = Callable[[], None]
AskLater = Callable[[], Awaitable[None]]

_OIP_OF_WIRE: Final[Mapping[str, str]] = {
    "bool": "BOOL", "float16": "FP16", "float32": "FP32", "float64": "FP64", "bytes": "BYTES",
}  # fmt: skip
_WIRE_OF_ONNX: Final[Mapping[str, str]] = {"float": "float32", "double": "float64", "string": "bytes"}


class HttpError(AgentError):
    """An HTTP answer other than 200."""

    code = "http"


class Way(Protocol):
    """One way to ask."""

    @property
    def name(self) -> str:
        """How the tables call it."""

    def blocking(self) -> Any:
        """Return a context that yields an ``Ask``."""

    def concurrent(self, connections: int) -> Any:
        """Return an asynchronous context that yields an ``AskLater`` over ``connections``."""


@dataclass(frozen=True, kw_only=True)
class Work:
    """What every way asks for: tensors, and if given the raw body a handler decodes."""

    model: str
    inputs: Mapping[str, Array]
    body: bytes | None = None
    content_type: str = "application/octet-stream"


@dataclass(frozen=True)
class InProcess:
    """``session.run`` of the same file on the same inputs, one thread, in this process."""

    model_file: Path
    work: Work
    name: str = "in-process"

    @contextmanager
    def blocking(self) -> Iterator[Ask]:
        session = open_session(self.model_file)
        inputs = dict(self.work.inputs)
        yield lambda: session.run(None, inputs)


@dataclass(frozen=True)
class Floor:
    """A blocking unix-socket echo of the request's bytes by a child process that does nothing else.

    Both ends are pinned while it runs: across two cores the figure holds the wake-up of an idle core, on one core only
    the switch. Left to the scheduler, it would be now the one and now the other.
    """

    nbytes: int
    name: str = "echo floor"
    across: bool = True  # two cores

    @contextmanager
    def blocking(self) -> Iterator[Ask]:
        allowed = os.sched_getaffinity(0)
        cores = sorted(allowed)
        ours, theirs = socket.socketpair()
        child = os.fork()
        if child == 0:
            ours.close()
            os.sched_setaffinity(0, {cores[-1 if self.across else 0]})
            _echo_forever(theirs, self.nbytes)
        theirs.close()
        os.sched_setaffinity(0, {cores[0]})
        data, back = bytes(self.nbytes), bytearray(self.nbytes)

        def ask() -> None:
            ours.sendall(data)
            _receive_exactly(ours, back)

        try:
            yield ask
        finally:
            os.sched_setaffinity(0, allowed)
            ours.close()  # ends the child
            os.waitpid(child, 0)


@dataclass(frozen=True)
class Unix:
    """Frames over the daemon's unix socket, by our client library.

    With ``raw`` a body for the handler to decode, with ``region`` tensors that lie in memory shared beforehand, with
    ``lanes`` straight to the worker: a run that did not have its lane raises ``LaneError`` instead of a figure.
    """

    path: Path
    work: Work
    raw: bool = False
    region: bool = False
    lanes: bool = False
    name: str = field(init=False)

    def __post_init__(self) -> None:
        what = "raw" if self.raw else "region" if self.region else "tensors"
        object.__setattr__(self, "name", f"{'lane' if self.lanes else 'unix'} {what}")

    @contextmanager
    def blocking(self) -> Iterator[Ask]:
        work = self.work
        with ExitStack() as stack:
            before = open_sockets()
            client = stack.enter_context(Client(self.path, lanes=self.lanes))
            inputs = dict(work.inputs)
            if self.region:
                inputs = {name: _in_region(stack, client, value) for name, value in inputs.items()}

            def ask() -> None:
                if self.raw:
                    client.predict(work.model, work.body or b"", work.content_type)
                else:
                    client.infer(work.model, inputs)

            give_up = time.monotonic() + _LANE_TIMEOUT_S
            while self.lanes and open_sockets() - before < 2 and time.monotonic() < give_up:
                ask()
            yield ask
            if self.lanes:
                require_lanes(open_sockets() - before, clients=1)

    @asynccontextmanager
    async def concurrent(self, connections: int) -> AsyncIterator[AskLater]:
        work = self.work
        before = open_sockets()
        async with AsyncExitStack() as stack:
            made = (AsyncClient(self.path, lanes=self.lanes) for _ in range(connections))
            clients = [await stack.enter_async_context(client) for client in made]
            turn = 0

            async def ask() -> None:
                nonlocal turn
                turn = (turn + 1) % connections
                client = clients[turn]
                if self.raw:
                    await client.predict(work.model, work.body or b"", work.content_type)
                else:
                    await client.infer(work.model, work.inputs)

            give_up = time.monotonic() + _LANE_TIMEOUT_S
            while self.lanes and open_sockets() - before < 2 * connections and time.monotonic() < give_up:
                await ask()
            yield ask
            if self.lanes:
                require_lanes(open_sockets() - before, clients=connections)

    @property
    def request_bytes(self) -> int:
        """Length of one request on the wire."""
        if self.raw:
            return _length(predict_frame(1, self.work.model, self.work.body or b""))
        if self.region:
            entries = [{**entry, "region": 0, "offset": 0} for entry in pack(self.work.inputs)[0]]
            return _length(infer_frame(1, self.work.model, {}, plan=Plan(entries, [], None, {}, None)))
        return _length(infer_frame(1, self.work.model, self.work.inputs))


@dataclass(frozen=True)
class Http:
    """HTTP/1.1 with keep-alive: Open Inference Protocol with binary tensors, or raw bodies if ``raw``."""

    url: str
    work: Work
    raw: bool = False
    name: str = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "name", "http raw" if self.raw else "http binary")

    @contextmanager
    def blocking(self) -> Iterator[Ask]:
        data, back = self.request(), bytearray(1 << 16)
        with socket.create_connection(self.address()) as sock:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

            def ask() -> None:
                sock.sendall(data)
                answer = _HttpAnswer()
                while not answer.feed(bytes(memoryview(back)[: sock.recv_into(back)])):
                    pass

            yield ask

    @asynccontextmanager
    async def concurrent(self, connections: int) -> AsyncIterator[AskLater]:
        loop, data = asyncio.get_running_loop(), self.request()
        lines = [(await loop.create_connection(_HttpLine, *self.address()))[1] for _ in range(connections)]
        free, turns = list(lines), asyncio.Semaphore(connections)  # whose waiters nobody overtakes

        async def ask() -> None:
            async with turns:
                line = free.pop()
                try:
                    await line.ask(data)
                finally:
                    free.append(line)

        try:
            yield ask
        finally:
            for line in lines:
                line.close()

    def address(self) -> tuple[str, int]:
        """Return host and port of the listener."""
        parts = urlsplit(self.url)
        return parts.hostname or "127.0.0.1", parts.port or 80

    def request(self) -> bytes:
        """Return one request's bytes."""
        model = quote(self.work.model, safe="")
        if self.raw:
            path, head, body = (
                f"/predictions/{model}",
                f"Content-Type: {self.work.content_type}\r\n",
                self.work.body or b"",
            )
        else:
            described, body = oip_request(self.work.inputs)
            path, head = f"/v2/models/{model}/infer", f"Inference-Header-Content-Length: {described}\r\n"
        return f"POST {path} HTTP/1.1\r\nHost: box\r\n{head}Content-Length: {len(body)}\r\n\r\n".encode() + body


def oip_request(inputs: Mapping[str, Array]) -> tuple[int, bytes]:
    """Return the length of the JSON part and the whole body of a binary Open Inference Protocol request."""
    entries, parts = pack(inputs)
    described = [
        {
            "name": entry["name"],
            "datatype": _OIP_OF_WIRE.get(entry["dtype"], entry["dtype"].upper()),
            "shape": entry["shape"],
            "parameters": {"binary_data_size": entry["nbytes"]},
        }
        for entry in entries
    ]
    head = json.dumps({"inputs": described, "parameters": {"binary_data_output": True}}).encode()
    return len(head), head + b"".join(parts)


def open_session(model_file: Path) -> Any:
    """Return an ONNX Runtime session with one thread, as a worker has it on a small box."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    return onnxruntime.InferenceSession(str(model_file), options, providers=["CPUExecutionProvider"])


def random_inputs(model_file: Path, *, rows: int, open_dim: int, seed: int = 0) -> dict[str, Array]:
    """Return inputs for a model: ``rows`` in the first open dimension, ``open_dim`` in every other."""
    rng = np.random.default_rng(seed)
    inputs: dict[str, Array] = {}
    for entry in open_session(model_file).get_inputs():
        shape = [side if isinstance(side, int) else (open_dim if at else rows) for at, side in enumerate(entry.shape)]
        kind = entry.type.removeprefix("tensor(").removesuffix(")")
        dtype = _WIRE_OF_ONNX.get(kind, kind)
        if dtype == "bytes":
            inputs[entry.name] = np.full(shape, "text", dtype=object)
        elif np.dtype(dtype).kind == "f":
            inputs[entry.name] = rng.random(shape).astype(dtype)
        else:
            inputs[entry.name] = rng.integers(0, 2, shape).astype(dtype)
    return inputs


class _HttpAnswer:
    """Recognises the end of one answer; ``HttpError`` unless it is a 200."""

    __slots__ = ("_data", "_needed")

    def __init__(self) -> None:
        self._data = bytearray()
        self._needed = 0

    def feed(self, data: bytes) -> bool:
        """Return whether the answer is complete."""
        if not data:
            raise ConnectionResetError("closed by the daemon")
        self._data += data
        if not self._needed:
            end = self._data.find(b"\r\n\r\n")
            if end < 0:
                return False
            head = bytes(self._data[:end]).lower()
            at = head.find(b"content-length:")
            length = int(head[at + 15 :].split(b"\r\n", 1)[0])
            self._needed = end + 4 + length
        if len(self._data) < self._needed:
            return False
        if self._data[9:12] != b"200":
            raise HttpError(bytes(self._data).decode("latin-1"))
        return True


class _HttpLine(asyncio.Protocol):
    """One keep-alive connection, one request at a time."""

    def __init__(self) -> None:
        self._transport: asyncio.Transport
        self._answer = _HttpAnswer()
        self._waiting: asyncio.Future[None] | None = None

    async def ask(self, data: bytes) -> None:
        self._answer = _HttpAnswer()
        self._waiting = asyncio.get_running_loop().create_future()
        self._transport.write(data)
        await self._waiting

    def close(self) -> None:
        self._transport.abort()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)

    def data_received(self, data: bytes) -> None:
        if self._waiting is None or self._waiting.done():
            return
        try:
            if self._answer.feed(data):
                self._waiting.set_result(None)
        except HttpError as error:
            self._waiting.set_exception(error)

    def connection_lost(self, exc: Exception | None) -> None:
        if self._waiting is not None and not self._waiting.done():
            self._waiting.set_exception(exc or ConnectionResetError("closed by the daemon"))


def _echo_forever(sock: socket.socket, nbytes: int) -> None:
    data = bytearray(nbytes)
    try:
        while True:
            _receive_exactly(sock, data)
            sock.sendall(data)
    except OSError:
        os._exit(0)


def _receive_exactly(sock: socket.socket, into: bytearray) -> None:
    view = memoryview(into)
    while view:
        count = sock.recv_into(view)
        if not count:
            raise ConnectionResetError("closed")
        view = view[count:]


def _in_region(stack: ExitStack, client: Client, value: Array) -> Array:
    """Return a copy of ``value`` in a region of its own."""
    region = stack.enter_context(client.region(value.nbytes))
    copy = region.array(value.shape, value.dtype, 0)
    copy[...] = value
    return copy


def _length(parts: list[Any]) -> int:
    return sum(memoryview(part).nbytes for part in parts)
