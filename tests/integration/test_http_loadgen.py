"""The load generator against running listeners: every way is measured, failures are not hidden. No time is judged."""

from __future__ import annotations

import asyncio
import json
import os
import sys
from pathlib import Path
from typing import Any

import onnx
import pytest
from onnx import TensorProto, helper

from tests.fakes.edges import Edges, edges, run
from tests.fakes.engine import FakeState

pytestmark = pytest.mark.integration


@pytest.fixture
def model_file(tmp_path: Path) -> Path:
    ports = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", 4]) for name in ("x", "y")]
    graph = helper.make_graph([helper.make_node("Relu", ["x"], ["y"])], "g", ports[:1], ports[1:])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)])
    model.ir_version = 9
    onnx.save(model, str(tmp_path / "model.onnx"))
    return tmp_path / "model.onnx"


async def loadgen(served: Edges, model_file: Path, *more: str) -> tuple[int, str]:
    arguments = ["--socket", str(served.frame_path), "--http", f"http://127.0.0.1:{served.port}", "--model", "echo"]
    arguments += ["--model-file", str(model_file), "--seconds", "0.02", "--repetitions", "2", "--json", "-", *more]
    child = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "tools.loadgen",
        *arguments,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    stdout, stderr = await child.communicate()
    assert child.returncode is not None
    return child.returncode, stdout.decode() or stderr.decode()


def test_every_way_is_measured_beside_the_yardsticks(tmp_path: Path, model_file: Path) -> None:
    async def test() -> None:
        async with edges(tmp_path) as served:
            more = ("-c", "1", "-c", "4", "--rate", "200", "--body", str(model_file))
            code, text = await loadgen(served, model_file, *more)
            assert code == 0, text
            found: dict[str, Any] = json.loads(text)
            ways = {"unix tensors", "http binary", "unix raw", "http raw"}
            seen: dict[str, set[str]] = {}
            for row in found["figures"]:
                seen.setdefault(row["load"], set()).add(row["way"])
                assert row["rate_s"] > 0
                assert row["errors"] == 0
            measured = ways | {"in-process", "echo floor"}
            assert seen == {"closed, 1": measured, "closed, 4": measured, "open, 200/s": ways}
            assert found["processes"][0]["pid"] == os.getpid()
            assert found["processes"][0]["pss_bytes"] > 0

    run(test)


def test_failed_requests_fail_the_run(tmp_path: Path, model_file: Path) -> None:
    async def test() -> None:
        async with edges(tmp_path) as served:
            served.engine.states["echo"] = FakeState(ready=False, reason="loading")
            code, text = await loadgen(served, model_file)
            assert code == 1
            rows = {row["way"]: row for row in json.loads(text)["figures"]}
            assert rows["unix tensors"]["errors"] > 0
            assert rows["http binary"]["errors"] > 0
            assert rows["in-process"]["errors"] == 0

    run(test)
