"""Try a handler on a real model without a daemon, a bundle or a sandbox: for authors of handlers.

``python -m handlers.testing --model model.onnx --handler handler.py:MyHandler [--params JSON] [--classes FILE] INPUT…``
runs each input file through ``preprocess``, the model (ONNX Runtime on the CPU) and ``postprocess`` and prints the
answers, one line each. The same from a test: ``answer(handler, run, body, content_type)``.

Promises: the calls a worker makes, in its order, with the checks of a worker that concern the author: tensors named
and shaped as the model's inputs, equal rows, a JSON-able answer.
Leaves out: isolation. Code that only runs here may be refused by the sandbox of a box.
"""

from __future__ import annotations

import argparse
import errno
import importlib.util
import json
import mimetypes
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from handlers import registry
from handlers.base import Array, Context, Handler, InputError, Json, Prepared, Reply, Run, StreamingHandler

_ORT_DTYPES = {"float": "float32", "double": "float64", "string": "bytes"}


def answer(handler: Handler, run: Run, body: bytes, content_type: str) -> Json | Reply:
    """Return the handler's answer to one request.

    Raises:
        InputError: the handler refuses the input.
        ValueError: the handler broke its contract; the message says where.
    """
    if isinstance(handler, StreamingHandler):
        return _checked(handler.joined(list(parts(handler, run, body, content_type))))
    made, given, rows = _prepared(handler, body, content_type)
    return _checked(_post(handler, made, run(given), rows))


def parts(handler: StreamingHandler, run: Run, body: bytes, content_type: str) -> Iterator[Json | Reply]:
    """Yield the parts of a streaming handler's answer to one request; raises as ``answer``."""
    made, given, rows = _prepared(handler, body, content_type)

    def checked_run(inputs: Mapping[str, Array]) -> Mapping[str, Array]:
        _check(handler, inputs, "stream ran the model on")
        return run(inputs)

    for item in handler.stream(given, rows, checked_run, made.state if isinstance(made, Prepared) else None):
        if isinstance(item, dict) and item and all(hasattr(value, "dtype") for value in item.values()):
            first = next(iter(item.values()))
            yield _checked(_post(handler, made, item, len(first) if first.ndim else 1))
        else:
            yield _checked(item)


def load_model(path: Path) -> tuple[Run, dict[str, Any]]:
    """Return a function that runs an ONNX model on the CPU, and the model's signature.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not an ONNX model; the message is ONNX Runtime's.
    """
    if not path.is_file():
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(path))
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")  # read when the library is imported
    import onnxruntime  # authors' machines have it; boxes never come here

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    try:
        session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # ONNX Runtime's classes derive from Exception alone
        raise ValueError(f"{path}: {error}") from error
    names = [node.name for node in session.get_outputs()]

    def run(inputs: Mapping[str, Array]) -> Mapping[str, Array]:
        return dict(zip(names, session.run(names, dict(inputs)), strict=True))

    return run, {"inputs": _nodes(session.get_inputs()), "outputs": _nodes(session.get_outputs())}


def load_handler(name: str, context: Context) -> Handler:
    """Return the handler of a built-in id (``tensors/v1``) or of ``file.py:Class``.

    Raises:
        ValueError: no such file or class, not a ``Handler``, or its constructor refuses the context.
    """
    if name in registry.BUILT_IN:
        return _made(registry.find(name), context)
    file, _, class_name = name.partition(":")
    importable = importlib.util.spec_from_file_location("inferd_bundle_handler", file)
    if importable is None or importable.loader is None or not Path(file).is_file():
        raise ValueError(f"{name!r} is neither a built-in handler nor FILE.py:CLASS")
    module = importlib.util.module_from_spec(importable)
    importable.loader.exec_module(module)
    found = getattr(module, class_name, None)
    if not isinstance(found, type) or not issubclass(found, Handler):
        raise ValueError(f"{file} has no class {class_name!r} derived from handlers.base.Handler")
    return _made(found, context)


