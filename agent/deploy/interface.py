"""Whether a version can take another's place without its callers noticing. Pure.

A caller counts on four things: the inputs it sends are still taken, the outputs it reads are still given, class numbers
still mean the same labels, and raw bodies are still read the same way. So a new version may take more (wider bounds)
and give more (further outputs), never less. Leaves out: how good its answers are (golden tests and probation judge
that), and layouts or labels that neither version declares.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Final

CODE: Final = "code of its own"  # a bundle's handler: what it reads and answers is not declared


@dataclass(frozen=True, slots=True, kw_only=True)
class Extent:
    """How long one dimension may be, bounds included. Dimensions of one ``name`` are equally long in each request."""

    low: int = 0
    high: int | None = None  # None: any length
    name: str = ""

    def covers(self, other: Extent) -> bool:
        """Whether every length of ``other`` is one of this."""
        return self.low <= other.low and (self.high is None or (other.high is not None and other.high <= self.high))

    def __str__(self) -> str:
        if self.high == self.low:
            return str(self.low)
        bounds = "*" if self.high is None and self.low <= 1 else f"{self.low}..{'' if self.high is None else self.high}"
        return f"{self.name}={bounds}" if self.name else bounds


@dataclass(frozen=True, slots=True, kw_only=True)
class Port:
    """One input or output tensor."""

    dtype: str
    shape: tuple[Extent, ...]
    layout: str = ""  # NCHW; empty: not declared

    def __str__(self) -> str:
        return f"{self.dtype}[{', '.join(map(str, self.shape))}]{f' {self.layout}' if self.layout else ''}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Labels:
    """A version's class labels: how many, and the sha256 of their file."""

    count: int
    digest: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Interface:
    """What callers see of a version. ``inputs`` and ``outputs`` by name."""

    inputs: Mapping[str, Port]
    outputs: Mapping[str, Port]
    handler: str  # a built-in one's id, or CODE
    labels: Labels | None = None


def differences(serving: Interface, candidate: Interface) -> tuple[str, ...]:
    """Return what keeps ``candidate`` from taking the place of ``serving``, a phrase each; empty if nothing does."""
    return (
        *_inputs(serving, candidate),
        *_outputs(serving, candidate),
        *_labels(serving.labels, candidate.labels),
        *([f"handler {candidate.handler}, was {serving.handler}"] if candidate.handler != serving.handler else []),
    )


def _inputs(serving: Interface, candidate: Interface) -> Iterator[str]:
    for name, old in serving.inputs.items():
        new = candidate.inputs.get(name)
        if new is None:
            yield f"input {name!r} is gone"
        elif not _alike(old, new) or not all(map(Extent.covers, new.shape, old.shape)):
            yield f"input {name!r} is {new}, was {old}"
    yield from (f"input {name!r} is new" for name in candidate.inputs if name not in serving.inputs)


def _outputs(serving: Interface, candidate: Interface) -> Iterator[str]:
    before, after = _ties(serving), _ties(candidate)
    for name, old in serving.outputs.items():
        new = candidate.outputs.get(name)
        if new is None:
            yield f"output {name!r} is gone"
        elif not _alike(old, new) or not all(
            was.covers(now) or before.get(was.name, frozenset()) & after.get(now.name, frozenset())
            for was, now in zip(old.shape, new.shape, strict=True)
        ):
            yield f"output {name!r} is {new}, was {old}"


def _alike(old: Port, new: Port) -> bool:
    """Whether lengths are all that may differ."""
    same_layout = old.layout == new.layout or not (old.layout and new.layout)
    return old.dtype == new.dtype and len(old.shape) == len(new.shape) and same_layout


def _ties(interface: Interface) -> Mapping[str, frozenset[tuple[str, int]]]:
    """Return, by dimension name, the input axes that set its length: there the caller's request decides."""
    found: dict[str, frozenset[tuple[str, int]]] = {}
    for name, port in interface.inputs.items():
        for axis, extent in enumerate(port.shape):
            if extent.name:
                found[extent.name] = found.get(extent.name, frozenset()) | {(name, axis)}
    return found


def _labels(old: Labels | None, new: Labels | None) -> Iterator[str]:
    if old is None or old == new:
        return
    if new is None:
        yield "class labels are gone"
    elif new.count != old.count:
        yield f"{new.count} class labels, were {old.count}"
    else:
        yield "other class labels, or in another order"
