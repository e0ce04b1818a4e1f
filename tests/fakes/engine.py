"""An engine and a control without models or processes, obeying the contracts the edges rely on.

Every request gets at most one answer, on the loop's thread: echoed at once, or after ``release()`` while ``holding``.
A canceled request gets none. Unknown models and closed doors are answered, never raised. An answer that would be a
second one fails the test that caused it.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from agent.errors import AgentError, ForbiddenError, LaneRefusedError, UnavailableError, UnknownModelError
from agent.regions import Region
from agent.serving.ports import InferRequest
from agent.wire import Buffer, Header, error_header

METADATA: Mapping[str, Any] = {
    "name": "echo",
    "versions": ["1.0.0"],
    "platform": "onnxruntime_onnx",
    "variant": "fp32",
    "max_batch": 8,
    "inputs": [{"name": "x", "datatype": "FP32", "shape": [-1, 4]}, {"name": "t", "datatype": "BYTES", "shape": [1]}],
    "outputs": [{"name": "y", "datatype": "FP32", "shape": [-1, 4]}],
}


@dataclass
class FakeState:
    """Readiness of one model."""

    ready: bool = True
    reason: str = ""


class FakeLane:
    """A lane whose worker is the test: ``worker`` is that end of its socket."""

    def __init__(self, number: int, model: str, client: str) -> None:
        self.number = number
        self.model = model
        self.version = "1.0.0"
        self.client = client
        self.worker, self.socket = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        self.on_end: Callable[[Any], None] = lambda lane: None
        self.regions: dict[int, Region] = {}
        self.revoked = False

    def lend(self, number: int, region: Region, done: Callable[[], None]) -> None:
        if self.revoked:
            raise LaneRefusedError("the lane has ended")
        region.hold()
        self.regions[number] = region
        done()

    def unlend(self, number: int) -> None:
        region = self.regions.pop(number, None)
        if region is not None:
            region.release()

    def revoke(self) -> None:
        if not self.revoked:
            self.revoked = True
            for number in list(self.regions):
                self.unlend(number)
            self.worker.close()
            self.on_end(self)


class FakeEngine:
    """Models by name; each echoes its request: the same body, under the same tensors or content type.

    Set ``reply`` to answer otherwise: it gets the request and returns header and body, or raises ``AgentError``.
    """

    def __init__(self, *models: str) -> None:
        self.states = {name: FakeState() for name in models or ("echo",)}
        self.holding = False
        self.waiting: list[InferRequest] = []
        self.seen: list[InferRequest] = []
        self.canceled: list[InferRequest] = []
        self.paced: list[tuple[InferRequest, bool]] = []
        self.answers = 0
        self.gives_lanes = False
        self.lanes: list[FakeLane] = []
        self.reply: Callable[[InferRequest], tuple[dict[str, Any], Sequence[Buffer]]] = echo

    def open_lane(self, model: str, version: str | None = None, *, client: str, deadline_ms: int) -> FakeLane:
        if model not in self.states:
            raise UnknownModelError(f"Request for unknown model: {model!r} is not found")
        if not self.gives_lanes:
            raise LaneRefusedError("this engine gives none")
        self.lanes.append(FakeLane(len(self.lanes), model, client))
        return self.lanes[-1]

    def submit(self, request: InferRequest) -> None:
        assert request.handle is None, "submitted twice"
        request.handle = "waiting"
        self.seen.append(request)
        if self.holding:
            self.waiting.append(request)
        else:
            self._finish(request)

    def cancel(self, request: InferRequest) -> None:
        if request.handle == "waiting":
            request.handle = "canceled"
            self.waiting = [other for other in self.waiting if other is not request]
            self.canceled.append(request)

    def pace(self, request: InferRequest, *, paused: bool) -> None:
        self.paced.append((request, paused))

    def release(self) -> None:
        """Answer everything that waits."""
        waiting, self.waiting = self.waiting, []
        for request in waiting:
            self._finish(request)

    def models(self) -> list[str]:
        return sorted(self.states)

    def versions(self, name: str) -> list[str]:
        return ["1.0.0"] if self.model_state(name).ready else []

    def model_state(self, name: str, version: str | None = None) -> FakeState:
        state = self.states.get(name)
        if state is None or version not in (None, "1.0.0"):
            raise UnknownModelError(f"Request for unknown model: {name!r} is not found")
        return state

    def describe(self, name: str, version: str | None = None) -> Mapping[str, Any]:
        state = self.model_state(name, version)
        if not state.ready:
            raise UnavailableError(f"model {name!r}: {state.reason}")
        return {**METADATA, "name": name}

    def _finish(self, request: InferRequest) -> None:
        assert request.handle == "waiting", f"a second answer, or one after cancel: {request.handle}"
        request.handle = "answered"
        self.answers += 1
        body: Sequence[Buffer] = ()
        try:
            state = self.model_state(request.model, request.version)
            if not state.ready:
                raise UnavailableError(f"model {request.model!r}: {state.reason}")
            header, body = self.reply(request)
        except AgentError as error:
            header = error_header(None, error.code, str(error), retryable=error.retryable)
        request.answer(Header(header), body)


def echo(request: InferRequest) -> tuple[dict[str, Any], Sequence[Buffer]]:
    """Return what was asked as the answer."""
    header: dict[str, Any] = {"kind": "result", "model": request.model, "version": "1.0.0", "variant": "fp32"}
    for name in ("tensors", "content_type", "params"):
        if name in request.header:
            header[name] = request.header[name]
    return header, (request.body,) if len(request.body) else ()


class FakeControl:
    """Verbs: ``status`` (read), ``echo`` (read), ``deploy`` (operate), ``wait`` (until canceled), ``crash``."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, dict[str, Any], frozenset[str], str]] = []
        self.canceled = 0

    async def call(
        self, method: str, args: dict[str, Any], roles: frozenset[str], peer: str, at_end: Any = None
    ) -> Any:
        self.calls.append((method, args, roles, peer))
        needed = "operate" if method == "deploy" else "read"
        if needed not in roles:
            raise ForbiddenError(f"{method} needs the role {needed}")
        match method:
            case "status":
                return {"device": "box", "models": ["echo"]}
            case "echo" | "deploy":
                return args
            case "wait":
                try:
                    await asyncio.Event().wait()
                finally:
                    self.canceled += 1
            case "crash":
                raise RuntimeError("a bug")
            case "unpackable":
                return object()
        raise AgentError(f"no verb {method!r}")
