"""One slot's deployments, performed: the table says what may follow, this does it.

Every state is journaled before its work begins, and the work of a state may run twice: after a restart the stored
state alone says where to go on. The pointer is written before requests move, and moved back before anything else
when a trial fails. Leaves out: which deployment to perform (``reconciler.py``).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, Final

from agent.deploy import trial
from agent.deploy.candidate import probe_if_idle, watch_share
from agent.deploy.desired import REVOCATION, SUPERSEDED, TRANSIENT, Desired, record_of
from agent.deploy.doubt import Doubt
from agent.deploy.gates import before_load
from agent.deploy.interface import Interface, differences
from agent.deploy.lane import TOO_MANY_STEPS, Lane
from agent.deploy.means import Means
from agent.deploy.pointer import Pointer, Pointers, Target, target_of
from agent.deploy.ports import Evidence, Host, Loaded
from agent.deploy.probation import Judgement, Verdict, judge, samples_min, summary
from agent.deploy.revocation import revoked_text
from agent.deploy.rollout import Course, course_of
from agent.deploy.state import BEFORE_CUTOVER, TRIAL, WAITING, Event, Record, State
from agent.errors import (
    AgentError,
    BootFailedError,
    BundleError,
    CanaryFailedError,
    CanaryImpossibleError,
    CanaryUndecidedError,
    DeviceLostError,
    IncompatibleError,
    LoadError,
    OutOfMemoryError,
    PointerFailedError,
    PolicyError,
    ProbationError,
    SandboxError,
    SelfTestError,
    StateError,
    StoreError,
    UnloadableError,
    UntrustedError,
    WorkerDiedError,
)
from agent.events import Severity, Stream
from agent.log import get_logger

_log = get_logger("deploy")
_TRIAL_POLL_S: Final = 0.1
_UNDECIDED: Final = CanaryUndecidedError.code
_BOXES: Final = (DeviceLostError, LoadError, OutOfMemoryError, SandboxError, WorkerDiedError)  # faults that may pass
# What ended a deployment without speaking against its version: it is not remembered as bad.
_BLAMELESS: Final = TRANSIENT | {error.code for error in _BOXES} | {SUPERSEDED, _UNDECIDED, TOO_MANY_STEPS}


class Performer(Lane):
    """Brings one slot from one version to the next."""

    def __init__(self, slot: str, means: Means, *, host: Host, pointers: Pointers) -> None:
        super().__init__(slot, means)
        self.leaving = False  # nobody wants the slot any more: a trial ends, whatever comes after it
        self.trying = False  # what serves may be replaced, or was, and the new version is not confirmed yet
        self.held_until: float | None = None  # monotonic; on trial, not loaded, and nothing else could be
        self.candidate_version = ""  # that is tried beside what serves
        self._host = host
        self._pointers = pointers
        self._config, self._clock, self._state_dir = means.config, means.clock, means.state_dir
        self._store, self._journal = means.store, means.journal
        self._events, self._refusals = means.events, means.refusals
        self._ending, self._revoked = means.ending, means.revoked
        self._interfaces: dict[str, Interface] = {}  # what callers count on, by digest, of what the pointer names
        self._loaded = ""  # the digest of ``active``
        self._instead: Pointer | None = None  # what serves since the start, as long as the disk denies the pointer
        self._before: Loaded | None = None  # what served before the trial, still loaded
        self._candidate: Loaded | None = None
        self._course = Course()
        self._doubt: Doubt | None = None  # about what is on trial
        self._trial_began: Evidence | None = None  # what the version on trial had shown at its cut-over
        self._work = {
            **self._work,
            State.STAGED: self._staged,
            State.WAITING_WINDOW: self._wait_for_window,
            State.LOADING: self._load,
            State.CANARY: self._canary,
            State.CUTOVER: self._cut_over,
            State.PROBATION: self._probation,
            State.ROLLING_BACK: self._roll_back,
        }

    # Boot: from disk alone, before any network

    async def boot(self, pointer: Pointer) -> None:
        """Load the confirmed version; one on trial beside it follows when its deployment goes on.

        What has no confirmed version, or one that does not load, is loaded although it is on trial.
        """
        self.pointer = pointer
        self.trying = self._on_trial
        revoked = self._revoked(pointer.active.digest)
        try:
            if pointer.trial and (self._on_trial or not revoked):
                pointer = self._begin_start(pointer)
            if self._on_trial:
                if await self._boot_confirmed(pointer):
                    return
                pointer = self._record_start(pointer, running=True)
            if revoked:  # what serves instead is for the reconciler to say
                self._host.expect(self.slot, revoked_text(pointer.active.version, revoked))
            elif self.held_until is None:
                self.active = await self._bring_up(pointer.active)
        except (AgentError, OSError) as error:
            await self._boot_previous(pointer, error)

    async def _boot_confirmed(self, pointer: Pointer) -> bool:
        """Let the version before the one on trial serve first: it is known to answer, also the first request."""
        assert pointer.previous is not None
        try:
            self._before = await self._bring_up(pointer.previous)
        except (AgentError, OSError) as error:
            _log.error("the version before does not load", slot=self.slot, reason=str(error))
            return False
        return True

    @property
    def _trial_rests(self) -> bool:
        """Whether the version on trial is yet to be started again, after a restart, and the one before serves."""
        return self._on_trial and self.active is None and self._before is not None

    async def _try_again(self, pointer: Pointer) -> tuple[str, str]:
        """Load the version on trial beside the one before, which a restart brought up.

        Returns:
            Code and text of what kept it from being loaded, where it was not: ``boot_failed`` if it is the version's
            fault.

        Raises:
            AgentError, OSError: the start cannot be recorded now, and is not made.
        """
        pointer = self._point(replace(pointer, running=True))
        try:
            self.active = await self._bring_up(pointer.active)
        except PolicyError as error:
            return error.code, str(error)
        except (BundleError, SelfTestError, UnloadableError) as error:
            self._tell_boot_failed(pointer, error)
            return BootFailedError.code, str(error)
        except (AgentError, OSError) as error:
            self._tell_boot_failed(pointer, error)
            return error.code if isinstance(error, AgentError) else StoreError.code, str(error)
        return "", ""

    def _begin_start(self, pointer: Pointer) -> Pointer:
        """Decide on a start on trial and record it.

        Raises:
            StateError: the confirmed version is to be loaded instead.
        """
        pointer = trial.counted(pointer)
        start = trial.decide(pointer, self._config)
        at_once = start is trial.Start.NOW and pointer.previous is None  # else that one is loaded first
        pointer = self._record_start(pointer, running=at_once)
        if start is trial.Start.NEVER:
            raise StateError(f"{pointer.starts_in_trial} crashes on trial without being confirmed")
        if start is trial.Start.LATER:
            self._hold(pointer)
        return pointer

    def _record_start(self, pointer: Pointer, *, running: bool) -> Pointer:
        """Write before the effect. A start that cannot be recorded is not made if there is a confirmed version."""
        try:
            return self._point(replace(pointer, running=running))
        except (AgentError, OSError):
            if pointer.previous is not None:
                raise
            return pointer

    def _hold(self, pointer: Pointer) -> None:
        wait_s = trial.wait_s(pointer, self._config)
        self.held_until = self._clock.monotonic() + wait_s
        data: dict[str, Any] = {
            "slot": self.slot,
            "version": pointer.active.version,
            "crashes": pointer.starts_in_trial,
            "retry_s": wait_s,
        }
        _log.error("version on trial is held back", **data)
        self._events.emit(Stream.HEALTH, "boot.trial_held", Severity.ERROR, **data)
        reason = f"{pointer.starts_in_trial} crashes on trial and no earlier version; tried again in {wait_s:g} s"
        self._host.expect(self.slot, f"version {pointer.active.version}: {reason}")

    def stopped(self) -> None:
        """Record that what was on trial ended in order. Its worker has left."""
        pointer = self.pointer
        if pointer is not None and pointer.trial and pointer.running:
            self._point(replace(pointer, running=False))

    def _tell_boot_failed(self, pointer: Pointer, error: Exception) -> None:
        data = {"slot": self.slot, "version": pointer.active.version, "reason": str(error)}
        _log.error("active version does not load", **data)
        if isinstance(error, BundleError):
            self._refuse_on_disk(pointer.active, error)
        self._events.emit(Stream.HEALTH, "boot.active_failed", Severity.ERROR, **data)

    async def _boot_previous(self, pointer: Pointer, error: Exception) -> None:
        self._tell_boot_failed(pointer, error)
        if pointer.previous is not None:
            try:
                self.active = await self._bring_up(pointer.previous)
            except (AgentError, OSError) as second:
                _log.error("previous version does not load", slot=self.slot, reason=str(second))
                if isinstance(second, BundleError):
                    self._refuse_on_disk(pointer.previous, second)
            else:
                self._instead = Pointer(slot=self.slot, active=pointer.previous)
                self._point(self._instead)
                if pointer.trial and not isinstance(error, StoreError):
                    await self._journal.refuse(self.model, pointer.active.digest, str(error))
                return
        if isinstance(error, BundleError):  # damaged on disk: whoever wants it fetches it again
            self._pointers.remove(self.slot)
            self.pointer = None
        self._host.expect(self.slot, f"version {pointer.active.version} does not load: {error}")

    def _refuse_on_disk(self, target: Target, error: BundleError) -> None:
        self._refusals.bundle(error, team=target.team, name=target.name, version=target.version, source=target.path)

    async def revive(self) -> None:
        """Try again to load what the pointer names, after ``boot`` could or would not.

        Raises:
            AgentError: it still does not load.
        """
        pointer = self.pointer
        if pointer is not None and self.active is None:
            self.held_until = None
            if pointer.trial:
                pointer = self._record_start(pointer, running=True)
            self.active = await self._bring_up(pointer.active)

    async def suspend(self, reason: str) -> None:
        """Stop serving, for a reason that requests are told; the pointer stays as it is."""
        loaded, self.active = self.active, None
        if loaded is not None:
            await self._host.retire(loaded)
        self._host.expect(self.slot, reason)

    async def remove(self) -> None:
        """Forget what the slot serves: the pointer first, then requests, then memory. No deployment is under way."""
        self._pointers.remove(self.slot)
        self.pointer, self.held_until = None, None
        before, self._before = self._before, None
        active, self.active = self.active, None
        self._host.forget(self.slot)
        for loaded in (before, active):
            if loaded is not None:
                await self._host.retire(loaded)

    def rest(self) -> None:
        """Nothing is being deployed, so nothing of it is on trial, whatever the pointer says.

        Raises:
            AgentError, OSError: what serves since the start is not what the pointer names, which cannot be written yet.
        """
        self.trying = False
        if self._trial_rests and self.pointer is not None and self.pointer.previous is not None:
            self._instead = Pointer(slot=self.slot, active=self.pointer.previous)
            self.active, self._before = self._before, None
        if self._instead is not None:
            self._point(self._instead)

    def offer(self, medium: str) -> None:
        """Let a deployment that waits for its store be taken from the folder ``medium``."""
        self._obtainer.offer(medium)
        self._waiting.nudge()

    async def _bring_up(self, target: Target) -> Loaded:
        if reason := self._revoked(target.digest):
            raise PolicyError(revoked_text(target.version, reason))
        bundle = await self._store.check(self._state_dir / target.path)
        if bundle.digest != target.digest:
            raise UntrustedError(f"{target.path} holds another manifest than the pointer names")
        if reason := self._revoked(target.digest):  # meanwhile
            raise PolicyError(revoked_text(target.version, reason))
        self._interfaces[bundle.digest] = bundle.interface
        pointer = self.pointer
        on_trial = pointer is not None and pointer.trial and target == pointer.active
        self._trial_began = None
        loaded = await (self._host.load(self.slot, bundle) if on_trial else self._host.restore(self.slot, bundle))
        self._host.activate(self.slot, loaded)
        self._loaded = bundle.digest
        return loaded

    # Deployments

    async def begin(
        self, wish: Desired, *, deployment_id: str, digest: str = "", begun: Callable[[], None] = lambda: None
    ) -> None:
        """Perform a new deployment for ``wish`` to its end; ``begun`` is called once it is recorded."""
        previous = self.pointer.active.version if self.pointer is not None else ""
        now_s = self._clock.wall()
        record = record_of(wish, deployment_id, previous=previous, digest=digest, now_s=now_s)
        record = await self._steps.begin(record)
        begun()
        await self.perform(record)

    async def refuse(self, wish: Desired, reason: str) -> None:
        """Record and tell that what a wish names may not be loaded."""
        record = await self._steps.begin(record_of(wish, wish.id, now_s=self._clock.wall()))
        await self._steps.step(record, Event.REJECT, code=PolicyError.code, message=revoked_text(wish.version, reason))

    async def resume(self, record: Record) -> None:
        """Go on with a deployment that a restart interrupted."""
        ours = self.pointer is not None and self.pointer.active.digest == record.digest
        if record.state is State.CUTOVER and ours and (self.held_until is not None or self._trial_rests):
            await self._steps.step(record, Event.DONE)  # its probation begins once it is started again
            return
        confirmed = ours and self.pointer is not None and not self.pointer.trial
        if record.state in (State.PROBATION, State.CUTOVER) and confirmed:
            if record.state is State.CUTOVER:
                record = await self._steps.step(record, Event.DONE)
            await self._confirm(record, "its pointer was confirmed before the restart")
            return
        code, fault = BootFailedError.code, "it did not survive a restart"
        if record.state is State.PROBATION and ours and self._trial_rests and self.pointer is not None:
            code, fault = await self._try_again(self.pointer)
        loaded = self.active is not None and self._loaded == record.digest
        if record.state in (State.PROBATION, State.CUTOVER) and ours and loaded:
            record = await self._steps.again(record)  # it serves on trial, as before
        elif record.state is State.PROBATION or (record.state is State.CUTOVER and ours):
            record = await self._steps.step(record, Event.FAIL, code=code, message=fault)
        elif record.state not in WAITING | {State.ROLLING_BACK, State.RECEIVED}:
            record = await self._steps.step(record, Event.RESUME)
        else:
            record = await self._steps.again(record)
        await self.perform(record)

    async def perform(self, record: Record) -> None:
        """Do the work of each state until a final one; afterwards nothing of it is left in memory but what serves."""
        self.trying = self.trying or (record.state in TRIAL and self._on_trial)
        try:
            await super().perform(record)
        finally:
            self.candidate_version = ""
            self._end_doubt()
            self.trying = self._on_trial
            await self._discard_candidate()

    @property
    def serves(self) -> bool:
        """Whether anything answers: with a version on trial that is yet to be started, the one before."""
        return self.active is not None or self._before is not None

    @property
    def _on_trial(self) -> bool:
        """Whether the pointer names a version on trial that took another's place."""
        return self.pointer is not None and self.pointer.trial and self.pointer.previous is not None

    async def give_up(self, record: Record) -> None:
        """End an interrupted deployment because another wish won."""
        if record.state in BEFORE_CUTOVER:
            message = self._end_text(record) or "something else was asked for"
            await self._steps.step(record, Event.SUPERSEDE, message=message)
        elif (self.leaving or self._trial_rests) and record.state is State.PROBATION:
            message = self._end_text(record) or "another version was asked for before it was started again"
            await self.perform(await self._steps.step(record, Event.SUPERSEDE, code=SUPERSEDED, message=message))
        elif self.held_until is not None and record.state is State.PROBATION:
            message = "another version was asked for while it was held back"
            await self.perform(await self._steps.step(record, Event.SUPERSEDE, code=SUPERSEDED, message=message))
        else:
            await self.resume(record)

    def _end_text(self, record: Record) -> str:
        end = self._ending(record)
        return end.message if end is not None else ""

    # The work of each state

    async def _staged(self, record: Record) -> Record:
        if noticed := self._noticed(record):
            return await self._steps.step(record, Event.REJECT, code=IncompatibleError.code, message=noticed)
        if reason := self._waiting.reason(record, before_load):
            return await self._steps.step(record, Event.WAIT, message=reason)
        return await self._start_to_load(record)

    async def _wait_for_window(self, record: Record) -> Record:
        record, is_open = await self._wait(record, before_load)
        return await self._start_to_load(record) if is_open else record

    async def _start_to_load(self, record: Record) -> Record:
        """Take the box's one trial, before anything else may run."""
        self.trying = self.pointer is not None and self.pointer.confirmed is not None
        if self._bundle is None:  # a restart came in between
            self._bundle = await self._obtainer.kept(record)
            if self._bundle is None:
                return await self._steps.step(record, Event.RESUME, message="")
        return await self._steps.step(record, Event.DONE, message="")

    def _noticed(self, record: Record) -> str:
        """Return what callers of the confirmed version would notice, empty if nothing or if that is agreed to."""
        confirmed = self.pointer.confirmed if self.pointer is not None else None
        serving = self._interfaces.get(confirmed.digest) if confirmed is not None else None
        if confirmed is None or serving is None or self._bundle is None:
            return ""
        found = differences(serving, self._bundle.interface)
        previous = self.pointer.previous if self.pointer is not None else None
        goes_back = record.local and previous is not None and previous.digest == record.digest
        if not found or goes_back or record.source == REVOCATION or record.plan.allow_incompatible:
            return ""
        return (
            f"version {record.version} cannot take the place of {confirmed.version} unnoticed: {'; '.join(found)}; "
            "deploy it with allow_incompatible once its callers are ready"
        )

    async def _load(self, record: Record) -> Record:
        if self._bundle is None:
            return await self._steps.step(record, Event.RESUME)
        if reason := self._revoked(record.digest):
            message = revoked_text(record.version, reason)
            return await self._steps.step(record, Event.REJECT, code=PolicyError.code, message=message)
        try:
            self._candidate = await self._host.load(self.slot, self._bundle)
        except AgentError as error:
            confirmed = self.pointer is not None and self.pointer.active.digest == record.digest
            # What else fails may be the box's fault, and pass.
            condemns = str(error) if isinstance(error, SelfTestError) and not confirmed else ""
            event = Event.REJECT if isinstance(error, BundleError) else Event.FAIL
            return await self._steps.step(record, event, condemns=condemns, code=error.code, message=str(error))
        variant = self._candidate.evidence().variant
        self._course = course_of(record.plan.rollout, self._bundle.rollout, self._config)
        if self._course.shares and self._may_share(record):
            if reason := await self._missing_beside():
                message = (
                    f"what serves cannot stay beside it, which a canary needs ({reason}); --canary none --shadow 0"
                )
                return await self._steps.step(record, Event.FAIL, code=CanaryImpossibleError.code, message=message)
            return await self._steps.step(record, Event.SHARE, variant=variant, percent=self._share_of(record))
        return await self._steps.step(record, Event.DONE, variant=variant)

    def _may_share(self, record: Record) -> bool:
        """Whether a confirmed version serves beside which this one could be tried; a rollback is in a hurry."""
        pointer = self.pointer
        return self.active is not None and pointer is not None and not pointer.trial and not record.local

    def _share_of(self, record: Record) -> float:
        """Return the share to begin with: after a restart the one that was held, since those before are earned."""
        shares = self._course.shares
        return record.percent if record.percent in shares else shares[0]

    async def _missing_beside(self) -> str:
        """Return why what serves does not answer beside the candidate: memory may hold one of them only."""
        if self.active is None or self.active.evidence().ready:
            return ""
        try:
            await self.active.self_test()
        except AgentError as error:
            return str(error)
        return ""

    async def _canary(self, record: Record) -> Record:
        """Watch the candidate at its share; then it gets the next, or everything."""
        candidate, serving = self._candidate, self.active
        if candidate is None or serving is None:
            return await self._steps.step(record, Event.RESUME)
        self.candidate_version = record.version
        outcome = await watch_share(
            candidate,
            serving,
            record.percent,
            self._course,
            config=self._config,
            host=self._host,
            clock=self._clock,
            interrupted=lambda: self._end_text(record) or self._revoked(record.digest),
        )
        evidence = (*record.evidence, outcome.evidence)
        if reason := self._revoked(record.digest):
            self._host.end_try(candidate)
            message = revoked_text(record.version, reason)
            return await self._steps.step(record, Event.FAIL, code=PolicyError.code, message=message, evidence=evidence)
        if outcome.judgement is None:
            return replace(record, evidence=evidence)  # given up by whoever goes by the states
        if outcome.judgement.verdict is Verdict.ROLL_BACK:
            code = _UNDECIDED if outcome.judgement.undecided else CanaryFailedError.code
            return await self._steps.step(
                record, Event.FAIL, code=code, message=outcome.judgement.reason, evidence=evidence
            )
        following = next((share for share in self._course.shares if share > record.percent), None)
        if following is None:
            return await self._steps.step(record, Event.DONE, evidence=evidence)
        return await self._steps.step(record, Event.SHARE, percent=following, evidence=evidence)

    async def _cut_over(self, record: Record) -> Record:
        if self._candidate is not None and self._bundle is not None:
            confirmed = self.pointer.confirmed if self.pointer is not None else None
            active = target_of(self._bundle, self._state_dir)
            if record.local and self.pointer is not None:
                confirmed = None if self.pointer.trial else self.pointer.active
            try:
                on_trial = not record.local
                self._point(
                    Pointer(slot=self.slot, active=active, previous=confirmed, trial=on_trial, running=on_trial)
                )
            except (AgentError, OSError) as error:
                return await self._steps.step(record, Event.FAIL, code=PointerFailedError.code, message=str(error))
            named = {active.digest, confirmed.digest if confirmed is not None else ""}
            self._interfaces[active.digest] = self._bundle.interface
            self._interfaces = {digest: known for digest, known in self._interfaces.items() if digest in named}
            self._trial_began, self.candidate_version = self._candidate.evidence(), ""
            replaced, trusted = self._host.activate(self.slot, self._candidate), self._loaded
            self.active, self._candidate, self.held_until = self._candidate, None, None
            self._loaded = record.digest
            if self._before is None and confirmed is not None and trusted == confirmed.digest:
                self._before = replaced
            elif replaced is not None:
                await self._host.retire(replaced)  # a version that was itself on trial
        return await self._steps.step(record, Event.DONE)

    async def _probation(self, record: Record) -> Record:
        """Watch the version serve; probe an idle one with its own golden inputs."""
        pointer = self.pointer
        if record.local or (pointer is not None and not pointer.trial and pointer.active.digest == record.digest):
            return await self._confirm(record, "it was confirmed before")  # here or by the pointer, before a stop
        if self.active is None:
            return await self._steps.step(record, Event.FAIL, code=BootFailedError.code, message="it is not loaded")
        before = self._before.evidence() if self._before is not None else None
        if before is not None:  # of all its answers the last minutes' tell how long they take
            before = replace(before, latency=before.recent)
        began, first = self._clock.monotonic(), self._trial_began or Evidence()
        least = samples_min(self._config.probation_calls_min)
        unknown = before is not None and before.recent.total < least  # how long answers took, as after a restart
        probe_s = max(_TRIAL_POLL_S, self._config.probation_s / max(1, self._config.probation_calls_min) / 2)
        while True:
            elapsed_s, shown = self._clock.monotonic() - began, self.active.evidence().since(first)
            judgement = judge(shown, elapsed_s, self._config, before=before)
            if self._doubt is not None or judgement.late or (unknown and shown.latency.total >= least):
                unknown = False
                judgement = self._looked_at_again(judgement)
                if self._doubt is None:  # its answers from now on count
                    first = replace(first, latency=self.active.evidence().latency)
            if judgement.verdict is not Verdict.WAIT:
                found = {**summary(shown, before, elapsed_s, 100.0), "verdict": judgement.reason}
                record = replace(record, evidence=(*record.evidence, found))
            if judgement.verdict is Verdict.CONFIRM:
                return await self._confirm(record, judgement.reason)
            if judgement.verdict is Verdict.ROLL_BACK:
                return await self._steps.step(record, Event.FAIL, code=ProbationError.code, message=judgement.reason)
            if reason := self._revoked(record.digest):
                message = revoked_text(record.version, reason)
                return await self._steps.step(record, Event.FAIL, code=PolicyError.code, message=message)
            end = self._ending(record)
            previous = self.pointer.previous if self.pointer is not None else None
            if end is not None and (previous is not None or self.leaving):
                return await self._steps.step(
                    record, Event.SUPERSEDE, code=SUPERSEDED, message=f"{end.message} while on trial"
                )
            await probe_if_idle(self.active, self._clock, probe_s)

    def _looked_at_again(self, judgement: Judgement) -> Judgement:
        """Return the verdict about a version that answers late, or did: both versions are asked the same first."""
        if judgement.verdict is Verdict.ROLL_BACK and not judgement.late:
            return judgement  # something else speaks against it
        if self._doubt is None:
            if self._before is None:
                return judgement
            self._doubt = Doubt(self._before, judgement.reason, config=self._config, host=self._host, clock=self._clock)
        settled = self._doubt.settled()
        if settled:
            return Judgement(verdict=Verdict.ROLL_BACK, reason=settled)
        if settled is not None:
            self._end_doubt()
        return Judgement(verdict=Verdict.WAIT)

    def _end_doubt(self) -> None:
        doubt, self._doubt = self._doubt, None
        if doubt is not None:
            doubt.end()

    async def _confirm(self, record: Record, reason: str) -> Record:
        if self.pointer is not None and self.pointer.trial:
            self._point(replace(self.pointer, trial=False, starts_in_trial=0, running=False))
        await self._journal.forgive(self.model, record.digest)
        await self._journal.note_served(self.model, record.digest)
        if self.active is not None:
            self._host.confirm(self.active)
        record = await self._steps.step(record, Event.DONE, message=reason)
        before, self._before = self._before, None
        if before is not None:
            await self._host.retire(before)
        return record

    async def _roll_back(self, record: Record) -> Record:
        """Pointer first, then requests, then memory; only then is the version remembered as bad: none that is loads."""
        fault, pointer = "", self.pointer
        bad = record.code not in _BLAMELESS
        if pointer is not None and pointer.trial:  # else it was done before a restart
            fault = await self._return_to(pointer.previous, record, stops=bad)
        condemns = (record.message or record.code) if bad else ""
        if fault:
            return await self._steps.step(record, Event.FAIL, condemns=condemns, message=f"{record.message}; {fault}")
        return await self._steps.step(record, Event.DONE, condemns=condemns)

    async def _return_to(self, previous: Target | None, record: Record, *, stops: bool) -> str:
        """Leave the version on trial for ``previous``, which is brought up later if it cannot be now.

        Args:
            previous: The confirmed version; ``None``: there is none.
            record: Of the deployment that is undone.
            stops: What is left may not serve on, although nothing takes its place.

        Returns:
            Why ``previous`` does not serve; empty if it does.

        Raises:
            AgentError, OSError: the pointer cannot be written now; nothing has changed.
        """
        failed, fault = self.active, ""
        if previous is None:
            self._pointers.remove(self.slot)
            self.pointer, self.active, self.held_until = None, None, None
        else:
            self._point(Pointer(slot=self.slot, active=previous))
            try:
                if self._before is not None:
                    self._host.activate(self.slot, self._before)
                    self.active, self._before = self._before, None
                    self._loaded = previous.digest
                else:
                    self.active = await self._bring_up(previous)
            except (AgentError, OSError) as error:
                fault = f"the rollback failed too: {error}"
                if stops:
                    self.active = None
        if failed is not None and failed is not self.active:
            await self._host.retire(failed)
        if self.active is None:
            reason = "; ".join(filter(None, (record.message, fault)))
            self._host.expect(self.slot, f"version {record.version} was rolled back: {reason}")
        return fault

    # Inside

    def _point(self, pointer: Pointer) -> Pointer:
        self._pointers.write(pointer)
        self.pointer, self._instead = pointer, None
        return pointer

    async def _discard_candidate(self) -> None:
        candidate, self._candidate, self._bundle = self._candidate, None, None
        if candidate is not None:
            await self._host.retire(candidate)
