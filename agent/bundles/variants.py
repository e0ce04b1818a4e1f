"""Which variants of a bundle this box can run, and in which order to try them. Pure.

Order: the profile's device order, then the manifest's ``priority`` (the lower number first), then the profile's
precision order, then the id. What cannot run is dropped *with its reason*, because "why is it slow here" is the first
question an operator asks. Measured facts of this box (faster, agrees) are the engine's to add (``engine/ladder.py``).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Final

import msgspec

from agent.bundles.manifest import Manifest, Variant
from agent.bundles.requirements import satisfies
from agent.bundles.structure import NATIVE_FORMATS
from agent.config import PolicyConfig
from agent.errors import NoVariantError, PolicyError
from agent.profile import APPROXIMATE, Gpu, Hardware

FEATURES: Final = frozenset({"chunks.v1"})  # manifest features this agent understands
_MIB: Final = 1024 * 1024


class Runtime(msgspec.Struct, frozen=True, kw_only=True):
    """An installed inference runtime. ``cuda``: built with CUDA."""

    version: str
    cuda: bool = False


class Box(msgspec.Struct, frozen=True, kw_only=True):
    """Everything selection may know about this machine."""

    hardware: Hardware
    policy: PolicyConfig
    devices: tuple[str, ...]  # in order of preference
    precisions: tuple[str, ...]  # in order of preference; others come last
    runtimes: Mapping[str, Runtime]  # by the name manifests use
    agent_version: str
    codecs: tuple[str, ...] = ()  # chunk compressions that can be unpacked


class Selection(msgspec.Struct, frozen=True, kw_only=True):
    """``usable`` best first, never empty; ``dropped`` as ``(variant id, reason)`` in the manifest's order."""

    usable: tuple[Variant, ...]
    dropped: tuple[tuple[str, str], ...]


def select(manifest: Manifest, box: Box) -> Selection:
    """Return what can run on ``box``, best first.

    Raises:
        PolicyError: the bundle brings handler code and this box accepts none.
        NoVariantError: nothing can run; the message lists the reason of each variant.
        UnsafeBundleError: a version range of the manifest cannot be read.
    """
    if manifest.handler.module and box.policy.handler_code == "never":
        raise PolicyError("the bundle brings handler code and [policy] handler_code is 'never'")
    whole = _whole_bundle(manifest, box)
    packed = _packed(manifest, box)
    reasons = {
        variant.id: whole or _obstacle(manifest, variant, box) or _codec_obstacle(variant, packed)
        for variant in manifest.variants
    }
    usable = sorted((v for v in manifest.variants if not reasons[v.id]), key=lambda variant: _rank(variant, box))
    dropped = [(variant_id, reason) for variant_id, reason in reasons.items() if reason]
    if not usable:
        raise no_variant(manifest, dropped)
    if box.policy.fallback == "require":
        usable, refused = _required(manifest, usable, dropped, box)
        dropped += refused
    return Selection(usable=tuple(usable), dropped=tuple(dropped))


def _required(
    manifest: Manifest, usable: Sequence[Variant], dropped: Iterable[tuple[str, str]], box: Box
) -> tuple[list[Variant], list[tuple[str, str]]]:
    """Return what "the best variant or none" leaves, and why the others go.

    The best runs on the profile's first kind of device that the bundle has a variant for: a box whose GPU is gone does
    not quietly become a CPU box. An approximate best keeps its exact counterpart, because which of the two is better is
    measured on the box.

    Raises:
        NoVariantError: nothing can run on that kind of device.
    """
    kinds = [kind for kind in box.devices if any(variant.device.kind == kind for variant in manifest.variants)]
    best = usable[0]
    if best.device.kind != kinds[0]:
        none_else = [(one.id, f"[policy] fallback is 'require': only {kinds[0]}") for one in usable]
        raise no_variant(manifest, [*dropped, *none_else])
    exact = [one for one in usable[1:] if one.device.kind == best.device.kind and one.precision not in APPROXIMATE]
    kept = [best, *(exact[:1] if best.precision in APPROXIMATE else ())]
    return kept, [
        (one.id, "[policy] fallback is 'require': only the best variant") for one in usable if one not in kept
    ]


def no_variant(manifest: Manifest, dropped: Iterable[tuple[str, str]]) -> NoVariantError:
    """Return the error that names every reason."""
    reasons = "; ".join(f"{variant}: {reason}" for variant, reason in dropped)
    return NoVariantError(f"{manifest.team}/{manifest.name} {manifest.version} cannot run on this box: {reasons}")


def files_needed(manifest: Manifest, usable: Sequence[Variant]) -> tuple[str, ...]:
    """Return the paths to have on disk for ``usable``: theirs, and those that belong to no variant.

    In the manifest's order. Files of dropped variants only are left in the store.
    """
    wanted = {path for variant in usable for path in variant.files}
    owned = {path for variant in manifest.variants for path in variant.files}
    return tuple(item.path for item in manifest.files if item.path in wanted or item.path not in owned)


