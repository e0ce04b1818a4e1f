"""A real zygote and its workers over real sockets, driven by an independent reading of the protocol."""

from __future__ import annotations

import json
import os
import signal
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgpack
import numpy as np
import onnxruntime
import pytest

from tests.fakes import models
from tests.fakes.daemon_side import WorkerProcess, ZygoteProcess, wait_until
from tests.models import write_thinning_model

pytestmark = pytest.mark.integration
X = np.arange(8, dtype=np.float32).reshape(2, 4)


@pytest.fixture(scope="module")
def zygote() -> Iterator[ZygoteProcess]:
    process = ZygoteProcess()
    yield process
    process.close()


@pytest.fixture
def spec(tmp_path: Path) -> dict[str, Any]:
    return models.bundle(tmp_path, models.linear(), models.LINEAR_SIGNATURE)


@pytest.fixture
def worker(zygote: ZygoteProcess, spec: dict[str, Any]) -> Iterator[WorkerProcess]:
    process = zygote.fork(spec)
    process.hello()
    yield process
    process.close()


def failure(zygote: ZygoteProcess, spec: dict[str, Any]) -> dict[str, Any]:
    """Start a worker that must fail; return its error header after it left with code 1."""
    process = zygote.fork(spec)
    header = process.receive().header
    assert header["kind"] == "error", header
    assert zygote.exit_of(process.pid) == {"op": "exited", "pid": process.pid, "code": 1, "signal": None}
    process.close()
    return header


# the zygote


def test_zygote_says_what_it_imported(zygote: ZygoteProcess) -> None:
    assert zygote.first["op"] == "ready"
    assert zygote.first["runtime"] == "onnx"
    assert zygote.first["pid"] == zygote.process.pid
    assert zygote.first["version"][0].isdigit()


def test_zygote_has_one_thread(zygote: ZygoteProcess) -> None:
    assert len(os.listdir(f"/proc/{zygote.process.pid}/task")) == 1


def test_zygote_and_workers_do_not_show_the_environment_they_came_from() -> None:
    process = ZygoteProcess(SECRET_TOKEN="hidden-value")
    environment = Path(f"/proc/{process.process.pid}/environ").read_bytes()
    process.close()
    assert b"hidden-value" not in environment


def test_unknown_runtime_is_reported_and_ends_the_zygote() -> None:
    process = ZygoteProcess("abacus")
    process.process.wait(30)
    process.control.close()
    assert process.first["op"] == "failed"
    assert "abacus" in process.first["message"]
    assert process.process.returncode == 1


@pytest.mark.parametrize(
    "order",
    [
        b"\xc1",
        msgpack.packb([1]),
        msgpack.packb({"op": "fork", "token": 3, "spec_len": 9}),
        msgpack.packb({"op": "no"}),
    ],
)
def test_malformed_orders_are_refused_and_the_zygote_lives(zygote: ZygoteProcess, order: bytes) -> None:
    answer, descriptors = zygote.order(order)
    assert answer["op"] == "fork_failed"
    assert not descriptors
    assert zygote.process.poll() is None


def test_zygote_ignores_the_terminal_and_leaves_when_its_control_closes() -> None:
    process = ZygoteProcess()
    process.process.send_signal(signal.SIGINT)
    process.process.send_signal(signal.SIGTERM)
    answer, _ = process.order({"op": "no"})
    assert answer["op"] == "fork_failed"
    process.close()
    assert process.process.returncode == 0


def test_workers_outlive_their_zygote(spec: dict[str, Any]) -> None:
    process = ZygoteProcess()
    worker = process.fork(spec)
    worker.hello()
    process.process.kill()
    process.process.wait()
    assert worker.infer({"x": X})["y"].shape == (2, 3)
    worker.channel.close()
    worker.wait_gone()
    os.close(worker.pidfd)
    process.control.close()


# life and death of a worker


