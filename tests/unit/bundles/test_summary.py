"""The summary that ``inspect`` answers with: whole where it can be, bounded where a file would make it endless."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from agent.bundles import child
from agent.bundles.inspection import ModelFacts, inspect_file
from agent.bundles.summary import ANSWER_BYTES_MAX, summary, version_summary
from agent.errors import StateError, UnsafeBundleError
from agent.inspect_text import version_lines
from tests.fakes.hub import description, make_source
from tools.hub.pack import pack

pytestmark = pytest.mark.unit


def facts(**changes: object) -> ModelFacts:
    plain = {"path": "fp32/model.onnx", "format": "onnx", "size": 1, "sha256": "0" * 64} | changes
    return ModelFacts(**plain)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_source(tmp_path_factory.mktemp("summary") / "source")


def test_a_whole_version_is_told(source: Path, tmp_path: Path) -> None:
    manifest = pack(source, description(source), tmp_path / "bundle", now=1_000).bundle.manifest
    found = summary(manifest, "f" * 64, [inspect_file(source / "fp32/model.onnx", name="fp32/model.onnx")])
    assert found["warnings"] == []
    assert found["manifest"]["files"][0]["chunks"] == 1
    lines = version_lines(found)
    assert lines[0].startswith("vision/linear@1.0.0")
    assert "licence    (none)" in lines
    assert any(line.startswith("variant    cpu-fp32: fp32 on cpu") for line in lines)

    wrong = summary(manifest, "f" * 64, [facts(license="MIT")])
    assert wrong["warnings"] == [
        "fp32/model.onnx: its sha256 is not the manifest's",
        "fp32/model.onnx says its licence is 'MIT', the manifest says nothing",
    ]

    endless = {f"key{number}": "x" * 4096 for number in range(256)}
    bounded = summary(manifest, "f" * 64, [facts(metadata=endless)])
    assert len(json.dumps(bounded)) <= ANSWER_BYTES_MAX
    assert bounded["models"][0]["metadata"] == {"…": "too long to show"}


def test_a_folder_without_a_verified_version_is_no_version(tmp_path: Path) -> None:
    with pytest.raises(StateError, match="no verified version"):
        version_summary(tmp_path)


def test_a_model_that_takes_too_much_memory_to_look_into_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def exhausted(path: Path) -> None:
        raise MemoryError

    monkeypatch.setattr("agent.bundles.summary.version_summary", exhausted)
    request = child.Request(op="inspect", state_dir=str(tmp_path), path=str(tmp_path))
    with pytest.raises(UnsafeBundleError, match="too much memory"):
        child.handle(request)
