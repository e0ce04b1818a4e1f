"""What is done to the daemon while its clients go on asking. Each act returns what it saw, as a ledger.

An act that finds a fault writes it into its ledger; an act that cannot be done raises.
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any, Final

from agent.wire import MAGIC, PREFIX, encode
from tools.demo.stage import StepFailedError
from tools.rig.box import Rig
from tools.rig.ledger import FACTORS, Ledger
from tools.rig.line import MODEL, Line, memfd, place, values

Act = Callable[[Rig, random.Random], Ledger]

_BURST_MIN: Final = 200
_BURST_MAX: Final = 800
_STORM: Final = 200
_COLUMNS: Final = 30_000  # of what lies in shared memory
_BYTES: Final = 4 * _COLUMNS
_REFUSALS: Final = frozenset({"bad_tensor", "invalid_input", "too_large", "overloaded"})
_VICTIM_READY_S: Final = 60.0


def swap(rig: Rig, rng: random.Random) -> Ledger:
    """Deploy the other version, or the same again; a worker killed meanwhile may end the trial, which is well."""
    ledger = Ledger(name="swap")
    version = rng.choice(sorted(FACTORS))
    try:
        ledger.outcomes[str(rig.swap(MODEL, version, force=True)["state"])] += 1
    except StepFailedError as error:
        if " rolled_back" not in str(error) and "worker death" not in str(error):
            ledger.fault(f"deploying {version}: {error}")
        ledger.outcomes["rolled_back"] += 1
    return ledger


def kill_worker(rig: Rig, rng: random.Random) -> Ledger:
    """``kill -9`` of the model's workers with requests in their hands."""
    with Line(rig.socket, "kill_worker") as line:
        for _ in range(rng.randrange(20, 60)):
            line.infer(values(line.ledger.asked, rng.choice((2, 5, _COLUMNS))))
        for pid in rig.workers(MODEL):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
                line.ledger.outcomes["killed"] += 1
        line.settle()
        return line.ledger


def kill_client(rig: Rig, rng: random.Random) -> Ledger:
    """A client dies in the middle of its requests, with memory attached."""
    ledger = Ledger(name="kill_client")
    command = [*(sys.executable, "-m", "tools.soak.peers", "victim", "--socket", str(rig.socket))]
    command += ["--port", str(rig.http_port), "--seed", str(rng.randrange(1 << 30))]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as victim:
        assert victim.stdout is not None
        assert victim.stderr is not None
        timer = threading.Timer(_VICTIM_READY_S, victim.kill)
        timer.start()
        ready = victim.stdout.readline()
        timer.cancel()
        with suppress(subprocess.TimeoutExpired):
            victim.wait(rng.uniform(0.0, 0.3))
            ledger.fault(f"the victim ended by itself: {victim.stderr.read().decode()[-500:]}")
        victim.kill()
    ledger.outcomes["killed" if ready else "too slow to be killed"] += 1
    return ledger


