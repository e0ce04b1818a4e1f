"""What a file may hold: ONNX references, safetensors headers, disguised formats."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

import msgspec
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper

from agent.bundles import onnx_file, safetensors
from agent.bundles.content import check_content
from agent.bundles.manifest import Manifest, parse_manifest
from agent.errors import UnsafeBundleError
from tests.fakes import bundles

pytestmark = pytest.mark.unit


def judge(folder: Path, files: dict[str, bytes], path: str, **changes: Any) -> None:
    """Check ``path`` of a bundle made of ``files`` only where content matters."""
    manifest: Manifest = parse_manifest(msgspec.json.encode(bundles.describe(files, **changes)))
    target = folder / "file"
    target.write_bytes(files[path])
    check_content(target, manifest.file(path), manifest, {item.path for item in manifest.files})


def model(data: bytes) -> dict[str, bytes]:
    return bundles.plain_files() | {"fp32/model.onnx": data}


def test_weights_beside_the_model_are_accepted(tmp_path: Path) -> None:
    judge(tmp_path, bundles.plain_files(), "fp32/model.onnx")


@pytest.mark.parametrize(
    "location",
    [
        "../../etc/passwd",
        "/etc/passwd",
        "../fp32/model.onnx.data",
        "./model.onnx.data",
        "missing.data",
        "sub/../model.onnx.data",
        "..\\model.onnx.data",
        "",
        "*/_ORT_MEM_ADDR_/*",
    ],
)
def test_external_data_may_only_name_a_listed_file(tmp_path: Path, location: str) -> None:
    with pytest.raises(UnsafeBundleError, match="external data"):
        judge(tmp_path, model(bundles.external_model(location)), "fp32/model.onnx")


def test_external_data_must_have_the_role_weights(tmp_path: Path) -> None:
    files = model(bundles.external_model("notes.bin")) | {"fp32/notes.bin": bytes(1024 * 1024)}
    with pytest.raises(UnsafeBundleError, match="role 'doc'"):
        judge(tmp_path, files, "fp32/model.onnx")


def test_external_data_ends_within_its_file(tmp_path: Path) -> None:
    with pytest.raises(UnsafeBundleError, match="byte"):
        judge(tmp_path, model(bundles.external_model(length=1024 * 1024 + 1)), "fp32/model.onnx")


@pytest.mark.parametrize("place", ["attribute", "subgraph", "sparse", "function", "training"])
def test_external_data_is_found_wherever_a_tensor_can_stand(place: str) -> None:
    tensor = TensorProto(name="t", data_type=TensorProto.FLOAT, dims=[1], data_location=TensorProto.EXTERNAL)
    tensor.external_data.add(key="location", value="/etc/shadow")
    inner = helper.make_graph([], "inner", [], [], [tensor])
    graph = helper.make_graph([helper.make_node("Relu", ["x"], ["y"])], "outer", [], [])
    whole = helper.make_model(graph)
    node = whole.graph.node[0]
    if place == "attribute":
        node.attribute.append(helper.make_attribute("value", tensor))
    elif place == "subgraph":
        node.attribute.append(helper.make_attribute("body", inner))
    elif place == "sparse":
        whole.graph.sparse_initializer.add().values.CopyFrom(tensor)
    elif place == "function":
        function = whole.functions.add(name="f", domain="d")
        function.node.append(helper.make_node("Constant", [], ["c"], value=tensor))
    else:
        whole.training_info.add().algorithm.CopyFrom(inner)
    found = onnx_file.inspect(memoryview(whole.SerializeToString()))
    assert [item.location for item in found.external] == ["/etc/shadow"]


@pytest.mark.parametrize(("op", "domain"), [("Relu", ""), ("Relu", "ai.onnx"), ("Gelu", "com.microsoft")])
def test_operators_of_the_runtime_are_accepted(tmp_path: Path, op: str, domain: str) -> None:
    judge(tmp_path, model(bundles.operator_model(op, domain)), "fp32/model.onnx")


def test_operators_of_unknown_domains_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UnsafeBundleError, match="native library"):
        judge(tmp_path, model(bundles.operator_model("Backdoor", "evil.corp")), "fp32/model.onnx")


def test_operators_defined_in_the_model_are_accepted(tmp_path: Path) -> None:
    whole = onnx.ModelProto.FromString(bundles.operator_model("Mine", "my.functions"))
    whole.functions.add(name="Mine", domain="my.functions")
    judge(tmp_path, model(whole.SerializeToString()), "fp32/model.onnx")


def test_compiled_engines_need_trusted_native(tmp_path: Path) -> None:
    files = model(bundles.operator_model("EPContext", "com.microsoft"))
    with pytest.raises(UnsafeBundleError, match="compiled engine"):
        judge(tmp_path, files, "fp32/model.onnx")
    value = bundles.describe(files)
    value["variants"][0]["trusted_native"] = True
    judge(tmp_path, files, "fp32/model.onnx", variants=value["variants"])


@pytest.mark.parametrize("data", [b"not protobuf", b"\x08\x07", b"", b"\x0a\xff\xff\xff\xff\x0f"])
def test_what_is_no_onnx_model_is_refused(tmp_path: Path, data: bytes) -> None:
    with pytest.raises(UnsafeBundleError):
        judge(tmp_path, model(data), "fp32/model.onnx")


def test_deeply_nested_graphs_are_refused() -> None:
    graph = helper.make_graph([], "innermost", [], [])
    for _ in range(12):
        node = helper.make_node("If", ["c"], ["y"], then_branch=graph)
        graph = helper.make_graph([node], "outer", [], [])
    with pytest.raises(UnsafeBundleError, match="nested"):
        onnx_file.inspect(memoryview(helper.make_model(graph).SerializeToString()))


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=400))
def test_random_bytes_are_refused_or_read_and_never_crash(data: bytes) -> None:
    with contextlib.suppress(UnsafeBundleError):
        onnx_file.inspect(memoryview(data))


@settings(max_examples=200, deadline=None)
@given(st.integers(0, 10_000), st.integers(0, 255))
def test_a_changed_byte_in_a_model_never_crashes(position: int, value: int) -> None:
    data = bytearray(bundles.external_model())
    data[position % len(data)] = value
    with contextlib.suppress(UnsafeBundleError):
        onnx_file.inspect(memoryview(bytes(data)))


def tensors(header: Any, data: bytes = b"\x00" * 8) -> memoryview:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return memoryview(len(text).to_bytes(8, "little") + text + data)


def entry(begin: int, end: int, *, dtype: str = "F32", shape: list[Any] | None = None) -> dict[str, Any]:
    return {"dtype": dtype, "shape": [(end - begin) // 4] if shape is None else shape, "data_offsets": [begin, end]}


def test_safetensors_in_order_are_accepted() -> None:
    header = {"b": entry(4, 8), "a": entry(0, 4), "__metadata__": {"x": "y"}}
    assert safetensors.check(tensors(header)) == ("a", "b")


@pytest.mark.parametrize(
    "header",
    [
        {"a": entry(0, 4)},
        {"a": entry(4, 8)},
        {"a": entry(0, 8), "b": entry(4, 8)},
        {"a": entry(0, 12)},
        {"a": entry(0, 8, shape=[3])},
        {"a": entry(0, 8, shape=[-2])},
        {"a": entry(0, 8, shape=[1 << 62, 1 << 62])},
        {"a": entry(0, 8, shape=[2.0])},
        {"a": entry(0, 8, dtype="OBJ")},
        {"a": entry(0, 8) | {"extra": 1}},
        {"a": [0, 8]},
        [],
        b'{"a":{},"a":{}}',
        b"\xff",
    ],
)
def test_other_safetensors_headers_are_refused(header: Any) -> None:
    with pytest.raises(UnsafeBundleError):
        safetensors.check(tensors(header))


def test_a_safetensors_header_longer_than_its_file_is_refused() -> None:
    with pytest.raises(UnsafeBundleError):
        safetensors.check(memoryview((1 << 40).to_bytes(8, "little") + b"{}"))


@pytest.mark.parametrize(
    "head", [b"\x80\x04\x95", b"\x93NUMPY", b"PK\x03\x04", b"\x7fELF", b"\x89HDF\r\n", b"\x1f\x8b"]
)
def test_a_refused_format_under_a_harmless_name_is_recognised(tmp_path: Path, head: bytes) -> None:
    files = bundles.plain_files() | {"notes.bin": head + b"x" * 32}
    with pytest.raises(UnsafeBundleError, match=r"notes\.bin"):
        judge(tmp_path, files, "notes.bin")


def test_handler_code_is_text_of_bounded_size(tmp_path: Path) -> None:
    for code in (b"\xff\xfe", b"#" * (1024 * 1024 + 1)):
        files = bundles.plain_files() | {"handler.py": code}
        with pytest.raises(UnsafeBundleError, match=r"handler\.py"):
            judge(tmp_path, files, "handler.py", handler={"module": "handler.py", "class": "H"})
