"""The verb ``inspect``: what is inside a model file, a packed bundle or a published version."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from typing import Any

import click
import msgspec
import zstandard

from agent.bundles import inspection
from agent.bundles.manifest import Chunk, Manifest, parse_manifest
from agent.bundles.names import manifest_target
from agent.bundles.summary import summary
from agent.errors import InvalidInputError, TargetNotFoundError
from agent.inspect_text import model_lines, version_lines
from tools.hub.bundle import MANIFEST, open_bundle
from tools.hub.chunks import blob_name
from tools.hub.cli import STORE_HELP, emit, json_option, open_repository, s3_options
from tools.hub.cli_store import parse_model
from tools.hub.errors import SourceError
from tools.hub.packed_layout import raw_chunk


@click.command()
@click.argument("target", metavar="FILE|BUNDLE|TEAM/NAME@VERSION")
@click.option("--store", metavar="DIR", envvar="INFERHUB_STORE", help=f"{STORE_HELP} For a published version.")
@s3_options
@json_option
def inspect(target: str, store: str | None) -> None:
    """Show what a model says about itself: licence, metadata, producer, opsets, inputs, outputs, parameters.

    FILE is an ONNX, safetensors, TorchScript, .pt2 or TensorFlow Lite file; nothing in it is loaded or unpickled.
    For a packed bundle or a published version the manifest's licence, provenance, requirements and variants come
    first, then each of its models. Where manifest and model name different licences, that is said.

    \b
    Example: inferhub inspect fp32/model.onnx
             inferhub inspect bundles/magika-1.0.0
             inferhub inspect demo/magika@1.0.0 --store store --json
    """
    path = Path(target)
    if path.is_file():
        facts = msgspec.to_builtins(inspection.inspect_file(path))
        emit(facts, *model_lines(facts))
        return
    found = _bundle(path) if path.is_dir() else _published(target, store)
    emit(found, *version_lines(found))


def _bundle(folder: Path) -> dict[str, Any]:
    if not (folder / MANIFEST).is_file():
        raise SourceError(f"{folder}: not a packed bundle", hint="Name a model file in it, or pack it: inferhub pack")
    bundle = open_bundle(folder)
    return _told(bundle.manifest, bundle.sha256, lambda chunk: bundle.blob_path(chunk).read_bytes())


def _published(target: str, store: str | None) -> dict[str, Any]:
    if not store:
        raise InvalidInputError(f"{target}: no such file or folder; a published version needs --store DIR")
    team, name, version = parse_model(target)
    if not version:
        raise InvalidInputError(f"{target!r} lacks @VERSION; see: inferhub show {team}/{name}")
    folder, repository = open_repository(store)
    data = repository.read_target(repository.state(), team, manifest_target(team, name, version))
    if data is None:
        raise TargetNotFoundError(f"the store has no {target}; see: inferhub ls")
    return _told(parse_manifest(data), sha256(data).hexdigest(), lambda chunk: folder.read(blob_name(chunk.blob)))


def _told(manifest: Manifest, digest: str, read: Callable[[Chunk], bytes]) -> dict[str, Any]:
    """Return the summary; model files are put together in a temporary folder, their weights only as far as a size."""
    with tempfile.TemporaryDirectory(prefix="inferhub-inspect-") as scratch:
        for item in manifest.files:
            if item.role not in ("model", "weights"):
                continue
            path = Path(scratch, item.path)
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("xb") as file:
                if item.format == "onnx-data":
                    os.truncate(file.fileno(), item.size)
                    continue
                for chunk in item.chunks:
                    file.write(_raw(chunk, read, item.path))
        facts = inspection.inspect_bundle(Path(scratch), manifest)
    return summary(manifest, digest, facts)


def _raw(chunk: Chunk, read: Callable[[Chunk], bytes], path: str) -> bytes:
    try:
        return raw_chunk(read(chunk), chunk)
    except (OSError, zstandard.ZstdError) as error:
        raise SourceError(f"{path}: its chunk {chunk.blob[:12]} cannot be read: {error}") from error
