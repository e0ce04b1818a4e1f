"""Seeded histories of a box under faults, what must hold in each of them, and how one that breaks it is made shorter.

A history is a list of plain steps drawn from its seed, so that it can be printed, shortened and run again. The
reconciler, the performers and the journal's SQL are the real ones; store, host, clock and disk are false.
"""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from agent.config import DeployConfig, WindowConfig
from agent.deploy.desired import Desired
from agent.deploy.plan import Plan
from agent.deploy.pointer import Pointer
from agent.deploy.ports import Bundle, Inventory, Kept, Mark, News, Progress
from agent.deploy.reconciler import Reconciler
from agent.deploy.rollout import Rollout
from agent.deploy.state import FINAL, TRANSITIONS_MAX, State
from agent.errors import (
    AgentError,
    BudgetError,
    ChunkMismatchError,
    DiskFullError,
    LoadError,
    OfflineError,
    OutOfMemoryError,
    OverloadedError,
    SelfTestError,
    TransientError,
    UntrustedError,
    WorkerDiedError,
)
from agent.events import EventBus
from tests.fakes.clock import FakeClock
from tests.fakes.deploy import FakeHost, FakeLoaded, FakeStore, digest_of
from tests.fakes.memory_disk import Disk, MemoryJournal, MemoryPointers, PowerCutError

SLOTS = ("alpha", "beta", "gamma")
VERSIONS = ("1.0.0", "2.0.0", "3.0.0", "4.0.0")
TEAM = "files"
CONFIG = DeployConfig(
    probation_s=2,
    probation_calls_min=3,
    probation_limit_s=20,
    fetch_retry_cap_s=5,
    fetch_limit_s=600,
    trial_retry_cap_s=60,
    wait_limit_s=3600,
    hold_limit_s=1800,
)
_WINDOW = WindowConfig(start="02:00", end="05:00", timezone="UTC")
_IN_WINDOW_S = 2.25 * 3600  # of a day
_DAY_S = 86_400.0
_BUILT_S = 1_700_000_000.0  # the clock is right if it is after this (Unix seconds)
BEHAVIOURS = ("good", "good", "good", "dies", "faulty", "unloadable", "wrong", "hungry", "hangs", "crowded")
_FLAGS = ("force", "canary", "shadow", "incompatible", "stage", "late", "at once", "soon")
_FETCH_ERRORS: dict[str, Callable[[], AgentError]] = {
    "offline": lambda: OfflineError("no route"),
    "transient": lambda: TransientError("cut"),
    "full": lambda: DiskFullError("no space"),
    "mismatch": lambda: ChunkMismatchError("wrong bytes"),
    "untrusted": lambda: UntrustedError("wrong signature"),
    "budget": lambda: BudgetError("used up", retry_after_s=30.0),
}
_STATE_DIR = Path("/nowhere")
_QUIET_S = 900.0  # virtual seconds between two looks at the end, and how many looks there are
_LOOKS = 12
_TURNS_MAX = 200_000  # of the loop in one wait: more is a loop without an end


class BrokenError(AssertionError):
    """What must always hold did not."""


class Step(NamedTuple):
    """One thing that happens. ``values`` are plain."""

    what: str
    values: tuple[Any, ...] = ()


@dataclass(frozen=True)
class History:
    """Steps, and how each version of each slot behaves."""

    seed: int
    behaviours: dict[tuple[str, str], str]
    windowed: bool  # new versions wait for the maintenance window
    steps: tuple[Step, ...]


def draw(seed: int) -> History:
    """Return the history of a seed."""
    rng = random.Random(seed)
    slots = SLOTS[: rng.choice((1, 1, 2, 3))]
    behaviours = {(slot, version): rng.choice(BEHAVIOURS) for slot in slots for version in VERSIONS}
    for slot in slots:
        behaviours[slot, VERSIONS[0]] = "good"
    steps = [_first(rng, slot) for slot in slots if rng.random() < 0.9]
    steps += [_draw_step(rng, slots) for _ in range(rng.randint(4, 14))]
    return History(seed, behaviours, rng.random() < 0.15, tuple(steps))


