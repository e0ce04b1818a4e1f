"""The verbs that make and publish bundles: pack, quantize, publish, promote."""

from __future__ import annotations

import time
from dataclasses import asdict
from pathlib import Path
from typing import Literal

import click
import msgspec

from agent.errors import InvalidInputError
from tools.hub.bundle import open_bundle
from tools.hub.cli import (
    Passwords,
    emit,
    human_bytes,
    json_option,
    key_option,
    password_option,
    progress,
    publisher,
    store_option,
)
from tools.hub.cli_store import parse_model
from tools.hub.description import FILE_NAME, load
from tools.hub.publish import rfc3339

_FOLDER = click.Path(path_type=Path, file_okay=False)
_FILE = click.Path(path_type=Path, dir_okay=False)


@click.command()
@click.argument("source", metavar="SRC", type=_FOLDER)
@click.option("--manifest", type=_FILE, metavar="FILE", help=f"The description.  [default: SRC/{FILE_NAME}]")
@click.option("--out", type=_FOLDER, required=True, metavar="BUNDLE", help="Folder to make.")
@click.option("--seq", type=click.IntRange(min=1), help="Number that only grows per model.  [default: Unix seconds]")
@click.option("--untried", multiple=True, metavar="VARIANT", help="Accept a variant that this machine cannot run.")
@json_option
def pack(source: Path, manifest: Path | None, out: Path, seq: int | None, untried: tuple[str, ...]) -> None:
    """Check, try and chunk the model in SRC; write an unsigned bundle.

    Each variant is loaded in a process of its own, must reproduce the recorded (golden) outputs, and is measured.

    \b
    Example: inferhub pack magika-1.0.0 --out bundles/magika-1.0.0

    \b
    SRC/model.toml, shortest useful form:
      team = "vision"                      # also: description, labels, license, provenance, requires
      name = "digits"
      version = "1.0.0"
      handler = { id = "tensors/v1" }      # or { module = "handler.py", class = "Digits", params = {} }
      batching = { axis = "N", max_batch = 8 }
      [[variants]]                         # also: priority, device, files, threads, session, trusted_native
      id = "cpu-fp32"
      entry = "fp32/model.onnx"
      precision = "fp32"
      priority = 10                        # the lowest that runs is used
      [[golden]]                           # also: timeout_ms, per_variant
      id = "g1"
      inputs = "golden/g1.in.safetensors"
      outputs = "golden/g1.out.safetensors"
      compare = [{ output = "scores", metric = "allclose", rtol = 1e-3, atol = 1e-5 }]
    Further keys: signature, classes, shared, roles, ignore, seq, warmup, drift, rollout, ext.

    \b
    A variant for torch holds native code, so a box must allow it ([policy] native_formats = "signed"):
      [[variants]]
      id = "torch-fp32"
      runtime = "torch"
      entry = "torch/model.pt2"            # torch.export.save; or .pt: TorchScript
      precision = "fp32"
      priority = 20
      trusted_native = true
    """
    from tools.hub.pack import pack as pack_bundle  # imports a runtime: only this verb pays

    description = load(manifest or source / FILE_NAME)
    if seq is not None:
        description = msgspec.structs.replace(description, seq=seq)
    with progress() as bars:
        packed = pack_bundle(source, description, out, now=time.time(), untried_allowed=untried, listener=bars)
    bundle = packed.bundle
    variants = {
        variant.id: {
            "precision": variant.precision,
            "host_mb": variant.memory.host_mb,
            "p50_ms": variant.perf.p50_ms,
            "p99_ms": variant.perf.p99_ms,
            "tried": variant.id in packed.outcomes,
        }
        for variant in bundle.manifest.variants
    }
    emit(
        {
            "bundle": str(out),
            "model": bundle.title,
            "seq": bundle.manifest.seq,
            "manifest_sha256": bundle.sha256,
            "files": len(bundle.manifest.files),
            "bytes": packed.raw_bytes,
            "stored_bytes": packed.stored_bytes,
            "variants": variants,
        },
        f"{bundle.title}  seq {bundle.manifest.seq}  manifest {bundle.sha256[:12]}",
        f"{len(bundle.manifest.files)} files, {human_bytes(packed.raw_bytes)}, "
        f"stored {human_bytes(packed.stored_bytes)}",
        *(
            f"  {name}: golden test passed, p50 {facts['p50_ms']:g} ms, {facts['host_mb']} MiB"
            if facts["tried"]
            else f"  {name}: NOT TRIED: {packed.untried[name]}"
            for name, facts in variants.items()
        ),
        f"wrote {out}; publish it with: inferhub publish {out} --store DIR --team-key KEY --online-key KEY",
    )


