"""The signed documents of a store: a version's manifest, a model's index and the fleet's operator keys.

``parse_manifest`` promises that what it returns is safe to act on as far as the manifest alone can tell: names, paths,
sums, caps and references hold (``structure.py``). Whether the bytes are signed is ``trust.py``'s question, whether the
files keep the manifest's word ``verify.py``'s. Unknown keys are refused everywhere but under ``ext``.

Optional text is ``""`` and optional lists are empty; both are left out when encoded.
"""

from __future__ import annotations

from typing import Any, Final, Literal, TypeAlias

import msgspec

from agent.bundles import strictjson, structure
from agent.errors import UnsafeBundleError

MANIFEST_SCHEMA: Final = "edge-model-manifest/1"
INDEX_SCHEMA: Final = "edge-model-index/1"
OPERATORS_SCHEMA: Final = "inferd-operators/1"
OPERATORS_TARGET: Final = "fleet/operators.json"

FileRole: TypeAlias = Literal[
    "model", "weights", "tokenizer", "classes", "golden", "license", "doc", "attestation", "handler"
]
FileFormat: TypeAlias = Literal[
    "onnx", "onnx-data", "safetensors", "tflite", "json", "txt", "raw", "python",
    "torchscript", "pt2", "tensorrt", "aotinductor", "openvino",
]  # fmt: skip
Precision: TypeAlias = Literal["fp32", "fp16", "bf16", "int8", "int4", "mixed"]
DeviceKind: TypeAlias = Literal["cpu", "cuda", "npu"]
DataType: TypeAlias = Literal[
    "bool", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64",
    "float16", "bfloat16", "float32", "float64", "bytes",
]  # fmt: skip
Metric: TypeAlias = Literal["allclose", "max_abs", "cosine", "topk", "iou"]


