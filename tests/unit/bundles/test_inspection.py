"""What is told of a model file: by its bytes, without loading it, whatever it holds."""

from __future__ import annotations

import contextlib
import io
import json
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from agent.bundles import inspection, onnx_facts
from agent.bundles.inspection import inspect_file, license_conflicts, license_in, same_license
from agent.errors import StateError, UnsafeBundleError
from agent.inspect_text import model_lines
from tests.fakes.classifier import write_classifier

pytestmark = pytest.mark.unit


def nested_model() -> bytes:
    """An If whose branch holds a constant and a weight; packed dims are what proto3 writers make."""
    inner = helper.make_graph(
        [helper.make_node("Constant", [], ["c"], value=numpy_helper.from_array(np.zeros((2, 3), np.float32))),
         helper.make_node("Identity", ["w"], ["y"])],
        "branch", [], [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(np.zeros(4, np.int8), "w")],
    )  # fmt: skip
    outer = helper.make_graph(
        [helper.make_node("If", ["cond"], ["y"], then_branch=inner, else_branch=inner)],
        "outer",
        [helper.make_tensor_value_info("cond", TensorProto.BOOL, []),
         helper.make_tensor_sequence_value_info("list", TensorProto.FLOAT, None)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [None, "rows", 3])],
    )  # fmt: skip
    model = helper.make_model(outer, opset_imports=[helper.make_opsetid("", 17), helper.make_opsetid("ai.onnx.ml", 3)])
    data: bytes = model.SerializeToString()
    return data


def archive(*members: tuple[str, bytes]) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as file:
        for name, data in members:
            file.writestr(name, data)
    return out.getvalue()


def safetensors(metadata: dict[str, str]) -> bytes:
    header = {"__metadata__": metadata, "w": {"dtype": "F16", "shape": [2, 3], "data_offsets": [0, 12]}}
    packed = json.dumps(header).encode()
    return struct.pack("<Q", len(packed)) + packed + bytes(12)


def test_an_onnx_file_tells_everything_about_itself(tmp_path: Path) -> None:
    path = write_classifier(tmp_path / "m.onnx", metadata={"license": "Apache-2.0", "task": "digits"})
    found = inspect_file(path)
    assert (found.format, found.license, found.size) == ("onnx", "Apache-2.0", path.stat().st_size)
    assert [(port.name, port.dtype, port.shape) for port in (*found.inputs, *found.outputs)] == [
        ("image", "float32", ("n", 1, 8, 8)),
        ("scores", "float32", ("n", 10)),
    ]
    loaded = onnx.load(path)
    assert found.parameters == sum(numpy_helper.to_array(one).size for one in loaded.graph.initializer)
    assert found.metadata == {"license": "Apache-2.0", "task": "digits"}
    assert found.about["producer"] == "classifier 1"
    assert found.about["opsets"] == {"ai.onnx": 17}
    assert found.about["doc"] == "Ten noisy shapes."
    assert found.about["operators"] == {"Relu": 2, "Gemm": 2, "Conv": 1, "Flatten": 1, "Softmax": 1}


def test_branches_count_and_what_is_no_tensor_is_said() -> None:
    found = onnx_facts.describe(memoryview(nested_model()))
    assert found.dtypes == {"float32": 12, "int8": 8}
    assert found.operators == {"Constant": 2, "Identity": 2, "If": 1}
    assert found.opsets == {"ai.onnx": 17, "ai.onnx.ml": 3}
    assert [(port.name, port.dtype) for port in found.inputs] == [("cond", "bool"), ("list", "")]
    assert found.outputs[0].shape == (None, "rows", 3)


@pytest.mark.parametrize("data", [b"", b"not a model", b"\x0a\x05hello", b"\x3a\xff\xff\xff\xff\x0f"])
def test_what_is_no_onnx_is_refused(data: bytes) -> None:
    with pytest.raises(UnsafeBundleError):
        onnx_facts.describe(memoryview(data))


def test_damaged_models_are_refused_or_told_never_worse() -> None:
    whole = nested_model()
    source = np.random.default_rng(5)
    for _ in range(400):
        damaged = bytearray(whole[: source.integers(1, len(whole) + 1)])
        for place in source.integers(0, len(damaged), 3):
            damaged[place] = source.integers(0, 256)
        try:
            onnx_facts.describe(memoryview(bytes(damaged)))
        except UnsafeBundleError:
            continue


def test_external_weights_are_listed_and_nothing_outside_is_looked_at(tmp_path: Path) -> None:
    path = write_classifier(tmp_path / "m/model.onnx")
    onnx.save(onnx.load(path), str(path), save_as_external_data=True, location="model.data", size_threshold=256)
    (one,) = inspect_file(path).external
    assert (one.path, one.size) == ("model.data", (tmp_path / "m/model.data").stat().st_size)
    (tmp_path / "secret").write_bytes(b"x" * 10)
    data = path.read_bytes().replace(b"model.data", b"../secret\x00")
    path.write_bytes(data)
    assert [item.size for item in inspect_file(path).external] == [None]


