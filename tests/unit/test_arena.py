"""Slots and regions: held as long as somebody needs them, given back once, within their bounds."""

from __future__ import annotations

import asyncio
import fcntl
import os
from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agent.arena import Arena, ArenaKeeper, slot_of
from agent.errors import OverloadedError
from agent.regions import Region, RegionTable
from tests.fakes.clock import FakeClock

pytestmark = pytest.mark.unit

KIB = 1024


class User:
    """Remembers what it was told."""

    def __init__(self) -> None:
        self.gone: list[int] = []

    def region_gone(self, region: Region) -> None:
        self.gone.append(region.number)


@pytest.fixture
def arena() -> Iterator[Arena]:
    made = Arena(bytes_max=1024 * KIB, idle_bytes_max=512 * KIB)
    yield made
    assert made.held_bytes == made.idle_bytes


def test_a_slot_is_used_again_by_the_same_model_only(arena: Arena) -> None:
    first = arena.take("a", 100 * KIB)
    assert first is not None
    first.release()
    other = arena.take("b", 100 * KIB)
    assert other is not first
    again = arena.take("a", 128 * KIB)
    assert again is first
    for slot in (other, again):
        assert slot is not None
        slot.release()


def test_a_lease_and_its_slices_hold_the_slot(arena: Arena) -> None:
    slot = arena.take("a", 100)
    assert slot is not None
    lease = slot.lease(100)
    slot.release()
    lease[:5] = b"hello"
    part = lease[1:3]
    assert slot_of(lease) is slot_of(part) is slot
    del lease
    assert arena.idle_bytes == 0
    del part
    assert arena.idle_bytes == arena.held_bytes == 128 * KIB


def test_running_out_is_an_answer_and_idle_slots_make_room(arena: Arena) -> None:
    held = [arena.take("a", 256 * KIB) for _ in range(4)]
    assert arena.take("a", 1) is None
    user = User()
    for slot in held[:2]:
        assert slot is not None
        slot.users.add(user)
        slot.release()
    bigger = arena.take("b", 512 * KIB)
    assert bigger is not None
    assert len(user.gone) == 2
    for slot in (*held[2:], bigger):
        assert slot is not None
        slot.release()


def test_no_more_is_kept_than_allowed(arena: Arena) -> None:
    before = len(os.listdir("/proc/self/fd"))
    slots = [arena.take("a", 256 * KIB) for _ in range(4)]
    for slot in slots:
        assert slot is not None
        slot.release()
    assert arena.idle_bytes == 512 * KIB
    del slot, slots
    assert len(os.listdir("/proc/self/fd")) == before + 4  # a slot has two


def test_a_sweep_gives_back_what_was_not_used_since_the_last_one(arena: Arena) -> None:
    slots = [arena.take("a", 256 * KIB) for _ in range(2)]
    user = User()
    for slot in slots:
        assert slot is not None
        slot.users.add(user)
        slot.release()
    arena.sweep()
    assert arena.idle_bytes == 512 * KIB
    used = arena.take("a", 256 * KIB)
    assert used is slots[1]
    arena.sweep()  # one is in use, the other one goes
    assert slots[0] is not None
    assert (user.gone, arena.held_bytes, arena.idle_bytes) == ([slots[0].number], 256 * KIB, 0)
    used.release()
    arena.sweep()
    assert arena.idle_bytes == 256 * KIB
    arena.sweep()
    assert arena.held_bytes == 0


def test_the_keeper_sweeps_in_its_rhythm(arena: Arena) -> None:
    async def story() -> None:
        clock = FakeClock()
        slot = arena.take("a", 1)
        assert slot is not None
        slot.release()
        running = asyncio.ensure_future(ArenaKeeper(arena, clock=clock, idle_s=10.0).run())
        while arena.held_bytes:
            await asyncio.sleep(0)
        running.cancel()
        assert clock.monotonic() == 20.0

    asyncio.run(story())


def test_no_arena_has_no_slots() -> None:
    assert Arena(bytes_max=0, idle_bytes_max=0).take("a", 1) is None


@settings(deadline=None, max_examples=60)
@given(st.lists(st.tuples(st.sampled_from("abc"), st.integers(1, 600 * KIB), st.booleans()), max_size=40))
def test_the_bounds_hold_for_any_use(steps: list[tuple[str, int, bool]]) -> None:
    arena = Arena(bytes_max=1024 * KIB, idle_bytes_max=512 * KIB)
    leases: list[memoryview] = []
    for model, nbytes, drop in steps:
        slot = arena.take(model, nbytes)
        if slot is not None:
            assert slot.model == model
            leases.append(slot.lease(nbytes))
            leases[-1][0] = leases[-1][-1] = 1
            slot.release()
        if drop and leases:
            del leases[len(leases) // 2]
        assert arena.held_bytes <= 1024 * KIB
        assert arena.idle_bytes <= 512 * KIB
    slot = None
    leases.clear()
    assert arena.held_bytes == arena.idle_bytes


def sealed(nbytes: int) -> int:
    descriptor = os.memfd_create("test", os.MFD_ALLOW_SEALING)
    os.ftruncate(descriptor, nbytes)
    fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW)
    return descriptor


def test_a_region_lives_until_its_last_holder_lets_go() -> None:
    table = RegionTable(count_max=2, bytes_max=8192)
    region, user = table.adopt(sealed(4096), 4096), User()
    region.users.add(user)
    region.hold()
    region.release()
    assert (table.count, table.held_bytes, user.gone) == (1, 4096, [])
    region.release()
    assert (table.count, table.held_bytes, user.gone) == (0, 0, [region.number])
    assert region.descriptor == -1


def test_what_is_over_the_bounds_is_closed() -> None:
    before = len(os.listdir("/proc/self/fd"))
    table = RegionTable(count_max=2, bytes_max=8192)
    held = [table.adopt(sealed(4096), 4096)]
    with pytest.raises(OverloadedError, match="8192 bytes"):
        table.adopt(sealed(8192), 8192)
    held.append(table.adopt(sealed(4096), 4096))
    with pytest.raises(OverloadedError, match="2 regions"):
        table.adopt(sealed(1), 1)
    for region in held:
        region.release()
    assert len(os.listdir("/proc/self/fd")) == before
