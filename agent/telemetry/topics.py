"""Where each message goes: the topic tree below ``inferd/v1/{tenant}`` and the streams telemetry is made of.

Everything a device says or hears is below ``…/d/{id}``, so that one broker rule per device (``%u``) separates boxes.
Absent on purpose: payloads (``payloads.py``) and what a stream's rows survive (``store.py``).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

ROOT: Final = "inferd/v1"
DAY_S: Final = 86_400


@dataclass(frozen=True, slots=True, kw_only=True)
class StreamSpec:
    """One numbered sequence of messages; ``name`` is also its topic below the device, unless a row brings its own."""

    name: str
    priority: int  # 0 goes first and is dropped last, 3 goes last and is dropped first
    expiry_s: int  # for the broker: how long a message may wait for its receiver
    newest_first: bool = False  # measurements: the present matters before the past
    unheard_max: int | None = None  # so often without any subscriber: dropped; None: kept until somebody listens


DEPLOY: Final = StreamSpec(name="evt/deploy", priority=0, expiry_s=30 * DAY_S)
SECURITY: Final = StreamSpec(name="evt/security", priority=0, expiry_s=30 * DAY_S)
AUDIT: Final = StreamSpec(name="evt/audit", priority=0, expiry_s=30 * DAY_S)
# A reply nobody listens for any more would wait for ever; its result stays in the command journal.
REPLY: Final = StreamSpec(name="res", priority=0, expiry_s=DAY_S, unheard_max=6)
HEALTH: Final = StreamSpec(name="evt/health", priority=1, expiry_s=30 * DAY_S)
CLOCK: Final = StreamSpec(name="evt/clock", priority=1, expiry_s=30 * DAY_S)
METRICS: Final = StreamSpec(name="tel/metrics", priority=2, expiry_s=DAY_S, newest_first=True)
SAMPLES: Final = StreamSpec(name="tel/infer", priority=3, expiry_s=3600, newest_first=True)

STREAMS: Final = (DEPLOY, SECURITY, AUDIT, REPLY, HEALTH, CLOCK, METRICS, SAMPLES)

GAP_TOPIC: Final = "evt/gap"
GAP_EXPIRY_S: Final = 30 * DAY_S


class Topics:
    """The topics of one device."""

    def __init__(self, tenant: str, device: str) -> None:
        self.tenant = tenant
        self.device = device
        self.root = f"{ROOT}/{tenant}"
        self.base = f"{self.root}/d/{device}"
        self.status = f"{self.base}/status"
        self.reported = f"{self.base}/reported"
        self.commands = f"{self.base}/cmd/+"
        self.rebirth = f"{self.root}/ctl/rebirth"

    def up(self, suffix: str) -> str:
        """Return the full topic of a message of ours, e.g. ``evt/deploy``."""
        return f"{self.base}/{suffix}"

    def command(self, name: str) -> str:
        """Return the topic on which the device hears the command ``name``."""
        return f"{self.base}/cmd/{name}"

    def command_name(self, topic: str) -> str | None:
        """Return which command a received topic carries; ``None`` if it is none of ours."""
        if topic == self.rebirth:
            return "rebirth"
        prefix = f"{self.base}/cmd/"
        name = topic.removeprefix(prefix)
        return name if topic.startswith(prefix) and name and "/" not in name else None

    def reply(self, name: str, requested: str | None) -> str:
        """Return where the answer to the command ``name`` goes.

        Args:
            name: The command.
            requested: The response topic of the request. It is not signed, so it counts only below ``…/d/{id}/res/``: a
                stranger cannot make the device publish elsewhere, and who hears the device hears every reply.
        """
        area = f"{self.base}/res/"
        if requested and len(requested) <= 256 and requested.startswith(area) and not set(requested) & set("+#\0"):
            return requested
        return area + name
