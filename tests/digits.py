"""A small convolutional network for real handwritten digits, trained here in a second and written as ONNX.

The pictures and labels are those of scikit-learn, read from its wheel, which is neither installed nor kept here.
"""

from __future__ import annotations

import gzip
import itertools
import subprocess
import sys
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, helper, numpy_helper

Array = npt.NDArray[Any]

_MEMBER = "sklearn/datasets/data/digits.csv.gz"
_HELD_OUT = 400  # pictures that no network has seen
_FILTERS = 8
_SLOW_LAYERS, _SLOW_WIDTH = 60, 1024

HANDLER = '''
import numpy as np

from handlers.base import Handler, InputError


class DigitsHandler(Handler):
    """64 bytes of a picture in, 0 to 16 each; the digit out."""

    def __init__(self, context):
        super().__init__(context)

    def preprocess(self, body, content_type):
        del content_type  # what the sender believes is not evidence
        if len(body) != 64:
            raise InputError(f"expected 64 bytes, got {len(body)}")
        return {"image": np.frombuffer(body, np.uint8).reshape(1, 1, 8, 8).astype(np.float32) / 16}

    def postprocess(self, outputs, rows):
        return {"digit": int(outputs["logits"][0].argmax())}
'''


@dataclass(frozen=True)
class Digits:
    """Pictures ``uint8[n, 64]``, 0 to 16, and what they show; the last ``_HELD_OUT`` are for tests."""

    pictures: Array
    labels: Array

    @property
    def held_out(self) -> tuple[Array, Array]:
        """Pictures and labels that no network has seen."""
        return self.pictures[-_HELD_OUT:], self.labels[-_HELD_OUT:]


@dataclass(frozen=True)
class Network:
    """Convolution, pooling, one dense layer."""

    filters: Array  # [9, 8]
    filter_bias: Array  # [8]
    dense: Array  # [128, 10]
    dense_bias: Array  # [10]

    def logits(self, pictures: Array) -> Array:
        """Return ``float32[n, 10]``."""
        pooled, _ = _features(_patches(_scaled(pictures)), self.filters, self.filter_bias)
        found: Array = (pooled @ self.dense + self.dense_bias).astype(np.float32)
        return found

    def onnx(self, *, stamp: str = "", slow: bool = False, flat: bool = False) -> bytes:
        """Return the model file.

        Args:
            stamp: Makes the file's first bytes unlike those of others.
            slow: With much more to compute and the same answers.
            flat: With pictures as ``[N, 64]``.
        """
        weights = {
            "filters": self.filters.T.reshape(_FILTERS, 1, 3, 3),
            "filter_bias": self.filter_bias,
            "dense": self.dense,
            "dense_bias": self.dense_bias,
            "square": np.array([-1, 1, 8, 8]),
        }
        nodes = [
            helper.make_node("Reshape", ["image", "square"], ["picture"]),
            helper.make_node("Conv", ["picture", "filters", "filter_bias"], ["c"], pads=[1, 1, 1, 1]),
            helper.make_node("Relu", ["c"], ["r"]),
            helper.make_node("MaxPool", ["r"], ["p"], kernel_shape=[2, 2], strides=[2, 2]),
            helper.make_node("Flatten", ["p"], ["f"]),
            helper.make_node("Gemm", ["f", "dense", "dense_bias"], ["found" if slow else "logits"]),
        ]
        if slow:
            weights |= {
                "widen": np.zeros((128, _SLOW_WIDTH)),
                "square_matrix": np.eye(_SLOW_WIDTH),
                "narrow": np.zeros((_SLOW_WIDTH, 10)),
            }
            names = [f"s{number}" for number in range(_SLOW_LAYERS + 1)]
            nodes += [helper.make_node("MatMul", ["f", "widen"], ["s0"])]
            nodes += [
                helper.make_node("MatMul", [given, "square_matrix"], [made])
                for given, made in itertools.pairwise(names)
            ]
            nodes += [
                helper.make_node("MatMul", [names[-1], "narrow"], ["nothing"]),
                helper.make_node("Add", ["found", "nothing"], ["logits"]),
            ]
        shape = ["N", 64] if flat else ["N", 1, 8, 8]
        graph = helper.make_graph(
            nodes,
            "digits",
            [helper.make_tensor_value_info("image", TensorProto.FLOAT, shape)],
            [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["N", 10])],
            [numpy_helper.from_array(_stored(value), name) for name, value in weights.items()],
        )
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=10)
        model.doc_string = stamp
        onnx.checker.check_model(model)
        data: bytes = model.SerializeToString()
        return data


