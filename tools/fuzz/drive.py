"""Sending cases to a daemon and looking at what comes of it.

After each case a client of good manners asks, on a connection of its own, and must be answered correctly. Every so
often the daemon's descriptors, memory, workers and log are compared with the beginning.
"""

from __future__ import annotations

import array
import json
import os
import select
import socket
import tempfile
import time
from collections import Counter, deque
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Final

from agent.client.messages import ANSWER_LIMITS
from agent.errors import AgentError
from agent.wire import Decoder, encode
from tools.fuzz.cases import REGION_BYTES, Case, Step, case_of
from tools.rig.box import Rig
from tools.rig.line import SEALS, Line, memfd, values
from tools.rig.watch import Holding, crashes, look, not_settled

_KINDS: Final = frozenset({"result", "error", "reply", "hello", "bye"})  # what a daemon says
_LAST_ID: Final = (1 << 63) - 1  # of the question that ends a patient case
_QUIET_S: Final = 0.005
_PATIENCE_S: Final = 0.1  # at most, for a case's answers
_SEND_TIMEOUT_S: Final = 20.0
_CLOSE_TIMEOUT_S: Final = 60.0
_SETTLE_TIMEOUT_S: Final = 90.0  # the daemon gives its heap back every half minute
_KEPT_MAX: Final = 2000  # cases since the last look
_READ_BYTES: Final = 1 << 18
_DESCRIPTORS_ROOM: Final = socket.CMSG_SPACE(16 * 4)


class FaultError(Exception):
    """The daemon did what it must not; the message says what."""


class Driver:
    """Sends cases to a served box. Use it in a ``with`` block."""

    def __init__(self, rig: Rig) -> None:
        self.outcomes: Counter[str] = Counter()  # answers by kind or error code
        self.kept: deque[Case] = deque(maxlen=_KEPT_MAX)  # since the last look
        self._rig = rig
        self._control = Line(rig.socket, "control")
        self._before: Holding | None = None

    def __enter__(self) -> Driver:
        return self

    def __exit__(self, *_error: object) -> None:
        self._control.__exit__()

    def run(self, case: Case) -> None:
        """Send one case; raise ``FaultError`` if anything but its own connection suffers."""
        self.kept.append(case)
        try:
            send_case(self._rig.socket, case, self.outcomes)
        except (ConnectionRefusedError, FileNotFoundError) as error:
            raise FaultError(f"nobody listens any more: {error}; {self._rig.tail()}") from error
        self._check_control()

    def look(self) -> None:
        """Compare what the daemon holds with the first look; raise ``FaultError`` if it kept anything."""
        deadline = time.monotonic() + _SETTLE_TIMEOUT_S
        while True:
            try:
                now = look(self._rig)
            except (OSError, AgentError) as error:
                raise FaultError(f"the daemon says nothing any more: {error}; {self._rig.tail()}") from error
            self._before = self._before or now
            wrong = [line for line in not_settled(self._before, now) if "connections are open" not in line]
            wrong += [f"workers died: {now.gauges['inferd_worker_deaths']:g}"] * bool(
                now.gauges["inferd_worker_deaths"]
            )
            wrong += [f"the daemon's log: {line}" for line in crashes(self._rig)]
            if not wrong:
                self.kept.clear()
                return
            if time.monotonic() > deadline:
                raise FaultError("; ".join(wrong))
            time.sleep(0.1)

    def _check_control(self) -> None:
        line = self._control
        try:
            line.infer(values(line.ledger.asked, 8))
            line.settle()
        except OSError as error:
            raise FaultError(f"the control client: {error}; {self._rig.tail()}") from error
        if line.ledger.faults or set(line.ledger.outcomes) > {"result"}:
            raise FaultError(f"the control client: {line.ledger.faults or dict(line.ledger.outcomes)}")


def send_case(path: Path, case: Case, outcomes: Counter[str]) -> None:
    """Send one case on a connection of its own; count the answers in ``outcomes``.

    Raises:
        FaultError: an answer that a daemon must not give, or none where it must close.
        OSError: nobody listens.
    """
    _Conversation(path, outcomes).hold(case)


def write_cases(path: Path, cases: list[Case], fault: str) -> None:
    """Keep what led to a fault."""
    path.write_text(json.dumps({"fault": fault, "cases": [case.plain() for case in cases]}, indent=1) + "\n")


def read_cases(path: Path) -> list[Case]:
    """Return what ``write_cases`` kept."""
    return [case_of(plain) for plain in json.loads(path.read_text())["cases"]]


