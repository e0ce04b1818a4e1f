"""``make bench``: a fresh daemon with a tiny real model, measured by ``tools.loadgen`` and by its cold starts.

The model is an MLP of 64 inputs and 8 outputs, about ten microseconds of compute, so that what is measured is ours.
Results are printed and written into a folder: ``report.txt``, ``report.json``, ``latency.png``.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Final

import click
import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from agent.tensors import Array
from tools.demo import magika
from tools.demo.stage import Stage
from tools.hub import safetensors

MODEL: Final = "tiny"
_INPUTS, _HIDDEN, _OUTPUTS = 64, 64, 8
_DESCRIPTION: Final = f"""\
team = "{magika.TEAM}"
name = "{MODEL}"
version = "1.0.0"
handler = {{ id = "tensors/v1" }}
batching = {{ axis = "N", max_batch = 32 }}

[signature]
inputs = [{{ name = "x", dtype = "float32", shape = ["N", {_INPUTS}] }}]
outputs = [{{ name = "y", dtype = "float32", shape = ["N", {_OUTPUTS}] }}]
dims = {{ N = {{ min = 1, max = 32 }} }}

[[variants]]
id = "cpu-fp32"
entry = "model.onnx"
precision = "fp32"
priority = 10

[[golden]]
id = "g"
inputs = "in.safetensors"
outputs = "out.safetensors"
compare = [{{ output = "y", metric = "allclose", rtol = 1e-4, atol = 1e-5 }}]
"""


def write_tiny_model(folder: Path) -> Path:
    """Write the sources of the tiny model's bundle; return its ONNX file."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    first = rng.normal(0, 0.1, (_INPUTS, _HIDDEN)).astype(np.float32)
    second = rng.normal(0, 0.1, (_HIDDEN, _OUTPUTS)).astype(np.float32)
    graph = helper.make_graph(
        [
            helper.make_node("MatMul", ["x", "first"], ["h"]),
            helper.make_node("Relu", ["h"], ["r"]),
            helper.make_node("MatMul", ["r", "second"], ["y"]),
        ],
        MODEL,
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", _INPUTS])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["N", _OUTPUTS])],
        [numpy_helper.from_array(first, "first"), numpy_helper.from_array(second, "second")],
    )
    path = folder / "model.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=10), str(path))
    x = rng.normal(0, 1, (4, _INPUTS)).astype(np.float32)
    (folder / "in.safetensors").write_bytes(safetensors.dump({"x": x}))
    (folder / "out.safetensors").write_bytes(safetensors.dump({"y": np.maximum(x @ first, 0) @ second}))
    (folder / "model.toml").write_text(_DESCRIPTION)
    return path


def cold_starts_s(stage: Stage, count: int) -> list[float]:
    """Return seconds from process start to the first answer, from the box's disk; the daemon runs afterwards."""
    inputs = {"x": np.zeros((1, _INPUTS), np.float32)}
    found = []
    for _ in range(count):
        stage.stop_daemon()
        began = time.monotonic()
        stage.start_daemon()
        _await_answer(stage, inputs)
        found.append(time.monotonic() - began)
    return found


def _add_cold_starts(results: Path, times: list[float]) -> None:
    median = statistics.median(times)
    line = f"Cold start, process start to first answer: median {median:.2f} s of " + ", ".join(
        f"{s:.2f}" for s in times
    )
    click.echo(line)
    with (results / "report.txt").open("a") as file:
        file.write(f"\n{line}\n")
    path = results / "report.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "cold_starts_s": times}, indent=1) + "\n")


def _await_answer(stage: Stage, inputs: dict[str, Array]) -> None:
    with stage.client() as client:
        stage.until(lambda: client.infer(MODEL, inputs), what="the first answer")


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--state", type=click.Path(path_type=Path), default=Path(".state/bench"), show_default=True)
@click.option("--repetitions", default=5, show_default=True, help="Interleaved repetitions; medians are reported.")
@click.option("--seconds", default=1.0, show_default=True, help="Per way and repetition.")
@click.option("--results", type=click.Path(path_type=Path), help="Folder of the results.  [default: STATE/results]")
@click.option("--rate", default=500.0, show_default=True, help="Of the open loop, requests a second; 0: none.")
@click.option("--starts", default=5, show_default=True, help="Cold starts to time.")
def main(state: Path, repetitions: int, seconds: float, results: Path | None, rate: float, starts: int) -> None:
    """Measure inferd against in-process inference of the same model, in one run."""
    with Stage(state, fresh=True) as stage:
        click.echo("preparing a store and a box …", err=True)
        stage.make_store()
        model_file = write_tiny_model(stage.folder / "sources" / MODEL)
        bundle = stage.folder / "bundles" / MODEL
        stage.hub("pack", model_file.parent, "--out", bundle)
        stage.publish(bundle, "--channel", "stable")
        stage.write_config(store_url=stage.store.as_uri(), broker_port=None, models=(MODEL,))
        stage.start_daemon()
        stage.until(
            lambda: not stage.status()["slots"][0]["trial"] and stage.status()["slots"][0]["active"], what="ready"
        )
        times = cold_starts_s(stage, starts)
        results = results or state / "results"
        assert stage.daemon is not None
        command = [
            *(sys.executable, "-m", "tools.loadgen", "--socket", str(stage.socket)),
            *("--http", f"http://127.0.0.1:{stage.http_port}", "--model", MODEL, "--model-file", str(model_file)),
            *("-c", "1", "-c", "32", "--repetitions", str(repetitions), "--seconds", str(seconds)),
            *("--rate", str(rate)),
            *("--pid", str(stage.daemon.pid), "--results", str(results), "--build", str(stage.folder / "build")),
        ]
        code = subprocess.run(command, check=False).returncode
        if times:
            _add_cold_starts(results, times)
    sys.exit(code)


if __name__ == "__main__":
    main()