def main(arguments: Sequence[str] | None = None) -> int:
    """Answer each input file on standard output; return 1 if any was refused, 2 if there was nothing to try."""
    parser = argparse.ArgumentParser(prog="handlers.testing", description="Try a handler on a model, in process.")
    parser.add_argument("--model", required=True, type=Path)
    parser.add_argument("--handler", required=True, help="built-in id, or FILE.py:CLASS")
    parser.add_argument("--params", default="{}", type=_json_object, help="JSON object")
    parser.add_argument("--classes", type=Path, help="one label per line")
    parser.add_argument("--content-type", help="default: guessed from each file's name")
    parser.add_argument("inputs", nargs="+", type=Path)
    options = parser.parse_args(arguments)
    try:
        run, signature = load_model(options.model)
        context = Context(
            bundle_dir=options.model.parent,
            params=options.params,
            classes=options.classes.read_text().splitlines() if options.classes else None,
            signature=signature,
        )
        handler = load_handler(options.handler, context)
        bodies = {path: path.read_bytes() for path in options.inputs}
    except (ValueError, OSError) as error:
        parser.error(str(error))
    refused = 0
    for path, body in bodies.items():
        content_type = options.content_type or mimetypes.guess_type(path)[0] or "application/octet-stream"
        try:
            if isinstance(handler, StreamingHandler):
                for number, part in enumerate(parts(handler, run, body, content_type)):
                    print(f"{path} [{number}]: {_shown(part)}")
            else:
                print(f"{path}: {_shown(answer(handler, run, body, content_type))}")
        except InputError as error:
            refused += 1
            print(f"{path}: refused: {error}")
    return 1 if refused else 0


def _made(kind: type[Handler], context: Context) -> Handler:
    try:
        return kind(context)
    except Exception as error:  # the author's code: a missing parameter is a KeyError
        about = f"{kind.__name__} cannot be made with --params {json.dumps(dict(context.params))}"
        raise ValueError(f"{about}: {type(error).__name__}: {error}") from error


def _json_object(text: str) -> dict[str, Any]:
    value = json.loads(text)  # argparse makes a message of its ValueError
    if not isinstance(value, dict):
        raise ValueError(f"{text!r} is not a JSON object")
    return value


def _prepared(handler: Handler, body: bytes, content_type: str) -> tuple[object, Mapping[str, Array], int]:
    made = handler.preprocess(body, content_type)
    given = made.tensors if isinstance(made, Prepared) else made
    return made, given, _check(handler, given, "preprocess returned")


def _post(handler: Handler, made: object, outputs: Mapping[str, Array], rows: int) -> Json | Reply:
    if isinstance(made, Prepared):
        return handler.postprocess_with(outputs, rows, made.state)
    return handler.postprocess(outputs, rows)


def _checked(result: Json | Reply) -> Json | Reply:
    if not isinstance(result, Reply):
        json.dumps(result, allow_nan=False)
    return result


def _check(handler: Handler, given: object, what: str) -> int:
    names = [entry["name"] for entry in handler.context.signature["inputs"]]
    if not isinstance(given, Mapping):
        raise ValueError(f"{what} {type(given).__name__}, not a mapping of arrays by input name")
    if set(given) != set(names):
        raise ValueError(f"{what} inputs {sorted(given)}, the model takes {sorted(names)}")
    rows = {array.shape[0] if array.ndim else 0 for array in given.values()}
    if len(rows) != 1 or 0 in rows:
        raise ValueError(f"{what} inputs of {sorted(rows)} rows; axis 0 must be the same batch, at least 1")
    return int(rows.pop())


def _nodes(nodes: Sequence[Any]) -> list[dict[str, Any]]:
    entries = []
    for node in nodes:
        element = node.type.removeprefix("tensor(").removesuffix(")")
        entries.append({"name": node.name, "dtype": _ORT_DTYPES.get(element, element), "shape": list(node.shape)})
    return entries


def _shown(result: Json | Reply) -> str:
    if isinstance(result, Reply):
        return f"{result.content_type}, {len(result.body)} bytes"
    return json.dumps(result, ensure_ascii=False)


if __name__ == "__main__":
    sys.exit(main())
