"""What clients say and hear, without sockets: requests as frames, answers as results or exceptions.

Leaves out: which tensors lie in shared memory (``regions.py``).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np

from agent.client.regions import Plan, Region, SharedMemory
from agent.errors import AgentError, FrameError, by_code
from agent.tensors import DTYPE_NAMES, Array, as_array, pack, unpack
from agent.wire import (
    DEADLINE_MS_MAX,
    INFER_LEAD,
    Buffer,
    Frame,
    Header,
    Limits,
    encode,
    lead_frame,
    packed_pairs,
    parse_tensors,
)

_SMALL_BYTES_MAX: Final = 4096  # inputs that are cheaper copied than sent from where they lie
_KNOWN_MAX: Final = 64  # kinds of requests
DEFAULT_SOCKET: Final = "/run/inferd/inferd.sock"

# What we accept from the daemon, which we trust more than it trusts us: a reply's value lies in the header.
ANSWER_LIMITS: Final = Limits(header_bytes_max=64 * 1024 * 1024, body_bytes_max=1 << 34, tensors_max=4096)


@dataclass(frozen=True, slots=True)
class Hold:
    """That no new version of a model is loaded now; ``model`` may be ``*``."""

    model: str
    under_way: list[dict[str, Any]]  # deployments that were too far to be kept waiting
    lasts: Callable[[], bool]  # whether the connection stands: a daemon that restarted knows nothing of the hold


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """One answer. A tensor answer fills ``outputs``, any other ``body`` and ``content_type``."""

    model: str
    version: str
    variant: str
    outputs: Mapping[str, Array] = field(default_factory=dict)  # read-only arrays by name
    body: bytes = b""
    content_type: str = ""
    params: Mapping[str, Any] = field(default_factory=dict)

    def json(self) -> Any:
        """Return the body parsed; ``ValueError`` if it is not JSON."""
        return json.loads(self.body)


@dataclass(frozen=True, slots=True, kw_only=True)
class Part(Result):
    """One part of an answer that comes in parts."""

    seq: int  # from 0, without gaps

    def text(self) -> str:
        """Return the body as text; ``ValueError`` if it is none."""
        return self.body.decode()


class InferFrames:
    """The requests of one client as frames: what small ones have in common is packed once."""

    def __init__(self) -> None:
        self._known: dict[Hashable, tuple[int, bytes]] = {}

    def frame(
        self,
        request_id: int,
        model: str,
        inputs: Mapping[str, Array],
        *,
        version: str | None,
        deadline_ms: float | None,
        outputs: Sequence[str] | None,
        priority: int | None,
        params: Mapping[str, Any] | None,
        plan: Plan | None,
    ) -> list[Buffer]:
        """Return what ``infer_frame`` would."""
        whole_ms = int(deadline_ms) if deadline_ms is not None else None
        if plan is None and outputs is None and params is None and whole_ms == deadline_ms:
            small = self._small(request_id, model, inputs, version, priority, whole_ms)
            if small is not None:
                return [small]
        return infer_frame(
            request_id,
            model,
            inputs,
            version=version,
            deadline_ms=deadline_ms,
            outputs=outputs,
            priority=priority,
            params=params,
            plan=plan,
        )

    def _small(
        self,
        request_id: int,
        model: str,
        inputs: Mapping[str, Array],
        version: str | None,
        priority: int | None,
        deadline_ms: int | None,
    ) -> bytes | None:
        if deadline_ms is not None and not 0 < deadline_ms <= DEADLINE_MS_MAX:
            return None  # the daemon says what is wrong with it
        kind: list[Hashable] = [model, version, priority]
        parts: list[bytes] = []
        left = _SMALL_BYTES_MAX
        for name, array in inputs.items():
            if type(array) is not np.ndarray or array.dtype not in DTYPE_NAMES or array.nbytes > left:
                return None
            left -= array.nbytes
            kind += (name, array.dtype, array.shape)
            parts.append(array.tobytes())
        key = tuple(kind)
        pairs = self._known.get(key)
        if pairs is None:
            header = _infer_header(request_id, model, version, None, priority, None)
            header["tensors"], _ = pack(inputs)
            pairs = packed_pairs(header)
            if len(self._known) >= _KNOWN_MAX:
                self._known.clear()
            self._known[key] = pairs
        body = parts[0] if len(parts) == 1 else b"".join(parts)
        return lead_frame(INFER_LEAD, request_id, pairs, len(body), deadline_ms) + body


def infer_frame(
    request_id: int,
    model: str,
    inputs: Mapping[str, Array],
    *,
    version: str | None = None,
    deadline_ms: float | None = None,
    outputs: Sequence[str] | None = None,
    priority: int | None = None,
    params: Mapping[str, Any] | None = None,
    plan: Plan | None = None,
) -> list[Buffer]:
    """Return a request of tensors; contiguous arrays are sent from where they lie, or by reference as ``plan`` says.

    Raises:
        TensorError: a dtype the wire does not carry.
    """
    header = _infer_header(request_id, model, version, deadline_ms, priority, params)
    body: Sequence[Buffer]
    if plan is None:
        header["tensors"], body = pack(inputs)
    else:
        header["tensors"], body = plan.entries, plan.buffers
        if plan.reply is not None:
            header["reply"] = plan.reply
    if outputs is not None:
        header["outputs"] = list(outputs)
    return encode(header, body)


def predict_frame(
    request_id: int,
    model: str,
    body: Buffer,
    *,
    content_type: str = "application/octet-stream",
    version: str | None = None,
    deadline_ms: float | None = None,
    priority: int | None = None,
    params: Mapping[str, Any] | None = None,
) -> list[Buffer]:
    """Return a request of raw bytes, which the model's handler decodes."""
    header = _infer_header(request_id, model, version, deadline_ms, priority, params)
    header["content_type"] = content_type
    return encode(header, (memoryview(body).cast("B"),))


