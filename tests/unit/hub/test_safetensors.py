"""What we write, both of the agent's readers accept."""

from __future__ import annotations

import numpy as np
import pytest

from agent.bundles import safetensors as checker
from agent.worker import safetensors as reader
from tools.hub.errors import SourceError
from tools.hub.safetensors import dump

pytestmark = pytest.mark.unit


@pytest.mark.parametrize(
    "dtype", ["bool", "uint8", "int8", "int16", "int32", "int64", "uint64", "float16", "float32", "float64", ">f4"]
)
def test_tensors_come_back_as_they_were(dtype: str) -> None:
    tensors = {
        "z": np.arange(6).reshape(2, 3).astype(dtype),
        "a": np.zeros((0, 4), dtype),
        "one": np.ones((), dtype),
        "t": np.arange(6).reshape(2, 3).astype(dtype).T,
    }
    data = dump(tensors)
    checker.check(memoryview(data))
    found = reader.parse(data)
    assert set(found) == set(tensors)
    for name, array in tensors.items():
        np.testing.assert_array_equal(found[name], array)
        assert found[name].shape == array.shape


def test_what_the_format_lacks_is_refused() -> None:
    with pytest.raises(SourceError, match="text"):
        dump({"text": np.array(["a"])})
