"""Answers in parts, as the engine sees them: what is counted, and how much of a worker they may take.

A stream is a job that asked for parts, of a model whose handler gives them. It stays outstanding until its ``result``
or ``error``; each part is a sign of life of its worker. Pure but for the numbers it counts.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

from agent.engine.job import Job
from agent.errors import FrameError, OverloadedError
from agent.metrics import Counter, HistogramSeries, Labels, Metrics
from agent.wire import PART_BYTES_MAX, Buffer

# What may still arrive of a stream after its worker was asked to pause: what lies in the socket, and two parts.
OVERRUN_BYTES_MAX: Final = 4 * PART_BYTES_MAX


class StreamCounts:
    """The metrics of one version's streams."""

    def __init__(self, metrics: Metrics, labels: Labels) -> None:
        names = ("model", "version")
        self._labels = labels
        self._parts: Counter = metrics.counter("inferd_stream_parts", "Parts of streamed answers", names)
        self._first: HistogramSeries = metrics.histogram(
            "inferd_stream_first_part_seconds", "Arrival to first part of streamed answers", names
        ).series(labels)

    def count(self, job: Job, now: float) -> None:
        """Count one more part of ``job``."""
        if not job.parts:
            self._first.observe(now - job.arrived)
        job.parts += 1
        self._parts.add(self._labels)


class Paused(dict[int, int]):
    """Which of a worker's jobs were asked to pause, by number, and how many bytes each has sent since."""

    def ask(self, number: int, *, paused: bool) -> bool:
        """Note what a job is asked to do; return whether that is new."""
        if paused == (number in self):
            return False
        if paused:
            self[number] = 0
        else:
            del self[number]
        return True

    def check(self, number: int, body: Buffer) -> None:
        """Count a part that arrived.

        Raises:
            FrameError: it is too large, or so much has come that the worker ignores the pause.
        """
        if len(body) > PART_BYTES_MAX:
            raise FrameError(f"a part of {len(body)} bytes")
        if number in self:
            self[number] += len(body)
            if self[number] > OVERRUN_BYTES_MAX:
                raise FrameError("a stream goes on though it was asked to pause")


def check_room(held: Iterable[Job], *, window: int) -> None:
    """Let one more stream to a pool whose handler streams, or not: half of its room stays free for whole answers.

    Raises:
        OverloadedError: too many jobs that asked for parts are there.
    """
    bound = max(1, window // 2)
    if sum(1 for job in held if job.request.part is not None) >= bound:
        raise OverloadedError(f"{bound} streams are under way; try again later")