def stream_frame(
    request_id: int,
    model: str,
    inputs: Mapping[str, Array] | Buffer,
    *,
    content_type: str = "application/octet-stream",
    version: str | None = None,
    deadline_ms: float | None = None,
    outputs: Sequence[str] | None = None,
    priority: int | None = None,
    params: Mapping[str, Any] | None = None,
) -> list[Buffer]:
    """Return a request for an answer in parts: tensors, or raw bytes of ``content_type``.

    Raises:
        TensorError: a dtype the wire does not carry.
    """
    header = _infer_header(request_id, model, version, deadline_ms, priority, params)
    header["stream"] = True
    body: Sequence[Buffer]
    if isinstance(inputs, Mapping):
        header["tensors"], body = pack(inputs)
        if outputs is not None:
            header["outputs"] = list(outputs)
    else:
        header["content_type"] = content_type
        body = (memoryview(inputs).cast("B"),)
    return encode(header, body)


def pace_frame(request_id: int, *, paused: bool) -> list[Buffer]:
    """Return the wish that a stream pauses, or goes on."""
    return encode({"kind": "pause" if paused else "resume", "id": request_id})


def call_frame(request_id: int, method: str, args: Mapping[str, Any] | None, deadline_ms: float | None) -> list[Buffer]:
    """Return a management call."""
    header: dict[str, Any] = {"kind": "call", "id": request_id, "method": method, "args": dict(args or {})}
    if deadline_ms is not None:
        header["deadline_ms"] = deadline_ms
    return encode(header)


def attach_frame(request_id: int, region: Region) -> list[Buffer]:
    """Return the frame that the region's descriptor travels with."""
    return encode({"kind": "attach", "id": request_id, "region": region.number, "nbytes": region.nbytes})


def detach_frame(request_id: int, region: Region) -> list[Buffer]:
    """Return the frame that ends a region."""
    return encode({"kind": "detach", "id": request_id, "region": region.number})


def lane_frame(request_id: int, model: str, version: str | None = None) -> list[Buffer]:
    """Return the wish for a direct lane to a model's worker; its socket comes with the reply."""
    named = {"version": version} if version else {}
    return encode({"kind": "lane", "id": request_id, "model": model, **named})


def lend_frame(request_id: int, lane: int, region: Region) -> list[Buffer]:
    """Return the frame that lets a lane's worker know an attached region."""
    return encode({"kind": "lend", "id": request_id, "lane": lane, "region": region.number})


def cancel_frame(request_id: int) -> list[Buffer]:
    """Return the withdrawal of a request; it is answered with ``canceled`` unless its answer is on its way."""
    return encode({"kind": "cancel", "id": request_id})


