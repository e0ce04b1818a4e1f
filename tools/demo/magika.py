"""The demo's model: bundle sources made from an official Magika wheel, whose weights never enter this repository.

Two releases make a real update: version 1.0.0 is the model of wheel 0.6.1, version 2.0.0 that of wheel 1.0.3. Each
gets two variants (the release's fp32 model, and an int8 one made from it), golden samples recorded from files of the
wheel itself, and the handler of ``magika_handler.py``.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from handlers.base import Context
from tools.demo.magika_handler import MagikaHandler
from tools.hub import convert, safetensors, scaffold
from tools.hub.convert import Int8
from tools.hub.errors import SourceError

Array = npt.NDArray[Any]
TEAM: Final = "demo"
NAME: Final = "magika"
HANDLER: Final = "magika_handler.py"
_CONFIG, _TYPES, _CLASSES = "config.json", "content_types.json", "classes.txt"
_MEMBER_BYTES_MAX: Final = 64 * 1024 * 1024
_DOWNLOAD_S_MAX: Final = 300.0
# Scores are probabilities. fp32 differs between CPUs in the last digits only; int8 moved them by up to 0.05 over 500
# real files here and by more on CPUs that saturate, so it is held to the label and to a coarse bound.
_FP32_ATOL: Final = 2e-3
_INT8_ATOL: Final = 0.15


@dataclass(frozen=True, slots=True, kw_only=True)
class Release:
    """One official release, and where it treats small files differently."""

    wheel: str
    model_bytes_min: int
    reason_if_same: bool


RELEASES: Final[Mapping[str, Release]] = {
    "1.0.0": Release(wheel="0.6.1", model_bytes_min=9, reason_if_same=True),
    "2.0.0": Release(wheel="1.0.3", model_bytes_min=8, reason_if_same=False),
}


@dataclass(frozen=True, slots=True)
class Wheel:
    """What is taken out of a wheel. ``samples`` are whole files by a short name."""

    model: bytes
    config: bytes
    content_types: bytes
    samples: Mapping[str, bytes]


def download_wheel(version: str, folder: Path) -> Path:
    """Return the wheel of Magika ``version`` in ``folder``, fetched with pip unless it is there.

    Raises:
        SourceError: pip could not get it.
    """
    if found := sorted(folder.glob(f"magika-{version}-*.whl")):
        return found[0]
    folder.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    try:
        done = subprocess.run(
            [*command, "--only-binary=:all:", "--dest", str(folder), f"magika=={version}"],
            capture_output=True,
            text=True,
            timeout=_DOWNLOAD_S_MAX,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise SourceError(f"pip did not get magika {version} within {_DOWNLOAD_S_MAX:.0f} s") from error
    found = sorted(folder.glob(f"magika-{version}-*.whl"))
    if done.returncode or not found:
        last = done.stderr.strip().rpartition("\n")[2]
        raise SourceError(f"pip could not get magika {version}: {last}", hint="Put the wheel into the folder by hand.")
    return found[0]


def build_sources(wheel: Path, version: str, folder: Path) -> Path:
    """Write the sources of bundle ``version``, ready for ``inferhub pack``, to the new ``folder``; return it.

    Args:
        wheel: The official wheel of ``RELEASES[version].wheel``.
        version: A key of ``RELEASES``.
        folder: Must not exist.

    Raises:
        SourceError: another wheel, an unusable one, or ``folder`` exists.
    """
    release = RELEASES[version]
    if not wheel.name.startswith(f"magika-{release.wheel}-"):
        raise SourceError(f"{wheel.name}: bundle {version} is made from magika {release.wheel}")
    if folder.exists():
        raise SourceError(f"{folder}: exists already", hint="Choose another folder.")
    parts = open_wheel(wheel)
    (folder / "fp32").mkdir(parents=True)
    (folder / "golden").mkdir()
    fp32, int8 = folder / "fp32/model.onnx", folder / "int8/model.onnx"
    fp32.write_bytes(parts.model)
    # Convolutions in int8 are several times slower than in fp32 on CPUs without VNNI; matrices are a little faster.
    convert.dynamic_int8(fp32, int8, Int8(operators=("MatMul",), per_channel=False))
    (folder / _CONFIG).write_bytes(parts.config)
    (folder / _TYPES).write_bytes(parts.content_types)
    labels = json.loads(parts.config)["target_labels_space"]
    (folder / _CLASSES).write_text("\n".join(labels) + "\n")
    shutil.copyfile(Path(__file__).with_name(HANDLER), folder / HANDLER)
    handler = handler_of(folder, version)
    inputs = np.concatenate([handler.preprocess(body, "").tensors["bytes"] for body in parts.samples.values()])
    outputs = scaffold.run(fp32, {"bytes": inputs})
    (folder / "golden/files.in.safetensors").write_bytes(safetensors.dump({"bytes": inputs}))
    (folder / "golden/files.out.safetensors").write_bytes(safetensors.dump(outputs))
    (folder / "model.toml").write_text(_description(version, release, len(labels), list(parts.samples)))
    return folder


def handler_of(folder: Path, version: str) -> MagikaHandler:
    """Return the handler over the sources of bundle ``version`` in ``folder``, as a worker would load it."""
    return MagikaHandler(_context(folder, RELEASES[version]))


def open_wheel(path: Path) -> Wheel:
    """Return the model, its configuration and a few real files from an official wheel.

    Raises:
        SourceError: not such a wheel.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
            model = _only(names, "magika/models/*/model.onnx")
            return Wheel(
                model=_read(archive, model),
                config=_read(archive, _only(names, "magika/models/*/config.min.json")),
                content_types=_read(archive, "magika/config/content_types_kb.min.json"),
                samples={
                    "python": _read(archive, "magika/magika.py"),
                    "json": _read(archive, "magika/config/content_types_kb.min.json"),
                    "markdown": _read(archive, _only(names, "magika/models/*/README.md")),
                    "onnx": _read(archive, model),
                    "elf": _read(archive, _only(names, "magika-*.data/scripts/magika")),
                    "record": _read(archive, _only(names, "magika-*.dist-info/RECORD")),
                },
            )
    except (zipfile.BadZipFile, OSError, KeyError) as error:
        raise SourceError(f"{path}: not a Magika wheel: {error}") from error


