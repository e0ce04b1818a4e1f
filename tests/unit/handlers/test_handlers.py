"""Built-in handlers, their registry, and the tool that tries a handler without a daemon."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from handlers import registry, testing
from handlers.base import Context, Handler, InputError, Prepared, Reply, StreamingHandler
from handlers.tensors import TensorsHandler
from handlers.windows import WindowsHandler
from tests.fakes import models

SIGNATURE = {
    "inputs": [
        {"name": "a", "dtype": "float32", "shape": ["N", 2]},
        {"name": "n", "dtype": "uint8", "shape": ["N"]},
        {"name": "t", "dtype": "bytes", "shape": ["N"]},
    ],
    "outputs": [{"name": "y", "dtype": "float32", "shape": ["N"]}],
}
GOOD = {"a": [[1, 2.5]], "n": [7], "t": ["text"]}


def context(signature: Any = SIGNATURE, **fields: Any) -> Context:
    return Context(**{"bundle_dir": Path("/b"), "params": {}, "classes": None, "signature": signature} | fields)


def ask(document: Any, content_type: str = "application/json", signature: Any = SIGNATURE) -> Any:
    body = document if isinstance(document, bytes) else json.dumps(document).encode()
    return TensorsHandler(context(signature)).preprocess(body, content_type)


def test_json_becomes_arrays_of_the_signatures_dtypes() -> None:
    arrays = ask({"inputs": GOOD}, "application/json; charset=utf-8")
    assert arrays["a"].dtype == np.float32
    assert arrays["a"].tolist() == [[1.0, 2.5]]
    assert arrays["n"].dtype == np.uint8
    assert arrays["t"].tolist() == ["text"]


def test_bare_lists_are_the_one_input() -> None:
    assert ask([[1, 2]], signature={"inputs": SIGNATURE["inputs"][:1]})["a"].tolist() == [[1.0, 2.0]]


@pytest.mark.parametrize(
    ("document", "words"),
    [
        (b"{", "not JSON"),
        (b"[" * 100_000, "not JSON"),
        (b'{"inputs": NaN}', "not JSON"),
        ([[1, 2]], "expected"),
        ({}, "expected"),
        ({"inputs": {"a": [[1, 2]]}}, "inputs ['a'] given, the model takes ['a', 'n', 't']"),
        ({"inputs": GOOD | {"a": [[1, 2], [3]]}}, "input 'a': lists of unequal length"),
        ({"inputs": GOOD | {"a": [[1, 2, 3]]}}, "input 'a': shape [1, 3], expected ['N', 2]"),
        ({"inputs": GOOD | {"a": [1, 2]}}, "input 'a': shape [2]"),
        ({"inputs": GOOD | {"a": [["1", "2"]]}}, "input 'a': expected float32"),
        ({"inputs": GOOD | {"n": [256]}}, "input 'n': a value does not fit uint8"),
        ({"inputs": GOOD | {"n": [1.5]}}, "input 'n': expected uint8"),
        ({"inputs": GOOD | {"t": [1]}}, "input 't': expected texts"),
    ],
)
def test_bad_json_is_refused_with_what_was_expected(document: Any, words: str) -> None:
    with pytest.raises(InputError) as caught:
        ask(document)
    assert words in str(caught.value)


def test_only_json_is_taken() -> None:
    with pytest.raises(InputError, match="takes application/json, not 'image/png'"):
        ask(GOOD, "image/png")


def test_outputs_become_lists_and_what_json_lacks_becomes_null() -> None:
    answer = TensorsHandler(context()).postprocess({"y": np.array([1.5, np.nan, np.inf], np.float32)}, 3)
    assert answer == {"outputs": {"y": [1.5, None, None]}}
    json.dumps(answer, allow_nan=False)


@pytest.mark.parametrize("handler_id", registry.BUILT_IN)
def test_every_built_in_handler_can_be_found(handler_id: str) -> None:
    assert issubclass(registry.find(handler_id), Handler)


def test_an_unknown_id_is_refused_with_the_known() -> None:
    with pytest.raises(KeyError, match="tensors/v1"):
        registry.find("nothing/v1")


def test_a_context_gives_paths_inside_the_bundle_only(tmp_path: Path) -> None:
    assert context(bundle_dir=tmp_path).path("a/b") == tmp_path.resolve() / "a" / "b"
    with pytest.raises(ValueError, match="outside the bundle"):
        context(bundle_dir=tmp_path).path("../x")


# streaming


class Streaming(StreamingHandler):
    """Answers with what its body says."""

    def preprocess(self, body: bytes, content_type: str) -> Any:
        return {"x": np.ones((1, 4), np.float32)}

    def stream(self, inputs: Any, rows: int, run: Any, state: Any) -> Any:
        yield "a"
        yield run(inputs)
        if state is None:
            run({"z": inputs["x"]})


def test_items_are_joined_by_their_kind() -> None:
    handler = Streaming(context())
    assert handler.joined(["a", "b"]) == Reply(b"ab", "text/plain; charset=utf-8")
    assert handler.joined([Reply(b"a", "x/y"), Reply(b"b", "x/y")]) == Reply(b"ab", "x/y")
    assert handler.joined(["a", {"b": 1}]) == ["a", {"b": 1}]
    mixed = [Reply(b"a", "x/y"), Reply(b"b", "x/z")]
    assert handler.joined(mixed) == mixed
    assert handler.joined([]) == []


def test_arrays_become_lists_unless_the_handler_says_otherwise() -> None:
    assert Streaming(context()).postprocess({"y": np.eye(2, dtype=np.int64)}, 2) == {"y": [[1, 0], [0, 1]]}


# windows/v1

MONO = {
    "inputs": [{"name": "x", "dtype": "float32", "shape": ["N", 4]}],
    "outputs": [{"name": "y", "dtype": "float32", "shape": ["N", 4]}],
}


def windows_of(body: bytes, **params: Any) -> list[tuple[int, list[float]]]:
    handler = WindowsHandler(context(MONO, params=params))
    parts = testing.parts(handler, lambda inputs: {"y": inputs["x"]}, body, "application/octet-stream")
    return [(part["start"], part["outputs"]["y"]) for part in parts]


def test_a_signal_is_answered_window_by_window() -> None:
    signal = np.arange(1, 7, dtype=np.float32)
    assert windows_of(signal.tobytes()) == [(0, [1, 2, 3, 4]), (4, [5, 6, 0, 0])]
    assert windows_of(signal.tobytes(), hop=2) == [(0, [1, 2, 3, 4]), (2, [3, 4, 5, 6])]
    assert windows_of(signal.astype("<i2").tobytes(), samples="int16", scale=0.5)[1] == (4, [2.5, 3, 0, 0])
    assert windows_of(signal[:2].tobytes()) == [(0, [1, 2, 0, 0])]
    assert windows_of(np.array([np.nan], np.float32).tobytes()) == [(0, [None, 0, 0, 0])]
    for body in (b"", b"12345"):
        with pytest.raises(InputError, match="expected float32 samples"):
            windows_of(body)


def test_rows_of_tensors_are_windows_too() -> None:
    handler = WindowsHandler(context(MONO))
    rows = np.eye(2, 4, dtype=np.float32)
    items = list(handler.stream({"x": rows}, 2, lambda inputs: {"y": inputs["x"]}, None))
    assert [(item["start"], item["outputs"]["y"]) for item in items] == [(0, [1, 0, 0, 0]), (1, [0, 1, 0, 0])]


@pytest.mark.parametrize(
    ("signature", "params"),
    [(SIGNATURE, {}), (MONO | {"inputs": [MONO["inputs"][0] | {"shape": ["N", "T"]}]}, {}), (MONO, {"hop": 0})],
)
def test_what_has_no_windows_is_refused_when_it_is_loaded(signature: Any, params: dict[str, Any]) -> None:
    with pytest.raises(ValueError):
        WindowsHandler(context(signature, params=params))


# handlers.testing


class Stateful(Handler):
    """Answers with what it remembered."""

    def preprocess(self, body: bytes, content_type: str) -> Any:
        if body == b"list":
            return [1]
        if body == b"names":
            return {"q": np.zeros((1, 4), np.float32)}
        if body == b"rows":
            return {"x": np.zeros((0, 4), np.float32)}
        return Prepared({"x": np.ones((1, 4), np.float32)}, body)

    def postprocess(self, outputs: Any, rows: int) -> Any:
        raise AssertionError("not for prepared requests")

    def postprocess_with(self, outputs: Any, rows: int, state: Any) -> Any:
        return Reply(state, "text/plain") if state == b"reply" else {"rows": rows, "state": state.decode()}


@pytest.fixture
def model(tmp_path: Path) -> Path:
    onnx.save(models.linear(), tmp_path / "model.onnx")
    return tmp_path / "model.onnx"


def test_a_handler_can_be_tried_on_a_real_model(model: Path) -> None:
    run, signature = testing.load_model(model)
    assert signature["inputs"] == [{"name": "x", "dtype": "float32", "shape": ["N", 4]}]
    handler = Stateful(context(signature))
    assert testing.answer(handler, run, b"hello", "text/plain") == {"rows": 1, "state": "hello"}
    assert testing.answer(handler, run, b"reply", "text/plain") == Reply(b"reply", "text/plain")
    for body in (b"list", b"names", b"rows"):
        with pytest.raises(ValueError, match="preprocess returned"):
            testing.answer(handler, run, body, "text/plain")


def test_a_streaming_handler_can_be_tried_too(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, signature = testing.load_model(model)
    parts = testing.parts(Streaming(context(signature)), run, b"", "text/plain")
    assert next(parts) == "a"
    assert len(next(parts)["y"][0]) == 3
    with pytest.raises(ValueError, match=r"stream ran the model on inputs \['z'\]"):
        next(parts)
    file = model.parent / "steps.py"
    file.write_text(STREAMER)
    command = ["--model", str(model), "--handler", f"{file}:Counter", str(model.parent / "steps.py")]
    assert testing.main(command) == 0
    assert [line.partition(" ")[2] for line in capsys.readouterr().out.splitlines()] == ['[0]: "0"', '[1]: "1"']
    handler = testing.load_handler(f"{file}:Counter", context(signature))
    assert testing.answer(handler, run, b"", "a/b") == Reply(b"01", "text/plain; charset=utf-8")


def next_byte() -> onnx.ModelProto:
    """Scores for the byte after ``context``: the letter after its last one, and nothing after ``e``."""
    table = np.eye(256, k=1, dtype=np.float32)
    table[ord("e")] = np.eye(256, dtype=np.float32)[0]
    nodes = [
        helper.make_node("Gather", ["context", "last"], ["byte"], axis=1),
        helper.make_node("Cast", ["byte"], ["index"], to=TensorProto.INT64),
        helper.make_node("Gather", ["table", "index"], ["scores"]),
    ]
    graph = helper.make_graph(
        nodes,
        "next",
        [helper.make_tensor_value_info("context", TensorProto.UINT8, ["N", 16])],
        [helper.make_tensor_value_info("scores", TensorProto.FLOAT, ["N", 256])],
        [numpy_helper.from_array(table, "table"), numpy_helper.from_array(np.array(15, dtype=np.int64), "last")],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=10)


def test_the_example_of_the_documentation_writes(tmp_path: Path) -> None:
    page = (Path(__file__).parents[3] / "docs/handlers.md").read_text()
    (example,) = (block for block in re.findall(r"```python\n(.*?)```", page, re.DOTALL) if "class Writer" in block)
    (tmp_path / "writer.py").write_text(example)
    onnx.save(next_byte(), str(tmp_path / "model.onnx"))
    run, signature = testing.load_model(tmp_path / "model.onnx")
    writer = testing.load_handler(f"{tmp_path / 'writer.py'}:Writer", context(signature))
    assert isinstance(writer, StreamingHandler)
    assert list(testing.parts(writer, run, b'{"text_input": "once a"}', "application/json")) == ["b", "c", "d", "e"]
    asked = b'{"text_input": "a", "parameters": {"max_tokens": 2}}'
    assert testing.answer(writer, run, asked, "application/json") == Reply(b"bc", "text/plain; charset=utf-8")
    with pytest.raises(InputError, match="expected"):
        testing.answer(writer, run, b"[]", "application/json")


STREAMER = """
import numpy as np
from handlers.base import StreamingHandler
class Counter(StreamingHandler):
    def preprocess(self, body, content_type):
        return {"x": np.ones((1, 4), np.float32)}
    def stream(self, inputs, rows, run, state):
        yield from "01"
