"""What the client library says and how it reads answers; what it drags in."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest

from agent.client.messages import (
    Part,
    call_frame,
    cancel_frame,
    infer_frame,
    pace_frame,
    part_of,
    predict_frame,
    result_of,
    stream_frame,
    value_of,
)
from agent.errors import AgentError, FrameError, OverloadedError, TensorError
from agent.tensors import pack
from agent.wire import Buffer, Decoder, Frame

pytestmark = pytest.mark.unit


def decoded(parts: list[Buffer]) -> Frame:
    (frame,) = Decoder().feed(b"".join(bytes(part) for part in parts))
    return frame


def test_tensors_travel_behind_their_description() -> None:
    frame = decoded(infer_frame(5, "m", {"x": np.ones((1, 2), np.float32)}, version="2", outputs=["y"], deadline_ms=9))
    assert frame.header == {
        "kind": "infer",
        "id": 5,
        "model": "m",
        "version": "2",
        "deadline_ms": 9,
        "outputs": ["y"],
        "tensors": [{"name": "x", "dtype": "float32", "shape": [1, 2], "nbytes": 8}],
    }
    assert bytes(frame.body) == np.ones(2, np.float32).tobytes()


@pytest.mark.parametrize("body", [b"raw", bytearray(b"raw"), memoryview(b"raw"), np.frombuffer(b"raw", "S1").data])
def test_raw_bodies_of_any_buffer_are_sent(body: Buffer) -> None:
    frame = decoded(predict_frame(1, "m", body, content_type="text/plain"))
    assert frame.header["content_type"] == "text/plain"
    assert bytes(frame.body) == b"raw"


def test_a_wish_for_parts_is_a_request_of_either_kind() -> None:
    tensors = decoded(stream_frame(1, "m", {"x": np.ones(2, np.float32)}, outputs=["y"]))
    assert (tensors.header["stream"], tensors.header["outputs"]) == (True, ["y"])
    assert tensors.header["tensors"][0]["name"] == "x"
    raw = decoded(stream_frame(1, "m", b"raw", content_type="a/b", priority=1))
    assert (raw.header["stream"], raw.header["content_type"], raw.header["priority"]) == (True, "a/b", 1)
    assert bytes(raw.body) == b"raw"
    kinds = [decoded(pace_frame(3, paused=paused)).header for paused in (True, False)]
    assert kinds == [{"kind": "pause", "id": 3}, {"kind": "resume", "id": 3}]


def test_parts_are_numbered_and_all_say_who_answers() -> None:
    about = {"model": "m", "version": "2", "variant": "int8"}
    entries, body = pack({"y": np.arange(3)})
    first = part_of(Frame({"kind": "part", "id": 1, "content_type": "text/plain", **about}, b"a\xc3\xa9"), None)
    assert first is not None
    second = part_of(Frame({"kind": "part", "id": 1, "tensors": entries}, bytes(body[0])), first)
    assert isinstance(second, Part)
    assert (first.text(), first.seq, second.seq) == ("a\u00e9", 0, 1)
    np.testing.assert_array_equal(second.outputs["y"], np.arange(3))
    assert (second.model, second.version, second.variant) == ("m", "2", "int8")
    assert part_of(Frame({"kind": "result", "id": 1}, b""), second) is None
    with pytest.raises(OverloadedError, match="full"):
        part_of(Frame({"kind": "error", "id": 1, "code": "overloaded", "message": "full"}, b""), None)
    with pytest.raises(FrameError):
        part_of(Frame({"kind": "reply", "id": 1}, b""), None)


def test_calls_and_withdrawals() -> None:
    assert decoded(call_frame(1, "status", None, None)).header == {
        "kind": "call",
        "id": 1,
        "method": "status",
        "args": {},
    }
    assert decoded(cancel_frame(4)).header == {"kind": "cancel", "id": 4}


def test_a_tensor_answer_fills_outputs() -> None:
    entries, body = pack({"y": np.arange(3)})
    header = {"kind": "result", "id": 1, "model": "m", "version": "2", "variant": "int8", "tensors": entries}
    result = result_of(Frame(header, bytes(body[0])))
    np.testing.assert_array_equal(result.outputs["y"], np.arange(3))
    assert (result.model, result.version, result.variant) == ("m", "2", "int8")


def test_a_raw_answer_is_a_body() -> None:
    header = {"kind": "result", "id": 1, "model": "m", "content_type": "application/json"}
    result = result_of(Frame(header, memoryview(b'{"a": 1}')))
    assert result.json() == {"a": 1}
    assert result.body == b'{"a": 1}'


def test_an_error_answer_is_raised_as_its_class() -> None:
    frame = Frame({"kind": "error", "id": 1, "code": "overloaded", "message": "full", "retryable": True}, b"")
    for read in (result_of, value_of):
        with pytest.raises(OverloadedError, match="full"):
            read(frame)


def test_a_code_from_a_newer_daemon_is_still_an_error() -> None:
    with pytest.raises(AgentError, match="why"):
        result_of(Frame({"kind": "error", "code": "from_the_future", "message": "why"}, b""))


def test_an_answer_of_another_kind_is_refused() -> None:
    with pytest.raises(FrameError):
        result_of(Frame({"kind": "reply", "id": 1, "value": 1}, b""))
    with pytest.raises(FrameError):
        value_of(Frame({"kind": "result", "id": 1}, b""))


def test_tensors_that_lie_are_refused() -> None:
    entries = [{"name": "y", "dtype": "float32", "shape": [2], "nbytes": 8}]
    with pytest.raises(TensorError):
        result_of(Frame({"kind": "result", "id": 1, "tensors": entries}, b"1234"))


def test_the_blocking_client_needs_numpy_and_msgpack_only() -> None:
    code = (
        "import sys; before = set(sys.modules); from agent.client import Client;"
        "print(*sorted({n.partition('.')[0] for n in set(sys.modules) - before} - set(sys.stdlib_module_names)));"
        "print('asyncio' in sys.modules)"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split("\n")
    built_in = {"cython_runtime"} | {name for name in found[0].split() if name.startswith("_cython_")}
    assert set(found[0].split()) - built_in <= {"agent", "numpy", "msgpack"}
    assert found[1] == "False"


def test_unknown_names_are_not_invented() -> None:
    import agent.client

    with pytest.raises(AttributeError):
        agent.client.Nothing  # noqa: B018
