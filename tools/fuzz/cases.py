"""What one hostile client says: valid conversations, made from a seed and then damaged. Pure, and the same every time.

A case is the exact bytes of each ``sendmsg`` with the kinds of descriptors that go with it, so that one that found
something can be kept in a file and sent again, whatever becomes of the generator.
"""

from __future__ import annotations

import base64
import random
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any, Final

import msgpack

from agent.wire import MAGIC, PREFIX
from tools.rig.line import MODEL

DESCRIPTORS: Final = ("sealed", "unsealed", "pipe", "file")
REGION_BYTES: Final = 1 << 16  # of every descriptor that is memory
_COLUMNS: Final = 8
_LARGE_COLUMNS: Final = 20_000  # 80 kB: through the daemon's arena
_CALLS: Final = ("ping", "status", "models", "events", "deployments", "deployment", "self_test", "no_such_verb")
_CHANGES: Final = ("deploy", "rollback", "unpin", "cancel")  # only ever asked with arguments that mean nothing
_KINDS: Final = ("infer", "cancel", "call", "hello", "attach", "detach", "lane", "result", "error", "reply", "bye", "x")
_NUMBERS: Final = (
    -1, 0, 1, 2, 7, 63, 64, 65, 255, 4096, REGION_BYTES - 1, REGION_BYTES, REGION_BYTES + 1, (1 << 31) - 1, 1 << 31,
    (1 << 32) - 1, 1 << 32, (1 << 40) + 1, (1 << 63) - 1, 1 << 63, (1 << 64) - 1, -(1 << 63),
)  # fmt: skip
_ODD: Final[tuple[Any, ...]] = (
    None, True, False, 0.0, -0.5, 1.5, 1e300, float("nan"), float("inf"), "", "x", "y", "é" * 40, "x" * 300, b"",
    b"\xff", [], {}, [[]], [None], {"a": {"b": []}}, {"region": 1, "offset": 0, "nbytes": 64}, {1: 2},
    msgpack.Timestamp(1, 2),
)  # fmt: skip
_DTYPES: Final = ("float32", "float64", "uint8", "int64", "bool", "bytes", "bfloat16", "complex64", "")


@dataclass(frozen=True, kw_only=True)
class Step:
    """One ``sendmsg``, on the frame socket or on the lane if one was granted."""

    data: bytes
    descriptors: tuple[str, ...] = ()
    on_lane: bool = False

    def plain(self) -> dict[str, Any]:
        """Return it for a file."""
        data = base64.b64encode(self.data).decode()
        return {"data": data, "descriptors": list(self.descriptors), "on_lane": self.on_lane}


@dataclass(frozen=True, kw_only=True)
class Case:
    """One connection. ``patient`` waits for answers before it goes."""

    seed: int
    number: int
    steps: tuple[Step, ...]
    patient: bool

    def plain(self) -> dict[str, Any]:
        """Return it for a file."""
        steps = [step.plain() for step in self.steps]
        return {"seed": self.seed, "number": self.number, "steps": steps, "patient": self.patient}


@dataclass(kw_only=True)
class _Said:
    """One frame before it is packed; the prefix may lie about its lengths."""

    header: Any
    body: bytes = b""
    descriptors: list[str] = field(default_factory=list)
    header_bytes: int | None = None
    body_bytes: int | None = None
    magic: bytes = MAGIC
    on_lane: bool = False


def case_of(plain: dict[str, Any]) -> Case:
    """Return the case that a file holds."""
    steps = tuple(
        Step(
            data=base64.b64decode(step["data"]),
            descriptors=tuple(step["descriptors"]),
            on_lane=bool(step["on_lane"]),
        )
        for step in plain["steps"]
    )
    return Case(seed=plain["seed"], number=plain["number"], steps=steps, patient=plain["patient"])


def make_case(seed: int, number: int) -> Case:
    """Return case ``number`` of a seed."""
    rng = random.Random(f"{seed}/{number}")
    said = _conversation(rng)
    for _ in range(rng.choice((0, 1, 1, 1, 2, 2, 3, 5))):
        rng.choice(_DAMAGES)(rng, said)
    return Case(seed=seed, number=number, steps=tuple(_steps(rng, said)), patient=rng.random() < 0.7)


