"""Whether a direct lane to a model's worker is there, so that the proxied path is never measured under its name.

The client library falls back to the daemon silently, as it should. Here a lane is asked for first, which gives the
reason of a refusal, and the sockets of a run are counted: a client with a lane holds two, one without holds one.
"""

from __future__ import annotations

import array
import os
import socket
from contextlib import suppress
from pathlib import Path
from typing import Final

from agent.client.messages import ANSWER_LIMITS, lane_frame
from agent.errors import AgentError
from agent.wire import Decoder, Frame

_TIMEOUT_S: Final = 10.0
_READ_BYTES: Final = 64 * 1024
_DESCRIPTORS_MAX: Final = 4


class LaneError(AgentError):
    """There is no lane; the message says why."""

    code = "no_lane"


def refusal(path: Path, model: str) -> str:
    """Return why the daemon gives no lane to ``model``; empty if it does.

    Raises:
        OSError: there is no daemon.
    """
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
        sock.settimeout(_TIMEOUT_S)
        sock.connect(str(path))
        sock.sendall(b"".join(lane_frame(1, model)))
        try:
            frame, descriptors = _answer(sock)
        except OSError as error:
            return f"lane not granted: {error}"
    for descriptor in descriptors:
        os.close(descriptor)
    header = frame.header
    if header["kind"] == "reply" and len(descriptors) == 1:
        return ""
    if header["kind"] == "error":
        return f"lane not granted: {header.get('code')}: {header.get('message')}"
    return f"lane not granted: {header['kind']!r} with {len(descriptors)} descriptors"


def open_sockets() -> int:
    """Return how many sockets this process holds."""
    count = 0
    for number in os.listdir("/proc/self/fd"):
        with suppress(OSError):  # the one that lists them
            count += os.readlink(f"/proc/self/fd/{number}").startswith("socket:")
    return count


def require_lanes(sockets: int, *, clients: int) -> None:
    """Raise ``LaneError`` unless ``clients`` that hold ``sockets`` together each had a lane to the end."""
    if sockets < 2 * clients:
        raise LaneError(f"lane not granted: {clients} clients ended with {max(0, sockets - clients)} lanes")


def _answer(sock: socket.socket) -> tuple[Frame, list[int]]:
    decoder, descriptors = Decoder(ANSWER_LIMITS), array.array("i")
    room = socket.CMSG_SPACE(_DESCRIPTORS_MAX * descriptors.itemsize)
    while True:
        data, ancillary, _, _ = sock.recvmsg(_READ_BYTES, room, socket.MSG_CMSG_CLOEXEC)
        for level, kind, passed in ancillary:
            if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
                descriptors.frombytes(passed[: len(passed) - len(passed) % descriptors.itemsize])
        if not data:
            raise ConnectionResetError("closed by the daemon")
        for frame in decoder.feed(data):
            return frame, list(descriptors)
