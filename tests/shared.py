"""A frame socket with real workers behind it, in the test's own process: no store, no daemon process.

The models are made for shared memory: any number of columns, so that one request may hold bytes or megabytes.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import uvloop
from onnx import TensorProto, helper, numpy_helper

from agent.arena import Arena
from agent.clock import SystemClock
from agent.config import AuthConfig, ClientLimitConfig, EngineConfig, ServingConfig, SharedMemoryConfig
from agent.engine.engine import Engine
from agent.engine.types import VersionSpec, forwarded_header_bytes
from agent.engine.version import Version
from agent.engine.zygote import become_subreaper
from agent.events import EventBus
from agent.metrics import Metrics
from agent.serving.budget import ReceiveBudget
from agent.serving.frames import FrameServer
from agent.serving.identity import AccessPolicy
from agent.serving.listeners import bind_unix
from agent.wire import Limits
from tests.fakes.engine import FakeControl
from tests.models import scale_version

_ONNX = {"float32": TensorProto.FLOAT, "uint8": TensorProto.UINT8, "int64": TensorProto.INT64}


@dataclass
class SharedBox:
    """What a test talks to and looks at."""

    path: Path
    engine: Engine
    frames: FrameServer
    arena: Arena
    metrics: Metrics

    def version(self, model: str) -> Version:
        """Return what serves ``model``."""
        version = self.engine.active(model)
        assert version is not None
        return version

    def worker_pid(self, model: str) -> int:
        """Return the pid of the model's only worker."""
        pool = self.version(model).pool
        assert pool is not None
        (link,) = pool.links
        return link.process.pid


@asynccontextmanager
async def shared_box(
    folder: Path,
    *versions: VersionSpec,
    memory: SharedMemoryConfig | None = None,
    serving: ServingConfig | None = None,
    limits: Iterable[ClientLimitConfig] = (),
    **options: Any,
) -> AsyncIterator[SharedBox]:
    """Serve ``versions`` on a frame socket in ``folder``; ``options`` are fields of ``EngineConfig``."""
    become_subreaper()
    serving = serving or ServingConfig(drain_timeout_s=5.0)
    metrics = Metrics()
    config = EngineConfig(**{"restart_first_s": 0.001, "start_timeout_s": 60.0, **options})
    shared = memory or SharedMemoryConfig()
    arena = Arena(bytes_max=shared.arena_bytes_max, idle_bytes_max=shared.arena_idle_bytes_max)
    engine = Engine(
        config,
        scratch=folder / "scratch",
        wire=Limits(body_bytes_max=serving.body_bytes_max),
        limits=limits,
        events=EventBus(SystemClock()),
        metrics=metrics,
        arena=arena,
    )
    path = folder / "inferd.sock"
    async with engine.running():
        sweeper = asyncio.ensure_future(engine.run())
        try:
            for version in versions:
                engine.activate(await engine.load(version))
            frames = FrameServer(
                bind_unix(path),
                engine=engine,
                control=FakeControl(),
                policy=AccessPolicy(AuthConfig(), own_uid=os.getuid()),
                budget=ReceiveBudget(serving.receive_bytes_max),
                config=serving,
                metrics=metrics,
                shared_memory=shared,
                arena=arena,
            )
            async with frames.serving():
                yield SharedBox(path, engine, frames, arena, metrics)
        finally:
            sweeper.cancel()
            await asyncio.wait({sweeper})


def double_version(
    folder: Path, *, handler: str | None = None, delay_ms: float = 0, open_files: int = 256
) -> VersionSpec:
    """``double``: ``y[N, C] = 2 * x[N, C]``, float32; up to 8 rows a batch."""
    return _version(
        folder, "double", [helper.make_node("Add", ["x", "x"], ["y"])], ("x", "float32", ["N", "C"]),
        ("y", "float32", ["N", "C"]), {}, handler=handler, delay_ms=delay_ms, open_files=open_files,
    )  # fmt: skip


