"""Which files go into a bundle, what each is, and which of them a variant reads.

Promises: every file of the source folder is accounted for: named by the description, evidently a document, ignored on
purpose, or refused. Paths and formats are refused by the box's own rules.
"""

from __future__ import annotations

import ast
import fnmatch
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from agent.bundles import manifest as schema
from agent.bundles import structure
from agent.bundles.names import check_path
from tools.hub import variants_file
from tools.hub.description import FILE_NAME, Description
from tools.hub.errors import SourceError
from tools.hub.onnxfile import external_files

_FORMATS: Final[Mapping[str, schema.FileFormat]] = {
    ".onnx": "onnx", ".safetensors": "safetensors", ".tflite": "tflite", ".json": "json", ".txt": "txt", ".md": "txt",
    ".py": "python", ".pt": "torchscript", ".pt2": "pt2", ".engine": "tensorrt", ".plan": "tensorrt",
    ".so": "aotinductor",
}  # fmt: skip
_DOCS: Final = ("readme", "model_card", "changelog", "notice")


@dataclass(slots=True)
class Contents:
    """Which files go in, as what, and which of them each variant reads."""

    roles: dict[str, schema.FileRole] = field(default_factory=dict)
    common: list[str] = field(default_factory=list)
    external: dict[str, list[str]] = field(default_factory=dict)  # by entry


def plan(source: Path, description: Description) -> Contents:
    """Return what ``description`` makes of the files in ``source``.

    Raises:
        SourceError: a file is missing, unnamed or of the wrong kind.
        UnsafeBundleError: a path or a model's reference that no box accepts.
    """
    contents = Contents()
    handler = description.handler
    if handler.module:
        _check_handler(source, handler)
        contents.roles[handler.module] = "handler"
        contents.common.append(handler.module)
    if description.classes:
        contents.roles[description.classes] = "classes"
        contents.common.append(description.classes)
    for sample in description.golden:
        for path in (sample.inputs, sample.outputs):
            contents.roles[path] = "golden"
            contents.common.append(path)
    for variant in description.variants:
        contents.roles[variant.entry] = "model"
        is_onnx = format_of(variant.entry) == "onnx"
        contents.external[variant.entry] = external_files(source, variant.entry) if is_onnx else []
        for path in contents.external[variant.entry]:
            contents.roles[path] = "weights"
    for path in (*description.shared, *(path for variant in description.variants for path in variant.files)):
        contents.roles.setdefault(path, "tokenizer" if format_of(path) == "json" else "weights")
    contents.common += description.shared
    if description.license and description.license.file:
        contents.roles.setdefault(description.license.file, "license")
    for path in (description.provenance.model_card, description.provenance.sbom):
        if path:
            contents.roles.setdefault(path, "doc")
    contents.roles |= description.roles
    _complete(source, description, contents)
    return contents


def format_of(path: str) -> schema.FileFormat:
    """Return the format that a file's name promises; external data is known by its model only."""
    name = path.rpartition("/")[2]
    if name.casefold() in ("license", "notice", "readme"):
        return "txt"
    return _FORMATS.get(Path(name).suffix.casefold(), "raw")


def _complete(source: Path, description: Description, contents: Contents) -> None:
    """Account for every file of the folder: named, evidently a document, ignored, or refused."""
    present = set(_walk(source)) - {FILE_NAME, variants_file.FILE_NAME}
    for path in sorted(present - set(contents.roles)):
        if any(fnmatch.fnmatch(path, pattern) for pattern in description.ignore):
            continue
        stem = path.rpartition("/")[2].partition(".")[0].casefold()
        if stem == "license":
            contents.roles[path] = "license"
        elif stem in _DOCS:
            contents.roles[path] = "doc"
        else:
            raise SourceError(
                f"{path}: the description does not say what this file is for",
                hint="Name it under shared, a variant's files or roles, or add a pattern to ignore.",
            )
    for path, role in contents.roles.items():
        check_path(path)
        if path not in present:
            raise SourceError(f"{path}: the {role} file is missing in {source}")
        if structure.refused_suffix(path, format_of(path)):
            raise SourceError(
                f"{path}: this format may run code when it is loaded, and no box accepts it",
                hint="Export to ONNX or safetensors.",
            )


def _walk(source: Path) -> Iterator[str]:
    for folder, folders, files in os.walk(source):
        folders[:] = [name for name in folders if not name.startswith(".") and name != "__pycache__"]
        for name in files:
            path = Path(folder, name)
            relative = path.relative_to(source).as_posix()
            if path.is_symlink() or not path.is_file():
                raise SourceError(f"{relative}: not a plain file", hint="Copy what it points to.")
            if not name.startswith("."):
                yield relative


def _check_handler(source: Path, handler: schema.Handler) -> None:
    path = source / handler.module
    try:
        tree = ast.parse(path.read_bytes(), filename=handler.module)
    except OSError as error:
        raise SourceError(f"{handler.module}: {error.strerror}", hint="handler.module is relative to SRC.") from error
    except (SyntaxError, ValueError) as error:
        raise SourceError(f"{handler.module}: not Python: {error}") from error
    classes = [node.name for node in tree.body if isinstance(node, ast.ClassDef)]
    if handler.class_name not in classes:
        raise SourceError(f"{handler.module}: has no class {handler.class_name!r}; it has: {', '.join(classes)}")
