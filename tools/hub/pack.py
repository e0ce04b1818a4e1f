"""Turn a folder with ``model.toml`` into a bundle: chunks, lint, export check, trial of every variant, manifest.

Promises: what it writes passes the checks that a box makes, with the same code and the same words, on files laid out
from the chunks as a box does it; nothing enters a bundle that the description does not name; a bundle folder appears
whole or not at all.
Absent on purpose: signing. ``publish`` puts the manifest under a team's key.
"""

from __future__ import annotations

import math
import os
import platform
import shutil
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from hashlib import file_digest
from pathlib import Path
from typing import Any, Final

import msgspec
import onnxruntime

from agent.bundles import manifest as schema
from agent.bundles.inspection import inspect_bundle
from agent.bundles.names import check_name, check_version
from agent.config import MIB
from agent.durable import sync_directory, write_file
from tools.hub import chunks, export_check, lint, torch_machine, trial
from tools.hub.bundle import MANIFEST, Bundle, open_bundle
from tools.hub.contents import Contents, format_of, plan
from tools.hub.description import Description
from tools.hub.errors import SourceError
from tools.hub.listener import Listener
from tools.hub.onnxfile import signature_of
from tools.hub.packed_layout import lay_out
from tools.hub.publish import rfc3339
from tools.hub.sources import ExternalData, Sources, prepared
from tools.hub.variant_source import VariantSource

_ESTIMATE: Final = 2  # bytes of memory per byte of files, where nothing could be measured


@dataclass(frozen=True, slots=True, kw_only=True)
class Packed:
    """A new bundle and what was measured on the way."""

    bundle: Bundle
    outcomes: Mapping[str, trial.Outcome]  # by variant, those that were tried
    untried: Mapping[str, str]  # by variant, the reason
    raw_bytes: int
    stored_bytes: int
    warnings: tuple[str, ...] = ()


def pack(
    source: Path,
    description: Description,
    out: Path,
    *,
    now: float,
    untried_allowed: Collection[str] = (),
    external_data: ExternalData = "auto",
    strict: bool = False,
    listener: Listener | None = None,
) -> Packed:
    """Write the bundle of ``source`` to the new folder ``out``.

    Args:
        source: Folder that the description's paths are relative to.
        description: See ``description.py``.
        out: Must not exist.
        now: Unix seconds, for ``created`` and a ``seq`` that is not given.
        untried_allowed: Variants that may stay untried where this machine lacks their device or runtime.
        external_data: Whether the weights of large ONNX files are moved into files of their own.
        strict: What ``lint`` warns about is refused.
        listener: Told about progress.

    Raises:
        SourceError: a file is missing, unnamed or wrong, a model does not keep the signature or the versions that
            ``requires`` allows, or ``out`` exists.
        UnsafeBundleError: a box would refuse the bundle; the message names the place.
        TrialError: a variant fails, or cannot be tried here and is not in ``untried_allowed``.
    """
    listener = listener or Listener()
    if out.exists():
        raise SourceError(f"{out}: exists already", hint="Bundles are never overwritten: choose another --out.")
    check_name(description.team, "team")
    check_name(description.name, "name")
    check_version(description.version)
    contents = plan(source, description)
    beside, work = (out.with_name(f".{out.name}.{os.getpid()}.{suffix}") for suffix in ("tmp", "work"))
    try:
        beside.mkdir(parents=True)
        sources = prepared(source, contents, work / "rewritten", external_data=external_data, listener=listener)
        files, stored = _chunk_files(sources, contents, beside, listener)
        draft = _document(sources, description, contents, files, now)
        schema.parse_manifest(schema.encode(draft))
        layout = work / "layout"
        lay_out(draft, beside, layout, listener)
        facts = inspect_bundle(layout, draft)
        export_check.check(draft, {one.path: one for one in facts})
        warnings = lint.warnings(draft, facts)
        if strict and warnings:
            raise SourceError(warnings[0], hint="Correct it, or pack without --strict.")
        outcomes, untried = _try_variants(layout, draft, untried_allowed, listener)
        document = msgspec.structs.replace(
            draft, variants=tuple(_measured(variant, outcomes.get(variant.id)) for variant in draft.variants)
        )
        data = schema.encode(document)
        schema.parse_manifest(data)
        write_file(beside / MANIFEST, data, mode=0o644)
        beside.rename(out)
    finally:
        shutil.rmtree(beside, ignore_errors=True)
        shutil.rmtree(work, ignore_errors=True)
    sync_directory(out.parent)
    return Packed(
        bundle=open_bundle(out),
        outcomes=outcomes,
        untried=untried,
        raw_bytes=document.total_size,
        stored_bytes=stored,
        warnings=warnings,
    )