def test_hello_describes_the_worker(zygote: ZygoteProcess, spec: dict[str, Any]) -> None:
    models.golden(spec, {"y": X @ models.WEIGHTS}, {"x": X}, [{"output": "y", "metric": "allclose", "rtol": 1e-4}])
    process = zygote.fork(spec)
    hello = process.hello()
    process.close()
    assert hello["worker"] is True
    assert hello["pid"] == process.pid
    assert (hello["variant"], hello["precision"], hello["device"]) == ("cpu-fp32", "fp32", "cpu")
    assert hello["provider"] == "CPUExecutionProvider"
    assert hello["signature"]["inputs"] == [{"name": "x", "dtype": "float32", "shape": ["N", 4]}]
    assert hello["max_batch"] == 8
    assert hello["idempotent"] is True
    assert hello["golden"][0]["id"] == "g1"
    assert hello["golden"][0]["ok"] is True
    assert hello["memory"]["rss_bytes"] > 1 << 20
    assert set(hello) >= {"load_ms", "warmup_ms", "sandbox", "runtime"}


def test_kill_is_reported_with_its_signal(zygote: ZygoteProcess, spec: dict[str, Any]) -> None:
    process = zygote.fork(spec)
    process.hello()
    process.kill()
    process.wait_gone()
    assert zygote.exit_of(process.pid) == {"op": "exited", "pid": process.pid, "code": None, "signal": 9}
    process.close()


def test_closing_the_channel_answers_what_was_sent_and_leaves_with_zero(
    zygote: ZygoteProcess, spec: dict[str, Any]
) -> None:
    process = zygote.fork(spec)
    process.hello()
    sent = {process.post({"x": X}) for _ in range(20)}
    process.channel.shutdown(socket.SHUT_WR)
    answered = set()
    for _ in sent:
        header = process.receive().header
        assert header["kind"] == "result"
        answered.add(header["id"])
    assert answered == sent
    assert zygote.exit_of(process.pid)["code"] == 0
    process.close()


def test_garbage_on_the_channel_ends_only_that_worker(zygote: ZygoteProcess, worker: WorkerProcess) -> None:
    worker.channel.sendall(b"GET / HTTP/1.1\r\n\r\n")
    assert zygote.exit_of(worker.pid)["code"] == 1


def test_a_frame_without_an_id_ends_only_that_worker(zygote: ZygoteProcess, worker: WorkerProcess) -> None:
    worker.send({"kind": "infer", "model": "m", "tensors": []})
    assert zygote.exit_of(worker.pid)["code"] == 1


def test_worker_holds_its_channel_and_standard_streams_only(zygote: ZygoteProcess, spec: dict[str, Any]) -> None:
    process = zygote.fork(spec)
    process.hello()
    links = {int(n): os.readlink(f"/proc/{process.pid}/fd/{n}") for n in os.listdir(f"/proc/{process.pid}/fd")}
    process.close()
    assert links.pop(0) == "/dev/null"
    assert links.pop(3).startswith("socket:")
    own = [links.pop(number) for number in list(links) if number > 3]  # what its loop waits with
    assert sorted(own) == ["anon_inode:[eventfd]", "anon_inode:[eventpoll]"]
    assert set(links) == {1, 2}, links


@pytest.mark.parametrize(
    ("change", "code", "words"),
    [
        ({"entry": "fp32/absent.onnx"}, "unloadable", "absent.onnx"),
        ({"entry": "../../etc/passwd"}, "unsafe_bundle", "inside the bundle"),
        ({"entry": 7}, "load_failed", "spec.entry"),
        ({"providers": ["CUDAExecutionProvider"]}, "unloadable", "CUDAExecutionProvider"),
        ({"runtime": "abacus"}, "unloadable", "abacus"),
        ({"handler": {"id": "nothing/v9"}}, "unloadable", "nothing/v9"),
        ({"handler": {"module": "absent.py", "class": "H"}}, "unloadable", "absent.py"),
        ({"scratch_dir": "/nonexistent/scratch"}, "load_failed", "scratch_dir"),
        ({"signature": {"inputs": [], "outputs": []}}, "unloadable", "signature.inputs"),
        ({"batching": {"max_batch": 0}}, "load_failed", "batching.max_batch"),
    ],
)
def test_what_cannot_load_is_reported_before_leaving(
    zygote: ZygoteProcess, spec: dict[str, Any], change: dict[str, Any], code: str, words: str
) -> None:
    header = failure(zygote, spec | change)
    assert header["code"] == code, header
    assert words in header["message"]


