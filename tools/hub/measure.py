"""Measure models beside each other on this machine: latency, memory, and their answers to the same inputs.

Each model has a process of its own (``measure_child``). Only one of them works at a time, and they take turns, so that
whatever else this machine does meets all of them alike. Promises: a model that crashes, hangs or refuses the inputs is
reported with its reason and does not disturb the others; every child has ended when ``measure`` returns.
"""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from tools.hub.errors import TrialError
from tools.hub.listener import Listener
from tools.hub.samples import Feed

Array = npt.NDArray[Any]
_BURST: Final = 3  # runs per turn; one more before them finds its caches cold and is not counted
_RUNS_MIN: Final = 12
_LOAD_S_MAX: Final = 600.0
OUTPUT_BYTES_MAX: Final = 256 * 1024 * 1024  # answers of one model that are kept and compared
CPU: Final = "CPUExecutionProvider"


@dataclass(frozen=True, slots=True, kw_only=True)
class Effort:
    """How much is measured: at most ``runs_max`` runs of each model, for about ``seconds_max`` each."""

    runs_max: int = 150
    seconds_max: float = 6.0
    threads: int = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """One model. Times are of one run of one feed; ``outputs`` holds the answers by output, then by feed."""

    load_ms: float
    p50_ms: float
    p99_ms: float
    runs: int
    peak_bytes: int  # resident memory of its process at its highest
    growth_bytes: int  # the same over the process with the runtime alone
    outputs: Mapping[str, Sequence[Array]]
    beside: Sequence[Mapping[str, Array]]  # the answers to each feed that was not timed


def measure(
    models: Mapping[str, Path],
    feeds: Sequence[Feed],
    *,
    beside: Sequence[Feed] = (),
    providers: Sequence[str] = (CPU,),
    effort: Effort,
    output_bytes_max: int = OUTPUT_BYTES_MAX,
    listener: Listener,
) -> dict[str, Measured | TrialError]:
    """Return what was measured of each of ``models``, or why it could not be.

    Args:
        models: By a name of the caller's.
        feeds: At least one; all models run the same.
        beside: Further feeds, which are answered and not timed.
        providers: Execution providers, the first of which has to be used.
        effort: How much.
        output_bytes_max: With more answers than this, fewer feeds are run.
        listener: Told about progress.
    """
    with ExitStack() as stack:
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="inferhub-measure-")))
        stored = _store([*feeds, *beside], scratch / "feeds")
        paths, beside_paths = stored[: len(feeds)], stored[len(feeds) :]
        listener.stage("load and run", len(models), "steps")
        running: dict[str, _Subject] = {}
        found: dict[str, Measured | TrialError] = {}
        for name, path in models.items():
            subject = stack.enter_context(_Subject(name, path, scratch / "out" / str(len(found) + len(running))))
            try:
                subject.load(effort.threads, providers)
                answered = subject.answer(paths, beside_paths, output_bytes_max)
                paths = paths[:answered]  # the others answer what the first had room for
                running[name] = subject
            except TrialError as error:
                found[name] = error
            listener.advance(1)
        _take_turns(running, found, paths, effort, listener)
        for name, subject in running.items():
            try:
                found[name] = subject.result(len(paths))
            except TrialError as error:
                found[name] = error
        return {name: found[name] for name in models}


