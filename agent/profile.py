"""What this box is, and which profile fits it.

``probe`` reads hardware facts (psutil, ``/proc/cpuinfo``, NVML when a driver is there); ``choose`` is a pure match of
those facts against ``profiles/*.toml``. A box without a GPU or driver is normal and says so in ``gpu_reason``.
"""

from __future__ import annotations

import os
import platform
import tomllib
from importlib import resources
from pathlib import Path
from typing import Any, Final, Literal

import msgspec

from agent.errors import ConfigError

_CPU_FEATURES: Final = ("avx2", "avx512f", "avx512_vnni", "avx_vnni", "amx_int8", "asimd", "asimddp", "sve")


class Gpu(msgspec.Struct, frozen=True, kw_only=True):
    """One CUDA device as NVML describes it."""

    index: int
    name: str
    memory_bytes: int
    compute: str  # "8.7"


class Hardware(msgspec.Struct, frozen=True, kw_only=True):
    """Facts that selection may use. ``cores`` and ``memory_bytes`` are what this process may use."""

    arch: str  # x86_64, aarch64
    cores: int
    memory_bytes: int
    cpu_features: tuple[str, ...] = ()
    gpus: tuple[Gpu, ...] = ()
    gpu_reason: str = ""  # why there is no GPU
    driver: str = ""
    jetson: bool = False

    def fingerprint(self) -> str:
        """A short text that changes when a measured choice should be measured again."""
        gpus = ",".join(f"{gpu.name}:{gpu.compute}" for gpu in self.gpus)
        return f"{self.arch}/{self.cores}/{'+'.join(self.cpu_features)}/{gpus}/{self.driver}"


class Match(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Predicates of a profile; all that are given must hold."""

    device: Literal["cpu", "cuda"] | None = None
    jetson: bool | None = None
    cores_min: int = 0
    memory_bytes_min: int = 0


class Profile(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Defaults for one class of box."""

    name: str
    description: str
    rank: int = 0  # the highest matching rank wins
    match: Match = msgspec.field(default_factory=Match)
    devices: tuple[Literal["cuda", "cpu"], ...] = ("cpu",)  # in order of preference
    precisions: tuple[str, ...] = ("int8", "fp32")  # tie-break between variants of equal priority, best first
    intra_op_threads: int = 1
    memory_share: float = 0.8  # of the box's memory for models
    workers_max: int = 1  # of one model, unless the configuration says otherwise
    pin_cores: bool = False  # bind each worker to cores of its own, as many as it has threads


def probe() -> Hardware:
    """Return this machine's facts. Never raises: what cannot be read is absent."""
    gpus, driver, reason = _probe_gpus()
    return Hardware(
        arch=platform.machine(),
        cores=len(os.sched_getaffinity(0)),
        memory_bytes=_memory_bytes(),
        cpu_features=_cpu_features(),
        gpus=gpus,
        gpu_reason=reason,
        driver=driver,
        jetson=Path("/etc/nv_tegra_release").exists(),
    )


def load_profiles() -> tuple[Profile, ...]:
    """Return the installed profiles by name.

    Raises:
        ConfigError: a profile file is malformed.
    """
    found = []
    for entry in sorted(resources.files("profiles").iterdir(), key=lambda item: item.name):
        if entry.name.endswith(".toml"):
            try:
                found.append(msgspec.convert(tomllib.loads(entry.read_text()), Profile))
            except (tomllib.TOMLDecodeError, msgspec.ValidationError) as error:
                raise ConfigError(f"profiles/{entry.name}: {error}") from error
    return tuple(found)


def choose(name: str, hardware: Hardware, profiles: tuple[Profile, ...]) -> Profile:
    """Return the profile called ``name``, or for ``auto`` the highest ranked one whose predicates hold.

    Raises:
        ConfigError: no such profile, or none matches.
    """
    if name != "auto":
        for profile in profiles:
            if profile.name == name:
                return profile
        raise ConfigError(f"[device.profile] {name!r} is not one of auto, {', '.join(p.name for p in profiles)}")
    matching = [profile for profile in profiles if _matches(profile.match, hardware)]
    if not matching:
        raise ConfigError("[device.profile] no profile matches this box; name one")
    return max(matching, key=lambda profile: profile.rank)


def _matches(match: Match, hardware: Hardware) -> bool:
    device = "cuda" if hardware.gpus else "cpu"
    return (
        match.device in (None, device)
        and match.jetson in (None, hardware.jetson)
        and hardware.cores >= match.cores_min
        and hardware.memory_bytes >= match.memory_bytes_min
    )


def _memory_bytes() -> int:
    import psutil  # here, because the trust child needs the types above only

    total = psutil.virtual_memory().total
    for path in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        try:
            limit = Path(path).read_text().strip()
        except OSError:
            continue
        if limit.isdigit():
            total = min(total, int(limit))
    return int(total)


def _cpu_features() -> tuple[str, ...]:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return ()
    for line in lines:
        key, _, value = line.partition(":")
        if key.strip() in ("flags", "Features"):
            flags = set(value.split())
            return tuple(feature for feature in _CPU_FEATURES if feature in flags)
    return ()


def _probe_gpus() -> tuple[tuple[Gpu, ...], str, str]:
    if not any(Path(path).exists() for path in ("/dev/nvidiactl", "/dev/nvhost-gpu", "/proc/driver/nvidia")):
        return (), "", "no NVIDIA driver is loaded"
    import pynvml  # here, because it costs 5 MB that a CPU box need not pay

    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError as error:
        return (), "", f"NVML: {error}"
    try:
        driver = _text(pynvml.nvmlSystemGetDriverVersion())
        gpus = tuple(_probe_gpu(pynvml, index) for index in range(pynvml.nvmlDeviceGetCount()))
    except pynvml.NVMLError as error:
        return (), "", f"NVML: {error}"
    finally:
        pynvml.nvmlShutdown()
    return gpus, driver, "" if gpus else "the driver reports no device"


def _probe_gpu(nvml: Any, index: int) -> Gpu:
    handle = nvml.nvmlDeviceGetHandleByIndex(index)
    major, minor = nvml.nvmlDeviceGetCudaComputeCapability(handle)
    return Gpu(
        index=index,
        name=_text(nvml.nvmlDeviceGetName(handle)),
        memory_bytes=int(nvml.nvmlDeviceGetMemoryInfo(handle).total),
        compute=f"{major}.{minor}",
    )


def _text(value: str | bytes) -> str:
    return value.decode() if isinstance(value, bytes) else value
