"""Which version answers a request: one route per model. Pure.

A request that names no version goes to the default. One that names a version finds it wherever it can answer: as the
default, beside it, on trial, or kept for a rollback. Leaves out: what a version is, and when it comes and goes.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import TYPE_CHECKING, Generic, Protocol, TypeVar

from agent.errors import UnavailableError, UnknownModelError

if TYPE_CHECKING:
    from agent.engine.canary import Canary


class Addressed(Protocol):
    """What a route leads to."""

    @property
    def version(self) -> str:
        """The text that requests name it by."""


V = TypeVar("V", bound=Addressed)


class Route(Generic[V]):
    """The versions of one model."""

    __slots__ = ("beside", "canary", "default", "expected", "kept", "model")

    def __init__(self, model: str) -> None:
        self.model = model
        self.default: V | None = None  # answers what names no version
        self.beside: dict[str, V] = {}  # by version; each answers what names it
        self.kept: list[V] = []  # loaded for a deployment: before its cut-over, or for a rollback; the newest last
        self.canary: Canary | None = None  # a candidate's part in what names no version
        self.expected: dict[str, str] = {}  # why what is known does not serve yet, by version; "": the default

    def choose(self, version: str | None) -> V:
        """Return the version that answers a request.

        Raises:
            UnknownModelError: there is no such version.
            UnavailableError: known, and nothing is there yet that could answer.
        """
        found = self.find(version)
        if found is None:
            raise UnavailableError(f"{_named(self.model, version)}: {self.absence(version)}")
        return found

    def find(self, version: str | None) -> V | None:
        """Return what answers a request; where versions have the same name, the one that has served for longest."""
        default = self.default
        if not version or (default is not None and default.version == version):
            return default
        return self.beside.get(version) or next((one for one in self.kept if one.version == version), None)

    def absence(self, version: str | None) -> str:
        """Return why nothing answers, for now.

        Raises:
            UnknownModelError: there is no such version.
        """
        reason = self.expected.get(version or "")
        if reason is None and version:
            raise UnknownModelError(
                f"Request for unknown model: {self.model!r} version {version!r} is not found; {self._there_are()}"
            )
        return reason or f"it has no default version; {self._there_are()}"

    @property
    def versions(self) -> list[str]:
        """The versions that requests may name, the default first; also those that are not there yet."""
        first = [] if self.default is None else [self.default.version]
        others = {one.version for one in self} | self.expected.keys() - {""}
        return list(dict.fromkeys([*first, *sorted(others, key=_order)]))

    @property
    def empty(self) -> bool:
        """Whether nothing of the model is known any more."""
        return self.default is None and not (self.beside or self.kept or self.expected)

    def __iter__(self) -> Iterator[V]:
        """Yield each version that can answer, the default first."""
        ones = [] if self.default is None else [self.default]
        return iter(dict.fromkeys([*ones, *self.beside.values(), *self.kept]))  # one may have several places

    def leave(self, version: V, *, beside: bool = False) -> None:
        """Take a version from the place it has for its slot: beside, or any of the others."""
        if beside:
            if self.beside.get(version.version) is version:
                del self.beside[version.version]
            return
        if self.default is version:
            self.default = None
        self.kept = [one for one in self.kept if one is not version]

    def _there_are(self) -> str:
        """Return every version that can be named with each place it has, and what will be the default."""
        names = [f"{version} ({', '.join(self._places(version))})" for version in self.versions]
        there_are = f"there are {', '.join(names)}" if names else "there are no versions"
        awaited = self.expected.get("") if self.default is None else None
        return f"{there_are}; the default is not there yet: {awaited}" if awaited else there_are

    def _places(self, version: str) -> Iterator[str]:
        if self.default is not None and self.default.version == version:
            yield "default"
        if version in self.beside or version in self.expected:
            yield "beside"
        if any(one.version == version and one is not self.default for one in self.kept):
            yield "of a deployment"
        if version in self.expected and self.find(version) is None:
            yield "not there yet"


def _order(version: str) -> list[str | int]:
    """Return what sorts versions by their numbers: 10.0.0 after 9.0.0."""
    return [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", version)]


def _named(model: str, version: str | None) -> str:
    return f"model {model!r} version {version!r}" if version else f"model {model!r}"
