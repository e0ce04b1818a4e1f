"""The order a worker is started with: decoded from MessagePack and checked before anything acts on it.

Promises: a spec that parses has every field in its type and range, and every path in it stays inside the bundle.
Leaves out: whether the files exist or are good; the loader finds that out.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgpack

from agent.errors import LoadError, UnsafeBundleError
from agent.wire import Limits


@dataclass(frozen=True, slots=True, kw_only=True)
class Spec:
    """One variant of one version of one model, and the bounds of its worker."""

    model: str
    version: str
    variant: str
    runtime: str  # the manifest's name of it: "onnxruntime"
    precision: str
    device: Mapping[str, Any]  # {"kind": "cpu", "index": 0}, of a GPU also "uuid" where it is known
    providers: tuple[str, ...]  # ONNX Runtime: in the order they are tried; the first must really be used
    session: Mapping[str, Any]  # the variant's runtime options
    bundle_dir: Path
    entry: str  # relative to bundle_dir
    handler: Mapping[str, Any]  # {"id"} | {"module", "class"}, with "params"; empty: tensors only
    signature: Mapping[str, Any]
    classes_file: str | None
    golden: tuple[Mapping[str, Any], ...]
    warmup_runs: int
    warmup_ms_max: float
    warmup_shapes: tuple[Mapping[str, Sequence[int]], ...]  # of inputs to warm up with, beside the golden ones
    batch_axis: str | None  # name of the first axis along which requests are stacked
    batch_rows_max: int
    batch_delay_s: float
    threads_intra: int
    threads_inter: int
    scratch_dir: Path
    memory_bytes: int  # limit of the address space, 0 = none
    open_files: int
    sandbox: str  # enforce | best_effort
    code_sandbox: str  # full | partial | none: the level that code of this bundle needs under best_effort
    cores: tuple[int, ...]  # bound to these; empty: to none
    share_weights: bool  # keep weights as they lie in external data files, so that workers share their pages
    wire: Limits

    @property
    def device_name(self) -> str:
        """The device as people write it: ``cpu``, ``cuda:0``."""
        kind = str(self.device.get("kind", "cpu"))
        return kind if kind == "cpu" else f"{kind}:{self.device.get('index', 0)}"

    @property
    def device_kind(self) -> str:
        """``cpu`` or ``cuda``."""
        return str(self.device.get("kind", "cpu"))

    @property
    def visible_index(self) -> int:
        """The device's number inside the worker, which sees no other where the device is known by its uuid."""
        return 0 if self.device.get("uuid") else int(self.device.get("index", 0))


