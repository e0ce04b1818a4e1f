"""What the box's own status says about telemetry."""

from __future__ import annotations

from typing import Any

from agent.config import TelemetryConfig
from agent.telemetry.link import MqttLink
from agent.telemetry.outbox import Outbox


class TelemetryStatus:
    """Reads link and outbox; ``link`` is ``None`` when no broker is configured."""

    def __init__(self, config: TelemetryConfig, outbox: Outbox, link: MqttLink | None) -> None:
        self._config = config
        self._outbox = outbox
        self._link = link

    async def status(self) -> dict[str, Any]:
        """Return plain values."""
        stats = self._outbox.stats
        return {
            "configured": self._link is not None,
            "broker": f"{self._config.host}:{self._config.port}" if self._link is not None else "",
            "connected": self._link is not None and self._link.connected,
            "reason": "" if self._link is None else self._link.last_error,
            "outbox_rows": sum(stats.rows),
            "outbox_rows_by_priority": list(stats.rows),
            "outbox_bytes": stats.file_bytes,
            "epoch": stats.epoch,
            "appended": stats.appended,
            "delivered": stats.delivered,
            "gaps": stats.gaps,
            "lost": dict(stats.lost),
        }
