"""Whose models are in memory: whether a load fits, what is unloaded for it, and why it must wait or is refused. Pure.

One account for everything: a pool's first workers, those it grows by, a version on trial beside the one it replaces.
Memory is in places, the host's and each GPU's; a worker takes some of one or of two. A place has a budget, a share of
what the box has, and what is free in it now, which others than us use too. What is unloaded is idle and was used the
longest ago; pinned versions, those on trial and those that a trial may return to stay.
Leaves out: reading memory (``meter.py``), what was learned (``learned.py``), waiting and unloading (``residency.py``).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Final

HOST: Final = "host"
_MIB: Final = 1 << 20
_WEIGHTS_FACTOR: Final = 2  # bytes of memory for a byte of model files nobody has measured: a copy, and what it runs in
# What a worker takes beside its model, private to it: measured for an ONNX worker, 7 MiB.
_OVERHEAD_BYTES: Final[Mapping[str, int]] = {"onnx": 12 * _MIB, "torch": 64 * _MIB}
_OVERHEAD_OTHER_BYTES: Final = 64 * _MIB
_CUDA_HOST_BYTES: Final = 512 * _MIB  # the driver's and the libraries' own
_CUDA_DEVICE_BYTES: Final = 512 * _MIB  # a CUDA context with its kernels


class Source(StrEnum):
    """How well a need is known."""

    ESTIMATED = "estimated"  # from the sizes of files
    DECLARED = "declared"  # the publisher measured it
    MEASURED = "measured"  # on this box


@dataclass(frozen=True, slots=True, kw_only=True)
class Need:
    """What a worker takes at its peak: bytes by place, ``host`` or ``cuda:0``; ``cuda`` until it is placed."""

    sizes: Mapping[str, int]
    source: Source = Source.ESTIMATED
    unseen_bytes: int = 0  # of the host's, for a GPU that shares it: no process's figures show them

    def times(self, workers: int) -> Need:
        """Return the need of so many workers."""
        return Need(sizes={place: size * workers for place, size in self.sizes.items()}, source=self.source)

    def learned(self, known: Mapping[str, int]) -> Need:
        """Return the need by what was seen of a worker, by kind of place; what was not seen stays as estimated."""
        seen = {place: known[kind] for place in self.sizes if (kind := kind_of(place)) in known}
        if HOST in seen:
            seen[HOST] += self.unseen_bytes
        whole = seen.keys() == self.sizes.keys() and not self.unseen_bytes
        source = Source.MEASURED if whole else self.source
        return Need(sizes={**self.sizes, **seen}, source=source, unseen_bytes=self.unseen_bytes)


@dataclass(frozen=True, slots=True, kw_only=True)
class Room:
    """One place: what models may take of it together (0: no bound), and what is free in it now."""

    budget_bytes: int = 0
    available_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Tenant:
    """A pool in memory, or on its way in or out."""

    name: str  # model and version
    need: Need  # of all its workers
    used_at: float = 0.0  # monotonic seconds of the last request or answer
    keep_alive_s: float = math.inf
    busy: bool = False  # owes answers, is being loaded, or is leaving
    loading: bool = False  # granted, and not to be seen in what is free yet
    kept: str = ""  # why it is not unloaded for others; empty if it may be
    replaced: bool = False  # the newcomer is to take its place: unloaded if nothing else helps, also while it is busy


class Move(StrEnum):
    """What to do about a load."""

    LOAD = "load"
    UNLOAD = "unload"  # these first, then look again
    WAIT = "wait"  # for those that are busy
    REFUSE = "refuse"  # nothing that stays may be unloaded
    NEVER = "never"  # not even alone


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """A move, the positions of the tenants to unload, and the reason of what is not done at once."""

    move: Move
    unload: tuple[int, ...] = ()
    reason: str = ""


def kind_of(place: str) -> str:
    """Return under which name a place's figures are learned: a variant takes the same of each GPU of a box."""
    return place.partition(":")[0]


def estimate(
    *, runtime: str, place: str, file_bytes: int, host_mib: int, device_mib: int, measured: bool, unified: bool = False
) -> Need:
    """Return what a worker will take, by its manifest.

    Args:
        runtime: The zygote's name.
        place: ``host`` for a CPU, else the device, or its kind.
        file_bytes: Of the variant's files.
        host_mib: What the manifest says of host memory; 0 if nothing.
        device_mib: Likewise of the device's.
        measured: Whether the publisher measured that.
        unified: Whether the device has no memory of its own but shares the host's, as Jetson boards do.
    """
    overhead = _OVERHEAD_BYTES.get(runtime, _OVERHEAD_OTHER_BYTES)
    guess = _WEIGHTS_FACTOR * file_bytes
    declared = measured and bool(device_mib if place != HOST else host_mib)
    source = Source.DECLARED if declared else Source.ESTIMATED
    if place == HOST:
        return Need(sizes={HOST: (host_mib * _MIB or guess) + overhead}, source=source)
    host = (host_mib * _MIB or file_bytes) + overhead + _CUDA_HOST_BYTES
    device = (device_mib * _MIB or guess) + _CUDA_DEVICE_BYTES
    if unified:
        return Need(sizes={HOST: host + device}, source=source, unseen_bytes=device)
    return Need(sizes={HOST: host, place: device}, source=source)