"""


def test_the_command_answers_each_file(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good, bad = model.parent / "good.json", model.parent / "bad.json"
    good.write_text('{"inputs": {"x": [[0, 0, 0, 0]]}}')
    bad.write_text("{")
    command = ["--model", str(model), "--handler", "tensors/v1"]
    assert testing.main([*command, str(good)]) == 0
    assert '{"outputs": {"y": [[0.0, 0.0, 0.0]]}}' in capsys.readouterr().out
    assert testing.main([*command, str(good), str(bad)]) == 1
    assert "refused: not JSON" in capsys.readouterr().out


def test_a_handler_file_is_loaded_by_path(tmp_path: Path) -> None:
    file = tmp_path / "handler.py"
    file.write_text("from handlers.tensors import TensorsHandler\nclass Mine(TensorsHandler): pass\nOther = 3\n")
    assert type(testing.load_handler(f"{file}:Mine", context())).__name__ == "Mine"
    for name in (f"{file}:Other", f"{file}:Absent", "absent.py:X", "nothing"):
        with pytest.raises(ValueError, match="handler"):
            testing.load_handler(name, context())


NEEDY = """
from handlers.base import Handler
class Needy(Handler):
    def __init__(self, context):
        super().__init__(context)
        self.threshold = context.params["threshold"]
    def preprocess(self, body, content_type):
        return {}
    def postprocess(self, outputs, rows):
        return None
