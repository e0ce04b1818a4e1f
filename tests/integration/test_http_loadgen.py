"""The load generator against running listeners: every way is measured, failures are not hidden. No time is judged."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import onnx
import pytest
from onnx import TensorProto, helper

from tests.fakes.edges import Edges, edges, run
from tests.fakes.engine import FakeState
from tools.bench_native import Native, NativeError, build, over_http, over_unix
from tools.bench_ways import Http, Work, random_inputs

pytestmark = pytest.mark.integration

needs_compiler = pytest.mark.skipif(shutil.which("cc") is None, reason="there is no C compiler")
CLOSED_1, CLOSED_4 = "closed loop, 1 outstanding", "closed loop, 4 outstanding"


@pytest.fixture
def model_file(tmp_path: Path) -> Path:
    ports = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", 4]) for name in ("x", "y")]
    graph = helper.make_graph([helper.make_node("Relu", ["x"], ["y"])], "g", ports[:1], ports[1:])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)])
    model.ir_version = 9
    onnx.save(model, str(tmp_path / "model.onnx"))
    return tmp_path / "model.onnx"


async def loadgen(served: Edges, model_file: Path, *more: str, path: str | None = None) -> tuple[int, str]:
    arguments = ["--socket", str(served.frame_path), "--http", f"http://127.0.0.1:{served.port}", "--model", "echo"]
    arguments += ["--model-file", str(model_file), "--seconds", "0.02", "--repetitions", "2", *more]
    child = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "tools.loadgen",
        *arguments,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        env={**os.environ, "PATH": os.environ["PATH"] if path is None else path},
    )
    stdout, stderr = await child.communicate()
    assert child.returncode is not None
    return child.returncode, stdout.decode() or stderr.decode()


def test_every_way_is_measured_beside_the_yardsticks(tmp_path: Path, model_file: Path) -> None:
    async def test() -> None:
        async with edges(tmp_path) as served:
            more = ("-c", "1", "-c", "4", "--rate", "200", "--body", str(model_file), "--json")
            code, text = await loadgen(served, model_file, *more)
            assert code == 0, text
            found: dict[str, Any] = json.loads(text)
            ways = {"unix tensors", "http binary", "unix raw", "http raw"}
            echoes = {"echo floor", "echo, one core"} if len(os.sched_getaffinity(0)) > 1 else {"echo, one core"}
            seen: dict[str, set[str]] = {}
            for row in found["figures"]:
                if row["way"] == "lane tensors":  # these listeners grant none
                    assert row.keys() == {"load", "way", "skipped"}
                    assert row["skipped"].startswith("lane not granted: ")
                    continue
                seen.setdefault(row["load"], set()).add(row["way"])
                assert row["rate_s"] > 0
                assert row["errors"] == {}
                assert 0 < row["quantiles_us"]["0"] <= row["p50_us"] <= row["p99_us"] <= row["quantiles_us"]["100"]
                assert row["cpu_us"]["client"] > 0
                if "echo floor" in echoes:
                    beside = row["way"] != "echo floor" and row["load"] != "open loop, 200/s"
                    assert ("over_floor_us" in row) == beside
            measured = ways | {"in-process"} | echoes
            assert seen == {CLOSED_1: measured, CLOSED_4: measured, "open loop, 200/s": ways}
            assert found["left_out"] == []
            assert (found["processes"][0]["pid"], found["processes"][0]["role"]) == (os.getpid(), "daemon")
            assert found["processes"][0]["pss_bytes"] > 0

    run(test)


def test_failed_requests_fail_the_run(tmp_path: Path, model_file: Path) -> None:
    async def test() -> None:
        async with edges(tmp_path) as served:
            served.engine.states["echo"] = FakeState(ready=False, reason="loading")
            code, text = await loadgen(served, model_file, "--json")
            assert code == 1
            rows = {row["way"]: row for row in json.loads(text)["figures"]}
            assert rows["unix tensors"]["errors"]["unavailable"] > 0
            assert rows["http binary"]["errors"]["http"] > 0
            assert rows["in-process"]["errors"] == {}

    run(test)


@needs_compiler
def test_many_outstanding_are_asked_in_c_and_the_results_written(tmp_path: Path, model_file: Path) -> None:
    async def test() -> None:
        async with edges(tmp_path) as served:
            results = tmp_path / "results"
            more = ("-c", "1", "-c", "4", "--build", str(tmp_path / "build"), "--results", str(results))
            code, text = await loadgen(served, model_file, *more)
            assert code == 0, text
            assert (results / "report.txt").read_text().strip() == text.strip()
            assert "lane native: lane not granted: " in text
            found = json.loads((results / "report.json").read_text())
            native = [row for row in found["figures"] if row["way"].endswith(" native") and "skipped" not in row]
            assert [(row["load"], row["way"]) for row in native] == [
                (CLOSED_1, "unix native"),
                (CLOSED_1, "http native"),
                (CLOSED_4, "unix native"),
                (CLOSED_4, "http native"),
            ]
            for row in native:
                assert row["rate_s"] > 0
                assert 0 < row["quantiles_us"]["0"] <= row["p50_us"] <= row["p99_us"] <= row["quantiles_us"]["100"]

    run(test)


def test_a_missing_compiler_is_said(tmp_path: Path, model_file: Path) -> None:
    async def test() -> None:
        async with edges(tmp_path) as served:
            more = ("-c", "4", "--build", str(tmp_path / "build"), "--json")
            code, text = await loadgen(served, model_file, *more, path=str(tmp_path))
            assert code == 0, text
            (line,) = json.loads(text)["left_out"]
            assert "no C compiler" in line

    run(test)


@needs_compiler
def test_the_generator_in_c_counts_errors_and_stays_in_its_bounds(tmp_path: Path, model_file: Path) -> None:
    async def test() -> None:
        work = Work(model="echo", inputs=random_inputs(model_file, rows=1, open_dim=1))
        program = build(tmp_path)
        assert build(tmp_path) == program
        async with edges(tmp_path) as served:
            ways = [over_unix(program, served.frame_path, work)]
            ways.append(over_http(program, Http(f"http://127.0.0.1:{served.port}", work)))

            async def closed(way: Native, **bounds: int) -> Any:
                return await asyncio.to_thread(way.closed, **{"callers": 6, "connections": 4, **bounds}, seconds=0.02)

            for way, error in zip(ways, ("unavailable", "503"), strict=True):
                before = served.engine.answers
                sample = await closed(way)
                assert served.engine.answers - before == sample.asked
                assert 0 < sample.answers <= sample.asked
                assert not sample.errors
                served.engine.states["echo"] = FakeState(ready=False, reason="loading")
                sample = await closed(way)
                assert (sample.answers, set(sample.errors)) == (0, {error})
                served.engine.states["echo"] = FakeState()
        with pytest.raises(NativeError, match=r"No such file|refused"):
            await closed(ways[0])

    run(test)


@needs_compiler
@pytest.mark.parametrize(
    "arguments", [(), ("--unix", "x"), ("--unix", "x", "--request", "/dev/null"), ("--depth", "0")]
)
def test_the_generator_in_c_refuses_wrong_arguments(tmp_path: Path, arguments: tuple[str, ...]) -> None:
    way = Native(name="x", program=build(tmp_path), arguments=arguments, request=b"", spread=False)
    with pytest.raises(NativeError, match="loadgen: "):
        way.closed(callers=1, connections=1, seconds=0.01)
