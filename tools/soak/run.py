"""One soak: clients that ask all the time, acts of violence from a seeded choice, and the reckoning at the end."""

from __future__ import annotations

import json
import random
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any, Final

from agent.errors import AgentError
from tools.demo.stage import StepFailedError
from tools.rig import models
from tools.rig.box import Rig
from tools.rig.ledger import FACTORS
from tools.rig.line import MODEL
from tools.rig.watch import ARENA_IDLE_BYTES_MAX, Holding, alive, crashes, descendants, look, not_settled
from tools.soak import chaos

_PEERS: Final = ("frames", "frames", "http", "library", "lanes")
_ACTS_AT_ONCE: Final = 2  # beside the swaps
_SETTLE_TIMEOUT_S: Final = 90.0
_PEER_TIMEOUT_S: Final = 120.0  # to start, and to end
_CONFIG: Final = f"""\
[engine]
queue_requests_max = 128
deaths_max = 1000
restart_cap_s = 0.2

[shared_memory]
arena_idle_bytes_max = {ARENA_IDLE_BYTES_MAX}
"""


@dataclass(kw_only=True)
class Report:
    """What happened, and what was wrong: no faults, no fault."""

    seed: int
    seconds: float
    acts: dict[str, int] = field(default_factory=dict)
    ledgers: list[dict[str, Any]] = field(default_factory=list)  # of the clients that asked all the time
    outcomes: dict[str, dict[str, int]] = field(default_factory=dict)  # of the acts
    before: dict[str, Any] = field(default_factory=dict)
    after: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)

    @property
    def answers(self) -> int:
        """How many answers were checked."""
        return sum(sum(ledger["outcomes"].values()) for ledger in self.ledgers)

    def plain(self) -> dict[str, Any]:
        """Return everything."""
        return {**vars(self), "answers": self.answers}


def prepare(rig: Rig) -> None:
    """Make a store with both versions of the model, and start a box that serves the first."""
    rig.make_store()
    for version, factor in FACTORS.items():
        rig.publish_model(
            models.times(factor, name=MODEL, version=version), channel="stable" if version == "1.0.0" else ""
        )
    rig.configure(MODEL, more=_CONFIG)
    rig.start_serving()


def soak(rig: Rig, *, seed: int, seconds: float, say: Callable[[str], None]) -> Report:
    """Run against a served box and return what was found; the daemon is stopped at the end."""
    report = Report(seed=seed, seconds=seconds)
    rng = random.Random(seed)
    say("warming up: every act once")
    with _peers(rig, rng, report):
        for name in (*chaos.ACTS, "swap"):
            _act(rig, name, rng.randrange(1 << 30), report)
    _settle_trial(rig)
    before = _quiet(rig, None)
    report.before = before.plain()
    seen = descendants(before.pid)
    with _peers(rig, rng, report):
        _trouble(rig, rng, seconds, report, seen, say)
    say("waiting for everything to be let go")
    try:
        _settle_trial(rig)
        after = _quiet(rig, before)
    except (OSError, AgentError, StepFailedError) as error:
        report.faults.append(f"the daemon did not come to rest: {error}")
    else:
        report.after = after.plain()
        report.faults += not_settled(before, after)
    seen |= descendants(before.pid)
    report.faults += [f"the daemon's log: {line}" for line in crashes(rig)]
    if status := rig.stop_daemon():
        report.faults.append(f"the daemon ended with {status}")
    if orphans := alive(seen):
        report.faults.append(f"processes outlived the daemon: {orphans}")
    return report


