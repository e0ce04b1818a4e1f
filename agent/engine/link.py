"""The daemon's end of one worker's channel: frames out, coalesced; frames in, matched to their requests.

Synchronous by design: every method runs on the loop's thread and returns at once. Promises: each job given to
``send`` ends in exactly one ``on_answer`` or is handed back by ``on_death``. A job that is forgotten keeps its place
until the worker has answered it, so that what waits before a slow worker stays bounded. Leaves out: what to do about
a death.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final

from agent.engine.job import Job
from agent.engine.zygote import WorkerProcess
from agent.errors import FrameError, TooLargeError
from agent.log import get_logger
from agent.wire import Buffer, Decoder, Frame, Limits, encode_head

_log = get_logger("worker")
_RECEIVE_BYTES: Final = 1 << 18
_BUFFERS_MAX: Final = 512  # below IOV_MAX


class WorkerLink:
    """One worker: its process, its channel and the jobs it holds."""

    def __init__(
        self,
        process: WorkerProcess,
        *,
        limits: Limits,
        on_answer: Callable[[Job | None, dict[str, Any], Buffer], None],
        on_frame: Callable[[WorkerLink, dict[str, Any]], None],
        on_death: Callable[[WorkerLink], None],
    ) -> None:
        self.process = process
        self.hello: dict[str, Any] = {}
        self.jobs: dict[int, Job] = {}
        self.held_bytes = 0  # bodies of all that is owed
        self.owed: dict[int, int] = {}  # jobs handed over and not answered, forgotten ones included: their body's bytes
        self.ready_at = 0.0  # loop seconds
        self._heard_at = 0.0  # loop seconds of the last answer, or of the first job after a pause
        self.alive = True
        self.gone = asyncio.Event()
        self.scratch: Path | None = None  # removed by whoever buries the worker
        self._on_answer = on_answer
        self._on_frame = on_frame
        self._on_death = on_death
        self._loop = asyncio.get_running_loop()
        self._decoder = Decoder(limits)
        self._out: list[Buffer] = []
        self._flushing = False
        self._writing = False
        self._loop.add_reader(process.channel.fileno(), self._on_readable)
        self._loop.add_reader(process.pidfd, self._on_exit)

    def send(self, job: Job, header: dict[str, Any]) -> None:
        """Hand ``job`` to the worker under ``header``, whose id is the job's number."""
        self.jobs[job.number] = job
        if not self.owed:
            self._heard_at = self._loop.time()
        body = job.request.body
        self.owed[job.number] = len(body)
        self.held_bytes += len(body)
        self.post(header, body)

    def post(self, header: dict[str, Any], body: Buffer = b"") -> None:
        """Queue one frame; all frames of a loop turn leave in one system call."""
        self._out.append(encode_head(header, len(body)))
        if body:
            self._out.append(body)
        if not self._flushing and not self._writing:
            self._flushing = True
            self._loop.call_soon(self._flush)

    def forget(self, job: Job) -> None:
        """Stop waiting for ``job``: its late answer will be given to ``on_answer`` without it."""
        self.jobs.pop(job.number, None)

    def silent_s(self, now: float) -> float:
        """Return for how long the worker has owed an answer and given none (seconds)."""
        return now - self._heard_at if self.owed and self.alive else 0.0

    def kill(self) -> None:
        """SIGKILL the worker; ``on_death`` follows."""
        self.process.kill()

    def hang_up(self) -> None:
        """Close our direction of the channel: the worker finishes what it holds, then leaves; ``gone`` is set."""
        with contextlib.suppress(OSError):
            self.process.channel.shutdown(socket.SHUT_WR)

    def _detach(self) -> None:
        channel = self.process.channel.fileno()
        self._loop.remove_reader(channel)
        if self._writing:
            self._loop.remove_writer(channel)
        self._loop.remove_reader(self.process.pidfd)

    def _flush(self) -> None:
        self._flushing = False
        if not self.alive:
            return
        out = self._out
        try:
            while out:
                sent = self.process.channel.sendmsg(out[:_BUFFERS_MAX])
                _drop_sent(out, sent)
        except BlockingIOError:
            if not self._writing:
                self._writing = True
                self._loop.add_writer(self.process.channel.fileno(), self._flush)
            return
        except OSError:
            out.clear()  # the worker is dying; its pidfd tells
        if self._writing:
            self._writing = False
            self._loop.remove_writer(self.process.channel.fileno())

    def _on_readable(self) -> None:
        place = self._decoder.body_buffer()
        try:
            if place is not None:
                count = self.process.channel.recv_into(place)
                frame = self._decoder.body_filled(count)
                frames = [frame] if frame is not None else []
                place.release()
            else:
                data = self.process.channel.recv(_RECEIVE_BYTES)
                count = len(data)
                frames = self._decoder.feed(data) if data else []
        except BlockingIOError:
            return
        except OSError:
            count, frames = 0, []
        except (FrameError, TooLargeError) as error:
            _log.error("worker broke the protocol; killing it", pid=self.process.pid, error=str(error))
            self.kill()
            count, frames = 0, []
        if count == 0:
            self._loop.remove_reader(self.process.channel.fileno())  # its pidfd tells the rest
            return
        for frame in frames:
            self._take(frame)

    def _take(self, frame: Frame) -> None:
        header = frame.header
        kind = header["kind"]
        if kind in ("result", "error") and "id" in header:
            held = self.owed.pop(header["id"], None)
            if held is not None:
                self.held_bytes -= held
                self._heard_at = self._loop.time()
                self._on_answer(self.jobs.pop(header["id"], None), header, frame.body)
        else:
            self._on_frame(self, header)

    def _on_exit(self) -> None:
        if not self.alive:
            return
        self._drain()
        self.alive = False
        self._detach()
        self.gone.set()
        self._on_death(self)

    def _drain(self) -> None:
        """Take answers the worker wrote before it died."""
        while True:
            before = len(self.jobs)
            place = self._decoder.body_buffer()
            try:
                if place is not None:
                    frame = self._decoder.body_filled(self.process.channel.recv_into(place) or -1)
                    frames: Sequence[Frame] = [frame] if frame is not None else []
                else:
                    data = self.process.channel.recv(_RECEIVE_BYTES)
                    if not data:
                        return
                    frames = self._decoder.feed(data)
            except (OSError, FrameError, TooLargeError):
                return
            for frame in frames:
                self._take(frame)
            if not frames and before == len(self.jobs) and not self._decoder.mid_frame:
                return


def _drop_sent(out: list[Buffer], sent: int) -> None:
    """Remove ``sent`` bytes from the front of the list."""
    index = 0
    while index < len(out) and sent >= len(out[index]):
        sent -= len(out[index])
        index += 1
    del out[:index]
    if sent:
        out[0] = memoryview(out[0])[sent:]
