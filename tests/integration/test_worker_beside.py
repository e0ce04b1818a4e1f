"""Streams and decoding beside batches that take long, in a worker's own loop around a model that the test holds."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgpack
import numpy as np
import pytest

from agent import tensors
from agent.tensors import Array
from agent.wire import Decoder, Frame, Limits, encode
from agent.worker import signature
from agent.worker import spec as specs
from agent.worker.channel import Channel
from agent.worker.loading import Loaded
from agent.worker.main import Server
from agent.worker.requests import Forms
from agent.worker.signature import TensorSpec
from handlers.base import Context, Json, Prepared, Run, StreamingHandler
from tests.models import worker_spec

pytestmark = pytest.mark.integration

HELD_S = 90.0
X = np.ones((1, 4), np.float32)
HELD = X * 7  # a batch with it runs until the test lets it go


class HeldModel:
    """Doubles, never within two milliseconds."""

    inputs: tuple[TensorSpec, ...] = ()
    outputs: tuple[TensorSpec, ...] = ()
    provider = "test"

    def __init__(self) -> None:
        self.entered = threading.Event()
        self.let_go = threading.Event()

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        time.sleep(0.005)
        if inputs["x"][0, 0] == HELD[0, 0]:
            self.entered.set()
            assert self.let_go.wait(HELD_S)
        return {"y": inputs["x"] * 2}


class Endless(StreamingHandler):
    """Counts for ever; its model is not asked."""

    def preprocess(self, body: bytes, content_type: str) -> Prepared:
        del body, content_type
        return Prepared({"x": X}, None)

    def stream(self, inputs: Mapping[str, Array], rows: int, run: Run, state: Any) -> Iterator[Json]:
        del inputs, rows, run, state
        number = 0
        while True:
            time.sleep(0.001)
            yield number
            number += 1


class Worker:
    """The daemon's end of a loop that runs in a thread."""

    def __init__(self, folder: Path) -> None:
        described = worker_spec(folder, version="1.0.0", variant="v0", entry="model.onnx", handler={"id": "tensors/v1"})
        spec = specs.parse(msgpack.packb({**described, "scratch_dir": str(folder)}))
        declared = signature.parse(spec.signature, batch_axis=spec.batch_axis, rows_max=spec.batch_rows_max)
        context = Context(bundle_dir=folder, signature=declared.as_dict(), classes=None, params={})
        handler = Endless(context)
        self.model = HeldModel()
        self.sock, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(HELD_S)
        self._decoder = Decoder()
        self._frames: list[Frame] = []
        loaded = Loaded(
            spec=spec,
            signature=declared,
            runtime=self.model,
            forms=Forms(declared, handler, model="scale", version="1.0.0"),
            handler=handler,
            goldens=(),
            hello={"kind": "hello"},
        )
        self._thread = threading.Thread(target=Server(loaded, Channel(theirs, Limits())).serve)
        self._thread.start()

    def send(self, header: dict[str, Any], body: Sequence[Any] = ()) -> None:
        self.sock.sendall(b"".join(bytes(part) for part in encode(header, body)))

    def ask(self, number: int, x: Array) -> None:
        entries, buffers = tensors.pack({"x": x})
        self.send({"kind": "infer", "id": number, "tensors": entries}, buffers)

    def receive(self) -> Frame:
        while not self._frames:
            data = self.sock.recv(1 << 16)
            assert data
            self._frames += self._decoder.feed(data)
        return self._frames.pop(0)

    def until(self, number: int | None, kind: str) -> None:
        """Return once that frame has come; errors are not passed over."""
        while True:
            header = self.receive().header
            if (header.get("id"), header["kind"]) == (number, kind):
                return
            assert header["kind"] != "error", header

    def until_still(self) -> None:
        """Return once nothing has come for a while."""
        self._frames.clear()
        self.sock.settimeout(1.0)
        give_up = time.monotonic() + HELD_S
        try:
            while time.monotonic() < give_up:
                self._frames += self._decoder.feed(self.sock.recv(1 << 16))
        except TimeoutError:
            return
        finally:
            self.sock.settimeout(HELD_S)
        raise AssertionError("parts come and come")

    def close(self) -> None:
        self.model.let_go.set()
        self.sock.close()
        self._thread.join(HELD_S)
        assert not self._thread.is_alive()


@pytest.fixture
def worker(tmp_path: Path) -> Iterator[Worker]:
    one = Worker(tmp_path)
    one.until(None, "hello")
    for number in range(3):  # from here on its model is known to be slow
        one.ask(number, X)
        one.until(number, "result")
    yield one
    one.close()


def test_streams_go_on_beside_a_slow_batch_and_wait_for_one_that_hangs(worker: Worker) -> None:
    worker.ask(10, HELD)
    assert worker.model.entered.wait(HELD_S)
    worker.send({"kind": "infer", "id": 11, "content_type": "text/plain", "stream": True}, [b""])
    for _ in range(3):
        worker.until(11, "part")
    worker.until_still()  # so the daemon hears nothing, and finds out
    worker.send({"kind": "call", "id": 12, "method": "ping"})
    worker.until(12, "reply")
    worker.model.let_go.set()
    worker.until(10, "result")
    worker.until(11, "part")
    worker.send({"kind": "cancel", "id": 11})
    worker.until(11, "error")


def test_a_stream_is_withdrawn_while_a_batch_hangs(worker: Worker) -> None:
    worker.ask(10, HELD)
    assert worker.model.entered.wait(HELD_S)
    worker.send({"kind": "infer", "id": 11, "content_type": "text/plain", "stream": True}, [b""])
    worker.until(11, "part")
    worker.until_still()
    worker.send({"kind": "cancel", "id": 11})
    worker.until(11, "error")


def test_the_next_batch_is_decoded_while_a_slow_one_runs(worker: Worker) -> None:
    worker.ask(10, HELD)
    assert worker.model.entered.wait(HELD_S)
    for number in (11, 12, 14):
        worker.ask(number, X)
    worker.ask(13, np.ones((1, 5), np.float32))
    refused = worker.receive().header  # decoding has found what is wrong with it
    assert (refused["id"], refused["code"]) == (13, "bad_tensor")
    worker.model.let_go.set()
    for number in (10, 11, 12, 14):
        worker.until(number, "result")
