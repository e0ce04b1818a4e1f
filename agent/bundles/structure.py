"""What a manifest or index must satisfy beyond its types: names, caps, sums and references.

Pure. Each check raises ``UnsafeBundleError`` naming the place, so that the publisher's ``pack`` and the box refuse the
same documents with the same words.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from typing import TYPE_CHECKING, Final

from agent.bundles import names
from agent.config import canary_fault
from agent.errors import UnsafeBundleError

if TYPE_CHECKING:
    from agent.bundles.manifest import Compare, File, Handler, Index, Manifest, Rollout, Signature, Variant

FILES_MAX: Final = 4096
CHUNKS_MAX: Final = 200_000
CHUNK_BYTES_MAX: Final = 16 * 1024 * 1024
VARIANTS_MAX: Final = 64
GOLDEN_MAX: Final = 256
WARMUP_SHAPES_MAX: Final = 64
DIM_MAX: Final = 1 << 24  # of one dimension of an input to warm up with
LABELS_MAX: Final = 64
VERSIONS_MAX: Final = 10_000
BATCH_MAX: Final = 4096
INTEGER_MAX: Final = 2**53  # beyond it other JSON readers lose digits

NATIVE_FORMATS: Final = frozenset({"torchscript", "pt2", "tensorrt", "aotinductor", "openvino"})
MODEL_FORMATS: Final = NATIVE_FORMATS | {"onnx", "safetensors", "tflite"}
# Formats whose usual loaders unpickle or run what they read; ``.pt`` is TorchScript's usual name too.
REFUSED_SUFFIXES: Final = frozenset(
    {".pkl", ".pickle", ".pth", ".ckpt", ".joblib", ".npy", ".npz", ".h5", ".hdf5", ".keras", ".mar", ".pyc", ".dill"}
)
_MODULE: Final = re.compile(r"[A-Za-z_][A-Za-z0-9_]*\.py", re.ASCII)
_IDENTIFIER: Final = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,127}", re.ASCII)
_HANDLER_ID: Final = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}/v[0-9]{1,4}", re.ASCII)


def check_manifest(manifest: Manifest) -> None:
    """Check everything that the manifest alone can show.

    Raises:
        UnsafeBundleError: the first thing found.
    """
    names.check_name(manifest.team, "team")
    names.check_name(manifest.name, "name")
    names.check_version(manifest.version)
    _bounded(manifest.seq, 1, INTEGER_MAX, "seq")
    _require(len(manifest.labels) <= LABELS_MAX, f"labels: more than {LABELS_MAX}")
    files = _check_files(manifest)
    _check_signature(manifest.signature)
    _check_handler(manifest.handler, files)
    _check_variants(manifest.variants, files)
    _check_golden(manifest, files)
    _check_optional(manifest, files)


def check_index(index: Index) -> None:
    """Check an index's names, numbers and references; ``UnsafeBundleError`` names the first fault."""
    names.check_name(index.team, "team")
    names.check_name(index.name, "name")
    _require(len(index.versions) <= VERSIONS_MAX, f"versions: more than {VERSIONS_MAX}")
    for entry in index.versions:
        names.check_version(entry.version)
        names.check_sha256(entry.manifest_sha256, f"version {entry.version}: manifest_sha256")
        _bounded(entry.seq, 1, INTEGER_MAX, f"version {entry.version}: seq")
        _bounded(entry.bytes, 0, INTEGER_MAX, f"version {entry.version}: bytes")
    versions = [entry.version for entry in index.versions]
    _unique(versions, "version")
    _unique([str(entry.seq) for entry in index.versions], "seq")
    for channel, version in index.channels.items():
        names.check_name(channel, "channel")
        _require(version in versions, f"channel {channel!r} points to {version!r}, which the index does not list")


def _check_files(manifest: Manifest) -> dict[str, File]:
    _require(0 < len(manifest.files) <= FILES_MAX, f"files: 1 to {FILES_MAX}")
    names.check_tree(item.path for item in manifest.files)
    chunks = sum(len(item.chunks) for item in manifest.files)
    _require(chunks <= CHUNKS_MAX, f"chunks: {chunks}, at most {CHUNKS_MAX}")
    for item in manifest.files:
        _check_file(item)
    total = sum(item.size for item in manifest.files)
    _require(total == manifest.total_size, f"total_size: {manifest.total_size}, but the files' sizes add up to {total}")
    return {item.path: item for item in manifest.files}