def tensors_of(frame: Frame, model: str, plan: Plan | None, memory: SharedMemory) -> Result:
    """Return the result of an ``infer``; what lies in shared memory is taken from there.

    Raises:
        AgentError: as ``result_of``.
    """
    header = frame.header
    if header["kind"] != "result" or "tensors" not in header:
        return result_of(frame)
    body = memoryview(frame.body)
    if plan is None:
        outputs = unpack(header["tensors"], body, tensors_max=ANSWER_LIMITS.tensors_max)
        memory.learn(model, outputs.values())
        return _result(header, outputs, b"")
    outputs = {}
    for tensor in parse_tensors(header["tensors"], len(body), tensors_max=ANSWER_LIMITS.tensors_max):
        outputs[tensor.name] = as_array(tensor, body) if tensor.region is None else memory.output(plan, tensor)
    memory.learn(model, outputs.values())
    memory.answered(plan)
    return _result(header, outputs, b"")


def result_of(frame: Frame) -> Result:
    """Return the result an answer without shared memory carries.

    Raises:
        AgentError: the error the answer carries, as its class.
        FrameError: not an answer to an ``infer``.
    """
    header = frame.header
    if header["kind"] != "result":
        raise error_of(frame)
    if "tensors" not in header:
        return _result(header, {}, bytes(frame.body))
    body = memoryview(frame.body)
    seen = header.digest if isinstance(header, Header) else None
    if seen is not None and seen[0] == len(body):
        return _result(header, {tensor.name: as_array(tensor, body) for tensor in seen[1]}, b"")
    outputs = unpack(header["tensors"], body, tensors_max=ANSWER_LIMITS.tensors_max)
    if isinstance(header, Header):  # which may come again
        header.digest = len(body), parse_tensors(header["tensors"], len(body), tensors_max=ANSWER_LIMITS.tensors_max)
    return _result(header, outputs, b"")


def part_of(frame: Frame, before: Part | None) -> Part | None:
    """Return the part a frame carries, or ``None`` if it says that there are no more.

    Args:
        frame: The next frame of the answer.
        before: The part before it; only the first says who answers.

    Raises:
        AgentError: the error that ends the answer, as its class.
        FrameError: not a part of an answer.
    """
    header = frame.header
    if header["kind"] == "result":
        return None
    if header["kind"] != "part":
        raise error_of(frame)
    result = result_of(Frame(Header({**header, "kind": "result"}), frame.body))
    return Part(
        seq=0 if before is None else before.seq + 1,
        model=result.model if before is None else before.model,
        version=result.version if before is None else before.version,
        variant=result.variant if before is None else before.variant,
        outputs=result.outputs,
        body=result.body,
        content_type=result.content_type,
        params=result.params,
    )


def _result(header: Mapping[str, Any], outputs: Mapping[str, Array], body: bytes) -> Result:
    return Result(
        model=str(header.get("model") or ""),
        version=str(header.get("version") or ""),
        variant=str(header.get("variant") or ""),
        outputs=outputs,
        body=body,
        content_type=str(header.get("content_type") or ""),
        params=header.get("params") or {},
    )


def value_of(frame: Frame) -> Any:
    """Return the value a reply carries; raises as ``result_of``."""
    if frame.header["kind"] != "reply":
        raise error_of(frame)
    return frame.header.get("value")


def error_of(frame: Frame) -> AgentError:
    """Return what an error frame means; anything but an error frame is a ``FrameError``."""
    header = frame.header
    if header["kind"] != "error":
        return FrameError(f"unexpected answer of kind {header['kind']!r}")
    return by_code(str(header.get("code")), str(header.get("message", "")), header.get("retry_after_s"))


def _infer_header(
    request_id: int,
    model: str,
    version: str | None,
    deadline_ms: float | None,
    priority: int | None,
    params: Mapping[str, Any] | None,
) -> dict[str, Any]:
    header: dict[str, Any] = {"kind": "infer", "id": request_id, "model": model}
    optional = {"version": version, "deadline_ms": deadline_ms, "priority": priority, "params": params}
    header.update((name, value) for name, value in optional.items() if value is not None)
    return header