def _context(folder: Path, release: Release) -> Context:
    return Context(
        bundle_dir=folder,
        params=_params(release),
        classes=None,
        signature={"inputs": [], "outputs": []},
    )


def _params(release: Release) -> dict[str, Any]:
    return {
        "config": _CONFIG,
        "content_types": _TYPES,
        "model_bytes_min": release.model_bytes_min,
        "reason_if_same": release.reason_if_same,
    }


def _only(names: Sequence[str], pattern: str) -> str:
    """Return the one name that matches ``pattern``, whose ``*`` stays within its part of the path."""
    wanted = pattern.split("/")
    found = [name for name in names if len(parts := name.split("/")) == len(wanted) and all(map(_fits, parts, wanted))]
    if len(found) != 1:
        raise KeyError(f"{len(found)} files are called {pattern}")
    return found[0]


def _fits(part: str, pattern: str) -> bool:
    before, star, after = pattern.partition("*")
    return part == pattern if not star else part.startswith(before) and part.endswith(after)


def _read(archive: zipfile.ZipFile, name: str) -> bytes:
    info = archive.getinfo(name)
    if info.file_size > _MEMBER_BYTES_MAX:
        raise KeyError(f"{name} has {info.file_size} bytes")
    return archive.read(info)


def _description(version: str, release: Release, labels: int, samples: Sequence[str]) -> str:
    params = ", ".join(f"{key} = {json.dumps(value)}" for key, value in _params(release).items())
    return f"""\
# Made by tools/demo/magika.py from the official wheel magika {release.wheel}.
team = "{TEAM}"
name = "{NAME}"
version = "{version}"
description = "Content type of any file (Magika, official release {release.wheel})"
classes = "{_CLASSES}"
shared = ["{_CONFIG}", "{_TYPES}"]
handler = {{ module = "{HANDLER}", class = "MagikaHandler", params = {{ {params} }} }}
batching = {{ axis = "N", max_batch = 16, preferred = [1, 4, 16] }}
warmup = {{ runs = 2, max_ms = 10000 }}

[labels]
task = "content-type"

[license]
spdx = "Apache-2.0"
terms_url = "https://github.com/google/magika/blob/main/LICENSE"

[provenance]
source = "pkg:pypi/magika@{release.wheel}"
builder = "tools/demo/magika.py"

[requires]
runtimes = [{{ name = "onnxruntime", spec = ">=1.20,<2" }}]
os = ["linux"]

[signature]
inputs = [{{ name = "bytes", dtype = "int32", shape = ["N", 2048], range = [0, 256], semantic = "file/head-and-tail" }}]
outputs = [{{ name = "target_label", dtype = "float32", shape = ["N", {labels}], semantic = "probabilities" }}]
dims = {{ N = {{ min = 1, max = 16 }} }}

[[variants]]
id = "cpu-fp32"
entry = "fp32/model.onnx"
precision = "fp32"
priority = 10
device = {{ kind = "cpu", providers = ["CPUExecutionProvider"] }}

[[variants]]
id = "cpu-int8"
entry = "int8/model.onnx"
precision = "int8"
priority = 20
quant = {{ scheme = "dynamic", operators = "MatMul" }}
device = {{ kind = "cpu", providers = ["CPUExecutionProvider"] }}

# Rows: {", ".join(samples)}; all are files of the wheel.
[[golden]]
id = "files"
inputs = "golden/files.in.safetensors"
outputs = "golden/files.out.safetensors"
compare = [
  {{ output = "target_label", metric = "topk", k = 1, min = 1.0 }},
  {{ output = "target_label", metric = "max_abs", atol = {_FP32_ATOL} }},
]

[golden.per_variant]
cpu-int8 = [
  {{ output = "target_label", metric = "topk", k = 1, min = 1.0 }},
  {{ output = "target_label", metric = "max_abs", atol = {_INT8_ATOL} }},
]
"""