"""


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"--model": "/nowhere/model.onnx"}, "No such file or directory: '/nowhere/model.onnx'"),
        ({"--model": "HANDLER"}, "handler.py: "),
        ({"--handler": "/nowhere/handler.py:Needy"}, "neither a built-in handler nor FILE.py:CLASS"),
        ({"--handler": "HANDLER:Absent"}, "has no class 'Absent'"),
        ({"--handler": "HANDLER:Needy"}, "Needy cannot be made with --params {}: KeyError: 'threshold'"),
        ({"--params": "{"}, "argument --params"),
        ({"--params": "[1]"}, "argument --params"),
        ({"--classes": "/nowhere/classes.txt"}, "No such file or directory: '/nowhere/classes.txt'"),
        ({"input": "/nowhere/input.json"}, "No such file or directory: '/nowhere/input.json'"),
    ],
)
def test_what_cannot_be_tried_is_told_without_a_traceback(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], change: dict[str, str], message: str
) -> None:
    model, handler, body = tmp_path / "model.onnx", tmp_path / "handler.py", tmp_path / "body.json"
    onnx.save(models.linear(), str(model))
    handler.write_text(NEEDY)
    body.write_text("{}")
    options = {"--model": str(model), "--handler": "tensors/v1", "input": str(body)} | {
        name: value.replace("HANDLER", str(handler)) for name, value in change.items()
    }
    given = options.pop("input")
    with pytest.raises(SystemExit) as ended:
        testing.main([*(word for pair in options.items() for word in pair), given])
    assert ended.value.code == 2
    assert message in capsys.readouterr().err
