"""``python torch_files.py FOLDER`` writes small models of torch; ``linear`` has the weights of ``models.py``."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import torch

WEIGHTS = torch.from_numpy(np.random.default_rng(7).standard_normal((4, 3)).astype(np.float32))


class Linear(torch.nn.Module):
    """``y[N,3] = x[N,4] @ WEIGHTS``."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.weights = torch.nn.Parameter(WEIGHTS.to(dtype))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.weights


class Mapped(torch.nn.Module):
    """Two inputs, one of them a number, and a map as the answer; it writes into its input."""

    def forward(self, x: torch.Tensor, factor: int) -> dict[str, torch.Tensor]:
        x.mul_(factor)
        return {"y": x, "rows": x.sum(1)}


class Double(torch.nn.Module):
    """``y = 2 x``."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * x


class Greedy(torch.nn.Module):
    """``count`` rows of a mebibyte each."""

    def __init__(self) -> None:
        super().__init__()
        self.one = torch.nn.Parameter(torch.ones(1))

    def forward(self, count: int) -> torch.Tensor:
        return (self.one * torch.ones([count, 1 << 18], device=self.one.device)).sum(1)


def main(folder: Path) -> None:
    """Write the files."""
    rows = torch.export.Dim("N", min=1, max=64)
    for name, dtype in (("linear", torch.float32), ("half", torch.float16), ("brain", torch.bfloat16)):
        module = Linear(dtype).eval()
        torch.jit.script(module).save(str(folder / f"{name}.pt"))
        program = torch.export.export(module, (torch.ones(2, 4, dtype=dtype),), dynamic_shapes=({0: rows},))
        torch.export.save(program, str(folder / f"{name}.pt2"))
    for name, module in (("mapped", Mapped()), ("greedy", Greedy()), ("double", Double())):
        torch.jit.script(module).save(str(folder / f"{name}.pt"))
    torch.save(Linear().state_dict(), str(folder / "weights.pt"))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
