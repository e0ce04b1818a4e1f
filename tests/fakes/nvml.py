"""A stand-in for the driver: every function of ``pynvml`` that is used, with the library's own exceptions.

It obeys the real contract: nothing works before ``nvmlInit`` or after the last ``nvmlShutdown``; handles belong to an
initialisation; a lost device answers every question with GPU_IS_LOST and is not enumerated after the next
initialisation; a board may lack sensors; a driver can be absent, of another version than its library, or closed to
this user.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pynvml

from agent.nvml import Nvml

GIB = 1 << 30


@dataclass
class Board:
    """One device. ``lost`` and ``lacks`` may change at any time."""

    name: str = "Tesla T4"
    uuid: str = "GPU-0"
    compute: tuple[int, int] = (7, 5)
    memory_bytes: int = 16 * GIB
    used_bytes: int = 1 * GIB
    temperature_c: int = 41
    power_mw: int = 28_500
    busy_percent: int = 12
    held: dict[int, int] = field(default_factory=dict)  # bytes by process
    lost: bool = False
    lacks: frozenset[str] = frozenset()  # "temperature", "power", "utilisation"


@dataclass(frozen=True)
class _Handle:
    board: Board
    epoch: int


@dataclass
class FakeDriver:
    """The driver and its library. ``failing`` is what ``nvmlInit`` ends with, an NVML return code."""

    boards: list[Board] = field(default_factory=lambda: [Board()])
    version: str | bytes = "550.54.14"
    cuda: int = 12040
    failing: int = 0
    shutdowns: int = 0
    NVMLError: type[Exception] = pynvml.NVMLError
    _users: int = 0
    _epoch: int = 0
    _enumerated: list[Board] = field(default_factory=list)

    def opened(self) -> Nvml:
        """Return the port over this driver."""
        return Nvml(self)

    def nvmlInit(self) -> None:  # noqa: N802
        if self.failing:
            raise pynvml.NVMLError(self.failing)
        if not self._users:
            self._epoch += 1
            self._enumerated = [board for board in self.boards if not board.lost or not self._was_enumerated(board)]
        self._users += 1

    def nvmlShutdown(self) -> None:  # noqa: N802
        self._require_init()
        self._users -= 1
        self.shutdowns += 1

    def nvmlSystemGetDriverVersion(self) -> str | bytes:  # noqa: N802
        self._require_init()
        return self.version

    def nvmlSystemGetCudaDriverVersion(self) -> int:  # noqa: N802
        self._require_init()
        return self.cuda

    def nvmlDeviceGetCount(self) -> int:  # noqa: N802
        self._require_init()
        return len(self._enumerated)

    def nvmlDeviceGetHandleByIndex(self, index: int, /) -> Any:  # noqa: N802
        self._require_init()
        if not 0 <= index < len(self._enumerated):
            raise pynvml.NVMLError(pynvml.NVML_ERROR_INVALID_ARGUMENT)
        return self._handle(self._enumerated[index])

    def nvmlDeviceGetHandleByUUID(self, uuid: str, /) -> Any:  # noqa: N802
        self._require_init()
        for board in self._enumerated:
            if board.uuid == uuid:
                return self._handle(board)
        raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_FOUND)

    def nvmlDeviceGetUUID(self, handle: Any, /) -> str | bytes:  # noqa: N802
        return self._board(handle).uuid

    def nvmlDeviceGetName(self, handle: Any, /) -> str | bytes:  # noqa: N802
        return self._board(handle).name.encode()  # older libraries return bytes

    def nvmlDeviceGetCudaComputeCapability(self, handle: Any, /) -> tuple[int, int]:  # noqa: N802
        return self._board(handle).compute

    def nvmlDeviceGetMemoryInfo(self, handle: Any, /) -> Any:  # noqa: N802
        board = self._board(handle)
        return SimpleNamespace(
            total=board.memory_bytes, used=board.used_bytes, free=board.memory_bytes - board.used_bytes
        )

    def nvmlDeviceGetTemperature(self, handle: Any, sensor: int, /) -> int:  # noqa: N802
        assert sensor == pynvml.NVML_TEMPERATURE_GPU
        return self._sensor(handle, "temperature").temperature_c

    def nvmlDeviceGetPowerUsage(self, handle: Any, /) -> int:  # noqa: N802
        return self._sensor(handle, "power").power_mw

    def nvmlDeviceGetUtilizationRates(self, handle: Any, /) -> Any:  # noqa: N802
        return SimpleNamespace(gpu=self._sensor(handle, "utilisation").busy_percent, memory=0)

    def nvmlDeviceGetComputeRunningProcesses(self, handle: Any, /) -> list[Any]:  # noqa: N802
        held = self._board(handle).held
        return [SimpleNamespace(pid=pid, usedGpuMemory=size) for pid, size in held.items()]

    def _was_enumerated(self, board: Board) -> bool:
        return any(board is known for known in self._enumerated)

    def _handle(self, board: Board) -> _Handle:
        if board.lost:
            raise pynvml.NVMLError(pynvml.NVML_ERROR_GPU_IS_LOST)
        return _Handle(board, self._epoch)

    def _board(self, handle: _Handle) -> Board:
        self._require_init()
        if handle.epoch != self._epoch:
            raise pynvml.NVMLError(pynvml.NVML_ERROR_INVALID_ARGUMENT)
        if handle.board.lost:
            raise pynvml.NVMLError(pynvml.NVML_ERROR_GPU_IS_LOST)
        return handle.board

    def _sensor(self, handle: _Handle, name: str) -> Board:
        board = self._board(handle)
        if name in board.lacks:
            raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_SUPPORTED)
        return board

    def _require_init(self) -> None:
        if not self._users:
            raise pynvml.NVMLError(pynvml.NVML_ERROR_UNINITIALIZED)
