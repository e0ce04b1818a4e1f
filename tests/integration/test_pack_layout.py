"""What ``pack`` makes of large weights, of licences, and of a bundle laid out from its own chunks."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from agent.errors import UntrustedError
from tests.fakes.hub import description, make_source
from tests.fakes.models import WEIGHTS, linear
from tests.integration.test_publish import hub, run
from tools.hub import packed_layout, safetensors
from tools.hub.bundle import open_bundle
from tools.hub.listener import Listener
from tools.hub.pack import pack

pytestmark = pytest.mark.integration
WIDE = 2100  # times itself, in fp32: 17.6 MB of weights


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sources of a model with more than 16 MiB of weights inside its ONNX file."""
    source = make_source(tmp_path_factory.mktemp("large") / "source")
    weights = np.random.default_rng(1).normal(0, 0.1, (WIDE, WIDE)).astype(np.float32)
    ports = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["N", WIDE]) for name in ("x", "y")]
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["y"])], "g", ports[:1], ports[1:],
        [numpy_helper.from_array(weights, "w")],
    )  # fmt: skip
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=10)
    onnx.save(model, source / "fp32/model.onnx")
    x = np.random.default_rng(2).normal(size=(1, WIDE)).astype(np.float32)
    (source / "golden/g1.in.safetensors").write_bytes(safetensors.dump({"x": x}))
    (source / "golden/g1.out.safetensors").write_bytes(safetensors.dump({"y": x @ weights}))
    description(source, "rtol = 1e-4, atol = 1e-5", "rtol = 1e-3, atol = 1e-2")
    return source


def test_large_weights_are_moved_out_and_the_source_is_only_read(large: Path, tmp_path: Path) -> None:
    before = (large / "fp32/model.onnx").read_bytes()
    packed = hub("pack", str(large), "--out", str(tmp_path / "bundle"))
    assert packed["variants"]["cpu-fp32"]["tried"]
    manifest = open_bundle(tmp_path / "bundle").manifest
    roles = {file.path: (file.role, file.format) for file in manifest.files}
    assert roles["fp32/model.onnx.data"] == ("weights", "onnx-data")
    assert manifest.file("fp32/model.onnx").size < 10_000
    assert set(manifest.variants[0].files) >= {"fp32/model.onnx", "fp32/model.onnx.data"}
    assert (large / "fp32/model.onnx").read_bytes() == before
    assert sorted(path.name for path in (large / "fp32").iterdir()) == ["model.onnx"]
    assert [path.name for path in tmp_path.iterdir()] == ["bundle"]
    told = hub("inspect", str(tmp_path / "bundle"))
    assert told["models"][0]["external"] == [{"path": "model.onnx.data", "size": WIDE * WIDE * 4}]


def test_weights_may_be_kept_where_they_are_with_a_warning(large: Path, tmp_path: Path) -> None:
    packed = hub("pack", str(large), "--out", str(tmp_path / "bundle"), "--external-data", "keep")
    assert any("with its weights inside" in warning for warning in packed["warnings"])
    assert len(open_bundle(tmp_path / "bundle").manifest.files) == 3
    answer = hub("pack", str(large), "--out", str(tmp_path / "b"), "--external-data", "keep", "--strict",
                 fails="bad_source")  # fmt: skip
    assert "licence" in answer["error"]["message"]
    assert not (tmp_path / "b").exists()


def test_a_file_in_the_way_of_the_weights_is_not_overwritten(large: Path, tmp_path: Path) -> None:
    taken = large / "fp32/model.onnx.data"
    taken.write_bytes(b"mine")
    try:
        description(large, "seq = 1\n", 'seq = 1\nshared = ["fp32/model.onnx.data"]\n')
        answer = hub("pack", str(large), "--out", str(tmp_path / "bundle"), fails="bad_source")
        assert "in the way" in answer["error"]["message"]
        assert "--external-data keep" in answer["error"]["hint"]
    finally:
        taken.unlink()
        description(large, 'shared = ["fp32/model.onnx.data"]\n', "\n")


def test_a_licence_inside_the_model_that_differs_is_a_warning(tmp_path: Path) -> None:
    source = make_source(tmp_path / "source")
    model = linear()
    helper.set_model_props(model, {"license": "AGPL-3.0"})
    onnx.save(model, source / "fp32/model.onnx")
    description(source, "seq = 1", 'seq = 1\nlicense = { spdx = "MIT" }')
    result = run("pack", str(source), "--out", str(tmp_path / "bundle"))
    assert result.exit_code == 0, result.output
    assert "warning: fp32/model.onnx says its licence is 'AGPL-3.0', the manifest says MIT" in result.stdout
    assert "says its licence is 'AGPL-3.0'" in run("inspect", str(tmp_path / "bundle")).stdout
    description(source, '"MIT"', '"AGPL-3.0"')
    assert "licence" not in " ".join(hub("pack", str(source), "--out", str(tmp_path / "b2"))["warnings"])


def test_a_chunk_that_is_not_the_files_is_found_before_anything_is_tried(tmp_path: Path) -> None:
    source = make_source(tmp_path / "source")
    bundle = pack(source, description(source), tmp_path / "bundle", now=1_000).bundle
    chunk = bundle.manifest.file("fp32/model.onnx").chunks[0]
    data = bytearray(bundle.blob_path(chunk).read_bytes())
    data[-1] ^= 1
    bundle.blob_path(chunk).write_bytes(data)
    with pytest.raises(UntrustedError, match=r"fp32/model\.onnx"):
        packed_layout.lay_out(bundle.manifest, bundle.folder, tmp_path / "layout", Listener())


def test_inspect_shows_a_file_and_a_bundle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    make_source(tmp_path / "source")
    facts = hub("inspect", "source/fp32/model.onnx")
    assert (facts["format"], facts["parameters"]) == ("onnx", WEIGHTS.size)
    assert "parameters  12" in run("inspect", "source/fp32/model.onnx").stdout
    assert hub("inspect", "source/golden/g1.in.safetensors")["format"] == "safetensors"
    hub("pack", "source", "--out", "bundle")
    told = hub("inspect", "bundle")
    assert told["manifest_sha256"] == open_bundle(tmp_path / "bundle").sha256
    assert told["models"][0]["sha256"] == facts["sha256"]

    assert hub("inspect", "source", fails="bad_source")["error"]["hint"]
    assert "--store" in hub("inspect", "vision/linear@1.0.0", fails="invalid_input")["error"]["message"]
    for blob in (tmp_path / "bundle/blobs").rglob("*"):
        if blob.is_file():
            blob.unlink()
    assert "cannot be read" in hub("inspect", "bundle", fails="bad_source")["error"]["message"]
    (tmp_path / "broken.onnx").write_bytes(b"\x00\x01")
    assert hub("inspect", "broken.onnx", fails="unsafe_bundle")["error"]["message"]
    assert json.loads(run("inspect", "source/model.toml", "--json").stdout)["format"] == "unknown"
