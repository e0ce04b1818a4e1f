"""Judge one bundle file's bytes by its declared format, before any runtime opens it.

The files' hashes are already known to be the signed ones; this is the second line, against a publisher's mistake or a
publisher's stolen key: external data that leads out of the bundle, pickles and archives under harmless names,
operators that only a native library could supply, and pickled weights or compiled code where a program of torch is due.
"""

from __future__ import annotations

import mmap
import os
import posixpath
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Final

from agent.bundles import onnx_file, safetensors, torch_file
from agent.bundles.manifest import File, Manifest
from agent.errors import UnsafeBundleError

HANDLER_BYTES_MAX: Final = 1024 * 1024
_DOMAINS: Final = frozenset({"", "ai.onnx.ml", "ai.onnx.training", "com.microsoft", "com.microsoft.nchwc"})
_ENGINE_OPERATORS: Final = frozenset({"EPContext"})  # carries a compiled engine, which is native code
_CALLING_OPERATORS: Final = frozenset({"PythonOp", "PythonOpGrad"})  # name functions of the process that runs them
_ORT_FORMAT: Final = b"ORTM"  # in bytes 4 to 8: ONNX Runtime takes such bytes for its own format

_UNSTRUCTURED: Final = frozenset({"json", "txt", "raw", "python"})  # formats whose own check would not notice

# First bytes of formats that are refused under a harmless name.
_REFUSED_HEADS: Final[Mapping[bytes, str]] = {
    b"\x80\x02": "a pickle", b"\x80\x03": "a pickle", b"\x80\x04\x95": "a pickle", b"\x80\x05\x95": "a pickle",
    b"\x93NUMPY": "a NumPy file", b"\x89HDF\r\n": "an HDF5 file", b"PK\x03\x04": "a zip archive",
    b"\x7fELF": "a native library", b"\x1f\x8b": "a gzip archive", b"PK\x05\x06": "a zip archive",
    b"BZh": "a bzip2 archive", b"\xfd7zXZ": "an xz archive", b"7z\xbc\xaf": "a 7z archive",
    b"\x28\xb5\x2f\xfd": "a zstd archive",
}  # fmt: skip


def check_content(path: Path, file: File, manifest: Manifest, installed: Collection[str]) -> None:
    """Check the file at ``path``, which the manifest calls ``file``.

    Args:
        installed: The paths of the bundle that are on this box; references must stay among them.

    Raises:
        UnsafeBundleError: the content is not what its format may be.
    """
    judge = _JUDGES.get(file.format)
    if file.size == 0:
        if judge is not None:
            raise UnsafeBundleError(f"{file.path}: empty, which {file.format} cannot be")
        return
    view = _mapped(path)
    try:
        if file.format in _UNSTRUCTURED:
            _check_head(bytes(view[:8]), file)
        if judge is not None:
            judge(view, file, manifest, installed)
    except UnsafeBundleError as error:
        raise UnsafeBundleError(f"{file.path}: {error}") from error


def _mapped(path: Path) -> memoryview:
    """Return the file's bytes; unmapped with the last view of them, since an error's traceback may hold one."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        return memoryview(mmap.mmap(descriptor, 0, prot=mmap.PROT_READ))
    finally:
        os.close(descriptor)


def _check_head(head: bytes, file: File) -> None:
    for magic, name in _REFUSED_HEADS.items():
        if head.startswith(magic):
            raise UnsafeBundleError(f"is {name}, not {file.format}")


def _check_onnx(view: memoryview, file: File, manifest: Manifest, installed: Collection[str]) -> None:
    if bytes(view[4:8]) == _ORT_FORMAT or file.path.casefold().endswith(".ort"):
        raise UnsafeBundleError("is in ONNX Runtime's own format, not onnx")
    found = onnx_file.inspect(view)
    if found.external:
        here = set(installed)
        files = {item.path: item for item in manifest.files if item.path in here}
        for reference in found.external:
            _check_reference(reference, file, files)
    for domain, name in sorted(found.operators):
        if domain not in _DOMAINS and (domain, name) not in found.functions:
            raise UnsafeBundleError(f"the operator {domain[:80]}::{name[:80]} needs a native library")
        if name in _CALLING_OPERATORS:
            raise UnsafeBundleError(f"the operator {domain[:80]}::{name} calls code outside the bundle")
        if name in _ENGINE_OPERATORS and not _only_native(file, manifest):
            raise UnsafeBundleError(f"{name} carries a compiled engine, which needs trusted_native")


def _only_native(file: File, manifest: Manifest) -> bool:
    users = [variant for variant in manifest.variants if file.path in variant.files]
    return bool(users) and all(variant.trusted_native for variant in users)


def _check_reference(reference: onnx_file.External, file: File, files: Mapping[str, File]) -> None:
    location = reference.location
    path = posixpath.join(posixpath.dirname(file.path), location)
    if location.startswith("/") or "\\" in location or posixpath.normpath(path) != path or path not in files:
        raise UnsafeBundleError(f"external data {location[:80]!r} is not a file of the bundle")
    target = files[path]
    if target.role != "weights":
        raise UnsafeBundleError(f"external data {location[:80]!r} has the role {target.role!r}, not 'weights'")
    end = reference.offset + (reference.length or 0)
    if end > target.size:
        raise UnsafeBundleError(f"external data {location[:80]!r}: byte {end} of {target.size}")


def _check_safetensors(view: memoryview, file: File, manifest: Manifest, installed: Collection[str]) -> None:
    safetensors.check(view)


def _check_script(view: memoryview, file: File, manifest: Manifest, installed: Collection[str]) -> None:
    torch_file.check_script(view)


def _check_exported(view: memoryview, file: File, manifest: Manifest, installed: Collection[str]) -> None:
    torch_file.check_exported(view)


def _check_tflite(view: memoryview, file: File, manifest: Manifest, installed: Collection[str]) -> None:
    if bytes(view[4:8]) != b"TFL3":
        raise UnsafeBundleError("not a TensorFlow Lite file")


def _check_text(view: memoryview, file: File, manifest: Manifest, installed: Collection[str]) -> None:
    if file.role == "handler" and len(view) > HANDLER_BYTES_MAX:
        raise UnsafeBundleError(f"a handler of {len(view)} bytes, at most {HANDLER_BYTES_MAX} are allowed")
    try:
        str(view, "utf-8")
    except UnicodeDecodeError as error:
        raise UnsafeBundleError("not UTF-8 text") from error


_Judge = Callable[[memoryview, File, Manifest, Collection[str]], None]
_JUDGES: Final[Mapping[str, _Judge]] = {
    "onnx": _check_onnx,
    "safetensors": _check_safetensors,
    "tflite": _check_tflite,
    "torchscript": _check_script,
    "pt2": _check_exported,
    "python": _check_text,
}