def _first(rng: random.Random, slot: str) -> Step:
    return Step("want", (slot, VERSIONS[0], rng.choice(("fleet", "pin")), (), rng.choice((4.0, 30.0))))


def _draw_step(rng: random.Random, slots: Sequence[str]) -> Step:
    slot, version = rng.choice(slots), rng.choice(VERSIONS)
    wait_s = rng.choice((0.0, 0.0, 0.05, 0.3, 1.0, 4.0, 30.0))
    what = rng.choices(
        (
            *("want", "rollback", "again", "lost", "unpin", "cancel", "cut", "kill", "stop", "store", "offline"),
            *("online", "change", "unlucky", "jump", "revoke", "damage", "full", "wait", "hold", "release", "window"),
        ),
        (30, 6, 6, 3, 4, 6, 22, 6, 5, 10, 4, 5, 5, 6, 5, 2, 1, 2, 8, 4, 4, 4),
    )[0]
    match what:
        case "want":
            flags = tuple(flag for flag in _FLAGS if rng.random() < 0.15)
            return Step("want", (slot, version, rng.choice(("fleet", "fleet", "pin")), flags, wait_s))
        case "cut":
            return Step("cut", (rng.randrange(14), rng.random() < 0.5, wait_s))
        case "store":
            return Step("store", (*rng.choices(tuple(_FETCH_ERRORS), k=rng.randint(1, 3)), wait_s))
        case "change":
            return Step("change", (slot, version, rng.choice(BEHAVIOURS), wait_s))
        case "unlucky":
            return Step("unlucky", (rng.randint(1, 3), wait_s))
        case "jump":
            return Step("jump", (rng.choice((-1e9, -86_400.0, -3600.0, 3600.0, 86_400.0, 1e9)), wait_s))
        case "full":
            return Step("full", (rng.randint(1, 4), wait_s))
        case "again" | "lost" | "offline" | "online" | "stop" | "kill" | "wait" | "window":
            return Step(what, (wait_s,))
        case "revoke" | "damage":
            return Step(what, (slot, version, wait_s))
        case _:
            return Step(what, (slot, wait_s))


def run(history: History) -> Counts:
    """Live through a history.

    Raises:
        BrokenError: what must always hold did not.
    """
    random.seed(history.seed)  # back-offs draw from it
    return asyncio.run(_live(history))


