"""Reading this machine: CPU, memory, control groups, GPUs, Jetson boards, containers.

Never raises: what cannot be read is absent, and why there is no GPU is said in words. Everything that lies in files
is read below ``root``, so that tests can bring machines of their own; NVML comes in as a port.
"""

from __future__ import annotations

import contextlib
import os
import platform
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Final

import msgspec
import psutil

from agent.nvml import GpuMemory, Inventory, Nvml, NvmlError, Reading, Unread
from agent.profile import Gpu, Hardware

_CPU_FEATURES: Final = (
    "avx", "avx2", "fma", "f16c", "avx512f", "avx512bw", "avx512_vnni", "avx_vnni", "avx512_bf16", "avx512_fp16",
    "amx_tile", "amx_int8", "amx_bf16",
    "asimd", "asimdhp", "asimddp", "i8mm", "bf16", "sve",
)  # fmt: skip
_DRIVER_FILES: Final = (
    "dev/nvidiactl", "dev/nvidia0", "proc/driver/nvidia/version", "dev/nvhost-gpu", "dev/nvgpu", "dev/dxg",
)  # fmt: skip
_NO_DRIVER: Final = "no NVIDIA driver is loaded"
# Jetson's chips, by what their device trees are compatible with: compute capability.
_TEGRA: Final = {
    "nvidia,tegra210": "5.3",
    "nvidia,tegra186": "6.2",
    "nvidia,tegra194": "7.2",
    "nvidia,tegra234": "8.7",
    "nvidia,tegra264": "11.0",
}
_L4T: Final = re.compile(r"#\s*R(\d+).*?REVISION:\s*(\d+(?:\.\d+)*)")
_UNLIMITED_BYTES: Final = 1 << 60  # v1 says "no limit" by the largest multiple of a page


def probe(
    *,
    root: Path = Path("/"),
    nvml: Callable[[], Nvml] = Nvml,
    arch: str = "",
    cores: int = 0,
    cores_present: int = 0,
    memory_bytes: int = 0,
) -> Hardware:
    """Return this machine's facts; what is given is taken instead of being read from this process."""
    cores = cores or len(os.sched_getaffinity(0))
    memory_bytes = memory_bytes or int(psutil.virtual_memory().total)
    limits = cgroup_limits(root)
    jetson = _jetson(root)
    inventory, reason = _inventory(root, nvml)
    gpus = inventory.gpus
    if jetson is not None and not gpus:
        gpus, reason = _integrated_gpu(jetson, memory_bytes), reason if not jetson.compute else ""
    quota, limit = limits
    model, features = _cpu(root)
    return Hardware(
        arch=arch or platform.machine(),
        cores=max(1, min(cores, int(quota))) if quota is not None else cores,
        memory_bytes=min(memory_bytes, limit) if limit is not None else memory_bytes,
        cpu_features=features,
        gpus=gpus,
        gpu_reason=reason,
        driver=inventory.driver,
        cuda=inventory.cuda,
        jetson=jetson is not None,
        board=jetson.board if jetson is not None else _text(root / "proc/device-tree/model"),
        l4t=jetson.l4t if jetson is not None else "",
        cpu_model=model,
        cores_present=cores_present or psutil.cpu_count() or cores,
        memory_present_bytes=memory_bytes,
        cpu_quota=quota,
        memory_limit_bytes=limit,
        container=_container(root),
    )


def readings(hardware: Hardware, nvml: Callable[[], Nvml] = Nvml) -> dict[str, Reading | Unread]:
    """Return how each GPU is doing now by its UUID, or why that cannot be said."""
    found: dict[str, Reading | Unread] = {}
    uuids = [gpu.uuid for gpu in hardware.gpus if gpu.uuid]
    if not uuids:
        return found
    try:
        with nvml() as library:
            for uuid in uuids:
                try:
                    found[uuid] = library.read(uuid)
                except NvmlError as error:
                    found[uuid] = Unread(fault=error.fault, reason=str(error))
    except NvmlError as error:
        found = dict.fromkeys(uuids, Unread(fault=error.fault, reason=str(error)))
    return found


def processes(hardware: Hardware, nvml: Callable[[], Nvml] = Nvml) -> dict[str, dict[int, int]]:
    """Return what each process holds of each GPU that tells (bytes), by UUID and process id."""
    found: dict[str, dict[int, int]] = {}
    uuids = [gpu.uuid for gpu in hardware.gpus if gpu.uuid]
    with contextlib.suppress(NvmlError):
        if uuids:
            with nvml() as library:
                for uuid in uuids:
                    with contextlib.suppress(NvmlError):
                        found[uuid] = library.processes(uuid)
    return found


def free_memory(hardware: Hardware, nvml: Callable[[], Nvml] = Nvml) -> tuple[GpuMemory, ...]:
    """Return the GPUs that tell now how much memory they have free; a lost one does not."""
    seen = readings(hardware, nvml)
    return tuple(
        GpuMemory(index=gpu.index, uuid=gpu.uuid, free_bytes=reading.memory_free_bytes, compute=gpu.compute)
        for gpu in hardware.gpus
        if isinstance(reading := seen.get(gpu.uuid), Reading) and reading.memory_free_bytes is not None
    )


def described(hardware: Hardware, seen: Mapping[str, Reading | Unread]) -> list[dict[str, Any]]:
    """Return each GPU with its reading as plain values."""
    rows = []
    for gpu in hardware.gpus:
        reading = seen.get(gpu.uuid)
        row: dict[str, Any] = msgspec.to_builtins(gpu)
        row["reading"] = msgspec.to_builtins(reading) if isinstance(reading, Reading) else None
        row["fault"] = reading.reason if isinstance(reading, Unread) else ""
        rows.append(row)
    return rows


