"""Who is in memory: estimates, the account of places, who leaves for whom."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.engine.memory import HOST, Move, Need, Room, Source, Tenant, estimate, expired, held, plan

pytestmark = pytest.mark.unit

MIB = 1 << 20
GPU = "cuda:0"


def need(host: int, gpu: int = 0, *, source: Source = Source.ESTIMATED) -> Need:
    return Need(sizes={HOST: host, GPU: gpu} if gpu else {HOST: host}, source=source)


def tenant(name: str, host: int, gpu: int = 0, **facts: Any) -> Tenant:
    return Tenant(name=name, need=need(host, gpu), **facts)


def rooms(budget: int, *, free: int = 1000, gpu: int = 100, gpu_free: int = 1000) -> dict[str, Room]:
    return {
        HOST: Room(budget_bytes=budget, available_bytes=free),
        GPU: Room(budget_bytes=gpu, available_bytes=gpu_free),
    }


@pytest.mark.parametrize(
    ("newcomer", "tenants", "space", "move", "unload"),
    [
        pytest.param(need(10), [], rooms(10), Move.LOAD, (), id="it fits alone"),
        pytest.param(need(11), [], rooms(10), Move.NEVER, (), id="more than models may take"),
        pytest.param(need(11, source=Source.MEASURED), [], rooms(10), Move.LOAD, (), id="it has run here, alone"),
        pytest.param(need(10), [], rooms(0), Move.LOAD, (), id="no budget"),
        pytest.param(need(10), [], rooms(0, free=9), Move.REFUSE, (), id="others than models hold the box's memory"),
        pytest.param(need(5), [tenant("a", 5)], rooms(10), Move.LOAD, (), id="both fit"),
        pytest.param(need(5), [tenant("a", 6)], rooms(10), Move.UNLOAD, (0,), id="one leaves"),
        pytest.param(
            need(5),
            [tenant("new", 5, used_at=2.0), tenant("old", 5, used_at=1.0)],
            rooms(10),
            Move.UNLOAD,
            (1,),
            id="the longest unused leaves",
        ),
        pytest.param(
            need(8),
            [tenant("small", 1, used_at=1.0), tenant("large", 9, used_at=2.0)],
            rooms(10),
            Move.UNLOAD,
            (1,),
            id="nobody leaves who does not matter",
        ),
        pytest.param(
            need(10),
            [tenant("a", 5, used_at=2.0), tenant("b", 5, used_at=1.0)],
            rooms(10),
            Move.UNLOAD,
            (1, 0),
            id="several leave",
        ),
        pytest.param(
            need(5),
            [tenant("old", 5, used_at=1.0, busy=True), tenant("new", 5, used_at=2.0)],
            rooms(10),
            Move.UNLOAD,
            (1,),
            id="what owes answers stays",
        ),
        pytest.param(need(6), [tenant("a", 5, busy=True)], rooms(10), Move.WAIT, (), id="waits for what owes answers"),
        pytest.param(need(6), [tenant("a", 5, kept="pinned")], rooms(10), Move.REFUSE, (), id="pinned"),
        pytest.param(
            need(6),
            [tenant("a", 5, kept="on trial"), tenant("b", 1)],
            rooms(10),
            Move.REFUSE,
            (),
            id="nothing leaves in vain",
        ),
        pytest.param(
            need(4),
            [tenant("a", 5, loading=True, busy=True)],
            rooms(0, free=8),
            Move.WAIT,
            (),
            id="what is being loaded does not show in what is free",
        ),
        pytest.param(
            need(5),
            [tenant("a v1", 9, used_at=1.0, busy=True, replaced=True)],
            rooms(10),
            Move.UNLOAD,
            (0,),
            id="the version it replaces leaves, busy or not",
        ),
        pytest.param(
            need(5),
            [tenant("a v1", 5, used_at=1.0, replaced=True), tenant("b", 5, used_at=2.0)],
            rooms(10),
            Move.UNLOAD,
            (1,),
            id="but only if nothing else helps",
        ),
        pytest.param(need(1, 60), [tenant("a", 1, 60)], rooms(100), Move.UNLOAD, (0,), id="the GPU is full"),
        pytest.param(need(1, 60), [tenant("a", 50)], rooms(100), Move.LOAD, (), id="host memory is another place"),
        pytest.param(
            need(60, 60),
            [tenant("host", 60, used_at=1.0), tenant("both", 1, 60, used_at=2.0), tenant("idle", 1, used_at=0.0)],
            rooms(100),
            Move.UNLOAD,
            (0, 1),
            id="two places are short",
        ),
        pytest.param(need(1, 60), [], rooms(100, gpu_free=50), Move.REFUSE, (), id="others use the GPU"),
        pytest.param(need(1, 101), [], rooms(100), Move.NEVER, (), id="too large for the GPU"),
    ],
)
def test_a_load_gets_its_room(
    newcomer: Need, tenants: list[Tenant], space: dict[str, Room], move: Move, unload: tuple[int, ...]
) -> None:
    decided = plan(newcomer, tenants, space, may_unload=True)
    assert (decided.move, decided.unload) == (move, unload)
    assert bool(decided.reason) == (move is not Move.LOAD)


def test_nothing_is_unloaded_for_what_may_not_ask_for_it() -> None:
    decided = plan(need(6), [tenant("a", 5)], rooms(10), may_unload=False)
    assert decided.move is Move.REFUSE


@pytest.mark.parametrize(
    ("size", "tenants", "free", "reason"),
    [
        (20 * MIB, [], 1 << 40, "it needs 20 MiB of memory, models may take 10"),
        (
            4 * MIB,
            [tenant("a 1.0.0", 8 * MIB, kept="pinned")],
            1 << 40,
            "models may take 10 MiB of memory, they hold 8, and 4 more are needed; not unloaded: a 1.0.0 (pinned)",
        ),
        (
            4 * MIB,
            [tenant("a 1.0.0", 8 * MIB, busy=True)],
            1 << 40,
            "models may take 10 MiB of memory, they hold 8, and 4 more are needed; in use: a 1.0.0",
        ),
        (
            4 * MIB,
            [],
            MIB,
            "4 MiB of memory are needed, 1 are free; not unloaded: nothing is loaded",
        ),
    ],
)
def test_a_refusal_says_what_is_missing_and_who_holds_it(
    size: int, tenants: list[Tenant], free: int, reason: str
) -> None:
    assert plan(need(size), tenants, rooms(10 * MIB, free=free), may_unload=True).reason == reason


tenants_strategy = st.lists(
    st.builds(
        tenant,
        st.just("m"),
        st.integers(0, 20),
        st.integers(0, 20),
        used_at=st.floats(0, 100),
        busy=st.booleans(),
        loading=st.booleans(),
        kept=st.sampled_from(["", "pinned"]),
    ).map(lambda one: replace(one, busy=one.busy or one.loading)),  # what is being loaded is busy
    max_size=12,
)


@given(
    newcomer=st.builds(need, st.integers(0, 30), st.integers(0, 30)),
    present=tenants_strategy,
    budget=st.integers(1, 60),
    free=st.integers(0, 60),
)
def test_what_leaves_is_idle_and_enough_and_not_too_much(
    newcomer: Need, present: list[Tenant], budget: int, free: int
) -> None:
    space = rooms(budget, free=free, gpu=budget)
    decided = plan(newcomer, present, space, may_unload=True)
    gone = [present[i] for i in decided.unload]
    assert not any(one.kept or one.busy for one in gone)
    if decided.move is Move.UNLOAD:
        stay = [one for i, one in enumerate(present) if i not in decided.unload]
        back = held(gone)
        later = {
            place: Room(budget_bytes=room.budget_bytes, available_bytes=room.available_bytes + back.get(place, 0))
            for place, room in space.items()
        }
        # What was promised to those that load is freed with them only on paper; none of them leaves.
        assert plan(newcomer, stay, later, may_unload=False).move is Move.LOAD
        for spared in gone:
            fewer = {
                place: Room(
                    budget_bytes=room.budget_bytes,
                    available_bytes=room.available_bytes - spared.need.sizes.get(place, 0),
                )
                for place, room in later.items()
            }
            assert plan(newcomer, [*stay, spared], fewer, may_unload=False).move is not Move.LOAD
    elif decided.move is Move.LOAD:
        taken = held(present)
        for place, size in newcomer.sizes.items():
            assert not size or taken.get(place, 0) + size <= budget


@pytest.mark.parametrize(
    ("facts", "due", "next_at"),
    [
        ({"used_at": 0.0, "keep_alive_s": 10.0}, (0,), math.inf),
        ({"used_at": 5.0, "keep_alive_s": 10.0}, (), 15.0),
        ({"used_at": 0.0, "keep_alive_s": 0.0}, (0,), math.inf),
        ({"used_at": 0.0}, (), math.inf),
        ({"used_at": 0.0, "keep_alive_s": 10.0, "busy": True}, (), math.inf),
        ({"used_at": 0.0, "keep_alive_s": 10.0, "kept": "pinned"}, (), math.inf),
    ],
)
def test_what_was_idle_for_its_keep_alive_leaves(facts: dict[str, Any], due: tuple[int, ...], next_at: float) -> None:
    assert expired([tenant("a", 1, **facts)], 10.0) == (due, next_at)


@pytest.mark.parametrize(
    ("facts", "sizes", "source"),
    [
        ({"host_mib": 100, "measured": True}, {HOST: 112}, Source.DECLARED),
        ({"host_mib": 100, "measured": False}, {HOST: 112}, Source.ESTIMATED),
        ({"host_mib": 0, "measured": True}, {HOST: 2 * 30 + 12}, Source.ESTIMATED),
        ({"host_mib": 0, "measured": False, "runtime": "torch"}, {HOST: 2 * 30 + 64}, Source.ESTIMATED),
        ({"place": GPU}, {HOST: 30 + 12 + 512, GPU: 2 * 30 + 512}, Source.ESTIMATED),
        ({"place": GPU, "device_mib": 200, "measured": True}, {HOST: 30 + 12 + 512, GPU: 712}, Source.DECLARED),
    ],
)
def test_a_need_is_estimated_from_the_manifest_and_the_files(
    facts: dict[str, Any], sizes: dict[str, int], source: Source
) -> None:
    known = {"runtime": "onnx", "place": HOST, "host_mib": 0, "device_mib": 0, "measured": False} | facts
    found = estimate(file_bytes=30 * MIB, **known)
    assert {place: size // MIB for place, size in found.sizes.items()} == sizes
    assert found.source is source


def test_a_gpu_that_shares_the_hosts_memory_takes_it_from_there() -> None:
    known: dict[str, Any] = {"runtime": "onnx", "file_bytes": 0, "host_mib": 100, "device_mib": 300, "measured": True}
    apart = estimate(place="cuda", **known)
    together = estimate(place="cuda", unified=True, **known)
    assert together.sizes == {HOST: sum(apart.sizes.values())}
    seen = together.learned({HOST: 50 * MIB})  # its process's figures do not show what the GPU took
    assert seen.sizes == {HOST: 50 * MIB + apart.sizes["cuda"]}
    assert (seen.source, apart.learned({HOST: 1, "cuda": 2}).source) == (Source.DECLARED, Source.MEASURED)
