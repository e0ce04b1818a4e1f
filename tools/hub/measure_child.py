"""One model under measurement, in a process of its own: ``python -m tools.hub.measure_child``.

Reads JSON lines from standard input, answers each with one. A process per model, because only that shows what it takes
of memory, and because a native crash must not end the measurement of the others. Imports the runtime and nothing more.

``load``     {model, threads, providers} -> {load_ms}
``outputs``  {feeds: [path], out: folder, bytes_max} -> {names, answered}: runs each feed, stores its answers under the
             same name, and stops behind the first that goes beyond ``bytes_max``
``time``     {feed: path, runs} -> {ms: [...]}: runs one feed, the first time unmeasured
``memory``   {} -> {baseline_bytes, peak_bytes}: resident memory with the runtime alone, and at its highest
Any may answer {error} instead.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime

_LOG_ERRORS_ONLY = 3


class Child:
    """Answers the lines."""

    def __init__(self) -> None:
        self._baseline = _resident()["VmRSS"]
        self._session: Any = None

    def load(self, model: str, threads: int, providers: list[str]) -> dict[str, Any]:
        """Open the model as a worker would, with spinning off."""
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.log_severity_level = _LOG_ERRORS_ONLY
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        began = time.perf_counter()
        self._session = onnxruntime.InferenceSession(model, options, providers=providers)
        if self._session.get_providers()[0] != providers[0]:
            raise RuntimeError(f"{providers[0]} could not be used")
        return {"load_ms": round((time.perf_counter() - began) * 1000, 3)}

    def outputs(self, feeds: list[str], out: str, bytes_max: int) -> dict[str, Any]:
        """Run every feed once and keep the answers, as far as there is room for them."""
        names = [node.name for node in self._session.get_outputs()]
        kept = answered = 0
        for path in map(Path, feeds):
            if kept > bytes_max:
                break
            answers = self._session.run(names, _read(path))
            np.savez(Path(out, path.name), **{f"o{number}": answer for number, answer in enumerate(answers)})
            kept += sum(answer.nbytes for answer in answers)
            answered += 1
        return {"names": names, "answered": answered}

    def time(self, feed: str, runs: int) -> dict[str, Any]:
        """Run one feed ``runs`` times after one run that is not counted."""
        arrays = _read(Path(feed))
        self._session.run(None, arrays)
        taken = []
        for _ in range(runs):
            began = time.perf_counter()
            self._session.run(None, arrays)
            taken.append((time.perf_counter() - began) * 1000)
        return {"ms": taken}

    def memory(self) -> dict[str, Any]:
        """Tell this process' resident memory."""
        return {"baseline_bytes": self._baseline, "peak_bytes": _resident()["VmHWM"]}


def main() -> None:
    """Serve until standard input ends."""
    child = Child()
    for line in sys.stdin:
        request = json.loads(line)
        verb = getattr(child, request.pop("do"))
        try:
            answer = verb(**request)
        except Exception as error:  # noqa: BLE001  # the binding's exceptions have no root, and each is an answer
            answer = {"error": " ".join(str(error).split())[:500] or type(error).__name__}
        sys.stdout.write(json.dumps(answer) + "\n")
        sys.stdout.flush()


def _read(path: Path) -> Mapping[str, Any]:
    with np.load(path, allow_pickle=False) as archive:
        names = archive["names"].tolist()
        return {name: archive[f"i{number}"] for number, name in enumerate(names)}


def _resident() -> dict[str, int]:
    status = Path("/proc/self/status").read_text()
    return {line.split(":")[0]: int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("Vm")}


if __name__ == "__main__":
    main()