def plan(need: Need, tenants: Sequence[Tenant], rooms: Mapping[str, Room], *, may_unload: bool) -> Plan:
    """Return how ``need`` gets its room.

    Args:
        need: Of what is to be loaded.
        tenants: What is in memory.
        rooms: The places; one that is not there bounds nothing.
        may_unload: Whether others may be unloaded for it.
    """
    need = _within_budgets(need, rooms)
    missing = _missing(need, tenants, rooms)
    if not missing:
        return Plan(move=Move.LOAD)
    for place, size in need.sizes.items():
        room = rooms.get(place)
        if room is not None and room.budget_bytes and size > room.budget_bytes:
            return Plan(
                move=Move.NEVER,
                reason=f"it needs {_mib(size)} MiB of {_memory(place)}, models may take {_mib(room.budget_bytes)}",
            )
    reason = _shortage(need, tenants, rooms, missing)
    if not may_unload:
        return Plan(move=Move.REFUSE, reason=reason)
    idle = [i for i, tenant in enumerate(tenants) if not tenant.kept and (tenant.replaced or not tenant.busy)]
    chosen = _least_used(idle, tenants, missing)
    if chosen is not None:
        return Plan(move=Move.UNLOAD, unload=chosen, reason=reason)
    movable = [i for i, tenant in enumerate(tenants) if not tenant.kept]
    if _least_used(movable, tenants, missing) is not None:
        names = ", ".join(tenants[i].name for i in movable if tenants[i].busy)
        return Plan(move=Move.WAIT, reason=f"{reason}; in use: {names}")
    staying = [f"{tenant.name} ({tenant.kept})" for tenant in tenants if tenant.kept and _helps(tenant, missing)]
    return Plan(move=Move.REFUSE, reason=f"{reason}; not unloaded: {', '.join(staying) or 'nothing is loaded'}")


def expired(tenants: Sequence[Tenant], now: float) -> tuple[tuple[int, ...], float]:
    """Return the positions of those that have been idle for their keep-alive, and when the next will have been."""
    due, next_at = [], math.inf
    for position, tenant in enumerate(tenants):
        if tenant.kept or tenant.busy:
            continue
        at = tenant.used_at + tenant.keep_alive_s
        if at <= now:
            due.append(position)
        else:
            next_at = min(next_at, at)
    return tuple(due), next_at


def held(tenants: Iterable[Tenant]) -> dict[str, int]:
    """Return what all tenants take together, by place (bytes)."""
    sums: dict[str, int] = {}
    for tenant in tenants:
        for place, size in tenant.need.sizes.items():
            sums[place] = sums.get(place, 0) + size
    return sums


def _within_budgets(need: Need, rooms: Mapping[str, Room]) -> Need:
    """A model that has run here may run again, alone, though it turned out to take more than models should."""
    if need.source is not Source.MEASURED:
        return need
    budgets = {place: room.budget_bytes for place, room in rooms.items() if room.budget_bytes}
    sizes = {place: min(size, budgets.get(place, size)) for place, size in need.sizes.items()}
    return Need(sizes=sizes, source=need.source)


def _missing(need: Need, tenants: Sequence[Tenant], rooms: Mapping[str, Room]) -> dict[str, int]:
    """Return by how much the need is too large, for each place where it is (bytes)."""
    taken, promised = held(tenants), held(tenant for tenant in tenants if tenant.loading)
    missing = {}
    for place, size in need.sizes.items():
        room = rooms.get(place)
        if room is None or not size:
            continue
        over = taken.get(place, 0) + size - room.budget_bytes if room.budget_bytes else 0
        short = promised.get(place, 0) + size - room.available_bytes
        if max(over, short) > 0:
            missing[place] = max(over, short)
    return missing


def _least_used(
    positions: Iterable[int], tenants: Sequence[Tenant], missing: Mapping[str, int]
) -> tuple[int, ...] | None:
    """Return which to unload: the longest unused that help, and none too many; ``None`` if all do not suffice."""
    left, chosen = dict(missing), []
    for position in sorted(positions, key=lambda i: (tenants[i].replaced, tenants[i].used_at)):
        if not any(size > 0 for size in left.values()):
            break
        if _helps(tenants[position], {place: size for place, size in left.items() if size > 0}):
            chosen.append(position)
            _subtract(left, tenants[position], 1)
    if any(size > 0 for size in left.values()):
        return None
    for position in list(chosen):  # the longest unused may have been too small to matter
        _subtract(left, tenants[position], -1)
        if any(size > 0 for size in left.values()):
            _subtract(left, tenants[position], 1)
        else:
            chosen.remove(position)
    return tuple(chosen)


def _subtract(left: dict[str, int], tenant: Tenant, sign: int) -> None:
    for place in left:
        left[place] -= sign * tenant.need.sizes.get(place, 0)


def _helps(tenant: Tenant, missing: Mapping[str, int]) -> bool:
    return any(tenant.need.sizes.get(place) for place in missing)


def _shortage(need: Need, tenants: Sequence[Tenant], rooms: Mapping[str, Room], missing: Mapping[str, int]) -> str:
    place = next(iter(missing))
    size, room, taken = need.sizes[place], rooms[place], held(tenants).get(place, 0)
    if room.budget_bytes and taken + size > room.budget_bytes:
        return (
            f"models may take {_mib(room.budget_bytes)} MiB of {_memory(place)}, they hold {_mib(taken)}, and "
            f"{_mib(size)} more are needed"
        )
    return f"{_mib(size)} MiB of {_memory(place)} are needed, {_mib(room.available_bytes)} are free"


def _memory(place: str) -> str:
    return "memory" if place == HOST else f"{place}'s memory"


def _mib(size_bytes: int) -> int:
    return -(-size_bytes // _MIB)
