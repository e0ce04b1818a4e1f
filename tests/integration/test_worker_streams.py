"""Streams in a real sandboxed worker, driven by an independent reading of the protocol."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from agent import tensors
from agent.wire import PART_BYTES_MAX, Frame
from tests.fakes.daemon_side import WorkerProcess, ZygoteProcess
from tests.models import HANDLERS, worker_spec, write_scale_model

pytestmark = pytest.mark.integration

JSON = "application/json"
X = np.ones((2, 4), dtype=np.float32)
FOREVER = 1_000_000_000


@pytest.fixture(scope="module")
def zygote() -> Iterator[ZygoteProcess]:
    process = ZygoteProcess()
    yield process
    process.close()


def start(zygote: ZygoteProcess, folder: Path, handler: dict[str, Any]) -> WorkerProcess:
    write_scale_model(folder / "model.onnx")
    (folder / "handler.py").write_text(HANDLERS["steps"])
    (folder / "scratch").mkdir()
    spec = worker_spec(folder, version="1.0.0", variant="v0", entry="model.onnx", handler=handler)
    return zygote.fork({**spec, "scratch_dir": str(folder / "scratch")})


@pytest.fixture
def worker(zygote: ZygoteProcess, tmp_path: Path) -> Iterator[WorkerProcess]:
    process = start(zygote, tmp_path, {"module": "handler.py", "class": "StepsHandler", "params": {}})
    assert process.hello()["streams"] is True
    yield process
    process.close()


def ask(worker: WorkerProcess, asked: dict[str, Any], stream: Any = True, **fields: Any) -> int:
    if stream is not None:
        fields["stream"] = stream
    return worker.post_raw(json.dumps(asked).encode(), fields.pop("content_type", JSON), **fields)


def rest(worker: WorkerProcess, number: int) -> tuple[list[Frame], Frame]:
    """Return the parts of one answer and what ended it."""
    parts = []
    while True:
        frame = worker.receive()
        assert frame.header["id"] == number
        if frame.header["kind"] == "alive":  # on a machine under load
            continue
        if frame.header["kind"] != "part":
            return parts, frame
        assert frame.header["seq"] == len(parts)
        parts.append(Frame(frame.header, bytes(frame.body)))


def report(worker: WorkerProcess) -> dict[str, int]:
    _, answer = drained(worker, ask(worker, {"report": True}, None))
    assert answer.header["kind"] == "result", answer.header
    (value,) = json.loads(bytes(answer.body))
    return dict(value)


@pytest.mark.parametrize(
    ("asked", "content_type", "bodies"),
    [
        ({}, JSON, [b'{"y":[[2.0,2.0,2.0,2.0]]}', b'{"y":[[4.0,4.0,4.0,4.0]]}', b'{"y":[[8.0,8.0,8.0,8.0]]}']),
        ({"kind": "text"}, "text/plain; charset=utf-8", [b"2 ", b"4 ", b"8 "]),
        ({"kind": "json", "count": 1}, JSON, [b'{"number":0,"y":2.0}']),
        ({"kind": "bytes", "count": 2}, "application/octet-stream", [b"\0\0\0", b"\1\1\1"]),
        ({"count": 0}, "", []),
    ],
)
def test_items_become_parts(
    worker: WorkerProcess, asked: dict[str, Any], content_type: str, bodies: list[bytes]
) -> None:
    for stream in (True, "auto"):
        parts, end = rest(worker, ask(worker, asked, stream))
        assert [part.body for part in parts] == bodies
        assert {part.header["content_type"] for part in parts} <= {content_type}
        assert (end.header["kind"], bytes(end.body)) == ("result", b"")


def test_who_does_not_ask_for_parts_gets_them_joined(worker: WorkerProcess) -> None:
    for stream in (None, False):
        parts, end = rest(worker, ask(worker, {"kind": "text"}, stream))
        assert (parts, bytes(end.body)) == ([], b"2 4 8 ")
        assert end.header["content_type"] == "text/plain; charset=utf-8"
    assert bytes(rest(worker, ask(worker, {"kind": "bytes"}, None))[1].body) == b"\0\0\0\1\1\1\2\2\2"
    assert json.loads(bytes(rest(worker, ask(worker, {"kind": "json", "count": 1}, None))[1].body)) == [
        {"number": 0, "y": 2.0}
    ]


def test_tensors_stream_as_tensors_and_run_once_without(worker: WorkerProcess) -> None:
    parts, end = rest(worker, worker.post({"x": X}, stream=True))
    values = [tensors.unpack(part.header["tensors"], part.body)["y"] for part in parts]
    assert [value[0, 0] for value in values] == [2.0, 4.0, 8.0]
    assert all(value.shape == X.shape for value in values)
    assert end.header["kind"] == "result"
    np.testing.assert_array_equal(worker.infer({"x": X})["y"], X * 2)


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("wide", "output 'y': the handler's stream returned float64[2, 4], declared is float32[N, 4]"),
        ("short", "output 'y': the handler's stream returned float32[2, 3], declared is float32[N, 4]"),
        ("other", "the handler's stream returned 'score'; declared are 'y'"),
    ],
)
def test_tensors_of_a_stream_are_held_to_what_is_declared(
    zygote: ZygoteProcess, tmp_path: Path, kind: str, words: str
) -> None:
    handler = {"module": "handler.py", "class": "StepsHandler", "params": {"kind": kind, "count": 1}}
    process = start(zygote, tmp_path, handler)
    process.hello()
    parts, end = rest(process, process.post({"x": X}, stream=True))
    assert (parts, end.header["code"]) == ([], "output_mismatch")
    assert words in end.header["message"]
    assert rest(process, ask(process, {"kind": "text", "count": 1}))[1].header["kind"] == "result"
    process.close()


def test_open_inference_requests_stream_as_json(worker: WorkerProcess) -> None:
    body = json.dumps(
        {
            "id": "a",
            "inputs": [{"name": "x", "shape": [1, 4], "datatype": "FP32", "data": [1, 1, 1, 1]}],
            "parameters": {"binary_data_output": True},
        }
    )
    parts, _ = rest(worker, worker.post_raw(body.encode(), "application/vnd.oip+json", stream=True))
    answers = [json.loads(part.body) for part in parts]
    assert [answer["outputs"][0]["data"][0] for answer in answers] == [2.0, 4.0, 8.0]
    assert {answer["id"] for answer in answers} == {"a"}


def test_generate_documents_are_answered_in_their_shape(worker: WorkerProcess) -> None:
    kind = "application/vnd.triton.generate+json"
    about = {"model_name": "scale", "model_version": "1.0.0"}
    parts, _ = rest(worker, ask(worker, {"id": "7", "kind": "text", "count": 2}, content_type=kind))
    assert [json.loads(part.body) for part in parts] == [
        {"id": "7", **about, "text_output": "2 "},
        {"id": "7", **about, "text_output": "4 "},
    ]
    _, end = rest(worker, ask(worker, {"kind": "text"}, None, content_type=kind))
    assert json.loads(bytes(end.body)) == {**about, "text_output": "2 4 8 "}
    _, end = rest(worker, ask(worker, {"kind": "bytes"}, content_type=kind))
    assert end.header["code"] == "handler_failed"
    _, end = rest(worker, worker.post_raw(b"[1]", kind, stream=True))
    assert end.header["code"] == "invalid_input"


@pytest.mark.parametrize(
    ("asked", "parts", "code", "says"),
    [
        ({"fail_at": 2}, 2, "handler_failed", "StepsHandler.stream raised RuntimeError: asked to fail"),
        ({"refuse_at": 1}, 1, "invalid_input", "asked to refuse"),
        ({"wrong_at": 1}, 1, "handler_failed", "unknown input 'z'"),
        ({"kind": "nothing"}, 0, "handler_failed", "not JSON serializable"),
        ({"kind": "bytes", "size": PART_BYTES_MAX + 1}, 0, "handler_failed", "yield smaller"),
        ({"fail_at": 1, "fail_closed": True}, 1, "handler_failed", ""),
    ],
)
def test_a_stream_that_fails_ends_with_an_error_and_is_closed(
    worker: WorkerProcess, asked: dict[str, Any], parts: int, code: str, says: str
) -> None:
    sent, end = rest(worker, ask(worker, asked))
    assert (len(sent), end.header["kind"], end.header["code"]) == (parts, "error", code)
    assert says in end.header["message"]
    counts = report(worker)
    assert (counts["opened"], counts["closed"]) == (1, 1)


@pytest.mark.parametrize("stream", [1, 0.5, "yes", [], {}])
def test_a_wish_that_makes_no_sense_is_refused(worker: WorkerProcess, stream: Any) -> None:
    parts, end = rest(worker, ask(worker, {}, stream))
    assert (parts, end.header["code"]) == ([], "invalid_input")


def test_a_handler_that_cannot_stream_says_so_unless_asked_softly(zygote: ZygoteProcess, tmp_path: Path) -> None:
    worker = start(zygote, tmp_path, {"id": "tensors/v1", "params": {}})
    assert worker.hello()["streams"] is False
    body = b"[[1, 1, 1, 1]]"
    _, end = rest(worker, worker.post_raw(body, JSON, stream=True))
    assert end.header["code"] == "stream_unsupported"
    _, end = rest(worker, worker.post({"x": X}, stream=True))
    assert end.header["code"] == "stream_unsupported"
    parts, end = rest(worker, worker.post_raw(body, JSON, stream="auto"))
    assert (parts, json.loads(bytes(end.body))) == ([], {"outputs": {"y": [[2.0, 2.0, 2.0, 2.0]]}})
    worker.close()


def test_the_built_in_windows_stream(zygote: ZygoteProcess, tmp_path: Path) -> None:
    worker = start(zygote, tmp_path, {"id": "windows/v1", "params": {"samples": "int16"}})
    assert worker.hello()["streams"] is True
    signal = np.arange(10, dtype="<i2").tobytes()
    parts, _ = rest(worker, worker.post_raw(signal, "application/octet-stream", stream=True))
    answers = [json.loads(part.body) for part in parts]
    assert [answer["start"] for answer in answers] == [0, 4, 8]
    assert answers[2]["outputs"]["y"] == [16.0, 18.0, 0.0, 0.0]
    _, end = rest(worker, worker.post_raw(signal, "application/octet-stream"))
    assert json.loads(bytes(end.body)) == answers
    worker.close()


def test_canceling_closes_the_generator_within_a_step(worker: WorkerProcess) -> None:
    number = ask(worker, {"kind": "bytes", "count": FOREVER})
    assert worker.receive().header["kind"] == "part"
    worker.send({"kind": "cancel", "id": number})
    _, end = drained(worker, number)
    assert end.header["code"] == "canceled"
    counts = report(worker)
    assert (counts["opened"], counts["closed"]) == (1, 1)


def drained(worker: WorkerProcess, number: int) -> tuple[int, Frame]:
    """Return how many parts still came, and what ended the answer."""
    count = 0
    while True:
        frame = worker.receive()
        if frame.header["id"] == number and frame.header["kind"] not in ("part", "alive"):
            return count, frame
        count += 1


def test_a_deadline_ends_a_stream_between_two_steps(worker: WorkerProcess) -> None:
    number = ask(worker, {"kind": "bytes", "count": FOREVER, "sleep_s": 0.001}, deadline_ms=200)
    _, end = drained(worker, number)
    assert end.header["code"] == "deadline_exceeded"
    counts = report(worker)
    assert counts["opened"] == counts["closed"]


def test_streams_take_turns_with_each_other_and_with_everybody_else(worker: WorkerProcess) -> None:
    first = ask(worker, {"kind": "bytes", "count": FOREVER, "sleep_s": 0.001})
    second = ask(worker, {"kind": "bytes", "count": FOREVER, "sleep_s": 0.001})
    other = worker.post({"x": X})
    order: list[tuple[int, str]] = []
    while (other, "result") not in order or order.count((second, "part")) < 3:
        header = worker.receive().header
        order.append((header["id"], header["kind"]))
    assert not [kind for _, kind in order if kind == "error"]
    turns = [number for number, kind in order if kind == "part"]
    both = turns[turns.index(second) :]
    assert both == ([second, first] * len(both))[: len(both)]
    for number in (first, second):
        worker.send({"kind": "cancel", "id": number})
        assert drained(worker, number)[1].header["code"] == "canceled"


def test_no_more_streams_are_open_than_the_handler_allows(worker: WorkerProcess) -> None:
    numbers = [ask(worker, {"kind": "bytes", "count": FOREVER, "sleep_s": 0.001}) for _ in range(6)]
    seen: set[int] = set()
    while len(seen) < 4:
        seen.add(worker.receive().header["id"])
    assert seen == set(numbers[:4])
    worker.send({"kind": "cancel", "id": numbers[0]})
    while numbers[4] not in seen:
        seen.add(worker.receive().header["id"])
    assert numbers[5] not in seen
    worker.send({"kind": "cancel", "id": numbers[5]})  # it has not begun
    assert drained(worker, numbers[5])[1].header["code"] == "canceled"
    for number in numbers[1:5]:
        worker.send({"kind": "cancel", "id": number})
        drained(worker, number)
    counts = report(worker)
    assert (counts["opened"], counts["closed"]) == (5, 5)


def test_waiting_streams_begin_by_priority(worker: WorkerProcess) -> None:
    running = [ask(worker, {"kind": "bytes", "count": FOREVER, "sleep_s": 0.001}) for _ in range(4)]
    late = ask(worker, {"count": 1})
    urgent = ask(worker, {"count": 1}, priority=1)
    worker.send({"kind": "cancel", "id": running[0]})
    order = []
    while len(order) < 2:
        header = worker.receive().header
        if header["id"] in (late, urgent) and header["kind"] == "result":
            order.append(header["id"])
    assert order == [urgent, late]
    for number in running[1:]:
        worker.send({"kind": "cancel", "id": number})
        drained(worker, number)


def test_a_paused_stream_takes_no_step_until_it_is_resumed(worker: WorkerProcess) -> None:
    number = ask(worker, {"kind": "bytes", "count": FOREVER, "sleep_s": 0.001})
    worker.receive()
    worker.send({"kind": "pause", "id": number})
    before = steps_when_still(worker, number)
    assert steps_when_still(worker, number) == before
    worker.send({"kind": "resume", "id": number})
    while worker.receive().header["id"] != number:
        pass
    worker.send({"kind": "cancel", "id": number})
    drained(worker, number)
    worker.send({"kind": "resume", "id": number})  # it has ended: the frames crossed
    assert report(worker)["closed"] == 1


def test_a_paused_stream_leaves_its_place_to_one_that_waits(worker: WorkerProcess) -> None:
    numbers = [ask(worker, {"kind": "bytes", "count": FOREVER, "sleep_s": 0.001}) for _ in range(4)]
    late = ask(worker, {"count": 1})
    worker.send({"kind": "pause", "id": numbers[0]})
    assert drained(worker, late)[1].header["kind"] == "result"
    for number in numbers:
        worker.send({"kind": "cancel", "id": number})
        drained(worker, number)


def test_a_long_answer_that_is_joined_shows_that_it_is_worked_on(worker: WorkerProcess) -> None:
    number = ask(worker, {"kind": "text", "count": 4, "sleep_s": 0.4}, None)
    assert worker.receive().header == {"kind": "alive", "id": number}
    while (frame := worker.receive()).header["kind"] == "alive":
        pass
    assert bytes(frame.body) == b"2 4 8 16 "


def steps_when_still(worker: WorkerProcess, streaming: int) -> int:
    """Return the steps that a worker has taken; parts that were under way are passed over."""
    number = ask(worker, {"report": True}, None)
    while True:
        frame = worker.receive()
        if frame.header["id"] == number and frame.header["kind"] == "result":
            (value,) = json.loads(bytes(frame.body))
            return int(value["steps"])
        assert frame.header["id"] in (number, streaming)


def test_a_daemon_that_takes_nothing_holds_the_generator(worker: WorkerProcess) -> None:
    """What is produced beyond what was taken is bounded by the socket, not by the stream."""
    size = 64 * 1024
    worker.channel.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, size)
    number = ask(worker, {"kind": "bytes", "count": FOREVER, "size": size})
    taken = [worker.receive()]
    worker.send({"kind": "pause", "id": number})
    query = ask(worker, {"report": True}, None)
    while True:
        frame = worker.receive()
        if frame.header["id"] == query and frame.header["kind"] == "result":
            break
        if frame.header["kind"] == "part":
            taken.append(frame)
    (value,) = json.loads(bytes(frame.body))
    assert value["steps"] == len(taken)
    assert len(taken) * size < 8 << 20
    worker.send({"kind": "cancel", "id": number})
    drained(worker, number)


def test_a_large_body_and_a_stream_pass_each_other(worker: WorkerProcess) -> None:
    number = ask(worker, {"kind": "bytes", "count": FOREVER, "size": 10_000})
    worker.receive()
    pad = json.dumps({"kind": "text", "pad": "x" * 3_000_000}).encode()
    large = worker.post_raw(pad, JSON)
    worker.send({"kind": "pause", "id": number})
    _, end = drained(worker, large)
    assert bytes(end.body) == b"2 4 8 "
    worker.send({"kind": "cancel", "id": number})
    assert drained(worker, number)[1].header["code"] == "canceled"


def test_a_closed_channel_ends_streams_and_lets_the_worker_leave(worker: WorkerProcess) -> None:
    number = ask(worker, {"kind": "bytes", "count": FOREVER, "sleep_s": 0.001})
    worker.receive()
    worker.channel.shutdown(socket.SHUT_WR)
    _, end = drained(worker, number)
    assert end.header["code"] == "canceled"
    worker.wait_gone()
