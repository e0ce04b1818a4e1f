"""What is inside a model file, told without loading it: for people, and for the publisher's lint.

The kind is read from the bytes, not from the name. ONNX and safetensors files are parsed by our own bounded readers;
of archives (TorchScript, exported programs, pickled weights) only the table of contents and small texts are read, never
a pickle. Runs where untrusted bytes may be parsed: the publisher's program and the trust child.
"""

from __future__ import annotations

import math
import mmap
import posixpath
import re
import zipfile
import zlib
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import msgspec

from agent.bundles import onnx_facts, onnx_file, safetensors, strictjson
from agent.bundles.manifest import Manifest
from agent.bundles.verify import hash_file
from agent.errors import StateError, UnsafeBundleError

_TEXT_BYTES_MAX: Final = 64 * 1024
_MEMBERS_MAX: Final = 100_000
_LICENSE_KEY: Final = re.compile(r"(^|[._\s-])(licen[cs]e|spdx)", re.IGNORECASE)
_WORD: Final = re.compile(r"[a-z]+|[0-9]+(?:\.[0-9]+)*")
_FILLERS: Final = frozenset(
    {"the", "a", "license", "licence", "licenses", "version", "v", "of", "software", "spdx", "identifier", "gnu",
     "http", "https", "www", "org", "com", "opensource", "html", "txt"}
)  # fmt: skip
_SHORT_NAMES: Final = (
    ("lesser general public", "lgpl"), ("affero general public", "agpl"), ("general public", "gpl"),
    ("mozilla public", "mpl"), ("eclipse public", "epl"), ("creative commons", "cc"),
)  # fmt: skip


class ExternalFile(msgspec.Struct, frozen=True):
    """A file beside the model that holds weights. ``size`` is ``None`` if it is not there."""

    path: str
    size: int | None


class ModelFacts(msgspec.Struct, kw_only=True):
    """What was found in one file. ``about`` differs by format; ``license`` is as the file words it."""

    path: str
    format: str  # onnx, safetensors, torchscript, pt2, torch-pickle, tflite, zip, unknown
    size: int
    sha256: str
    license: str = ""
    metadata: dict[str, str] = {}
    inputs: tuple[onnx_facts.Port, ...] = ()
    outputs: tuple[onnx_facts.Port, ...] = ()
    parameters: int | None = None
    external: tuple[ExternalFile, ...] = ()
    about: dict[str, Any] = {}
    notes: tuple[str, ...] = ()


def inspect_file(path: Path, *, name: str = "") -> ModelFacts:
    """Return what the file at ``path`` says about itself; ``name`` is what to call it.

    Raises:
        StateError: it cannot be read.
        UnsafeBundleError: it begins as one of the formats and breaks its rules.
    """
    try:
        size = path.stat().st_size
        facts = ModelFacts(path=name or path.name, format="unknown", size=size, sha256=hash_file(path))
        if size:
            _look(path, facts)
    except OSError as error:
        raise StateError(f"{path}: {error.strerror}") from error
    except UnsafeBundleError as error:
        raise UnsafeBundleError(f"{name or path}: {error}") from error
    facts.license = facts.license or license_in(facts.metadata)
    return facts


def inspect_bundle(folder: Path, manifest: Manifest) -> list[ModelFacts]:
    """Return the facts of each model and weights file of ``manifest`` that is in ``folder``."""
    return [
        inspect_file(folder / item.path, name=item.path)
        for item in manifest.files
        if (item.role == "model" or (item.format == "safetensors" and item.role == "weights"))
        and (folder / item.path).is_file()
    ]


def license_in(metadata: Mapping[str, str]) -> str:
    """Return the licence that ``metadata`` names, ``""`` if none does."""
    for key, value in metadata.items():
        if _LICENSE_KEY.search(key) and value.strip():
            return value.strip().splitlines()[0][:200]
    return ""


def same_license(one: str, other: str) -> bool:
    """Say whether two wordings mean one licence: ``Apache-2.0``, ``Apache License, Version 2.0``, its URL."""
    return _license_words(one) == _license_words(other)


def license_conflicts(manifest_license: str, files: list[ModelFacts]) -> list[str]:
    """Return a sentence for each file whose own licence is not the manifest's."""
    return [
        f"{facts.path} says its licence is {facts.license!r}, the manifest says {manifest_license or 'nothing'}"
        for facts in files
        if facts.license and not same_license(facts.license, manifest_license)
    ]


def _license_words(text: str) -> frozenset[str]:
    text = text.casefold()
    for long, short in _SHORT_NAMES:
        text = text.replace(long, short)
    words = (word.removesuffix(".0") for word in _WORD.findall(text))
    return frozenset(words) - _FILLERS


