"""When a version on trial may be started. Pure.

Only a start after an end that nobody ordered (a crash, ``kill -9``, a power cut, the watchdog) counts against the
version: ``Pointer.running`` is set before it is loaded and cleared once an orderly stop is complete, so a cut at any
moment in between counts. With its starts used up, a version yields to the confirmed one. Where there is none it is
started again, ever more seldom: a box without any model is no safer place to return to (docs/adr/0010).
"""

from __future__ import annotations

from dataclasses import replace
from enum import StrEnum
from typing import Final

from agent.config import DeployConfig
from agent.deploy.pointer import Pointer

_RETRY_FIRST_S: Final = 60.0


class Start(StrEnum):
    """What becomes of a version on trial at boot."""

    NOW = "now"
    LATER = "later"  # nothing else could serve: after ``wait_s``
    NEVER = "never"  # the confirmed version is loaded instead


def counted(pointer: Pointer) -> Pointer:
    """Return the pointer as a boot finds it: an end that was not recorded as orderly counts, once."""
    if not pointer.running:
        return pointer
    return replace(pointer, starts_in_trial=pointer.starts_in_trial + 1, running=False)


def decide(pointer: Pointer, config: DeployConfig) -> Start:
    """Return whether the version on trial is started; ``pointer`` is ``counted``."""
    if pointer.starts_in_trial <= config.starts_in_trial_max:
        return Start.NOW
    return Start.LATER if pointer.previous is None else Start.NEVER


def wait_s(pointer: Pointer, config: DeployConfig) -> float:
    """Return how long a start ``LATER`` waits: twice as long after each further end (seconds)."""
    beyond = pointer.starts_in_trial - config.starts_in_trial_max - 1
    return float(min(config.trial_retry_cap_s, _RETRY_FIRST_S * 2.0 ** min(beyond, 32)))
