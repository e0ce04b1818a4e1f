"""NVIDIA's management library as a port: what its GPUs are, and how they are doing.

``Library`` names the functions of the module ``pynvml`` that are used, so that a test can stand in for the driver;
``Nvml`` turns them into values. Promises: every failure is an ``NvmlError`` with one of a few causes and what to do
about it; a reading that a board does not offer is ``None``, not a failure. Calls block, and with a driver in trouble
they may do so for long: off the event loop, please.
Leaves out: Jetson boards whose NVML knows little (``probe.py`` asks their device tree), and MIG slices.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Mapping
from enum import StrEnum
from types import TracebackType
from typing import Any, Final, Protocol, Self, TypeVar

import msgspec

from agent.profile import Gpu

_TEMPERATURE_GPU: Final = 0  # NVML_TEMPERATURE_GPU
T = TypeVar("T")


class Fault(StrEnum):
    """Why NVML, or one device, cannot be used."""

    NO_LIBRARY = "no_library"
    NO_DRIVER = "no_driver"
    MISMATCH = "driver_mismatch"
    NO_PERMISSION = "no_permission"
    LOST = "device_lost"
    UNSUPPORTED = "not_supported"
    OTHER = "other"


# NVML's return codes, which are its ABI.
_FAULTS: Final[Mapping[int, Fault]] = {
    3: Fault.UNSUPPORTED,
    4: Fault.NO_PERMISSION,
    6: Fault.LOST,  # NOT_FOUND: a device that was there is not enumerated any more
    9: Fault.NO_DRIVER,
    12: Fault.NO_LIBRARY,
    13: Fault.UNSUPPORTED,  # FUNCTION_NOT_FOUND: an older library
    15: Fault.LOST,
    16: Fault.LOST,  # RESET_REQUIRED
    18: Fault.MISMATCH,
    28: Fault.LOST,  # GPU_NOT_FOUND
}
_ADVICE: Final[Mapping[Fault, str]] = {
    Fault.NO_LIBRARY: "libnvidia-ml.so.1 is missing; install the driver's user-space libraries",
    Fault.NO_DRIVER: "the NVIDIA kernel driver is not loaded",
    Fault.MISMATCH: "the NVIDIA libraries and the loaded kernel driver are of different versions; reboot the box",
    Fault.NO_PERMISSION: "no permission for /dev/nvidia*; add the user that runs inferd to their group",
    Fault.LOST: "the GPU has fallen off the bus or needs a reset; reboot the box",
}


class NvmlError(Exception):
    """NVML or one device cannot be used; the message says what to do."""

    def __init__(self, fault: Fault, detail: str) -> None:
        advice = _ADVICE.get(fault)
        super().__init__(f"{advice} (NVML: {detail})" if advice else f"NVML: {detail}")
        self.fault = fault


class Library(Protocol):
    """The functions of ``pynvml`` in use. They raise ``NVMLError``, whose ``value`` is NVML's return code."""

    NVMLError: type[Exception]

    def nvmlInit(self) -> None: ...  # noqa: N802  the library's names
    def nvmlShutdown(self) -> None: ...  # noqa: N802
    def nvmlSystemGetDriverVersion(self) -> str | bytes: ...  # noqa: N802
    def nvmlSystemGetCudaDriverVersion(self) -> int: ...  # noqa: N802
    def nvmlDeviceGetCount(self) -> int: ...  # noqa: N802
    def nvmlDeviceGetHandleByIndex(self, index: int, /) -> Any: ...  # noqa: N802
    def nvmlDeviceGetHandleByUUID(self, uuid: str, /) -> Any: ...  # noqa: N802
    def nvmlDeviceGetUUID(self, handle: Any, /) -> str | bytes: ...  # noqa: N802
    def nvmlDeviceGetName(self, handle: Any, /) -> str | bytes: ...  # noqa: N802
    def nvmlDeviceGetCudaComputeCapability(self, handle: Any, /) -> tuple[int, int]: ...  # noqa: N802
    def nvmlDeviceGetMemoryInfo(self, handle: Any, /) -> Any: ...  # noqa: N802
    def nvmlDeviceGetTemperature(self, handle: Any, sensor: int, /) -> int: ...  # noqa: N802
    def nvmlDeviceGetPowerUsage(self, handle: Any, /) -> int: ...  # noqa: N802
    def nvmlDeviceGetUtilizationRates(self, handle: Any, /) -> Any: ...  # noqa: N802
    def nvmlDeviceGetComputeRunningProcesses(self, handle: Any, /) -> Iterable[Any]: ...  # noqa: N802


class Reading(msgspec.Struct, frozen=True, kw_only=True):
    """How one GPU is doing; ``None`` where its board does not tell."""

    memory_used_bytes: int | None = None
    memory_free_bytes: int | None = None
    temperature_c: int | None = None
    power_w: float | None = None
    utilisation_percent: int | None = None