def burst(rig: Rig, rng: random.Random) -> Ledger:
    """Many more requests at once than the queue holds."""
    with Line(rig.socket, "burst") as line:
        columns = rng.choice((2, 2, _COLUMNS))
        for _ in range(rng.randrange(_BURST_MIN, _BURST_MAX) // (10 if columns == _COLUMNS else 1)):
            line.infer(values(line.ledger.asked, columns))
        line.settle()
        return line.ledger


def cancel_storm(rig: Rig, rng: random.Random) -> Ledger:
    """Requests that are withdrawn as soon as they are made, some twice, some that never were."""
    with Line(rig.socket, "cancel_storm") as line:
        for _ in range(_STORM):
            request_id = line.infer(values(line.ledger.asked, rng.choice((2, 2, _COLUMNS))))
            for _ in range(rng.randrange(1, 3)):
                line.send({"kind": "cancel", "id": rng.choice((request_id, request_id, 1 << 40))})
        line.settle()
        return line.ledger


def region_lies(rig: Rig, rng: random.Random) -> Ledger:
    """Descriptors, sizes and places that are not what they are said to be."""
    with Line(rig.socket, "region_lies") as line, memfd(_BYTES) as good, memfd(_BYTES, seals=0) as unsealed:
        read, write = os.pipe()
        for descriptor, nbytes in ((unsealed, _BYTES), (good, _BYTES * 2), (good, 1 << 62), (read, _BYTES)):
            _refused(line, {"kind": "attach", "region": 1, "nbytes": nbytes}, passed=(descriptor,))
        os.close(read)
        os.close(write)
        line.ask({"kind": "attach", "region": 1, "nbytes": _BYTES}, passed=(good,))
        for _ in range(20):
            region, offset = rng.choice(((1, rng.randrange(1, 1 << 40)), (7, 0), (1, (1 << 63) - 1), (1, -1), (-1, 0)))
            named = {"model": MODEL, "tensors": [place(region, offset, _COLUMNS)]}
            _refused(line, {"kind": "infer", **named})
            window = {"region": region, "offset": offset, "nbytes": _BYTES}
            _refused(line, {"kind": "infer", "model": MODEL, "tensors": [place(1, 0, 8)], "reply": window})
        _refused(line, {"kind": "detach", "region": 9})
        line.settle()
        return line.ledger


def region_moves(rig: Rig, rng: random.Random) -> Ledger:
    """Memory that is detached, closed and rewritten while requests that name it are under way."""
    with Line(rig.socket, "region_moves") as line, memfd(2 * _BYTES) as descriptor:
        row = values(rng.randrange(1000), _COLUMNS)
        os.pwrite(descriptor, row.tobytes(), 0)
        own = os.dup(descriptor)
        line.ask({"kind": "attach", "region": 1, "nbytes": 2 * _BYTES}, passed=(own,))
        os.close(own)
        for _ in range(rng.randrange(1, 12)):  # held by the requests, whatever becomes of the region
            _ask_by_region(line, row)
        answer = line.ask({"kind": "detach", "region": 1})
        if answer["kind"] != "reply":
            line.ledger.fault(f"detach during use: {answer}")
        _refused(line, {"kind": "infer", "model": MODEL, "tensors": [place(1, 0, _COLUMNS)]})
        line.settle()
        line.ask({"kind": "attach", "region": 1, "nbytes": 2 * _BYTES}, passed=(descriptor,))
        stop = threading.Event()
        writer = threading.Thread(target=_rewrite, args=(descriptor, stop))
        writer.start()
        try:
            for _ in range(30):  # an answer to some mixture is all there can be, but it must be one answer
                window = {"region": 1, "offset": _BYTES, "nbytes": _BYTES}
                named = {"model": MODEL, "tensors": [place(1, 0, _COLUMNS)], "reply": window}
                answer = line.ask({"kind": "infer", **named})
                if answer["kind"] != "result":
                    line.ledger.refused_outside(answer)
        finally:
            stop.set()
            writer.join()
        return line.ledger


def malformed(rig: Rig, rng: random.Random) -> Ledger:
    """Bytes that are no frames, frames that are cut: each is told what was wrong, then the connection ends."""
    ledger = Ledger(name="malformed")
    good = b"".join(bytes(part) for part in encode({"kind": "infer", "id": 1, "model": MODEL, "tensors": []}))
    for data in (
        rng.randbytes(64),
        MAGIC + rng.randbytes(200),
        PREFIX.pack(MAGIC, 1 << 30, 0),
        PREFIX.pack(MAGIC, 20, 1 << 62),
        PREFIX.pack(MAGIC, 1, 0) + b"\xc1",
        good[: rng.randrange(1, len(good))],
        b"".join(bytes(part) for part in encode({"kind": "no such kind", "id": 1})),
        b"POST /v2/models/times/infer HTTP/1.1\r\n\r\n",
    ):
        with Line(rig.socket, "malformed") as line:
            with suppress(ConnectionError):
                line.send_raw(data)
            for header in line.last_words():
                ledger.outcomes[str(header.get("code"))] += 1
                if header["kind"] != "error" or header.get("code") == "internal":
                    ledger.fault(f"{data[:40]!r} was answered by {header}")
    return ledger


ACTS: Final[Mapping[str, Act]] = {
    act.__name__: act for act in (kill_worker, kill_client, burst, cancel_storm, region_lies, region_moves, malformed)
}


def _ask_by_region(line: Line, row: Any) -> None:
    request_id = next(line.ids)
    line.ledger.ask(request_id, row)
    line.send({"kind": "infer", "id": request_id, "model": MODEL, "tensors": [place(1, 0, _COLUMNS)]})


def _refused(line: Line, header: dict[str, Any], **more: Any) -> None:
    """Ask for something that must be refused, and by its name."""
    answer = line.ask(header, **more)
    if answer["kind"] != "error":
        line.ledger.fault(f"{header} was answered by {answer}")
    elif answer["code"] not in _REFUSALS:
        line.ledger.refused_outside(answer)
    else:
        line.ledger.outcomes[answer["code"]] += 1


def _rewrite(descriptor: int, stop: threading.Event) -> None:
    number = 0
    while not stop.is_set():
        number += 1
        os.pwrite(descriptor, values(number, _COLUMNS).tobytes(), 0)