def _check_file(item: File) -> None:
    where = f"file {item.path!r}"
    _bounded(item.size, 0, INTEGER_MAX, f"{where}: size")
    names.check_sha256(item.sha256, f"{where}: sha256")
    _require(not refused_suffix(item.path, item.format), f"{where}: this format may run code when it is loaded")
    _require(
        (item.role == "handler") == (item.format == "python"),
        f"{where}: Python code has the role 'handler' and the format 'python', and nothing else has",
    )
    total = 0
    for number, chunk in enumerate(item.chunks):
        place = f"{where}: chunk {number}"
        names.check_sha256(chunk.sha256, place)
        _bounded(chunk.size, 1, CHUNK_BYTES_MAX, f"{place}: size")
        if chunk.codec:
            names.check_sha256(chunk.stored_sha256, f"{place}: stored hash")
            _bounded(chunk.stored_size, 1, CHUNK_BYTES_MAX, f"{place}: stored size")
        else:
            _require(not chunk.stored_sha256 and not chunk.stored_size, f"{place}: stored size without a codec")
        total += chunk.size
    _require(total == item.size, f"{where}: size {item.size}, but the chunks add up to {total}")


def refused_suffix(path: str, file_format: str) -> bool:
    """Say whether the file's name promises a format that is never accepted."""
    suffix = "." + path.rpartition(".")[2].casefold() if "." in path else ""
    if suffix == ".pt":
        return file_format != "torchscript"
    return suffix in REFUSED_SUFFIXES or (suffix == ".so" and file_format != "aotinductor")


def _check_signature(signature: Signature) -> None:
    for side, tensors in (("inputs", signature.inputs), ("outputs", signature.outputs)):
        _require(0 < len(tensors) <= 256, f"signature.{side}: 1 to 256")
        _unique([tensor.name for tensor in tensors], f"signature.{side}: name")
        for tensor in tensors:
            _require(0 < len(tensor.name) <= 256, f"signature.{side}: a name of 1 to 256 characters")
            _require(len(tensor.shape) <= 16, f"signature.{side}: {tensor.name!r}: at most 16 dimensions")
            for dimension in tensor.shape:
                if isinstance(dimension, int):
                    _bounded(dimension, 0, INTEGER_MAX, f"signature.{side}: {tensor.name!r}: dimension")
    for name, dimension_bounds in signature.dims.items():
        _bounded(dimension_bounds.min, 0, dimension_bounds.max, f"signature.dims.{name}: min")


def _check_handler(handler: Handler, files: Mapping[str, File]) -> None:
    if handler.id:
        _require(not handler.module and not handler.class_name, "handler: either id, or module and class")
        _require(bool(_HANDLER_ID.fullmatch(handler.id)), f"handler.id: {handler.id[:80]!r} is not like 'tensors/v1'")
        return
    _require(bool(handler.module and handler.class_name), "handler: id, or module and class")
    _refers(handler.module, files, "handler.module", roles={"handler"})
    _require(bool(_MODULE.fullmatch(handler.module)), "handler.module: a top-level Python file such as handler.py")
    _require(bool(_IDENTIFIER.fullmatch(handler.class_name)), "handler.class: a Python class name")


def _check_variants(variants: Collection[Variant], files: Mapping[str, File]) -> None:
    _require(0 < len(variants) <= VARIANTS_MAX, f"variants: 1 to {VARIANTS_MAX}")
    _unique([variant.id for variant in variants], "variants: id")
    for variant in variants:
        where = f"variant {variant.id!r}"
        names.check_name(variant.id, "variant")
        names.check_name(variant.runtime, f"{where}: runtime")
        _bounded(variant.priority, 0, 1_000_000, f"{where}: priority")
        _unique(variant.files, f"{where}: files")
        for path in variant.files:
            _refers(path, files, f"{where}: files")
        _require(variant.entry in variant.files, f"{where}: entry {variant.entry!r} is not one of its files")
        _refers(variant.entry, files, f"{where}: entry", roles={"model"})
        _require(files[variant.entry].format in MODEL_FORMATS, f"{where}: entry is not in a model format")
        native = [path for path in variant.files if files[path].format in NATIVE_FORMATS]
        _require(
            variant.trusted_native or not native,
            f"{where}: {', '.join(native[:3])}: a native format needs trusted_native",
        )
        for amount in (variant.memory.host_mb, variant.memory.device_mb, variant.memory.disk_mb):
            _bounded(amount, 0, 1 << 31, f"{where}: memory")
        for count in (variant.threads.intra, variant.threads.inter):
            _bounded(count, 0, 1024, f"{where}: threads")


