"""Fleet commands: heard, verified, recorded, acknowledged, carried out, answered. In that order.

A message is acknowledged to the broker only once its record is on disk; a restart in between hears it again, and a
restart in the middle of a command carries it out again under the same id, which the ``Commander`` recognises. A
command that was cut short too often is given up. Replies are rows of the outbox, so they survive an outage too.

Absent on purpose: cryptography (the trust child's), and what a command means (the ``Commander``'s).
"""

from __future__ import annotations

import asyncio
import hashlib
import sqlite3
from collections import deque
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Final, Protocol

import msgspec

from agent.clock import Clock
from agent.config import TelemetryConfig
from agent.errors import AgentError, CommandError, CommandExpiredError, CommandReplayError, OverloadedError
from agent.events import EventBus, Severity, Stream
from agent.log import get_logger
from agent.metrics import Metrics
from agent.telemetry.journal import CommandJournal, Entry, State, Verdict
from agent.telemetry.orders import (
    CHANGING,
    PAYLOAD_BYTES_MAX,
    READ_ONLY,
    UNACKNOWLEDGED_MAX,
    Order,
    judge,
    parse_request,
)
from agent.telemetry.outbox import Outbox
from agent.telemetry.payloads import Stamper
from agent.telemetry.presence import Presence
from agent.telemetry.session import Received
from agent.telemetry.storage import StoreThread, connect
from agent.telemetry.topics import REPLY, Topics

_VERIFY_TIMEOUT_S: Final = 60.0
_RUNNING_MAX: Final = 64  # many may wait for their time, one for each model
_URGENT_MAX: Final = 8  # of those that end a wait, above it
_URGENT: Final = frozenset({"cancel", "rollback"})
_STARTS_MAX: Final = 10  # crashes in the middle of one command
_PROGRESS_INTERVAL_S: Final = 1.0  # between two progress replies of one command

_log = get_logger("telemetry.commands")


class Verified(Protocol):
    """A command whose signature holds."""

    @property
    def payload(self) -> Mapping[str, Any]: ...

    @property
    def keyid(self) -> str: ...


class Verifier(Protocol):
    """Checks signatures outside this process."""

    async def verify_command(self, envelope: bytes) -> Verified:
        """Return what the envelope says; raise ``AgentError`` if it is not signed by a current operator."""


class Commander(Protocol):
    """Carries out what the fleet asks for."""

    async def execute(
        self, name: str, args: dict[str, Any], command_id: str, on_progress: Callable[[dict[str, Any]], None]
    ) -> dict[str, Any]:
        """Return the result once the command has ended; the same ``command_id`` again continues, never repeats.

        Raises:
            AgentError: refused or failed.
        """


