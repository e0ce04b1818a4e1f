"""What every lane of the box works with."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path

from agent.clock import Clock
from agent.config import DeployConfig
from agent.deploy.desired import Ending
from agent.deploy.gates import Situation
from agent.deploy.journal import Journal
from agent.deploy.ports import Store
from agent.deploy.refusals import Refusals
from agent.deploy.state import Record
from agent.deploy.steps import Steps
from agent.events import EventBus


@dataclass(frozen=True, slots=True, kw_only=True)
class Means:
    """One for all lanes.

    Attributes:
        ending: Why a deployment is to be given up; ``None``: it is not.
        situation: What the box knows now, for the gates.
        revoked: Why a digest was revoked, and policy keeps it from being loaded; else empty.
        make_room: Lets go what nothing needs, but the versions of these digests; whether anything went.
        make_steps: Writes and tells what happens in one lane.
    """

    config: DeployConfig
    store: Store
    journal: Journal
    events: EventBus
    refusals: Refusals
    clock: Clock
    state_dir: Path
    ending: Callable[[Record], Ending | None]
    situation: Callable[[Record], Situation]
    revoked: Callable[[str], str]
    make_room: Callable[[frozenset[str]], Awaitable[bool]]
    make_steps: Callable[[], Steps]