def _try_variants(
    layout: Path, document: schema.Manifest, untried_allowed: Collection[str], listener: Listener
) -> tuple[dict[str, trial.Outcome], dict[str, str]]:
    outcomes: dict[str, trial.Outcome] = {}
    untried: dict[str, str] = {}
    unknown = set(untried_allowed) - {variant.id for variant in document.variants}
    if unknown:
        raise SourceError(f"--untried {', '.join(sorted(unknown))}: no such variant")
    available = onnxruntime.get_available_providers()
    listener.stage("try variants", len(document.variants), "steps")
    for variant in document.variants:
        reason = _why_not_here(variant, available)
        if reason and variant.id in untried_allowed:
            untried[variant.id] = reason
        elif reason:
            raise SourceError(
                f"variant {variant.id} cannot be tried on this machine: {reason}",
                hint=f"Pack on a machine that can, or accept it untested with --untried {variant.id}",
            )
        else:
            outcomes[variant.id] = trial.attempt(_spec(layout, document, variant))
        listener.advance(1)
    return outcomes, untried


def _why_not_here(variant: schema.Variant, available: Collection[str]) -> str:
    if variant.runtime == "torch":
        return torch_machine.why_not(variant.device.kind)
    if variant.runtime != "onnxruntime":
        return f"runtime {variant.runtime}"
    if not variant.device.providers:
        raise SourceError(f"variant {variant.id}: device.providers is empty", hint="Name the execution provider.")
    missing = [name for name in variant.device.providers if name not in available]
    return f"ONNX Runtime has no {missing[0]}" if missing else ""


def _spec(layout: Path, document: schema.Manifest, variant: schema.Variant) -> dict[str, Any]:
    """Return the order a box would start this variant's worker with, but for its scratch folder."""
    goldens = [
        {
            "id": sample.id,
            "inputs": sample.inputs,
            "outputs": sample.outputs,
            "timeout_ms": sample.timeout_ms,
            "compare": msgspec.to_builtins(sample.per_variant.get(variant.id, sample.compare)),
        }
        for sample in document.golden
    ]
    return {
        "model": document.name,
        "version": document.version,
        "variant": variant.id,
        "runtime": variant.runtime,
        "precision": variant.precision,
        "device": {"kind": variant.device.kind, "index": 0},
        "providers": variant.device.providers,
        "session": variant.session,
        "bundle_dir": str(layout.resolve()),
        "entry": variant.entry,
        "handler": msgspec.to_builtins(document.handler),
        "classes_file": document.classes.file if document.classes else None,
        "signature": msgspec.to_builtins(document.signature),
        "golden": goldens,
        "warmup": msgspec.to_builtins(document.warmup),
        "batching": {"axis": document.batching.axis or None, "max_batch": document.batching.max_batch},
        "threads": {"intra": variant.threads.intra or 1, "inter": variant.threads.inter or 1},
        "sandbox": "best_effort",  # a publisher's machine need not be a box; the outcome says what there was
    }


def _chunk_files(sources: Sources, contents: Contents, out: Path, listener: Listener) -> tuple[list[schema.File], int]:
    paths = sorted(contents.roles)
    listener.stage("chunk and hash", sum(sources.path(path).stat().st_size for path in paths), "bytes")
    external = {path for listed in contents.external.values() for path in listed}
    files, stored = [], 0
    for path in paths:
        pieces = []
        for chunk, data in chunks.cut(sources.path(path), compress=True):
            blob = out / chunks.blob_name(chunk.stored_sha256)
            if not blob.exists():
                blob.parent.mkdir(parents=True, exist_ok=True)
                blob.write_bytes(data)
                stored += len(data)
            pieces.append(_piece(chunk))
            listener.advance(chunk.raw_size)
        with sources.path(path).open("rb") as file:
            digest = file_digest(file, "sha256").hexdigest()
        files.append(
            schema.File(
                path=path,
                size=sum(piece.size for piece in pieces),
                sha256=digest,
                role=contents.roles[path],
                format="onnx-data" if path in external else format_of(path),
                chunks=tuple(pieces),
            )
        )
    return files, stored