class CommandInbox:
    """The supervised receiver of commands.

    Args:
        path: The journal's database file.
        config: ``commands_per_minute_max``.
        topics: Of this device.
        verifier, commander: See the protocols.
        outbox: Takes the replies.
        presence: Asked to announce itself again on ``rebirth``.
        stamper: Stamps replies and judges expiry.
        events: Hears of refused commands.
        clock: Monotonic seconds.
        metrics: Counts commands by what became of them.
        connector: Opens the database file.
    """

    name = "telemetry.commands"

    def __init__(
        self,
        path: Path,
        config: TelemetryConfig,
        *,
        topics: Topics,
        verifier: Verifier,
        commander: Commander,
        outbox: Outbox,
        presence: Presence,
        stamper: Stamper,
        events: EventBus,
        clock: Clock,
        metrics: Metrics,
        connector: Callable[[Path], sqlite3.Connection] = connect,
    ) -> None:
        self._topics = topics
        self._verifier = verifier
        self._commander = commander
        self._outbox = outbox
        self._presence = presence
        self._stamper = stamper
        self._events = events
        self._clock = clock
        self._journal = StoreThread("telemetry.commands", lambda: CommandJournal(path, connector=connector))
        self._arrived: deque[tuple[Received, float]] = deque()
        self._arrival = asyncio.Event()
        self._running: set[str] = set()
        self._rate = _Rate(config.commands_per_minute_max, clock)
        self._counter = metrics.counter("inferd_commands", "Fleet commands by what became of them", ("name", "status"))

    @asynccontextmanager
    async def opened(self) -> AsyncIterator[CommandInbox]:
        """The journal is open as long as the body runs.

        Raises:
            StateError: the journal can be neither opened nor replaced.
        """
        await self._journal.start()
        try:
            yield self
        finally:
            await self._journal.stop()

    @property
    def carrying_out(self) -> frozenset[str]:
        """The ids of the commands that have not ended."""
        return frozenset(self._running)

    def offer(self, message: Received) -> None:
        """Take a message to look at; never blocks. The broker's own limit keeps unacknowledged ones few."""
        if len(self._arrived) < 2 * UNACKNOWLEDGED_MAX:
            self._arrived.append((message, self._clock.monotonic()))
            self._arrival.set()
        else:
            self._counter.add(("?", "dropped"))

    async def generation(self) -> int:
        """Return the newest accepted generation, 0 before the first command."""
        return await self._journal.call(CommandJournal.generation)

    async def run(self) -> None:
        """Continue what a restart cut short, then take messages in order until cancelled."""
        self._running.clear()
        async with asyncio.TaskGroup() as group:
            for entry in await self._journal.call(CommandJournal.unfinished):
                self._begin(group, entry)
            while True:
                while self._arrived:
                    # Taken out first: whatever breaks on it, the broker still has it, and the next one has its turn.
                    message, arrived = self._arrived.popleft()
                    await self._take(group, message, arrived)
                self._arrival.clear()
                await self._arrival.wait()

    # From a message to a recorded command.

    async def _take(self, group: asyncio.TaskGroup, message: Received, arrived: float) -> None:
        name = self._topics.command_name(message.topic)
        if name is None or message.retain:  # a command is for now; a retained one has been kept for later
            self._counter.add(("?", "ignored"))
            message.acknowledge()
            return
        try:
            await self._consider(group, name, message, arrived)
        except OverloadedError as error:  # a flood: counted, one event a minute, no replies that would fill the outbox
            self._count(name, "dropped")
            self._complain("command.flood", name, error)
        except AgentError as error:
            await self._refuse(name, message, error, None)
        message.acknowledge()

    async def _consider(self, group: asyncio.TaskGroup, name: str, message: Received, arrived: float) -> None:
        if name not in READ_ONLY | CHANGING:
            raise CommandError(f"there is no command {name[:40]!r}")
        if len(message.payload) > PAYLOAD_BYTES_MAX:
            raise CommandError(f"a message of {len(message.payload)} bytes, at most {PAYLOAD_BYTES_MAX} are allowed")
        if not self._rate.allows():
            raise OverloadedError("more commands than this device looks at in a minute")
        request = parse_request(name, message.payload)
        if request is not None:
            await self._look(name, request.args, request.id, message)
            return
        try:
            async with asyncio.timeout(_VERIFY_TIMEOUT_S):
                verified = await self._verifier.verify_command(message.payload)
        except OSError as error:  # too slow, or no process could be started
            raise CommandError(f"the signature could not be checked: {error or 'not in time'}") from error
        try:
            order = self._judge(verified, name, message, arrived)
        except CommandError as error:
            claimed = verified.payload.get("id")
            await self._refuse(name, message, error, claimed if isinstance(claimed, str) else None)
            return
        if name in READ_ONLY:
            await self._look(name, order.args, order.id, message)
        else:
            await self._admit(group, order, verified.keyid, message)

    def _judge(self, verified: Verified, name: str, message: Received, arrived: float) -> Order:
        now, quality = self._stamper.now()
        waited = self._clock.monotonic() - arrived
        return judge(
            dict(verified.payload),
            name=name,
            tenant=self._topics.tenant,
            device=self._topics.device,
            now_s=now,
            quality=quality,
            expiry_left_s=None if message.expiry_s is None else message.expiry_s - waited,
        )

    async def _admit(self, group: asyncio.TaskGroup, order: Order, keyid: str, message: Received) -> None:
        entry = Entry(
            id=order.id,
            digest=hashlib.sha256(msgspec.json.encode(order, order="deterministic")).hexdigest(),
            name=order.name,
            args=order.args,
            reply_topic=self._topics.reply(order.name, message.response_topic),
            correlation=message.correlation,
            received=self._clock.wall(),
            outcome={},
        )
        room = len(self._running) < _RUNNING_MAX + (_URGENT_MAX if order.name in _URGENT else 0)
        verdict, known = await self._journal.call(lambda journal: journal.admit(entry, generation=order.gen, room=room))
        if verdict is Verdict.NEW:
            self._count(order.name, "accepted")
            self._events.emit(
                Stream.AUDIT, f"command.{order.name}", id=order.id, args=order.args, keyid=keyid, generation=order.gen
            )
            await self._reply(order.name, message, order.id, "accepted")
            self._begin(group, entry)
        elif verdict is Verdict.DUPLICATE:
            self._count(order.name, "duplicate")
            await self._reply(
                order.name, message, order.id, "duplicate", result={"state": known.state.value, **known.outcome}
            )
        else:
            await self._refuse(order.name, message, _refusal(verdict, order), order.id)

    async def _look(self, name: str, args: dict[str, Any], command_id: str, message: Received) -> None:
        """Carry out a read-only command at once; it leaves no record."""
        if name == "ping":
            result: dict[str, Any] = {"pong": True}
        elif name == "rebirth":
            self._presence.rebirth()
            result = {}
        else:
            result = await self._commander.execute(name, args, command_id, lambda progress: None)
        self._count(name, "done")
        await self._reply(name, message, command_id, "done", result=result)

    # From a recorded command to its end.

    def _begin(self, group: asyncio.TaskGroup, entry: Entry) -> None:
        self._running.add(entry.id)
        group.create_task(self._carry_out(entry), name=f"telemetry.command.{entry.id}")

    async def _carry_out(self, entry: Entry) -> None:
        starts = await self._journal.call(lambda journal: journal.start(entry.id))
        progress = _Progress(lambda fields: self._tell(entry, {"status": "running", "progress": fields}), self._clock)
        try:
            if starts > _STARTS_MAX:
                raise CommandError(f"given up: cut short {_STARTS_MAX} times")
            result = await self._commander.execute(entry.name, entry.args, entry.id, progress.note)
        except AgentError as error:
            await self._finish(entry, State.FAILED, {"code": error.code, "message": str(error)})
        except asyncio.CancelledError:  # an orderly stop is no crash
            self._journal.post(lambda journal: journal.interrupted(entry.id))
            raise
        else:
            await self._finish(entry, State.DONE, {"result": result})
        finally:
            self._running.discard(entry.id)

    async def _finish(self, entry: Entry, state: State, outcome: dict[str, Any]) -> None:
        # The reply first: its key makes a second one after a cut the same row, while a lost one would stay lost.
        await self._outbox.append(
            REPLY,
            self._about(entry, {"status": state.value, **outcome}),
            key=f"{entry.id}:end",
            topic=entry.reply_topic,
            correlation=entry.correlation,
        )
        await self._journal.call(lambda journal: journal.finish(entry.id, state, outcome))
        self._count(entry.name, state.value)

    def _tell(self, entry: Entry, fields: dict[str, Any]) -> None:
        self._outbox.post(REPLY, self._about(entry, fields), topic=entry.reply_topic, correlation=entry.correlation)

    def _about(self, entry: Entry, fields: dict[str, Any]) -> dict[str, Any]:
        return {"id": entry.id, "name": entry.name, **fields, **self._stamper.stamp()}

    # Answers and notes about a message.

    async def _reply(
        self,
        name: str,
        message: Received,
        command_id: str | None,
        status: str,
        *,
        result: dict[str, Any] | None = None,
        error: AgentError | None = None,
    ) -> None:
        fields: dict[str, Any] = {"id": command_id, "name": name, "status": status}
        if command_id is None:  # nothing in the message is to be believed; the asker knows its digest
            fields["request"] = hashlib.sha256(message.payload).hexdigest()
        if result is not None:
            fields["result"] = result
        if error is not None:
            fields |= {"code": error.code, "message": str(error)}
        await self._outbox.append(
            REPLY,
            {**fields, **self._stamper.stamp()},
            topic=self._topics.reply(name, message.response_topic),
            correlation=message.correlation,
        )

    async def _refuse(self, name: str, message: Received, error: AgentError, command_id: str | None) -> None:
        status = "expired" if isinstance(error, CommandExpiredError) else "refused"
        self._count(name, status)
        self._complain(f"command.{status}", name, error)
        await self._reply(name, message, command_id, status, error=error)

    def _complain(self, event: str, name: str, error: AgentError) -> None:
        minute = f"{self._stamper.boot_id}:{int(self._clock.monotonic() // 60)}"  # one event a minute and kind
        _log.warning("command refused", command=name, code=error.code, reason=str(error))
        self._events.emit(
            Stream.SECURITY,
            event,
            Severity.WARNING,
            key=f"{event}:{error.code}:{minute}",
            command=name[:40],
            code=error.code,
            reason=str(error),
        )

    def _count(self, name: str, status: str) -> None:
        known = name if name in READ_ONLY | CHANGING else "?"
        self._counter.add((known, status))