def _conversation(rng: random.Random) -> list[_Said]:
    """Return a valid conversation."""
    said: list[_Said] = []
    ids = iter(range(1, 1 << 20))
    attached: list[int] = []
    laned = False
    for _ in range(rng.randrange(1, 9)):
        act = rng.choice(("infer", "infer", "infer", "attach", "attach", "detach", "cancel", "call", "hello", "lane"))
        on_lane = laned and rng.random() < 0.5
        request_id = next(ids)
        if act == "infer":
            said.append(_infer(rng, request_id, attached if not on_lane else []))
            said[-1].on_lane = on_lane
        elif act == "attach":
            number = rng.choice((len(attached) + 1, rng.randrange(1 << 31)))
            attached.append(number)
            header = {"kind": "attach", "id": request_id, "region": number, "nbytes": REGION_BYTES}
            said.append(_Said(header=header, descriptors=["sealed"]))
        elif act == "detach" and attached:
            header = {"kind": "detach", "id": request_id, "region": attached.pop(rng.randrange(len(attached)))}
            said.append(_Said(header=header))
        elif act == "cancel":
            said.append(_Said(header={"kind": "cancel", "id": rng.randrange(request_id + 2)}))
        elif act == "call":
            said.append(_Said(header=_call(rng, request_id)))
        elif act == "hello":
            said.append(_Said(header={"kind": "hello", "client": "fuzz", "protocol": 1}))
        elif act == "lane":
            laned = True
            said.append(_Said(header={"kind": "lane", "id": request_id, "model": MODEL}))
    return said or [_infer(rng, 1, [])]


def _infer(rng: random.Random, request_id: int, attached: list[int]) -> _Said:
    columns = _LARGE_COLUMNS if rng.random() < 0.04 else _COLUMNS
    entry: dict[str, Any] = {"name": "x", "dtype": "float32", "shape": [1, columns], "nbytes": 4 * columns}
    header: dict[str, Any] = {"kind": "infer", "id": request_id, "model": MODEL, "tensors": [entry]}
    body = bytes(4 * columns)
    if attached and rng.random() < 0.7:
        entry.update(shape=[1, _COLUMNS], nbytes=4 * _COLUMNS)
        entry.update(region=rng.choice(attached), offset=rng.choice((0, 64, 4, REGION_BYTES - 4 * _COLUMNS)))
        body = b""
    if attached and rng.random() < 0.5:
        offset = rng.choice((0, 64, 1, REGION_BYTES - 64))
        header["reply"] = {"region": rng.choice(attached), "offset": offset, "nbytes": REGION_BYTES - offset}
    more: dict[str, Any] = {"deadline_ms": rng.choice((1, 50, 1000.5)), "priority": rng.randrange(10), "params": {}}
    more |= {"outputs": ["y"], "version": "1.0.0"}
    header.update((name, value) for name, value in more.items() if rng.random() < 0.1)
    if rng.random() < 0.05:
        del header["tensors"]
        header["content_type"] = rng.choice(("application/json", "text/plain", ""))
        body = rng.choice((b"{}", b"[1, 2]", b"\xff\x00", b'{"inputs": []}'))
    return _Said(header=header, body=body)


def _call(rng: random.Random, request_id: int) -> dict[str, Any]:
    method = rng.choice((*_CALLS, *_CHANGES))
    names = ("limit", "after", "wait_s", "id", "after_step", "channel", "version", "team", "force")
    args = {name: _odd(rng) for name in names if rng.random() < 0.2}
    if method not in _CHANGES and rng.random() < 0.3:
        args["model"] = MODEL
    return {"kind": "call", "id": request_id, "method": method, "args": args}


# Damage


def _replace_value(rng: random.Random, said: list[_Said]) -> None:
    holder, key = _somewhere(rng, rng.choice(said).header)
    if holder is not None and not _would_change_the_box(holder, key):
        holder[key] = rng.choice(_DTYPES) if key == "dtype" and rng.random() < 0.7 else _odd(rng)


def _remove_value(rng: random.Random, said: list[_Said]) -> None:
    holder, key = _somewhere(rng, rng.choice(said).header)
    if holder is not None:
        del holder[key]


def _add_value(rng: random.Random, said: list[_Said]) -> None:
    header = rng.choice(said).header
    if isinstance(header, dict):
        header[rng.choice(("region", "offset", "reply", "nbytes", "shared", "limits", "value", "trace", 7, None))] = (
            _odd(rng)
        )


def _repeat_tensor(rng: random.Random, said: list[_Said]) -> None:
    header = rng.choice(said).header
    if isinstance(header, dict) and isinstance(header.get("tensors"), list):
        header["tensors"] *= rng.choice((2, 3, 65, 1000))


def _change_kind(rng: random.Random, said: list[_Said]) -> None:
    one = rng.choice(said)
    if isinstance(one.header, dict) and one.header.get("kind") != "call":
        one.header["kind"] = rng.choice(_KINDS)


