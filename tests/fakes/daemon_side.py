"""The daemon's side of the worker protocol, written from the contract alone: blocking, plain, for tests.

It shares ``agent.wire`` with the worker and nothing else, so it checks the protocol from outside.
"""

from __future__ import annotations

import os
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import msgpack
import numpy as np

from agent import tensors
from agent.wire import Decoder, Frame, encode

ROOT = Path(__file__).resolve().parents[2]
LIMIT_S = 60.0


class ZygoteProcess:
    """A started zygote and the packets it sends."""

    def __init__(self, runtime: str = "onnx", **environment: str) -> None:
        self.control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.control.settimeout(LIMIT_S)
        self.process = subprocess.Popen(
            [sys.executable, "-m", "agent.worker.zygote", "--runtime", runtime, "--control-fd", str(theirs.fileno())],
            pass_fds=[theirs.fileno()],
            cwd=ROOT,
            env={"PATH": os.environ.get("PATH", ""), "PYTHONPATH": str(ROOT), **environment},
            start_new_session=True,
        )
        theirs.close()
        self._token = 0
        self._unread: list[dict[str, Any]] = []
        self.first, _ = self._receive()

    def fork(self, spec: Mapping[str, Any]) -> WorkerProcess:
        """Fork a worker with ``spec``; its hello is not awaited."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        packed = msgpack.packb(spec)
        memory = os.memfd_create("spec")
        os.write(memory, packed)
        self._token += 1
        answer, descriptors = self.order(
            {"op": "fork", "token": self._token, "spec_len": len(packed)}, [theirs.fileno(), memory]
        )
        theirs.close()
        os.close(memory)
        assert answer["op"] == "forked", answer
        assert answer["token"] == self._token
        (pidfd,) = descriptors
        return WorkerProcess(self, answer["pid"], pidfd, ours)

    def order(self, message: Any, descriptors: Sequence[int] = ()) -> tuple[dict[str, Any], list[int]]:
        """Send one packet and return the answer to it."""
        packet = message if isinstance(message, bytes) else msgpack.packb(message)
        socket.send_fds(self.control, [packet], list(descriptors))
        while True:
            answer, received = self._receive()
            if answer["op"] != "exited":
                return answer, received
            self._unread.append(answer)

    def exit_of(self, pid: int) -> dict[str, Any]:
        """Wait for and return the ``exited`` message of ``pid``."""
        while True:
            for message in self._unread:
                if message["op"] == "exited" and message["pid"] == pid:
                    self._unread.remove(message)
                    return message
            self._unread.append(self._receive()[0])

    def close(self) -> None:
        """Close the control and collect the process."""
        self.control.close()
        try:
            self.process.wait(LIMIT_S)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
            raise

    def _receive(self) -> tuple[dict[str, Any], list[int]]:
        packet, descriptors, _, _ = socket.recv_fds(self.control, 65536, 4)
        assert packet, "the zygote closed its control"
        return msgpack.unpackb(packet), descriptors


class WorkerProcess:
    """A forked worker, its pidfd and its channel."""

    def __init__(self, zygote: ZygoteProcess, pid: int, pidfd: int, channel: socket.socket) -> None:
        self.zygote = zygote
        self.pid = pid
        self.pidfd = pidfd
        self.channel = channel
        channel.settimeout(LIMIT_S)
        self._decoder = Decoder()
        self._frames: list[Frame] = []
        self._id = 0
        self._corked: list[bytes] | None = None

    def cork(self) -> None:
        """Hold what is sent from here on."""
        self._corked = []

    def uncork(self) -> None:
        """Send in one piece what was held."""
        held, self._corked = self._corked or [], None
        self.channel.sendall(b"".join(held))

    def receive(self) -> Frame:
        """Return the next frame; ``EOFError`` when the worker has closed."""
        while not self._frames:
            place = self._decoder.body_buffer()
            if place is not None:
                count = self.channel.recv_into(place)
                place.release()
                if not count:
                    raise EOFError
                frame = self._decoder.body_filled(count)
                self._frames += [frame] if frame is not None else []
                continue
            data = self.channel.recv(1 << 20)
            if not data:
                raise EOFError
            self._frames += self._decoder.feed(data)
        return self._frames.pop(0)

    def hello(self) -> dict[str, Any]:
        """Return the hello, or fail with the error that came instead."""
        header = self.receive().header
        assert header["kind"] == "hello", header
        return header

    def send(self, header: Mapping[str, Any], body: Sequence[Any] = ()) -> None:
        """Send one frame."""
        frame = b"".join(bytes(part) for part in encode(header, body))
        if self._corked is None:
            self.channel.sendall(frame)
        else:
            self._corked.append(frame)

    def next_id(self) -> int:
        """Return an id not used before."""
        self._id += 1
        return self._id

    def post(self, inputs: Mapping[str, Any], **fields: Any) -> int:
        """Send an infer frame of tensors; return its id."""
        entries, buffers = tensors.pack({name: np.asarray(value) for name, value in inputs.items()})
        number = self.next_id()
        self.send({"kind": "infer", "id": number, "tensors": entries, **fields}, buffers)
        return number

    def post_raw(self, body: bytes, content_type: str, **fields: Any) -> int:
        """Send an infer frame of raw bytes; return its id."""
        number = self.next_id()
        self.send({"kind": "infer", "id": number, "content_type": content_type, **fields}, [body])
        return number

    def infer(self, inputs: Mapping[str, Any], **fields: Any) -> dict[str, np.ndarray]:
        """Return the outputs of one request."""
        number = self.post(inputs, **fields)
        frame = self.receive()
        assert frame.header["kind"] == "result", frame.header
        assert frame.header["id"] == number
        return tensors.unpack(frame.header["tensors"], bytes(frame.body))

    def ask(self, body: bytes, content_type: str, **fields: Any) -> Frame:
        """Return the answer to one raw request."""
        number = self.post_raw(body, content_type, **fields)
        frame = self.receive()
        assert frame.header["id"] == number
        return frame

    def call(self, method: str) -> Any:
        """Return the value of a call."""
        number = self.next_id()
        self.send({"kind": "call", "id": number, "method": method})
        header = self.receive().header
        assert header["id"] == number
        return header.get("value", header)

    def kill(self) -> None:
        """SIGKILL through the pidfd."""
        signal.pidfd_send_signal(self.pidfd, signal.SIGKILL)

    def wait_gone(self) -> None:
        """Wait until the process has ended."""
        poller = select.poll()
        poller.register(self.pidfd, select.POLLIN)
        assert poller.poll(LIMIT_S * 1000), "the worker did not end"

    def close(self) -> None:
        """Close both descriptors; kill the process if it does not leave by itself."""
        self.channel.close()
        poller = select.poll()
        poller.register(self.pidfd, select.POLLIN)
        if not poller.poll(LIMIT_S * 1000):
            self.kill()
        os.close(self.pidfd)


def wait_until(condition: Any, what: str) -> None:
    """Poll ``condition`` up to the bound."""
    until = time.monotonic() + LIMIT_S
    while not condition():
        assert time.monotonic() < until, f"never happened: {what}"
        time.sleep(0.01)