def _trouble(
    rig: Rig,
    rng: random.Random,
    seconds: float,
    report: Report,
    seen: set[tuple[int, float]],
    say: Callable[[str], None],
) -> None:
    """Keep one swap and some acts under way until the time is over."""
    end = time.monotonic() + seconds
    shown = 0.0
    with ThreadPoolExecutor(_ACTS_AT_ONCE + 1) as pool:
        swapping: Future[None] | None = None
        acting: set[Future[None]] = set()
        while (now := time.monotonic()) < end:
            if swapping is None or swapping.done():
                swapping = pool.submit(_act, rig, "swap", rng.randrange(1 << 30), report)
            acting = {future for future in acting if not future.done()}
            if len(acting) < _ACTS_AT_ONCE:
                name = rng.choice(sorted(chaos.ACTS))
                acting.add(pool.submit(_act, rig, name, rng.randrange(1 << 30), report))
            seen |= descendants(rig.daemon_pid)
            if rig.daemon is not None and rig.daemon.poll() is not None:
                return
            if now - shown > 10.0:
                shown = now
                acts = sum(report.acts.values())
                say(f"{end - now:.0f} s left, {acts} acts, {len(report.faults)} faults")
            time.sleep(0.05)


def _act(rig: Rig, name: str, seed: int, report: Report) -> None:
    act = chaos.swap if name == "swap" else chaos.ACTS[name]
    report.acts[name] = report.acts.get(name, 0) + 1
    try:
        ledger = act(rig, random.Random(seed))
    except (OSError, AgentError, StepFailedError) as error:
        report.faults.append(f"{name} (seed {seed}): {type(error).__name__}: {error}")
        return
    report.faults += [f"{fault} (seed {seed})" for fault in ledger.faults]
    counted = report.outcomes.setdefault(name, {})
    for outcome, count in ledger.outcomes.items():
        counted[outcome] = counted.get(outcome, 0) + count


@contextmanager
def _peers(rig: Rig, rng: random.Random, report: Report) -> Iterator[None]:
    """Clients that ask as long as the block runs; their ledgers are added to the report."""
    started: list[tuple[str, subprocess.Popen[str]]] = []
    try:
        for kind in _PEERS:
            command = [*(sys.executable, "-m", "tools.soak.peers", kind, "--socket", str(rig.socket))]
            command += ["--port", str(rig.http_port), "--seed", str(rng.randrange(1 << 30))]
            pipes: dict[str, Any] = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
            started.append((kind, subprocess.Popen(command, text=True, **pipes)))
        for kind, peer in started:
            if peer.stdout is None or peer.stdout.readline() != "ready\n":
                report.faults.append(f"{kind}: no answer at the start")
        yield
        for kind, peer in started:
            report.ledgers += _ledger_of(kind, peer, report.faults)
    finally:
        for _, peer in started:
            if peer.poll() is None:
                peer.kill()
            peer.communicate()


def _ledger_of(kind: str, peer: subprocess.Popen[str], faults: list[str]) -> list[dict[str, Any]]:
    try:
        output, errors = peer.communicate(timeout=_PEER_TIMEOUT_S)
        ledger: dict[str, Any] = json.loads(output.splitlines()[-1])
    except (subprocess.TimeoutExpired, ValueError, IndexError) as error:
        tail = errors[-1500:] if not isinstance(error, subprocess.TimeoutExpired) else "it did not end"
        faults.append(f"{kind}: a client failed: {tail}")
        return []
    faults += ledger["faults"]
    return [ledger]


def _settle_trial(rig: Rig) -> None:
    """Deploy the first version once more, in peace, so that every soak ends as it began."""
    deadline = time.monotonic() + _SETTLE_TIMEOUT_S
    while True:
        try:
            rig.swap(MODEL, "1.0.0", force=True)
        except StepFailedError:
            if time.monotonic() > deadline:
                raise
        else:
            return


def _quiet(rig: Rig, before: Holding | None) -> Holding:
    """Return the daemon's holdings once they are what they were, or after a while whatever they are."""
    deadline = time.monotonic() + _SETTLE_TIMEOUT_S
    while True:
        now: Holding | None = None
        with suppress(OSError):
            now = look(rig)
        if now is not None and (not not_settled(before or now, now) or time.monotonic() > deadline):
            return now
        if now is None and time.monotonic() > deadline:
            raise StepFailedError(f"the daemon says nothing any more: {rig.tail()}")
        time.sleep(0.2)