class _Progress:
    """Passes progress on, a change of its ``state`` always, the rest not more often than somebody could read it."""

    def __init__(self, say: Callable[[dict[str, Any]], None], clock: Clock) -> None:
        self._say = say
        self._clock = clock
        self._said_at = -_PROGRESS_INTERVAL_S
        self._state: Any = None

    def note(self, progress: dict[str, Any]) -> None:
        now = self._clock.monotonic()
        if progress.get("state") != self._state or now - self._said_at >= _PROGRESS_INTERVAL_S:
            self._said_at, self._state = now, progress.get("state")
            self._say(progress)


class _Rate:
    """A token bucket: bursts up to a minute's worth, then evenly."""

    def __init__(self, per_minute: int, clock: Clock) -> None:
        self._per_minute = per_minute
        self._clock = clock
        self._tokens = float(per_minute)
        self._at = clock.monotonic()

    def allows(self) -> bool:
        now = self._clock.monotonic()
        self._tokens = min(self._per_minute, self._tokens + (now - self._at) * self._per_minute / 60)
        self._at = now
        if self._tokens < 1:
            return False
        self._tokens -= 1
        return True


def _refusal(verdict: Verdict, order: Order) -> AgentError:
    if verdict is Verdict.REUSED:
        return CommandReplayError("this id was used by another command")
    if verdict is Verdict.BUSY:
        return CommandError(f"{_RUNNING_MAX} commands are being carried out already")
    return CommandReplayError(f"generation {order.gen} is not above the newest one that was accepted")
