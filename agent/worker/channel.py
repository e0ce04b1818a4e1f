"""The worker's end of its channel: frames in, frames out, nothing unbounded.

Promises: a lone frame costs one ``recvmsg``; descriptors are kept in the order of the frames they came with; all
answers of a turn leave in one ``sendmsg``; what the daemon does not take stays here, and ``congested`` says when no
more work should be started until it does.
Leaves out: what frames mean.
"""

from __future__ import annotations

import array
import select
import socket
from collections import deque
from collections.abc import Sequence
from typing import Any, Final

from agent.errors import FrameError, TooLargeError
from agent.wire import PREFIX, Buffer, Decoder, Frame, Limits, encode_head

_RECEIVE_BYTES: Final = 1 << 16
_ANCILLARY_BYTES: Final = socket.CMSG_SPACE(4 * array.array("i").itemsize)
_BUFFERS_MAX: Final = 512  # below IOV_MAX
_OUTGOING_BYTES_MAX: Final = 32 * 1024 * 1024


class Channel:
    """A connected stream socket that carries frames."""

    def __init__(self, sock: socket.socket, limits: Limits) -> None:
        sock.setblocking(True)
        self._socket = sock
        self._limits = limits
        self._decoder = Decoder(limits)
        self._outgoing: list[Buffer] = []
        self._outgoing_bytes = 0
        self._descriptors: deque[int] = deque()  # received, their frames not handled yet
        self.closed = False  # the daemon will send nothing more

    @property
    def congested(self) -> bool:
        """Whether too much waits to be taken by the daemon."""
        return self._outgoing_bytes > _OUTGOING_BYTES_MAX

    @property
    def pending(self) -> bool:
        """Whether anything waits to be taken by the daemon."""
        return bool(self._outgoing)

    @property
    def filling(self) -> bool:
        """Whether a large body is half here; what the daemon said after it is not known yet."""
        return self._decoder.body_buffer() is not None

    def receive(self, *, wait: bool, frames_max: int) -> list[Frame]:
        """Return the frames that have arrived, about ``frames_max`` at most; with ``wait`` block for the first bytes.

        Raises:
            FrameError, TooLargeError: the daemon broke the protocol; leave.
        """
        frames: list[Frame] = []
        flags = 0 if wait else socket.MSG_DONTWAIT
        while len(frames) < frames_max:
            place = self._decoder.body_buffer()
            try:
                if place is None:
                    data, ancillary, _, _ = self._socket.recvmsg(
                        _RECEIVE_BYTES, _ANCILLARY_BYTES, flags | socket.MSG_CMSG_CLOEXEC
                    )
                    if ancillary:
                        self._keep(ancillary)
                    count, full = len(data), len(data) == _RECEIVE_BYTES or bool(ancillary)
                    frames += self._decoder.feed(data)
                else:
                    count = self._socket.recv_into(place, 0, flags | (socket.MSG_WAITALL if wait else 0))
                    full = count == len(place)
                    frame = self._decoder.body_filled(count)
                    if frame is not None:
                        frames.append(frame)
            except BlockingIOError:
                break
            except ConnectionError:
                count, full = 0, False
            if count == 0:
                self.closed = True
            if not full:  # nothing more is there for now
                break
            flags = socket.MSG_DONTWAIT
            wait = False
        return frames

    def descriptor(self) -> int:
        """Return the descriptor that came with an ``attach`` frame; the caller closes it.

        Raises:
            FrameError: none came.
        """
        if not self._descriptors:
            raise FrameError("'attach' came without its descriptor")
        return self._descriptors.popleft()

    def post(self, header: dict[str, Any], body: Sequence[Buffer] = ()) -> None:
        """Queue one frame for ``flush``.

        Raises:
            TooLargeError: over the limits that the daemon reads with; nothing was queued.
        """
        size = sum(map(len, body))
        head = encode_head(header, size)
        limits = self._limits
        if size > limits.body_bytes_max or len(head) - PREFIX.size > limits.header_bytes_max:
            raise TooLargeError(f"answer of {size} bytes; the limit is {limits.body_bytes_max}")
        self._outgoing.append(head)
        self._outgoing += body
        self._outgoing_bytes += len(head) + size

    def flush(self) -> None:
        """Send what the socket takes now."""
        outgoing = self._outgoing
        while outgoing:
            try:
                sent = self._socket.sendmsg(outgoing[:_BUFFERS_MAX], (), socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)
            except BlockingIOError:
                return
            except OSError:  # nobody is there to read it
                self.closed = True
                outgoing.clear()
                self._outgoing_bytes = 0
                return
            self._outgoing_bytes -= sent
            _drop(outgoing, sent)

    def wait(self, timeout_s: float | None = None, *, to_receive: bool) -> None:
        """Sleep until something pending can be sent, or anything received if so wished, or the time is up."""
        poller = select.poll()
        readable = select.POLLIN if to_receive and not self.closed else 0
        poller.register(self._socket, readable | (select.POLLOUT if self._outgoing else 0))
        poller.poll(None if timeout_s is None else max(0, int(timeout_s * 1000 + 0.999)))

    def _keep(self, ancillary: Sequence[tuple[int, int, bytes]]) -> None:
        for _, _, data in ancillary:
            numbers = array.array("i")
            numbers.frombytes(data[: len(data) - len(data) % numbers.itemsize])
            self._descriptors.extend(numbers)


def _drop(outgoing: list[Buffer], sent: int) -> None:
    """Remove ``sent`` bytes from the front."""
    index = 0
    while index < len(outgoing) and sent >= len(outgoing[index]):
        sent -= len(outgoing[index])
        index += 1
    del outgoing[:index]
    if sent:
        outgoing[0] = memoryview(outgoing[0])[sent:]
