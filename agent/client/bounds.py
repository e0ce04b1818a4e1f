"""How long and how much, for both clients: waits, reads, and the pauses before a restarting daemon is tried again."""

from __future__ import annotations

import errno
from typing import Final

from agent.backoff import Backoff

READ_BYTES: Final = 64 * 1024
SEND_BUFFER_BYTES: Final = 1 << 20
_GRACE_S: Final = 5.0  # beyond a request's deadline: the daemon answers late requests too
_LANE_GRACE_S: Final = 0.05  # the same on a direct lane: the daemon too is about so late
_RETRY_FIRST_S: Final = 0.01
_RETRY_CAP_S: Final = 0.25
_NOT_THERE: Final = frozenset({errno.ENOENT, errno.ECONNREFUSED, errno.EAGAIN, errno.ECONNRESET})


def wait_s(deadline_ms: float | None, timeout_s: float) -> float:
    """Return how long to wait for the daemon's answer; ``timeout_s`` holds where there is no deadline."""
    return timeout_s if deadline_ms is None else deadline_ms / 1000 + _GRACE_S


def lane_wait_s(deadline_ms: float | None, timeout_s: float) -> float:
    """Return how long to wait for an answer on a direct lane."""
    return timeout_s if deadline_ms is None else deadline_ms / 1000 + _LANE_GRACE_S


def reconnects() -> Backoff:
    """Return the pauses between tries to connect."""
    return Backoff(first_s=_RETRY_FIRST_S, cap_s=_RETRY_CAP_S)


def restarting(error: OSError) -> bool:
    """Whether a daemon that could not be reached may be there in a moment."""
    return error.errno in _NOT_THERE
