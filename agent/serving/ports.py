"""What the edges need from the rest of the daemon, in their own words.

``daemon.py`` supplies the real engine and control, ``tests/fakes/`` the false ones. Values and protocols only.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Protocol

from agent.regions import Region
from agent.wire import Buffer

DEADLINE_MS_MAX: Final = 3_600_000  # what a client may ask for

Answer = Callable[[dict[str, Any], Sequence[Buffer]], None]


@dataclass(slots=True, eq=False, kw_only=True)
class InferRequest:
    """One request on its way into the engine.

    ``answer`` takes a ``result`` or ``error`` header, with the id of ``header`` if that had one, and the body's
    buffers. It is called at most once, on the loop's thread; after ``Engine.cancel`` a call changes nothing. ``part``
    is there if the answer may come in parts: it takes each ``part`` header and body, in order, before ``answer``.
    """

    model: str
    version: str | None
    header: dict[str, Any]  # the ``infer`` header as received; never changed by the engine
    body: Buffer
    deadline: float  # absolute, in the loop's time (seconds)
    client: str  # whom quotas and fairness go by
    answer: Answer
    regions: Sequence[tuple[int, Region]] = ()  # shared memory the header names, by the client's numbers
    handle: Any = None  # the engine's own
    part: Answer | None = None


class ModelState(Protocol):
    """Whether a model serves now."""

    @property
    def ready(self) -> bool: ...

    @property
    def reason(self) -> str:
        """Why not; empty when ready."""


class Engine(Protocol):
    """Where a request meets a model."""

    def submit(self, request: InferRequest) -> None:
        """Answer ``request`` once, sooner or later; never blocks, never raises for expected failures."""

    def cancel(self, request: InferRequest) -> None:
        """Nobody waits for ``request`` any more; unknown or answered requests are ignored."""

    def pace(self, request: InferRequest, *, paused: bool) -> None:
        """Hold the stream that answers ``request``, or let it go on; repeated, unknown or answered is no fault."""

    def models(self) -> Sequence[str]:
        """Return the names of all models of this box, serving or expected."""

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

    def call(self, method: str, args: dict[str, Any], roles: frozenset[str], peer: str) -> Awaitable[Any]:
        """Return the verb's plain value; raises ``AgentError``."""
