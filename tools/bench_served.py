"""Latency and throughput of one model by every way, beside the same work in this process: ``make bench``'s main rows.

Each section has a box of its own over the same store, so that nothing else is served while it is measured.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Final

import numpy as np
from rich.progress import Progress

from tools.bench_beside import Beside
from tools.bench_load import closed_blocking
from tools.bench_native import over_unix
from tools.bench_processes import Processes
from tools.bench_relay import relay
from tools.bench_targets import BARE, BARE_RELAY, BARE_SHARED, BARE_TCP, BARE_WORKER, CNN, IN_PROCESS
from tools.bench_ways import Http, InProcess, Unix, Way, Work
from tools.loadgen import Plan, Runs, floors, loads, measure, natives
from tools.rig import models
from tools.rig.box import Rig
from tools.rig.models import Model

_CONNECTIONS: Final = 8
_CNN_CALLERS: Final = 8
_CNN_BATCHED: Final = f"in-process, {_CNN_CALLERS} rows"


@dataclass(frozen=True, kw_only=True)
class Served:
    """What one section found: rows as ``loadgen.measure`` returns them."""

    rows: list[dict[str, Any]]
    processes: list[dict[str, Any]]
    left_out: list[str]


def tiny(rig: Rig, progress: Progress, *, seconds: float, repetitions: int, rate_s: float) -> Served:
    """The tiny MLP: one request at a time, many outstanding, and an open loop."""
    model, left_out = models.tiny(), list[str]()
    with _Serving(rig, model) as (file, work, url), relay(file, rig.folder / "relay") as bare:
        plan = Plan(
            concurrencies=(1, 32), rate_s=rate_s, connections=_CONNECTIONS, seconds=seconds, repetitions=repetitions
        )
        yardsticks = [InProcess(file, work, IN_PROCESS), *floors(Unix(rig.socket, work).request_bytes)]
        native = natives(rig.folder / "build", rig.socket, url, work, left_out)
        if native:
            ways = {BARE_RELAY: bare.through, BARE_WORKER: bare.worker}
            native += [replace(over_unix(native[0].program, ways[name], work), name=name) for name in ways]
        served: list[Way] = [Unix(rig.socket, work, lanes=True), Unix(rig.socket, work), Http(url, work)]
        runs = loads(plan, yardsticks, served, native, title="tiny MLP, ")
        return _measured(rig, progress, runs, plan, left_out)


def frame(rig: Rig, progress: Progress, *, seconds: float, repetitions: int) -> Served:
    """One uint8 picture of 6 MB: in memory shared beforehand, and as an array that has to be moved."""
    model = models.frame()
    with _Serving(rig, model) as (file, work, url):
        plan = Plan(concurrencies=(1,), rate_s=0.0, connections=_CONNECTIONS, seconds=seconds, repetitions=repetitions)
        by_region = Unix(rig.socket, work, region=True)
        yardsticks = [InProcess(file, work, IN_PROCESS), *floors(by_region.request_bytes)]
        yardsticks += [Beside(file, work, BARE_SHARED), Beside(file, work, BARE_TCP, tcp=True)]
        served: list[Way] = [Unix(rig.socket, work, region=True, lanes=True), by_region]
        served += [Unix(rig.socket, work), Http(url, work)]
        return _measured(rig, progress, loads(plan, yardsticks, served, (), title="6 MB frame, "), plan, [])


def cnn(rig: Rig, progress: Progress, *, seconds: float, repetitions: int) -> Served:
    """ResNet-18 with eight outstanding, beside one thread of this process with one row and with eight rows a run."""
    model = models.resnet18()
    with _Serving(rig, model) as (file, work, url):
        plan = Plan(
            concurrencies=(_CNN_CALLERS,),
            rate_s=0.0,
            connections=_CONNECTIONS,
            seconds=seconds,
            repetitions=repetitions,
        )
        served: list[Way] = [Unix(rig.socket, work, lanes=True), Unix(rig.socket, work), Http(url, work)]
        yardsticks = [InProcess(file, work, IN_PROCESS)]
        runs = dict(loads(plan, yardsticks, served, (), title="ResNet-18, ")[CNN])
        joined = {name: np.repeat(value, _CNN_CALLERS, axis=0) for name, value in work.inputs.items()}
        batched = InProcess(file, Work(model=model.name, inputs=joined), _CNN_BATCHED)
        runs[_CNN_BATCHED] = partial(closed_blocking, batched, seconds=seconds, rows=_CNN_CALLERS)
        return _measured(rig, progress, {CNN: runs}, plan, [])


class _Serving:
    """A running box that serves one model; yields the ONNX file, one request's work, and the HTTP address."""

    def __init__(self, rig: Rig, model: Model) -> None:
        self._rig = rig
        self._model = model

    def __enter__(self) -> tuple[Path, Work, str]:
        rig, model = self._rig, self._model
        file = rig.publish_model(model)
        rig.configure(model.name, state=f"state-{model.name}")
        rig.start_serving()
        example = model.example(np.random.default_rng(1))[:1]
        work = Work(model=model.name, inputs={model.takes.name: example})
        return file, work, f"http://127.0.0.1:{rig.http_port}"

    def __exit__(self, *_error: object) -> None:
        self._rig.stop_daemon()


def _measured(rig: Rig, progress: Progress, runs: Mapping[str, Runs], plan: Plan, left_out: list[str]) -> Served:
    processes = Processes(rig.daemon_pid)
    rows = measure(runs, plan, processes, progress, yardsticks=(_CNN_BATCHED, *BARE))
    return Served(rows=rows, processes=processes.memory(), left_out=left_out)