def _same_id(rng: random.Random, said: list[_Said]) -> None:
    one, other = rng.choice(said), rng.choice(said)
    if isinstance(one.header, dict) and isinstance(other.header, dict):
        one.header["id"] = other.header.get("id", 0)


def _no_map(rng: random.Random, said: list[_Said]) -> None:
    rng.choice(said).header = _odd(rng)


def _lie_about_lengths(rng: random.Random, said: list[_Said]) -> None:
    one = rng.choice(said)
    if rng.random() < 0.3:
        one.header_bytes = max(0, rng.choice(_NUMBERS)) & 0xFFFFFFFF
    else:
        one.body_bytes = max(0, rng.choice((*_NUMBERS, len(one.body) + 1, max(0, len(one.body) - 1))))


def _change_body(rng: random.Random, said: list[_Said]) -> None:
    one = rng.choice(said)
    one.body = rng.choice((b"", one.body[:-1], one.body + b"\0", rng.randbytes(len(one.body)), rng.randbytes(33)))


def _change_descriptors(rng: random.Random, said: list[_Said]) -> None:
    rng.choice(said).descriptors = [rng.choice(DESCRIPTORS) for _ in range(rng.choice((0, 1, 1, 2, 3, 9)))]


def _repeat(rng: random.Random, said: list[_Said]) -> None:
    one = rng.choice(said)
    for _ in range(rng.choice((1, 2, 20))):
        said.insert(rng.randrange(len(said) + 1), one)


def _reorder(rng: random.Random, said: list[_Said]) -> None:
    rng.shuffle(said)


def _wrong_magic(rng: random.Random, said: list[_Said]) -> None:
    rng.choice(said).magic = rng.choice((b"IFD2", b"GET ", b"\0\0\0\0"))


# The last ones end the connection; what comes after them is not heard any more.
_DAMAGES: Final[tuple[Callable[[random.Random, list[_Said]], None], ...]] = (
    *[_replace_value] * 9, *[_remove_value] * 2, *[_add_value] * 2, _repeat_tensor, _repeat_tensor, _change_body,
    _change_body, _reorder, _repeat, _change_kind, _same_id, _no_map, _lie_about_lengths, _change_descriptors,
    _wrong_magic,
)  # fmt: skip


def _somewhere(rng: random.Random, value: Any) -> tuple[Any, Any]:
    """Return a random place within nested maps and lists, as holder and key."""
    holder, key = None, None
    while isinstance(value, (dict, list)) and value:
        holder = value
        if isinstance(value, dict):
            gentle = [name for name in value if name not in ("kind", "id")]
            key = rng.choice(gentle if gentle and rng.random() < 0.9 else list(value))
        else:
            key = rng.randrange(len(value))
        value = holder[key]
        if rng.random() < 0.3:
            break
    return holder, key


def _would_change_the_box(holder: Any, key: Any) -> bool:
    """Whether another value here could make a valid wish of a call."""
    return isinstance(holder, dict) and key == "method"


def _odd(rng: random.Random) -> Any:
    return rng.choice(_NUMBERS) if rng.random() < 0.5 else deepcopy(rng.choice(_ODD))  # more damage may follow


# Bytes


def _steps(rng: random.Random, said: list[_Said]) -> list[Step]:
    """Pack frames: sometimes several in one send, or one in several, or with a flipped or missing byte."""
    steps: list[Step] = []
    for one in said:
        data = _packed(one)
        if rng.random() < 0.03:
            flipped = bytearray(data)
            flipped[rng.randrange(len(flipped))] ^= 1 << rng.randrange(8)
            data = bytes(flipped)
        if rng.random() < 0.02:
            data = data[: rng.randrange(1, len(data) + 1)]
        join = steps and not one.descriptors and steps[-1].on_lane == one.on_lane and rng.random() < 0.3
        if join:
            last = steps.pop()
            steps.append(Step(data=last.data + data, descriptors=last.descriptors, on_lane=last.on_lane))
            continue
        cut = rng.randrange(1, len(data)) if rng.random() < 0.1 and len(data) > 1 else len(data)
        steps.append(Step(data=data[:cut], descriptors=tuple(one.descriptors), on_lane=one.on_lane))
        if data[cut:]:
            steps.append(Step(data=data[cut:], on_lane=one.on_lane))
    return steps


def _packed(one: _Said) -> bytes:
    header: bytes
    try:
        header = msgpack.packb(one.header)
    except (ValueError, OverflowError, TypeError):
        header = b"\xc1"
    header_bytes = len(header) if one.header_bytes is None else one.header_bytes
    body_bytes = len(one.body) if one.body_bytes is None else one.body_bytes
    return PREFIX.pack(one.magic, header_bytes, body_bytes) + header + one.body