def _look(path: Path, facts: ModelFacts) -> None:
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as mapped:
        view = memoryview(mapped)
        try:
            if bytes(view[:4]) == b"PK\x03\x04":
                _archive(path, facts)
            elif bytes(view[4:8]) == b"TFL3":
                facts.format = "tflite"
            elif bytes(view[:2]) in (b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05"):
                facts.format = "pickle"
                facts.notes = ("a pickle runs code when it is loaded; no box accepts it",)
            elif _is_safetensors(view):
                _safetensors(view, facts)
            elif path.suffix.casefold() == ".onnx" or _is_onnx(view):
                _onnx(view, path, facts)
        finally:
            view.release()


def _is_onnx(view: memoryview) -> bool:
    try:
        return bool(onnx_facts.describe(view).opsets)
    except UnsafeBundleError:
        return False


def _onnx(view: memoryview, path: Path, facts: ModelFacts) -> None:
    found = onnx_facts.describe(view)
    named = sorted({reference.location for reference in onnx_file.inspect(view).external})
    facts.format = "onnx"
    facts.metadata = found.metadata
    facts.inputs, facts.outputs = found.inputs, found.outputs
    facts.parameters = found.parameters
    facts.external = tuple(_external(path, location) for location in named)
    about = msgspec.to_builtins(found)
    facts.about = {
        key: about[key]
        for key in ("producer", "ir_version", "opsets", "domain", "model_version", "doc", "graph", "graph_doc",
                    "nodes", "operators", "dtypes")
        if about[key]
    }  # fmt: skip
    facts.license = license_in(found.metadata) or next(iter(_license_lines(found.doc, found.graph_doc)), "")


def _license_lines(*texts: str) -> list[str]:
    """Return what stands behind ``License:`` at the beginning of a line of a doc string."""
    pattern = re.compile(r"^\s*(?:licen[cs]e|spdx-license-identifier)\s*:\s*(.+)$", re.IGNORECASE | re.MULTILINE)
    return [match.group(1) for text in texts for match in pattern.finditer(text)]


def _external(path: Path, location: str) -> ExternalFile:
    """Return the named file's size; only of a plain file beside the model, whatever the name leads to."""
    inside = not location.startswith("/") and posixpath.normpath(location) == location and ".." not in location
    beside = path.parent / location
    here = inside and beside.is_file() and not beside.is_symlink()
    return ExternalFile(location[:200], beside.stat().st_size if here else None)


def _is_safetensors(view: memoryview) -> bool:
    return len(view) > 9 and int.from_bytes(view[:8], "little") <= len(view) - 8 and bytes(view[8:9]) == b"{"


def _safetensors(view: memoryview, facts: ModelFacts) -> None:
    names = safetensors.check(view)
    size = int.from_bytes(view[:8], "little")
    header = strictjson.loads(
        bytes(view[8 : 8 + size]), what="header", size_bytes_max=safetensors.HEADER_BYTES_MAX, depth_max=4
    )
    told = header.get("__metadata__", {})
    elements: Counter[str] = Counter()
    for name in names:
        elements[header[name]["dtype"]] += math.prod(header[name]["shape"])
    facts.format = "safetensors"
    facts.metadata = {str(key): str(value)[:_TEXT_BYTES_MAX] for key, value in told.items()}
    facts.parameters = sum(elements.values())
    facts.about = {"tensors": len(names), "dtypes": dict(elements.most_common())}


def _archive(path: Path, facts: ModelFacts) -> None:
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
            if len(members) > _MEMBERS_MAX:
                raise UnsafeBundleError(f"an archive of {len(members)} members")
            _torch(archive, members, facts)
    except (zipfile.BadZipFile, zlib.error, RuntimeError, EOFError) as error:
        raise UnsafeBundleError(f"a damaged archive: {error}") from error


def _torch(archive: zipfile.ZipFile, members: list[zipfile.ZipInfo], facts: ModelFacts) -> None:
    """Tell torch's archives apart by what they contain; their pickles stay closed."""
    # Everything lies below one folder; old exported programs have none.
    inner = {member.filename.partition("/")[2] or member.filename: member for member in members}
    inner |= {member.filename: member for member in members if "/" not in member.filename}
    facts.format = _torch_format(inner)
    if facts.format == "zip":
        return
    extra = {key[6:]: member for key, member in inner.items() if key.startswith("extra/") and key != "extra/"}
    facts.metadata = {key: text for key, member in extra.items() if (text := _small_text(archive, member))}
    marks = {
        key: text
        for key in ("version", "archive_format", "archive_version", "byteorder", "producer", ".data/version")
        if key in inner and (text := _small_text(archive, inner[key]))
    }
    weights = [m for key, m in inner.items() if key.startswith(("data/", "constants/")) and not key.endswith(".pkl")]
    facts.about = {
        "marks": {key: text.strip() for key, text in marks.items()},
        "members": len(members),
        "code": sorted(key for key in inner if key.startswith("code/") and key.endswith(".py"))[:20],
        "pickles": sorted(key for key in inner if key.endswith((".pkl", ".pt")))[:20],
        "weights_bytes": sum(member.file_size for member in weights),
    }
    native = facts.format in ("torchscript", "pt2")
    facts.notes = (
        "its loader unpickles parts: a variant needs trusted_native, and the box's [policy] native_formats"
        if native
        else "pickled weights run code when they are loaded; no box accepts them",
    )


def _torch_format(inner: Mapping[str, zipfile.ZipInfo]) -> str:
    if "archive_format" in inner or "serialized_exported_program.json" in inner:
        return "pt2"
    if "constants.pkl" in inner and any(name.startswith("code/") for name in inner):
        return "torchscript"
    return "torch-pickle" if "data.pkl" in inner else "zip"


def _small_text(archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> str:
    if member.file_size > _TEXT_BYTES_MAX:
        return f"({member.file_size} bytes)"
    data = archive.read(member)
    try:
        return data.decode()
    except UnicodeDecodeError:
        return f"({len(data)} bytes)"