FORMATS: dict[str, tuple[bytes, str]] = {
    "safetensors": (safetensors({"format": "pt", "license": "mit"}), "safetensors"),
    "torchscript": (
        archive(("m/constants.pkl", b"\x80\x02."), ("m/data.pkl", b"\x80\x02."), ("m/code/__torch__.py", b"x"),
                ("m/data/0", bytes(64)), ("m/version", b"3\n"), ("m/extra/license", b"BSD-3-Clause")),
        "torchscript",
    ),
    "exported program": (
        archive(("p/archive_format", b"pt2"), ("p/data/weights/weight_0", bytes(32)), ("p/models/model.json", b"{}")),
        "pt2",
    ),
    "state dict": (archive(("s/data.pkl", b"\x80\x02."), ("s/data/0", bytes(8))), "torch-pickle"),
    "another archive": (archive(("readme.txt", b"hello")), "zip"),
    "pickle": (b"\x80\x04\x95" + bytes(20), "pickle"),
    "tflite": (b"\x1c\x00\x00\x00TFL3" + bytes(20), "tflite"),
    "text": (b"just a text, longer than nine bytes", "unknown"),
    "empty": (b"", "unknown"),
}  # fmt: skip


@pytest.mark.parametrize("case", FORMATS)
def test_the_format_is_read_from_the_bytes(case: str, tmp_path: Path) -> None:
    data, wanted = FORMATS[case]
    (tmp_path / "model.bin").write_bytes(data)
    found = inspect_file(tmp_path / "model.bin")
    assert found.format == wanted
    assert model_lines(inspection.msgspec.to_builtins(found))


def test_licences_are_found_in_safetensors_and_archives(tmp_path: Path) -> None:
    for case, licence in (("safetensors", "mit"), ("torchscript", "BSD-3-Clause")):
        (tmp_path / case).write_bytes(FORMATS[case][0])
        assert inspect_file(tmp_path / case).license == licence


@pytest.mark.parametrize(
    "change",
    [
        lambda data: data[:-30],
        lambda data: data.replace(b"PK\x01\x02", b"PK\x01\x03"),
        lambda data: data[:40] + bytes(20) + data[60:],
    ],
    ids=["cut", "broken table", "broken member"],
)
def test_damaged_archives_are_refused_or_told_never_worse(change: Callable[[bytes], bytes], tmp_path: Path) -> None:
    (tmp_path / "m.pt").write_bytes(change(FORMATS["torchscript"][0]))
    with contextlib.suppress(UnsafeBundleError):
        assert inspect_file(tmp_path / "m.pt").size


def test_large_texts_in_archives_are_named_not_read(tmp_path: Path) -> None:
    members = [*((f"m/{name}", b"x") for name in ("constants.pkl", "code/a.py")), ("m/extra/notes", bytes(1 << 20))]
    (tmp_path / "m.pt").write_bytes(archive(*members))
    assert inspect_file(tmp_path / "m.pt").metadata == {"notes": "(1048576 bytes)"}


def test_what_cannot_be_read_is_a_state_error(tmp_path: Path) -> None:
    with pytest.raises(StateError, match="No such file"):
        inspect_file(tmp_path / "nothing.onnx")


def test_terminal_commands_in_metadata_are_shown_not_carried_out(tmp_path: Path) -> None:
    path = write_classifier(tmp_path / "m.onnx", metadata={"licen\x1b[2Jse": "\x1b]0;owned\x07"})
    lines = model_lines(inspection.msgspec.to_builtins(inspect_file(path)))
    assert not any("\x1b" in line or "\x07" in line for line in lines)


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("Apache-2.0", "Apache License, Version 2.0", True),
        ("Apache-2.0", "https://www.apache.org/licenses/LICENSE-2.0", True),
        ("MIT", "The MIT License", True),
        ("GPL-3.0", "GNU General Public License v3", True),
        ("BSD-3-Clause", "BSD 3-Clause License", True),
        ("BSD-3-Clause", "BSD-2-Clause", False),
        ("MIT", "Apache-2.0", False),
        ("AGPL-3.0", "GPL-3.0", False),
        ("MIT", "", False),
    ],
)
def test_wordings_of_one_licence(one: str, other: str, same: bool) -> None:
    assert same_license(one, other) == same


def test_conflicts_name_the_file(tmp_path: Path) -> None:
    facts = [inspect_file(write_classifier(tmp_path / "m.onnx", metadata={"model.license": "AGPL-3.0"}))]
    assert license_conflicts("AGPL-3.0", facts) == []
    (found,) = license_conflicts("MIT", facts)
    assert "m.onnx says its licence is 'AGPL-3.0', the manifest says MIT" in found
    assert license_in({"licensee": "", "SPDX-License-Identifier": "MIT"}) == "MIT"