def test_a_model_that_breaks_its_manifest_is_refused(zygote: ZygoteProcess, spec: dict[str, Any]) -> None:
    spec["signature"]["inputs"] = [{"name": "x", "dtype": "float32", "shape": ["N", 5]}]
    header = failure(zygote, spec)
    assert header["code"] == "unloadable"
    assert "'x' is declared float32[N, 5], the model has float32[N, 4]" in header["message"]


def test_a_file_that_is_no_model_is_refused(zygote: ZygoteProcess, spec: dict[str, Any]) -> None:
    (Path(spec["bundle_dir"]) / spec["entry"]).write_bytes(b"\x08garbage")
    assert failure(zygote, spec)["code"] == "unloadable"


@pytest.mark.parametrize(
    ("source", "code", "words"),
    [
        ("import nonexistent_module", "unloadable", "ModuleNotFoundError"),
        ("raise SystemExit(0)", "load_failed", "SystemExit"),
        ("def f(:", "unloadable", "SyntaxError"),
        ("class H: pass", "unloadable", "derived from handlers.base.Handler"),
        (
            "from handlers.base import Handler\nclass H(Handler):\n"
            "    def __init__(self, context):\n        raise RuntimeError('no luck')\n"
            "    def preprocess(self, body, content_type): ...\n    def postprocess(self, outputs, rows): ...",
            "load_failed",
            "no luck",
        ),
    ],
)
def test_a_handler_that_cannot_be_made_fails_the_load(
    zygote: ZygoteProcess, spec: dict[str, Any], source: str, code: str, words: str
) -> None:
    header = failure(zygote, models.with_handler(spec, source))
    assert header["code"] == code
    assert words in header["message"]


def test_wrong_golden_output_fails_the_self_test(zygote: ZygoteProcess, spec: dict[str, Any]) -> None:
    models.golden(spec, {"y": X @ models.WEIGHTS + 1}, {"x": X}, [{"output": "y", "metric": "max_abs", "atol": 0.1}])
    header = failure(zygote, spec)
    assert header["code"] == "selftest_failed"
    assert "golden 'g1', output 'y', max_abs: differs by up to" in header["message"]


def thinning(folder: Path, columns: int) -> dict[str, Any]:
    """Return the spec of a model whose file leaves open how many columns it gives, declared with ``columns``."""
    spec = models.bundle(folder, models.linear(), models.LINEAR_SIGNATURE)
    write_thinning_model(Path(spec["bundle_dir"]) / spec["entry"])
    spec["signature"] |= {"outputs": [{"name": "y", "dtype": "float32", "shape": ["N", columns]}]}
    return spec


@pytest.mark.parametrize("golden", [True, False])
def test_a_model_whose_outputs_are_not_as_declared_fails_the_self_test(
    zygote: ZygoteProcess, tmp_path: Path, golden: bool
) -> None:
    spec = thinning(tmp_path, 5)
    if golden:  # whose sample is what the model gives
        models.golden(spec, {"y": X * 2}, {"x": X}, [{"output": "y", "metric": "allclose"}])
    header = failure(zygote, spec)
    assert header["code"] == "selftest_failed"
    rows = 2 if golden else 1
    assert f"output 'y': the model returned float32[{rows}, 4], declared is float32[N, 5]" in header["message"]


