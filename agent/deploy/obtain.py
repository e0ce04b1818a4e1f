"""Getting a deployment's bytes: from VALIDATING to STAGED, or to the wait for a store that cannot be reached.

One run of the trust child validates, fetches and verifies; its progress is followed here, state by state. A local
deployment finds its version on the box and checks every byte again. Nothing here changes what serves.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import replace
from typing import Final

from agent.backoff import Backoff
from agent.clock import wait_up_to
from agent.deploy.means import Means
from agent.deploy.pointer import Pointer, target_of
from agent.deploy.ports import Bundle, Progress
from agent.deploy.revocation import revoked_text
from agent.deploy.slots import model_of
from agent.deploy.state import FINAL, STEPS_BEFORE_CUTOVER_MAX, Event, Record, State
from agent.deploy.steps import Steps
from agent.errors import (
    AgentError,
    BudgetError,
    BundleError,
    DiskFullError,
    OfflineError,
    PolicyError,
    RefusedBeforeError,
    StoreError,
)
from agent.log import get_logger

_log = get_logger("deploy")
_LOOK_S: Final = 5.0  # while a long wait could be ended by another wish
_PATIENT_STEPS: Final = STEPS_BEFORE_CUTOVER_MAX - 8  # from here on a deployment is not interrupted again


class Obtainer:
    """Gets one slot's bundles.

    A deployment that is to be given up is left to whoever calls.

    Args:
        closed: Why no bytes may be fetched now, empty if they may.
    """

    def __init__(self, slot: str, means: Means, steps: Steps, *, closed: Callable[[Record], str]) -> None:
        self._slot = slot
        self._model = model_of(slot)
        self._config, self._clock, self._state_dir = means.config, means.clock, means.state_dir
        self._store, self._journal = means.store, means.journal
        self._refusals = means.refusals
        self._ending, self._revoked, self._make_room = means.ending, means.revoked, means.make_room
        self._steps = steps
        self._closed = closed
        self._medium = ""  # a folder that a waiting deployment may be taken from
        self._medium_came = asyncio.Event()
        self._retry = Backoff(first_s=1.0, cap_s=means.config.fetch_retry_cap_s)
        self._not_before = 0.0  # monotonic; the store is not asked earlier

    def reset(self) -> None:
        """Another deployment begins: what the one before waited for is over."""
        self._not_before = 0.0
        self._medium = ""
        self._retry.reset()
        self._steps.defer_progress()

    def offer(self, medium: str) -> None:
        """Let a deployment that waits for its store be taken from the folder ``medium``."""
        self._medium = medium
        self._medium_came.set()

    @property
    def offered(self) -> bool:
        """Whether a medium was offered and not tried yet."""
        return bool(self._medium)

    async def obtain(self, record: Record, pointer: Pointer | None, *, serves: bool) -> tuple[Record, Bundle | None]:
        """Do the work of VALIDATING, FETCHING and VERIFYING.

        Args:
            record: The deployment.
            pointer: What is active now.
            serves: It is also loaded.

        Returns:
            The record where it went, and the bundle if that is STAGED.
        """
        if not record.local:
            return await self._from_store(record, pointer, serves=serves)
        try:
            return await self._from_disk(record, pointer)
        except BundleError as error:
            return await self._failed(record, error, record.medium), None

    async def wait(self, record: Record) -> Record:
        """Do the work of FETCH_WAIT: ask again and again until the store answers; one transition however long.

        How long that was is written with each answer that did not come, so a restart forgets one wait at most.
        """
        if await self._waited_for_budget(record):
            return record if self._ending(record) else await self._again(record)
        if record.offline_s >= self._config.fetch_limit_s:
            message = f"the store stayed out of reach for {record.offline_s:.0f} s of waiting"
            return await self._steps.step(record, Event.FAIL, code=OfflineError.code, message=message)
        since, before_s = self._clock.monotonic(), record.offline_s
        await self._pause(record, since + 0.1 + self._retry.next())
        if self._ending(record):
            return record
        medium, failure = record.medium or self._medium, None
        try:
            await self._store.resolve(
                team=record.team, name=record.model, version=record.wanted, channel=record.channel, medium=medium
            )
        except AgentError as error:
            failure = error
        record = replace(record, offline_s=before_s + self._clock.monotonic() - since)
        if failure is None:
            return await self._again(record)
        record = await self._failed(record, failure, medium)
        return await self._steps.again(record) if record.state is State.FETCH_WAIT else record

    async def _again(self, record: Record) -> Record:
        if reason := self._closed(record):
            return await self._steps.step(record, Event.WAIT, code="", message=reason)
        return await self._steps.step(record, Event.DONE, code="", message="")

    async def kept(self, record: Record) -> Bundle | None:
        """Return a STAGED deployment's bundle from disk, every byte checked again; ``None``: it is to be fetched again.

        Raises:
            AgentError: the disk could not be read.
        """
        for kept in (await self._store.inventory()).versions:
            if (kept.team, kept.name) == (record.team, self._model) and record.digest.startswith(kept.digest):
                try:
                    return await self._store.check(kept.path)
                except BundleError as error:
                    _log.warning("what was staged does not hold", slot=self._slot, reason=str(error))
        return None

    async def _from_disk(self, record: Record, pointer: Pointer | None) -> tuple[Record, Bundle | None]:
        known = [target for target in (pointer and pointer.previous, pointer and pointer.active) if target]
        known += [target_of(kept, self._state_dir) for kept in (await self._store.inventory()).versions]
        model = (record.team, self._model, record.wanted)
        target = next((item for item in known if (item.team, item.name, item.version) == model), None)
        if target is None:
            raise BundleError(f"version {record.wanted} is not kept on this box")
        found = {"version": target.version, "digest": target.digest}
        if pointer is not None and target is pointer.active and not pointer.trial:
            return await self._steps.step(record, Event.ALREADY, **found), None
        bundle = await self._store.check(self._state_dir / target.path)
        if reason := self._revoked(bundle.digest):
            raise PolicyError(revoked_text(target.version, reason))
        return await self._staged(record, bundle), bundle

    async def _from_store(
        self, record: Record, pointer: Pointer | None, *, serves: bool
    ) -> tuple[Record, Bundle | None]:
        confirmed = pointer.active.digest if pointer is not None and not pointer.trial and serves else ""
        progress: asyncio.Queue[Progress | None] = asyncio.Queue()
        medium = record.medium or self._medium
        trouble: Exception | None = None
        try:
            async with asyncio.TaskGroup() as group:
                fetch = group.create_task(self._fetch(record, medium, progress), name=f"fetch {self._slot}")
                while (seen := await progress.get()) is not None:
                    record = await self._follow(record, seen, confirmed)
                    if record.state in FINAL or self._ending(record):
                        fetch.cancel()
                        return record, None
                    if (
                        record.state is State.FETCHING
                        and record.step < _PATIENT_STEPS
                        and (reason := self._closed(record))
                    ):
                        fetch.cancel()
                        return await self._steps.step(record, Event.WAIT, message=reason), None
        except* (AgentError, OSError) as errors:  # of the journal's disk; whoever keeps the slot tries again
            trouble = errors.exceptions[0]
        if trouble is not None:
            raise trouble
        outcome = fetch.result()
        if isinstance(outcome, AgentError):
            return await self._failed(record, outcome, medium), None
        return await self._staged(record, outcome), outcome

    async def _staged(self, record: Record, bundle: Bundle) -> Record:
        while record.state is not State.STAGED:
            record = await self._steps.step(record, Event.DONE, version=bundle.version, digest=bundle.digest)
        return record

    async def _fetch(
        self, record: Record, medium: str, progress: asyncio.Queue[Progress | None]
    ) -> Bundle | AgentError:
        """Return the bundle or why there is none; ``None`` ends the progress."""
        try:
            return await self._store.fetch(
                team=record.team,
                name=record.model,
                version=record.wanted,
                channel=record.channel,
                on_progress=progress.put_nowait,
                medium=medium,
            )
        except AgentError as error:
            return error
        finally:
            progress.put_nowait(None)

    async def _follow(self, record: Record, seen: Progress, confirmed: str) -> Record:
        """``confirmed``: the digest that serves, empty if none does or it is on trial."""
        if seen.phase == "resolved" and record.state is State.VALIDATING:
            found = {"version": seen.version, "digest": seen.digest}
            if confirmed == seen.digest:
                return await self._steps.step(record, Event.ALREADY, **found)
            refused = await self._journal.refused(self._model, seen.digest)
            if refused and not record.force:
                message = f"version {seen.version} failed here before: {refused}; deploy it with force to try again"
                code = RefusedBeforeError.code
                return await self._steps.step(record, Event.REJECT, code=code, message=message, **found)
            return await self._steps.step(record, Event.DONE, **found, bytes_total=seen.bytes_total)
        if seen.phase == "progress":
            record = replace(record, bytes_done=seen.bytes_done, bytes_total=seen.bytes_total, rate_bps=seen.rate_bps)
            self._steps.progress(record)
        elif seen.phase == "verifying" and record.state is State.FETCHING:
            return await self._steps.step(record, Event.DONE)
        return record

    async def _failed(self, record: Record, error: AgentError, medium: str) -> Record:
        """``medium``: what was asked. One that was offered meanwhile is still to be asked."""
        cause = {"code": error.code, "message": str(error)}
        if medium == self._medium:
            self._medium = ""
        if isinstance(error, BundleError):
            version = record.version or record.wanted
            self._refusals.bundle(error, team=record.team, name=self._model, version=version, source=medium)
        if medium and not record.medium:  # it was only offered: the store is waited for again
            _log.warning("medium is of no use", slot=self._slot, medium=medium, **cause)
            return record if record.state is State.FETCH_WAIT else await self._offline(record, cause)
        if isinstance(error, BundleError):
            return await self._steps.step(record, Event.REJECT, **cause)
        if not isinstance(error, StoreError) or not error.retryable:
            return await self._steps.step(record, Event.FAIL, **cause)
        if isinstance(error, DiskFullError) and not await self._room_was_made(record):
            return await self._steps.step(record, Event.FAIL, **cause)
        if record.state is State.FETCH_WAIT:
            return record
        if isinstance(error, BudgetError):
            if record.step >= _PATIENT_STEPS:
                return await self._steps.step(record, Event.FAIL, **cause)
            self._not_before = self._clock.monotonic() + error.retry_after_s
        return await self._offline(record, cause)

    async def _offline(self, record: Record, cause: dict[str, str]) -> Record:
        return await self._steps.step(record, Event.OFFLINE, **cause)

    async def _room_was_made(self, record: Record) -> bool:
        """Let go what nothing needs, but nothing of this deployment."""
        try:
            offered = await self._store.resolve(
                team=record.team, name=self._model, version=record.wanted, channel=record.channel, medium=record.medium
            )
            digest = offered.digest
        except AgentError:
            digest = record.digest
        return bool(digest) and await self._make_room(frozenset({digest}))

    async def _until_medium(self, wait_s: float) -> bool:
        """Wait so long, or until a medium is offered; return whether one was."""
        came = await wait_up_to(self._medium_came, wait_s, self._clock)
        self._medium_came.clear()
        return came

    async def _waited_for_budget(self, record: Record) -> bool:
        """Wait until more bytes may be fetched, a medium comes, or another wish won; ``False``: nothing to wait for."""
        waits = self._clock.monotonic() < self._not_before
        await self._pause(record, self._not_before)
        self._not_before = 0.0
        return waits

    async def _pause(self, record: Record, until_s: float) -> None:
        """Wait until then (monotonic), until a medium comes, or until the deployment is to be given up."""
        while (left_s := until_s - self._clock.monotonic()) > 0 and not self._ending(record):
            if await self._until_medium(min(left_s, _LOOK_S)):
                return
