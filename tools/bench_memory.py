"""What the daemon takes when it does nothing: memory by process, CPU, and how soon it answers after its start.

With mosquitto on this machine the MQTT link is up, without TLS, as on a box of a fleet.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Final

import numpy as np
from rich.progress import Progress

from tools.bench_processes import Processes, used_between
from tools.demo.broker import Mosquitto, find_mosquitto
from tools.rig import models
from tools.rig.box import Rig

_FURTHER: Final = 3  # models beside the first
_TICK_S: Final = 0.5  # of the progress bar
_MB: Final = 1e6


def memory(rig: Rig, progress: Progress, *, idle_seconds: float, starts: int, left_out: list[str]) -> dict[str, Any]:
    """Measure and return the figures; what hinders one is added to ``left_out``."""
    names = [f"small-{number}" for number in range(1 + _FURTHER)]
    for name in names:
        rig.publish_model(models.tiny(name=name))
    bar = progress.add_task("memory", total=2 + starts + int(idle_seconds / _TICK_S))
    try:
        with _broker(rig, left_out) as port:
            rig.configure(names[0], state="state-memory", more=_telemetry(port))
            rig.start_serving()
            colds = [_cold_start_s(rig, names[0], progress, bar) for _ in range(starts)]
            idle = _idle_percent(rig, idle_seconds, progress, bar)
            one = _pss(rig)
            rig.stop_daemon()
            rig.configure(*names, state="state-memory", more=_telemetry(port))
            rig.start_serving()
            for name in names:
                _answer(rig, name)
            progress.advance(bar, 2)
            all_of_them = _pss(rig)
    finally:
        rig.stop_daemon()
        progress.remove_task(bar)
    figures: dict[str, Any] = {
        "daemon, MB": one.get("daemon", 0.0) / _MB,
        "zygote, MB": one.get("zygote", 0.0) / _MB,
        "first worker, MB": one.get("worker", 0.0) / _MB,
        "with zygote and worker, MB": sum(one.values()) / _MB,
        "each further model, MB": (sum(all_of_them.values()) - sum(one.values())) / _FURTHER / _MB,
        "MQTT link": "up" if port is not None else "none",
        "idle CPU, %": sum(idle.values()),
        **{f"idle CPU of the {role}, %": percent for role, percent in idle.items()},
    }
    if colds:
        figures |= {"cold start, s": statistics.median(colds), "cold starts, s": [round(s, 3) for s in colds]}
    return figures


@contextmanager
def _broker(rig: Rig, left_out: list[str]) -> Iterator[int | None]:
    if find_mosquitto() is None:
        left_out.append("the MQTT link: mosquitto is not installed")
        yield None
        return
    broker = Mosquitto(rig.folder / "broker")
    broker.start()
    try:
        yield broker.port
    finally:
        broker.stop()


def _telemetry(port: int | None) -> str:
    """Return the link's configuration, with the intervals that a box has by default."""
    return "" if port is None else f'[telemetry]\nhost = "127.0.0.1"\nport = {port}\n'


def _cold_start_s(rig: Rig, model: str, progress: Progress, bar: Any) -> float:
    """Return seconds from process start to the first answer, from the box's disk; the daemon runs afterwards."""
    rig.stop_daemon()
    began = time.monotonic()
    rig.start_daemon()
    _answer(rig, model)
    found = time.monotonic() - began
    progress.advance(bar)
    return found


def _answer(rig: Rig, model: str) -> None:
    inputs = {"x": np.zeros((1, 64), np.float32)}
    with rig.client() as client:
        rig.until(lambda: client.infer(model, inputs), what=f"an answer of {model}")


def _idle_percent(rig: Rig, seconds: float, progress: Progress, bar: Any) -> dict[str, float]:
    """Return CPU time by role, in percent of a core."""
    rig.until(lambda: not rig.status()["slots"][0]["trial"], what="the trial is over")
    processes = Processes(rig.daemon_pid)
    before, began = processes.times(), time.monotonic()
    while (elapsed := time.monotonic() - began) < seconds:
        time.sleep(min(_TICK_S, seconds - elapsed))
        progress.advance(bar)
    after, wall_s = processes.times(), time.monotonic() - began
    return {role: 100 * used / wall_s for role, used in used_between(before, after).items()}


def _pss(rig: Rig) -> dict[str, int]:
    """Return bytes by role."""
    found: dict[str, int] = {}
    for row in Processes(rig.daemon_pid).memory():
        found[row["role"]] = found.get(row["role"], 0) + row["pss_bytes"]
    return found