def test_outputs_that_are_not_as_declared_fail_what_meets_them(zygote: ZygoteProcess, tmp_path: Path) -> None:
    spec = thinning(tmp_path, 4)
    models.golden(spec, {"y": X * 2}, {"x": X}, [{"output": "y", "metric": "allclose"}])
    process = zygote.fork(spec)
    process.hello()
    for sign in (1, -1, 1, -1, 1):  # one by one: those of a batch share what its run gives
        process.post({"x": X * sign})
        header = process.receive().header
        if sign > 0:
            assert header["kind"] == "result"
            assert header["tensors"][0]["shape"] == [2, 4]
        else:
            assert header["code"] == "output_mismatch"
            assert "output 'y': the model returned float32[2, 1], declared is float32[N, 4]" in header["message"]
    process.close()


def test_every_warm_up_shape_is_run(zygote: ZygoteProcess, spec: dict[str, Any]) -> None:
    x = spec["signature"]["inputs"][0]
    good, bad = [3, *X.shape[1:]], [3, X.shape[1] + 1]
    process = zygote.fork(spec | {"warmup": {"runs": 1, "max_ms": 60_000, "shapes": [{x["name"]: good}]}})
    assert process.hello()["warmup_ms"] > 0
    process.close()
    header = failure(zygote, spec | {"warmup": {"runs": 1, "max_ms": 60_000, "shapes": [{x["name"]: bad}]}})
    assert header["code"] == "load_failed"
    assert "warm-up failed" in header["message"]


def test_memory_limit_fails_the_load_as_out_of_memory(zygote: ZygoteProcess, spec: dict[str, Any]) -> None:
    source = (
        "from handlers.tensors import TensorsHandler\nimport numpy as np\nclass H(TensorsHandler):\n"
        "    def __init__(self, context):\n        super().__init__(context)\n        self.hog = np.ones(1 << 33)"
    )
    spec["limits"] = {"memory_bytes": 2 << 30, "open_files": 64}
    assert failure(zygote, models.with_handler(spec, source))["code"] == "out_of_memory"


# requests


def test_tensors_go_straight_to_the_model(worker: WorkerProcess) -> None:
    np.testing.assert_allclose(worker.infer({"x": X})["y"], X @ models.WEIGHTS, rtol=1e-5)


def test_bodies_larger_than_any_receive_buffer_arrive(zygote: ZygoteProcess, tmp_path: Path) -> None:
    spec = models.bundle(tmp_path, models.sequence_sum(), models.SEQUENCE_SIGNATURE)
    process = zygote.fork(spec)
    process.hello()
    large = np.ones((1, 1_000_000), np.float32)
    assert process.infer({"x": large})["y"].tolist() == [1_000_000.0]
    process.close()


@pytest.mark.parametrize(
    ("inputs", "code", "words"),
    [
        ({"z": X}, "bad_tensor", "unknown input 'z'; the model takes 'x' float32[N, 4]"),
        ({"x": X.astype(np.float64)}, "bad_tensor", "input 'x': dtype float64, expected float32[N, 4]"),
        ({"x": X[:, :3]}, "bad_tensor", "input 'x': shape [2, 3], expected float32[N, 4]"),
        ({"x": X[0]}, "bad_tensor", "1 dimensions"),
        ({"x": np.zeros((9, 4), np.float32)}, "bad_tensor", "dimension N is 9, allowed are 1 to 8"),
        ({"x": np.zeros((0, 4), np.float32)}, "bad_tensor", "dimension N is 0"),
        ({}, "bad_tensor", "0 inputs given"),
    ],
)
def test_wrong_tensors_are_refused_by_name(worker: WorkerProcess, inputs: Any, code: str, words: str) -> None:
    number = worker.post(inputs)
    header = worker.receive().header
    assert header["kind"] == "error"
    assert header["id"] == number
    assert header["code"] == code
    assert words in header["message"]
    assert worker.infer({"x": X})["y"].shape == (2, 3)