def shortened(history: History, fails: Callable[[History], bool]) -> History:
    """Return a history with no step that could be left out without its failure vanishing."""
    steps = list(history.steps)
    size = max(1, len(steps) // 2)
    while True:
        for start in range(0, len(steps), size):
            fewer = steps[:start] + steps[start + size :]
            if fails(replace(history, steps=tuple(fewer))):
                steps = fewer
                break
        else:
            if size == 1:
                return replace(history, steps=tuple(steps))
            size //= 2


def told(history: History) -> str:
    """Return a history for people, and how to repeat it."""
    bad = {f"{slot} {version}": how for (slot, version), how in history.behaviours.items() if how != "good"}
    lines = [f"  {step.what} {' '.join(map(str, step.values))}" for step in history.steps]
    return "\n".join([f"SEED={history.seed}", f"  not good: {bad}", *lines])


@dataclass
class Counts:
    """What happened in a history."""

    lives: int = 0
    wishes: int = 0
    ends: dict[str, int] = field(default_factory=dict)


class SimStore(FakeStore):
    """The fake store without a folder; what it has fetched is on the box's disk."""

    def __init__(self, world: World) -> None:
        super().__init__(_STATE_DIR, offered={slot: list(VERSIONS) for slot in SLOTS})
        self._world = world

    async def fetch(
        self,
        *,
        team: str,
        name: str,
        version: str,
        channel: str,
        on_progress: Callable[[Progress], None],
        medium: str = "",
    ) -> Bundle:
        await self._world.clock.sleep(0.01)
        self._maybe_fail(medium)
        offered = await self.resolve(team=team, name=name, version=version, channel=channel, medium=medium)
        on_progress(Progress(phase="resolved", version=offered.version, digest=offered.digest, bytes_total=100))
        await self._world.clock.sleep(0.05)
        self._maybe_fail(medium)
        on_progress(Progress(phase="progress", bytes_done=50, bytes_total=100))
        on_progress(Progress(phase="verifying"))
        await self._world.clock.sleep(0.01)
        disk = self._world.disk
        if not disk.dead:
            disk.versions.setdefault(name, set()).add(offered.version)
            disk.damaged.discard((name, offered.version))
        return self._bundle(self._path(team, name, offered.version))

    async def check(self, path: Path) -> Bundle:
        await self._world.clock.sleep(0.01)
        name, version = path.parent.name, path.name.partition("~")[0]
        disk = self._world.disk
        if version not in disk.versions.get(name, ()) or (name, version) in disk.damaged:
            raise UntrustedError(f"{name} {version} is not what was signed")
        return self._bundle(path)

    async def inventory(self) -> Inventory:
        found = [
            Kept(
                team=TEAM,
                name=name,
                version=version,
                digest=digest_of(name, version)[:12],
                seq=int(version[0]),
                path=self._path(TEAM, name, version),
                size_bytes=1,
            )
            for name, versions in self._world.disk.versions.items()
            for version in sorted(versions, reverse=True)
        ]
        return Inventory(versions=tuple(found))

    def _path(self, team: str, name: str, version: str) -> Path:
        return _STATE_DIR / "versions" / team / name / f"{version}~{digest_of(name, version)[:12]}"


class SimHost(FakeHost):
    """The fake host, which takes its time, fails as versions do, and says what may not be."""

    def __init__(self, world: World) -> None:
        super().__init__()
        self._world = world

    async def load(self, slot: str, bundle: Bundle) -> FakeLoaded:
        self._world.check_load(slot, bundle)
        await self._world.clock.sleep(0.05)
        how = self._world.behaviours.get((bundle.name, bundle.version), "good")
        if self._world.unlucky:
            self._world.unlucky -= 1
            how = "unloadable"
        if how == "hangs":
            await self._world.clock.sleep(60.0)
        if how in ("unloadable", "hangs"):
            raise LoadError("no variant loads")
        if how == "wrong":
            raise SelfTestError("a golden output differs")
        if how == "hungry":
            raise OutOfMemoryError("no memory")
        if how == "crowded":
            raise OverloadedError("no room now")
        loaded = SimLoaded(self, bundle)
        loaded.behaves = how
        self.loaded.append(loaded)
        return loaded

    async def retire(self, loaded: FakeLoaded) -> None:
        self._world.check_retire(self, loaded)
        await super().retire(loaded)


@dataclass
class SimLoaded(FakeLoaded):
    """A version that also meets requests; a bad one dies of them or answers wrongly."""

    behaves: str = "good"

    async def self_test(self) -> None:
        await asyncio.sleep(0)
        if self.behaves == "dies":
            self.deaths += 1
            raise WorkerDiedError("died")
        if self.behaves == "faulty":
            self.faults += 1
            raise WorkerDiedError("faulty")
        self.good += 1


class SimReconciler(Reconciler):
    """The reconciler over pointers in memory."""

    def __init__(self, config: DeployConfig, pointers: MemoryPointers, **options: Any) -> None:
        super().__init__(config, **options)
        self._pointers = pointers


class World:
    """A box through all its lives, and everything that must hold."""

    def __init__(self, history: History) -> None:
        self.history = history
        self.behaviours = dict(history.behaviours)
        self.clock = FakeClock()
        self.disk = Disk(self._pointed)
        self.store = SimStore(self)
        self.host = SimHost(self)
        self.unlucky = 0
        self.accepted: dict[str, Desired] = {}  # wishes that were made durable
        self.ended: dict[str, str] = {}  # reported ends by deployment
        self.trusted: dict[str, set[str]] = {slot: set() for slot in SLOTS}  # digests that were ever confirmed
        self.taking_place: set[str] = set()  # slots whose version on trial took the place of one that served
        self.revoked: set[str] = set()
        self.excused: set[str] = set()  # slots that lost a version on disk
        self.violations: list[str] = []
        self.counts = Counts()
        self._number = 0
        self._tokens: list[str] = []  # of applications' holds
        self._config = msgspec.structs.replace(CONFIG, windows=(_WINDOW,)) if history.windowed else CONFIG
        self._life: asyncio.Task[None] | None = None

    # Lives

    async def start(self) -> None:
        """Begin a life."""
        self.counts.lives += 1
        self.disk.restart()
        self.host = SimHost(self)
        self.journal = MemoryJournal(self.disk)
        bus = EventBus(self.clock, keep=1)
        bus._listeners.append(self._heard)  # for the rest of this life
        self.reconciler = SimReconciler(
            self._config,
            MemoryPointers(self.disk),
            clock_trusted=lambda: self.clock.wall() > _BUILT_S,
            store=self.store,
            host=self.host,
            journal=self.journal,
            events=bus,
            clock=self.clock,
            state_dir=_STATE_DIR,
            configured=(),
            poll_interval_s=0,
        )
        await self.reconciler.open()
        self._life = asyncio.ensure_future(self.reconciler.run())

    async def end(self, *, orderly: bool) -> None:
        """End a life: in order, or as a kill does."""
        life, self._life = self._life, None
        if life is None:
            return
        if not orderly:
            self.disk.dead = True
        life.cancel()
        await asyncio.wait({life})
        if not life.cancelled() and (error := life.exception()) is not None and not _is_cut(error):
            raise BrokenError(f"the reconciler failed: {error!r}") from error
        if orderly:
            self.reconciler.stopped()

    async def settle(self, wait_s: float) -> None:
        """Let time pass; a box that lost its power starts again."""
        until = self.clock.monotonic() + wait_s
        while True:
            await self.clock.sleep(max(0.0, until - self.clock.monotonic()))
            if self.violations:
                raise BrokenError("; ".join(self.violations))
            if self._life is None or not self._life.done():
                return
            await self._again()

    async def _again(self) -> None:
        life = self._life
        assert life is not None
        error = life.exception()
        if error is not None and not _is_cut(error):
            raise BrokenError(f"the reconciler failed: {error!r}") from error
        await self.end(orderly=False)
        await self.start()

    # Steps

    async def take(self, step: Step) -> None:
        """Let one thing happen, then some time pass."""
        *values, wait_s = step.values
        try:
            await getattr(self, f"_do_{step.what}")(*values)
        except PowerCutError:
            await self.end(orderly=False)
            await self.start()
        except AgentError:
            pass  # refused, and whoever asked was told
        await self.settle(wait_s)

    async def _do_want(self, slot: str, version: str, source: str, flags: Sequence[str]) -> None:
        rollout = None
        if {"canary", "shadow"} & set(flags):
            rollout = Rollout(
                canary=(10.0, 50.0) if "canary" in flags else (),
                shadow=0.0,
                step_s=1.0,
                calls_min=1,
                limit_s=10.0,
            )
        plan = Plan(
            stage_only="stage" in flags,
            ignore_window="at once" in flags,
            force_after_s=20.0 if "soon" in flags else None,
            not_after=self.clock.wall() + 5.0 if "late" in flags else None,
            allow_incompatible="incompatible" in flags,
            rollout=rollout,
        )
        await self._want(
            Desired(
                id=self._new_id(),
                slot=slot,
                team=TEAM,
                version=version,
                source=source,
                force="force" in flags,
                plan=plan,
            )
        )

    async def _do_rollback(self, slot: str) -> None:
        team, version = self.reconciler.previous_version(slot)
        await self._want(Desired(id=self._new_id(), slot=slot, team=team, version=version, source="pin", local=True))

    async def _do_again(self) -> None:
        """A command comes a second time."""
        if self.accepted:
            await self._want(list(self.accepted.values())[-1])

    async def _do_lost(self) -> None:
        self._new_id()  # the command that carried it never came

    async def _do_unpin(self, slot: str) -> None:
        await self.reconciler.unpin(slot)

    async def _do_cancel(self, slot: str) -> None:
        await self.reconciler.cancel(slot)

    async def _do_cut(self, writes: int, after: bool) -> None:
        self.disk.writes_left, self.disk.after = writes, after

    async def _do_kill(self) -> None:
        await self.end(orderly=False)
        await self.start()

    async def _do_stop(self) -> None:
        await self.end(orderly=True)
        await self.start()

    async def _do_store(self, *errors: str) -> None:
        self.store.fetch_errors = [_FETCH_ERRORS[error]() for error in errors]

    async def _do_offline(self) -> None:
        self.store.offline = True

    async def _do_online(self) -> None:
        self.store.offline = False

    async def _do_change(self, slot: str, version: str, how: str) -> None:
        self.behaviours[slot, version] = how

    async def _do_unlucky(self, loads: int) -> None:
        self.unlucky = loads

    async def _do_jump(self, seconds: float) -> None:
        self.clock.jump_wall(seconds)

    async def _do_window(self) -> None:
        """The maintenance window opens."""
        self.clock.jump_wall((_IN_WINDOW_S - self.clock.wall()) % _DAY_S)

    async def _do_hold(self, slot: str) -> None:
        self._tokens.append(self.reconciler.holds.take(slot, "an application"))

    async def _do_release(self, slot: str) -> None:
        while self._tokens:
            self.reconciler.holds.drop(self._tokens.pop())

    async def _do_full(self, writes: int) -> None:
        self.disk.full = writes

    async def _do_wait(self) -> None:
        pass

    async def _do_damage(self, slot: str, version: str) -> None:
        if version in self.disk.versions.get(slot, ()):
            self.disk.damaged.add((slot, version))
            self.excused.add(slot)

    async def _do_revoke(self, slot: str, version: str) -> None:
        digest = digest_of(slot, version)
        mark = Mark(version=version, digest=digest, reason="bad")
        self.excused.add(slot)
        news = News(team=TEAM, name=slot, channels={}, newest=None, revoked=(mark,), deprecated=())
        try:
            await self.reconciler.absorb([news])
        finally:
            if self.disk.database.execute("SELECT digest FROM revoked WHERE digest = ?", (digest,)).fetchone():
                self.revoked.add(digest)

    async def _want(self, wish: Desired) -> None:
        try:
            await self.reconciler.want(wish)
        finally:
            if self._durable(wish):
                self._accept(wish)

    def _durable(self, wish: Desired) -> bool:
        rows = self.disk.database.execute("SELECT row FROM desired WHERE slot = ?", (wish.slot,)).fetchall()
        return any(json.loads(row)["id"] == wish.id for (row,) in rows)

    def _accept(self, wish: Desired) -> None:
        if wish.id not in self.accepted:
            self.counts.wishes += 1
        self.accepted.pop(wish.id, None)
        self.accepted[wish.id] = wish

    def _new_id(self) -> str:
        self._number += 1
        return f"w{self._number}"

    # What must hold

    def _heard(self, event: Any) -> None:
        if event.stream != "deploy" or "state" not in event.data:
            return
        state, deployment = event.data["state"], event.data["id"]
        if event.data.get("step", 0) > TRANSITIONS_MAX:
            self.violations.append(f"{deployment}: {event.data['step']} transitions")
        if State(state) in FINAL:
            self.ended[deployment] = state

    def _pointed(self, before: Pointer | None, after: Pointer | None) -> None:
        slot = (after or before).slot  # type: ignore[union-attr]
        trusted = self.trusted[slot]
        tried = before.active if before is not None and before.trial else None
        if after is not None and not after.trial and after.active == tried:
            trusted.add(after.active.digest)
        if after is None or not after.trial:
            self.taking_place.discard(slot)
        elif slot in self.host.active and tried != after.active:  # a model that serves nothing waits for nobody
            if self.taking_place - {slot}:
                self.violations.append(f"{slot} and {', '.join(self.taking_place)} are on trial at once")
            self.taking_place.add(slot)
        confirmed = after.confirmed if after is not None else None
        if confirmed is not None and confirmed.digest not in trusted:
            self.violations.append(f"{slot}: {confirmed.version} is called confirmed and never was")
        if confirmed is None and trusted and slot not in self.excused:
            self.violations.append(f"{slot}: no confirmed version is named any more ({before} -> {after})")

    def check_load(self, slot: str, bundle: Bundle) -> None:
        """Say if what is loaded may not be."""
        if self.disk.dead:
            return
        name, version = bundle.name, bundle.version
        if version not in self.disk.versions.get(name, ()):
            self.violations.append(f"{slot}: {version} was never verified and is loaded")
        if bundle.digest in self.revoked:
            self.violations.append(f"{slot}: {version} was revoked and is loaded")
        reason = self.disk.database.execute(
            "SELECT reason FROM failed WHERE model = ? AND digest = ?", (slot, bundle.digest)
        ).fetchone()
        forced = any(wish.force and (wish.slot, wish.version) == (slot, version) for wish in self.accepted.values())
        if reason and not forced:
            self.violations.append(f"{slot}: {version} is in quarantine ({reason[0]}) and is loaded")

    def check_retire(self, host: SimHost, loaded: FakeLoaded) -> None:
        """Say if a slot that has a confirmed version is left without any."""
        slot, digest = loaded.bundle.name, loaded.bundle.digest
        left = host is self.host and not self.disk.dead and host.active.get(slot) is loaded
        if left and digest in self.trusted[slot] - self.revoked and slot not in self.excused:
            self.violations.append(f"{slot}: {loaded.bundle.version} leaves and nothing takes its place")

    async def check_end(self) -> None:
        """Let all faults end, wait, and say what is not as it must be."""
        self.store.offline, self.store.fetch_errors, self.unlucky = False, [], 0
        self.disk.full, self.disk.writes_left = 0, None
        self.clock.jump_wall(max(0.0, _BUILT_S + _DAY_S - self.clock.wall()))
        await self._do_window()
        await self._do_release("")
        for _ in range(_LOOKS):
            await self.settle(_QUIET_S)
            if not (wrong := [*await self._unended(), *await self._unserved()]):
                break
        else:
            raise BrokenError("; ".join(wrong))
        for state in self.ended.values():
            self.counts.ends[state] = self.counts.ends.get(state, 0) + 1

    def _loads(self, pointer: Pointer) -> bool:
        return self.behaviours[pointer.slot, pointer.active.version] in ("good", "dies", "faulty")

    async def _unended(self) -> list[str]:
        """Return the wishes that have not ended, or whose end nobody heard of."""
        found = []
        for wish in self.accepted.values():
            record = await self.journal.get(wish.id)
            about = f"{wish.id}, {wish.slot} {wish.version}"
            if record is None or record.state not in FINAL:
                found.append(f"{about} does not end: {record.state if record else 'never begun'}")
            elif wish.id not in self.ended:
                found.append(f"{about} is {record.state}, and nobody was told")
        return found

    async def _unserved(self) -> list[str]:
        """Return the slots that do not serve what their pointers name, or are left on trial."""
        found = []
        for slot, pointer in self.disk.pointers.items():
            serving, version = self.host.active.get(slot), pointer.active.version
            if pointer.trial and pointer.previous is not None:
                found.append(f"{slot}: {version} is left on trial")
            if serving is None and slot not in self.excused and self._loads(pointer):
                found.append(f"{slot}: {version} is named and does not serve")
            other = serving is not None and serving.bundle.digest != pointer.active.digest
            if other and State.INCONSISTENT not in self.ended.values():  # that was told, and says it
                found.append(f"{slot}: {version} is named and another serves")
        return found


async def _live(history: History) -> Counts:
    world = World(history)
    await world.start()
    try:
        for step in history.steps:
            await world.take(step)
        await world.check_end()
    finally:
        life = world._life
        if life is not None:
            life.cancel()
            await asyncio.wait({life})
    return world.counts


def _is_cut(error: BaseException) -> bool:
    if isinstance(error, BaseExceptionGroup):
        return all(_is_cut(inner) for inner in error.exceptions)
    return isinstance(error, PowerCutError)