# Control groups


def cgroup_limits(root: Path) -> tuple[float | None, int | None]:
    """Return ``(cores' worth of CPU time, bytes of memory)`` that the control groups grant; ``None``: no limit.

    Limits of all groups from the process's own to the root count, the tightest wins. In a container whose groups are
    not namespaced the own path does not exist below the mount; its root is the container's then.
    """
    quotas, limits = [], []
    for controllers, path in _own_cgroups(root):
        unified = not controllers
        if unified or "memory" in controllers:
            base = root / "sys/fs/cgroup" / ("" if unified else "memory")
            names = ("memory.max", "memory.high") if unified else ("memory.limit_in_bytes",)
            limits += [value for folder in _upwards(base, path) for name in names for value in _bytes(folder / name)]
        if unified or "cpu" in controllers:
            base = root / "sys/fs/cgroup" / ("" if unified else _cpu_mount(root, controllers))
            quotas += [value for folder in _upwards(base, path) for value in _quota(folder, unified=unified)]
    return min(quotas, default=None), min(limits, default=None)


def _own_cgroups(root: Path) -> list[tuple[list[str], str]]:
    """Return ``(controllers, path)`` of each hierarchy; no controllers: the unified one."""
    found = []
    for line in _text(root / "proc/self/cgroup").splitlines():
        _, controllers, path = (*line.split(":", 2), "", "")[:3]
        found.append((controllers.split(",") if controllers else [], path.strip("/")))
    return found


def _cpu_mount(root: Path, controllers: list[str]) -> str:
    joined = ",".join(controllers)
    return joined if (root / "sys/fs/cgroup" / joined).is_dir() else "cpu"


def _upwards(base: Path, path: str) -> Iterator[Path]:
    parts = [part for part in path.split("/") if part not in ("", ".", "..")]
    for length in range(len(parts), -1, -1):
        yield base.joinpath(*parts[:length])


def _bytes(path: Path) -> list[int]:
    text = _text(path)
    return [int(text)] if text.isdigit() and int(text) < _UNLIMITED_BYTES else []


def _quota(folder: Path, *, unified: bool) -> list[float]:
    if unified:
        quota, _, period = _text(folder / "cpu.max").partition(" ")
    else:
        quota, period = _text(folder / "cpu.cfs_quota_us"), _text(folder / "cpu.cfs_period_us")
    usable = quota.isdigit() and period.isdigit() and int(period) > 0  # "max" and "-1" are no limit
    return [int(quota) / int(period)] if usable else []


# CPU


def _cpu(root: Path) -> tuple[str, tuple[str, ...]]:
    """Return the CPU's name and those of its features that matter here."""
    model, flags = "", set[str]()
    for line in _text(root / "proc/cpuinfo").splitlines():
        key, _, value = (part.strip() for part in line.partition(":"))
        if key in ("model name", "Model") and not model:
            model = value
        elif key in ("flags", "Features") and not flags:
            flags = set(value.split())
    return model, tuple(feature for feature in _CPU_FEATURES if feature in flags)


# GPUs


class _Jetson(msgspec.Struct, frozen=True, kw_only=True):
    board: str
    l4t: str
    compute: str


def _inventory(root: Path, nvml: Callable[[], Nvml]) -> tuple[Inventory, str]:
    """Return what NVML found, and why it found nothing or less than there is."""
    nothing = Inventory(driver="", cuda="", gpus=())
    if not any((root / path).exists() for path in _DRIVER_FILES):
        return nothing, _NO_DRIVER
    try:
        with nvml() as library:
            inventory = library.inventory()
    except NvmlError as error:
        return nothing, str(error)
    reason = "; ".join(inventory.faults)
    return inventory, reason or ("" if inventory.gpus else "the driver reports no device")


def _jetson(root: Path) -> _Jetson | None:
    release = _text(root / "etc/nv_tegra_release")
    compatible = _text(root / "proc/device-tree/compatible").split("\0")
    chip = next((name for name in compatible if name in _TEGRA), "")
    if not release and not chip:
        return None
    found = _L4T.match(release)
    return _Jetson(
        board=_text(root / "proc/device-tree/model") or "NVIDIA Jetson",
        l4t=f"{found[1]}.{found[2]}" if found else "",
        compute=_TEGRA.get(chip, ""),
    )


def _integrated_gpu(jetson: _Jetson, memory_bytes: int) -> tuple[Gpu, ...]:
    """Return the GPU of a Jetson whose NVML does not tell; an unknown chip's capability cannot be relied on."""
    if not jetson.compute:
        return ()
    return (
        Gpu(
            index=0,
            name=f"{jetson.board} (integrated)",
            memory_bytes=memory_bytes,
            compute=jetson.compute,
            integrated=True,
        ),
    )


# Container


def _container(root: Path) -> str:
    named = _text(root / "run/systemd/container") or _text(root / "run/host/container-manager")
    if named:
        return named
    if (root / ".dockerenv").exists():
        return "docker"
    if (root / "run/.containerenv").exists():
        return "podman"
    return ""


def _text(path: Path) -> str:
    """Return the file's text without the zero that ends a device tree's, ``""`` when it cannot be read."""
    try:
        return path.read_text(errors="replace").strip().rstrip("\0")
    except OSError:
        return ""