def test_only_the_asked_outputs_come_back(worker: WorkerProcess) -> None:
    assert list(worker.infer({"x": X}, outputs=["y"])) == ["y"]
    worker.post({"x": X}, outputs=["nope"])
    assert "unknown output 'nope'" in worker.receive().header["message"]


def test_raw_json_goes_through_the_handler(worker: WorkerProcess) -> None:
    frame = worker.ask(json.dumps({"inputs": {"x": X.tolist()}}).encode(), "application/json")
    assert frame.header["content_type"] == "application/json"
    np.testing.assert_allclose(json.loads(bytes(frame.body))["outputs"]["y"], X @ models.WEIGHTS, rtol=1e-5)
    assert worker.ask(b"{", "application/json").header["code"] == "invalid_input"
    assert worker.ask(b"x", "image/jpeg").header["code"] == "invalid_input"


def test_oip_json_and_binary(worker: WorkerProcess) -> None:
    entry = {"name": "x", "datatype": "FP32", "shape": [2, 4]}
    text = json.dumps({"id": "7", "inputs": [entry | {"data": X.ravel().tolist()}]}).encode()
    frame = worker.ask(text, "application/vnd.oip+json")
    answer = json.loads(bytes(frame.body))
    assert frame.header["content_type"] == "application/json"
    assert (answer["model_name"], answer["model_version"], answer["id"]) == ("m", "1.0.0", "7")
    assert answer["outputs"][0]["shape"] == [2, 3]

    head = json.dumps(
        {"inputs": [entry | {"parameters": {"binary_data_size": 32}}], "parameters": {"binary_data_output": True}}
    ).encode()
    frame = worker.ask(head + X.tobytes(), "application/vnd.oip+json", params={"oip_header_bytes": len(head)})
    assert frame.header["content_type"] == "application/octet-stream"
    length = frame.header["params"]["oip_header_bytes"]
    output = np.frombuffer(bytes(frame.body)[length:], np.float32).reshape(2, 3)
    np.testing.assert_allclose(output, X @ models.WEIGHTS, rtol=1e-5)


def test_texts_pass_through_a_string_model(zygote: ZygoteProcess, tmp_path: Path) -> None:
    process = zygote.fork(models.bundle(tmp_path, models.text_identity(), models.TEXT_SIGNATURE, handler={}))
    process.hello()
    answer = process.infer({"x": np.array(["grüß", "b"], dtype=object)})["y"]
    assert [bytes(item).decode() for item in answer] == ["grüß", "b"]
    process.post({"x": np.array([b"\xff"], dtype=object)})
    assert "not UTF-8" in process.receive().header["message"]
    assert "no handler" in process.ask(b"x", "text/plain").header["message"]
    process.close()


def test_waiting_requests_share_a_batch_and_keep_their_rows(worker: WorkerProcess) -> None:
    sent = {}
    for index in range(40):
        x = np.full((1 + index % 3, 4), index, np.float32)
        sent[worker.post({"x": x})] = x
    for _ in range(len(sent)):
        frame = worker.receive()
        x = sent.pop(frame.header["id"])
        y = np.frombuffer(bytes(frame.body), np.float32).reshape(-1, 3)
        np.testing.assert_allclose(y, x @ models.WEIGHTS, rtol=1e-4, atol=1e-4)
    assert not sent


def test_one_poisoned_request_fails_alone(zygote: ZygoteProcess, tmp_path: Path) -> None:
    process = zygote.fork(models.bundle(tmp_path, models.lookup(), models.LOOKUP_SIGNATURE, handler={}))
    process.hello()
    indices = [0, 1, 99, 3, 2, 1, 0]
    numbers = [process.post({"index": np.array([index], np.int64)}) for index in indices]
    answers = {frame.header["id"]: frame for frame in (process.receive() for _ in indices)}
    for number, index in zip(numbers, indices, strict=True):
        frame = answers[number]
        if index == 99:
            assert frame.header["code"] == "invalid_input"
            assert "out of data bounds" in frame.header["message"]
        else:
            assert np.frombuffer(bytes(frame.body), np.float32).tolist() == [index * 10.0]
    process.close()


