"""Watching the GPUs at a low rate: metrics of how they are doing, and word of one that is lost or back.

``GpuWatch`` is a component. NVML is asked in a thread, one call at a time (``Question``): a driver in trouble may not
answer for minutes, which costs that thread and nothing else, and is said. Leaves out: what follows from a loss
(``engine`` is told).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from typing import Any, Final

from agent.clock import Clock
from agent.events import EventBus, Severity, Stream
from agent.log import get_logger
from agent.metrics import Metrics
from agent.nvml import Fault, Reading, Unread
from agent.profile import Gpu
from agent.question import Question

_log = get_logger("gpus")
_ANSWER_TIMEOUT_S: Final = 30.0
_GAUGES: Final = (
    ("inferd_gpu_memory_used_bytes", "GPU memory in use", "memory_used_bytes"),
    ("inferd_gpu_memory_free_bytes", "GPU memory that is free", "memory_free_bytes"),
    ("inferd_gpu_temperature_celsius", "GPU temperature", "temperature_c"),
    ("inferd_gpu_power_watts", "Power the GPU draws", "power_w"),
    ("inferd_gpu_utilisation_percent", "Share of the last sample period in which a kernel ran", "utilisation_percent"),
)

Seen = Mapping[str, Reading | Unread]


class GpuWatch:
    """Looks after ``gpus``, by their UUIDs.

    Args:
        gpus: Those that were there when the daemon started.
        read: Returns a reading, or why there is none, by UUID; blocks.
        on_lost: Told the device (``cuda:0``) and the reason, once for each loss.
        on_back: Told the device.
    """

    name = "daemon.gpus"

    def __init__(
        self,
        gpus: Sequence[Gpu],
        *,
        read: Callable[[], Seen],
        interval_s: float,
        clock: Clock,
        events: EventBus,
        metrics: Metrics,
        on_lost: Callable[[str, str], None],
        on_back: Callable[[str], None],
        answer_timeout_s: float = _ANSWER_TIMEOUT_S,
    ) -> None:
        self._gpus = {gpu.uuid: gpu for gpu in gpus if gpu.uuid}
        self._seen = Question(read, name="nvml")
        self._interval_s = interval_s
        self._clock = clock
        self._events = events
        self._on_lost = on_lost
        self._on_back = on_back
        self._answer_timeout_s = answer_timeout_s
        self._silent = False
        self._lost: frozenset[str] = frozenset()
        self.seen: dict[str, Reading | Unread] = {}
        for name, text, field in _GAUGES:
            metrics.gauge(name, text, ("gpu", "uuid"), partial(self._values, field))
        metrics.gauge("inferd_gpu_up", "1 while the GPU answers, 0 once it is lost", ("gpu", "uuid"), self._up)

    async def run(self) -> None:
        """Look until cancelled."""
        while True:
            await self.look()
            await self._clock.sleep(self._interval_s)

    async def look(self) -> None:
        """Ask once and tell what changed. A question that was not answered in time is not asked again until it is."""
        try:
            seen = await self._seen.answer(self._answer_timeout_s)
        except TimeoutError:
            if not self._silent:
                self._tell(
                    "gpu.silent", Severity.WARNING, reason=f"the driver gave no answer in {self._answer_timeout_s:g} s"
                )
            self._silent = True
            return
        self._silent = False
        lost, back = changes(self._lost, seen)
        self._lost = self._lost.union(lost).difference(back)
        self.seen = dict(seen)
        for uuid in lost:
            gpu = self._gpus[uuid]
            reason = _reason(seen[uuid])
            self._tell("gpu.lost", Severity.ERROR, gpu=gpu.index, name=gpu.name, uuid=uuid, reason=reason)
            self._on_lost(f"cuda:{gpu.index}", reason)
        for uuid in back:
            gpu = self._gpus[uuid]
            self._tell("gpu.back", Severity.INFO, gpu=gpu.index, name=gpu.name, uuid=uuid)
            self._on_back(f"cuda:{gpu.index}")

    def _tell(self, event: str, severity: Severity, **data: Any) -> None:
        (_log.info if severity is Severity.INFO else _log.error)(event, **data)
        self._events.emit(Stream.HEALTH, event, severity, **data)

    def _values(self, field: str) -> list[tuple[tuple[str, ...], float]]:
        rows = [(uuid, getattr(reading, field)) for uuid, reading in self.seen.items() if isinstance(reading, Reading)]
        return [(self._labels(uuid), float(value)) for uuid, value in rows if value is not None]

    def _up(self) -> list[tuple[tuple[str, ...], float]]:
        return [(self._labels(uuid), float(uuid not in self._lost)) for uuid in self.seen]

    def _labels(self, uuid: str) -> tuple[str, ...]:
        return str(self._gpus[uuid].index), uuid


def changes(lost: Collection[str], now: Seen) -> tuple[list[str], list[str]]:
    """Return who is newly lost, and who of the ``lost`` is back: UUIDs.

    Only a device that NVML calls lost is lost: whatever else keeps NVML from telling may leave CUDA working.
    """
    newly = [uuid for uuid, seen in now.items() if _is_loss(seen) and uuid not in lost]
    back = [uuid for uuid in lost if isinstance(now.get(uuid), Reading)]
    return newly, back


def _is_loss(seen: Reading | Unread) -> bool:
    return isinstance(seen, Unread) and seen.fault is Fault.LOST


def _reason(seen: Reading | Unread) -> str:
    return seen.reason if isinstance(seen, Unread) else ""
