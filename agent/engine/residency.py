"""Lets pools into memory and sends idle ones out, as ``memory.py`` decides; learns what they really take.

Decisions are made one at a time, in the order they were asked for, so that a large model is not kept out by many small
ones that each find room. What must wait looks again many times a second: nobody has to tell that a model became idle.
Promises: a pool's memory counts from the grant until its last worker is gone; what owes answers is not unloaded for
others; who waits gives up when nobody waits for it any more, and after ``memory_wait_s``.
Leaves out: how a version sleeps and wakes (``version.py``).
"""

from __future__ import annotations

import asyncio
import contextlib
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Final, Protocol

from agent.engine.learned import Learned
from agent.engine.memory import HOST, Move, Need, Room, Source, Tenant, expired, held, kind_of, plan
from agent.engine.meter import Meter
from agent.engine.types import Keeping, VariantSpec
from agent.errors import AgentError, LoadError, OutOfMemoryError, OverloadedError
from agent.events import EventBus, Stream
from agent.log import get_logger
from agent.metrics import Metrics

_log = get_logger("memory")
_LOOK_AGAIN_S: Final = 0.02
_IN_USE_S: Final = 60.0  # since its last request: a model does not leave for a deployment of another
_LEARN_EVERY_S: Final = 30.0
_RETRY_S: Final = 5.0  # what a refused caller is told to wait, where nobody can know it
_RETURN_S: Final = 5.0  # for freed device memory to be seen as free
_RETURNED: Final = 0.75  # of it
_EVENTS_MAX: Final = 30  # of models that come and go, for each ``_EVENTS_EVERY_S``; the metrics count all
_EVENTS_EVERY_S: Final = 60.0


class Held(Protocol):
    """What is asked of a pool."""

    size: int
    spec: VariantSpec  # with its device, once it asks for room

    @property
    def closed(self) -> bool:
        """Whether it takes no more work."""

    @property
    def pids(self) -> Sequence[int]:
        """Its workers."""

    def in_use(self, now: float) -> bool:
        """Whether it owes an answer or has just given one on a lane."""


class Lodger(Protocol):
    """What is asked of the version that a pool is of."""

    used_at: float  # loop seconds
    asked_at: float  # loop seconds of the last request; self-tests and loads are none
    may_unload: bool  # whether others may be unloaded for what it loads now
    load_until: float  # loop seconds until which its load may wait for memory

    @property
    def name(self) -> str:
        """Model and version."""

    @property
    def model(self) -> str: ...

    @property
    def version(self) -> str: ...

    @property
    def keeping(self) -> Keeping: ...

    @property
    def held_by(self) -> str:
        """Why a deployment needs it in memory; empty if none does."""

    @property
    def digest(self) -> str: ...

    @property
    def beside(self) -> int:
        """Above 0: it is kept beside its model's default, so that neither takes the other's place."""

    def wanted(self) -> bool:
        """Whether anybody still waits for what it loads."""

    async def unload(self, cause: str, reason: str) -> None:
        """Leave memory; the next request loads it again."""


class Seat:
    """One pool's part of memory."""

    def __init__(self, residency: Residency, lodger: Lodger, variant: VariantSpec) -> None:
        self.lodger = lodger
        self.variant = variant
        self.need = residency.need_of(lodger.digest, variant)
        self.pool: Held | None = None
        self.loading = True
        self.measured_at = -math.inf  # loop seconds
        self._residency = residency

    async def take(self, pool: Held) -> None:
        """Return when there is room for the pool's workers; it counts from then on.

        Raises:
            OutOfMemoryError: there never will be, as this box is configured.
            OverloadedError: not now: what is loaded must stay, or was in use for too long.
            LoadError: the pool was closed meanwhile.
        """
        await self._residency.admit(self, pool)

    async def room(self, pool: Held) -> str:
        """Return why there is no room for the one worker more that ``pool.size`` counts already; empty if there is."""
        return await self._residency.room_for_one(self, pool)

    def settle(self) -> None:
        """Its first worker is ready: from now on its use shows in what is free."""
        self.loading = False

    async def measure(self, pid: int) -> None:
        """Learn what a worker takes."""
        await self._residency.measure(self, (pid,))

    def leave(self) -> None:
        """Its last worker is gone."""
        self._residency.remove(self)


