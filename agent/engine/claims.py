"""What a worker says of itself and in its answers, reduced to what may be said: its process runs foreign code.

A bundle's code can write to its worker's channel. It may lie about its own model, which its signer answers for; it must
not bring text, types or error codes into the daemon that break status, metrics or another client. Pure.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Final

import msgspec

from agent.engine.job import error_of
from agent.engine.ladder import Measured
from agent.errors import LoadError, WorkerError, by_code

_MESSAGE_MAX: Final = 500  # characters of what a worker says went wrong
_RESULT_FIELDS: Final = (("tensors", list), ("content_type", str), ("params", dict))


class _Tensor(msgspec.Struct, frozen=True, kw_only=True):
    name: str
    dtype: str
    shape: list[int | str | None]


class _Signature(msgspec.Struct, frozen=True, kw_only=True):
    inputs: list[_Tensor]
    outputs: list[_Tensor]


class _Sandbox(msgspec.Struct, frozen=True, kw_only=True):
    seccomp: bool
    landlock: int
    level: str
    detail: str
    profile: str = "cpu"


class _Golden(msgspec.Struct, frozen=True, kw_only=True):
    id: str
    ok: bool
    ms: float


class Check(msgspec.Struct, frozen=True, kw_only=True):
    """One comparison: what was found, and what it was held against."""

    output: str
    metric: str
    ok: bool
    found: float | None
    bound: str


class GoldenResult(msgspec.Struct, frozen=True, kw_only=True):
    """How one golden input ended."""

    id: str
    ok: bool
    ms: float
    ms_max: float
    checks: list[Check]
    reason: str


class Tested(msgspec.Struct, frozen=True, kw_only=True):
    """What a worker found when it ran golden inputs."""

    ok: bool
    golden: list[GoldenResult] = []
    code: str = ""
    message: str = ""


class _Hello(msgspec.Struct, frozen=True, kw_only=True):
    variant: str
    runtime: str
    precision: str
    device: str
    provider: str
    sandbox: _Sandbox
    signature: _Signature
    load_ms: float
    warmup_ms: float
    golden: list[_Golden]
    memory: dict[str, int]
    max_batch: int
    idempotent: bool
    streams: bool = False
    placement: dict[str, int] = {}
    cores: list[int]


def hello_of(header: Mapping[str, Any]) -> dict[str, Any]:
    """Return a worker's ``hello`` as plain values, without what is unknown.

    Raises:
        LoadError: something is missing or of the wrong type.
    """
    try:
        return dict(msgspec.to_builtins(msgspec.convert(header, _Hello)))
    except (msgspec.ValidationError, RecursionError) as error:
        raise LoadError(f"the worker's hello is malformed: {error}") from error


class _Measured(msgspec.Struct, frozen=True, kw_only=True):
    ok: bool
    message: str = ""
    p50_ms: float = 0.0
    cosine: float = -1.0
    top1: float | None = None


def measured_of(value: object) -> Measured | str:
    """Return what a worker measured of itself, or why it could not."""
    try:
        found = msgspec.convert(value, _Measured)
    except (msgspec.ValidationError, RecursionError) as error:
        return f"the worker's measurement is malformed: {error}"
    if not found.ok:
        return found.message or "the worker could not measure"
    if not all(math.isfinite(number) for number in (found.p50_ms, found.cosine, found.top1 or 0.0)):
        return "the worker's measurement is no number"
    return Measured(p50_ms=found.p50_ms, cosine=found.cosine, top1=found.top1)


def selftest_of(value: object) -> Tested:
    """Return what a worker says of its self-test; nonsense is a test that was not passed."""
    try:
        found = msgspec.convert(value, Tested)
    except (msgspec.ValidationError, RecursionError) as error:
        return Tested(ok=False, code=WorkerError.code, message=f"the worker's self-test is malformed: {error}")
    figures = [figure for row in found.golden for figure in (row.ms, *(check.found or 0.0 for check in row.checks))]
    if not all(map(math.isfinite, figures)):
        return Tested(ok=False, code=WorkerError.code, message="the worker's self-test holds what is no number")
    ok = found.ok and all(row.ok for row in found.golden)
    code = "" if ok else by_code(found.code or WorkerError.code, "").code
    return Tested(ok=ok, golden=found.golden, code=code, message=found.message[:_MESSAGE_MAX])


def answer_of(header: Mapping[str, Any]) -> dict[str, Any]:
    """Return a worker's ``result`` or ``error`` without what is unknown; an unknown error code becomes ``internal``."""
    if header["kind"] == "error":
        return error_of(by_code(str(header.get("code")), str(header.get("message"))), None)
    return {"kind": "result", **_content_of(header)}


def part_of(header: Mapping[str, Any]) -> dict[str, Any]:
    """Return a worker's ``part`` without what is unknown."""
    return {"kind": "part", **_content_of(header)}


def _content_of(header: Mapping[str, Any]) -> dict[str, Any]:
    return {name: header[name] for name, kind in _RESULT_FIELDS if isinstance(header.get(name), kind)}