SLOW = """
import time
from handlers.base import Prepared, Reply
from handlers.tensors import TensorsHandler
class H(TensorsHandler):
    idempotent = False
    def preprocess(self, body, content_type):
        if b"stop" in body:
            import signal, os
            os.kill(os.getpid(), signal.SIGSTOP)
        if body == b"raise":
            raise RuntimeError("boom")
        if body == b"exit":
            raise SystemExit(3)
        if body == b"hog":
            raise MemoryError
        if body == b"nan":
            return {"x": __import__("numpy").full((1, 4), float("nan"), "float32")}
        if body == b"wrong":
            return {"x": __import__("numpy").zeros((1, 5), "float32")}
        if body == b"list":
            return [1]
        if body == b"interrupt":
            raise KeyboardInterrupt
        if body == b"cancel":
            raise __import__("asyncio").CancelledError
        if body.startswith(b"reply"):
            return Prepared(super().preprocess(b"[[1,1,1,1]]", content_type), body)
        return super().preprocess(body, content_type)
    def postprocess(self, outputs, rows):
        value = outputs["y"][0][0]
        return float(value)
    def postprocess_with(self, outputs, rows, state):
        odd = {
            b"reply text": Reply("text", "text/plain"),
            b"reply list": Reply([1, 2], "text/plain"),
            b"reply wide": Reply(outputs["y"].data, "text/plain"),
            b"reply type": Reply(b"x", None),
            b"reply good": Reply(outputs["y"].data.cast("B"), "text/plain"),
        }
        return odd[state]
"""


def test_a_handlers_failure_is_its_requests_alone(zygote: ZygoteProcess, spec: dict[str, Any]) -> None:
    process = zygote.fork(models.with_handler(spec, SLOW))
    assert process.hello()["idempotent"] is False
    cases = {
        b"raise": ("handler_failed", "H.preprocess raised RuntimeError: boom"),
        b"exit": ("handler_failed", "H.preprocess raised SystemExit"),
        b"hog": ("out_of_memory", "H.preprocess"),
        b"nan": ("handler_failed", "H.postprocess raised ValueError"),
        b"wrong": ("handler_failed", "expected float32[N, 4]"),
        b"list": ("handler_failed", "returned list"),
        b"interrupt": ("handler_failed", "raised KeyboardInterrupt"),
        b"cancel": ("handler_failed", "raised CancelledError"),
        b"reply text": ("handler_failed", "a Reply's"),
        b"reply list": ("handler_failed", "a Reply's"),
        b"reply type": ("handler_failed", "a Reply's"),
        b"[]": ("invalid_input", "input 'x'"),
    }
    for body, (code, words) in cases.items():
        header = process.ask(body, "application/json").header
        assert (header["kind"], header["code"]) == ("error", code), header
        assert words in header["message"]
    for body in (b"reply wide", b"reply good"):
        assert len(process.ask(body, "application/json").body) == 12
    assert process.infer({"x": X})["y"].shape == (2, 3)
    process.close()


