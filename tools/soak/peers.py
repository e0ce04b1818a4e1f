"""``python -m tools.soak.peers KIND …``: clients as processes of their own, so that they can be killed like any other.

A peer says ``ready`` once its first answer came, asks until its standard input ends, waits for what is outstanding,
and prints its ledger as one line of JSON. ``victim`` never ends by itself.
"""

from __future__ import annotations

import asyncio
import http.client
import json
import random
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any, Final

import click
import numpy as np

from agent.client import AsyncClient
from agent.errors import AgentError, UnavailableError
from tools.rig.ledger import Ledger
from tools.rig.line import MODEL, Line, memfd, place, values

KINDS: Final = ("frames", "http", "library", "lanes", "victim")
_COLUMNS: Final = (2, 5, 1000, 40_000)  # the last is above what the daemon keeps out of its arena
_DEPTH_MAX: Final = 24
_LIBRARY_TASKS: Final = 6
_HTTP_COLUMNS_MAX: Final = 1000  # as JSON
_PACE_S: Final = 0.002  # between two requests: the soak is about faults, not about load


@click.command()
@click.argument("kind", type=click.Choice(KINDS))
@click.option("--socket", "path", type=click.Path(path_type=Path), required=True)
@click.option("--port", type=int, required=True, help="HTTP.")
@click.option("--seed", type=int, required=True)
def main(kind: str, path: Path, port: int, seed: int) -> None:
    """Ask until told to stop."""
    rng = random.Random(seed)
    stop = threading.Event()
    if kind == "victim":
        _victim(path, rng)
    threading.Thread(target=_stop_at_end_of_input, args=(stop,), daemon=True).start()
    if kind == "frames":
        ledger = _frames(path, rng, stop)
    elif kind == "http":
        ledger = _http(port, rng, stop)
    else:
        ledger = asyncio.run(_library(path, rng, stop, lanes=kind == "lanes"))
    print(json.dumps(ledger.plain()), flush=True)


def _frames(path: Path, rng: random.Random, stop: threading.Event) -> Ledger:
    """Raw frames, many outstanding, some withdrawn, some with hardly any time."""
    with Line(path, "frames") as line:
        line.infer(values(0, 2))
        line.settle()
        _say_ready()
        try:
            while not stop.is_set():
                more: dict[str, Any] = {"deadline_ms": rng.choice((1, 5, 20))} if rng.random() < 0.1 else {}
                request_id = line.infer(values(line.ledger.asked, rng.choice(_COLUMNS)), **more)
                if rng.random() < 0.1:
                    line.send({"kind": "cancel", "id": request_id})
                line.settle(at_most=rng.randrange(_DEPTH_MAX))
                time.sleep(_PACE_S)
        except OSError as error:
            line.ledger.close(str(error))
        line.settle()
        return line.ledger


def _http(port: int, rng: random.Random, stop: threading.Event) -> Ledger:
    """Open Inference Protocol with keep-alive, one at a time."""
    ledger = Ledger(name="http")
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60.0)
    for number in range(1 << 40):
        if stop.is_set():
            break
        row = values(number, rng.choice([columns for columns in _COLUMNS if columns <= _HTTP_COLUMNS_MAX]))
        entry = {"name": "x", "datatype": "FP32", "shape": list(row.shape), "data": row.ravel().tolist()}
        ledger.ask(number, row)
        try:
            connection.request("POST", f"/v2/models/{MODEL}/infer", json.dumps({"id": str(number), "inputs": [entry]}))
            response = connection.getresponse()
            answer = json.loads(response.read())
        except (OSError, http.client.HTTPException, ValueError) as error:
            ledger.close(f"{type(error).__name__}: {error}")
            connection.close()
            continue
        if response.status != 200:
            ledger.refused(number, str(answer.get("code")), str(answer))
        elif answer.get("id") != str(number):
            ledger.fault(f"request {number}: the answer has id {answer.get('id')!r}")
        else:
            (output,) = answer["outputs"]
            found = np.array(output["data"], dtype=np.float32).reshape(output["shape"])
            ledger.result(number, answer["model_version"], found)
        if not number:
            _say_ready()
        time.sleep(_PACE_S)
    connection.close()
    return ledger


async def _library(path: Path, rng: random.Random, stop: threading.Event, *, lanes: bool) -> Ledger:
    """The client library with its own repetitions: small and large arrays, regions, windows, impatience."""
    ledger = Ledger(name="lanes" if lanes else "library")
    async with AsyncClient(path, lanes=lanes) as client:

        async def caller(number: int) -> None:
            size = 4 * max(_COLUMNS)
            with await client.region(size) as region, await client.region(size) as window:
                while not stop.is_set():
                    number += _LIBRARY_TASKS
                    row, reply = values(number, rng.choice(_COLUMNS)), None
                    asked = row
                    impatient = rng.random() < 0.05
                    if not impatient and rng.random() < 0.5:  # who withdraws must not use the memory again
                        asked = region.array(row.shape, np.float32, 0)
                        asked[...] = row
                        reply = window if rng.random() < 0.5 else None
                    ledger.ask(number, row)
                    try:
                        async with asyncio.timeout(0.002 if impatient else 60.0):
                            result = await client.infer(MODEL, {"x": asked}, reply=reply)
                        ledger.result(number, result.version, result.outputs["y"])
                    except TimeoutError:
                        ledger.refused(number, "canceled" if impatient else "timeout", "no answer within a minute")
                    except UnavailableError as error:
                        ledger.refused(number, "broken" if "broke" in str(error) else error.code, str(error))
                    except AgentError as error:
                        ledger.refused(number, error.code, str(error))
                    await asyncio.sleep(_PACE_S)

        ledger.ask(0, values(0, 2))
        try:
            result = await client.infer(MODEL, {"x": values(0, 2)})
            ledger.result(0, result.version, result.outputs["y"])
        except AgentError as error:
            ledger.refused(0, error.code, str(error))
        _say_ready()
        async with asyncio.TaskGroup() as group:
            for number in range(1, 1 + _LIBRARY_TASKS):
                group.create_task(caller(number))
    return ledger


def _victim(path: Path, rng: random.Random) -> None:
    """Everything at once, until somebody kills us: regions, large bodies, half a frame on its way."""
    columns = max(_COLUMNS)
    with Line(path, "victim") as line, memfd(8 * columns) as descriptor:
        line.ask({"kind": "attach", "region": 1, "nbytes": 8 * columns}, passed=(descriptor,))
        _say_ready()
        while True:
            for _ in range(rng.randrange(1, 32)):
                line.infer(values(line.ledger.asked, rng.choice(_COLUMNS)))
                request_id = next(line.ids)
                line.ledger.ask(request_id, values(0, 2))
                window = {"region": 1, "offset": 4 * columns, "nbytes": 4 * columns}
                named = {"model": MODEL, "tensors": [place(1, 0, columns)], "reply": window}
                line.send({"kind": "infer", "id": request_id, **named})
            line.settle(at_most=16)


def _stop_at_end_of_input(stop: threading.Event) -> None:
    with suppress(OSError):
        while sys.stdin.buffer.raw.read(1):  # type: ignore[union-attr]
            pass
    stop.set()


def _say_ready() -> None:
    print("ready", flush=True)


if __name__ == "__main__":
    main()
