"""The worker's end of one channel, to the daemon or to an application: frames in, frames out, nothing unbounded.

Promises: a lone frame costs one ``recvmsg``; descriptors are kept in the order of the frames they came with; all
answers of a turn leave in one ``send``; nothing blocks; what the peer does not take stays here, and ``congested`` says
when no more work should be started for it until it does.
Leaves out: what frames mean, and waiting (``main.py``).
"""

from __future__ import annotations

import array
import contextlib
import os
import select
import socket
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

from agent.errors import FrameError, TooLargeError
from agent.wire import INFER_LEAD, PREFIX, Buffer, Decoder, Frame, Limits, encode_head

_RECEIVE_BYTES: Final = 1 << 16
_ANCILLARY_BYTES: Final = socket.CMSG_SPACE(4 * array.array("i").itemsize)
_BUFFERS_MAX: Final = 512  # below IOV_MAX
_JOIN_BYTES_MAX: Final = 1 << 16  # below it one copy is cheaper than many buffers
_OUTGOING_BYTES_MAX: Final = 32 * 1024 * 1024
_REPEATS_MAX: Final = 256  # kinds of headers the daemon forwards again and again
_LANE_REPEATS_MAX: Final = 32  # of one application
# As plain integers: the enum's own arithmetic costs more than the system call.
_RECEIVE_FLAGS: Final = int(socket.MSG_DONTWAIT) | int(socket.MSG_CMSG_CLOEXEC)
_LOST: Final = int(socket.MSG_CTRUNC)  # of a descriptor that found no place: the kernel has closed it
_SEND_FLAGS: Final = int(socket.MSG_DONTWAIT) | int(socket.MSG_NOSIGNAL)


class Channel:
    """A connected stream socket that carries frames."""

    def __init__(
        self, sock: socket.socket, limits: Limits, *, place: Callable[[Mapping[str, Any], int], None] | None = None
    ) -> None:
        """``place`` marks an application's end: it may refuse a large body, and descriptors are not taken from it."""
        sock.setblocking(False)
        self.descriptor_number = sock.fileno()
        self.closed = False  # the peer will send nothing more
        self.drained = False  # the last read found nothing
        self.sent_bytes = 0
        self._socket = sock
        self._limits = limits
        self._takes_descriptors = place is None
        repeats_max = _REPEATS_MAX if place is None else _LANE_REPEATS_MAX
        self._decoder = Decoder(limits, place=place, repeats=INFER_LEAD, repeats_max=repeats_max)
        self._outgoing: list[Buffer] = []
        self._outgoing_bytes = 0
        self._descriptors: deque[int] = deque()  # received, their frames not handled yet

    @property
    def congested(self) -> bool:
        """Whether too much waits to be taken by the peer."""
        return self._outgoing_bytes > _OUTGOING_BYTES_MAX

    @property
    def pending(self) -> bool:
        """Whether anything waits to be taken by the peer."""
        return bool(self._outgoing)

    @property
    def abandoned(self) -> bool:
        """Whether the peer has closed altogether; ``closed`` is also true of one that still takes its answers."""
        poll = select.poll()
        poll.register(self.descriptor_number, 0)
        return bool(poll.poll(0))

    @property
    def filling(self) -> bool:
        """Whether a frame is half here; what the peer said after it is not known yet."""
        return self._decoder.mid_frame

    def receive(self) -> list[Frame]:
        """Return the frames that have arrived with one read.

        Raises:
            FrameError, TooLargeError: the peer broke the protocol; leave.
        """
        place = self._decoder.body_buffer()
        self.drained = False
        try:
            if place is not None:
                count = self._socket.recv_into(place, 0, _RECEIVE_FLAGS)
                frame = self._decoder.body_filled(count) if count else None
                frames = [frame] if frame is not None else []
            elif not self._takes_descriptors:  # the kernel closes what is sent along
                data = self._socket.recv(_RECEIVE_BYTES, _RECEIVE_FLAGS)
                count = len(data)
                frames = self._decoder.feed(data) if count else []
            else:
                data, ancillary, flags, _ = self._socket.recvmsg(_RECEIVE_BYTES, _ANCILLARY_BYTES, _RECEIVE_FLAGS)
                if ancillary:
                    self._keep(ancillary)
                elif flags & _LOST:
                    self._descriptors.append(-1)
                count = len(data)
                frames = self._decoder.feed(data) if count else []
        except BlockingIOError:
            self.drained = True
            return []
        except ConnectionError:
            count, frames = 0, []
        if not count:
            self.closed = True
        return frames

    def descriptor(self) -> int:
        """Return the descriptor that came with a frame; the caller closes it. -1: this process may have no more.

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

    def post_whole(self, frame: bytes) -> None:
        """Queue one small frame that is encoded already."""
        self._outgoing.append(frame)
        self._outgoing_bytes += len(frame)

    def flush(self) -> None:
        """Send what the socket takes now."""
        outgoing = self._outgoing
        while outgoing:
            try:
                if self._outgoing_bytes <= _JOIN_BYTES_MAX:
                    outgoing[:] = (b"".join(outgoing),)
                    sent = self._socket.send(outgoing[0], _SEND_FLAGS)
                else:
                    sent = self._socket.sendmsg(outgoing[:_BUFFERS_MAX], (), _SEND_FLAGS)
            except BlockingIOError:
                return
            except OSError:  # nobody is there to read it
                self.closed = True
                outgoing.clear()
                self._outgoing_bytes = 0
                return
            self._outgoing_bytes -= sent
            self.sent_bytes += sent
            if not self._outgoing_bytes:
                outgoing.clear()
                return
            _drop(outgoing, sent)

    def refuse_more(self) -> None:
        """Let nothing more arrive: the peer's next ``send`` fails, what it has sent can still be received."""
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RD)

    def close(self) -> None:
        """Close the socket and every descriptor that nobody took."""
        for descriptor in self._descriptors:
            if descriptor >= 0:
                os.close(descriptor)
        self._descriptors.clear()
        self._decoder.drop()  # which may know its owner
        self._socket.close()

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