def _whole_bundle(manifest: Manifest, box: Box) -> str:
    requires = manifest.requires
    if missing := sorted(set(requires.features) - FEATURES):
        return f"needs the agent feature {', '.join(missing)}"
    if not satisfies(box.agent_version, requires.agent):
        return f"needs agent {requires.agent}, this is {box.agent_version}"
    if requires.os and "linux" not in requires.os:
        return f"needs {' or '.join(requires.os)}"
    return ""


def _obstacle(manifest: Manifest, variant: Variant, box: Box) -> str:
    """Return why ``variant`` cannot run, ``""`` if nothing is in its way."""
    return (
        _policy_obstacle(manifest, variant, box)
        or _runtime_obstacle(manifest, variant, box)
        or _cpu_obstacle(variant, box.hardware)
        or (_gpu_obstacle(variant, box.hardware) if variant.device.kind == "cuda" else "")
        or _memory_obstacle(variant, box.hardware)
    )


def _policy_obstacle(manifest: Manifest, variant: Variant, box: Box) -> str:
    native = variant.trusted_native or any(manifest.file(path).format in NATIVE_FORMATS for path in variant.files)
    if native and box.policy.native_formats == "never":
        return "is in a native format and [policy] native_formats is 'never'"
    if box.policy.fallback == "cpu" and variant.device.kind != "cpu":
        return "[policy] fallback is 'cpu': CPU variants only"
    if variant.device.kind not in box.devices:
        return f"needs {variant.device.kind}, the profile has {', '.join(box.devices)}"
    return ""


def _runtime_obstacle(manifest: Manifest, variant: Variant, box: Box) -> str:
    runtime = box.runtimes.get(variant.runtime)
    if runtime is None:
        return f"needs the runtime {variant.runtime}, which is not installed"
    for need in manifest.requires.runtimes:
        if need.name == variant.runtime and not satisfies(runtime.version, need.spec):
            return f"needs {need.name} {need.spec}, {runtime.version} is installed"
    if variant.device.kind == "cuda" and not runtime.cuda:
        return f"needs {variant.runtime} with CUDA, the installed build has none"
    return ""


def _cpu_obstacle(variant: Variant, hardware: Hardware) -> str:
    device = variant.device
    if device.arch and hardware.arch not in device.arch:
        return f"needs {' or '.join(device.arch)}, this is {hardware.arch}"
    if device.features_any and not set(device.features_any) & set(hardware.cpu_features):
        return f"needs a CPU with {' or '.join(device.features_any)}"
    return ""


def _gpu_obstacle(variant: Variant, hardware: Hardware) -> str:
    if not hardware.gpus:
        return f"needs a CUDA device: {hardware.gpu_reason or 'none found'}"
    device = variant.device
    if not satisfies(hardware.driver, device.driver):
        return f"needs driver {device.driver}, this is {hardware.driver or 'unknown'}"
    if not _capable(variant, hardware):
        best = max(hardware.gpus, key=lambda gpu: _compute(gpu.compute))
        return f"needs compute capability {device.min_compute}, {best.name} has {best.compute}"
    return ""


def _capable(variant: Variant, hardware: Hardware) -> list[Gpu]:
    wanted = _compute(variant.device.min_compute)
    return [gpu for gpu in hardware.gpus if _compute(gpu.compute) >= wanted]


def _memory_obstacle(variant: Variant, hardware: Hardware) -> str:
    memory = variant.memory
    if memory.host_mb * _MIB > hardware.memory_bytes:
        return f"needs {memory.host_mb} MiB of memory, this box has {hardware.memory_bytes // _MIB}"
    if variant.device.kind == "cuda":
        largest = max(gpu.memory_bytes for gpu in _capable(variant, hardware))
        if memory.device_mb * _MIB > largest:
            return f"needs {memory.device_mb} MiB of GPU memory, the largest device has {largest // _MIB}"
    return ""


def _packed(manifest: Manifest, box: Box) -> dict[str, str]:
    """Return the files with chunks this box cannot unpack, and the compression of each."""
    return {
        item.path: chunk.codec
        for item in manifest.files
        for chunk in item.chunks
        if chunk.codec and chunk.codec not in box.codecs
    }


def _codec_obstacle(variant: Variant, packed: Mapping[str, str]) -> str:
    for path in variant.files:
        if path in packed:
            return f"{path} is packed with {packed[path]}, which is not installed"
    return ""


def _compute(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(".") if part.isdigit())


def _rank(variant: Variant, box: Box) -> tuple[int, int, int, str]:
    precisions = box.precisions
    precision = precisions.index(variant.precision) if variant.precision in precisions else len(precisions)
    return box.devices.index(variant.device.kind), variant.priority, precision, variant.id
