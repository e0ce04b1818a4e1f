"""The manifest: what is read, what is refused, and that it survives being written."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import msgspec
import pytest

from agent.bundles.manifest import encode, parse_index, parse_manifest, parse_operators
from agent.errors import UnsafeBundleError
from tests.fakes import bundles

pytestmark = pytest.mark.unit

Value = dict[str, Any]
HANDLER = {"handler.py": b"class H: ..."}


def described(**files: bytes) -> Value:
    return bundles.describe(bundles.plain_files() | files)


def test_a_manifest_survives_encoding() -> None:
    manifest = bundles.manifest()
    assert parse_manifest(encode(manifest)) == manifest
    assert encode(parse_manifest(encode(manifest))) == encode(manifest)


def test_chunks_are_written_as_short_as_they_are() -> None:
    raw = msgspec.json.decode(encode(bundles.manifest()))
    assert all(len(chunk) == 2 for file in raw["files"] for chunk in file["chunks"])


def test_a_handler_in_the_bundle_is_named_by_module_and_class() -> None:
    value = bundles.describe(bundles.plain_files() | HANDLER, handler={"module": "handler.py", "class": "H"})
    manifest = parse_manifest(msgspec.json.encode(value))
    assert (manifest.handler.module, manifest.handler.class_name) == ("handler.py", "H")


def _set(path: str, value: Any) -> Callable[[Value], None]:
    """Return a change that puts ``value`` at ``path`` (keys and indexes joined by dots)."""

    def change(root: Value) -> None:
        *parents, last = path.split(".")
        target: Any = root
        for key in parents:
            target = target[int(key)] if isinstance(target, list) else target[key]
        if isinstance(target, list):
            target[int(last)] = value
        else:
            target[last] = value

    return change


REFUSED: dict[str, Callable[[Value], None]] = {
    "an unknown key": _set("surprise", 1),
    "an unknown key inside": _set("files.0.surprise", 1),
    "another schema": _set("schema", "edge-model-manifest/2"),
    "a path escape": _set("files.0.path", "../../etc/passwd"),
    "an absolute path": _set("files.0.path", "/etc/passwd"),
    "two files of one name": _set("files.1.path", "FP32/model.onnx"),
    "a float for a size": _set("files.0.size", 1.0),
    "a negative size": _set("files.0.size", -1),
    "a boolean for a number": _set("seq", True),
    "seq zero": _set("seq", 0),
    "a sum that does not hold": _set("total_size", 1),
    "a chunk sum that does not hold": _set("files.1.chunks.0.1", 1),
    "a chunk of no bytes": _set("files.1.chunks.0.1", 0),
    "a chunk above the cap": _set("files.1.chunks.0.1", 17 * 1024 * 1024),
    "a short hash": _set("files.0.sha256", "ab"),
    "an upper-case hash": _set("files.0.sha256", "A" * 64),
    "an unknown codec": _set("files.1.chunks.0", ["a" * 64, 5, "gzip", "a" * 64, 5]),
    "a stored size without codec": _set("files.1.chunks.0", ["a" * 64, 65536, "", "b" * 64, 5]),
    "no files": _set("files", []),
    "no variants": _set("variants", []),
    "two variants of one id": _set("variants.1.id", "cpu-fp32"),
    "a variant with a file that is not there": _set("variants.0.files", ["nowhere.onnx"]),
    "an entry that is not a model": _set("variants.0.entry", "fp32/model.onnx.data"),
    "a pickle by its name": _set("files.3.path", "weights.pkl"),
    "a state dict by its name": _set("files.3.path", "weights.pt"),
    "a NumPy file": _set("files.3.path", "weights.npy"),
    "a native library": _set("files.3.path", "op.so"),
    "a native format without trusted_native": _set("files.2.format", "torchscript"),
    "Python in another role": _set("files.3.format", "python"),
    "a handler without class": _set("handler", {"module": "handler.py"}),
    "a handler that is not in the bundle": _set("handler", {"module": "handler.py", "class": "H"}),
    "both kinds of handler": _set("handler", {"id": "tensors/v1", "module": "handler.py", "class": "H"}),
    "no handler": _set("handler", {}),
    "classes in another file": _set("classes.file", "fp32/model.onnx"),
    "golden inputs that are not golden": _set("golden.0.inputs", "classes.txt"),
    "golden without comparison": _set("golden.0.compare", []),
    "golden of an unknown output": _set("golden.0.compare.0.output", "z"),
    "golden of an unknown variant": _set("golden.0.per_variant", {"gpu": [{"output": "y"}]}),
    "golden that a variant always passes": _set("golden.0.per_variant", {"cpu-int8": []}),
    "a canary that shrinks": _set("rollout", {"canary": [50, 5]}),
    "a canary of nobody": _set("rollout", {"canary": [0]}),
    "more copies than requests": _set("rollout", {"shadow": 101}),
    "an agreement above all": _set("rollout", {"min_agreement": 1.5}),
    "a step without end": _set("rollout", {"step_s": 1e9}),
    "a warm-up of an unknown input": _set("warmup", {"shapes": [{"z": [1]}]}),
    "a warm-up with another rank": _set("warmup", {"shapes": [{"x": [1, 2, 3, 4, 5, 6, 7]}]}),
    "a warm-up with an empty dimension": _set("warmup", {"shapes": [{"x": [0, 0]}]}),
    "a batch above the cap": _set("batching", {"max_batch": 1_000_000}),
    "a version with build metadata": _set("version", "1.0.0+x"),
    "a team that is a path": _set("team", "../vision"),
}


@pytest.mark.parametrize("change", REFUSED.values(), ids=REFUSED.keys())
def test_a_manifest_is_refused_with(change: Callable[[Value], None]) -> None:
    value = copy.deepcopy(described())
    change(value)
    with pytest.raises(UnsafeBundleError):
        parse_manifest(msgspec.json.encode(value))


def test_too_many_files_are_refused_before_anything_is_allocated() -> None:
    value = described()
    value["files"] = [value["files"][3] | {"path": f"f{number}"} for number in range(4097)]
    with pytest.raises(UnsafeBundleError, match="4096"):
        parse_manifest(msgspec.json.encode(value))


def test_duplicate_keys_are_refused() -> None:
    data = msgspec.json.encode(described())
    with pytest.raises(UnsafeBundleError, match="twice"):
        parse_manifest(data[:-1] + b',"seq":2}')


def test_unknown_keys_are_welcome_under_ext() -> None:
    value = described() | {"ext": {"anything": {"goes": [1]}}}
    assert parse_manifest(msgspec.json.encode(value)).ext == {"anything": {"goes": [1]}}


INDEX: Value = {
    "schema": "edge-model-index/1",
    "team": "vision",
    "name": "tiny",
    "generated": "",
    "channels": {"stable": "1.0.0"},
    "versions": [{"version": "1.0.0", "seq": 1, "manifest_sha256": "a" * 64, "bytes": 1, "created": ""}],
}


def test_an_index_survives_encoding() -> None:
    index = parse_index(msgspec.json.encode(INDEX))
    assert parse_index(encode(index)) == index


@pytest.mark.parametrize(
    "change",
    [
        _set("channels.stable", "2.0.0"),
        _set("channels", {"../x": "1.0.0"}),
        _set("versions.0.status", "maybe"),
        _set("versions", [INDEX["versions"][0]] * 2),
        _set("versions.0.manifest_sha256", "zz"),
    ],
)
def test_an_inconsistent_index_is_refused(change: Callable[[Value], None]) -> None:
    value = copy.deepcopy(INDEX)
    change(value)
    with pytest.raises(UnsafeBundleError):
        parse_index(msgspec.json.encode(value))


def test_operators_with_one_key_twice_are_refused() -> None:
    key = {"keyid": "a", "keytype": "ed25519", "scheme": "ed25519", "keyval": {"public": "00"}}
    with pytest.raises(UnsafeBundleError):
        parse_operators(msgspec.json.encode({"schema": "inferd-operators/1", "tenant": "t", "keys": [key, key]}))
