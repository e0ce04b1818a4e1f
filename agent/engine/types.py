"""The engine's own words: what it is asked to load and what it is asked to answer.

Values and protocols only. The composition root translates bundles into ``VersionSpec``; the edges bring requests.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, Protocol

from agent.engine.growth import Bounds
from agent.engine.memory import HOST, Need
from agent.regions import Region
from agent.wire import Buffer, Header

_UNKNOWN_NEED: Final = Need(sizes={HOST: 0})
_FORWARDED_BYTES: Final = 4096  # what the daemon adds to a forwarded header: deadline, its own number, regions

# The Open Inference Protocol's names of the wire's dtypes.
OIP_DATATYPES: Final[Mapping[str, str]] = {
    "bool": "BOOL",
    "uint8": "UINT8",
    "int8": "INT8",
    "uint16": "UINT16",
    "int16": "INT16",
    "uint32": "UINT32",
    "int32": "INT32",
    "uint64": "UINT64",
    "int64": "INT64",
    "float16": "FP16",
    "bfloat16": "BF16",
    "float32": "FP32",
    "float64": "FP64",
    "bytes": "BYTES",
}


class InferRequest(Protocol):
    """One request as an edge hands it over.

    ``answer`` is called exactly once, on the loop's thread, with a ``result`` or ``error`` header, which has no id, and
    the body's buffers; ``part``, which is there if the answer may come in parts, before it with each ``part`` header,
    which is its own, and body. ``header`` is the ``infer`` header as received, maybe one for many requests;
    ``deadline`` is absolute in the loop's time (seconds); ``regions`` is the shared memory the header names, by the
    client's numbers; the engine holds it as long as it needs it. ``handle`` belongs to the engine and starts as
    ``None``. ``routing_key`` is what a canary's share goes by; empty: what the header says, else the client.
    """

    model: str
    version: str | None
    header: Header
    body: Buffer
    deadline: float
    client: str
    routing_key: str
    regions: Sequence[tuple[int, Region]]
    handle: Any
    part: Callable[[dict[str, Any], Sequence[Buffer]], None] | None

    def answer(self, header: Header, body: Sequence[Buffer], /) -> None: ...


def forwarded_header_bytes(header_bytes_max: int) -> int:
    """Return what a worker must take for a header of so many bytes, which grows on its way.

    The daemon packs it anew: a float of 32 bits leaves as one of 64, 9 bytes for 5.
    """
    return 2 * header_bytes_max + _FORWARDED_BYTES


@dataclass(frozen=True, slots=True, kw_only=True)
class VariantSpec:
    """One way to run a version. ``worker`` is the spec a worker process receives, less its scratch folder."""

    id: str
    runtime: str  # "onnx": the zygote's name
    precision: str
    device: str  # "cpu", "cuda:0"
    worker: Mapping[str, Any]
    lanes: bool = True  # whether its worker is trusted to count what it answers on direct lanes
    window: int = 64  # requests a worker may hold at once; at least twice its batch
    bounds: Bounds = field(default_factory=Bounds)  # of the number of its workers
    pinned_device: str = ""  # "cuda:1", by configuration; empty: the GPU with the most free memory
    compute_min: str = ""  # "8.0": the least compute capability of its GPU; empty: any
    resident_bytes_max: int = 0  # memory a worker may really use, where there are control groups; 0: no limit
    threads: int = 1  # a worker's, for one operation: so many cores it is bound to, where workers are bound
    need: Need = _UNKNOWN_NEED  # a worker's memory, until it is learned here


@dataclass(frozen=True, slots=True, kw_only=True)
class Keeping:
    """When a version is in memory, while no deployment needs it there."""

    lazy: bool = False  # loaded by its first request
    keep_alive_s: float = math.inf  # unloaded once it was idle for so long
    pinned: bool = False  # never unloaded for others


@dataclass(frozen=True, slots=True, kw_only=True)
class VersionSpec:
    """A verified bundle on disk, ready to load: variants best first."""

    model: str
    version: str
    digest: str  # sha256 of the manifest, lower-case hex
    variants: tuple[VariantSpec, ...]
    dropped: tuple[tuple[str, str], ...] = ()  # (variant, why it cannot run here)
    platform: str = "onnxruntime"
    keeping: Keeping = field(default_factory=Keeping)
