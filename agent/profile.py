"""What this box is, and which profile fits it: values and the pure match between them.

``Hardware`` holds the facts that ``probe.py`` reads; ``choose`` matches them against ``profiles/*.toml`` and says why.
A box without a GPU or driver is normal and says so in ``gpu_reason``.
"""

from __future__ import annotations

import tomllib
from collections.abc import Iterable
from importlib import resources
from typing import Final, Literal

import msgspec

from agent.errors import ConfigError

# CPU features with which 8-bit products cost less than 32-bit ones: without any, int8 is often the slower variant.
INT8_FEATURES: Final = frozenset({"avx512_vnni", "avx_vnni", "amx_int8", "asimddp", "i8mm"})
# Precisions that trade accuracy for speed or size: preferred only where they were measured to be worth it.
APPROXIMATE: Final = frozenset({"int8", "int4", "mixed"})
_MIB: Final = 1024 * 1024


class Gpu(msgspec.Struct, frozen=True, kw_only=True):
    """One CUDA device."""

    index: int  # NVML's, which is CUDA's with CUDA_DEVICE_ORDER=PCI_BUS_ID
    name: str
    memory_bytes: int
    compute: str  # "8.7"
    uuid: str = ""
    integrated: bool = False  # shares its memory with the CPU


class Hardware(msgspec.Struct, frozen=True, kw_only=True):
    """Facts that selection may use. ``cores`` and ``memory_bytes`` are what this process may use."""

    arch: str  # x86_64, aarch64
    cores: int
    memory_bytes: int
    cpu_features: tuple[str, ...] = ()
    gpus: tuple[Gpu, ...] = ()
    gpu_reason: str = ""  # why there is no GPU, or why one of them cannot be used
    driver: str = ""
    cuda: str = ""  # the newest CUDA that the driver can run
    jetson: bool = False
    board: str = ""  # the device tree's model: "NVIDIA Jetson Orin Nano Developer Kit"
    l4t: str = ""  # Jetson's release: "36.3.0"
    cpu_model: str = ""
    cores_present: int = 0  # of the machine; 0: unknown
    memory_present_bytes: int = 0  # of the machine; 0: unknown
    cpu_quota: float | None = None  # cores' worth of time that the control groups grant; None: unlimited
    memory_limit_bytes: int | None = None  # of the control groups; None: unlimited
    container: str = ""  # "docker", "podman", "systemd-nspawn", …; empty: none that is known

    @property
    def device(self) -> Literal["cpu", "cuda"]:
        """The better kind of device that is here."""
        return "cuda" if self.gpus else "cpu"

    @property
    def int8(self) -> tuple[str, ...]:
        """The CPU features that make int8 quick."""
        return tuple(feature for feature in self.cpu_features if feature in INT8_FEATURES)

    def fingerprint(self) -> str:
        """A text that changes when what was measured on this box should be measured again."""
        gpus = ",".join(f"{gpu.name}:{gpu.compute}:{gpu.memory_bytes >> 20}" for gpu in self.gpus)
        parts = (self.arch, str(self.cores), self.cpu_model, "+".join(self.cpu_features), gpus, self.driver, self.l4t)
        return "/".join(parts)


class Match(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Predicates of a profile; all that are given must hold."""

    device: Literal["cpu", "cuda"] | None = None
    jetson: bool | None = None
    arch: tuple[str, ...] = ()  # one of these
    cores_min: int = 0
    memory_bytes_min: int = 0
    gpu_memory_bytes_min: int = 0  # of the largest GPU
    cpu_features_any: tuple[str, ...] = ()  # one of these suffices


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


class Considered(msgspec.Struct, frozen=True, kw_only=True):
    """One profile and the predicates of it that do not hold here; none: it matches."""

    name: str
    description: str
    rank: int
    failed: tuple[str, ...] = ()


class Choice(msgspec.Struct, frozen=True, kw_only=True):
    """The profile in use, why, and what became of each."""

    profile: Profile
    reason: str
    considered: tuple[Considered, ...] = ()  # the highest rank first


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


def choose(name: str, hardware: Hardware, profiles: Iterable[Profile]) -> Choice:
    """Return the profile called ``name``, or for ``auto`` the highest ranked one whose predicates hold.

    Raises:
        ConfigError: no such profile, or none matches.
    """
    ranked = sorted(profiles, key=lambda profile: (-profile.rank, profile.name))
    considered = tuple(
        Considered(
            name=profile.name,
            description=profile.description,
            rank=profile.rank,
            failed=mismatches(profile.match, hardware),
        )
        for profile in ranked
    )
    if name != "auto":
        for profile, seen in zip(ranked, considered, strict=True):
            if profile.name == name:
                beyond = f"; what it is made for is not here: {', '.join(seen.failed)}" if seen.failed else ""
                return Choice(profile=profile, reason=f"named by [device] profile{beyond}", considered=considered)
        raise ConfigError(f"[device.profile] {name!r} is not one of auto, {', '.join(sorted(p.name for p in ranked))}")
    for profile, seen in zip(ranked, considered, strict=True):
        if not seen.failed:
            return Choice(profile=profile, reason=_why(profile.match, hardware), considered=considered)
    raise ConfigError("[device.profile] no profile matches this box; name one")


def mismatches(match: Match, hardware: Hardware) -> tuple[str, ...]:
    """Return each predicate that does not hold, in words."""
    largest = max((gpu.memory_bytes for gpu in hardware.gpus), default=0)
    checks = (
        (match.device in (None, hardware.device), _device_mismatch(match, hardware)),
        (match.jetson in (None, hardware.jetson), "this is no Jetson" if match.jetson else "this is a Jetson"),
        (not match.arch or hardware.arch in match.arch, f"needs {' or '.join(match.arch)}, this is {hardware.arch}"),
        (hardware.cores >= match.cores_min, f"needs {match.cores_min} cores, {hardware.cores} may be used"),
        (
            hardware.memory_bytes >= match.memory_bytes_min,
            f"needs {match.memory_bytes_min // _MIB} MiB of memory, {hardware.memory_bytes // _MIB} may be used",
        ),
        (
            largest >= match.gpu_memory_bytes_min,
            f"needs {match.gpu_memory_bytes_min // _MIB} MiB of GPU memory, there are {largest // _MIB}",
        ),
        (
            not match.cpu_features_any or bool(set(match.cpu_features_any) & set(hardware.cpu_features)),
            f"needs a CPU with {' or '.join(match.cpu_features_any)}",
        ),
    )
    return tuple(words for holds, words in checks if not holds)


def _device_mismatch(match: Match, hardware: Hardware) -> str:
    if match.device == "cuda":
        return f"needs a CUDA device: {hardware.gpu_reason or 'there is none'}"
    return f"is for boxes without a GPU, this has {len(hardware.gpus)}"


def _why(match: Match, hardware: Hardware) -> str:
    """Return what of the box decided, in words."""
    words = []
    if match.device == "cuda":
        words.append(f"GPU {', '.join(gpu.name for gpu in hardware.gpus)}")
    elif match.device == "cpu":
        words.append(f"no GPU ({hardware.gpu_reason or 'none found'})")
    if match.jetson:
        words.append(hardware.board or "a Jetson")
    words.append(f"{hardware.cores} cores")
    words.append(f"{hardware.memory_bytes // _MIB} MiB of memory")
    return f"the highest ranked that matches: {', '.join(words)}"
