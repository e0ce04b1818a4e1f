"""The device's standing connection to its broker: announce, drain the outbox, hear commands, come back.

A broker that is black-holed, refuses or lies is the normal case and is never felt elsewhere: this component waits,
with growing random delays, and everything to be said waits in the outbox. A message leaves the outbox only when the
broker accepted it for somebody: "no matching subscribers" means that it was not delivered.

Absent on purpose: bytes and keepalive (``session.py``), what commands do (``commands.py``).
"""

from __future__ import annotations

import asyncio
import hashlib
import random
from collections.abc import Callable, Sized
from dataclasses import dataclass, field
from typing import Final

from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties

from agent.backoff import Backoff
from agent.clock import Clock
from agent.config import TelemetryConfig
from agent.errors import LinkError
from agent.log import get_logger
from agent.metrics import Metrics
from agent.telemetry import payloads
from agent.telemetry.dial import Dialler, properties
from agent.telemetry.orders import UNACKNOWLEDGED_MAX
from agent.telemetry.outbox import Outbox
from agent.telemetry.payloads import Stamper
from agent.telemetry.presence import Presence
from agent.telemetry.rows import Row
from agent.telemetry.session import FAILURE, NO_SUBSCRIBERS, Identity, MqttSession, Received
from agent.telemetry.topics import GAP_EXPIRY_S, GAP_TOPIC, STREAMS, Topics

_HOLD_FIRST_S: Final = 0.5  # a topic without subscribers is left alone for a growing time
_HOLD_CAP_S: Final = 30.0
_HOLDS_MAX: Final = 64  # topics; reply topics come from outside
_PACKET_OVERHEAD_BYTES: Final = 512  # topic and properties
# The broker's state, not the message, is at fault: not authorized, quota exceeded. Such messages wait.
_BROKER_FAULTS: Final = frozenset({0x87, 0x97})
_NOT_COUNTED: Final = 0

_log = get_logger("telemetry.link")


@dataclass(slots=True)
class _Hold:
    """A topic that nobody listens to, or that we may not write."""

    backoff: Backoff
    until: float = 0.0


@dataclass(slots=True)
class _Drain:
    """What one session has out and got back."""

    in_flight: set[tuple[str, int]] = field(default_factory=set)  # epoch, row
    delivered: list[int] = field(default_factory=list)
    refused: list[tuple[int, int, str]] = field(default_factory=list)  # row, refusals allowed, reason
    epoch: str = ""
    credit: float = 0.0  # messages that the rate allows now
    credit_at: float = 0.0
    held_until: float | None = None  # when the first topic that the last exchange left out may be tried again

    @property
    def unsettled(self) -> bool:
        """Tell whether the outbox does not know yet of an answer."""
        return bool(self.delivered or self.refused)