class _Conversation:
    """One case's connection, and its lane if it is granted one."""

    def __init__(self, path: Path, outcomes: Counter[str]) -> None:
        self._outcomes = outcomes
        self._sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._sock.connect(str(path))
        self._decoders = {self._sock: Decoder(ANSWER_LIMITS)}
        self._lane: socket.socket | None = None
        self._last_answered = False

    def hold(self, case: Case) -> None:
        """Say everything, listen, and go."""
        try:
            for step in case.steps:
                if not self._say(step):
                    break
            if case.patient:
                self._listen()
            self._end()
        finally:
            for sock in self._decoders:
                sock.close()

    def _say(self, step: Step) -> bool:
        """Return whether the daemon still listens."""
        sock = self._lane if step.on_lane else self._sock
        if sock is None or (sock is self._lane and sock not in self._decoders):
            return True
        try:
            with _descriptors(step.descriptors) as passed:
                sent = socket.send_fds(sock, [step.data], passed) if passed else 0
            self._send(sock, step.data[sent:])
        except OSError:
            return self._sock in self._decoders
        return True

    def _send(self, sock: socket.socket, data: bytes) -> None:
        view, deadline = memoryview(data), time.monotonic() + _SEND_TIMEOUT_S
        while view:
            self._take(0.0)
            if sock not in self._decoders:
                raise ConnectionResetError("closed by the daemon")
            _, writable, _ = select.select([], [sock], [], 0.05)
            if writable:
                with suppress(BlockingIOError):
                    view = view[sock.send(view, socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL) :]
            elif time.monotonic() > deadline:
                raise FaultError(f"the daemon took nothing for {_SEND_TIMEOUT_S:g} s")

    def _listen(self) -> None:
        """Wait for answers: until a last question is answered and all is quiet, or for a while."""
        with suppress(OSError):
            self._send(self._sock, b"".join(map(bytes, encode({"kind": "call", "id": _LAST_ID, "method": "ping"}))))
        deadline = time.monotonic() + _PATIENCE_S
        while self._sock in self._decoders and (left := deadline - time.monotonic()) > 0:
            if not self._take(_QUIET_S if self._last_answered else left):
                return

    def _end(self) -> None:
        """Close our half; the daemon must close its own."""
        with suppress(OSError):
            self._sock.shutdown(socket.SHUT_WR)
        deadline = time.monotonic() + _CLOSE_TIMEOUT_S
        while self._sock in self._decoders:
            if time.monotonic() > deadline:
                raise FaultError(f"the daemon did not close a connection within {_CLOSE_TIMEOUT_S:g} s")
            self._take(1.0)

    def _take(self, timeout_s: float) -> bool:
        """Take what comes within a time; return whether anything did."""
        readable, _, _ = select.select(list(self._decoders), [], [], timeout_s)
        for sock in readable:
            try:
                data, ancillary, _, _ = sock.recvmsg(_READ_BYTES, _DESCRIPTORS_ROOM, socket.MSG_CMSG_CLOEXEC)
            except OSError:
                data, ancillary = b"", []
            self._take_descriptors(ancillary)
            if not data:
                del self._decoders[sock]
                sock.close()
                continue
            for frame in self._decoders[sock].feed(data):
                self._check(frame.header)
        return bool(readable)

    def _take_descriptors(self, ancillary: list[tuple[int, int, bytes]]) -> None:
        for _, kind, data in ancillary:
            if kind != socket.SCM_RIGHTS:
                continue
            for number in array.array("i", data[: len(data) - len(data) % 4]):
                lane = socket.socket(fileno=number)
                self._decoders[lane] = Decoder(ANSWER_LIMITS)
                self._lane = lane

    def _check(self, header: dict[str, Any]) -> None:
        kind = header["kind"]
        self._outcomes[str(header.get("code")) if kind == "error" else kind] += 1
        self._last_answered = self._last_answered or header.get("id") == _LAST_ID
        if kind not in _KINDS:
            raise FaultError(f"the daemon said {header}")
        if header.get("code") == "internal":
            raise FaultError(f"an internal error: {header.get('message')}")


@contextmanager
def _descriptors(kinds: tuple[str, ...]) -> Iterator[list[int]]:
    """Yield open descriptors of these kinds."""
    found: list[int] = []
    try:
        for kind in kinds:
            if kind == "pipe":
                read, write = os.pipe()
                os.close(write)
                found.append(read)
            elif kind == "file":
                with tempfile.TemporaryFile() as file:
                    found.append(os.dup(file.fileno()))
            else:
                with memfd(REGION_BYTES, seals=SEALS if kind == "sealed" else 0) as descriptor:
                    found.append(os.dup(descriptor))
        yield found
    finally:
        for descriptor in found:
            os.close(descriptor)
