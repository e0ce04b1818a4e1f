"""The verbs that make and publish bundles: pack, publish, promote."""

from __future__ import annotations

import time
from dataclasses import asdict
from pathlib import Path
from typing import Literal

import click
import msgspec

from agent.cli_text import human_bytes
from tools.hub.bundle import open_bundle
from tools.hub.cli import (
    Passwords,
    emit,
    json_option,
    key_option,
    password_option,
    progress,
    publisher,
    store_option,
)
from tools.hub.cli_store import parse_version
from tools.hub.description import FILE_NAME, load
from tools.hub.oms import upstream_record
from tools.hub.publish import rfc3339

_FOLDER = click.Path(path_type=Path, file_okay=False)
_FILE = click.Path(path_type=Path, dir_okay=False)


@click.command()
@click.argument("source", metavar="SRC", type=_FOLDER)
@click.option("--manifest", type=_FILE, metavar="FILE", help=f"The description.  [default: SRC/{FILE_NAME}]")
@click.option("--out", type=_FOLDER, required=True, metavar="BUNDLE", help="Folder to make.")
@click.option("--seq", type=click.IntRange(min=1), help="Number that only grows per model.  [default: Unix seconds]")
@click.option("--external-data", type=click.Choice(["auto", "keep"]), default="auto", show_default=True,
              help="auto: weights of ONNX files above 16 MiB get a file of their own; keep: as they are.")  # fmt: skip
@click.option("--strict", is_flag=True, help="Refuse what would only be warned about; nothing is written.")
@click.option("--untried", multiple=True, metavar="VARIANT", help="Accept a variant that this machine cannot run.")
@click.option("--upstream-oms", type=_FILE, metavar="FILE", help="OpenSSF model signature that came with the model; "
              "checked and recorded.")  # fmt: skip
@click.option("--upstream-key", type=_FILE, metavar="PUB", help="Whose it must be: public key or certificate, in PEM.")
@click.option("--upstream-dir", type=_FOLDER, metavar="DIR", help="The folder it was made for.  [default: SRC]")
@json_option
def pack(
    source: Path,
    manifest: Path | None,
    out: Path,
    seq: int | None,
    external_data: Literal["auto", "keep"],
    strict: bool,
    untried: tuple[str, ...],
    upstream_oms: Path | None,
    upstream_key: Path | None,
    upstream_dir: Path | None,
) -> None:
    """Check, try and chunk the model in SRC; write an unsigned bundle.

    The bundle is laid out from its chunks as a box will do it; each model must keep the signature and the versions
    that requires.runtimes allows; each variant is loaded in a sandboxed worker, must reproduce the recorded (golden)
    outputs, and is measured. Variants that inferhub quantize made are in SRC/variants.toml and taken along.

    \b
    Example: inferhub pack magika-1.0.0 --out bundles/magika-1.0.0
             inferhub pack resnet --out bundles/resnet --upstream-oms resnet/model.sig --upstream-key vendor.pem

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
    if upstream_oms is None and (upstream_key or upstream_dir):
        raise click.UsageError("--upstream-key and --upstream-dir say more of --upstream-oms, which is not given")
    if upstream_oms is not None and upstream_key is None:
        raise click.UsageError("--upstream-oms needs --upstream-key: whose signature must it be?")
    from tools.hub.pack import pack as pack_bundle  # imports a runtime: only this verb pays

    description = load(manifest or source / FILE_NAME)
    if seq is not None:
        description = msgspec.structs.replace(description, seq=seq)
    if upstream_oms is not None and upstream_key is not None:
        checked = upstream_record(upstream_dir or source, upstream_oms, upstream_key, verified_at=rfc3339(time.time()))
        provenance = msgspec.structs.replace(description.provenance, upstream_oms=checked)
        description = msgspec.structs.replace(description, provenance=provenance)
    with progress() as bars:
        packed = pack_bundle(source, description, out, now=time.time(), untried_allowed=untried,
                             external_data=external_data, strict=strict, listener=bars)  # fmt: skip
    bundle = packed.bundle
    upstream = bundle.manifest.provenance.upstream_oms
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
            "warnings": list(packed.warnings),
            "upstream_oms": upstream,
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
        *(f"warning: {warning}" for warning in packed.warnings),
        *([f"upstream signature: {upstream['files']} files by {upstream['identity']}"] if upstream_oms else []),
        f"wrote {out}; publish it with: inferhub publish {out} --store DIR --team-key KEY --online-key KEY",
    )


@click.command()
@click.argument("folder", metavar="BUNDLE", type=_FOLDER)
@store_option
@key_option("--team-key", "The team's key; signs the manifest and the index.")
@key_option("--online-key", "Signs snapshot and timestamp.")
@key_option("--oms-key", "Also sign the files as OpenSSF model signing does; ECDSA P-256.", required=False)
@click.option("--channel", "channels", multiple=True, metavar="NAME", help="Point this channel to it; may be repeated.")
@password_option
@json_option
def publish(
    folder: Path,
    store: str,
    team_key: str,
    online_key: str,
    oms_key: str | None,
    channels: tuple[str, ...],
    passwords: Passwords,
) -> None:
    """Publish a packed bundle. Safe to repeat: after a cut it goes on, when done it changes nothing.

    \b
    Example: inferhub publish bundles/magika-1.0.0 --store store --team-key keys/demo --online-key keys/online \\
                 --channel stable
             inferhub publish bundles/resnet --store store --team-key awskms:alias/vision --online-key keys/online \\
                 --oms-key keys/oms
    """
    bundle = open_bundle(folder)
    with publisher(store) as (publishing, _), progress() as bars:
        done = publishing.publish(
            bundle,
            team_signer=passwords.signer(team_key),
            online_signer=passwords.signer(online_key),
            oms_signer=passwords.signer(oms_key) if oms_key else None,
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
def promote(model: str, store: str, channel: str, team_key: str, online_key: str, passwords: Passwords) -> None:
    """Point a channel to a published version.

    \b
    Example: inferhub promote vision/yolo@1.4.0 --channel stable --store store --team-key keys/vision \\
                 --online-key keys/online
    """
    team, name, version = parse_version(model)
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
    emit(
        asdict(done),
        f"{channel} of {team}/{name} points to {version}; {changed}",
        *(["attention: this version is deprecated"] if done.status == "deprecated" else []),
    )
