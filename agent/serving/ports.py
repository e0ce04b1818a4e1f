"""What the edges need from the rest of the daemon, in their own words.

``daemon.py`` supplies the real engine and control, ``tests/fakes/`` the false ones. Values and protocols only.
"""

from __future__ import annotations

import socket
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from agent.regions import Region
from agent.wire import Buffer, Header

Answer = Callable[[Header, Sequence[Buffer]], None]
PartAnswer = Callable[[dict[str, Any], Sequence[Buffer]], None]


@dataclass(slots=True, eq=False)
class InferRequest:
    """One request on its way into the engine.

    ``answer`` takes a ``result`` or ``error`` header, which is without an id and maybe one for many answers, and the
    body's buffers. It is called at most once, on the loop's thread; after ``Engine.cancel`` a call changes nothing.
    ``part`` is there if the answer may come in parts: it takes each ``part`` header, which is its own, and body, in
    order, before ``answer``.
    """

    model: str
    version: str | None
    header: Header  # the ``infer`` header as received, maybe one for many requests
    body: Buffer
    deadline: float  # absolute, in the loop's time (seconds)
    client: str  # whom quotas and fairness go by
    answer: Answer
    regions: Sequence[tuple[int, Region]] = ()  # shared memory the header names, by the client's numbers
    serial: int = 0  # the edge's own, to tell requests with the same id apart
    handle: Any = None  # the engine's own
    part: PartAnswer | None = None
    routing_key: str = ""  # what a canary's share goes by; empty: the header's parameter of that name, else the client


class ModelState(Protocol):
    """Whether a model serves now."""

    @property
    def ready(self) -> bool: ...

    @property
    def reason(self) -> str:
        """Why not; empty when ready."""


class Lane(Protocol):
    """A direct line from this client to a model's worker. ``on_end`` is called once, on the loop's thread."""

    number: int
    model: str
    version: str
    socket: socket.socket  # the client's end: close it when it is passed on
    on_end: Callable[[Any], None]

    def lend(self, number: int, region: Region, done: Callable[[], None]) -> None:
        """Let the worker know a region as the client calls it, then call ``done``; raises ``AgentError``."""

    def unlend(self, number: int) -> None:
        """Take a region back."""

    def revoke(self) -> None:
        """End the lane: what has arrived there is answered, nothing more is taken."""


class Engine(Protocol):
    """Where a request meets a model."""

    def open_lane(self, model: str, version: str | None = None, *, client: str, deadline_ms: int) -> Lane:
        """Return a direct lane to the worker of ``model``, of its default or the version named.

        Raises:
            UnknownModelError, UnavailableError: as for a request.
            LaneRefusedError: this client or model gets none.
        """

    def submit(self, request: InferRequest) -> None:
        """Answer ``request`` once, sooner or later; never blocks, never raises for expected failures."""

    def cancel(self, request: InferRequest) -> None:
        """Nobody waits for ``request`` any more; unknown or answered requests are ignored."""

    def pace(self, request: InferRequest, *, paused: bool) -> None:
        """Hold the stream that answers ``request``, or let it go on; repeated, unknown or answered is no fault."""

    def models(self) -> Sequence[str]:
        """Return the names of all models of this box, serving or expected."""

    def versions(self, name: str) -> Sequence[str]:
        """Return the versions that requests may name, the default first; ``UnknownModelError`` if there is no model."""

    def model_state(self, name: str, version: str | None = None) -> ModelState:
        """Return whether the model serves now; ``UnknownModelError`` if there is no such model or version."""

    def describe(self, name: str, version: str | None = None) -> Mapping[str, Any]:
        """Return Open Inference Protocol metadata: name, versions, platform, inputs, outputs, and our own additions.

        Raises:
            UnknownModelError: no such model or version.
            UnavailableError: known, and nothing is loaded.
        """


class Control(Protocol):
    """The management verbs; it checks the roles each verb needs."""

    def call(
        self,
        method: str,
        args: dict[str, Any],
        roles: frozenset[str],
        peer: str,
        at_end: Callable[[Callable[[], None]], None] | None = None,
    ) -> Awaitable[Any]:
        """Return the verb's plain value; raises ``AgentError``.

        ``at_end`` takes what is to be done when the caller's connection ends; ``None``: nobody would notice its end.
        """
