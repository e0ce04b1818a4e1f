"""What a swap of versions costs those who ask meanwhile: latency in windows with and without one, interleaved.

Requests come in an open loop, whatever happens, each counted in the window in which it was due. A window with a swap
reaches from the wish to deploy until the new version is confirmed; the quiet one before it is as long as the last.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np
import uvloop
from rich.progress import Progress

from agent.client import AsyncClient
from agent.errors import AgentError
from tools.bench_load import quantiles_us
from tools.demo.stage import StepFailedError
from tools.rig import models
from tools.rig.box import Rig

_FIRST_QUIET_S: Final = 2.0
_WAIT_S: Final = 1.0  # of one question after the deployment
_SWAP_TIMEOUT_S: Final = 60.0
_VERSIONS: Final = ("1.0.0", "2.0.0")


@dataclass(kw_only=True)
class Windows:
    """Latencies in seconds and failures, by whether a swap was under way, of all windows of a kind together."""

    latencies: dict[bool, list[float]] = field(default_factory=lambda: {False: [], True: []})
    failed: Counter[str] = field(default_factory=Counter)
    swaps_s: list[float] = field(default_factory=list)

    def figures(self) -> dict[str, Any]:
        """Return what the report shows; times in milliseconds."""
        quiet, swap = (quantiles_us(self.latencies[kind]) for kind in (False, True))
        both = bool(quiet and swap and quiet["99.9"])
        return {
            "swaps": len(self.swaps_s),
            "longest swap, wish to confirmed, s": max(self.swaps_s, default=0.0),
            "requests, quiet": len(self.latencies[False]),
            "requests, swap": len(self.latencies[True]),
            **{f"p{q}, quiet, ms": quiet[q] / 1000 for q in ("50", "99", "99.9", "100") if quiet},
            **{f"p{q}, swap, ms": swap[q] / 1000 for q in ("50", "99", "99.9", "100") if swap},
            "p99.9, swap / quiet": swap["99.9"] / quiet["99.9"] if both else None,
            "failed requests": self.failed.total(),
            "failures": dict(self.failed),
        }


def swap(rig: Rig, progress: Progress, *, swaps: int, rate_s: float) -> dict[str, Any]:
    """Measure and return the figures of ``Windows``."""
    first, second = (models.tiny(version=version) for version in _VERSIONS)
    rig.publish_model(first)
    rig.publish_model(second, channel="")
    rig.configure(first.name, state="state-swap")
    rig.start_serving()
    bar = progress.add_task("swap", total=swaps)
    try:
        rig.swap(first.name, _VERSIONS[1])  # both are on disk from here on: what is measured is the swap
        rig.swap(first.name, _VERSIONS[0])
        example = {first.takes.name: first.example(np.random.default_rng(1))[:1]}
        found = uvloop.run(_windows(rig, first.name, example, swaps, rate_s, lambda: progress.advance(bar)))
    finally:
        rig.stop_daemon()
        progress.remove_task(bar)
    return {"requests/s": rate_s, **found.figures()}


async def _windows(
    rig: Rig, model: str, inputs: dict[str, Any], swaps: int, rate_s: float, on_swap: Callable[[], None]
) -> Windows:
    found, swapping, outstanding = Windows(), False, set[asyncio.Task[None]]()
    async with AsyncClient(rig.socket, retries=0) as client:

        async def one(due: float, during: bool) -> None:
            try:
                await client.infer(model, inputs)
            except (AgentError, OSError) as error:
                found.failed[getattr(error, "code", type(error).__name__)] += 1
            else:
                found.latencies[during].append(time.perf_counter() - due)

        async def ask_on() -> None:
            started, number = time.perf_counter(), 0
            async with asyncio.TaskGroup() as group:
                while True:
                    due = started + number / rate_s
                    await asyncio.sleep(max(0.0, due - time.perf_counter()))
                    task = group.create_task(one(min(due, time.perf_counter()), swapping))
                    outstanding.add(task)
                    task.add_done_callback(outstanding.discard)
                    number += 1

        asking = asyncio.ensure_future(ask_on())
        try:
            quiet_s = _FIRST_QUIET_S
            for number in range(swaps):
                await asyncio.sleep(quiet_s)
                swapping, began = True, time.perf_counter()
                await _deploy(client, model, _VERSIONS[(number + 1) % 2])
                quiet_s = time.perf_counter() - began
                swapping = False
                found.swaps_s.append(quiet_s)
                on_swap()
            while outstanding:
                asking.cancel()
                await asyncio.wait(outstanding)
        finally:
            asking.cancel()
            with suppress(asyncio.CancelledError):
                await asking
    return found


async def _deploy(client: AsyncClient, model: str, version: str) -> None:
    deployment = (await client.call("deploy", {"model": model, "version": version}))["deployment"]
    async with asyncio.timeout(_SWAP_TIMEOUT_S):
        while True:
            try:
                record = await client.call("deployment", {"id": deployment, "wait_s": _WAIT_S})
            except AgentError:
                await asyncio.sleep(0.01)  # it has not begun
                continue
            if record["final"]:
                break
    if record["state"] != "confirmed":
        raise StepFailedError(f"{model} {version}: {record['state']}: {record.get('message', '')}")
