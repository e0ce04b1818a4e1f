"""Files made to be read in two ways, to lead out of the bundle, or to cost more memory than they have bytes."""

from __future__ import annotations

import contextlib
import copy
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper

from agent.bundles import names, onnx_file, safetensors, strictjson
from agent.bundles.content import check_content
from agent.bundles.manifest import parse_index, parse_manifest
from agent.errors import UnsafeBundleError
from tests.fakes import bundles

pytestmark = pytest.mark.unit

MIB = 1024 * 1024


def judge(folder: Path, data: bytes, path: str = "fp32/model.onnx") -> None:
    """Check ``data`` as the file ``path`` of an otherwise good bundle."""
    files = bundles.plain_files(rows=16)
    manifest = parse_manifest(msgspec.json.encode(bundles.describe(files | {path: data})))
    target = folder / "file"
    target.write_bytes(data)
    check_content(target, manifest.file(path), manifest, {item.path for item in manifest.files})


@contextmanager
def bounded(size: int) -> Iterator[None]:
    """Fail if the process grows by more than ``size`` bytes at any time in the block."""
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins here
    before = memory("VmRSS")
    yield
    grown = memory("VmHWM") - before
    assert grown < size, f"{grown} bytes"


def memory(name: str) -> int:
    """Return a line of this process's memory status in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))


def varint(value: int) -> bytes:
    """Return ``value`` as protobuf writes it."""
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes(out) + bytes([value])


def field(number: int, data: bytes) -> bytes:
    """Return a length-delimited field."""
    return varint(number << 3 | 2) + varint(len(data)) + data


def external(**entries: str) -> TensorProto:
    """Return a tensor kept in another file."""
    tensor = TensorProto(name="t", data_type=TensorProto.FLOAT, dims=[1], data_location=TensorProto.EXTERNAL)
    for key, value in entries.items():
        tensor.external_data.add(key=key, value=value)
    return tensor


def escaping() -> TensorProto:
    return external(location="/etc/shadow")


def relu(*, domain: str = "") -> onnx.ModelProto:
    return onnx.ModelProto.FromString(bundles.operator_model("Relu", domain))


# ONNX: wherever a tensor can stand


def in_attribute_list(model: onnx.ModelProto) -> None:
    model.graph.node[0].attribute.append(helper.make_attribute("values", [escaping()]))


def in_graph_list(model: onnx.ModelProto) -> None:
    inner = helper.make_graph([], "inner", [], [], [escaping()])
    model.graph.node[0].attribute.append(helper.make_attribute("bodies", [inner]))


def in_sparse_indices(model: onnx.ModelProto) -> None:
    model.graph.sparse_initializer.add().indices.CopyFrom(escaping())


def in_sparse_attribute(model: onnx.ModelProto) -> None:
    attribute = model.graph.node[0].attribute.add(name="s", type=onnx.AttributeProto.SPARSE_TENSOR)
    attribute.sparse_tensor.values.CopyFrom(escaping())


def in_sparse_attribute_list(model: onnx.ModelProto) -> None:
    attribute = model.graph.node[0].attribute.add(name="s", type=onnx.AttributeProto.SPARSE_TENSORS)
    attribute.sparse_tensors.add().values.CopyFrom(escaping())


def in_function_default(model: onnx.ModelProto) -> None:
    function = model.functions.add(name="f", domain="d")
    function.attribute_proto.append(helper.make_attribute("value", escaping()))


def in_function_subgraph(model: onnx.ModelProto) -> None:
    inner = helper.make_graph([], "inner", [], [], [escaping()])
    function = model.functions.add(name="f", domain="d")
    function.node.append(helper.make_node("If", ["c"], ["y"], then_branch=inner))


def in_training_start(model: onnx.ModelProto) -> None:
    model.training_info.add().initialization.CopyFrom(helper.make_graph([], "i", [], [], [escaping()]))


def in_quantised_constant(model: onnx.ModelProto) -> None:
    model.graph.node.append(helper.make_node("Constant", [], ["c"], value=escaping()))


PLACES = (
    in_attribute_list, in_graph_list, in_sparse_indices, in_sparse_attribute, in_sparse_attribute_list,
    in_function_default, in_function_subgraph, in_training_start, in_quantised_constant,
)  # fmt: skip


@pytest.mark.parametrize("place", PLACES)
def test_external_data_is_judged_wherever_it_stands(tmp_path: Path, place: Callable[[onnx.ModelProto], None]) -> None:
    model = relu()
    place(model)
    with pytest.raises(UnsafeBundleError, match="external data"):
        judge(tmp_path, model.SerializeToString())


@pytest.mark.parametrize(
    "tensor",
    [
        external(location="*/_ORT_MEM_ADDR_/*", offset="140000000000000", length="4"),
        external(location="model.onnx.data", offset="-4", length="4"),
        external(location="model.onnx.data", offset="0", length="0x10"),
        external(location="model.onnx.data", offset="16384", length="4"),
        external(location="model.onnx.data", offset="99999999999999999999"),
        external(location="model.onnx.data", offset="4", length="16384"),
        external(location="model.onnx.data", prepacked_0="w|0;999999999"),
        external(location="model.onnx.data", basepath="/etc"),
        external(location="model.onnx.data\x00/etc/passwd"),
        external(location="MODEL.ONNX.DATA"),
        external(location="model.onnx"),
        external(location="fp32/model.onnx.data"),
        external(offset="0"),
        TensorProto(name="t", data_location=TensorProto.EXTERNAL),
    ],
    ids=repr,
)
def test_external_data_is_a_range_of_a_weights_file_and_nothing_else(tmp_path: Path, tensor: TensorProto) -> None:
    model = relu()
    model.graph.initializer.append(tensor)
    with pytest.raises(UnsafeBundleError):
        judge(tmp_path, model.SerializeToString())


def test_a_location_without_the_external_mark_is_judged_as_well(tmp_path: Path) -> None:
    tensor = escaping()
    tensor.data_location = TensorProto.DEFAULT
    model = relu()
    model.graph.initializer.append(tensor)
    with pytest.raises(UnsafeBundleError, match="external data"):
        judge(tmp_path, model.SerializeToString())


def test_a_field_that_another_reader_takes_for_the_graph_is_refused(tmp_path: Path) -> None:
    """In its lower 32 bits this tag means field 7, the graph."""
    hidden = helper.make_graph([], "hidden", [], [], [escaping()]).SerializeToString()
    tag = varint(7 << 3 | 2 | 1 << 32)
    with pytest.raises(UnsafeBundleError, match="field number"):
        judge(tmp_path, relu().SerializeToString() + tag + varint(len(hidden)) + hidden)


def test_two_graphs_which_readers_merge_are_both_judged(tmp_path: Path) -> None:
    second = helper.make_graph([], "second", [], [], [escaping()]).SerializeToString()
    with pytest.raises(UnsafeBundleError, match="external data"):
        judge(tmp_path, relu().SerializeToString() + field(7, second))


def test_a_model_that_the_runtime_takes_for_its_own_format_is_refused(tmp_path: Path) -> None:
    """Good protobuf, and ``ORTM`` in bytes 4 to 8: given such bytes, ONNX Runtime reads them as a flat buffer."""
    model = relu()
    model.ClearField("ir_version")
    data = b"\x08\x0a" + field(2, b"ORTM") + model.SerializeToString()
    assert onnx_file.inspect(memoryview(data)).graphs == 1
    with pytest.raises(UnsafeBundleError, match="own format"):
        judge(tmp_path, data)


@pytest.mark.parametrize(
    ("op", "domain"),
    [
        ("Any", "ai.onnx.contrib"),  # onnxruntime-extensions: a native library
        ("aten", "org.pytorch.aten"),
        ("PythonOp", "com.microsoft"),
        ("PythonOpGrad", "com.microsoft"),
        ("EPContext", "com.microsoft"),
        ("EPContext", ""),
        ("TRT", "trt.plugins"),
        ("Relu", "AI.ONNX"),
        ("Relu", "ai.onnx\x00"),
        ("Relu", " "),
    ],
)
def test_operators_beyond_the_runtime_are_refused(tmp_path: Path, op: str, domain: str) -> None:
    with pytest.raises(UnsafeBundleError):
        judge(tmp_path, bundles.operator_model(op, domain))


def test_a_function_of_the_model_vouches_for_itself_only(tmp_path: Path) -> None:
    model = onnx.ModelProto.FromString(bundles.operator_model("Backdoor", "my.functions"))
    model.functions.add(name="Harmless", domain="my.functions")
    with pytest.raises(UnsafeBundleError, match="native library"):
        judge(tmp_path, model.SerializeToString())


def test_an_operator_inside_a_function_is_judged(tmp_path: Path) -> None:
    model = onnx.ModelProto.FromString(bundles.operator_model("Mine", "my.functions"))
    function = model.functions.add(name="Mine", domain="my.functions")
    function.node.append(helper.make_node("Backdoor", ["x"], ["y"], domain="evil.corp"))
    with pytest.raises(UnsafeBundleError, match=r"evil\.corp"):
        judge(tmp_path, model.SerializeToString())


# Names, JSON, safetensors, disguises


@pytest.mark.parametrize("path", ["manifest.json/x.onnx", "Verified.JSON/x", "MANIFEST.json"])
def test_nothing_may_stand_where_the_box_writes_its_own_files(path: str) -> None:
    with pytest.raises(UnsafeBundleError, match="belongs to the device"):
        names.check_path(path)


@pytest.mark.parametrize(
    "path", ["cafe\u0301.onnx", "caf\u00e9.onnx", "\uff0e\uff0e/x", "mode\u200bl.onnx", "\u017f.onnx", "\u212a.onnx"]
)
def test_letters_that_only_look_plain_are_refused(path: str) -> None:
    with pytest.raises(UnsafeBundleError):
        names.check_path(path)


@pytest.mark.parametrize("text", [r'"\ud800"', r'"\uDC00\ud800"', r'{"\ud83d": 1}', r'["a", {"b": "x\udfff"}]'])
def test_half_a_surrogate_pair_is_refused(text: str) -> None:
    with pytest.raises(UnsafeBundleError, match="thing"):
        strictjson.loads(text.encode(), what="thing")


def test_a_whole_surrogate_pair_is_one_character() -> None:
    assert strictjson.loads(rb'"\ud83d\ude00"', what="thing") == "\U0001f600"


def header(text: str, data: bytes = b"") -> memoryview:
    raw = text.encode()
    return memoryview(len(raw).to_bytes(8, "little") + raw + data)


def entry(shape: str, begin: int, end: int, dtype: str = "U8") -> str:
    return f'{{"dtype":"{dtype}","shape":{shape},"data_offsets":[{begin},{end}]}}'


@pytest.mark.parametrize(
    ("text", "size"),
    [
        (f'{{"a":{entry("[4]", 0, 4)},"a":{entry("[4]", 0, 4)}}}', 4),  # a name twice
        (f'{{"a":{entry("[4]", 0, 4)},"b":{entry("[4]", 6, 10)}}}', 10),  # a hole
        (f'{{"a":{entry("[4]", 0, 4)},"b":{entry("[4]", 2, 6)}}}', 6),  # an overlap
        (f'{{"a":{entry("[4]", 0, 4)},"b":{entry("[4]", 0, 4)}}}', 4),  # the same bytes twice
        (f'{{"a":{entry("[4]", 0, 4)}}}', 5),  # bytes that belong to nobody
        (f'{{"a":{entry("[8]", 0, 8)}}}', 4),  # more than there is
        (f'{{"a":{entry("[4]", 4, 0)}}}', 4),  # backwards
        (f'{{"a":{entry("[4294967296,4294967296]", 0, 0)}}}', 0),  # 2**64 elements, which wrap to none
        (f'{{"a":{entry("[9007199254740992,2048]", 0, 0, "F32")}}}', 0),
        (f'{{"a":{entry("[-1,-4]", 0, 4)}}}', 4),
        (f'{{"a":{entry("[true,4]", 0, 4)}}}', 4),
        (f'{{"a":{entry("[4.0]", 0, 4)}}}', 4),
        (f'{{"a":{entry("[2]", 0, 4, "F16x")}}}', 4),
        ('{"__metadata__":{"x":1}}', 0),
        ('{"__metadata__":[]}', 0),
        ('{"a":{"dtype":"U8","shape":[[4]],"data_offsets":[0,4]}}', 4),
        ('{"a":{"dtype":"U8","shape":[4],"data_offsets":[0,4],"device":"x"}}', 4),
    ],
)
def test_a_safetensors_header_has_one_reading(text: str, size: int) -> None:
    with pytest.raises(UnsafeBundleError):
        safetensors.check(header(text, bytes(size)))


@pytest.mark.parametrize("head", [b"BZh9", b"\xfd7zXZ\x00", b"7z\xbc\xaf\x27\x1c", b"\x28\xb5\x2f\xfd", b"PK\x05\x06"])
def test_archives_under_a_harmless_name_are_recognised(tmp_path: Path, head: bytes) -> None:
    with pytest.raises(UnsafeBundleError, match="archive"):
        judge(tmp_path, head + b"x" * 32, "notes.bin")


# Small files that would grow


def many_entries() -> bytes:
    return field(7, field(5, field(13, b"") * MIB))


def many_external_tensors() -> bytes:
    tensor = field(5, field(13, field(1, b"location") + field(2, b"w")))
    return field(7, tensor * (onnx_file.FOUND_MAX + 1))


def many_operators() -> bytes:
    nodes = b"".join(field(1, field(4, b"%x" % number)) for number in range(onnx_file.FOUND_MAX + 1))
    return field(7, nodes)


@pytest.mark.parametrize("make", [many_entries, many_external_tensors, many_operators])
def test_an_onnx_file_does_not_grow_in_memory(make: Callable[[], bytes]) -> None:
    data = memoryview(make())
    with bounded(128 * MIB), pytest.raises(UnsafeBundleError, match="more"):
        onnx_file.inspect(data)


@pytest.mark.parametrize("piece", ['"{}":{{}},', '"{}":[],', '"{}":0,'])
def test_a_safetensors_header_does_not_grow_in_memory(piece: str) -> None:
    body = "".join(piece.format(f"{number:x}") for number in range(900_000))
    data = header(f"{{{body[:-1]}}}")
    with bounded(48 * MIB), pytest.raises(UnsafeBundleError):
        safetensors.check(data)


# Anything at all: refused or read, never another error

SETTINGS = settings(max_examples=100, deadline=None)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=12),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Yield the path of everything in a JSON value."""
    yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield from places(inner, (*path, key))


