"""Real models whose bundle holds variants of both runtimes: packed, published, pulled and served by a real daemon.

Silero's detector comes from its wheel, in the folder that ``INFERD_WHEELS`` names or by pip; the digits' CNN is trained
here. What cannot be had is skipped and said.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest

from tests.box import Box, copy_box
from tests.fakes import torch_models
from tests.fakes.daemon_side import ZygoteProcess
from tools.demo import magika
from tools.hub import safetensors

pytestmark = [pytest.mark.integration, *torch_models.needs_torch]
RELEASE = "6.2.3"
SIGNATURE = """
[signature]
inputs = [
  { name = "input", dtype = "float32", shape = ["N", 576] },
  { name = "state", dtype = "float32", shape = [2, "N", 128] },
  { name = "sr", dtype = "int64", shape = [] },
]
outputs = [
  { name = "output", dtype = "float32", shape = ["N", 1] },
  { name = "stateN", dtype = "float32", shape = [2, "N", 128] },
]
dims = { N = { min = 1, max = 8 } }
"""
TORCH_VARIANT = """
[[variants]]
id = "torch-fp32"
runtime = "torch"
entry = "torch/voice.pt"
precision = "fp32"
priority = 20
trusted_native = true
"""
MODEL_TOML = f"""
team = "{magika.TEAM}"
name = "voice"
version = "%s"
handler = {{ id = "tensors/v1" }}

[[variants]]
id = "onnx-fp32"
entry = "onnx/voice.onnx"
precision = "fp32"
priority = 10
%s
{TORCH_VARIANT}
[[golden]]
id = "tone"
inputs = "golden/in.safetensors"
outputs = "golden/out.safetensors"
compare = [
  {{ output = "output", metric = "max_abs", atol = 1e-4 }},
  {{ output = "stateN", metric = "max_abs", atol = 1e-3 }},
]
{SIGNATURE}
"""
ELSEWHERE = 'device = { kind = "cpu", arch = ["riscv64"] }'


def make(kind: str, folder: Path, *more: Path) -> Path:
    script = Path(__file__).parents[1] / "fakes/torch_real.py"
    done = subprocess.run([sys.executable, script, kind, folder, *more], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture(scope="module")
def voice(tmp_path_factory: pytest.TempPathFactory) -> Path:
    wheels = Path(os.environ.get("INFERD_WHEELS") or Path(__file__).parents[2] / ".state/wheels")
    wheels.mkdir(parents=True, exist_ok=True)
    if not (found := sorted(wheels.glob(f"silero_vad-{RELEASE}-*.whl"))):
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", wheels]
        done = subprocess.run([*command, f"silero-vad=={RELEASE}"], capture_output=True, text=True, timeout=120)
        if not (found := sorted(wheels.glob(f"silero_vad-{RELEASE}-*.whl"))):
            pytest.skip(f"pip could not get silero-vad: {done.stderr.strip()[-200:]}")
    return make("silero", tmp_path_factory.mktemp("voice"), found[0])


def frames() -> dict[str, Any]:
    """Return two frames: a tone under noise, and silence."""
    time = np.arange(576) / 16_000
    noise = np.random.default_rng(3).standard_normal(576) / 50
    loud = np.sin(2 * np.pi * 180 * time) * np.sin(2 * np.pi * 3 * time) + noise
    audio = np.stack([loud, np.zeros(576)]).astype(np.float32)
    return {"input": audio, "state": np.zeros((2, 2, 128), np.float32), "sr": np.array(16_000, np.int64)}


def expected(voice: Path) -> dict[str, Any]:
    session = onnxruntime.InferenceSession(voice / "voice.onnx", providers=["CPUExecutionProvider"])
    return dict(zip(["output", "stateN"], session.run(["output", "stateN"], frames()), strict=True))


@pytest.fixture(scope="module")
def template(voice: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A box's folder with a store: version 1.0.0 has both variants, of 2.0.0 only torch's runs here."""
    folder = tmp_path_factory.mktemp("store")
    with Box(folder / "box", fresh=True) as box:
        box.make_store()
        for version, device in (("1.0.0", ""), ("2.0.0", ELSEWHERE)):
            source, bundle = folder / version, folder / f"bundle-{version}"
            for name in ("onnx", "torch", "golden"):
                (source / name).mkdir(parents=True)
            (source / "onnx/voice.onnx").write_bytes((voice / "voice.onnx").read_bytes())
            (source / "torch/voice.pt").write_bytes((voice / "voice.pt").read_bytes())
            (source / "golden/in.safetensors").write_bytes(safetensors.dump(frames()))
            (source / "golden/out.safetensors").write_bytes(safetensors.dump(expected(voice)))
            (source / "model.toml").write_text(MODEL_TOML % (version, device))
            packed = box.hub("pack", source, "--out", bundle)
            assert {row["tried"] for row in packed["variants"].values()} == {True}
            box.publish(bundle, "--channel", "stable")
    return folder / "box"