class GpuMemory(msgspec.Struct, frozen=True, kw_only=True):
    """The memory of one GPU that nobody uses at this moment."""

    index: int  # as the GPU was numbered when the daemon started
    uuid: str
    free_bytes: int
    compute: str = ""  # "8.7"; empty: unknown


class Unread(msgspec.Struct, frozen=True, kw_only=True):
    """Why there is no reading of a GPU."""

    fault: Fault
    reason: str


class Inventory(msgspec.Struct, frozen=True, kw_only=True):
    """What NVML found. ``faults``: one text per device that is there and cannot be used."""

    driver: str  # "550.54.14"
    cuda: str  # the newest CUDA the driver can run, "12.4"
    gpus: tuple[Gpu, ...]
    faults: tuple[str, ...] = ()


class Nvml:
    """An initialised NVML; use as a context manager."""

    def __init__(self, library: Library | None = None) -> None:
        self._library = library or _pynvml()

    def __enter__(self) -> Self:
        self._ask(self._library.nvmlInit)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        with contextlib.suppress(NvmlError):  # nothing is left that could be shut down
            self._ask(self._library.nvmlShutdown)

    def inventory(self) -> Inventory:
        """Return the driver and its devices; one that cannot be used does not hide the others.

        Raises:
            NvmlError: the driver does not answer at all.
        """
        library = self._library
        driver = _text(self._ask(library.nvmlSystemGetDriverVersion))
        cuda = self._offered(library.nvmlSystemGetCudaDriverVersion)
        gpus, faults = [], []
        for index in range(self._ask(library.nvmlDeviceGetCount)):
            try:
                gpus.append(self._gpu(index))
            except NvmlError as error:
                faults.append(f"GPU {index}: {error}")
        return Inventory(
            driver=driver,
            cuda=f"{cuda // 1000}.{cuda % 1000 // 10}" if cuda else "",
            gpus=tuple(gpus),
            faults=tuple(faults),
        )

    def read(self, uuid: str) -> Reading:
        """Return how a device is doing.

        Raises:
            NvmlError: it is lost, or the driver does not answer.
        """
        library = self._library
        handle = self._ask(library.nvmlDeviceGetHandleByUUID, uuid)
        memory = self._offered(library.nvmlDeviceGetMemoryInfo, handle)
        power_mw = self._offered(library.nvmlDeviceGetPowerUsage, handle)
        rates = self._offered(library.nvmlDeviceGetUtilizationRates, handle)
        return Reading(
            memory_used_bytes=int(memory.used) if memory is not None else None,
            memory_free_bytes=int(memory.free) if memory is not None else None,
            temperature_c=self._offered(library.nvmlDeviceGetTemperature, handle, _TEMPERATURE_GPU),
            power_w=power_mw / 1000 if power_mw is not None else None,
            utilisation_percent=int(rates.gpu) if rates is not None else None,
        )

    def processes(self, uuid: str) -> dict[int, int]:
        """Return what each process holds of a device (bytes), by its id; empty where the board does not tell.

        Raises:
            NvmlError: it is lost, or the driver does not answer.
        """
        handle = self._ask(self._library.nvmlDeviceGetHandleByUUID, uuid)
        running = self._offered(self._library.nvmlDeviceGetComputeRunningProcesses, handle) or ()
        return {int(process.pid): int(process.usedGpuMemory or 0) for process in running}

    def _gpu(self, index: int) -> Gpu:
        library = self._library
        handle = self._ask(library.nvmlDeviceGetHandleByIndex, index)
        major, minor = self._ask(library.nvmlDeviceGetCudaComputeCapability, handle)
        return Gpu(
            index=index,
            name=_text(self._ask(library.nvmlDeviceGetName, handle)),
            uuid=_text(self._ask(library.nvmlDeviceGetUUID, handle)),
            memory_bytes=int(self._ask(library.nvmlDeviceGetMemoryInfo, handle).total),
            compute=f"{major}.{minor}",
        )

    def _ask(self, function: Callable[..., T], *arguments: Any) -> T:
        try:
            return function(*arguments)
        except self._library.NVMLError as error:
            raise NvmlError(_FAULTS.get(getattr(error, "value", 0), Fault.OTHER), str(error)) from error

    def _offered(self, function: Callable[..., T], *arguments: Any) -> T | None:
        """Return the answer, or ``None`` if this board or this user does not get one."""
        try:
            return self._ask(function, *arguments)
        except NvmlError as error:
            if error.fault in (Fault.UNSUPPORTED, Fault.NO_PERMISSION):
                return None
            raise


def _pynvml() -> Library:
    import pynvml  # here, because it costs 5 MB that a CPU box need not pay

    library: Library = pynvml
    return library


def _text(value: str | bytes) -> str:
    return value.decode() if isinstance(value, bytes) else value