def test_deadlines_and_cancels_count_while_a_request_waits(zygote: ZygoteProcess, spec: dict[str, Any]) -> None:
    process = zygote.fork(models.with_handler(spec, SLOW))
    process.hello()
    process.cork()
    blocker = process.post_raw(b'{"inputs": {"x": [[1, 2, 3, 4]]}, "stop": true}', "application/json")
    late = process.post({"x": X}, deadline_ms=1)
    withdrawn = process.post({"x": X})
    kept = process.post({"x": X}, deadline_ms=60_000)
    process.send({"kind": "cancel", "id": withdrawn})
    process.send({"kind": "cancel", "id": 10_000})  # unknown: nothing to do
    process.uncork()
    wait_until(lambda: _state(process.pid) == "T", "the worker stops while it decodes the first")
    stopped = time.monotonic()
    wait_until(lambda: time.monotonic() > stopped + 0.005, "a deadline passes")
    signal.pidfd_send_signal(process.pidfd, signal.SIGCONT)
    answers = {frame.header["id"]: frame.header for frame in (process.receive() for _ in range(4))}
    assert answers[blocker]["kind"] == "result"
    assert answers[withdrawn]["code"] == "canceled"
    assert answers[kept]["kind"] == "result"
    assert answers[late]["code"] == "deadline_exceeded"
    process.post({"x": X}, deadline_ms=1e-6)
    assert process.receive().header["code"] == "deadline_exceeded"
    process.close()


@pytest.mark.parametrize(
    "fields",
    [
        {"deadline_ms": "soon"},
        {"deadline_ms": 0},
        {"deadline_ms": 1e12},
        {"priority": 99},
        {"priority": "first"},
        {"deadline_ms": float("nan")},
    ],
)
def test_malformed_fields_are_refused(worker: WorkerProcess, fields: dict[str, Any]) -> None:
    worker.post({"x": X}, **fields)
    assert worker.receive().header["code"] == "invalid_input"


def test_calls(worker: WorkerProcess) -> None:
    assert worker.call("ping") == {"ok": True, "running_s": 0.0}
    assert worker.call("selftest") == {"ok": True, "golden": []}
    assert worker.call("dance")["code"] == "not_found"


def test_answers_that_the_daemon_cannot_take_yet_wait_without_loss(worker: WorkerProcess) -> None:
    """Thousands of answers overfill the socket; the worker holds them and none is lost."""
    count = 4000
    sender = threading.Thread(target=lambda: [worker.post({"x": X}) for _ in range(count)])
    sender.start()
    seen = {worker.receive().header["id"] for _ in range(count)}
    sender.join()
    assert len(seen) == count


def test_an_answer_over_the_wire_limit_is_an_error_not_a_broken_stream(
    zygote: ZygoteProcess, spec: dict[str, Any]
) -> None:
    source = (
        "from handlers.base import Handler, Reply\nimport numpy as np\nclass H(Handler):\n"
        "    def preprocess(self, body, content_type):\n        return {'x': np.zeros((1, 4), 'float32')}\n"
        "    def postprocess(self, outputs, rows):\n        return Reply(bytes(9 << 20), 'x/y')"
    )
    process = zygote.fork(models.with_handler(spec, source))
    process.hello()
    assert process.ask(b"", "x/y").header["code"] == "too_large"
    assert process.infer({"x": X})["y"].shape == (2, 3)
    process.close()


def test_prepared_state_reaches_its_own_answer(zygote: ZygoteProcess, spec: dict[str, Any]) -> None:
    source = (
        "from handlers.base import Handler, Prepared, InputError\nimport numpy as np\nclass H(Handler):\n"
        "    def preprocess(self, body, content_type):\n"
        "        if not body: raise InputError('empty body')\n"
        "        return Prepared({'x': np.zeros((1, 4), 'float32')}, body.decode())\n"
        "    def postprocess(self, outputs, rows):\n        raise AssertionError\n"
        "    def postprocess_with(self, outputs, rows, state):\n        return [state, rows, self.context.params['p']]"
    )
    process = zygote.fork(models.with_handler(spec, source, p=5))
    process.hello()
    numbers = {process.post_raw(text.encode(), "text/plain"): text for text in "abcdef"}
    for _ in range(len(numbers)):
        frame = process.receive()
        assert json.loads(bytes(frame.body)) == [numbers[frame.header["id"]], 1, 5]
    assert process.ask(b"", "text/plain").header == {
        "kind": "error", "id": 7, "code": "invalid_input", "message": "empty body", "retryable": False,
    }  # fmt: skip
    process.close()


