"""Compare what is wanted with what serves, slot by slot, and act on the difference.

Levels, not edges: a command only records a wish and hints to look now. Each slot has one task; wishes, pointer and
journal decide its next action (``desired.decide``), the performer carries it out. Nothing here needs the network to
keep serving what serves.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Collection, Iterable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Final

from agent.backoff import Backoff
from agent.clock import Clock, wait_up_to
from agent.config import DeployConfig
from agent.deploy.desired import REVOCATION, STAGING, TRANSIENT, Action, Desired, Ending, decide, may_pass, serves
from agent.deploy.gates import Situation
from agent.deploy.holds import EVERY_MODEL, Holds
from agent.deploy.journal import Journal
from agent.deploy.lane import Lane
from agent.deploy.means import Means
from agent.deploy.performer import Performer
from agent.deploy.pointer import Pointer, Pointers
from agent.deploy.ports import Host, Kept, Mark, News, Store
from agent.deploy.refusals import Refusals
from agent.deploy.removal import Removals, leaving
from agent.deploy.retention import Retention
from agent.deploy.revocation import Measure, OnRevoked, Revoked
from agent.deploy.revocations import Revocations, fall_back_id
from agent.deploy.slots import model_of, slot_of, version_beside
from agent.deploy.stager import Stager
from agent.deploy.state import BEFORE_CUTOVER, FINAL, TRIAL, WAITING, Event, Record, State, staging_lane
from agent.deploy.steps import Steps
from agent.deploy.unmet import unmet
from agent.deploy.wishes import Wishes
from agent.errors import AgentError, BundleError, CommandError, NotFoundError, PolicyError
from agent.events import EventBus, Severity, Stream
from agent.log import get_logger

_log = get_logger("deploy")
_REVIVE_S: Final = 30.0
_FIRST_POLL_S: Final = 60.0  # for a model that has nothing to serve yet, or whose trouble may have passed

_HELD: Final = frozenset({Action.RESUME, Action.NOTHING, Action.POLL})  # none ends a hold
_GATED: Final = frozenset({State.QUEUED, State.WAITING_WINDOW})
_PAST_GATE: Final = TRIAL | {State.LOADING, State.CANARY}
_RESTING: Final = FINAL | {State.PROBATION}


class Offer:
    """A version that a medium holds for one slot; ``begun`` becomes the id of its deployment."""

    def __init__(self, *, version: str, digest: str, medium: str) -> None:
        self.version = version
        self.digest = digest
        self.medium = medium
        self.begun: asyncio.Future[str] = asyncio.get_running_loop().create_future()

    def begin(self, deployment_id: str) -> None:
        """Tell whoever waits that the deployment is recorded."""
        if not self.begun.done():
            self.begun.set_result(deployment_id)


class Reconciler:
    """All slots of this box. Call ``open`` once, then keep ``run`` supervised."""

    name = "deploy.reconciler"

    def __init__(
        self,
        config: DeployConfig,
        *,
        store: Store,
        host: Host,
        journal: Journal,
        events: EventBus,
        clock: Clock,
        state_dir: Path,
        configured: Iterable[Desired],
        poll_interval_s: float,
        refusals: Refusals | None = None,
        clock_trusted: Callable[[], bool] = lambda: True,
        clock_quality: Callable[[], str] = lambda: "",
        boot_id: str = "",
        on_revoked: OnRevoked = "fallback",
    ) -> None:
        self._config = config
        self._store = store
        self._host = host
        self._journal = journal
        self._events = events
        self._clock = clock
        self._state_dir = state_dir
        self._poll_interval_s = poll_interval_s
        self._refusals = refusals or Refusals(events, clock)
        self._pointers = Pointers(state_dir / "active")
        self._performers: dict[str, Performer] = {}
        self._stagers: dict[str, Stager] = {}
        self._lanes: dict[str, Lane] = {}  # both, by lane
        self._prepared: dict[str, Record] = {}  # by slot: on disk as asked, and not loaded yet
        self._clock_trusted = clock_trusted
        self._clock_quality = clock_quality
        self._boot_id = boot_id
        self._wishes = Wishes(journal, configured, lambda: clock.wall() if clock_trusted() else None)
        self._under_way: dict[str, Record] = {}  # by slot: deployments that have not ended
        self._ended: dict[str, Record] = {}  # by slot: the newest that has
        self.holds = Holds(config, clock, changed=self._nudge)
        self._hints: dict[str, asyncio.Event] = {}
        self._current: dict[str, Record] = {}  # newest record by deployment id, while this process knows it
        self._change: asyncio.Future[None] | None = None
        self._new_slot = asyncio.Event()
        self._running: set[str] = set()  # slots that have a task
        self._unfinished: set[str] = set()  # slots of which a deployment was under way when this process began
        self._unfinished_staging: set[str] = set()  # the same of what is only prepared
        self._to_boot: dict[str, Pointer] = {}
        self._held = ""  # why nothing may serve
        self._offers: dict[str, Offer] = {}
        self._stepped_back: dict[str, str] = {}  # digests of older versions that were told, by slot
        self._removals = Removals(journal, self._pointers, events)
        self.revocations = Revocations(journal, state_dir / "revoked.json", events, on_revoked)
        self.retention = Retention(
            store=store,
            journal=journal,
            state_dir=state_dir,
            slots=self._lanes,
            wishes=lambda: self._wishes.strongest,
            revoked=self.revocations.all,
            staged=lambda: {staging_lane(slot) for slot in self._wishes.staged},
        )
        self._means = Means(
            config=config,
            store=store,
            journal=journal,
            events=events,
            refusals=self._refusals,
            clock=clock,
            state_dir=state_dir,
            ending=self._ending,
            situation=self._situation,
            revoked=self.revocations.forbidden,
            make_room=self.retention.make_room,
            make_steps=self._steps,
        )
        self.booted = asyncio.Event()  # every model whose pointer was found serves its default, or could not be made to

    async def open(self) -> None:
        """Read what is on disk: journal, pointers, wishes. No network, no clock."""
        try:
            trouble = await self._journal.open()
        except AgentError as error:  # a full disk: what serves must serve; slots try again until there is room
            trouble = str(error)
        if trouble:
            _log.error("journal cannot be used as it is", reason=trouble)
            self._events.emit(Stream.HEALTH, "journal.broken", Severity.ERROR, reason=trouble)
        pointers, broken = self._pointers.all()
        for reason in broken:
            _log.error("pointer set aside", reason=reason)
            self._events.emit(Stream.HEALTH, "pointer.broken", Severity.ERROR, reason=reason)
        with contextlib.suppress(AgentError):
            await self.revocations.load()
        with contextlib.suppress(AgentError):  # a cut may have come between a refresh and its being learned
            await self.revocations.learn(await self._store.heard())
        with contextlib.suppress(AgentError):
            await self._removals.load()
            await self._read_wishes()
        for slot in self._wishes.strongest or self._wishes.configured:
            self._host.expect(slot, "its first version has not arrived yet")
        self._to_boot = {pointer.slot: pointer for pointer in pointers if pointer.slot not in self._removals}
        for slot in self._to_boot:
            self._host.expect(slot, "it is being loaded")
        self._note_booted()

    async def run(self) -> None:
        """Component: keep every slot's task alive; each first serves what its pointer names."""
        async with asyncio.TaskGroup() as group:
            self._running = set()
            group.create_task(self._tell_ends(), name="ends of the last life")
            while True:
                self._new_slot.clear()
                for slot in self._all_slots():
                    if slot not in self._running:
                        self._running.add(slot)
                        group.create_task(self._keep(slot), name=f"slot {slot}")
                for slot in self._wishes.staging_slots() | self._unfinished_staging:
                    if (lane := staging_lane(slot)) not in self._running:
                        self._running.add(lane)
                        group.create_task(self._keep_staging(slot), name=f"staging {slot}")
                await self._new_slot.wait()

    def stopped(self) -> None:
        """Record an orderly end, once no worker is left. What is not recorded counts against a version on trial."""
        for performer in self._performers.values():
            try:
                performer.stopped()
            except (AgentError, OSError) as error:
                _log.error("orderly end not recorded", slot=performer.slot, reason=str(error))

    # Wishes

    async def want(self, wish: Desired) -> None:
        """Record a wish of the pin or the fleet and look at its slot now.

        Raises:
            CommandError: a local pin holds the slot and the wish is the fleet's; or the slot is being removed, or
                would be beside nothing.
            PolicyError: the version was revoked.
        """
        if wish.slot in self._removals or wish.model in self._removals:
            raise CommandError(f"{wish.slot} is being removed; try again once it is gone")
        if (
            wish.model not in self._wishes.strongest
            and self.active_version(wish.model) is None
            and wish.model != wish.slot
        ):
            raise CommandError(
                f"{wish.model} has no default version that {wish.version} could be beside; "
                f"deploy it first: inferctl deploy {wish.model}@{wish.version}"
            )
        if reason := self.revocations.against(wish):
            raise PolicyError(f"{wish.slot} {wish.version} was revoked: {reason}")
        held = self._wishes.strongest.get(wish.slot)
        if wish.place == "fleet" and held is not None and held.source == "pin":
            raise CommandError(f"{wish.slot} is pinned on the box to {held.version or held.channel}; unpin it first")
        await self._wishes.want(wish)
        self._look(wish.slot)
        self._wake()

    async def unpin(self, slot: str) -> None:
        """Give the slot back to the fleet and the configuration file."""
        if slot not in self._wishes.strongest:
            raise NotFoundError(f"no slot {slot!r}")
        await self._wishes.withdraw(slot, "pin")
        self._look(slot)

    async def remove(self, model: str, version: str = "", *, by_fleet: bool = False) -> list[str]:
        """Let a version beside the default, or a whole model, be neither wanted nor served any more.

        Returns:
            The slots that go; ``removed`` waits for them. Those of a removal that is under way are among them.

        Raises:
            NotFoundError: there is no such model or version.
            CommandError: the configuration wants it, it is the default, or a local pin holds it against the fleet.
        """
        slots = leaving(
            model,
            version,
            slots={slot for slot in self._all_slots() if self._serves_or_wanted(slot)},
            configured=self._wishes.configured,
            default=self.active_version(model),
        )
        wishes = [wish for slot in slots if (wish := self._wishes.strongest.get(slot)) is not None]
        pinned = [wish.slot for wish in wishes if wish.source == "pin"]
        if by_fleet and pinned:
            raise CommandError(f"{', '.join(pinned)} is pinned on the box; unpin it first")
        await self._removals.begin(slots)
        await self._wishes.refresh()
        for slot in slots:
            self._performer(slot).leaving = True
            self._look(slot)
        self._wake()
        return slots

    async def removed(self, slots: Collection[str]) -> None:
        """Return once these slots are gone."""
        while self.going(slots):
            await self._changed()

    def going(self, slots: Iterable[str]) -> list[str]:
        """Return those that are being removed."""
        return [slot for slot in slots if slot in self._removals]

    async def earned_trust(self, model: str, version: str) -> str:
        """Return the team of a version that is on this box's disk and may serve at once, without another trial.

        Raises:
            NotFoundError: it is not here.
            CommandError: it was never confirmed here, not with the device that is here now, or has failed since.
        """
        kept = (await self._store.inventory()).versions
        found = next((item for item in kept if (item.name, item.version) == (model, version)), None)
        advice = f"inferctl deploy {slot_of(model, version)}"
        if found is None:
            raise NotFoundError(f"{slot_of(model, version)} is not on this box; {advice} brings it")
        failed = {digest[:12]: reason for name, digest, reason in await self.quarantine() if name == model}
        if found.digest in failed:
            raise CommandError(f"{slot_of(model, version)} failed here: {failed[found.digest]}; {advice} --force")
        trusted = await self._journal.served(model) | self._relied_on(model)
        if found.digest not in {digest[:12] for digest in trusted}:
            formerly = found.digest in {digest[:12] for digest in await self._journal.ever_served(model)}
            lacks = "was confirmed with other hardware, driver, runtimes or agent, not with those of now"
            lacks = lacks if formerly else "has not earned trust here yet"
            raise CommandError(f"{slot_of(model, version)} {lacks}; {advice} tries it")
        return found.team

    def _relied_on(self, model: str) -> set[str]:
        """Return the digests that this box relies on now: the default's, and those that are loaded beside it."""
        return {
            pointer.confirmed.digest
            for slot, performer in self._performers.items()
            if (pointer := performer.pointer) is not None and pointer.confirmed is not None
            if slot == model or (performer.active is not None and performer.active.evidence().ready)
        }

    async def cancel(self, slot: str, *, source: str = "pin") -> str:
        """Give up what is being deployed to ``slot`` or prepared for it, and the pin that asked for it.

        What was fetched stays for the next try; what was only prepared is let go. Returns the deployment's id.

        Raises:
            NotFoundError: nothing is being deployed that does not serve already.
            CommandError: the fleet asks, and a pin asked for the deployment.
        """
        for lane, wishes in ((slot, self._wishes.strongest), (staging_lane(slot), self._wishes.staged)):
            wish, latest = wishes.get(slot), await self._journal.latest(lane)
            begun = latest is not None and wish is not None and serves(latest, wish)
            if latest is not None and latest.state in BEFORE_CUTOVER:
                _require_right(latest.source, source, slot)
                await self._wishes.cancel(wish if begun else None, latest.id)
            elif wish is not None and wish.source != "file" and not begun and await self._unknown(wish):
                _require_right(wish.source, source, slot)
                await self._wishes.cancel(wish)
                latest = None
            elif wish is not None and latest is not None and begun and latest.state is State.PREPARED:
                _require_right(wish.source, source, slot)
                await self._wishes.withdraw(slot, STAGING)
            else:
                continue
            self._look(slot)
            self._wake()
            return latest.id if latest is not None else wish.id if wish is not None else ""
        raise NotFoundError(f"{slot!r}: nothing is being deployed that could still be cancelled")

    async def _unknown(self, wish: Desired) -> bool:
        return await self._journal.get(wish.id) is None

    def previous_version(self, slot: str) -> tuple[str, str]:
        """Return team and version a rollback of ``slot`` would go to; while a candidate is tried, what serves.

        Raises:
            NotFoundError: unknown slot, or no earlier version is kept.
            PolicyError: the earlier version was revoked.
        """
        performer = self._performers.get(slot)
        pointer = performer.pointer if performer is not None else None
        if pointer is None:
            raise NotFoundError(f"{slot!r} serves nothing that could be rolled back")
        if performer is not None and performer.candidate_version:
            return pointer.active.team, pointer.active.version
        if pointer.previous is None:
            raise NotFoundError(f"{slot!r}: no earlier version is kept on this box")
        if reason := self.revocations.forbidden(pointer.previous.digest):
            raise PolicyError(f"{slot!r}: the earlier version {pointer.previous.version} was revoked: {reason}")
        return pointer.previous.team, pointer.previous.version

    def active_team(self, slot: str) -> str | None:
        """Return the team of what serves or is wanted, to spare people typing it."""
        performer = self._performers.get(slot)
        if performer is not None and performer.pointer is not None:
            return performer.pointer.active.team
        wish = self._wishes.strongest.get(slot) or self._wishes.staged.get(slot)
        return wish.team if wish is not None else None

    # What is learned of versions, and of this box

    async def absorb(self, news: Iterable[News]) -> list[Revoked]:
        """Remember for good what was revoked, look at the slots, and return what is newly known."""
        news = list(news)
        fresh = await self.revocations.learn(news)
        for model in news:
            for performer in self._performers.values():
                if model_of(performer.slot) == model.name:
                    self.revocations.tell_deprecated(model, performer.pointer)
        for item in fresh:
            self._look_at(item.name)
        return fresh

    def hold(self, reason: str) -> None:
        """Let no slot serve as long as ``reason`` is not empty."""
        if reason != self._held:
            self._held = reason
            for slot in self._performers.keys() | self._wishes.strongest.keys():
                self._look(slot)

    def models(self) -> list[tuple[str, str]]:
        """Return team and name of every model that serves or is wanted here."""
        found = {(wish.team, wish.model) for wish in self._wishes.strongest.values()}
        pointers = [performer.pointer for performer in self._performers.values()]
        found |= {(pointer.active.team, pointer.active.name) for pointer in pointers if pointer is not None}
        return sorted(found)

    def wanted(self) -> list[str]:
        """Return the slots that serve or are wanted here."""
        return sorted(slot for slot in self._all_slots() if self._serves_or_wanted(slot))

    async def offer(self, slot: str, medium: str) -> Record | None:
        """Let ``slot`` take what its wish asks for from the folder ``medium``; wait until that has begun.

        Returns:
            The deployment, perhaps one that was waiting for its store; ``None`` if the medium has nothing else.

        Raises:
            NotFoundError: nothing is wanted of the slot.
            CommandError: the channel points to an older version than the one that serves.
            BundleError, StoreError: the medium is refused or does not have the model.
        """
        wish = self._wishes.strongest.get(slot)
        if wish is None:
            raise NotFoundError(f"nothing is wanted of {slot!r}")
        performer, latest = self._performer(slot), await self._journal.latest(slot)
        if latest is not None and latest.state in WAITING and self._ending(latest) is None:
            performer.offer(medium)
            return latest
        offered = await self._store.resolve(
            team=wish.team, name=wish.model, version=wish.version, channel=wish.channel, medium=medium
        )
        if performer.pointer is not None and performer.pointer.active.digest == offered.digest:
            return None
        if reason := await self._steps_back(wish, performer.pointer, offered):
            raise CommandError(reason)
        offer = Offer(version=offered.version, digest=offered.digest, medium=medium)
        self._offers[slot] = offer
        self._look(slot)
        return await self.beyond(await asyncio.shield(offer.begun), (-1, -1))

    async def quarantine(self) -> list[tuple[str, str, str]]:
        """Return model, digest and reason of the versions that failed here and are not tried again by themselves."""
        return await self._journal.all_refused()

    async def release(self, model: str, digest: str) -> None:
        """Let a version that failed here be tried again."""
        await self._journal.forgive(model, digest)
        self._look_at(model)

    # Views

    def active_version(self, slot: str) -> str | None:
        """Return the version that the slot serves."""
        performer = self._performers.get(slot)
        return performer.pointer.active.version if performer is not None and performer.pointer is not None else None

    async def outcome(self, deployment_id: str, on_change: Callable[[Record], None] | None = None) -> Record:
        """Return the deployment's final record, telling ``on_change`` every step on the way.

        Raises:
            NotFoundError: see ``beyond``.
        """
        seen = (-1, -1)
        while True:
            record = await self.beyond(deployment_id, seen)
            seen = (record.step, record.bytes_done)
            if on_change is not None:
                on_change(record)
            if record.state in FINAL:
                return record

    async def beyond(self, deployment_id: str, seen: tuple[int, int]) -> Record:
        """Return the deployment once it has ended or moved past ``seen``: its step and bytes done.

        Raises:
            NotFoundError: there is no such deployment.
        """
        while True:
            record = self._current.get(deployment_id) or await self._journal.get(deployment_id)
            if record is not None and (record.state in FINAL or (record.step, record.bytes_done) > seen):
                return record
            if record is None and not self._wishes.may_come(deployment_id):
                raise NotFoundError(f"no deployment {deployment_id!r}; inferctl deployments lists their ids")
            await self._changed()

    async def _changed(self) -> None:
        if self._change is None or self._change.done():
            self._change = asyncio.get_running_loop().create_future()
        await asyncio.shield(self._change)

    async def find(self, deployment_id: str) -> Record | None:
        """Return the deployment of that id, if there ever was one here."""
        return await self._journal.get(deployment_id)

    async def history(self, *, limit: int = 50) -> list[Record]:
        """Return the newest deployments, newest first."""
        return await self._journal.history(limit=limit)

    def waiting(self) -> list[Record]:
        """Return the deployments that wait for their time."""
        return [record for record in self._under_way.values() if record.state in _GATED]

    def past_gate(self, model: str) -> list[dict[str, str]]:
        """Return the deployments of ``model`` (``*``: of all) that no hold can keep waiting any more."""
        return [
            {"slot": name, "deployment": record.id, "version": record.version, "state": str(record.state)}
            for name, record in self._under_way.items()
            if model in (record.model, EVERY_MODEL) and record.state in _PAST_GATE
        ]

    def slots(self) -> list[dict[str, object]]:
        """Return wish and pointer of every slot."""
        rows: list[dict[str, object]] = []
        for slot in sorted(filter(self._serves_or_wanted, self._all_slots()), key=lambda slot: (model_of(slot), slot)):
            performer, wish = self._performers.get(slot), self._wishes.strongest.get(slot)
            under_way, prepared = self._under_way.get(slot), self._prepared.get(slot)
            waits = under_way is not None and under_way.state in _GATED
            pointer = performer.pointer if performer is not None else None
            missed = unmet(wish, pointer, self._ended.get(slot) if under_way is None else None)
            rows.append(
                {
                    "slot": slot,
                    "model": model_of(slot),
                    "beside": bool(version_beside(slot)),
                    "source": wish.source if wish is not None else None,
                    "wanted": (wish.version or f"channel {wish.channel}") if wish is not None else None,
                    "active": pointer.active.version if pointer is not None else None,
                    "team": pointer.active.team if pointer is not None else (wish.team if wish is not None else None),
                    "previous": pointer.previous.version
                    if pointer is not None and pointer.previous is not None
                    else None,
                    "trial": pointer.trial if pointer is not None else False,
                    "waits": under_way.message if under_way is not None and waits else "",
                    "unmet": asdict(missed) if missed is not None else None,
                    "candidate": _candidate(under_way),
                    "held_by": self.holds.holder(model_of(slot)),
                    "prepared": prepared.version if prepared is not None else None,
                }
            )
        return rows

    # Inside

    async def _keep(self, slot: str) -> None:
        """One slot's loop. Trouble with the disk or journal pauses it; what serves goes on."""
        performer, hint = self._performer(slot), self._hint(slot)
        pointer = self._to_boot.get(slot)
        if pointer is not None:
            if version_beside(slot):
                await self.booted.wait()  # what most requests ask for comes first
            try:
                await self._boot(performer, pointer)
            except (AgentError, OSError) as error:
                _log.error("boot failed", slot=slot, reason=str(error))
            del self._to_boot[slot]
            self._note_booted()
        backoff = Backoff(first_s=1.0, cap_s=60.0)
        while True:
            hint.clear()
            try:
                await self._act(slot, performer, hint)
                if self._performers.get(slot) is not performer:
                    return  # removed
                backoff.reset()
            except (AgentError, OSError) as error:
                self._tell_stuck(slot, error)
                await self._clock.sleep(1.0 + backoff.next())
            self._nudge()  # it may have held the box's one trial

    def _note_booted(self) -> None:
        if all(version_beside(slot) for slot in self._to_boot):
            self.booted.set()

    def _tell_stuck(self, slot: str, error: Exception) -> None:
        _log.error("deployment is stuck", slot=slot, reason=str(error))
        self._events.emit(Stream.HEALTH, "deployment.stuck", Severity.ERROR, slot=slot, reason=str(error))

    async def _boot(self, performer: Performer, pointer: Pointer) -> None:
        if self._held and not pointer.trial:
            performer.pointer = pointer
            await performer.suspend(self._held)
        else:
            await performer.boot(pointer)
            await self._note_brought_up(performer)

    async def _note_brought_up(self, performer: Performer) -> None:
        """Note that a confirmed version passed its self-tests at this start, perhaps with another device."""
        pointer, active = performer.pointer, performer.active
        if pointer is not None and active is not None and not pointer.trial and active.evidence().ready:
            with contextlib.suppress(AgentError):  # the next start may have room for it
                await self._journal.note_served(performer.model, pointer.active.digest)

    async def _act(self, slot: str, performer: Performer, hint: asyncio.Event) -> None:
        await self._read_wishes()
        wish, latest = self._wishes.strongest.get(slot), await self._journal.latest(slot)
        if latest is not None and latest.state in FINAL:
            self._ended[slot] = latest
        if latest is None or latest.state in FINAL:
            performer.rest()
            if await self._close_unbegun(slot, performer, staging=False):
                return None
        action = decide(wish, performer.pointer, latest)
        if action is Action.BEGIN and wish is not None and (reason := self.revocations.against(wish)):
            return await performer.refuse(wish, reason)
        if slot in self._removals:
            return await self._remove(performer, latest)
        stopped = ""
        if latest is None or latest.state in FINAL:
            measure, kept = await self.revocations.measure(performer.pointer, self._store)
            if measure is Measure.FALL_BACK and kept is not None:
                return await self._fall_back(performer, kept)
            stopped = await self._enforce(performer, measure)
            if (offer := self._offers.pop(slot, None)) is not None and wish is not None:
                return await self._take_offer(performer, wish, offer)
        if performer.held_until is not None and action in _HELD and (latest is None or latest.state in _RESTING):
            await self._hold(performer, hint, wish, latest, performer.held_until - self._clock.monotonic())
        elif action is Action.RESUME and latest is not None:
            await performer.resume(latest)
        elif action is Action.SUPERSEDE and latest is not None:
            await performer.give_up(latest)
        elif action is Action.BEGIN and wish is not None:
            await performer.begin(wish, deployment_id=wish.id)
            await self.retention.tidy()
        elif performer.pointer is not None and performer.active is None and not stopped:
            await self._revive(performer, hint)
            if action is Action.POLL and performer.active is None and wish is not None and latest is not None:
                await self._look_for_newer(performer, wish, latest)
        elif action is Action.POLL and wish is not None and latest is not None:
            await self._poll(performer, hint, wish, latest)
        else:
            await hint.wait()
        return None

    async def _remove(self, performer: Performer, latest: Record | None) -> None:
        """End the slot's deployment, or else the slot."""
        slot, pointer = performer.slot, performer.pointer
        if latest is not None and latest.state not in FINAL:
            return await performer.give_up(latest)
        await self._wishes.refresh()  # whoever asked may not have done so yet, and nothing may begin for its old wish
        await performer.remove()
        await self._removals.finish(slot, pointer)
        del self._performers[slot], self._lanes[slot], self._hints[slot]
        self._ended.pop(slot, None)
        self._running.discard(slot)
        self._new_slot.set()  # it may be wanted anew already
        self._wake()
        await self.retention.tidy()
        return None

    async def _read_wishes(self) -> None:
        if not self._wishes.known:
            await self.revocations.load()
            unfinished = await self._journal.unfinished()  # perhaps of a wish that was withdrawn
            self._unfinished = {record.slot for record in unfinished if not record.plan.stage_only}
            self._unfinished_staging = {record.slot for record in unfinished if record.plan.stage_only}
            await self._wishes.refresh()
            self._new_slot.set()

    async def _tell_ends(self) -> None:
        """Tell once more how deployments ended that a cut may have silenced; each end has a key that names it."""
        steps, backoff = self._steps(), Backoff(first_s=1.0, cap_s=60.0)
        while True:
            try:
                return await steps.tell_again()
            except AgentError as error:
                _log.warning("ends cannot be told again yet", reason=str(error))
                await self._clock.sleep(1.0 + backoff.next())

    async def _close_unbegun(self, slot: str, lane: Lane, *, staging: bool) -> bool:
        """Record the ends of wishes that never began; return whether there were any."""
        ended = await self._wishes.unbegun(slot, staging=staging)
        for overtaken in ended:
            await lane.close(overtaken)
            await self._wishes.told(overtaken)
        return bool(ended)

    async def _keep_staging(self, slot: str) -> None:
        """The loop of what is only prepared for one slot."""
        stager, hint = self._stager(slot), self._hint(staging_lane(slot))
        backoff = Backoff(first_s=1.0, cap_s=60.0)
        while True:
            hint.clear()
            try:
                await self._stage(slot, stager, hint)
                backoff.reset()
            except (AgentError, OSError) as error:
                self._tell_stuck(slot, error)
                await self._clock.sleep(1.0 + backoff.next())

    async def _stage(self, slot: str, stager: Stager, hint: asyncio.Event) -> None:
        await self._read_wishes()
        wish, latest = self._wishes.staged.get(slot), await self._journal.latest(staging_lane(slot))
        if latest is not None and latest.state not in FINAL:
            return await stager.resume(latest)
        if await self._close_unbegun(slot, stager, staging=True):
            return None
        begun = latest is not None and wish is not None and serves(latest, wish)
        self._prepared.pop(slot, None)
        if wish is not None and not begun:
            await stager.begin(wish)
            await self.retention.tidy()
            return None
        if latest is not None and begun and latest.state is State.PREPARED:
            performer = self._performers.get(slot)
            pointer = performer.pointer if performer is not None else None
            if pointer is not None and not pointer.trial and pointer.active.digest == latest.digest:
                await self._wishes.withdraw(slot, STAGING)
            else:
                self._prepared[slot] = latest
        await hint.wait()
        return None

    async def _enforce(self, performer: Performer, measure: Measure) -> str:
        """Stop what may not serve; return why the slot is stopped, or an empty text."""
        pointer = performer.pointer
        if pointer is None:
            return ""
        reason = self._held
        if measure in (Measure.STOP, Measure.WARN):
            revoked = self.revocations.tell(pointer.active.digest, measure)
            if measure is Measure.STOP:
                reason = f"version {revoked.version} was revoked: {revoked.reason}"
        if reason and performer.active is not None:
            _log.error("stopped", slot=performer.slot, reason=reason)
            await performer.suspend(reason)
        return reason

    async def _fall_back(self, performer: Performer, kept: Kept) -> None:
        """Return to a version on this box, by a deployment of its own."""
        assert performer.pointer is not None
        self.revocations.tell(performer.pointer.active.digest, Measure.FALL_BACK)
        wish_id = fall_back_id(performer.pointer, kept)
        wish = Desired(
            id=wish_id, slot=performer.slot, team=kept.team, version=kept.version, source=REVOCATION, local=True
        )
        await performer.begin(wish, deployment_id=wish_id)
        await self.retention.tidy()

    async def _take_offer(self, performer: Performer, wish: Desired, offer: Offer) -> None:
        deployment_id = f"{wish.id}@{offer.digest[:12]}"
        wish = replace(wish, version=offer.version, medium=offer.medium)
        await performer.begin(wish, deployment_id=deployment_id, begun=lambda: offer.begin(deployment_id))
        await self.retention.tidy()

    async def _revive(self, performer: Performer, hint: asyncio.Event) -> None:
        """Try now and then to load what boot could not; a hint is looked at at once."""
        try:
            await performer.revive()
        except AgentError as error:
            _log.warning("still does not load", slot=performer.slot, reason=str(error))
            await self._hinted(hint, _REVIVE_S)
        else:
            await self._note_brought_up(performer)

    async def _hold(
        self, performer: Performer, hint: asyncio.Event, wish: Desired | None, latest: Record | None, left_s: float
    ) -> None:
        """Wait before a version on trial is started again; another one that is offered meanwhile takes its place."""
        if left_s <= 0:
            try:
                await performer.revive()
            except AgentError as error:
                _log.error("does not load", slot=performer.slot, reason=str(error))
            return
        if (
            await self._hinted(hint, min(left_s, _FIRST_POLL_S))
            or wish is None
            or latest is None
            or latest.state in FINAL
        ):
            return
        offered = await self._offered(wish, performer.pointer)
        if offered is not None and offered.digest != latest.digest:
            await performer.give_up(latest)
            await self._begin_offered(performer, wish, offered)

    async def _poll(self, performer: Performer, hint: asyncio.Event, wish: Desired, latest: Record) -> None:
        """Wait for a hint or the poll interval; begin when the channel offers something else."""
        interval_s = self._poll_interval_s or None
        if performer.pointer is None or latest.code in TRANSIENT:
            interval_s = min(_FIRST_POLL_S, interval_s or _FIRST_POLL_S)
        if not await self._hinted(hint, interval_s):
            await self._look_for_newer(performer, wish, latest)

    async def _hinted(self, hint: asyncio.Event, limit_s: float | None) -> bool:
        """Wait for a hint, at most so long (``None``: for ever); return whether one came."""
        if limit_s is None:
            return await hint.wait()
        return await wait_up_to(hint, limit_s, self._clock)

    async def _look_for_newer(self, performer: Performer, wish: Desired, latest: Record) -> None:
        offered = await self._offered(wish, performer.pointer)
        if offered is None:
            return
        failed = latest.state is not State.CONFIRMED
        retry = failed and (performer.pointer is None or may_pass(latest, wish))
        if offered.digest != latest.digest or retry:
            await self._begin_offered(performer, wish, offered)

    async def _begin_offered(self, performer: Performer, wish: Desired, offered: Mark) -> None:
        await performer.begin(
            replace(wish, version=offered.version),
            deployment_id=f"{wish.id}@{offered.digest[:12]}",
            digest=offered.digest,
        )
        await self.retention.tidy()

    async def _offered(self, wish: Desired, pointer: Pointer | None) -> Mark | None:
        """Return what the store offers for the wish now, ``None`` if it cannot tell or nothing that may be taken."""
        try:
            offered = await self._store.resolve(
                team=wish.team, name=wish.model, version=wish.version, channel=wish.channel
            )
            reason = await self._steps_back(wish, pointer, offered)
        except AgentError as error:
            if isinstance(error, BundleError):
                self._refusals.bundle(error, team=wish.team, name=wish.model, version=wish.version, polled=True)
            _log.info("poll failed", slot=wish.slot, code=error.code, reason=str(error))
            return None
        if not reason:
            return offered
        if self._stepped_back.get(wish.slot) != offered.digest:
            self._stepped_back[wish.slot] = offered.digest
            _log.warning("channel not followed", slot=wish.slot, reason=reason)
            self._events.emit(
                Stream.DEPLOY, "channel.older", Severity.WARNING, slot=wish.slot, version=offered.version, reason=reason
            )
        return None

    async def _steps_back(self, wish: Desired, pointer: Pointer | None, offered: Mark) -> str:
        """Return why following a channel may not lead to ``offered``, empty if it may: only a person lowers ``seq``."""
        trusted = pointer.confirmed if pointer is not None else None
        if wish.version or trusted is None or trusted.digest == offered.digest:
            return ""
        if self.revocations.forbidden(trusted.digest):
            return ""
        kept = (await self._store.inventory()).versions
        seq = next((item.seq for item in kept if trusted.digest.startswith(item.digest)), 0)
        if offered.seq >= seq:
            return ""
        return (
            f"channel {wish.channel} points to {offered.version}, which is older than {trusted.version}; "
            f"deploy {wish.slot}@{offered.version} to go back"
        )

    def _performer(self, slot: str) -> Performer:
        performer = self._performers.get(slot)
        if performer is None:
            performer = self._performers[slot] = self._lanes[slot] = Performer(
                slot, self._means, host=self._host, pointers=self._pointers
            )
            performer.leaving = slot in self._removals
        return performer

    def _ending(self, record: Record) -> Ending | None:
        if record.slot in self._removals:
            return Ending(event=Event.SUPERSEDE, message="it is being removed")
        performer = self._performers.get(record.slot)
        if record.state in WAITING and record.lane == record.slot and performer is not None:
            pointer = performer.pointer
            if pointer is not None and performer.active is not None and record.source != REVOCATION:
                reason = self._held or self.revocations.forbidden(pointer.active.digest)
                if reason:  # which cannot wait for what this deployment waits for; its wish begins anew
                    message = f"{pointer.active.version}, which serves, is to be stopped first: {reason}"
                    return Ending(event=Event.SUPERSEDE, message=message)
        return self._wishes.ending(record)

    def _stager(self, slot: str) -> Stager:
        stager = self._stagers.get(slot)
        if stager is None:
            stager = self._stagers[slot] = self._lanes[staging_lane(slot)] = Stager(slot, self._means)
        return stager

    def _steps(self) -> Steps:
        return Steps(
            self._journal,
            self._events,
            self._clock,
            self._note,
            boot_id=self._boot_id,
            clock_quality=self._clock_quality,
        )

    def _situation(self, record: Record) -> Situation:
        performer = self._performers.get(record.slot)
        pointer = performer.pointer if performer is not None else None
        trying = {slot for slot, other in self._performers.items() if other.trying}
        trying |= {slot for slot, pointer in self._to_boot.items() if pointer.trial and pointer.previous is not None}
        return Situation(
            wall_s=self._clock.wall(),
            clock_trusted=self._clock_trusted(),
            serves=any(other.serves for other in self._performers.values() if other.model == record.model)
            or any(model_of(slot) == record.model for slot in self._to_boot),
            replaces=pointer is not None and pointer.confirmed is not None,
            held_by=self.holds.holder(record.model),
            on_trial=next(iter(sorted(trying - {record.slot})), ""),
        )

    def _nudge(self) -> None:
        """Let every deployment that waits look again now."""
        for lane in self._lanes.values():
            lane.nudge()

    def _all_slots(self) -> set[str]:
        known = self._to_boot.keys() | self._performers.keys()
        return known | self._wishes.slots() | set(self._removals) | self._unfinished

    def _serves_or_wanted(self, slot: str) -> bool:
        performer = self._performers.get(slot)
        serves = performer is not None and (performer.pointer is not None or performer.busy)
        return serves or slot in self._wishes.strongest or slot in self._to_boot or slot in self._removals

    def _hint(self, slot: str) -> asyncio.Event:
        return self._hints.setdefault(slot, asyncio.Event())

    def _look_at(self, model: str) -> None:
        for slot in self._all_slots():
            if model_of(slot) == model:
                self._look(slot)

    def _look(self, slot: str) -> None:
        self._hint(slot).set()
        self._hint(staging_lane(slot)).set()
        for lane in (slot, staging_lane(slot)):
            if lane in self._lanes:
                self._lanes[lane].nudge()
        self._new_slot.set()

    def _note(self, record: Record) -> None:
        self._current[record.id] = record
        self._wishes.note(record)
        if record.lane == record.slot:
            self._under_way[record.slot] = record
            if record.state in FINAL:
                self._ended[record.slot] = self._under_way.pop(record.slot)
        elif record.state is State.PREPARED:
            self._prepared[record.slot] = record
        if record.state in FINAL:
            self._hint(staging_lane(record.slot)).set()
        while len(self._current) > 64:
            self._current.pop(next(iter(self._current)))
        self._wake()

    def _wake(self) -> None:
        """Let everyone who follows a deployment look again."""
        if self._change is not None and not self._change.done():
            self._change.set_result(None)


def _candidate(record: Record | None) -> dict[str, object] | None:
    """Return what a slot's deployment tries beside what serves, and with which share of the requests."""
    if record is None or record.state is not State.CANARY:
        return None
    return {"deployment": record.id, "version": record.version, "percent": record.percent}


def _require_right(owner: str, asker: str, slot: str) -> None:
    """The fleet may not cancel what a person asked for on the box.

    Raises:
        CommandError: it tries.
    """
    if asker == "fleet" and owner == "pin":
        raise CommandError(f"{slot} is being deployed by a pin on the box; cancel it there")
