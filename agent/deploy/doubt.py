"""A version on trial answers late: is it the version, or is the whole box slow?

After a cut-over the version before gets no requests, so its last minutes are all there is to compare with, and a box
that has just become busy would condemn every version. So latency alone only raises a doubt: requests are then copied to
the version before, which is still in memory, and both are judged by the same requests at the same time.
"""

from __future__ import annotations

from typing import Final

from agent.clock import Clock
from agent.config import DeployConfig
from agent.deploy.ports import Host, Loaded
from agent.deploy.probation import later

_PATIENCE_S: Final = 10.0  # at least; for requests that can be copied


class Doubt:
    """One doubt about what serves. Call ``end`` in the end.

    Args:
        before: The version before it, in memory.
        reason: Why there is a doubt.
        config: The gates.
        host: Routes.
        clock: Monotonic time.
    """

    def __init__(self, before: Loaded, reason: str, *, config: DeployConfig, host: Host, clock: Clock) -> None:
        self._before = before
        self._reason = reason
        self._config = config
        self._host = host
        self._clock = clock
        host.try_out(before, canary_percent=0.0, shadow_percent=100.0)
        self._first = before.evidence().copies
        self._until = clock.monotonic() + max(_PATIENCE_S, config.probation_s)

    def settled(self) -> str | None:
        """Return why the version is too slow, empty if it is not; ``None``: that cannot be said yet."""
        copies = self._before.evidence().copies.since(self._first)
        found = later(copies.originals, copies.durations, self._config, self._config.probation_calls_min, "answers")
        if found is None and self._clock.monotonic() >= self._until:
            return self._reason  # nothing speaks for it
        return f"{found} at the same time" if found else found

    def end(self) -> None:
        """Copy nothing more."""
        self._host.end_try(self._before)