def mean_version(folder: Path) -> VersionSpec:
    """``mean``: ``y[N] = mean of x[N, C]``, uint8 in, float32 out."""
    nodes = [
        helper.make_node("Cast", ["x"], ["f"], to=TensorProto.FLOAT),
        helper.make_node("ReduceMean", ["f"], ["y"], axes=[1], keepdims=0),
    ]
    return _version(folder, "mean", nodes, ("x", "uint8", ["N", "C"]), ("y", "float32", ["N"]), {})


def pick_version(folder: Path) -> VersionSpec:
    """``pick``: ``y[N] = table[x[N]]``: positions, which the runtime checks before it uses them."""
    table = {"table": np.arange(1000, dtype=np.float32)}
    return _version(
        folder, "pick", [helper.make_node("Gather", ["table", "x"], ["y"])], ("x", "int64", ["N"]),
        ("y", "float32", ["N"]), table, rows_max=65536,
    )  # fmt: skip


def slow_version(folder: Path) -> VersionSpec:
    """``slow``: ``y[N, 1024] = x[N, 1024]``, by way of hundreds of multiplications; one row a batch."""
    steps = ["x", *(f"h{number}" for number in range(399)), "y"]
    nodes = [helper.make_node("MatMul", [given, "w"], [made]) for given, made in pairwise(steps)]
    return _version(
        folder, "slow", nodes, ("x", "float32", ["N", 1024]), ("y", "float32", ["N", 1024]),
        {"w": np.eye(1024, dtype=np.float32)}, rows_max=1,
    )  # fmt: skip


def _version(
    folder: Path,
    name: str,
    nodes: Any,
    taken: tuple[str, str, list[Any]],
    given: tuple[str, str, list[Any]],
    constants: dict[str, Any],
    *,
    handler: str | None = None,
    rows_max: int = 8,
    delay_ms: float = 0,
    open_files: int = 256,
) -> VersionSpec:
    spec = scale_version(folder, handler=handler)
    graph = helper.make_graph(
        nodes,
        name,
        [helper.make_tensor_value_info(taken[0], _ONNX[taken[1]], taken[2])],
        [helper.make_tensor_value_info(given[0], _ONNX[given[1]], given[2])],
        [numpy_helper.from_array(value, key) for key, value in constants.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=10)
    onnx.save(model, str(folder / "v0/model.onnx"))
    signature = {
        side: [{"name": tensor[0], "dtype": tensor[1], "shape": tensor[2]}]
        for side, tensor in (("inputs", taken), ("outputs", given))
    }
    (variant,) = spec.variants
    worker = {
        **variant.worker,
        "model": name,
        "signature": {**signature, "dims": {}},
        "batching": {"max_batch": rows_max, "max_delay_ms": delay_ms, "axis": "N"},
        "wire": {"header_bytes_max": forwarded_header_bytes(65536), "body_bytes_max": 1 << 26},
        "limits": {"memory_bytes": 0, "open_files": open_files},
    }
    return replace(spec, model=name, variants=(replace(variant, worker=worker),))


def descriptors(pid: int | str = "self") -> int:
    """Return how many descriptors a process has open, without those of the arena, which keeps some slots."""
    count = 0
    for number in os.listdir(f"/proc/{pid}/fd"):
        with suppress(OSError):  # the one that lists them
            count += "inferd-arena" not in os.readlink(f"/proc/{pid}/fd/{number}")
    return count


def mapped(pid: int) -> list[str]:
    """Return the lines of a process's memory map that are clients' regions."""
    with open(f"/proc/{pid}/maps", encoding="ascii", errors="replace") as maps:
        return [line for line in maps if "memfd:" in line and "inferd-arena" not in line]


def run(story: Callable[[], Awaitable[None]], *, limit_s: float = 300.0) -> None:
    """Run a story on the daemon's kind of loop; one that waits for what never comes fails instead of hanging."""

    async def bounded() -> None:
        async with asyncio.timeout(limit_s):
            await story()

    uvloop.run(bounded())


async def until(condition: Callable[[], bool], *, limit_s: float = 90.0) -> None:
    """Return once ``condition`` holds; fail if it never does."""
    async with asyncio.timeout(limit_s):
        while not condition():
            await asyncio.sleep(0.005)