class Residency:
    """All pools of this box that are in memory. ``run`` is a part of the engine's component."""

    def __init__(
        self,
        meter: Meter,
        learned: Learned,
        *,
        now: Callable[[], float],
        events: EventBus,
        metrics: Metrics,
    ) -> None:
        self._meter = meter
        self._learned = learned
        self._now = now
        self._events = events
        self._seats: list[Seat] = []
        self._turn = asyncio.Lock()
        self._blocked = False  # somebody waits for models in use
        self._news = asyncio.Event()
        self._told = 0  # events of the present minute
        self._told_from = -math.inf
        self._rooms: Mapping[str, Room] = {}
        self._loads = metrics.counter("inferd_model_loads", "Loads into memory", ("model", "cause"))
        self._unloads = metrics.counter("inferd_model_unloads", "Unloads from memory", ("model", "cause"))
        metrics.gauge("inferd_memory_held_bytes", "Memory that models hold, by account", ("place",), self._held)
        metrics.gauge("inferd_memory_budget_bytes", "Memory that models may take", ("place",), self._budgets)
        metrics.gauge(
            "inferd_model_memory_bytes", "Memory a model holds, by account", ("model", "version", "place"), self._each
        )

    async def run(self) -> None:
        """Unload what has been idle for long enough, and keep what was learned, until cancelled."""
        self._rooms = await asyncio.to_thread(self._meter.rooms)
        learn_at = self._now() + _LEARN_EVERY_S
        while True:
            self._news.clear()
            next_at = await self._send_out_idle()
            if self._now() >= learn_at:
                learn_at = self._now() + _LEARN_EVERY_S
                self._rooms = await asyncio.to_thread(self._meter.rooms)
                for seat in [seat for seat in self._seats if seat.lodger.used_at > seat.measured_at]:
                    await self.measure(seat)
            await self.save()
            wait_s = max(_LOOK_AGAIN_S, min(next_at, learn_at) - self._now())
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(wait_s):  # wait_for would lose a cancellation that comes with the news
                    await self._news.wait()

    async def save(self) -> None:
        """Write what was learned since the last time."""
        news = self._learned.news()
        if news is not None:
            try:
                await asyncio.to_thread(self._learned.save, news)
            except (AgentError, OSError) as error:
                _log.warning("what models take of memory is not kept", reason=str(error))

    # Seats

    def need_of(self, digest: str, variant: VariantSpec) -> Need:
        """Return what a worker of the variant will take: as learned here, else as estimated."""
        known = self._learned.of(digest, variant.id)
        return variant.need if known is None else variant.need.learned(known)

    async def admit(self, seat: Seat, pool: Held) -> None:
        """See ``Seat.take``."""
        lodger = seat.lodger
        seat.variant, seat.need = pool.spec, self.need_of(lodger.digest, pool.spec)
        async with self._turn:
            while True:
                self._rooms = rooms = await asyncio.to_thread(self._meter.rooms)
                if pool.closed:
                    raise LoadError("the model was unloaded while it started")
                if not lodger.wanted():
                    raise OverloadedError("nobody waits for it any more")
                seats = list(self._seats)
                tenants = [self._tenant(other, asker=lodger) for other in seats]
                decided = plan(seat.need.times(pool.size), tenants, rooms, may_unload=lodger.may_unload)
                if decided.move is Move.LOAD:
                    seat.pool = pool
                    self._seats.append(seat)
                    return
                if decided.move is Move.NEVER:
                    raise OutOfMemoryError(decided.reason)
                if decided.move is Move.REFUSE or (decided.move is Move.WAIT and self._now() >= lodger.load_until):
                    raise _refusal(decided.reason)
                if decided.move is Move.WAIT:
                    self._blocked = True
                    try:
                        await asyncio.sleep(_LOOK_AGAIN_S)
                    finally:
                        self._blocked = False
                    continue
                leaving = [seats[position] for position in decided.unload]
                await self._make_room(leaving, f"room for {lodger.name}", replaced_by=lodger)
                if all(other in self._seats for other in leaving):  # they were asked something meanwhile
                    await asyncio.sleep(_LOOK_AGAIN_S)

    async def room_for_one(self, seat: Seat, pool: Held) -> str:
        """See ``Seat.room``."""
        if self._blocked:
            return "another model waits for memory"
        async with self._turn:
            rooms = await asyncio.to_thread(self._meter.rooms)
            tenants = [self._tenant(other, fewer=other is seat) for other in self._seats]
            decided = plan(seat.need, tenants, rooms, may_unload=False)
        return "" if decided.move is Move.LOAD else decided.reason

    def remove(self, seat: Seat) -> None:
        """See ``Seat.leave``."""
        if seat in self._seats:
            self._seats.remove(seat)

    async def measure(self, seat: Seat, pids: Sequence[int] = ()) -> None:
        """Learn what workers take, by default all of the seat's."""
        asked = list(pids) or (list(seat.pool.pids) if seat.pool is not None else [])
        seat.measured_at = self._now()
        uses = await asyncio.to_thread(lambda: [self._meter.worker(pid) for pid in asked])
        digest, variant = seat.lodger.digest, seat.variant
        for sizes in uses:
            self._learned.note(digest, variant.id, {kind_of(place): size for place, size in sizes.items()})
        seat.need = self.need_of(digest, variant)
        self._news.set()

    def look_again(self) -> None:
        """Something else than requests has changed who may be unloaded."""
        self._news.set()

    # Views

    async def look(self) -> dict[str, dict[str, int]]:
        """Return what models hold and may hold of each place, and what is free there (bytes)."""
        self._rooms = await asyncio.to_thread(self._meter.rooms)
        return self.account()

    def account(self) -> dict[str, dict[str, int]]:
        """Return the same as of the last look."""
        taken = held(self._tenant(seat) for seat in self._seats)
        return {
            place: {
                "held_bytes": taken.get(place, 0),
                "budget_bytes": room.budget_bytes,
                "available_bytes": room.available_bytes,
            }
            for place, room in self._rooms.items()
        }

    def holding(self, lodger: Lodger) -> dict[str, int]:
        """Return what a version holds now, by place (bytes)."""
        return held(self._tenant(seat) for seat in self._seats if seat.lodger is lodger)

    def tell_loaded(self, lodger: Lodger, cause: str, **data: Any) -> None:
        """A version has come into memory."""
        self._loads.add((lodger.model, cause))
        self._news.set()  # its keep-alive begins
        self._tell("model.loaded", lodger, cause=cause, **data)

    def tell_unloaded(self, lodger: Lodger, cause: str, reason: str) -> None:
        """A version has left memory and may be loaded again."""
        self._unloads.add((lodger.model, cause))
        self._tell("model.unloaded", lodger, cause=cause, reason=reason)

    # Inside

    def _tenant(self, seat: Seat, *, asker: Lodger | None = None, fewer: bool = False) -> Tenant:
        """Return a seat as decisions see it; ``fewer``: without the one worker that is being asked for."""
        lodger, pool = seat.lodger, seat.pool
        assert pool is not None
        sibling = asker is not None and lodger is not asker and _one_place(lodger, asker)
        # A version on trial takes the place of the one that serves, which in turn waits for how the trial begins.
        tried = sibling and asker is not None and bool(asker.held_by) and not lodger.held_by
        waits = sibling and asker is not None and not asker.held_by
        replaced = tried and not (seat.loading or pool.closed)
        staying = lodger.held_by or ("pinned" if lodger.keeping.pinned else "")
        if asker is not None and asker.held_by and not staying:  # it could not come back before that trial is over
            staying = self._spared(lodger, asker)
        kept = "" if replaced or waits or pool.closed else staying
        return Tenant(
            name=lodger.name,
            need=seat.need.times(pool.size - fewer),
            used_at=lodger.used_at,
            keep_alive_s=lodger.keeping.keep_alive_s,
            busy=waits or seat.loading or pool.closed or pool.in_use(self._now()),
            loading=seat.loading,
            kept=kept,
            replaced=replaced,
        )

    def _spared(self, lodger: Lodger, asker: Lodger) -> str:
        """Return why a version does not leave for one that is tried; empty if it may."""
        if lodger.model != asker.model:
            return "in use" if self._now() - lodger.asked_at < _IN_USE_S else ""
        return "the default" if asker.beside and not lodger.beside else ""

    async def _send_out_idle(self) -> float:
        """Unload what has been idle for its keep-alive; return when to look again (loop seconds)."""
        seats, now = list(self._seats), self._now()
        tenants = [self._tenant(seat) for seat in seats]
        due, next_at = expired(tenants, now)
        for position in due:
            seat = seats[position]
            await self._send_out(seat, "idle", f"idle for {seat.lodger.keeping.keep_alive_s:g} s")
        mortal = [tenant for tenant in tenants if tenant.busy and tenant.keep_alive_s < math.inf and not tenant.kept]
        return min([next_at, *(now + min(1.0, max(_LOOK_AGAIN_S, tenant.keep_alive_s)) for tenant in mortal)])

    async def _make_room(self, leaving: Sequence[Seat], reason: str, *, replaced_by: Lodger) -> None:
        before = self._rooms
        freed = held(self._tenant(seat) for seat in leaving if seat.need.source is Source.MEASURED)
        async with asyncio.TaskGroup() as group:
            for seat in leaving:
                busy_too = _one_place(seat.lodger, replaced_by)
                group.create_task(self._send_out(seat, "room", reason, busy_too=busy_too))
        give_up = self._now() + _RETURN_S
        devices = [place for place in freed if place != HOST and place in before]
        while devices and self._now() < give_up:
            rooms = await asyncio.to_thread(self._meter.rooms)
            if all(_returned(before[place], rooms.get(place), freed[place]) for place in devices):
                return
            await asyncio.sleep(_LOOK_AGAIN_S)

    async def _send_out(self, seat: Seat, cause: str, reason: str, *, busy_too: bool = False) -> None:
        """Unload one, unless somebody has asked it something meanwhile."""
        await self.measure(seat)
        pool = seat.pool
        if pool is None or pool.closed or (pool.in_use(self._now()) and not busy_too):
            return
        await seat.lodger.unload(cause, reason)

    def _tell(self, what: str, lodger: Lodger, **data: Any) -> None:
        _log.info(what, name=lodger.name, **data)
        now = self._now()
        if now - self._told_from >= _EVENTS_EVERY_S:
            self._told, self._told_from = 0, now
        self._told += 1
        if self._told <= _EVENTS_MAX:
            self._events.emit(Stream.HEALTH, what, model=lodger.model, version=lodger.version, **data)

    def _held(self) -> Iterable[tuple[tuple[str, ...], float]]:
        return [((place,), size["held_bytes"]) for place, size in self.account().items()]

    def _budgets(self) -> Iterable[tuple[tuple[str, ...], float]]:
        return [((place,), room.budget_bytes) for place, room in self._rooms.items()]

    def _each(self) -> Iterable[tuple[tuple[str, ...], float]]:
        sums: dict[tuple[str, ...], float] = {}
        for seat in self._seats:
            for place, size in self._tenant(seat).need.sizes.items():
                key = (seat.lodger.model, seat.lodger.version, place)
                sums[key] = sums.get(key, 0) + size
        return sums.items()


def _one_place(one: Lodger, other: Lodger) -> bool:
    """Whether one of them is to take the other's place."""
    return one.model == other.model and not (one.beside or other.beside)


def _refusal(reason: str) -> OverloadedError:
    error = OverloadedError(reason)
    error.retry_after_s = _RETRY_S
    return error


def _returned(before: Room, now: Room | None, freed: int) -> bool:
    return now is None or now.available_bytes >= before.available_bytes + _RETURNED * freed
