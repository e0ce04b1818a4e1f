"""What an ONNX file says about itself: producer, opsets, inputs, outputs, texts, how many parameters it holds.

For people (``inspect``) and for the publisher's export check; what a file *refers to* and may therefore be refused for
is ``onnx_file.py``. Reads the bytes as that one does: without the onnx package, without opening anything that is named,
within the same bounds. Long texts are cut, not refused.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from typing import Final

import msgspec

from agent.bundles.onnx_file import DEPTH_MAX, FIELDS_MAX
from agent.bundles.protobuf import Budget, fields
from agent.errors import UnsafeBundleError

TEXT_BYTES_MAX: Final = 4096
_ENTRIES_MAX: Final = 256
_SIGN_BIT: Final = 1 << 63

DTYPES: Final = {
    1: "float32", 2: "uint8", 3: "int8", 4: "uint16", 5: "int16", 6: "int32", 7: "int64", 8: "bytes", 9: "bool",
    10: "float16", 11: "float64", 12: "uint32", 13: "uint64", 14: "complex64", 15: "complex128", 16: "bfloat16",
    17: "float8e4m3fn", 18: "float8e4m3fnuz", 19: "float8e5m2", 20: "float8e5m2fnuz", 21: "uint4", 22: "int4",
    23: "float4e2m1",
}  # fmt: skip


class Port(msgspec.Struct, frozen=True):
    """An input or output. ``dtype`` is ``""`` for what is no tensor; in ``shape`` a text names an open dimension."""

    name: str
    dtype: str
    shape: tuple[int | str | None, ...]


class OnnxFacts(msgspec.Struct, kw_only=True):
    """``parameters`` counts the elements of all stored tensors, ``dtypes`` the same by type."""

    ir_version: int = 0
    producer: str = ""
    domain: str = ""
    model_version: int = 0
    doc: str = ""
    graph: str = ""
    graph_doc: str = ""
    opsets: dict[str, int] = {}  # the default domain is "ai.onnx"
    metadata: dict[str, str] = {}
    inputs: tuple[Port, ...] = ()
    outputs: tuple[Port, ...] = ()
    nodes: int = 0
    operators: dict[str, int] = {}
    parameters: int = 0
    dtypes: dict[str, int] = {}


def describe(data: memoryview) -> OnnxFacts:
    """Return what the serialised ``ModelProto`` in ``data`` says.

    Raises:
        UnsafeBundleError: not protobuf, no graph, nested too deeply or too large to look through.
    """
    walk = _Walk()
    walk.model(data)
    return walk.facts()


class _Walk:
    def __init__(self) -> None:
        self._budget = Budget(FIELDS_MAX)
        self._facts = OnnxFacts()
        self._operators: Counter[str] = Counter()
        self._elements: Counter[str] = Counter()
        self._graphs = 0
        self._producer = ["", ""]

    def facts(self) -> OnnxFacts:
        """Return what was found, once the model has been walked."""
        if not self._graphs:
            raise UnsafeBundleError("not an ONNX model: it has no graph")
        found = self._facts
        found.producer = " ".join(part for part in self._producer if part)
        found.nodes = sum(self._operators.values())
        found.operators = dict(self._operators.most_common())
        found.parameters = sum(self._elements.values())
        found.dtypes = dict(self._elements.most_common())
        return found

    def model(self, message: memoryview) -> None:
        """Walk the outermost message."""
        found = self._facts
        for number, value in fields(message, self._budget):
            match number, value:
                case 1, int():
                    found.ir_version = value
                case 5, int():
                    found.model_version = value
                case 2 | 3, memoryview():
                    self._producer[number - 2] = _clip(value)
                case 4, memoryview():
                    found.domain = _clip(value)
                case 6, memoryview():
                    found.doc = _clip(value)
                case 7, memoryview():
                    self._main_graph(value)
                case 8, memoryview():
                    domain, version = self._opset(value)
                    found.opsets[domain] = version
                case 14, memoryview() if len(found.metadata) < _ENTRIES_MAX:
                    key, text = self._texts(value, 1, 2)
                    found.metadata[key] = text
                case 25, memoryview():
                    self._nodes(value, 7, 1)
                case _:
                    pass

    def _main_graph(self, message: memoryview) -> None:
        found = self._facts
        ports: dict[int, list[Port]] = {11: [], 12: []}
        stored = set()
        for number, value in fields(message, self._budget):
            if not isinstance(value, memoryview):
                continue
            if number == 2:
                found.graph = _clip(value)
            elif number == 10:
                found.graph_doc = _clip(value)
            elif number in ports:
                ports[number].append(self._port(value))
            elif number == 5:
                stored.add(self._texts(value, 8)[0])
        found.inputs = tuple(port for port in ports[11] if port.name not in stored)
        found.outputs = tuple(ports[12])
        self._graph(message, 1)

    def _graph(self, message: memoryview, depth: int) -> None:
        self._graphs += 1
        for number, value in fields(message, self._budget):
            if number == 5 and isinstance(value, memoryview):
                self._tensor(value)
        self._nodes(message, 1, depth)

    def _nodes(self, message: memoryview, where: int, depth: int) -> None:
        """Count the nodes in field ``where`` of a graph or function, and walk the graphs in their attributes."""
        if depth > DEPTH_MAX:
            raise UnsafeBundleError(f"ONNX graph nested deeper than {DEPTH_MAX}")
        for number, node in fields(message, self._budget):
            if number != where or not isinstance(node, memoryview):
                continue
            kind, domain = self._texts(node, 4, 7)
            self._operators[kind if domain in ("", "ai.onnx") else f"{domain}::{kind}"] += 1
            for attribute in self._below(node, 5):
                for inner, value in fields(attribute, self._budget):
                    if isinstance(value, memoryview):
                        if inner in (5, 10):
                            self._tensor(value)
                        elif inner in (6, 11):
                            self._graph(value, depth + 1)

    def _tensor(self, message: memoryview) -> None:
        dims: list[int] = []
        kind = 0
        for number, value in fields(message, self._budget):
            if number == 1:
                dims += [value] if isinstance(value, int) else _packed(value)
            elif number == 2 and isinstance(value, int):
                kind = value
        self._elements[DTYPES.get(kind, f"type {kind}")] += math.prod(dims)

    def _port(self, message: memoryview) -> Port:
        name = self._texts(message, 1)[0]
        for type_proto in self._below(message, 2):
            for tensor in self._below(type_proto, 1):
                kind = next((v for n, v in fields(tensor, self._budget) if n == 1 and isinstance(v, int)), 0)
                shape = tuple(self._dim(dim) for shape in self._below(tensor, 2) for dim in self._below(shape, 1))
                return Port(name, DTYPES.get(kind, ""), shape)
        return Port(name, "", ())

    def _dim(self, message: memoryview) -> int | str | None:
        for number, value in fields(message, self._budget):
            if number == 1 and isinstance(value, int):
                return value if value < _SIGN_BIT else None
            if number == 2 and isinstance(value, memoryview):
                return _clip(value) or None
        return None

    def _opset(self, message: memoryview) -> tuple[str, int]:
        domain, version = "", 0
        for number, value in fields(message, self._budget):
            if number == 1 and isinstance(value, memoryview):
                domain = _clip(value)
            elif number == 2 and isinstance(value, int):
                version = value
        return domain or "ai.onnx", version

    def _texts(self, message: memoryview, *numbers: int) -> list[str]:
        """Return the texts in these fields of ``message``, ``""`` where one is absent."""
        found = dict.fromkeys(numbers, "")
        for number, value in fields(message, self._budget):
            if number in found and isinstance(value, memoryview):
                found[number] = _clip(value)
        return list(found.values())

    def _below(self, message: memoryview, wanted: int) -> Iterator[memoryview]:
        for number, value in fields(message, self._budget):
            if number == wanted and isinstance(value, memoryview):
                yield value


def _packed(message: memoryview) -> list[int]:
    """Return the numbers of a packed repeated field."""
    numbers: list[int] = []
    value = shift = 0
    for byte in message[:1024]:
        value |= (byte & 0x7F) << shift
        shift += 7
        if byte < 0x80:
            numbers.append(value)
            value = shift = 0
    return numbers


def _clip(value: memoryview) -> str:
    text = bytes(value[:TEXT_BYTES_MAX]).decode(errors="replace")
    return text if len(value) <= TEXT_BYTES_MAX else f"{text}…"
