"""What is told of a version: its metadata to clients, its state to operators."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Protocol

from agent.engine.memory import Need
from agent.engine.pool import Pool
from agent.engine.types import OIP_DATATYPES, Keeping, VersionSpec


class Shown(Protocol):
    """What is asked of a version."""

    spec: VersionSpec
    pool: Pool | None
    deaths: int
    good: int
    faults: int

    @property
    def ready(self) -> bool: ...

    @property
    def on_demand(self) -> bool: ...

    @property
    def why_not(self) -> str: ...

    @property
    def lasting(self) -> str:
        """Why it is not ready, without what changes by the second."""

    @property
    def skipped(self) -> list[dict[str, str]]: ...

    @property
    def keeping(self) -> Keeping: ...

    @property
    def held_by(self) -> str: ...

    @property
    def hello(self) -> Mapping[str, Any]:
        """What its worker has said of itself, or the last one it had."""

    @property
    def need(self) -> Need | None:
        """What a worker takes of memory; ``None``: there is no variant."""

    @property
    def holding(self) -> dict[str, int]:
        """What it holds of memory now, by place (bytes)."""

    @property
    def test_row(self) -> dict[str, Any] | None:
        """How its last self-test ended; ``None``: there was none but that of its load."""

    @property
    def variant_rows(self) -> list[dict[str, Any]]:
        """Each variant with its state."""

    def latency_s(self, quantile: float) -> float:
        """Return how long successful requests took from arrival to answer."""


def metadata(version: Shown) -> dict[str, Any]:
    """Return the model's metadata in the Open Inference Protocol's terms, plus what serves it."""
    spec, hello = version.spec, version.hello
    told = spec.variants[0].worker if spec.variants else {}
    signature = hello.get("signature") or told.get("signature", {})
    return {
        "name": spec.model,
        "versions": [spec.version],
        "platform": hello.get("runtime", spec.platform),
        "inputs": [_oip_tensor(tensor) for tensor in signature.get("inputs", [])],
        "outputs": [_oip_tensor(tensor) for tensor in signature.get("outputs", [])],
        "variant": hello.get("variant"),
        "device": hello.get("device"),
        "max_batch": hello.get("max_batch", told.get("batching", {}).get("max_batch", 1)),
        "streams": hello.get("streams", False),
    }


def status(version: Shown) -> dict[str, Any]:
    """Return what an operator wants to see."""
    pool, hello = version.pool, version.hello
    return {
        "version": version.spec.version,
        "digest": version.spec.digest,
        "ready": version.ready or version.on_demand,
        "reason": version.why_not,
        "lasting": version.lasting,
        "residency": residency(version),
        "variant": hello.get("variant"),
        "precision": hello.get("precision"),
        "device": hello.get("device"),
        "provider": hello.get("provider"),
        "sandbox": hello.get("sandbox"),
        "golden": hello.get("golden"),
        "selftest": version.test_row,
        "load_ms": hello.get("load_ms"),
        "placement": hello.get("placement"),
        "memory": hello.get("memory"),
        "resident_bytes_max": pool.resident_bytes_max if pool is not None else 0,
        "fallbacks": version.skipped,
        "variants": version.variant_rows,
        "max_batch": hello.get("max_batch"),
        "workers": [link.process.pid for link in pool.links] if pool is not None else [],
        "scaling": _scaling(pool) if pool is not None else None,
        "outstanding": pool.outstanding if pool is not None else 0,
        "lanes": pool.lanes if pool is not None else 0,
        "restarts": pool.restarts if pool is not None else 0,
        "deaths": version.deaths,
        "answers": {"good": version.good, "faults": version.faults},
        "latency_s": {"p50": version.latency_s(0.5), "p99": version.latency_s(0.99)},
    }


def residency(version: Shown) -> dict[str, Any]:
    """Return whether the version is in memory and why, and what it takes there."""
    keeping, need = version.keeping, version.need
    return {
        "loaded": version.ready,
        "load": "lazy" if keeping.lazy else "eager",
        "keep_alive_s": keeping.keep_alive_s if keeping.keep_alive_s < math.inf else None,
        "pinned": keeping.pinned,
        "held_by": version.held_by,
        "worker_bytes": dict(need.sizes) if need is not None else {},
        "source": need.source.value if need is not None else None,
        "held_bytes": version.holding,
    }


def _scaling(pool: Pool) -> dict[str, Any]:
    return {
        "wanted": pool.size,
        "min": pool.spec.bounds.least,
        "max": pool.spec.bounds.most,
        "held": pool.held,
        "cores": [link.hello.get("cores", []) for link in pool.links],
    }


def _oip_tensor(tensor: dict[str, Any]) -> dict[str, Any]:
    shape = [size if isinstance(size, int) else -1 for size in tensor.get("shape", [])]
    return {
        "name": tensor.get("name"),
        "datatype": OIP_DATATYPES.get(str(tensor.get("dtype")), "BYTES"),
        "shape": shape,
    }