@click.command()
@click.argument("source", metavar="IN.onnx", type=_FILE)
@click.option("--out", type=_FILE, required=True, metavar="OUT.onnx", help="Model to make.")
@click.option("--kind", type=click.Choice(["dynamic"]), default="dynamic", show_default=True)
@click.option("--inputs", type=_FILE, metavar="FILE", help="Real inputs (safetensors), first axis = rows.")
@click.option("--operators", default="", metavar="A,B", help="Quantize only these, for example MatMul.  [default: all]")
@click.option("--weights", type=click.Choice(["int8", "uint8"]), default="int8", show_default=True)
@click.option("--per-channel", is_flag=True, help="One scale per output channel.")
@click.option("--reduce-range", is_flag=True, help="7-bit weights, for x86 without VNNI.")
@json_option
def quantize(
    source: Path,
    out: Path,
    kind: str,
    inputs: Path | None,
    operators: str,
    weights: Literal["int8", "uint8"],
    per_channel: bool,
    reduce_range: bool,
) -> None:
    """Make an int8 model, and compare its size, speed and answers with the original's.

    \b
    Example: inferhub quantize fp32/model.onnx --out int8/model.onnx --inputs golden/g1.in.safetensors
    """
    from agent.worker import safetensors  # these three take half a second, so only this verb pays
    from tools.hub.quantize import compare
    from tools.hub.quantize import quantize as make

    real = safetensors.read(inputs) if inputs else None
    chosen = [name for name in operators.split(",") if name]
    make(source, out, operators=chosen, weights=weights, per_channel=per_channel, reduce_range=reduce_range)
    result = compare(source, out, real)
    emit(
        {"out": str(out), "kind": kind, **asdict(result), "latency_ratio": round(result.latency_ratio, 3)},
        f"{out}: {human_bytes(result.bytes_before)} -> {human_bytes(result.bytes_after)}",
        f"latency {result.p50_ms_before:g} -> {result.p50_ms_after:g} ms (x {result.latency_ratio:.2f}), one thread",
        f"answers: {result.top1_agreement:.1%} of {result.rows} rows agree, values differ by up to {result.max_abs:g}"
        + ("" if real else " (made-up inputs prove little: give --inputs)"),
        *(["it is SLOWER here: a box would choose it for its size only"] if result.latency_ratio > 1 else []),
    )


@click.command()
@click.argument("folder", metavar="BUNDLE", type=_FOLDER)
@store_option
@key_option("--team-key", "The team's key; signs the manifest and the index.")
@key_option("--online-key", "Signs snapshot and timestamp.")
@click.option("--channel", "channels", multiple=True, metavar="NAME", help="Point this channel to it; may be repeated.")
@password_option
@json_option
def publish(
    folder: Path, store: str, team_key: Path, online_key: Path, channels: tuple[str, ...], passwords: Passwords
) -> None:
    """Publish a packed bundle. Safe to repeat: after a cut it goes on, when done it changes nothing.

    \b
    Example: inferhub publish bundles/magika-1.0.0 --store store --team-key keys/demo --online-key keys/online \\
                 --channel stable
    """
    bundle = open_bundle(folder)
    with publisher(store) as (publishing, _), progress() as bars:
        done = publishing.publish(
            bundle,
            team_signer=passwords.signer(team_key),
            online_signer=passwords.signer(online_key),
            channels=channels,
            listener=bars,
        )
    points = f"channels: {', '.join(done.channels)}" if done.channels else "no channel points to it: inferhub promote"
    emit(
        asdict(done),
        f"{bundle.title} published, signed {rfc3339(done.timestamp_version)}; {points}"
        if done.changed
        else f"{bundle.title} was published already; nothing changed; {points}",
        f"{done.blobs_new} of {done.blobs} blobs were new ({human_bytes(done.bytes_new)} of {human_bytes(done.bytes)})"
        if done.changed
        else f"manifest {done.manifest_sha256[:12]}",
    )


@click.command()
@click.argument("model", metavar="TEAM/NAME@VERSION")
@store_option
@click.option("--channel", required=True, metavar="NAME", help="stable, canary, or any other name.")
@key_option("--team-key", "The team's key; signs the index.")
@key_option("--online-key", "Signs snapshot and timestamp.")
@password_option
@json_option
def promote(model: str, store: str, channel: str, team_key: Path, online_key: Path, passwords: Passwords) -> None:
    """Point a channel to a published version.

    \b
    Example: inferhub promote vision/yolo@1.4.0 --channel stable --store store --team-key keys/vision \\
                 --online-key keys/online
    """
    team, name, version = parse_model(model)
    if not version:
        raise InvalidInputError(f"{model!r} lacks @VERSION")
    with publisher(store) as (publishing, _):
        done = publishing.promote(
            team,
            name,
            version,
            channel,
            team_signer=passwords.signer(team_key),
            online_signer=passwords.signer(online_key),
        )
    changed = f"signed {rfc3339(done.timestamp_version)}" if done.changed else "it did already"
    emit(asdict(done), f"{channel} of {team}/{name} points to {version}; {changed}")
