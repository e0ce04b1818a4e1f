"""Inputs from folders and files: every form, and everything that does not fit."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from agent.bundles.onnx_facts import Port
from tools.hub import safetensors
from tools.hub.errors import SourceError
from tools.hub.samples import batch_of, load, of_arrays, peek, random, stacked

pytestmark = pytest.mark.unit
IMAGE = Port("image", "float32", ("n", 1, 2, 2))
MASK = Port("mask", "int64", ("n", 2))
ROWS = np.arange(12, dtype=np.float32).reshape(3, 1, 2, 2)


def npz(path: Path) -> None:
    np.savez(path / "a.npz", image=ROWS)


def npy(path: Path) -> None:
    np.save(path / "a.npy", ROWS)


def tensors(path: Path) -> None:
    (path / "a.safetensors").write_bytes(safetensors.dump({"image": ROWS}))


def raw(path: Path) -> None:
    (path / "a.raw").write_bytes(ROWS.tobytes())


def one_each(path: Path) -> None:
    for number, row in enumerate(ROWS):
        np.save(path / f"{number}.npy", row)  # no batch axis


def deep(path: Path) -> None:
    (path / "cats").mkdir()
    np.savez(path / "cats/a.npz", picture=ROWS[:2])  # a single array needs no name
    (path / "b.bin").write_bytes(ROWS[2:].tobytes())


@pytest.mark.parametrize("write", [npz, npy, tensors, raw, one_each, deep])
def test_a_folder_of_samples_becomes_rows(write: Callable[[Path], None], tmp_path: Path) -> None:
    write(tmp_path)
    found = load(tmp_path, [IMAGE], rows_max=10)
    assert found.real
    assert [feed["image"].shape for feed in found.feeds] == [(1, 1, 2, 2)] * 3
    together = stacked(found.feeds)
    assert together is not None
    assert np.array_equal(np.sort(together["image"], axis=0), ROWS)


def test_one_file_is_as_good_as_a_folder_and_rows_are_bounded(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", image=ROWS, mask=np.ones((3, 2), dtype=np.int32), label=np.zeros(3))
    found = load(tmp_path / "a.npz", [IMAGE, MASK], rows_max=2)
    assert (len(found.feeds), found.rows_skipped) == (2, 1)
    assert found.feeds[0]["mask"].dtype == np.int64
    assert found.digest != load(tmp_path / "a.npz", [IMAGE, MASK], rows_max=3).digest


def test_a_fixed_batch_is_kept_and_scalars_are_not_cut() -> None:
    fixed = Port("x", "float32", (2, 4))
    assert batch_of([fixed]) == 2
    feeds = of_arrays({"x": np.zeros((5, 4), dtype=np.float32)}, [fixed], where="here")
    assert [feed["x"].shape for feed in feeds] == [(2, 4), (2, 4)]
    rate = Port("rate", "int64", ())
    assert batch_of([fixed, rate]) is None
    (feed,) = of_arrays({"x": np.zeros((2, 4), dtype=np.float32), "rate": np.array(16)}, [fixed, rate], where="here")
    assert feed["rate"].shape == ()


def test_made_up_inputs_fit_and_say_so() -> None:
    found = random([IMAGE, MASK], rows=2)
    assert not found.real
    assert {name: (array.shape, array.dtype.name) for name, array in found.feeds[0].items()} == {
        "image": ((1, 1, 2, 2), "float32"),
        "mask": ((1, 2), "int64"),
    }
    with pytest.raises(SourceError, match="cannot be made up"):
        random([Port("text", "bytes", ("n",))])


def test_an_example_can_be_had_before_there_is_a_model(tmp_path: Path) -> None:
    npz(tmp_path)
    assert list(peek(tmp_path)) == ["image"]
    np.save(tmp_path / "a.npy", ROWS)
    assert peek(tmp_path / "a.npy")["input"].shape == (3, 1, 2, 2)
    (tmp_path / "only.raw").write_bytes(b"1234")
    with pytest.raises(SourceError) as caught:
        peek(tmp_path / "only.raw")
    assert "with a shape" in caught.value.hint


@pytest.mark.parametrize(
    ("write", "ports", "words"),
    [
        (lambda p: None, [IMAGE], "no samples"),
        (lambda p: np.savez(p / "a.npz", image=ROWS), [IMAGE, MASK], "no array for the input 'mask'"),
        (lambda p: np.savez(p / "a.npz", image=ROWS[..., :1]), [IMAGE], "has shape"),
        (lambda p: np.savez(p / "a.npz", image=ROWS[0, 0]), [IMAGE], "has shape"),
        (lambda p: np.savez(p / "a.npz", mask=ROWS[:, 0, 0]), [MASK], "is float32, the model takes int64"),
        (lambda p: np.save(p / "a.npy", np.array([{}]), allow_pickle=True), [IMAGE], "cannot be read"),
        (lambda p: (p / "a.npz").write_bytes(b"PK\x03\x04 junk"), [IMAGE], "cannot be read"),
        (lambda p: (p / "a.safetensors").write_bytes(b"junk"), [IMAGE], "safetensors"),
        (lambda p: (p / "a.raw").write_bytes(b"123"), [IMAGE], "3 bytes do not fit"),
        (lambda p: (p / "a.raw").write_bytes(b"1234"), [IMAGE, MASK], "several inputs"),
    ],
    ids=["empty", "missing", "shape", "rank", "dtype", "pickle", "damaged", "no safetensors", "raw size", "raw, two"],
)
def test_what_does_not_fit_is_refused_with_its_reason(
    write: Callable[[Path], None], ports: list[Port], words: str, tmp_path: Path
) -> None:
    write(tmp_path)
    with pytest.raises(SourceError, match=words):
        load(tmp_path, ports, rows_max=10)


def test_a_path_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="No such file"):
        load(tmp_path / "nothing", [IMAGE], rows_max=1)