def _state(pid: int) -> str:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


def test_a_provider_that_takes_none_of_the_model_fails_the_load(zygote: ZygoteProcess, tmp_path: Path) -> None:
    """The CPU build has a remote one, and lists it first: the model would run on the CPU under its name."""
    providers = ["AzureExecutionProvider", "CPUExecutionProvider"]
    if providers[0] not in onnxruntime.get_available_providers():
        pytest.skip("this onnxruntime has the CPU only")
    worker = zygote.fork(models.bundle(tmp_path, models.linear(), models.LINEAR_SIGNATURE, providers=providers))
    header = worker.receive().header
    assert header["code"] == "unloadable"
    assert "AzureExecutionProvider executes none of the 1 operators" in header["message"]
    worker.close()


def test_a_variant_names_its_provider(zygote: ZygoteProcess, tmp_path: Path) -> None:
    worker = zygote.fork(models.bundle(tmp_path, models.linear(), models.LINEAR_SIGNATURE, providers=[]))
    assert "names its execution provider" in worker.receive().header["message"]
    worker.close()


@pytest.mark.parametrize(("taken", "given"), [("bfloat16", "float32"), ("float32", "float16"), ("float64", "float64")])
def test_floats_of_the_file_are_converted_to_what_is_declared(
    zygote: ZygoteProcess, tmp_path: Path, taken: str, given: str
) -> None:
    """The file takes and gives bfloat16, which NumPy lacks."""
    signature = {
        "inputs": [{"name": "x", "dtype": taken, "shape": ["N", 4]}],
        "outputs": [{"name": "y", "dtype": given, "shape": ["N", 4]}],
    }
    worker = zygote.fork(models.bundle(tmp_path, models.narrow_identity(), signature))
    worker.hello()
    x = np.array([[0.0, 1.0, -2.5, 3e38]], np.float32)
    sent = (x.view(np.uint32) >> 16).astype(np.uint16) if taken == "bfloat16" else x.astype(taken)
    number = worker.next_id()
    entry = {"name": "x", "dtype": taken, "shape": [1, 4], "nbytes": sent.nbytes}
    worker.send({"kind": "infer", "id": number, "tensors": [entry]}, [sent.tobytes()])
    frame = worker.receive()
    assert frame.header["tensors"][0]["dtype"] == given, frame.header
    with np.errstate(over="ignore"):
        np.testing.assert_allclose(np.frombuffer(bytes(frame.body), given), x[0].astype(given), rtol=0.01)
    worker.close()


def test_a_bfloat16_output_is_declared_float32(zygote: ZygoteProcess, tmp_path: Path) -> None:
    tensor = {"dtype": "bfloat16", "shape": ["N", 4]}
    signature = {"inputs": [{"name": "x", **tensor}], "outputs": [{"name": "y", **tensor}]}
    worker = zygote.fork(models.bundle(tmp_path, models.narrow_identity(), signature))
    assert "'y': declare it float32" in worker.receive().header["message"]
    worker.close()


def test_a_worker_whose_gpu_is_lost_ends_without_answering_so_that_another_does(
    zygote: ZygoteProcess, tmp_path: Path
) -> None:
    """The fault is the model's own, under the words of CUDA: on the CPU they mean nothing."""
    model = models.lookup("CUDA error: an illegal memory access was encountered")
    spec = models.bundle(tmp_path, model, models.LOOKUP_SIGNATURE)
    for kind in ("cpu", "cuda"):
        worker = zygote.fork(spec | {"device": {"kind": kind, "index": 0}})
        worker.hello()
        worker.post({"index": np.array([9])})
        if kind == "cpu":
            assert worker.receive().header["code"] in ("inference_failed", "invalid_input")
        else:
            with pytest.raises(EOFError):
                worker.receive()
            assert zygote.exit_of(worker.pid)["code"] == 1
        worker.close()