MANIFEST = bundles.describe(bundles.plain_files(rows=16))
PLACES_OF_MANIFEST = list(places(MANIFEST))[1:]


@SETTINGS
@given(st.lists(st.tuples(st.sampled_from(PLACES_OF_MANIFEST), JSON), min_size=1, max_size=3))
def test_a_manifest_with_anything_in_any_place_never_crashes(changes: list[tuple[tuple[Any, ...], Any]]) -> None:
    value = copy.deepcopy(MANIFEST)
    for path, replacement in changes:
        with contextlib.suppress(KeyError, IndexError, TypeError):
            target: Any = value
            for key in path[:-1]:
                target = target[key]
            target[path[-1]] = replacement
    with contextlib.suppress(UnsafeBundleError):
        parse_manifest(json.dumps(value).encode())


@SETTINGS
@given(st.binary(max_size=300) | JSON.map(lambda value: json.dumps(value).encode()))
def test_any_bytes_as_manifest_index_or_header_never_crash(data: bytes) -> None:
    for parse in (parse_manifest, parse_index):
        with contextlib.suppress(UnsafeBundleError):
            parse(data)
    with contextlib.suppress(UnsafeBundleError):
        safetensors.check(memoryview(len(data).to_bytes(8, "little") + data))


FIELDS = st.recursive(
    st.binary(max_size=12),
    lambda inner: st.lists(
        st.tuples(st.sampled_from([1, 2, 4, 5, 6, 7, 10, 11, 13, 14, 15, 20, 22, 23, 25, 1 << 29]), inner), max_size=4
    ).map(lambda found: b"".join(field(number, data) for number, data in found)),
    max_leaves=20,
)


@SETTINGS
@given(FIELDS)
def test_any_protobuf_never_crashes(data: bytes) -> None:
    with contextlib.suppress(UnsafeBundleError):
        onnx_file.inspect(memoryview(data))


@SETTINGS
@given(st.lists(st.tuples(st.integers(0, 1 << 20), st.binary(min_size=1, max_size=6)), min_size=1, max_size=6))
def test_a_damaged_file_is_refused_or_read(edits: list[tuple[int, bytes]]) -> None:
    good = bundles.plain_files(rows=16)
    for path, check in (
        ("fp32/model.onnx", lambda data: onnx_file.inspect(data)),
        ("golden/g1.in.safetensors", lambda data: safetensors.check(data)),
    ):
        data = bytearray(good[path])
        for position, replacement in edits:
            start = position % len(data)
            data[start : start + len(replacement)] = replacement
        with contextlib.suppress(UnsafeBundleError):
            check(memoryview(bytes(data)))
