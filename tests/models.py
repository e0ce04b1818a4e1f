"""Small real models and handlers for tests, and the engine specs that load them without a store."""

from __future__ import annotations

from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from agent.engine.growth import Bounds
from agent.engine.types import VariantSpec, VersionSpec
from tests.fakes import fickle, hostile

FEATURES = 4


def write_scale_model(path: Path, *, factor: float = 2.0) -> None:
    """Write an ONNX model ``y[N, 4] = factor * x[N, 4]``."""
    path.parent.mkdir(parents=True, exist_ok=True)
    graph = helper.make_graph(
        [helper.make_node("Mul", ["x", "factor"], ["y"])],
        "scale",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", FEATURES])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["N", FEATURES])],
        [numpy_helper.from_array(np.array(factor, dtype=np.float32), "factor")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=10)
    onnx.save(model, str(path))


def write_thinning_model(path: Path, *, factor: float = 2.0) -> None:
    """Write as ``write_scale_model``, but without the columns that are negative in the first row.

    The file does not say how many columns there are.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    constants = {"factor": np.array(factor, np.float32), "zero": np.array(0, np.float32), "first": np.array(0)}
    graph = helper.make_graph(
        [
            helper.make_node("Gather", ["x", "first"], ["row"], axis=0),
            helper.make_node("GreaterOrEqual", ["row", "zero"], ["kept"]),
            helper.make_node("Compress", ["x", "kept"], ["thinned"], axis=1),
            helper.make_node("Mul", ["thinned", "factor"], ["y"]),
        ],
        "thinning",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", FEATURES])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["N", "K"])],
        [numpy_helper.from_array(value, name) for name, value in constants.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=10)
    onnx.save(model, str(path))


HANDLERS: dict[str, str] = {
    # Runs what it is sent.
    "hostile": hostile.SOURCE,
    # Goes wrong when files in its bundle say so.
    "fickle": fickle.SOURCE,
    # Takes its time: the body says how many seconds. Once its bundle holds a file "refuse" no further one starts.
    "slow": '''
import time

import numpy as np

from handlers.base import Handler


class SlowHandler(Handler):
    """Sleeps, then answers."""

    def __init__(self, context):
        super().__init__(context)
        if context.path("refuse").exists():
            raise RuntimeError("asked not to start")

    def preprocess(self, body, content_type):
        time.sleep(float(bytes(body)))
        return {"x": np.ones((1, 4), dtype=np.float32)}

    def postprocess(self, outputs, rows):
        return {"y": outputs["y"].tolist()}
''',
    # As "slow", but a fifth of a second later.
    "late": '''
import time

import numpy as np

from handlers.base import Handler


class LateHandler(Handler):
    """Sleeps for too long, then answers."""

    def preprocess(self, body, content_type):
        time.sleep(float(bytes(body)) + 0.2)
        return {"x": np.ones((1, 4), dtype=np.float32)}

    def postprocess(self, outputs, rows):
        return {"y": outputs["y"].tolist()}
''',
    # Never finishes loading.
    "stuck": '''
import time

from handlers.base import Handler


class StuckHandler(Handler):
    """Hangs in its constructor."""

    def __init__(self, context):
        super().__init__(context)
        while True:
            time.sleep(3600)

    def preprocess(self, body, content_type):
        return {}

    def postprocess(self, outputs, rows):
        return None
''',
    # Answers a JSON number list; a body can make it misbehave.
    "odd": '''
import json
import os
import signal
import time

import numpy as np

from handlers.base import Handler, InputError


class OddHandler(Handler):
    """Does what its input says: fail, die, hang, or answer."""

    def preprocess(self, body, content_type):
        text = bytes(body).decode()
        if text == "raise":
            raise RuntimeError("asked to fail")
        if text == "refuse":
            raise InputError("asked to refuse")
        if text == "die":
            os.kill(os.getpid(), signal.SIGKILL)
        if text == "hang":
            while True:
                time.sleep(3600)
        return {"x": np.array([json.loads(text)], dtype=np.float32)}

    def postprocess(self, outputs, rows):
        return {"y": outputs["y"].tolist()}
''',
    # Passes its self-test, which asks the model alone, and then does what its bundle's file "how" says to any body.
    "broken": '''
import os
import signal
import time

from handlers.base import Handler


class BrokenHandler(Handler):
    """Raises, dies or hangs."""

    def preprocess(self, body, content_type):
        how = self.context.path("how").read_text()
        if how == "die":
            os.kill(os.getpid(), signal.SIGKILL)
        if how == "hang":
            time.sleep(3600)
        raise RuntimeError("broken")

    def postprocess(self, outputs, rows):
        return None
''',
    # Streams what its body says, and counts in memory what became of its generators.
    "steps": '''
import json
import os
import signal
import time

import numpy as np

from handlers.base import InputError, Prepared, Reply, StreamingHandler


class StepsHandler(StreamingHandler):
    """Doubles x in each step; an item is a text, JSON, bytes, or the outputs."""

    streams_max = 4

    def __init__(self, context):
        super().__init__(context)
        self.opened = self.closed = self.steps = 0

    def preprocess(self, body, content_type):
        asked = json.loads(body)
        if not isinstance(asked, dict):
            raise InputError("an object is expected")
        return Prepared({"x": np.ones((1, 4), dtype=np.float32)}, asked)

    def stream(self, inputs, rows, run, state):
        asked = state or self.context.params
        if asked.get("report"):
            yield {"opened": self.opened, "closed": self.closed, "steps": self.steps}
            return
        self.opened += 1
        try:
            x = inputs["x"]
            for number in range(asked.get("count", 3)):
                if number == asked.get("fail_at"):
                    raise RuntimeError("asked to fail")
                if number == asked.get("refuse_at"):
                    raise InputError("asked to refuse")
                if number == asked.get("die_at"):
                    os.kill(os.getpid(), signal.SIGKILL)
                if number == asked.get("hang_at"):
                    time.sleep(3600)
                if "sleep_s" in asked:
                    time.sleep(asked["sleep_s"])
                outputs = run({"x": x} if number != asked.get("wrong_at") else {"z": x})
                x = outputs["y"]
                self.steps += 1
                yield self.item(asked, number, outputs)
        finally:
            self.closed += 1
            if asked.get("fail_closed"):
                raise RuntimeError("asked to fail when it is closed")

    def item(self, asked, number, outputs):
        match asked.get("kind", "arrays"):
            case "arrays":
                return outputs
            case "text":
                return f"{outputs['y'][0, 0]:.0f} "
            case "json":
                return {"number": number, "y": float(outputs["y"][0, 0])}
            case "bytes":
                return Reply(bytes([number % 256]) * asked.get("size", 3), "application/octet-stream")
            case "nothing":
                return {1, 2}
            case "wide":
                return {"y": outputs["y"].astype(np.float64)}
            case "short":
                return {"y": outputs["y"][:, :3]}
            case "other":
                return {"score": outputs["y"]}
''',
    # Writes to its worker's channel what its bundle or its caller says: a false hello, or a false answer.
    "liar": '''
import json
import os

import msgpack
import numpy as np

from agent.wire import FIRST_ID, encode
from handlers.base import Handler


class LiarHandler(Handler):
    """Speaks for its worker."""

    def __init__(self, context):
        super().__init__(context)
        lie = context.path("lie")
        if lie.exists():
            os.write(3, b"".join(encode({"kind": "hello", **msgpack.unpackb(lie.read_bytes())})))

    def preprocess(self, body, content_type):
        for number in range(FIRST_ID, FIRST_ID + 100):
            os.write(3, b"".join(encode({**json.loads(body), "id": number})))
        return {"x": np.zeros((1, 4), dtype=np.float32)}

    def postprocess(self, outputs, rows):
        return {}
''',
}


def worker_spec(folder: Path, *, version: str, variant: str, entry: str, handler: dict[str, Any]) -> dict[str, Any]:
    """Return what a worker is told about a variant of the scale model in ``folder``."""
    return {
        "model": "scale",
        "version": version,
        "variant": variant,
        "runtime": "onnxruntime",
        "precision": "fp32",
        "device": {"kind": "cpu", "index": 0},
        "providers": ["CPUExecutionProvider"],
        "bundle_dir": str(folder),
        "entry": entry,
        "handler": handler,
        "signature": {
            "inputs": [{"name": "x", "dtype": "float32", "shape": ["N", FEATURES]}],
            "outputs": [{"name": "y", "dtype": "float32", "shape": ["N", FEATURES]}],
            "dims": {},
        },
        "classes_file": None,
        "golden": [],
        "warmup": {"runs": 1, "max_ms": 1000},
        "batching": {"max_batch": 4, "max_delay_ms": 0, "axis": "N"},
        "threads": {"intra": 1, "inter": 1},
        "limits": {"memory_bytes": 0, "open_files": 256},
        "sandbox": "enforce",
        "wire": {"header_bytes_max": 65536, "body_bytes_max": 1 << 22},
    }


def scale_version(
    folder: Path,
    *,
    version: str = "1.0.0",
    factors: tuple[float | None, ...] = (2.0,),
    handler: str | None = None,
    window: int = 64,
    bounds: Bounds | None = None,
) -> VersionSpec:
    """Write a bundle folder and return its spec; one variant per factor, ``None`` = a model file that is rubbish."""
    variants = []
    spec: dict[str, Any] = {"id": "tensors/v1", "params": {}}
    if handler is not None:
        (folder / "handler.py").parent.mkdir(parents=True, exist_ok=True)
        (folder / "handler.py").write_text(HANDLERS[handler])
        spec = {"module": "handler.py", "class": f"{handler.title()}Handler", "params": {}}
    for index, factor in enumerate(factors):
        entry = f"v{index}/model.onnx"
        if factor is None:
            (folder / entry).parent.mkdir(parents=True, exist_ok=True)
            (folder / entry).write_bytes(b"this is no model")
        else:
            write_scale_model(folder / entry, factor=factor)
        worker = worker_spec(folder, version=version, variant=f"v{index}", entry=entry, handler=spec)
        variants.append(
            VariantSpec(
                id=f"v{index}",
                runtime="onnx",
                precision="fp32",
                device="cpu",
                worker=worker,
                window=window,
                bounds=bounds or Bounds(),
            )
        )
    digest = sha256(f"{folder} {version}".encode()).hexdigest()
    return VersionSpec(model="scale", version=version, digest=digest, variants=tuple(variants))
