"""Real workers of real torch zygotes: both file formats, dtypes, names, threads, memory, and what is refused."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.fakes import models, torch_models
from tests.fakes.daemon_side import WorkerProcess, ZygoteProcess
from tests.fakes.models import LINEAR_SIGNATURE, WEIGHTS

pytestmark = [pytest.mark.integration, *torch_models.needs_torch]
X = np.arange(8, dtype=np.float32).reshape(2, 4)
Y = X @ WEIGHTS


@pytest.fixture(scope="module")
def script() -> Iterator[ZygoteProcess]:
    process = ZygoteProcess("torch")
    assert process.first["op"] == "ready", process.first
    yield process
    process.close()


@pytest.fixture(scope="module")
def export() -> Iterator[ZygoteProcess]:
    process = ZygoteProcess("torch-export")
    assert process.first["op"] == "ready", process.first
    yield process
    process.close()


@pytest.fixture(params=["pt", "pt2"])
def kind(request: pytest.FixtureRequest) -> tuple[str, ZygoteProcess]:
    """A suffix and the zygote for it."""
    return request.param, request.getfixturevalue("script" if request.param == "pt" else "export")


def declared(inputs: dict[str, tuple[str, list[Any]]], outputs: dict[str, tuple[str, list[Any]]]) -> dict[str, Any]:
    """Return a signature: ``{name: (dtype, shape)}`` for each side."""
    sides = {"inputs": inputs, "outputs": outputs}
    return {
        side: [{"name": name, "dtype": dtype, "shape": shape} for name, (dtype, shape) in tensors.items()]
        for side, tensors in sides.items()
    }


def refusal(zygote: ZygoteProcess, spec: dict[str, Any]) -> dict[str, Any]:
    """Return the error that a worker sends instead of its hello."""
    worker = zygote.fork(spec)
    header = worker.receive().header
    worker.close()
    assert header["kind"] == "error", header
    return header


@pytest.mark.parametrize("threads", [1, 2])
def test_it_answers_in_the_full_sandbox_and_says_what_runs_it(
    kind: tuple[str, ZygoteProcess], torch_files: Path, tmp_path: Path, threads: int
) -> None:
    """Two threads too: a fork of a process that had run one operator would hang here."""
    suffix, zygote = kind
    spec = torch_models.bundle(tmp_path, torch_files / f"linear.{suffix}", LINEAR_SIGNATURE)
    worker = zygote.fork(spec | {"threads": {"intra": threads, "inter": 1}})
    hello = worker.hello()
    assert (hello["runtime"], hello["provider"], hello["device"]) == ("torch", "torch cpu", "cpu")
    assert hello["sandbox"]["level"] == "full"
    assert hello["memory"]["peak_bytes"] > 0
    big = np.random.default_rng(1).standard_normal((8, 4)).astype(np.float32)
    np.testing.assert_allclose(worker.infer({"x": X})["y"], Y, rtol=1e-5)
    np.testing.assert_allclose(worker.infer({"x": big})["y"], big @ WEIGHTS, rtol=1e-4, atol=1e-6)
    worker.close()


@pytest.mark.parametrize(
    ("file", "taken", "given"),
    [
        ("half", "float16", "float16"),
        ("half", "float32", "float32"),
        ("brain", "bfloat16", "float32"),
        ("brain", "float32", "float16"),
    ],
)
def test_narrow_floats_are_converted_to_and_from_what_is_declared(
    kind: tuple[str, ZygoteProcess], torch_files: Path, tmp_path: Path, file: str, taken: str, given: str
) -> None:
    suffix, zygote = kind
    signature = declared({"x": (taken, ["N", 4])}, {"y": (given, ["N", 3])})
    spec = torch_models.bundle(tmp_path, torch_files / f"{file}.{suffix}", signature)
    if suffix == "pt":  # which does not tell
        spec["session"] = {"floats": "float16" if file == "half" else "bfloat16"}
    worker = zygote.fork(spec)
    worker.hello()
    number = worker.next_id()
    sent = (X.view(np.uint32) >> 16).astype(np.uint16) if taken == "bfloat16" else X.astype(taken)
    body = sent.tobytes()
    entry = {"name": "x", "dtype": taken, "shape": [2, 4], "nbytes": len(body)}
    worker.send({"kind": "infer", "id": number, "tensors": [entry]}, [body])
    frame = worker.receive()
    assert frame.header["kind"] == "result", frame.header
    assert frame.header["tensors"][0]["dtype"] == given
    np.testing.assert_allclose(np.frombuffer(bytes(frame.body), given).reshape(2, 3), Y, rtol=0.02, atol=0.05)
    worker.close()


def test_inputs_go_by_name_numbers_are_read_and_a_map_names_the_outputs(
    script: ZygoteProcess, torch_files: Path, tmp_path: Path
) -> None:
    signature = declared({"factor": ("int64", []), "x": ("float32", ["N", 4])},
                         {"rows": ("float32", ["N"]), "y": ("float32", ["N", 4])})  # fmt: skip
    worker = script.fork(torch_models.bundle(tmp_path, torch_files / "mapped.pt", signature))
    worker.hello()
    for factor in (3, 2):
        found = worker.infer({"x": X, "factor": np.int64(factor)})
        np.testing.assert_array_equal(found["y"], factor * X)
        np.testing.assert_array_equal(found["rows"], (factor * X).sum(1))
    worker.close()


WRONG: dict[str, tuple[str, dict[str, Any], dict[str, Any], str]] = {
    "weights without a program": ("weights.pt", LINEAR_SIGNATURE, {}, "neither TorchScript nor"),
    "a model of another runtime": ("../bundle/fp32/model.onnx", LINEAR_SIGNATURE, {}, "not a file of torch"),
    "one input too many": (
        "linear.pt",
        declared({"x": ("float32", ["N", 4]), "z": ("float32", ["N"])}, {"y": ("float32", ["N", 3])}),
        {},
        "forward takes x; declared are x, z",
    ),
    "one output too many": (
        "linear.pt",
        declared({"x": ("float32", ["N", 4])}, {"y": ("float32", ["N", 3]), "z": ("float32", ["N"])}),
        {},
        "the model returned 1 outputs; declared are y, z",
    ),
    "another shape": (
        "linear.pt",
        declared({"x": ("float32", ["N", 4])}, {"y": ("float32", ["N", 7])}),
        {},
        "the model returned float32[1, 3], declared is float32[N, 7]",
    ),
    "an integer that is none": (
        "linear.pt",
        declared({"x": ("float32", ["N", 4])}, {"y": ("int64", ["N", 3])}),
        {},
        "the model returned float32[1, 3], declared is int64",
    ),
    "a text": ("linear.pt", models.TEXT_SIGNATURE, {}, "'x' is declared bytes, which torch has not"),
    "an output nobody can send": (
        "brain.pt",
        declared({"x": ("bfloat16", ["N", 4])}, {"y": ("bfloat16", ["N", 3])}),
        {},
        "declare it float32",
    ),
    "an option of another runtime": ("linear.pt", LINEAR_SIGNATURE, {"session": {"graph_opt": "all"}}, "graph_opt"),
    "an option that is no answer": (
        "linear.pt",
        LINEAR_SIGNATURE,
        {"session": {"freeze": 1}},
        "session.freeze: must be bool",
    ),
    "graphs of a CPU": ("linear.pt", LINEAR_SIGNATURE, {"session": {"cuda_graphs": True}}, "needs a CUDA device"),
    "a provider": ("linear.pt", LINEAR_SIGNATURE, {"providers": ["CPUExecutionProvider"]}, "torch has none"),
    "another device": ("linear.pt", LINEAR_SIGNATURE, {"device": {"kind": "npu", "index": 0}}, "does not run on 'npu'"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_cannot_be_served_fails_the_load_and_says_why(
    script: ZygoteProcess, torch_files: Path, tmp_path: Path, name: str
) -> None:
    file, signature, changes, words = WRONG[name]
    if file.startswith(".."):
        models.bundle(tmp_path, models.linear(), LINEAR_SIGNATURE)
        model = tmp_path / "bundle/fp32/model.onnx"
    else:
        model = torch_files / file
    header = refusal(script, torch_models.bundle(tmp_path, model, signature, **changes))
    assert header["code"] == ("selftest_failed" if "the model returned" in words else "unloadable")
    assert words in header["message"]


def test_an_exported_program_is_held_to_its_own_graph(export: ZygoteProcess, torch_files: Path, tmp_path: Path) -> None:
    narrow = declared({"x": ("float32", ["N", 5])}, {"y": ("float32", ["N", 3])})
    header = refusal(export, torch_models.bundle(tmp_path, torch_files / "linear.pt2", narrow))
    assert "'x' is declared float32[N, 5], the model has float32[s" in header["message"]
    integer = declared({"x": ("int64", ["N", 4])}, {"y": ("float32", ["N", 3])})
    assert "the model has float32" in refusal(
        export, torch_models.bundle(tmp_path, torch_files / "linear.pt2", integer)
    )["message"]  # fmt: skip


def test_a_size_the_program_was_not_made_for_is_the_callers_fault(
    export: ZygoteProcess, torch_files: Path, tmp_path: Path
) -> None:
    signature = LINEAR_SIGNATURE | {"dims": {"N": {"min": 1, "max": 100}}}
    spec = torch_models.bundle(tmp_path, torch_files / "linear.pt2", signature)
    worker = export.fork(spec | {"batching": {"axis": "N", "max_batch": 100, "max_delay_ms": 0}})
    worker.hello()
    worker.post({"x": np.ones((65, 4), np.float32)})
    header = worker.receive().header
    assert (header["code"], "64" in header["message"]) == ("invalid_input", True), header
    np.testing.assert_allclose(worker.infer({"x": X})["y"], Y, rtol=1e-5)
    worker.close()


def test_memory_that_does_not_suffice_is_an_error_of_its_request(
    script: ZygoteProcess, torch_files: Path, tmp_path: Path
) -> None:
    signature = declared({"count": ("int64", [])}, {"y": ("float32", [None])})
    spec = torch_models.bundle(tmp_path, torch_files / "greedy.pt", signature)
    worker = script.fork(spec | {"limits": {"memory_bytes": 6 << 30, "open_files": 64}})
    worker.hello()
    assert ask(worker, 2)["kind"] == "result"
    assert ask(worker, 16 << 10)["code"] == "out_of_memory"
    assert ask(worker, 2)["kind"] == "result"
    worker.close()


def ask(worker: WorkerProcess, count: int) -> dict[str, Any]:
    worker.post({"count": np.int64(count)})
    return worker.receive().header


def test_a_fork_computes_with_as_many_threads_as_it_is_told(
    script: ZygoteProcess, torch_files: Path, tmp_path: Path
) -> None:
    """Where the zygote has run an operator before, this hangs."""
    signature = declared({"count": ("int64", [])}, {"y": ("float32", [None])})
    found = {}
    for threads in (1, 2):
        spec = torch_models.bundle(tmp_path / str(threads), torch_files / "greedy.pt", signature)
        worker = script.fork(spec | {"threads": {"intra": threads, "inter": 1}})
        worker.hello()
        for _ in range(3):
            assert ask(worker, 8)["kind"] == "result"
        found[threads] = len(list(Path(f"/proc/{worker.pid}/task").iterdir()))
        worker.close()
    assert found[2] > found[1]


def test_cuda_without_a_device_says_so(script: ZygoteProcess, torch_files: Path, tmp_path: Path) -> None:
    if Path("/dev/nvidiactl").exists():
        pytest.skip("this box has a GPU")
    spec = torch_models.bundle(tmp_path, torch_files / "linear.pt", LINEAR_SIGNATURE)
    header = refusal(script, spec | {"device": {"kind": "cuda", "index": 0}})
    assert "CUDA cannot be used by this torch" in header["message"]
