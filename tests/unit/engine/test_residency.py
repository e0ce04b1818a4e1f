"""Waiting for memory: with pools and versions that exist in name only."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field

import pytest

from agent.clock import SystemClock
from agent.engine.learned import Learned
from agent.engine.memory import HOST, Need, Room
from agent.engine.residency import Residency, Seat
from agent.engine.types import Keeping, VariantSpec
from agent.errors import LoadError, OverloadedError
from agent.events import EventBus
from agent.metrics import Metrics

pytestmark = pytest.mark.unit

GPU = "cuda:0"


@dataclass
class FakePool:
    """One worker."""

    spec: VariantSpec
    size: int = 1
    closed: bool = False
    busy: bool = False
    pids: list[int] = field(default_factory=lambda: [7])

    def in_use(self, _now: float) -> bool:
        return self.busy


@dataclass(eq=False)
class FakeLodger:
    """A version whose unloading takes a turn of the loop."""

    model: str
    keeping: Keeping = field(default_factory=Keeping)
    version: str = "1.0.0"
    digest: str = "d"
    beside: int = 0
    held_by: str = ""
    used_at: float = 0.0
    may_unload: bool = True
    load_until: float = 1e9
    waiting: bool = True
    seat: Seat | None = None
    on_gone: Callable[[], None] = lambda: None

    @property
    def name(self) -> str:
        return f"{self.model} {self.version}"

    def wanted(self) -> bool:
        return self.waiting

    async def unload(self, _cause: str, _reason: str) -> None:
        assert self.seat is not None
        await asyncio.sleep(0)
        self.seat.leave()
        self.on_gone()


class FakeMeter:
    """Two places; workers take what they were said to."""

    def __init__(self) -> None:
        self.free = {HOST: 1000, GPU: 100}
        self.looks = 0

    def rooms(self) -> Mapping[str, Room]:
        self.looks += 1
        return {
            HOST: Room(budget_bytes=100, available_bytes=self.free[HOST]),
            GPU: Room(budget_bytes=100, available_bytes=self.free[GPU]),
        }

    def worker(self, _pid: int) -> Mapping[str, int]:
        return {HOST: 60, GPU: 60}


@dataclass
class World:
    meter: FakeMeter
    residency: Residency
    events: EventBus

    async def enter(self, lodger: FakeLodger, *, host: int = 60, gpu: int = 0) -> FakePool:
        sizes = {HOST: host, GPU: gpu} if gpu else {HOST: host}
        spec = VariantSpec(
            id=lodger.model, runtime="onnx", precision="fp32", device="cpu", worker={}, need=Need(sizes=sizes)
        )
        lodger.seat, pool = Seat(self.residency, lodger, spec), FakePool(spec)
        await lodger.seat.take(pool)
        lodger.seat.settle()
        return pool


def run(story: Callable[[World], Awaitable[None]]) -> None:
    async def main() -> None:
        meter, events = FakeMeter(), EventBus(SystemClock())
        now = asyncio.get_running_loop().time
        residency = Residency(meter, Learned(None, ""), now=now, events=events, metrics=Metrics())
        async with asyncio.timeout(90):
            await story(World(meter, residency, events))

    asyncio.run(main())


def test_device_memory_that_comes_back_late_is_waited_for_and_nobody_else_leaves() -> None:
    async def story(world: World) -> None:
        first, second, third = (FakeLodger(name, used_at=number) for number, name in enumerate("abc"))
        await world.enter(first, host=10, gpu=60)
        await first.seat.measure(7)
        world.meter.free[GPU] = 40
        await world.enter(second, host=10, gpu=10)
        world.meter.free[GPU] = 30
        looks = world.meter.looks
        entering = asyncio.ensure_future(world.enter(third, host=10, gpu=60))
        while world.meter.looks < looks + 5:  # the first is gone, its memory is not seen yet
            await asyncio.sleep(0.001)
        assert not entering.done()
        world.meter.free[GPU] = 90
        await entering
        assert set(world.residency.holding(second)) == {HOST, GPU}

    run(story)


def test_who_waits_is_let_in_when_the_other_is_idle_and_in_the_order_asked() -> None:
    async def story(world: World) -> None:
        busy = FakeLodger("a")
        pool = await world.enter(busy)
        pool.busy = True
        order: list[str] = []

        async def enter(name: str) -> None:
            await world.enter(FakeLodger(name, used_at=1.0))
            order.append(name)

        waiting = [asyncio.ensure_future(enter(name)) for name in "bcd"]
        looks = world.meter.looks
        while world.meter.looks < looks + 3:
            await asyncio.sleep(0.001)
        assert order == []
        pool.busy = False
        await asyncio.gather(*waiting)
        assert order == ["b", "c", "d"]

    run(story)


def test_nobody_is_unloaded_for_a_load_that_nobody_waits_for() -> None:
    async def story(world: World) -> None:
        pool = await world.enter(FakeLodger("a"))
        pool.busy = True
        late = FakeLodger("b")
        entering = asyncio.ensure_future(world.enter(late))
        await asyncio.sleep(0.05)
        late.waiting = pool.busy = False
        with pytest.raises(OverloadedError, match="nobody waits"):
            await entering
        assert world.residency.account()[HOST]["held_bytes"] == 60

    run(story)


def test_a_load_that_was_closed_while_it_waited_ends() -> None:
    async def story(world: World) -> None:
        (await world.enter(FakeLodger("a"))).busy = True
        lodger = FakeLodger("b")
        spec = VariantSpec(
            id="b", runtime="onnx", precision="fp32", device="cpu", worker={}, need=Need(sizes={HOST: 60})
        )
        pool = FakePool(spec)
        entering = asyncio.ensure_future(Seat(world.residency, lodger, spec).take(pool))
        await asyncio.sleep(0.05)
        pool.closed = True
        with pytest.raises(LoadError):
            await entering

    run(story)


def test_models_that_come_and_go_do_not_flood_the_events() -> None:
    async def story(world: World) -> None:
        lodger = FakeLodger("a")
        for _ in range(200):
            world.residency.tell_loaded(lodger, "request")
        assert len(world.events.recent()) == 30

    run(story)