def _piece(chunk: chunks.Chunk) -> schema.Chunk:
    if not chunk.compressed:
        return schema.Chunk(chunk.raw_sha256, chunk.raw_size)
    return schema.Chunk(chunk.raw_sha256, chunk.raw_size, "zstd", chunk.stored_sha256, chunk.stored_size)


def _document(
    sources: Sources,
    description: Description,
    contents: Contents,
    files: list[schema.File],
    now: float,
) -> schema.Manifest:
    sizes = {file.path: file.size for file in files}
    return schema.Manifest(
        schema=schema.MANIFEST_SCHEMA,
        team=description.team,
        name=description.name,
        version=description.version,
        seq=description.seq or int(now),
        created=rfc3339(now),
        total_size=sum(sizes.values()),
        files=tuple(files),
        variants=tuple(_variant(variant, contents, sizes) for variant in description.variants),
        signature=description.signature or _signature(sources.root, description),
        handler=description.handler,
        description=description.description,
        labels=description.labels,
        license=description.license,
        provenance=description.provenance,
        requires=description.requires,
        chunking={"algo": "fastcdc", "min": chunks.MIN, "avg": chunks.AVERAGE, "max": chunks.MAX},
        classes=_classes(sources.root, description.classes),
        golden=description.golden,
        warmup=description.warmup,
        batching=description.batching,
        drift=description.drift,
        rollout=description.rollout,
        ext=description.ext,
    )


def _variant(variant: VariantSource, contents: Contents, sizes: Mapping[str, int]) -> schema.Variant:
    files = dict.fromkeys((variant.entry, *contents.external[variant.entry], *variant.files, *contents.common))
    disk = sum(sizes[path] for path in files)
    return schema.Variant(
        id=variant.id,
        priority=variant.priority,
        runtime=variant.runtime,
        entry=variant.entry,
        files=tuple(files),
        precision=variant.precision,
        device=_device(variant),
        quant=variant.quant,
        memory=schema.Memory(host_mb=_mib(_ESTIMATE * disk), disk_mb=_mib(disk), source="estimated"),
        threads=variant.threads,
        session=variant.session,
        metrics=variant.metrics,
        trusted_native=variant.trusted_native,
    )


def _device(variant: VariantSource) -> schema.Device:
    """Return the device, with the provider named that the CPU has in ONNX Runtime; torch has none."""
    device = variant.device
    if variant.runtime == "torch":
        return msgspec.structs.replace(device, providers=())
    if variant.runtime == "onnxruntime" and device.kind == "cpu" and not device.providers:
        return msgspec.structs.replace(device, providers=("CPUExecutionProvider",))
    return device


def _signature(source: Path, description: Description) -> schema.Signature:
    """Return the signature of the first variant whose file tells it."""
    for variant in description.variants:
        if format_of(variant.entry) == "onnx":
            return signature_of(source, variant.entry)
    raise SourceError("[signature] is needed: none of the variants' files is ONNX, which alone tells its own")


def _measured(variant: schema.Variant, outcome: trial.Outcome | None) -> schema.Variant:
    if outcome is None:
        return variant
    memory = msgspec.structs.replace(variant.memory, host_mb=_mib(outcome.host_bytes), source="measured")
    perf = schema.Perf(ref_device=_machine(), p50_ms=outcome.p50_ms, p99_ms=outcome.p99_ms)
    return msgspec.structs.replace(variant, memory=memory, perf=perf)


def _classes(source: Path, path: str) -> schema.Classes | None:
    if not path:
        return None
    return schema.Classes(file=path, count=len((source / path).read_text().splitlines()))


def _mib(size: int) -> int:
    return max(1, math.ceil(size / MIB))


def _machine() -> str:
    return f"{platform.machine()}, {_cpu_model()}"


def _cpu_model() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or "unknown CPU"
