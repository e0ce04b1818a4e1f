"""What ``pack`` refuses before any variant is tried: each case names its reason, and leaves no bundle."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import onnx
import pytest
from onnx import TensorProto, helper

from agent.errors import AgentError, UnsafeBundleError
from tests.fakes import bundles
from tests.fakes.hub import description, make_source
from tests.fakes.models import linear
from tools.hub.errors import SourceError
from tools.hub.pack import pack

pytestmark = pytest.mark.unit
GOLDEN = 'outputs = "golden/g1.out.safetensors"'


def write(path: str, data: bytes = b"text\n") -> Callable[[Path], None]:
    def change(source: Path) -> None:
        (source / path).parent.mkdir(parents=True, exist_ok=True)
        (source / path).write_bytes(data)

    return change


def replace(old: str, new: str) -> Callable[[Path], None]:
    def change(source: Path) -> None:
        description(source, old, new)

    return change


def both(*changes: Callable[[Path], None]) -> Callable[[Path], None]:
    def change(source: Path) -> None:
        for one in changes:
            one(source)

    return change


def shared(path: str, data: bytes = b"data") -> Callable[[Path], None]:
    return both(write(path, data), replace("seq = 1", f'seq = 1\nshared = ["{path}"]'))


def link(source: Path) -> None:
    os.symlink("/etc/passwd", source / "passwd.txt")


def save(model: bytes) -> Callable[[Path], None]:
    return write("fp32/model.onnx", model)


def signature(*, name: str = "x", dtype: str = "float32", shape: str = '["N", 4]') -> Callable[[Path], None]:
    text = (
        f'[signature]\ninputs = [{{ name = "{name}", dtype = "{dtype}", shape = {shape} }}]\n'
        'outputs = [{ name = "y", dtype = "float32", shape = ["N", 3] }]\n\n[[variants]]'
    )
    return replace("[[variants]]", text)


def requires(spec: str) -> Callable[[Path], None]:
    return replace("seq = 1", f'seq = 1\nrequires = {{ runtimes = [{{ name = "onnxruntime", spec = "{spec}" }}] }}')


def linear_of(*, opset: int = 17, ir_version: int = 10) -> bytes:
    model = linear()
    model.opset_import[0].version, model.ir_version = opset, ir_version
    data: bytes = model.SerializeToString()
    return data


def two_outputs() -> Callable[[Path], None]:
    """A second variant whose model has an output more than the first, from which the signature is read."""
    model = linear()
    model.graph.node.append(helper.make_node("Identity", ["y"], ["z"]))
    model.graph.output.append(helper.make_tensor_value_info("z", TensorProto.FLOAT, ["N", 3]))
    variant = '[[variants]]\nid = "b"\nentry = "b/model.onnx"\nprecision = "fp32"\npriority = 20\n\n[[golden]]'
    return both(write("b/model.onnx", model.SerializeToString()), replace("[[golden]]", variant))


HANDLER = 'handler = { id = "tensors/v1" }'
BAD: dict[str, tuple[Callable[[Path], None], type[AgentError], str]] = {
    "unknown key": (replace("seq = 1", "sequence = 1"), SourceError, "sequence"),
    "wrong type": (replace("priority = 10", 'priority = "ten"'), SourceError, "priority"),
    "not TOML": (write("model.toml", b"team = "), SourceError, "not TOML"),
    "no golden": (replace("[[golden]]", "[[ext.golden]]"), SourceError, "golden"),
    "team name": (replace('"vision"', '"../vision"'), UnsafeBundleError, "team"),
    "version": (replace('"1.0.0"', '"1.0"'), UnsafeBundleError, "version"),
    "variant id": (replace('"cpu-fp32"', '"CPU fp32"'), UnsafeBundleError, "variant"),
    "stray file": (write("notes.bin"), SourceError, "notes.bin"),
    "symbolic link": (link, SourceError, "not a plain file"),
    "missing model": (replace('"fp32/model.onnx"', '"fp16/model.onnx"'), SourceError, "fp16/model.onnx"),
    "missing sample": (replace("g1.out", "g2.out"), SourceError, "stray|does not say|missing"),
    "pickle by name": (shared("weights.pkl"), SourceError, "run code"),
    "torch file": (shared("weights.pth"), SourceError, "run code"),
    "pickle inside": (shared("table.json", b"\x80\x04\x95junk"), UnsafeBundleError, "pickle"),
    "file name": (shared("con.json"), UnsafeBundleError, "con"),
    "device's own name": (shared("manifest.json"), UnsafeBundleError, "manifest.json"),
    "model is no ONNX": (save(b"not a model at all"), UnsafeBundleError, "fp32/model.onnx"),
    "native operator": (save(bundles.operator_model("Relu", "com.evil")), UnsafeBundleError, "native library"),
    "data outside": (save(bundles.external_model("../../etc/passwd")), UnsafeBundleError, "beside the model"),
    "absolute data": (save(bundles.external_model("/etc/passwd")), UnsafeBundleError, "beside the model"),
    "data missing": (save(bundles.external_model("model.data")), SourceError, "fp32/model.data"),
    "data too short": (
        both(save(bundles.external_model("model.data")), write("fp32/model.data", b"short")),
        UnsafeBundleError,
        "model.data",
    ),
    "sample is no safetensors": (write("golden/g1.in.safetensors", b"x" * 64), UnsafeBundleError, "g1.in"),
    "unknown output": (replace('output = "y"', 'output = "z"'), UnsafeBundleError, "'z'"),
    "unknown variant": (
        replace(GOLDEN, GOLDEN + '\nper_variant = { gpu = [{ output = "y" }] }'), UnsafeBundleError, "gpu",
    ),
    "handler missing": (
        replace(HANDLER, 'handler = { module = "handler.py", class = "H" }'), SourceError, "handler.py",
    ),
    "handler without its class": (
        both(write("handler.py", b"class G: ...\n"),
             replace(HANDLER, 'handler = { module = "handler.py", class = "H" }')),
        SourceError,
        "no class 'H'",
    ),
    "handler is no Python": (
        both(write("handler.py", b"class H(:\n"), replace(HANDLER, 'handler = { module = "handler.py", class = "H" }')),
        SourceError,
        "not Python",
    ),
    "code that is no handler": (shared("helper.py", b"x = 1\n"), UnsafeBundleError, "helper.py"),
    "signature of another type": (signature(dtype="int32"), SourceError, "'x' is float32, the signature says int32"),
    "signature of another shape": (signature(shape='["N", 5]'), SourceError, "'x' has shape .*, the signature says"),
    "input that the model lacks": (signature(name="z"), SourceError, "has no input 'z'; it has x"),
    "output not in the signature": (two_outputs(), SourceError, "output 'z' is not in the signature"),
    "opset too new for what is allowed": (
        both(save(linear_of(opset=22)), requires(">=1.20,<2")), SourceError, "1.20 loads opset 21 at most",
    ),
    "IR version too new": (
        both(save(linear_of(ir_version=11)), requires(">=1.22")), SourceError, "1.22 loads IR version 10",
    ),
    "no provider": (
        replace("priority = 10", 'priority = 10\ndevice = { kind = "cuda" }'), SourceError, "providers is empty",
    ),
    "device not here": (
        replace("priority = 10", 'priority = 10\ndevice = { kind = "npu", providers = ["QNNExecutionProvider"] }'),
        SourceError,
        "QNNExecutionProvider",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_pack_refuses(case: str, tmp_path: Path) -> None:
    change, kind, words = BAD[case]
    source = make_source(tmp_path / "source")
    with pytest.raises(kind, match=words):
        _pack_changed(source, change, tmp_path / "bundle")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def _pack_changed(source: Path, change: Callable[[Path], None], out: Path) -> None:
    change(source)
    pack(source, description(source), out, now=1_000)


def test_pack_does_not_overwrite(tmp_path: Path) -> None:
    source = make_source(tmp_path / "source")
    (tmp_path / "bundle").mkdir()
    with pytest.raises(SourceError, match="exists already"):
        pack(source, description(source), tmp_path / "bundle", now=1_000)


def test_a_device_that_is_not_here_may_stay_untried_if_said_so(tmp_path: Path) -> None:
    source = make_source(tmp_path / "source")
    npu = 'priority = 10\ndevice = { kind = "npu", providers = ["QNNExecutionProvider"] }'
    packed = pack(
        source, description(source, "priority = 10", npu), tmp_path / "b", now=1_000, untried_allowed=["cpu-fp32"]
    )
    variant = packed.bundle.manifest.variants[0]
    assert (variant.memory.source, variant.perf.p50_ms) == ("estimated", 0.0)
    assert "QNNExecutionProvider" in packed.untried["cpu-fp32"]


def test_external_weights_and_documents_come_along_by_themselves(tmp_path: Path) -> None:
    source = make_source(tmp_path / "source")
    save(bundles.external_model("model.data", rows=16))(source)
    write("fp32/model.data", bytes(16 * 1024))(source)
    write("README.md")(source)
    write("LICENSE")(source)
    npu = 'priority = 10\ndevice = { kind = "npu", providers = ["QNNExecutionProvider"] }'
    packed = pack(
        source, description(source, "priority = 10", npu), tmp_path / "b", now=1_000, untried_allowed=["cpu-fp32"]
    )
    found = {file.path: (file.role, file.format) for file in packed.bundle.manifest.files}
    assert found["fp32/model.data"] == ("weights", "onnx-data")
    assert found["README.md"] == ("doc", "txt")
    assert found["LICENSE"] == ("license", "txt")
    assert "fp32/model.data" in packed.bundle.manifest.variants[0].files
    assert onnx.load(source / "fp32/model.onnx", load_external_data=False).graph.initializer[0].name == "w"
