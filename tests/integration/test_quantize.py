"""``inferhub quantize`` by its command line on a model that has learned something, and what ``pack`` makes of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper

from agent.worker import safetensors
from tests.fakes.classifier import INPUT, OUTPUT, images, write_classifier
from tests.fakes.hub import X, make_source
from tests.integration.test_publish import hub, run
from tools.hub import convert, variants_file
from tools.hub.convert import Int8
from tools.hub.description import load
from tools.hub.errors import SourceError

pytestmark = pytest.mark.integration
QUICK = ("--seconds", "0.1")
LOOSE = ("--min-agreement", "0.5")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """Sources with all three kinds, from an ONNX file; and what the verb answered."""
    folder = tmp_path_factory.mktemp("quantize")
    model = write_classifier(folder / "shapes.onnx", metadata={"license": "MIT"})
    pictures, _ = images(48, seed=5)
    np.savez(folder / "eval.npz", image=pictures)
    (folder / "calibration").mkdir()
    for number, picture in enumerate(images(24, seed=6)[0]):
        np.save(folder / f"calibration/{number:03}.npy", picture)
    answer = hub(
        "quantize", str(model), "--out", str(folder / "source"), "--model", "vision/shapes@1.2.0",
        "--inputs", str(folder / "eval.npz"), "--calibration", str(folder / "calibration"), *QUICK,
    )  # fmt: skip
    return folder, answer


def rows(answer: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {row["kind"]: row for row in answer["variants"]}


def test_each_kind_is_made_measured_and_kept(made: tuple[Path, dict[str, Any]]) -> None:
    _, answer = made
    assert (answer["samples"], answer["real_inputs"], answer["calibrated_with"]) == (48, True, 24)
    found = rows(answer)
    assert list(found) == ["fp32", "fp16", "dynamic", "static"]
    for kind in ("fp16", "dynamic", "static"):
        row = found[kind]
        assert row["kept"], row
        assert row["agreement"] >= 0.99
        assert row["outputs"][0]["measure"] == "top1"
        assert 0 < row["bytes"] < 0.7 * found["fp32"]["bytes"]
        assert row["p99_ms"] >= row["p50_ms"] > 0
        assert row["runs"] >= 12
        assert row["peak_bytes"] > row["growth_bytes"] > 0
        assert row["max_abs"] > 0


def test_the_models_are_what_they_are_called(made: tuple[Path, dict[str, Any]]) -> None:
    source = made[0] / "source"
    types = {}
    for name in ("fp16", "int8-dynamic", "int8-static"):
        graph = onnx.load(source / name / "model.onnx").graph
        types[name] = {node.op_type for node in graph.node} | {tensor.data_type for tensor in graph.initializer}
        ports = [(port.name, port.type.tensor_type.elem_type) for port in (*graph.input, *graph.output)]
        assert ports == [(INPUT, TensorProto.FLOAT), (OUTPUT, TensorProto.FLOAT)]
    assert {"Cast", TensorProto.FLOAT16} <= types["fp16"]
    assert types["int8-dynamic"] & {"DynamicQuantizeLinear", "MatMulInteger", "ConvInteger"}
    assert {"QuantizeLinear", "DequantizeLinear", TensorProto.INT8} <= types["int8-static"]


def test_the_description_is_ready_to_be_packed(made: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    source = made[0] / "source"
    description = load(source / "model.toml")
    assert description.license is not None
    assert description.license.spdx == "MIT"
    variants = {variant.id: variant for variant in description.variants}
    assert list(variants) == ["cpu-fp32", "cpu-fp16", "cpu-int8-dynamic", "cpu-int8-static"]
    assert variants["cpu-int8-static"].quant["scheme"] == "qdq"
    assert variants["cpu-int8-static"].quant["calibration"].startswith("sha256:")
    answer = rows(made[1])
    for kind, name in (("fp16", "cpu-fp16"), ("static", "cpu-int8-static")):
        faster = answer[kind]["speedup"] >= 1.05
        assert (variants[name].priority < variants["cpu-fp32"].priority) == faster
        rules = {rule.metric: rule for rule in description.golden[0].per_variant[name]}
        assert rules["topk"].min == 1.0
        assert rules["max_abs"].atol >= answer[kind]["max_abs"]

    packed = hub("pack", str(source), "--out", str(tmp_path / "bundle"))
    assert set(packed["variants"]) == set(variants)
    assert all(variant["tried"] for variant in packed["variants"].values())
    assert packed["warnings"] == []
    told = hub("inspect", str(tmp_path / "bundle"))
    assert {model["path"] for model in told["models"]} == {variant.entry for variant in variants.values()}
    assert told["manifest"]["variants"][1]["metrics"]["agreement"] >= 0.99


def test_the_measured_tolerance_holds_a_variant_to_its_word(made: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    source = tmp_path / "source"
    (made[0] / "source").rename(source)
    try:
        model = onnx.load(source / "fp16/model.onnx")
        (last,) = [tensor for tensor in model.graph.initializer if tensor.name == "last.b"]
        bias = onnx.numpy_helper.to_array(last)[::-1].copy() + np.arange(10, dtype=np.float16)
        last.CopyFrom(onnx.numpy_helper.from_array(bias.astype(np.float16), "last.b"))
        good = (source / "fp16/model.onnx").read_bytes()
        onnx.save(model, source / "fp16/model.onnx")
        answer = hub("pack", str(source), "--out", str(tmp_path / "bundle"), fails="selftest_failed")
        assert "cpu-fp16" in answer["error"]["message"]
        (source / "fp16/model.onnx").write_bytes(good)
    finally:
        source.rename(made[0] / "source")


def test_a_folder_of_sources_gets_variants_beside_a_persons_own(tmp_path: Path) -> None:
    source = make_source(tmp_path / "source")
    before = (source / "model.toml").read_bytes()
    answer = hub("quantize", str(source), "--kinds", "fp16,static", "--agreement", "cosine", *QUICK)
    found = rows(answer)
    assert found["fp16"]["kept"]
    assert found["static"]["reasons"] == ["no calibration data: give --calibration"]
    assert (source / "model.toml").read_bytes() == before
    assert (source / "fp16/model.onnx").is_file()
    assert set(hub("pack", str(source), "--out", str(tmp_path / "bundle"))["variants"]) == {"cpu-fp32", "cpu-fp16"}

    # A later run takes back what no longer passes.
    answer = hub("quantize", str(source), "--kinds", "fp16", "--max-size-ratio", "0.01", *QUICK)
    assert "times the size" in rows(answer)["fp16"]["reasons"][0]
    assert not (source / "fp16").exists()
    assert not (source / variants_file.FILE_NAME).exists()
    assert sorted(path.name for path in source.iterdir()) == ["fp32", "golden", "model.toml"]


@pytest.mark.parametrize("own", ["id", "folder"])
def test_what_a_person_made_is_never_replaced(own: str, tmp_path: Path) -> None:
    source = make_source(tmp_path / "source")
    if own == "id":
        text = (source / "model.toml").read_text()
        (source / "model.toml").write_text(text.replace('"cpu-fp32"', '"cpu-fp16"'))
    else:
        write_classifier(source / "fp16/model.onnx")
    before = {path: path.read_bytes() for path in source.rglob("*") if path.is_file()}
    answer = hub("quantize", str(source), "--kinds", "fp16", *QUICK, fails="bad_source")
    assert answer["error"]["hint"]
    assert {path: path.read_bytes() for path in source.rglob("*") if path.is_file()} == before


def test_the_table_names_what_was_left_out(tmp_path: Path) -> None:
    make_source(tmp_path / "source")
    result = run("quantize", str(tmp_path / "source"), "--kinds", "fp16,static", "--max-abs", "1e-9", *QUICK)
    assert result.exit_code == 0, result.output
    assert "cpu-fp16 was left out: values differ by up to" in result.stdout
    assert "cpu-int8-static was left out: no calibration data" in result.stdout
    assert "added to" in result.stdout


def test_made_up_inputs_are_owned_up_to(tmp_path: Path) -> None:
    model = write_classifier(tmp_path / "My Model.v2.onnx")
    result = run("quantize", str(model), "--out", str(tmp_path / "out"), "--kinds", "fp16", *LOOSE, *QUICK)
    assert result.exit_code == 0, result.output
    assert "made-up inputs say little" in result.stdout
    assert load(tmp_path / "out/model.toml").name == "my-model.v2"


def test_values_beyond_half_precision_stay_fp32_and_leave_no_cast_between(tmp_path: Path) -> None:
    ports = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["N", 4]) for name in ("x", "y")]
    factor = onnx.numpy_helper.from_array(np.array(1e-4, dtype=np.float32), "factor")
    nodes = [
        helper.make_node("Relu", ["x"], ["r"], "first"),
        helper.make_node("Mul", ["r", "r"], ["big"]),
        helper.make_node("Mul", ["big", "factor"], ["small"], "back"),
        helper.make_node("Relu", ["small"], ["y"], "last"),
    ]
    graph = helper.make_graph(nodes, "g", ports[:1], ports[1:], [factor])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.save(model, tmp_path / "big.onnx")
    inputs = X[1:] * 4 + 400
    assert np.max(inputs**2) > 65504
    assert convert.fp16(tmp_path / "big.onnx", tmp_path / "a/m.onnx", feeds=[{"x": inputs}]) == ("node_1", "back")
    made = onnx.load(tmp_path / "a/m.onnx").graph
    (big,) = [node for node in made.node if node.name == "node_1"]
    (back,) = [node for node in made.node if node.name == "back"]
    assert big.output[0] in back.input
    session = onnxruntime.InferenceSession(str(tmp_path / "a/m.onnx"), providers=["CPUExecutionProvider"])
    assert np.allclose(session.run(None, {"x": inputs})[0], inputs**2 * 1e-4, rtol=1e-2)

    np.savez(tmp_path / "in.npz", x=inputs)
    words = ("--out", str(tmp_path / "out"), "--inputs", str(tmp_path / "in.npz"), "--kinds", "fp16", *QUICK)
    row = rows(hub("quantize", str(tmp_path / "big.onnx"), *words))["fp16"]
    assert row["kept"]
    assert "2 nodes stay fp32" in row["note"]
    assert load(tmp_path / "out/model.toml").variants[1].quant["exclude"] == "node_1,back"


def test_a_large_input_or_output_is_never_cast(tmp_path: Path) -> None:
    ports = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["N", 4]) for name in ("x", "y")]
    graph = helper.make_graph([helper.make_node("Mul", ["x", "x"], ["y"], "square")], "g", ports[:1], ports[1:])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.save(model, tmp_path / "big.onnx")
    inputs = X[1:] + 1e5
    assert convert.fp16(tmp_path / "big.onnx", tmp_path / "a/m.onnx", feeds=[{"x": inputs}]) == ("square",)
    assert "Cast" not in {node.op_type for node in onnx.load(tmp_path / "a/m.onnx").graph.node}
    session = onnxruntime.InferenceSession(str(tmp_path / "a/m.onnx"), providers=["CPUExecutionProvider"])
    assert np.array_equal(session.run(None, {"x": inputs})[0], inputs * inputs)


@pytest.mark.parametrize(
    ("words", "code", "hint"),
    [
        (("source", "--kinds", "int4"), "invalid_input", "there are fp16"),
        (("source", "--kinds", ","), "invalid_input", "at least one"),
        (("source", "--min-agreement", "2"), "invalid_input", "0 to 1"),
        (("source", "--out", "x"), "invalid_input", "is a folder"),
        (("source", "--base", "cpu-bf16"), "bad_source", "cpu-bf16"),
        (("source", "--inputs", "nothing"), "bad_source", "No such file"),
        (("golden", "--kinds", "fp16"), "bad_source", "No such file"),
        (("source/golden",), "bad_source", "no model.toml"),
        (("source/fp32/model.onnx",), "invalid_input", "--out DIR"),
        (("source/fp32/model.onnx", "--out", "source"), "bad_source", "exists already"),
        (("source/fp32/model.onnx", "--out", "x", "--model", "linear"), "invalid_input", "TEAM/NAME"),
        (("source/fp32/model.onnx", "--out", "x", "--calibration", "nothing"), "bad_source", "No such file"),
        (("source/golden/g1.in.safetensors", "--out", "x"), "bad_source", "cannot be converted"),
        (("source/model.toml", "--out", "x"), "bad_source", "cannot be converted"),
    ],
)
def test_what_cannot_work_is_refused_where_it_enters(
    words: tuple[str, ...], code: str, hint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_source(tmp_path / "source")
    monkeypatch.chdir(tmp_path)
    before = sorted(path for path in tmp_path.rglob("*"))
    answer = hub("quantize", *words, fails=code)
    assert hint in json.dumps(answer)
    assert sorted(path for path in tmp_path.rglob("*")) == before


def test_large_weights_lie_in_a_file_of_their_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(convert, "EXTERNAL_BYTES_MIN", 16 * 1024)
    model = write_classifier(tmp_path / "m.onnx", hidden=128)
    pictures = images(8, seed=5)[0]
    wanted = answers(model, pictures)
    for kind in ("fp16", "dynamic", "static"):
        out = tmp_path / kind / "model.onnx"
        if kind == "fp16":
            convert.fp16(model, out)
        elif kind == "dynamic":
            convert.dynamic_int8(model, out, Int8())
        else:
            convert.static_int8(model, out, Int8(), [{INPUT: picture[None]} for picture in pictures])
        assert len(convert.model_files(out)) == 2
        assert out.stat().st_size < 16 * 1024 < convert.model_bytes(out)
        assert np.array_equal(answers(out, pictures).argmax(1), wanted.argmax(1))


def test_a_conversion_that_fails_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "bad.onnx").write_bytes(b"no model")
    with pytest.raises(SourceError, match="cannot be converted"):
        convert.dynamic_int8(tmp_path / "bad.onnx", tmp_path / "out/model.onnx", Int8())
    assert [path.name for path in tmp_path.iterdir()] == ["bad.onnx"]


def test_golden_samples_are_recorded_from_the_model_itself(made: tuple[Path, dict[str, Any]]) -> None:
    golden = made[0] / "source/golden"
    fed, recorded = (safetensors.read(golden / f"g1.{side}.safetensors") for side in ("in", "out"))
    assert fed[INPUT].shape == (8, 1, 8, 8)
    assert np.allclose(recorded[OUTPUT], answers(made[0] / "shapes.onnx", fed[INPUT]), atol=1e-5)


def answers(model: Path, pictures: Any) -> Any:
    session = onnxruntime.InferenceSession(str(model), providers=["CPUExecutionProvider"])
    return session.run([OUTPUT], {INPUT: pictures})[0]