class Part(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """Base of all parts: immutable, keyword only, no unknown keys."""


class Chunk(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """A piece of a file: ``[sha256, size]``, or ``[sha256, size, "zstd", stored sha256, stored size]``.

    Sizes are bytes. A blob is named by the hash of what the store holds, hence ``blob``.
    """

    sha256: str
    size: int
    codec: Literal["", "zstd"] = ""
    stored_sha256: str = ""
    stored_size: int = 0

    @property
    def blob(self) -> str:
        """The sha256 of the stored bytes."""
        return self.stored_sha256 if self.codec else self.sha256

    @property
    def blob_size(self) -> int:
        """How many bytes the store holds."""
        return self.stored_size if self.codec else self.size


class File(Part, frozen=True):
    """One file; its chunks in order are its content."""

    path: str
    size: int
    sha256: str
    role: FileRole
    format: FileFormat
    chunks: tuple[Chunk, ...] = ()


class License(Part, frozen=True):
    """The terms of the weights. ``file`` is a path of the bundle."""

    spdx: str
    file: str = ""
    terms_url: str = ""
    export_note: str = ""


class Provenance(Part, frozen=True):
    """Where the model came from; shown, never acted on."""

    source: str = ""
    builder: str = ""
    framework: str = ""
    exporter: str = ""
    training_run: str = ""
    datasets: tuple[dict[str, str], ...] = ()
    base_model: dict[str, str] = {}
    metrics: dict[str, float] = {}
    model_card: str = ""
    sbom: str = ""
    upstream_oms: dict[str, str] = {}
    oms: dict[str, str] = {}


class RuntimeNeed(Part, frozen=True):
    """A runtime by distribution name and version range (``">=1.20,<2"``)."""

    name: str
    spec: str = ""


class Requires(Part, frozen=True):
    """What the box must have whatever the variant."""

    agent: str = ""
    features: tuple[str, ...] = ()
    runtimes: tuple[RuntimeNeed, ...] = ()
    os: tuple[str, ...] = ()


class Device(Part, frozen=True):
    """What a variant runs on; empty lists allow everything."""

    kind: DeviceKind
    arch: tuple[str, ...] = ()
    features_any: tuple[str, ...] = ()  # one of these CPU features suffices
    providers: tuple[str, ...] = ()
    min_compute: str = ""  # CUDA compute capability, "8.7"
    driver: str = ""  # version range of the GPU driver


class Memory(Part, frozen=True):
    """What a loaded variant takes, in MiB."""

    host_mb: int = 0
    device_mb: int = 0
    disk_mb: int = 0
    source: Literal["measured", "estimated"] = "estimated"


class Threads(Part, frozen=True):
    """Threads of the runtime; 0: the profile decides."""

    intra: int = 0
    inter: int = 0


class Perf(Part, frozen=True):
    """Latency measured by the publisher on its own machine."""

    ref_device: str = ""
    p50_ms: float = 0.0
    p99_ms: float = 0.0


class Variant(Part, frozen=True):
    """One way to run the model. Lower ``priority`` is preferred. ``files`` lists every file the variant reads."""

    id: str
    priority: int
    runtime: str
    entry: str
    files: tuple[str, ...]
    precision: Precision
    device: Device
    quant: dict[str, str] = {}
    memory: Memory = msgspec.field(default_factory=Memory)
    threads: Threads = msgspec.field(default_factory=Threads)
    session: dict[str, Any] = {}
    perf: Perf = msgspec.field(default_factory=Perf)
    metrics: dict[str, float] = {}
    trusted_native: bool = False


class Tensor(Part, frozen=True):
    """One input or output. In ``shape`` a text is a named dimension, ``None`` an unknown one."""

    name: str
    dtype: DataType
    shape: tuple[int | str | None, ...]
    layout: str = ""
    range: tuple[float, float] | None = None
    semantic: str = ""


class Dimension(Part, frozen=True):
    """Bounds of a named dimension, both included."""

    min: int = 1
    max: int = 1


class Signature(Part, frozen=True):
    """What goes in and comes out."""

    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]
    dims: dict[str, Dimension] = {}


class Classes(Part, frozen=True):
    """A text file with one label per line."""

    file: str
    count: int


class Handler(Part, frozen=True):
    """Built in (``id``), or a class in a Python module of this bundle (``module`` and ``class``)."""

    id: str = ""
    module: str = ""
    class_name: str = msgspec.field(default="", name="class")
    params: dict[str, Any] = {}
    idempotent: bool = True


class Compare(Part, frozen=True):
    """How one golden output is judged. ``k`` belongs to ``topk``, ``min`` to cosine, topk and iou."""

    output: str
    metric: Metric = "allclose"
    rtol: float = 0.0
    atol: float = 0.0
    min: float | None = None
    k: int = 1


class Golden(Part, frozen=True):
    """A recorded input with its outputs, both safetensors. ``per_variant`` replaces ``compare`` for a variant."""

    id: str
    inputs: str
    outputs: str
    compare: tuple[Compare, ...]
    timeout_ms: int = 5000
    per_variant: dict[str, tuple[Compare, ...]] = {}


class Warmup(Part, frozen=True):
    """Runs before the variant counts as ready."""

    runs: int = 1
    shapes: tuple[dict[str, tuple[int, ...]], ...] = ()
    max_ms: int = 10_000


class Batching(Part, frozen=True):
    """How requests may be joined along the named dimension ``axis``."""

    axis: str = ""
    max_batch: int = 1
    preferred: tuple[int, ...] = ()
    max_delay_ms: float = 0.0


class Rollout(Part, frozen=True):
    """The publisher's wish for the first hours; the box's own limits win."""

    self_test: Literal["required", "optional"] = "required"
    soak_s: float = 300.0
    max_error_rate: float = 0.02
    fallback: Literal["previous", "none"] = "previous"
    canary: tuple[float, ...] = ()  # percent of the routing keys, growing
    shadow: float = 0.0  # percent of the requests that are copied and compared first
    step_s: float = 0.0  # each of these lasts at least so long; 0: as the box says
    calls_min: int = 0  # and until so many good answers; 0: as the box says
    min_agreement: float = 0.0  # of the copies, 0..1; the box may ask for more


class Manifest(Part, frozen=True):
    """One version of one model; see ``supplychain`` section 9 of the design for each field's meaning."""

    schema: Literal["edge-model-manifest/1"]
    team: str
    name: str
    version: str
    seq: int  # strictly increasing per model
    created: str  # RFC 3339, UTC
    total_size: int  # bytes of all files
    files: tuple[File, ...]
    variants: tuple[Variant, ...]
    signature: Signature
    handler: Handler
    description: str = ""
    labels: dict[str, str] = {}
    license: License | None = None
    provenance: Provenance = msgspec.field(default_factory=Provenance)
    requires: Requires = msgspec.field(default_factory=Requires)
    chunking: dict[str, int | str] = {}  # informative
    classes: Classes | None = None
    golden: tuple[Golden, ...] = ()
    warmup: Warmup = msgspec.field(default_factory=Warmup)
    batching: Batching = msgspec.field(default_factory=Batching)
    drift: dict[str, Any] = {}
    rollout: Rollout | None = None
    ext: dict[str, Any] = {}

    def file(self, path: str) -> File:
        """Return the file called ``path``; ``KeyError`` if the manifest lists none."""
        for item in self.files:
            if item.path == path:
                return item
        raise KeyError(path)

    def variant(self, variant_id: str) -> Variant:
        """Return the variant called ``variant_id``; ``KeyError`` if there is none."""
        for item in self.variants:
            if item.id == variant_id:
                return item
        raise KeyError(variant_id)


class IndexEntry(Part, frozen=True):
    """One published version."""

    version: str
    seq: int
    manifest_sha256: str
    bytes: int
    created: str
    status: Literal["active", "deprecated", "revoked"] = "active"
    reason: str = ""
    min_agent: str = ""


class Index(Part, frozen=True):
    """All versions of a model and where its channels point."""

    schema: Literal["edge-model-index/1"]
    team: str
    name: str
    generated: str
    channels: dict[str, str] = {}  # channel to version
    versions: tuple[IndexEntry, ...] = ()


class OperatorKey(Part, frozen=True):
    """A public key whose holder may command the fleet."""

    keyid: str
    keytype: str
    scheme: str
    keyval: dict[str, str]  # {"public": ...}


class Operators(Part, frozen=True):
    """The keys that sign commands of ``tenant``; itself a target of the top-level role."""

    schema: Literal["inferd-operators/1"]
    tenant: str
    keys: tuple[OperatorKey, ...]


def parse_manifest(data: bytes) -> Manifest:
    """Return the checked manifest.

    Raises:
        UnsafeBundleError: not strict JSON, over a cap, not the schema, or inconsistent; the message names the place.
    """
    manifest = strictjson.convert(data, Manifest, what="manifest")
    structure.check_manifest(manifest)
    return manifest


def parse_index(data: bytes) -> Index:
    """Return the checked index; ``UnsafeBundleError`` as ``parse_manifest``."""
    index = strictjson.convert(data, Index, what="index")
    structure.check_index(index)
    return index


def parse_operators(data: bytes) -> Operators:
    """Return the checked operator keys; ``UnsafeBundleError`` as ``parse_manifest``."""
    operators = strictjson.convert(data, Operators, what="operators", size_bytes_max=256 * 1024)
    keyids = [key.keyid for key in operators.keys]
    if len(set(keyids)) != len(keyids):
        raise UnsafeBundleError("operators: two keys have the same keyid")
    return operators


def encode(document: Manifest | Index | Operators) -> bytes:
    """Return ``document`` as compact JSON with sorted keys; the same value always gives the same bytes."""
    value = msgspec.to_builtins(document, order="sorted")
    for item in value.get("files", ()) if isinstance(document, Manifest) else ():
        item["chunks"] = [chunk if chunk[2] else chunk[:2] for chunk in item.get("chunks", ())]
    return msgspec.json.encode(value, order="sorted")
