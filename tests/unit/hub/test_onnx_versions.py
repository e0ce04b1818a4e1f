"""Which ONNX Runtime loads which model; the row of the installed one is checked against itself."""

from __future__ import annotations

import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper

from agent.bundles.requirements import satisfies
from tools.hub.onnx_versions import RELEASES, obstacle, spec_for

pytestmark = pytest.mark.unit


@pytest.mark.parametrize(
    ("opset", "ir_version", "spec", "words"),
    [
        (17, 8, ">=1.20,<2", ""),
        (21, 10, ">=1.20,<2", ""),
        (22, 10, ">=1.20,<2", "1.20 loads opset 21"),
        (22, 10, ">=1.21,<2", ""),
        (21, 11, ">=1.22", "1.22 loads IR version 10"),
        (26, 13, ">=1.25", ""),
        (27, 13, ">=1.31", "1.31 loads opset 26"),
        (99, 99, "", ""),
    ],
)
def test_the_oldest_release_that_is_allowed_decides(opset: int, ir_version: int, spec: str, words: str) -> None:
    why = obstacle({"ai.onnx": opset}, ir_version, spec)
    assert words in why
    assert bool(words) == bool(why)


def test_the_range_for_a_model_begins_with_the_first_release_that_loads_it() -> None:
    assert spec_for({"ai.onnx": 17}, 8) == ">=1.20,<2"
    assert spec_for({"ai.onnx": 23}, 11) == ">=1.23,<2"


def test_the_table_is_right_about_the_installed_release() -> None:
    release = [one for one in RELEASES if satisfies(onnxruntime.__version__, f">={one.version}")][-1]
    assert loads(release.opset, release.ir_version)
    if release.version == ".".join(onnxruntime.__version__.split(".")[:2]):
        assert not loads(release.opset + 1, release.ir_version)
        assert not loads(release.opset, release.ir_version + 1)


def loads(opset: int, ir_version: int) -> bool:
    ports = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1]) for name in ("x", "y")]
    graph = helper.make_graph([helper.make_node("Relu", ["x"], ["y"])], "g", ports[:1], ports[1:])
    model: onnx.ModelProto = helper.make_model(
        graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=ir_version
    )
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    try:
        onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    except Exception:  # noqa: BLE001  # the binding's exceptions have no root of their own
        return False
    return True