class MqttLink:
    """The supervised link; ``run`` never ends, whatever the broker does.

    Args:
        config: Address, bounds and times.
        topics: Of this device.
        outbox: Drained as long as there is a connection.
        presence: The birth message and the ``reported`` document.
        stamper: Stamps both.
        clock: Monotonic seconds.
        metrics: The link's state and counters.
        on_command: Hears each message on a command topic; must not block or raise.
        rng: Spreads the fleet's reconnects.
        new_sid: Names a connection; must not repeat.
    """

    name = "telemetry.link"

    def __init__(
        self,
        config: TelemetryConfig,
        *,
        topics: Topics,
        outbox: Outbox,
        presence: Presence,
        stamper: Stamper,
        clock: Clock,
        metrics: Metrics,
        on_command: Callable[[Received], None],
        rng: random.Random,
        new_sid: Callable[[], str],
    ) -> None:
        self._config = config
        self._topics = topics
        self._outbox = outbox
        self._presence = presence
        self._stamper = stamper
        self._clock = clock
        self._on_command = on_command
        self._rng = rng
        self._new_sid = new_sid
        self._dialler = Dialler(config, receive_max=UNACKNOWLEDGED_MAX)
        self._properties = _stream_properties()
        self._holds: dict[str, _Hold] = {}
        self._work = asyncio.Event()  # an answer came, or a message
        self._news = False  # a message came
        self.connected = False
        self.last_error = ""
        self._sent = metrics.counter("inferd_mqtt_acknowledged", "Messages by the broker's answer", ("answer",))
        self._connects = metrics.counter("inferd_mqtt_connections", "Connections that the broker accepted")
        self._losses = metrics.counter("inferd_mqtt_losses", "Connections and attempts that failed")
        metrics.gauge("inferd_mqtt_connected", "1 while the broker is connected", (), lambda: [((), self.connected)])

    async def run(self) -> None:
        """Stay connected until cancelled; then say goodbye, within ``flush_timeout_s``."""
        backoff = Backoff(first_s=self._config.reconnect_first_s, cap_s=self._config.reconnect_cap_s, rng=self._rng)
        await self._clock.sleep(spread_s(self._topics.device, self._config.first_connect_spread_s))
        while True:
            started = self._clock.monotonic()
            try:
                await self._connect_once()
            except* (LinkError, OSError) as group:
                self._note_loss(group)
            if self._clock.monotonic() - started > self._config.stable_after_s:
                backoff.reset()
            await self._clock.sleep(backoff.next())

    async def _connect_once(self) -> None:
        sid = self._new_sid()
        identity = Identity(
            client_id=f"inferd-{self._topics.tenant}-{self._topics.device}",
            will_topic=self._topics.status,
            will_payload=payloads.will(sid=sid),
            will_delay_s=self._config.will_delay_s,
        )
        session = MqttSession(self._config, identity, self._clock, self._on_command)
        drain = _Drain(credit_at=self._clock.monotonic())
        try:
            await session.open(self._dialler)
            try:
                async with asyncio.TaskGroup() as group:
                    group.create_task(session.pump(), name="telemetry.pump")
                    group.create_task(self._converse(session, sid, drain), name="telemetry.converse")
            except asyncio.CancelledError:
                await self._say_goodbye(session, sid, drain)
                raise
        finally:
            self.connected = False
            session.close()
            self._outbox.give_back()

    async def _converse(self, session: MqttSession, sid: str, drain: _Drain) -> None:
        """Announce ourselves, then keep telling, as long as the session lasts."""
        await session.ready()
        session.subscribe(self._topics.commands, self._topics.rebirth)
        self.connected, self.last_error = True, ""
        self._connects.add()
        _log.info("connected", host=self._config.host, port=self._config.port, sid=sid)
        async with asyncio.TaskGroup() as group:
            group.create_task(self._announce(session, sid), name="telemetry.announce")
            group.create_task(self._drain(session, drain), name="telemetry.drain")

    async def _announce(self, session: MqttSession, sid: str) -> None:
        """Publish the birth message and ``reported`` now and after each change, not too often."""
        changed = asyncio.Event()
        births, digest = -1, ""
        with self._presence.watched(changed.set):
            while True:
                changed.clear()
                if births != self._presence.births_asked:
                    births, digest = self._presence.births_asked, ""
                    birth = payloads.birth(self._stamper.stamp(), sid=sid, description=self._presence.describe())
                    session.publish(self._topics.status, birth, self._properties["status"], self._count, retain=True)
                document = self._presence.document(self._stamper.stamp())
                if document is not None and digest != self._presence.digest:
                    digest = self._presence.digest
                    session.publish(
                        self._topics.reported, document, self._properties["status"], self._count, retain=True
                    )
                await self._clock.sleep(self._config.reported_interval_s)
                await changed.wait()

    # The outbox.

    async def _drain(self, session: MqttSession, drain: _Drain) -> None:
        with self._outbox.watched(self._note_news):
            while True:
                self._work.clear()
                self._news = False
                await self._exchange(session, drain)
                await self._wait_for_work(session, drain)

    def _note_news(self) -> None:
        self._news = True
        self._work.set()

    async def _exchange(self, session: MqttSession, drain: _Drain) -> int:
        """Settle what came back, send what the window and the rate allow; return how much was sent."""
        delivered, drain.delivered = drain.delivered, []
        refused, drain.refused = drain.refused, []
        room = self._window(session) - len(drain.in_flight)
        limit = min(room, self._credit(drain))
        held, drain.held_until = self._held()
        if limit <= 0 and not delivered and not refused:
            return 0
        rows = await self._outbox.exchange(
            epoch=drain.epoch,
            delivered=delivered,
            refused=refused,
            limit=limit,
            held=held,
        )
        for row in rows:
            drain.epoch = row.epoch
            drain.in_flight.add((row.epoch, row.id))
            self._send(session, drain, row)
        drain.credit -= len(rows)
        return len(rows)

    def _send(self, session: MqttSession, drain: _Drain, row: Row) -> None:
        if session.packet_bytes_max and len(row.payload) + _PACKET_OVERHEAD_BYTES > session.packet_bytes_max:
            self._answered(drain, row, 0x95)
            return
        about = self._properties.get(row.stream, self._properties["res"])
        if row.correlation is not None:
            about = properties(PacketTypes.PUBLISH, ContentType="application/json", CorrelationData=row.correlation)
        topic = row.topic or self._topics.up(row.stream)
        session.publish(topic, row.payload, about, lambda reason: self._answered(drain, row, reason))

    def _answered(self, drain: _Drain, row: Row, reason: int) -> None:
        """Note the broker's verdict; the drain settles it with the outbox."""
        self._count(reason)
        drain.in_flight.discard((row.epoch, row.id))
        self._work.set()
        if row.epoch != drain.epoch:
            return  # the file it came from was replaced
        topic = row.topic or row.stream
        if reason == NO_SUBSCRIBERS:
            self._hold(topic)
            drain.refused.append((row.id, _UNHEARD.get(row.stream) or _NOT_COUNTED, "unheard"))
        elif reason in _BROKER_FAULTS:
            self._hold(topic)
            drain.refused.append((row.id, _NOT_COUNTED, "refused"))
        elif reason >= FAILURE:
            self._hold(topic)
            too_large = reason == 0x95
            bound = 1 if too_large else self._config.outbox.refusals_max
            drain.refused.append((row.id, bound, "too_large" if too_large else "refused"))
        else:
            self._holds.pop(topic, None)
            drain.delivered.append(row.id)

    def _hold(self, topic: str) -> None:
        now = self._clock.monotonic()
        if len(self._holds) > _HOLDS_MAX:
            self._holds = {name: hold for name, hold in self._holds.items() if hold.until > now}
        hold = self._holds.setdefault(topic, _Hold(Backoff(first_s=_HOLD_FIRST_S, cap_s=_HOLD_CAP_S, rng=self._rng)))
        if hold.until <= now:  # several rows of one window come back together
            hold.until = now + hold.backoff.next()

    def _held(self) -> tuple[frozenset[str], float | None]:
        """Return the topics to leave alone now, and when the first of them may be tried again."""
        now = self._clock.monotonic()
        holds = {topic: hold.until for topic, hold in self._holds.items() if hold.until > now}
        return frozenset(holds), min(holds.values(), default=None)

    def _credit(self, drain: _Drain) -> int:
        now, rate = self._clock.monotonic(), self._config.outbox.drain_rows_per_s_max
        drain.credit = min(drain.credit + (now - drain.credit_at) * rate, self._config.outbox.inflight_max)
        drain.credit_at = now
        return int(drain.credit)

    async def _wait_for_work(self, session: MqttSession, drain: _Drain) -> None:
        """Wait for new messages, for half of a full window to come back, or until a held topic or the rate allows more.

        Acknowledgements are settled several at a time: each settling is a trip to the outbox's thread.
        """
        # By what the exchange left out, not by what is held now: a hold that ran out meanwhile is due at once.
        waits = [] if drain.held_until is None else [max(0.0, drain.held_until - self._clock.monotonic())]
        if drain.credit < 1:
            waits.append((1 - drain.credit) / self._config.outbox.drain_rows_per_s_max)
        half = self._window(session) // 2
        try:
            async with asyncio.timeout(min(waits) if waits else None):
                while not self._news and not (drain.unsettled and len(drain.in_flight) <= half):
                    self._work.clear()
                    await self._work.wait()
        except TimeoutError:
            return

    def _window(self, session: MqttSession) -> int:
        return min(self._config.outbox.inflight_max, session.window)

    # Odds and ends of a session's life.

    async def _say_goodbye(self, session: MqttSession, sid: str, drain: _Drain) -> None:
        """Settle what was acknowledged, send what is left, say that we stopped; as far as the time allows."""
        if not self.connected:
            return
        try:
            async with asyncio.timeout(self._config.flush_timeout_s):
                while await self._exchange(session, drain) or drain.in_flight:
                    await session.pump_until(_shrinks(drain.in_flight))
                acknowledged: list[int] = []
                session.publish(
                    self._topics.status,
                    payloads.stopped(self._stamper.stamp(), sid=sid),
                    self._properties["status"],
                    acknowledged.append,
                    retain=True,
                )
                await session.pump_until(lambda: bool(acknowledged))
                session.disconnect()
                await session.pump()
        except (TimeoutError, LinkError):
            return

    def _count(self, reason: int) -> None:
        self._sent.add((_ANSWERS.get(reason, f"0x{reason:02x}"),))

    def _note_loss(self, group: BaseExceptionGroup[LinkError | OSError]) -> None:
        self._losses.add()
        first: BaseException = group
        while isinstance(first, BaseExceptionGroup):
            first = first.exceptions[0]
        reason = str(first) or type(first).__name__
        if reason != self.last_error:  # the same again and again is one fact
            _log.warning("no broker; telemetry waits in the outbox", reason=reason, host=self._config.host)
        self.last_error = reason


def _shrinks(things: Sized) -> Callable[[], bool]:
    before = len(things)
    return lambda: len(things) < before


def spread_s(device: str, spread_s_max: float) -> float:
    """Return how long this device waits before its first connect: the same at each start, even over a fleet."""
    share = int.from_bytes(hashlib.sha256(device.encode()).digest()[:4], "big") / 2**32
    return share * spread_s_max


_ANSWERS: Final = {0: "accepted", NO_SUBSCRIBERS: "no_subscribers"}
_UNHEARD: Final = {spec.name: spec.unheard_max for spec in STREAMS}


def _stream_properties() -> dict[str, Properties]:
    """Return one set of properties per stream, made once: packing is cheap, making is not."""
    expiry = {spec.name: spec.expiry_s for spec in STREAMS} | {GAP_TOPIC: GAP_EXPIRY_S}
    made = {
        name: properties(PacketTypes.PUBLISH, ContentType="application/json", MessageExpiryInterval=seconds)
        for name, seconds in expiry.items()
    }
    made["status"] = properties(PacketTypes.PUBLISH, ContentType="application/json")
    return made
