"""The demo's real model: sources from the official wheels, packed, and its handler on real bytes.

Takes the wheels from the folder that ``INFERD_WHEELS`` names, or gets them with pip; without either it is skipped.
"""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

import pytest

from handlers.base import Context
from tools.demo.magika import RELEASES, build_sources, download_wheel, open_wheel
from tools.demo.magika_handler import MagikaHandler
from tools.hub import scaffold
from tools.hub.description import load
from tools.hub.errors import SourceError
from tools.hub.pack import pack

pytestmark = pytest.mark.integration


@pytest.fixture(scope="module")
def wheels() -> Path:
    folder = Path(os.environ.get("INFERD_WHEELS") or Path(__file__).parents[2] / ".state/wheels")
    try:
        for release in RELEASES.values():
            download_wheel(release.wheel, folder)
    except SourceError as error:
        pytest.skip(str(error))
    return folder


@pytest.fixture(scope="module", params=sorted(RELEASES))
def source(request: pytest.FixtureRequest, wheels: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    wheel = download_wheel(RELEASES[request.param].wheel, wheels)
    return build_sources(wheel, request.param, tmp_path_factory.mktemp("magika") / request.param)


def classify(source: Path, body: bytes, variant: str = "fp32") -> dict[str, Any]:
    description = load(source / "model.toml")
    context = Context(
        bundle_dir=source,
        params=description.handler.params,
        classes=(source / description.classes).read_text().splitlines(),
        signature={},
    )
    handler = MagikaHandler(context)
    prepared = handler.preprocess(body, "application/octet-stream")
    outputs = scaffold.run(source / variant / "model.onnx", prepared.tensors)
    answer: dict[str, Any] = handler.postprocess_with(outputs, 1, prepared.state)
    json.dumps(answer, allow_nan=False)
    return answer


def test_both_variants_pass_their_trial(source: Path, tmp_path: Path) -> None:
    packed = pack(source, load(source / "model.toml"), tmp_path / "bundle", now=time.time())
    assert set(packed.outcomes) == {"cpu-fp32", "cpu-int8"}
    manifest = packed.bundle.manifest
    assert {variant.memory.source for variant in manifest.variants} == {"measured"}
    assert manifest.classes is not None
    assert manifest.classes.count == manifest.signature.outputs[0].shape[1]


@pytest.mark.parametrize("variant", ["fp32", "int8"])
def test_files_of_the_wheel_get_their_label(source: Path, wheels: Path, variant: str) -> None:
    wheel = download_wheel(RELEASES[source.name].wheel, wheels)
    samples = open_wheel(wheel).samples
    found = {name: classify(source, body, variant)["label"] for name, body in samples.items()}
    assert {name: found[name] for name in ("python", "json", "markdown", "onnx", "elf")} == {
        name: name for name in ("python", "json", "markdown", "onnx", "elf")
    }


@pytest.mark.parametrize(
    ("body", "label"),
    [
        (b"", "empty"),
        (b"abc", "txt"),
        (b"\xff\xfe\xfd", "unknown"),
        (b" \n" * 5000, "txt"),
        (b"\n" * 4096 + b"text behind a block of blank lines", "txt"),
    ],
)
def test_too_little_content_is_answered_without_the_model(source: Path, body: bytes, label: str) -> None:
    answer = classify(source, body)
    assert (answer["label"], answer["model_label"], answer["score"]) == (label, "undefined", 1.0)


def test_the_smallest_file_for_the_model_differs_between_the_releases(source: Path) -> None:
    answer = classify(source, b"eight by")
    assert (answer["model_label"] == "undefined") == (source.name == "1.0.0")


def test_another_wheel_or_an_existing_folder_is_refused(source: Path, wheels: Path, tmp_path: Path) -> None:
    other = next(version for version in RELEASES if version != source.name)
    with pytest.raises(SourceError, match="is made from"):
        build_sources(download_wheel(RELEASES[other].wheel, wheels), source.name, tmp_path / "new")
    with pytest.raises(SourceError, match="exists already"):
        build_sources(download_wheel(RELEASES[source.name].wheel, wheels), source.name, source)
    (tmp_path / "magika-0.6.1-junk.whl").write_bytes(b"PK junk")
    with pytest.raises(SourceError, match="not a Magika wheel"):
        build_sources(tmp_path / "magika-0.6.1-junk.whl", "1.0.0", tmp_path / "new")
