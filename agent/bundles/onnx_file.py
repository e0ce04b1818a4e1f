"""What an ONNX file refers to, found without the onnx package and without opening anything it names.

``inspect`` visits every place a tensor can stand in a model (initialisers, sparse tensors, attributes, subgraphs,
functions, training graphs) and returns the external data they point to and the operators used. Judging both is
``content.py``'s. Field numbers are those of onnx.proto, IR version 10 and older.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Final, TypeAlias

from agent.bundles.protobuf import Budget, fields, text
from agent.errors import UnsafeBundleError

DEPTH_MAX: Final = 32
FIELDS_MAX: Final = 20_000_000
FOUND_MAX: Final = 50_000  # tensors in other files, operators, functions: of each so many
_EXTERNAL_KEYS: Final = frozenset({"location", "offset", "length", "checksum"})  # others make a runtime read more


@dataclass(frozen=True, slots=True)
class External:
    """A tensor's data in another file. ``length`` is ``None`` for: to the end."""

    location: str
    offset: int = 0
    length: int | None = None


@dataclass(slots=True)
class OnnxFile:
    """What was found. ``operators`` and ``functions`` are ``(domain, name)``; the default domain is ``""``."""

    external: list[External] = field(default_factory=list)
    operators: set[tuple[str, str]] = field(default_factory=set)
    functions: set[tuple[str, str]] = field(default_factory=set)
    graphs: int = 0


def inspect(data: memoryview) -> OnnxFile:
    """Return what the serialised ``ModelProto`` in ``data`` refers to.

    Raises:
        UnsafeBundleError: not protobuf, no graph, nested too deeply or too large to look through.
    """
    walk = _Walk()
    walk.visit("model", data, 0)
    if not walk.found.graphs:
        raise UnsafeBundleError("not an ONNX model: it has no graph")
    return walk.found


# message -> field number -> the message in it. Only paths that lead to tensors, nodes or functions.
_CHILDREN: Final[Mapping[str, Mapping[int, str]]] = {
    "model": {7: "graph", 20: "training", 25: "function"},
    "training": {1: "graph", 2: "graph"},
    "graph": {1: "node", 5: "tensor", 15: "sparse"},
    "function": {7: "node", 11: "attribute"},
    "node": {5: "attribute"},
    "attribute": {5: "tensor", 6: "graph", 10: "tensor", 11: "graph", 22: "sparse", 23: "sparse"},
    "sparse": {1: "tensor", 2: "tensor"},
    "tensor": {13: "entry"},
    "entry": {},
}
_TEXTS: Final[Mapping[str, Mapping[int, str]]] = {
    "node": {4: "op_type", 7: "domain"},
    "function": {1: "name", 10: "domain"},
    "entry": {1: "key", 2: "value"},
}
_DATA_LOCATION: Final = 14  # of a tensor; 1: external

_Found: TypeAlias = dict[str, str]


class _Walk:
    def __init__(self) -> None:
        self.found = OnnxFile()
        self._budget = Budget(FIELDS_MAX)
        self._finish: dict[str, Callable[[_Found], None]] = {"node": self._end_node, "function": self._end_function}

    def visit(self, kind: str, message: memoryview, depth: int) -> _Found:
        """Visit one message and all below it; return its own texts."""
        if depth > DEPTH_MAX:
            raise UnsafeBundleError(f"ONNX graph nested deeper than {DEPTH_MAX}")
        children, texts = _CHILDREN[kind], _TEXTS.get(kind, {})
        own: _Found = {}
        entries: list[_Found] = []
        is_external = False
        for number, value in fields(message, self._budget):
            if isinstance(value, int):
                is_external = value == 1 if kind == "tensor" and number == _DATA_LOCATION else is_external
            elif number in texts:
                if texts[number] in own:
                    raise UnsafeBundleError("ONNX: a text is given twice")
                own[texts[number]] = text(value)
            elif number in children:
                below = self.visit(children[number], value, depth + 1)
                if children[number] == "entry":
                    entries.append(below)
                    if len(entries) > len(_EXTERNAL_KEYS):
                        raise UnsafeBundleError("ONNX external data: more keys than there are")
        if kind == "graph":
            self.found.graphs += 1
        if kind == "tensor" and (is_external or entries):
            self.found.external.append(_external(entries))
        if finish := self._finish.get(kind):
            finish(own)
        if max(len(self.found.external), len(self.found.operators), len(self.found.functions)) > FOUND_MAX:
            raise UnsafeBundleError(f"ONNX: more than {FOUND_MAX} operators, functions or tensors in other files")
        return own

    def _end_node(self, own: _Found) -> None:
        self.found.operators.add((_domain(own.get("domain", "")), own.get("op_type", "")))

    def _end_function(self, own: _Found) -> None:
        self.found.functions.add((_domain(own.get("domain", "")), own.get("name", "")))


def _domain(name: str) -> str:
    return "" if name == "ai.onnx" else name


def _external(entries: list[_Found]) -> External:
    values: dict[str, str] = {}
    for entry in entries:
        key = entry.get("key", "")
        if key in values:
            raise UnsafeBundleError(f"ONNX external data: {key[:40]!r} is given twice")
        if key not in _EXTERNAL_KEYS:
            raise UnsafeBundleError(f"ONNX external data: the key {key[:40]!r} is not known")
        values[key] = entry.get("value", "")
    if "location" not in values:
        raise UnsafeBundleError("ONNX external data without a location")
    length = values.get("length")
    return External(
        location=values["location"],
        offset=_number(values.get("offset", "0")),
        length=None if length is None else _number(length),
    )


def _number(value: str) -> int:
    if not (value.isascii() and value.isdigit() and len(value) <= 15):
        raise UnsafeBundleError(f"ONNX external data: {value[:40]!r} is not a byte count")
    return int(value)
