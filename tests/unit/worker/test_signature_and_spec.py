"""What a worker is told and what a request must be."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgpack
import pytest

from agent.errors import AgentError, LoadError, TensorError, UnsafeBundleError
from agent.worker import signature
from agent.worker import spec as specs
from agent.worker.signature import Signature, TensorSpec

TWO = {
    "inputs": [
        {"name": "ids", "dtype": "int64", "shape": ["N", "T"]},
        {"name": "mask", "dtype": "int64", "shape": ["N", "T"]},
    ],
    "outputs": [{"name": "y", "dtype": "float32", "shape": ["N", None, 3]}],
    "dims": {"T": {"min": 2, "max": 16}},
}


def parse(raw: Any = TWO, axis: str | None = "N", rows_max: int = 4) -> Signature:
    return signature.parse(raw, batch_axis=axis, rows_max=rows_max)


def rows(made: Signature, **shapes: tuple[int, ...]) -> int:
    sizes: dict[str, int] = {}
    for name, shape in shapes.items():
        made.check(name, "int64", shape, sizes)
    return made.rows(len(shapes), sizes)


def test_rows_are_the_batch_axis() -> None:
    assert rows(parse(), ids=(3, 5), mask=(3, 5)) == 3


@pytest.mark.parametrize(
    ("shapes", "words"),
    [
        ({"ids": (3, 5), "mask": (2, 5)}, "input 'mask': dimension N is 2, in another input 3"),
        ({"ids": (3, 5), "mask": (3, 4)}, "input 'mask': dimension T is 4, in another input 5"),
        ({"ids": (3, 1), "mask": (3, 1)}, "dimension T is 1, allowed are 2 to 16"),
        ({"ids": (5, 2), "mask": (5, 2)}, "dimension N is 5, allowed are 1 to 4"),
        ({"ids": (3, 5)}, "1 inputs given; the model takes 'ids' int64[N, T], 'mask' int64[N, T]"),
        ({"ids": (3,), "mask": (3,)}, "1 dimensions, expected int64[N, T]"),
    ],
)
def test_named_dimensions_agree_and_stay_in_bounds(shapes: dict[str, Any], words: str) -> None:
    with pytest.raises(TensorError) as caught:
        rows(parse(), **shapes)
    assert words in str(caught.value)


def test_requests_stack_only_if_their_other_dimensions_agree() -> None:
    made = parse()

    def key(width: int) -> Any:
        return made.key({"ids": (1, width), "mask": (1, width)})

    assert key(3) == key(3) != key(4)


def test_with_fixed_shapes_everything_stacks_and_without_an_axis_nothing() -> None:
    fixed = {
        "inputs": [{"name": "x", "dtype": "float32", "shape": ["N", 4]}],
        "outputs": [{"name": "y", "dtype": "float32", "shape": ["N"]}],
    }
    assert parse(fixed).key({"x": (1, 4)}) == parse(fixed).key({"x": (3, 4)})
    alone = parse(fixed, axis=None)
    assert alone.rows_max == 1


def test_an_output_without_the_axis_means_no_stacking() -> None:
    raw = {
        "inputs": [{"name": "x", "dtype": "float32", "shape": ["N", 4]}],
        "outputs": [{"name": "y", "dtype": "float32", "shape": [2, "N"]}],
    }
    made = parse(raw)
    assert (made.batch_axis, made.rows_max) == (None, 1)
    sizes: dict[str, int] = {}
    made.check("x", "float32", (7, 4), sizes)
    assert made.rows(1, sizes) == 1  # seven rows of one request are its own affair


@pytest.mark.parametrize(
    "raw",
    [
        {},
        {"inputs": [], "outputs": []},
        {"inputs": [{"name": "x", "dtype": "float99", "shape": []}], "outputs": TWO["outputs"]},
        {"inputs": [{"name": 1, "dtype": "int64", "shape": []}], "outputs": TWO["outputs"]},
        {"inputs": [{"name": "x", "dtype": "int64", "shape": [1.5]}], "outputs": TWO["outputs"]},
        {"inputs": [{"name": "x", "dtype": "int64", "shape": [-1]}], "outputs": TWO["outputs"]},
        {"inputs": [{"name": "x", "dtype": "int64", "shape": [-2]}], "outputs": TWO["outputs"]},
        {"inputs": ["x"], "outputs": TWO["outputs"]},
        {"inputs": TWO["inputs"] * 2, "outputs": TWO["outputs"]},
        TWO | {"dims": {"T": {"min": 3, "max": 2}}},
        TWO | {"dims": {"T": {"min": "a"}}},
        TWO | {"dims": {"T": 3}},
    ],
)
def test_malformed_signatures_fail_the_load(raw: Any) -> None:
    with pytest.raises(LoadError, match=r"signature\."):
        parse(raw)


@pytest.mark.parametrize(
    ("found", "words"),
    [
        (TensorSpec("x", "float32", (None, 4)), ""),
        (TensorSpec("x", "float32", ("batch", 4)), ""),
        (TensorSpec("x", "float32", ("batch", "width")), ""),
        (TensorSpec("x", "float32", (1, 4)), "declared float32[N, 4], the model has float32[1, 4]"),
        (TensorSpec("x", "float32", ("batch", 5)), "the model has float32[batch, 5]"),
        (TensorSpec("x", "float32", ("batch",)), "the model has"),
        (TensorSpec("x", "float64", ("batch", 4)), "the model has float64"),
        (TensorSpec("q", "float32", ("batch", 4)), "declared 'x'; the model has 'q'"),
    ],
)
def test_the_model_file_must_keep_the_manifests_promise(found: TensorSpec, words: str) -> None:
    declared = [TensorSpec("x", "float32", ("N", 4))]
    if not words:
        signature.check_model(declared, [found], "inputs")
        return
    with pytest.raises(LoadError) as caught:
        signature.check_model(declared, [found], "inputs")
    assert words in str(caught.value)


MINIMAL: dict[str, Any] = {
    "model": "m",
    "version": "1",
    "variant": "v",
    "runtime": "onnxruntime",
    "providers": ["CPUExecutionProvider"],
    "bundle_dir": "/b",
    "entry": "m.onnx",
    "signature": {},
    "scratch_dir": "/s",
}


def test_a_minimal_spec_has_safe_defaults() -> None:
    made = specs.parse(msgpack.packb(MINIMAL))
    assert made.sandbox == "enforce"
    assert (made.batch_rows_max, made.batch_delay_s, made.threads_intra, made.memory_bytes) == (1, 0.0, 1, 0)
    assert made.device_name == "cpu"


def test_a_cuda_device_is_named_with_its_index() -> None:
    assert specs.parse(msgpack.packb(MINIMAL | {"device": {"kind": "cuda", "index": 1}})).device_name == "cuda:1"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"model": 1}, "spec.model must be str"),
        ({"providers": "CPU"}, "spec.providers"),
        ({"providers": [1]}, "spec.providers"),
        ({"bundle_dir": "relative"}, "spec.bundle_dir must be an absolute path"),
        ({"sandbox": "off"}, "enforce, best_effort"),
        ({"batching": []}, "spec.batching must be dict"),
        ({"batching": {"max_batch": "8"}}, "batching.max_batch"),
        ({"batching": {"max_delay_ms": -1}}, "batching.max_delay_ms"),
        ({"threads": {"intra": 0}}, "threads.intra"),
        ({"limits": {"memory_bytes": True}}, "limits.memory_bytes"),
        ({"limits": {"open_files": 1}}, "limits.open_files"),
        ({"golden": [1]}, "golden must be a map"),
        ({"warmup": {"runs": 1e9}}, "warmup.runs"),
        ({"cores": [0, -1]}, "spec.cores must be a list of integers from 0"),
        ({"cores": [True]}, "spec.cores must be a list of integers from 0"),
        ({"cores": "0"}, "spec.cores must be list"),
        ({"share_weights": 1}, "spec.share_weights must be bool"),
    ],
)
def test_bad_fields_are_named(change: dict[str, Any], words: str) -> None:
    with pytest.raises(AgentError) as caught:
        specs.parse(msgpack.packb(MINIMAL | change))
    assert words in str(caught.value)


@pytest.mark.parametrize("packed", [b"", b"\xc1", b"\x01", msgpack.packb(None)])
def test_bytes_that_are_no_map_are_refused(packed: bytes) -> None:
    with pytest.raises(LoadError):
        specs.parse(packed)


@pytest.mark.parametrize("relative", ["", "/etc/passwd", "../x", "a/../../x", "a\0b", "out/x", "out"])
def test_paths_stay_inside_the_bundle(tmp_path: Path, relative: str) -> None:
    (tmp_path / "bundle").mkdir()
    (tmp_path / "bundle" / "out").symlink_to(tmp_path)
    with pytest.raises(UnsafeBundleError):
        specs.inside(tmp_path / "bundle", relative)


def test_a_plain_path_is_resolved(tmp_path: Path) -> None:
    assert specs.inside(tmp_path, "a/b.onnx") == tmp_path.resolve() / "a" / "b.onnx"
