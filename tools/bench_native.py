"""The load generator in C: for many outstanding requests, where a client in Python would be what is measured.

``loadgen.c`` is compiled on first use. It asks over and over what it is given in a file; what that is, is made here.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import socket
import subprocess
import tempfile
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

from agent.client.messages import infer_frame, lane_frame
from tools.bench_lanes import LaneError
from tools.bench_load import Sample
from tools.bench_ways import Http, Work

_SOURCE: Final = Path(__file__).with_name("loadgen.c")
_COMPILERS: Final = ("cc", "gcc", "clang")
_FLAGS: Final = ("-std=gnu11", "-O2", "-Wall", "-Wextra")
_COMPILE_TIMEOUT_S: Final = 60.0
_MARGIN_S: Final = 30.0  # beyond the measured time, for the start, the end and the sorting
_ANY_ID: Final = 0x7A7A_7A7A_7A7A_7A7A  # eight bytes long in MessagePack


_LANE_REFUSED: Final = 3  # exit status


class NativeError(Exception):
    """There is no native load generator, or it failed; the message says why."""


@dataclass(frozen=True, kw_only=True)
class Native:
    """One way to ask, by the compiled generator.

    ``arguments`` say where and in which protocol, ``spread`` whether a connection has one request outstanding (HTTP)
    or its share of them. ``lane`` is the frame that asks for a lane, on each connection first; empty for none.
    """

    name: str
    program: Path
    arguments: tuple[str, ...]
    request: bytes
    spread: bool
    lane: bytes = b""

    def closed(self, *, callers: int, connections: int, seconds: float) -> Sample:
        """Keep ``callers`` requests outstanding over at most ``connections``, or one on each.

        Raises:
            NativeError: it could not run or connect.
            LaneError: there is no lane.
        """
        lines = callers if self.spread else next(n for n in range(min(callers, connections), 0, -1) if not callers % n)
        with tempfile.TemporaryDirectory(prefix="inferd-request-") as folder:
            request, lane = Path(folder, "request"), Path(folder, "lane")
            request.write_bytes(self.request)
            lane.write_bytes(self.lane)
            command = [
                *(str(self.program), "--request", str(request), *self.arguments),
                *(("--lane", str(lane)) if self.lane else ()),
                *("--connections", str(lines), "--depth", str(callers // lines), "--seconds", str(seconds)),
            ]
            try:
                done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=seconds + _MARGIN_S)
            except (OSError, subprocess.TimeoutExpired) as error:
                raise NativeError(f"{self.program}: {error}") from error
        if done.returncode == _LANE_REFUSED:
            raise LaneError(done.stderr.strip())
        if done.returncode:
            raise NativeError(done.stderr.strip() or f"{self.program} ended with {done.returncode}")
        return _sample(json.loads(done.stdout))


def build(folder: Path) -> Path:
    """Return the compiled generator in ``folder``, compiling it unless that is done.

    Raises:
        NativeError: there is no compiler, or it refused.
    """
    compiler = next((found for name in _COMPILERS if (found := shutil.which(name))), None)
    program = folder / f"loadgen-{hashlib.sha256(_SOURCE.read_bytes()).hexdigest()[:12]}"
    if program.exists():
        return program
    if compiler is None:
        raise NativeError("no C compiler (apt-get install gcc libc6-dev)")
    folder.mkdir(parents=True, exist_ok=True)
    made = program.with_suffix(".new")
    command = [compiler, *_FLAGS, "-o", str(made), str(_SOURCE)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=_COMPILE_TIMEOUT_S)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise NativeError(f"{compiler}: {error}") from error
    if done.returncode:
        raise NativeError(f"{compiler} refused loadgen.c: {done.stderr.strip()[-400:]}")
    made.replace(program)
    return program


def over_unix(program: Path, path: Path, work: Work) -> Native:
    """Return the way of frames over the daemon's unix socket."""
    frame = b"".join(infer_frame(_ANY_ID, work.model, work.inputs))
    marked = b"\xa2id\xcf" + _ANY_ID.to_bytes(8, "big")
    offset = frame.index(marked) + len(marked) - 8
    arguments = ("--unix", str(path), "--id-offset", str(offset))
    return Native(name="unix native", program=program, arguments=arguments, request=frame, spread=False)


def over_lane(program: Path, path: Path, work: Work) -> Native:
    """Return the way of frames over direct lanes, one on each connection."""
    return replace(over_unix(program, path, work), name="lane native", lane=b"".join(lane_frame(1, work.model)))


def over_http(program: Path, http: Http) -> Native:
    """Return the way of HTTP, one request at a time on each connection."""
    host, port = http.address()
    arguments = ("--http", "--tcp", f"{socket.gethostbyname(host)}:{port}")
    return Native(name="http native", program=program, arguments=arguments, request=http.request(), spread=True)


def _sample(found: dict[str, Any]) -> Sample:
    errors = Counter({found["first_error"] or "error": found["errors"]} if found["errors"] else {})
    if found["unanswered"]:
        errors["unanswered"] += found["unanswered"]
    return Sample(
        answers=found["answers"],
        wall_s=found["seconds"],
        asked=found["sent"],
        errors=errors,
        quantiles_us=found["quantiles_us"],
        client_cpu_s=found["cpu_s"],
    )
