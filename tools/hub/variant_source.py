"""One ``[[variants]]`` of ``model.toml``, which a person writes, and of ``variants.toml``, which ``quantize`` does."""

from __future__ import annotations

from typing import Any

import msgspec

from agent.bundles.manifest import Device, Precision, Threads


class VariantSource(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One ``[[variants]]``. ``files`` names what this variant reads beside its entry and the shared files."""

    id: str
    entry: str
    precision: Precision
    priority: int  # lower is preferred
    device: Device = msgspec.field(default_factory=lambda: Device(kind="cpu", providers=("CPUExecutionProvider",)))
    runtime: str = "onnxruntime"
    files: tuple[str, ...] = ()
    quant: dict[str, str] = {}
    threads: Threads = msgspec.field(default_factory=Threads)
    session: dict[str, Any] = {}
    metrics: dict[str, float] = {}
    trusted_native: bool = False
