"""``python torch_real.py silero|digits FOLDER [WHEEL]``: the same real weights as TorchScript, exported and ONNX.

silero: the voice detector of the wheel, whose TorchScript keeps its state to itself, given the ONNX file's signature.
digits: a small CNN trained on scikit-learn's digits in seconds, with its held-out images.
"""

from __future__ import annotations

import io
import sys
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch


class Voice(torch.nn.Module):
    """The detector with its state as input and output; ``sr`` is there because the ONNX file has it."""

    def __init__(self, inner: torch.nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, input: torch.Tensor, state: torch.Tensor, sr: int) -> tuple[torch.Tensor, torch.Tensor]:  # noqa: A002  their name
        output, state_after = self.inner(input, state)
        return output, state_after


def silero(folder: Path, wheel: Path) -> None:
    """Write voice.pt and voice.onnx."""
    with zipfile.ZipFile(wheel) as archive:
        whole = torch.jit.load(io.BytesIO(archive.read("silero_vad/data/silero_vad.jit")))
        (folder / "voice.onnx").write_bytes(archive.read("silero_vad/data/silero_vad_16k_op15.onnx"))
    torch.jit.script(Voice(whole._model).eval()).save(str(folder / "voice.pt"))


def digits(folder: Path) -> None:
    """Write digits.pt, digits.pt2, digits.onnx and held_out.npz."""
    from sklearn.datasets import load_digits

    torch.manual_seed(0)
    torch.set_num_threads(1)
    data: Any = load_digits()
    images, labels = (data.images / 16).astype(np.float32)[:, None], data.target
    held_out = np.arange(len(labels)) % 4 == 0
    net = torch.nn.Sequential(
        torch.nn.Conv2d(1, 16, 3, padding=1), torch.nn.ReLU(), torch.nn.MaxPool2d(2), torch.nn.Flatten(),
        torch.nn.Linear(256, 10),
    )  # fmt: skip
    optimizer = torch.optim.Adam(net.parameters(), 5e-3)
    x, y = torch.from_numpy(images[~held_out]), torch.from_numpy(labels[~held_out])
    for _ in range(10):
        for rows in torch.randperm(len(x)).split(64):
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(net(x[rows]), y[rows]).backward()
            optimizer.step()
    net.eval()
    sample = (x[:2],)
    torch.jit.trace(net, sample).save(str(folder / "digits.pt"))
    rows = torch.export.Dim("N", min=1, max=64)
    torch.export.save(torch.export.export(net, sample, dynamic_shapes=({0: rows},)), str(folder / "digits.pt2"))
    torch.onnx.export(
        net, sample, str(folder / "digits.onnx"), input_names=["image"], output_names=["scores"],
        dynamic_axes={"image": {0: "N"}, "scores": {0: "N"}}, dynamo=False,
    )  # fmt: skip
    np.savez(folder / "held_out.npz", image=images[held_out], label=labels[held_out])


if __name__ == "__main__":
    if sys.argv[1] == "silero":
        silero(Path(sys.argv[2]), Path(sys.argv[3]))
    else:
        digits(Path(sys.argv[2]))
