"""Try one variant as a box will: in a worker's own process and sandbox, with its handler, warm-up and golden test.

``python -m tools.hub.trial`` reads a worker's spec as JSON from stdin, loads it with the worker's own code, times it
and answers with one JSON object. A child, because a native crash must not take ``pack`` down and because only a fresh
process shows what a variant costs.
Absent on purpose: devices that this machine lacks; ``pack`` decides what to do about those.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from typing import Any, Final

import msgpack
import msgspec

from agent.errors import AgentError
from tools.hub.errors import TrialError

_TIMING_RUNS_MAX: Final = 50
_TIMING_S_MAX: Final = 3.0
_TIMEOUT_S: Final = 900.0
_ONE_THREAD: Final = {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}  # around which the sandbox closes


class Outcome(msgspec.Struct, frozen=True, kw_only=True):
    """What was measured, or the ``code`` and ``message`` of what did not hold."""

    code: str = ""
    message: str = ""
    golden: list[dict[str, Any]] = []
    provider: str = ""
    sandbox: str = ""  # level: full, partial, none
    load_ms: float = 0.0
    p50_ms: float = 0.0  # one row of the first golden input, after warm-up
    p99_ms: float = 0.0
    host_bytes: int = 0  # peak growth over the process with only the runtime loaded


def attempt(spec: Mapping[str, Any]) -> Outcome:
    """Return what a child measured for ``spec``; its ``scratch_dir`` is supplied here.

    Raises:
        TrialError: the variant does not load, crashes, is too slow, or a golden output is outside its tolerance.
    """
    where = f"variant {spec['variant']}"
    with tempfile.TemporaryDirectory(prefix="inferhub-trial-") as scratch:
        try:
            done = subprocess.run(
                [sys.executable, "-m", "tools.hub.trial"],
                input=msgspec.json.encode({**spec, "scratch_dir": scratch}),
                capture_output=True,
                timeout=_TIMEOUT_S,
                check=False,
                env=os.environ | _ONE_THREAD,
            )
        except subprocess.TimeoutExpired as error:
            raise TrialError(f"{where}: no result within {_TIMEOUT_S:.0f} s") from error
    try:
        outcome = msgspec.json.decode(done.stdout, type=Outcome)
    except msgspec.DecodeError as error:
        last = done.stderr.decode(errors="replace").strip().rpartition("\n")[2]
        raise TrialError(f"{where}: the worker ended with {done.returncode}: {last}") from error
    if outcome.code:
        hint = "A box would refuse it too: correct the model, the handler, the recorded outputs or the tolerance."
        raise TrialError(f"{where}: [{outcome.code}] {outcome.message}", hint=hint)
    return outcome


def main() -> None:
    """Serve one request; failures are an answer, not an exit status."""
    raw = json.loads(sys.stdin.buffer.read())
    try:
        outcome = _try(raw)
    except AgentError as error:
        outcome = Outcome(code=error.code, message=str(error))
    sys.stdout.buffer.write(msgspec.json.encode(outcome))


def _try(raw: Mapping[str, Any]) -> Outcome:
    from agent.worker import loading
    from agent.worker.runtimes import table
    from agent.worker.spec import parse

    spec = parse(msgpack.packb(raw))
    table.preload_all(spec.runtime)  # which a box's zygote has done before
    before = _resident_bytes()
    loaded = loading.load(spec)
    one = {
        name: array[:1] if loaded.signature.batch_axis else array for name, array in loaded.goldens[0].inputs.items()
    }
    times = sorted(_time(lambda: loaded.runtime.run(one)))
    hello = loaded.hello
    return Outcome(
        golden=hello["golden"],
        provider=hello["provider"],
        sandbox=hello["sandbox"]["level"],
        load_ms=hello["load_ms"],
        p50_ms=round(times[len(times) // 2], 3),
        p99_ms=round(times[len(times) * 99 // 100], 3),
        host_bytes=max(0, hello["memory"]["peak_bytes"] - before),
    )


def _time(call: Callable[[], object]) -> list[float]:
    times: list[float] = []
    until = time.perf_counter() + _TIMING_S_MAX
    while len(times) < _TIMING_RUNS_MAX and (not times or time.perf_counter() < until):
        began = time.perf_counter()
        call()
        times.append((time.perf_counter() - began) * 1000)
    return times


def _resident_bytes() -> int:
    with open("/proc/self/statm", "rb") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


if __name__ == "__main__":
    main()