def read(wheels: Path) -> Digits | None:
    """Return the digits of the wheel in ``wheels``, fetched with pip unless it is there; ``None``: not to be had."""
    if not (found := sorted(wheels.glob("scikit_learn-*.whl"))):
        wheels.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
        command += ["--only-binary=:all:", "--dest", str(wheels), "scikit-learn"]
        subprocess.run(command, capture_output=True, timeout=300, check=False)
        found = sorted(wheels.glob("scikit_learn-*.whl"))
    if not found:
        return None
    with zipfile.ZipFile(found[-1]) as archive:
        rows = np.loadtxt(gzip.decompress(archive.read(_MEMBER)).decode().splitlines(), delimiter=",", dtype=np.uint8)
    return Digits(rows[:, :64], rows[:, 64])


def train(digits: Digits, *, seed: int, epochs: int = 8) -> Network:
    """Return a network that has learned all but the held-out pictures."""
    rng = np.random.default_rng(seed)
    patches = _patches(_scaled(digits.pictures[:-_HELD_OUT]))
    wanted = np.eye(10)[digits.labels[:-_HELD_OUT]]
    filters, filter_bias = rng.normal(0, 0.3, (9, _FILTERS)), np.zeros(_FILTERS)
    dense, dense_bias = rng.normal(0, 0.1, (16 * _FILTERS, 10)), np.zeros(10)
    momentum = [np.zeros_like(part) for part in (filters, filter_bias, dense, dense_bias)]
    for _ in range(epochs):
        for batch in np.array_split(rng.permutation(len(patches)), len(patches) // 32):
            x, y = patches[batch], wanted[batch]
            pooled, back = _features(x, filters, filter_bias)
            scores = pooled @ dense + dense_bias
            share = np.exp(scores - scores.max(1, keepdims=True))
            error = (share / share.sum(1, keepdims=True) - y) / len(batch)
            per_place = back(error @ dense.T)
            slopes = [np.einsum("npi,npf->if", x, per_place), per_place.sum((0, 1)), pooled.T @ error, error.sum(0)]
            for part, moving, slope in zip((filters, filter_bias, dense, dense_bias), momentum, slopes, strict=True):
                moving *= 0.9
                moving -= 0.1 * slope
                part += moving
    return Network(filters, filter_bias, dense, dense_bias)


def _scaled(pictures: Array) -> Array:
    return pictures.reshape(-1, 8, 8).astype(np.float64) / 16


def _patches(images: Array) -> Array:
    """Return ``[n, 64, 9]``: what each place of a padded 8 x 8 picture has around it."""
    padded = np.pad(images, ((0, 0), (1, 1), (1, 1)))
    windows = np.lib.stride_tricks.sliding_window_view(padded, (3, 3), axis=(1, 2))
    return windows.reshape(len(images), 64, 9)


def _features(patches: Array, filters: Array, bias: Array) -> tuple[Array, Any]:
    """Return ``[n, 128]``, channels first, and how its slopes go back to every place and filter."""
    count = len(patches)
    active = np.maximum(patches @ filters + bias, 0)
    blocks = active.reshape(count, 4, 2, 4, 2, _FILTERS)
    pooled = blocks.max(axis=(2, 4))

    def back(slopes: Array) -> Array:
        slopes = slopes.reshape(count, _FILTERS, 4, 4).transpose(0, 2, 3, 1)[:, :, None, :, None]
        here = (blocks == pooled[:, :, None, :, None]) & (blocks > 0)
        return (here * slopes).reshape(count, 64, _FILTERS)

    return pooled.transpose(0, 3, 1, 2).reshape(count, -1), back


def _stored(value: Array) -> Array:
    return value if value.dtype == np.int64 else value.astype(np.float32)