@pytest.fixture
def box(template: Path, tmp_path: Path) -> Iterator[Box]:
    with copy_box(template, tmp_path / "box") as box:
        yield box


def row_of(box: Box) -> dict[str, Any]:
    found: dict[str, Any] = next(row for row in box.status()["models"] if row["model"] == "voice")
    return found


def test_the_ladder_falls_from_one_runtime_to_the_other(box: Box, voice: Path) -> None:
    box.write_config(
        store_url=box.store.as_uri(), broker_port=None, models=("voice",), more='[policy]\nnative_formats = "signed"\n'
    )
    box.start()
    box.until(lambda: row_of(box).get("ready"), what="the model serves", timeout_s=90)
    row = row_of(box)
    assert (row["version"], row["variant"], row["provider"]) == ("2.0.0", "torch-fp32", "torch cpu")
    assert row["sandbox"]["level"] == "full"
    assert "needs riscv64" in row["fallbacks"][0]["reason"]
    with box.client() as client:
        outputs = client.infer("voice", frames()).outputs
    for name, wanted in expected(voice).items():
        np.testing.assert_allclose(outputs[name], wanted, atol=1e-3)


def test_a_box_that_wants_no_native_code_serves_the_other_variant_and_says_why(box: Box) -> None:
    box.write_config(store_url=box.store.as_uri(), broker_port=None, models=(), more=f"""
[[models]]
name = "voice"
team = "{magika.TEAM}"
version = "1.0.0"
""")  # fmt: skip
    box.start()
    box.until(lambda: row_of(box).get("ready"), what="the model serves", timeout_s=90)
    row = row_of(box)
    assert (row["variant"], row["provider"]) == ("onnx-fp32", "CPUExecutionProvider")
    assert "native_formats is 'never'" in row["fallbacks"][0]["reason"]


@pytest.mark.skipif(not importlib.util.find_spec("sklearn"), reason="scikit-learn, which has the digits, is missing")
def test_one_training_gives_the_same_labels_in_three_formats(tmp_path: Path) -> None:
    folder = make("digits", tmp_path)
    held_out = np.load(folder / "held_out.npz")
    signature = {
        "inputs": [{"name": "image", "dtype": "float32", "shape": ["N", 1, 8, 8]}],
        "outputs": [{"name": "scores", "dtype": "float32", "shape": ["N", 10]}],
        "dims": {"N": {"min": 1, "max": 64}},
    }
    found = {}
    for suffix, runtime in (("onnx", "onnx"), ("pt", "torch"), ("pt2", "torch-export")):
        zygote = ZygoteProcess(runtime)
        spec = torch_models.bundle(tmp_path / suffix, folder / f"digits.{suffix}", signature)
        spec["batching"] = {"axis": "N", "max_batch": 64, "max_delay_ms": 0}
        if suffix == "onnx":
            spec |= {"runtime": "onnxruntime", "providers": ["CPUExecutionProvider"]}
        worker = zygote.fork(spec)
        worker.hello()
        parts = np.array_split(held_out["image"], 8)
        found[suffix] = np.concatenate([worker.infer({"image": part})["scores"] for part in parts])
        worker.close()
        zygote.close()
    for scores in found.values():
        assert np.mean(scores.argmax(1) == held_out["label"]) > 0.9
        np.testing.assert_allclose(scores, found["onnx"], atol=1e-3)