def parse(packed: bytes) -> Spec:
    """Return the checked spec.

    Raises:
        LoadError: not MessagePack, a missing field, or a value out of type or range; the message names the field.
        UnsafeBundleError: a path that leaves the bundle.
    """
    try:
        raw = msgpack.unpackb(packed)
    except Exception as error:  # msgpack raises half a dozen unrelated types on bad bytes
        raise LoadError(f"spec is not MessagePack: {type(error).__name__}") from error
    top = _Fields(raw, "spec")
    batching = _Fields(top.take("batching", dict, {}), "batching")
    warmup = _Fields(top.take("warmup", dict, {}), "warmup")
    threads = _Fields(top.take("threads", dict, {}), "threads")
    limits = _Fields(top.take("limits", dict, {}), "limits")
    wire = _Fields(top.take("wire", dict, {}), "wire")
    bounds = Limits()
    bundle_dir = top.directory("bundle_dir")
    entry = top.take("entry", str)
    inside(bundle_dir, entry)
    return Spec(
        model=top.take("model", str),
        version=top.take("version", str),
        variant=top.take("variant", str),
        runtime=top.take("runtime", str),
        precision=top.take("precision", str, ""),
        device=top.take("device", dict, {"kind": "cpu", "index": 0}),
        providers=tuple(top.texts("providers")),
        session=top.take("session", dict, {}),
        bundle_dir=bundle_dir,
        entry=entry,
        handler=top.take("handler", dict, {}),
        signature=top.take("signature", dict),
        classes_file=top.take("classes_file", str, None),
        golden=tuple(dict(_Fields(entry, "golden").raw) for entry in top.take("golden", list, [])),
        warmup_runs=warmup.number("runs", 0, 10_000, 1),
        warmup_ms_max=warmup.number("max_ms", 0, 3_600_000, 10_000),
        warmup_shapes=tuple(dict(_Fields(shapes, "warmup.shapes").raw) for shapes in warmup.take("shapes", list, [])),
        batch_axis=batching.take("axis", str, None),
        batch_rows_max=batching.number("max_batch", 1, 65_536, 1),
        batch_delay_s=float(batching.number("max_delay_ms", 0, 60_000, 0)) / 1000,
        threads_intra=int(threads.number("intra", 1, 1024, 1)),
        threads_inter=int(threads.number("inter", 1, 1024, 1)),
        scratch_dir=top.directory("scratch_dir"),
        memory_bytes=int(limits.number("memory_bytes", 0, 1 << 50, 0)),
        open_files=int(limits.number("open_files", 16, 1 << 20, 256)),
        sandbox=top.choice("sandbox", ("enforce", "best_effort"), "enforce"),
        code_sandbox=top.choice("code_sandbox", ("full", "partial", "none"), "none"),
        cores=top.numbers("cores", 0, 65_535),
        share_weights=top.take("share_weights", bool, False),
        wire=Limits(
            header_bytes_max=int(wire.number("header_bytes_max", 1024, 1 << 30, bounds.header_bytes_max)),
            body_bytes_max=int(wire.number("body_bytes_max", 1024, 1 << 40, bounds.body_bytes_max)),
        ),
    )


def inside(bundle_dir: Path, relative: str) -> Path:
    """Return the absolute path of a bundle's file.

    Raises:
        UnsafeBundleError: the path is absolute, climbs, or resolves outside the bundle.
    """
    parts = relative.split("/")
    if not relative or os.path.isabs(relative) or ".." in parts or "\0" in relative:
        raise UnsafeBundleError(f"path {relative!r} is not a plain path inside the bundle")
    path = (bundle_dir / relative).resolve()
    if not path.is_relative_to(bundle_dir.resolve()):
        raise UnsafeBundleError(f"path {relative!r} leaves the bundle")
    return path


class _Fields:
    """Typed access to one map of the spec; errors name the field."""

    def __init__(self, raw: object, where: str) -> None:
        if not isinstance(raw, dict):
            raise LoadError(f"{where} must be a map, got {type(raw).__name__}")
        self.raw: dict[str, Any] = raw
        self._where = where

    def take(self, name: str, kind: type, *default: Any) -> Any:
        value = self.raw.get(name)
        if value is None and default:
            return default[0]
        if not isinstance(value, kind):
            raise LoadError(f"{self._where}.{name} must be {kind.__name__}, got {type(value).__name__}")
        return value

    def number(self, name: str, low: float, high: float, default: float) -> Any:
        value = self.raw.get(name)
        if value is None:
            return default
        if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
            raise LoadError(f"{self._where}.{name} must be a number from {low} to {high}, got {value!r}")
        return value

    def texts(self, name: str) -> list[str]:
        values = self.take(name, list, [])
        if not all(isinstance(value, str) for value in values):
            raise LoadError(f"{self._where}.{name} must be a list of texts")
        return list(values)

    def numbers(self, name: str, low: int, high: int) -> tuple[int, ...]:
        values = self.take(name, list, [])
        if not all(type(value) is int and low <= value <= high for value in values):
            raise LoadError(f"{self._where}.{name} must be a list of integers from {low} to {high}")
        return tuple(values)

    def choice(self, name: str, choices: tuple[str, ...], default: str) -> str:
        value = str(self.take(name, str, default))
        if value not in choices:
            raise LoadError(f"{self._where}.{name} must be one of {', '.join(choices)}, got {value!r}")
        return value

    def directory(self, name: str) -> Path:
        path = Path(self.take(name, str))
        if not path.is_absolute():
            raise LoadError(f"{self._where}.{name} must be an absolute path, got {str(path)!r}")
        return path