def _take_turns(
    running: dict[str, _Subject],
    found: dict[str, Measured | TrialError],
    feeds: Sequence[Path],
    effort: Effort,
    listener: Listener,
) -> None:
    listener.stage("time in turns", effort.runs_max * len(running), "steps")
    until = time.monotonic() + effort.seconds_max * len(running)
    done = 0
    while running and done < effort.runs_max and (done < _RUNS_MIN or time.monotonic() < until):
        feed = feeds[done // _BURST % len(feeds)]
        for name, subject in list(running.items()):
            try:
                subject.time(feed, _BURST)
            except TrialError as error:
                found[name] = error
                del running[name]
            listener.advance(_BURST)
        done += _BURST
    listener.advance((effort.runs_max - done) * len(running))  # time was up


def _store(feeds: Sequence[Feed], folder: Path) -> list[Path]:
    """Write each feed to a file of its own, so that a child holds one at a time."""
    folder.mkdir()
    paths = []
    for number, feed in enumerate(feeds):
        path = folder / f"{number:06}.npz"
        arrays = {f"i{place}": array for place, array in enumerate(feed.values())}
        np.savez(path, names=np.array(list(feed)), **arrays)  # type: ignore[arg-type]
        paths.append(path)
    return paths


class _Subject:
    """The parent's end of one child."""

    def __init__(self, name: str, model: Path, out: Path) -> None:
        self._name = name
        self._model = model
        self._out = out
        self._load_ms = 0.0
        self._names: list[str] = []
        self._times: list[float] = []
        self._complaints = tempfile.TemporaryFile()  # noqa: SIM115  # closed with the child's pipes
        environment = os.environ | {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
        self._child = subprocess.Popen(
            [sys.executable, "-m", "tools.hub.measure_child"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._complaints,
            env=environment,
        )

    def __enter__(self) -> _Subject:
        return self

    def __exit__(self, *_: object) -> None:
        self._child.kill()
        self._child.wait()
        for pipe in (self._child.stdin, self._child.stdout, self._complaints):
            assert pipe is not None
            with suppress(BrokenPipeError):  # it died before it read what was asked
                pipe.close()

    def load(self, threads: int, providers: Sequence[str]) -> None:
        """Open the model."""
        model = str(self._model.absolute())
        self._load_ms = self._ask("load", model=model, threads=threads, providers=list(providers))["load_ms"]

    def answer(self, feeds: Sequence[Path], beside: Sequence[Path], bytes_max: int) -> int:
        """Keep the answers to as many of ``feeds`` as there is room for, and to all ``beside``; return how many."""
        self._out.mkdir(parents=True)
        asked = {"out": str(self._out), "bytes_max": bytes_max}
        told = self._ask("outputs", feeds=[str(path) for path in feeds], **asked)
        self._names = told["names"]
        self._ask("outputs", feeds=[str(path) for path in beside], **asked | {"bytes_max": 1 << 62})
        return int(told["answered"])

    def time(self, feed: Path, runs: int) -> None:
        """Run one feed so many times."""
        self._times += self._ask("time", feed=str(feed), runs=runs)["ms"]

    def result(self, timed: int) -> Measured:
        """Return everything that was found; the first ``timed`` feeds were timed."""
        answers = self._answers()
        memory = self._ask("memory")
        times = sorted(self._times)
        return Measured(
            load_ms=self._load_ms,
            p50_ms=round(float(np.median(times)), 4),
            p99_ms=round(times[min(len(times) - 1, len(times) * 99 // 100)], 4),
            runs=len(times),
            peak_bytes=memory["peak_bytes"],
            growth_bytes=max(0, memory["peak_bytes"] - memory["baseline_bytes"]),
            outputs={name: [answer[name] for answer in answers[:timed]] for name in self._names},
            beside=answers[timed:],
        )

    def _answers(self) -> list[dict[str, Array]]:
        answers = []
        for path in sorted(self._out.glob("*.npz")):
            with np.load(path, allow_pickle=False) as archive:
                answers.append({name: archive[f"o{number}"] for number, name in enumerate(self._names)})
        return answers

    def _ask(self, verb: str, **arguments: Any) -> dict[str, Any]:
        """Return the child's answer.

        Raises:
            TrialError: it says that it cannot, has ended, or says nothing for too long.
        """
        assert self._child.stdin is not None
        assert self._child.stdout is not None
        try:
            self._child.stdin.write(json.dumps({"do": verb, **arguments}).encode() + b"\n")
            self._child.stdin.flush()
        except BrokenPipeError:
            pass  # its end is told below
        readable, _, _ = select.select([self._child.stdout], [], [], _LOAD_S_MAX)
        if not readable:
            self._child.kill()
            raise TrialError(f"{self._name}: no answer within {_LOAD_S_MAX:.0f} s")
        line = self._child.stdout.readline()
        if not line:
            raise TrialError(f"{self._name}: its process ended with {self._child.wait()}{self._last_words()}")
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise TrialError(f"{self._name}: {answer['error']}")
        return answer

    def _last_words(self) -> str:
        self._complaints.seek(0)
        said = self._complaints.read()[-4096:].decode(errors="replace").strip()
        return f": {said.rpartition(chr(10))[2][:300]}" if said else ""