def _check_golden(manifest: Manifest, files: Mapping[str, File]) -> None:
    _require(len(manifest.golden) <= GOLDEN_MAX, f"golden: more than {GOLDEN_MAX}")
    _unique([sample.id for sample in manifest.golden], "golden: id")
    outputs = {tensor.name for tensor in manifest.signature.outputs}
    variants = {variant.id for variant in manifest.variants}
    for sample in manifest.golden:
        where = f"golden {sample.id!r}"
        names.check_name(sample.id, "golden")
        for path in (sample.inputs, sample.outputs):
            _refers(path, files, where, roles={"golden"})
            _require(files[path].format == "safetensors", f"{where}: {path!r} is not safetensors")
        _bounded(sample.timeout_ms, 1, 3_600_000, f"{where}: timeout_ms")
        _require(bool(sample.compare), f"{where}: compare is empty, so it would prove nothing")
        _check_compare(sample.compare, outputs, where)
        for variant, compare in sample.per_variant.items():
            _require(variant in variants, f"{where}: per_variant names the unknown variant {variant!r}")
            _require(bool(compare), f"{where}: per_variant {variant!r} is empty, so it would prove nothing")
            _check_compare(compare, outputs, where)


def _check_compare(compare: Iterable[Compare], outputs: Collection[str], where: str) -> None:
    for rule in compare:
        _require(rule.output in outputs, f"{where}: {rule.output!r} is not an output of the signature")
        _require(rule.rtol >= 0 and rule.atol >= 0, f"{where}: rtol and atol are not negative")
        _bounded(rule.k, 1, 1_000_000, f"{where}: k")


def _check_optional(manifest: Manifest, files: Mapping[str, File]) -> None:
    if manifest.classes is not None:
        _refers(manifest.classes.file, files, "classes.file", roles={"classes"})
        _bounded(manifest.classes.count, 1, 10_000_000, "classes.count")
    if manifest.license is not None and manifest.license.file:
        _refers(manifest.license.file, files, "license.file")
    _bounded(manifest.warmup.runs, 0, 10_000, "warmup.runs")
    _bounded(manifest.warmup.max_ms, 1, 3_600_000, "warmup.max_ms")
    _check_warmup_shapes(manifest)
    if manifest.rollout is not None:
        _check_rollout(manifest.rollout)
    _bounded(manifest.batching.max_batch, 1, BATCH_MAX, "batching.max_batch")
    _require(0 <= manifest.batching.max_delay_ms <= 60_000, "batching.max_delay_ms: 0 to 60000")
    features = manifest.requires.features
    _require(len(features) <= 64, "requires.features: more than 64")


def _check_warmup_shapes(manifest: Manifest) -> None:
    _require(len(manifest.warmup.shapes) <= WARMUP_SHAPES_MAX, f"warmup.shapes: more than {WARMUP_SHAPES_MAX}")
    inputs = {tensor.name: tensor.shape for tensor in manifest.signature.inputs}
    for shapes in manifest.warmup.shapes:
        for name, shape in shapes.items():
            _require(name in inputs, f"warmup.shapes: {name!r} is not an input of the signature")
            declared = inputs[name]
            fits = len(shape) == len(declared) and all(
                1 <= size <= DIM_MAX and (not isinstance(wanted, int) or size == wanted)
                for size, wanted in zip(shape, declared, strict=True)
            )
            _require(fits, f"warmup.shapes: {name!r} has the shape {list(declared)}, not {list(shape)}")


def _check_rollout(rollout: Rollout) -> None:
    fault = canary_fault(rollout.canary)
    _require(not fault, f"rollout.canary: {fault}")
    _require(0 <= rollout.shadow <= 100, "rollout.shadow: 0 to 100")
    _require(0 <= rollout.step_s <= 2_592_000, "rollout.step_s: 0 to 2592000")
    _bounded(rollout.calls_min, 0, 1_000_000, "rollout.calls_min")
    _require(0 <= rollout.min_agreement <= 1, "rollout.min_agreement: 0 to 1")


def _refers(path: str, files: Mapping[str, File], where: str, *, roles: Collection[str] = ()) -> None:
    _require(path in files, f"{where}: {path[:80]!r} is not a file of the bundle")
    if roles:
        role = files[path].role
        _require(role in roles, f"{where}: {path!r} has the role {role!r}, not {' or '.join(sorted(roles))}")


def _unique(values: Collection[str], what: str) -> None:
    if len(set(values)) != len(values):
        twice = next(value for value in values if list(values).count(value) > 1)
        raise UnsafeBundleError(f"{what} {twice[:80]!r} appears twice")


def _bounded(value: int, low: int, high: int, where: str) -> None:
    if not low <= value <= high:
        raise UnsafeBundleError(f"{where}: {value} is outside {low} to {high}")


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise UnsafeBundleError(message)
