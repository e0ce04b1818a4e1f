"""What the messages say: pure functions from facts to JSON-able values, and the time stamp each one carries.

A device's clock may be wrong for weeks, so every message carries four fields: ``ts`` (Unix seconds, or null), ``mono``
(seconds since boot), ``boot`` (the boot's id) and ``tq``, how good ``ts`` is. When the clock is put right a ``clock``
event tells the offset, and a receiver can date what came before. Absent on purpose: ``st``, ``ep`` and ``seq``, which
the outbox adds when it numbers a message.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Final, Literal

import msgspec

from agent.clock import Clock
from agent.events import Event

TimeQuality = Literal["ntp", "rtc", "floor", "none"]
Plain = dict[str, Any]

_YEAR_2024: Final = 1_704_067_200.0  # no box ran this program before
_ENCODER: Final = msgspec.json.Encoder(enc_hook=str)


class Stamper:
    """Stamps messages with the device's idea of time.

    Args:
        clock: Wall and monotonic seconds.
        boot_id: The kernel's id of this boot.
        synchronized: Whether the kernel's clock follows a time server now.
        floor_s: The newest signed time seen; the wall clock cannot truly be before it. 0 if there is none.
    """

    def __init__(
        self,
        clock: Clock,
        *,
        boot_id: str,
        synchronized: Callable[[], bool],
        floor_s: Callable[[], float] = lambda: 0.0,
    ) -> None:
        self._clock = clock
        self.boot_id = boot_id
        self._synchronized = synchronized
        self._floor_s = floor_s

    def now(self) -> tuple[float | None, TimeQuality]:
        """Return Unix seconds and their quality: ``ntp``; ``rtc``, plausible; ``floor``, a lower bound; ``none``."""
        wall, floor = self._clock.wall(), self._floor_s()
        if self._synchronized():
            return wall, "ntp"
        if wall < floor:
            return floor, "floor"
        return (wall, "rtc") if wall >= _YEAR_2024 else (None, "none")

    def stamp(self) -> Plain:
        """Return the four time fields."""
        ts, quality = self.now()
        return {
            "ts": None if ts is None else round(ts, 3),
            "mono": round(self._clock.monotonic(), 3),
            "boot": self.boot_id,
            "tq": quality,
        }

    def offset_s(self) -> float:
        """Return wall minus monotonic seconds: constant as long as nobody sets the clock."""
        return self._clock.wall() - self._clock.monotonic()


def event(stamp: Plain, happened: Event) -> Plain:
    """Return the payload of an event; see ``agent.events``."""
    return {**stamp, "type": happened.type, "sev": happened.severity.value, "data": happened.data}


def birth(stamp: Plain, *, sid: str, description: Mapping[str, Any]) -> bytes:
    """Return the retained status of a device that has just connected.

    Args:
        stamp: The time fields.
        sid: This connection's id; a will with another ``sid`` is an old one and means nothing.
        description: Agent version, active models and the like.
    """
    return encode({"online": True, "sid": sid, **stamp, **description})


def will(*, sid: str) -> bytes:
    """Return what the broker says for us when we vanish."""
    return encode({"online": False, "sid": sid, "reason": "lost"})


def stopped(stamp: Plain, *, sid: str) -> bytes:
    """Return the retained status of a device that was shut down in order."""
    return encode({"online": False, "sid": sid, "reason": "stopped", **stamp})


def condense(snapshot: Mapping[str, Any], *, bytes_max: int) -> Plain:
    """Return metrics that fit a message: ``{"metrics": {...}}``, and the names of families ``left_out``, if any.

    Families without a series are skipped; when there is still too much the largest families go first.
    """
    sizes = {name: len(encode(series)) + len(name) + 4 for name, series in snapshot.items() if series}
    total, left_out = sum(sizes.values()), []
    for name in sorted(sizes, key=sizes.__getitem__, reverse=True):
        if total <= bytes_max:
            break
        total -= sizes[name]
        left_out.append(name)
    kept = {name: snapshot[name] for name in sizes if name not in left_out}
    return {"metrics": kept, "left_out": sorted(left_out)} if left_out else {"metrics": kept}


def encode(value: Any) -> bytes:
    """Return compact JSON; a value JSON does not know becomes its text, so that telemetry never fails on one."""
    return _ENCODER.encode(value)
