"""NumPy arrays to torch tensors and back.

bfloat16, which NumPy lacks, comes as float32, as the wire hands it over, and goes as float32.
"""

from __future__ import annotations

import warnings
from typing import Final

import numpy as np
import torch

from agent.errors import OutputError
from agent.tensors import Array
from agent.worker.signature import TensorSpec, converts

DTYPES: Final = {
    "bool": torch.bool, "uint8": torch.uint8, "int8": torch.int8, "uint16": torch.uint16, "int16": torch.int16,
    "uint32": torch.uint32, "int32": torch.int32, "uint64": torch.uint64, "int64": torch.int64,
    "float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32, "float64": torch.float64,
}  # fmt: skip
NAMES: Final = {dtype: name for name, dtype in DTYPES.items()}

# Views into a received frame are read-only; what is moved to another device is copied anyway.
warnings.filterwarnings("ignore", message="The given NumPy array is not writ")


def to_tensor(array: Array, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Return a tensor on ``device``; the model may write into it, never into ``array``."""
    plain = np.array(array) if device.type == "cpu" or not array.flags.aligned else array
    return torch.from_numpy(plain).to(device=device, dtype=dtype)


def to_array(tensor: object, spec: TensorSpec) -> Array:
    """Return an array of its own with the declared dtype.

    Raises:
        OutputError: it is no tensor, or not of the declared dtype, rank or fixed dimensions.
    """
    if not isinstance(tensor, torch.Tensor):
        raise OutputError(f"output {spec.name!r}: the model returned {type(tensor).__name__}, declared is {spec}")
    given = NAMES.get(tensor.dtype, str(tensor.dtype))
    shape = tuple(tensor.shape)
    fits = len(shape) == len(spec.shape) and all(
        not isinstance(wanted, int) or wanted == size for wanted, size in zip(spec.shape, shape, strict=True)
    )
    if not fits or not converts(given, spec.dtype):
        raise OutputError(f"output {spec.name!r}: the model returned {given}{list(shape)}, declared is {spec}")
    host = tensor.detach().to(device="cpu", dtype=DTYPES[spec.dtype], copy=True).contiguous()
    array: Array = host.numpy()
    return array
