"""From torch to a packed bundle: a module's factory, TorchScript and an exported program; and without torch, a hint."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.integration.test_publish import hub
from tools.hub import torch_export
from tools.hub.errors import SourceError

pytestmark = pytest.mark.integration
FACTORY = """
import torch


class Digits(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = torch.nn.Sequential(
            torch.nn.Conv2d(1, 16, 3, padding=1), torch.nn.ReLU(), torch.nn.MaxPool2d(2),
            torch.nn.Flatten(), torch.nn.Linear(256, 32), torch.nn.ReLU(), torch.nn.Linear(32, 10),
        )

    def forward(self, image):
        return {"logits": self.layers(image)}


def trained():
    from sklearn.datasets import load_digits

    torch.manual_seed(0)
    digits, model = load_digits(), Digits()
    x = torch.from_numpy((digits.images[:1200, None] / 16).astype("float32"))
    y = torch.from_numpy(digits.target[:1200])
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    for _ in range(6):
        for rows in torch.randperm(len(x)).split(64):
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(model(x[rows])["logits"], y[rows]).backward()
            optimizer.step()
    return model


def not_a_model():
    return 5
"""


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the factory and the held-out digits: real pictures with labels."""
    pytest.importorskip("torch")
    datasets = pytest.importorskip("sklearn.datasets")
    folder = tmp_path_factory.mktemp("digits")
    (folder / "digits_model.py").write_text(FACTORY)
    loaded = datasets.load_digits()
    pictures = (loaded.images[:, None] / 16).astype(np.float32)
    np.savez(folder / "held_out.npz", image=pictures[1200:])
    np.savez(folder / "labels.npz", label=loaded.target[1200:])
    np.savez(folder / "calibration.npz", image=pictures[:100])
    return folder


@pytest.mark.torch
def test_a_trained_module_becomes_a_bundle_with_variants_that_agree(
    digits: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(digits)
    answer = hub(
        "quantize", "digits_model:trained", "--out", "module", "--model", "vision/digits@1.0.0",
        "--inputs", "held_out.npz", "--calibration", "calibration.npz", "--seconds", "0.1", "--rows", "400",
    )  # fmt: skip
    rows = {row["kind"]: row for row in answer["variants"]}
    assert {kind for kind, row in rows.items() if row["kept"]} >= {"fp16", "static"}
    assert rows["static"]["outputs"][0]["measure"] == "top1"
    right = _accuracy(digits, "module/fp32/model.onnx")
    assert right > 0.8  # pictures of writers that it has never seen
    assert abs(_accuracy(digits, "module/int8-static/model.onnx") - right) < 0.03
    packed = hub("pack", "module", "--out", "bundle")
    assert {"cpu-fp32", "cpu-fp16", "cpu-int8-static"} <= set(packed["variants"])


@pytest.mark.torch
@pytest.mark.parametrize("form", ["torchscript", "pt2"])
def test_saved_models_are_exported(form: str, digits: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch = pytest.importorskip("torch")
    if form == "pt2":
        pytest.importorskip("onnxscript")
    monkeypatch.chdir(digits)
    net = torch.nn.Sequential(torch.nn.Conv2d(1, 4, 3), torch.nn.ReLU(), torch.nn.Flatten(), torch.nn.Linear(144, 10))
    net.eval()
    example = torch.rand(2, 1, 8, 8)
    path = digits / f"net-{form}.{'pt2' if form == 'pt2' else 'pt'}"
    if form == "pt2":
        torch.export.save(torch.export.export(net, (example,), dynamic_shapes=({0: torch.export.Dim("n")},)), path)
    else:
        torch.jit.trace(net, example).save(path)
    assert torch_export.kind_of(str(path)) == form
    words = ("--out", f"out-{form}", "--inputs", "held_out.npz", "--rows", "8", "--kinds", "fp16", "--seconds", "0.1")
    answer = hub("quantize", str(path), *words, "--min-agreement", "0.5")
    assert answer["variants"][1]["kept"], answer
    assert hub("pack", f"out-{form}", "--out", f"bundle-{form}")["variants"]["cpu-fp16"]["tried"]


@pytest.mark.torch
@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("digits_model:missing", "has no attribute 'missing'"),
        ("digits_model:not_a_model", "returned int"),
        ("no_such_module:model", "No module named"),
    ],
)
def test_a_factory_that_does_not_work_is_an_error(
    source: str, words: str, digits: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(digits)
    answer = hub("quantize", source, "--out", "broken", "--inputs", "held_out.npz", fails="bad_source")
    assert words in answer["error"]["message"]
    assert not (digits / "broken").exists()


@pytest.mark.torch
def test_an_export_needs_an_example(digits: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(digits)
    answer = hub("quantize", "digits_model:trained", "--out", "broken", fails="bad_source")
    assert "--inputs" in answer["error"]["hint"]


def test_pickled_weights_are_no_model(tmp_path: Path) -> None:
    (tmp_path / "weights.pt").write_bytes(b"\x80\x02}q\x00.")
    with pytest.raises(SourceError, match="pickled weights") as caught:
        torch_export.kind_of(str(tmp_path / "weights.pt"))
    assert "module:factory" in caught.value.hint


def test_without_torch_the_verb_says_how_to_get_it(tmp_path: Path) -> None:
    np.savez(tmp_path / "in.npz", x=np.zeros((2, 4), dtype=np.float32))
    code = (
        "import sys; sys.modules['torch'] = None; from tools.inferhub import main; "
        "main(['quantize', 'somewhere:model', '--out', 'out', '--inputs', 'in.npz', '--json'])"
    )
    root = str(Path(__file__).parents[2])
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False,
        env={"PYTHONPATH": root, "PATH": ""},
    )  # fmt: skip
    assert done.returncode == 1, done.stderr
    assert "torch, which is not installed" in done.stdout
    assert "inferd[export]" in done.stdout


def _accuracy(folder: Path, model: str) -> float:
    import onnxruntime

    session = onnxruntime.InferenceSession(str(folder / model), providers=["CPUExecutionProvider"])
    answers: Any = session.run(None, {"image": np.load(folder / "held_out.npz")["image"]})[0]
    return float(np.mean(answers.argmax(1) == np.load(folder / "labels.npz")["label"]))
