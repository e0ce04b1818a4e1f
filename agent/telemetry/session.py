"""One MQTT 5 connection on the event loop: paho's codec and session, our socket events, every acknowledgement visible.

A session is used once. It keeps no message: what was not acknowledged when it ends is the outbox's to send again, so
there is no second, hidden queue. ``pump`` moves bytes; the other methods only queue them. Promises: nothing here
blocks; a peer that stays silent is noticed; whatever a broker sends ends at worst in a ``LinkError``.

Absent on purpose: what to send (``link.py``), DNS and connect (``dial.py``), reconnecting.
"""

from __future__ import annotations

import asyncio
import socket
import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

from paho.mqtt.client import Client, MQTTMessage
from paho.mqtt.enums import CallbackAPIVersion, MQTTErrorCode, MQTTProtocolVersion
from paho.mqtt.exception import MQTTException
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties
from paho.mqtt.subscribeoptions import SubscribeOptions

from agent.clock import Clock
from agent.config import TelemetryConfig
from agent.errors import LinkError
from agent.log import get_logger
from agent.telemetry.dial import Dialler, properties

NO_SUBSCRIBERS: Final = 0x10
FAILURE: Final = 0x80  # reason codes from here on are refusals

_WINDOW_DEFAULT: Final = 65_535  # MQTT 5, 3.2.2.3.3: no receive maximum means this many
# What paho may raise while it parses a broker's bytes; Source: DECODE_ERRORS in paho's _packet.py.
_PARSER_FAULTS: Final = (struct.error, IndexError, KeyError, ValueError, TypeError, AttributeError, MQTTException)

_log = get_logger("telemetry.session")

Acknowledged = Callable[[int], None]  # receives the PUBACK's reason code


@dataclass(frozen=True, slots=True, kw_only=True)
class Received:
    """A message for us. ``acknowledge`` may be called once, later, and does nothing when the session has ended."""

    topic: str
    payload: bytes
    qos: int
    retain: bool
    response_topic: str | None
    correlation: bytes | None
    expiry_s: int | None  # what is left of the sender's message expiry, as the broker counts it
    acknowledge: Callable[[], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Identity:
    """How a session introduces itself and what is said of it when it vanishes."""

    client_id: str
    will_topic: str
    will_payload: bytes
    will_delay_s: int


class MqttSession:
    """A connection from its first packet to its loss.

    Args:
        config: Keepalive and timeouts.
        identity: Client id and will.
        clock: Monotonic seconds.
        on_message: Hears each received message; must not block or raise.
    """

    def __init__(
        self, config: TelemetryConfig, identity: Identity, clock: Clock, on_message: Callable[[Received], None]
    ) -> None:
        self._config = config
        self._clock = clock
        self._on_message = on_message
        self._loop = asyncio.get_running_loop()
        self._wake = asyncio.Event()
        self._connected: asyncio.Future[None] = self._loop.create_future()
        self._waiting: dict[int, tuple[Acknowledged, float]] = {}  # by packet id: who asked, since when
        self._socket: Any = None
        self._readable = False
        self._writing = False
        self._check_due = False
        self._tick: asyncio.TimerHandle | None = None
        self._heard_at = clock.monotonic()
        self._lost: str | None = None
        self.window = 1  # how many publishes the broker takes unacknowledged
        self.packet_bytes_max: int | None = None  # the largest packet the broker takes
        self._client = self._make_client(identity)

    async def open(self, dialler: Dialler) -> None:
        """Connect the socket and hand it to the loop. ``pump`` must run for anything more to happen.

        Raises:
            LinkError: the broker cannot be reached.
        """
        await dialler.dial(self._client)
        self._socket = self._client.socket()
        if self._socket is None:
            raise LinkError("the connection closed at once")
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._loop.add_reader(self._socket, self._on_readable)
        self._heard_at = self._clock.monotonic()
        self._on_tick()

    async def ready(self) -> None:
        """Wait for the broker's consent.

        Raises:
            LinkError: it refused, or did not answer in ``connect_timeout_s``.
        """
        try:
            async with asyncio.timeout(self._config.connect_timeout_s):
                await asyncio.shield(self._connected)
        except TimeoutError as error:
            raise LinkError(f"the broker did not answer within {self._config.connect_timeout_s:g} s") from error

    async def pump(self) -> None:
        """Move bytes until the connection ends.

        Raises:
            LinkError: always, in the end; the message says how it ended.
        """
        await self.pump_until(lambda: False)

    async def pump_until(self, done: Callable[[], bool]) -> None:
        """Move bytes until ``done()`` or the connection ends.

        Raises:
            LinkError: the connection ended first.
        """
        while True:
            self._serve()
            if self._lost is not None:
                raise LinkError(self._lost)
            if done():
                return
            await self._wake.wait()
            self._wake.clear()

    def publish(
        self, topic: str, payload: bytes, about: Properties, on_ack: Acknowledged, *, retain: bool = False
    ) -> None:
        """Queue a QoS 1 message; ``on_ack`` hears the broker's reason code, or nothing if the session ends before."""
        info = self._client.publish(topic, payload, qos=1, retain=retain, properties=about)
        self._waiting[info.mid] = (on_ack, self._clock.monotonic())

    def subscribe(self, *topics: str) -> None:
        """Queue a QoS 1 subscription that leaves retained messages out; a refusal is logged and nothing is heard."""
        options = SubscribeOptions(qos=1, retainHandling=SubscribeOptions.RETAIN_DO_NOT_SEND)
        self._client.subscribe([(topic, options) for topic in topics])

    def disconnect(self) -> None:
        """Queue an orderly end, which makes the broker forget the will."""
        self._client.disconnect()

    def close(self) -> None:
        """Drop the socket; acknowledgements still to come are not waited for."""
        self._lose("closed")
        if self._tick is not None:
            self._tick.cancel()
        self._forget_socket()
        client_socket = self._client.socket()
        if client_socket is not None:
            client_socket.close()
        if self._connected.done() and not self._connected.cancelled():
            self._connected.exception()  # whether anybody waited for it or not

    # The loop's side.

    def _serve(self) -> None:
        """Read, write and check what is due; one step of the pump."""
        try:
            if self._readable:
                self._readable = False
                self._heard_at = self._clock.monotonic()
                self._client.loop_read()
                self._acknowledge_segments()
                # TLS may hold decrypted bytes that the socket will not announce again.
                while getattr(self._client.socket(), "pending", int)():
                    self._client.loop_read()
            if self._check_due:
                self._check_due = False
                self._client.loop_misc()
            if self._client.want_write():
                self._client.loop_write()
                self._watch_writable(self._client.want_write())
        except _PARSER_FAULTS as error:
            raise LinkError(f"the broker sent something unreadable: {error}") from error

    def _acknowledge_segments(self) -> None:
        # A broker with Nagle's algorithm holds its second small answer until the kernel has acknowledged the first,
        # which Linux may delay by 40 ms; the option lasts for one acknowledgement (tcp(7)).
        if self._socket is not None:
            self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_QUICKACK, 1)

    def _on_readable(self) -> None:
        self._readable = True
        self._wake.set()

    def _on_tick(self) -> None:
        """Keepalive: paho sends the pings; silence and acknowledgements that never come are found here."""
        now, keepalive = self._clock.monotonic(), self._config.keepalive_s
        self._check_due = True
        if now - self._heard_at > keepalive * 1.5 + 1:
            self._lose(f"nothing heard for {now - self._heard_at:.0f} s")
        oldest = min((since for _, since in self._waiting.values()), default=now)
        if now - oldest > keepalive * 2:
            self._lose(f"no acknowledgement for {now - oldest:.0f} s")
        self._wake.set()
        self._tick = self._loop.call_later(keepalive / 4, self._on_tick)

    def _watch_writable(self, wanted: bool) -> None:
        if wanted != self._writing and self._socket is not None:
            self._writing = wanted
            if wanted:
                self._loop.add_writer(self._socket, self._wake.set)
            else:
                self._loop.remove_writer(self._socket)

    def _forget_socket(self) -> None:
        if self._socket is not None:
            self._watch_writable(False)
            self._loop.remove_reader(self._socket)
            self._socket = None

    def _lose(self, reason: str) -> None:
        if self._lost is None:
            self._lost = reason
        if not self._connected.done():
            self._connected.set_exception(LinkError(reason))
        self._wake.set()

    # paho's side: callbacks that only note what happened.

    def _make_client(self, identity: Identity) -> Client:
        client = Client(
            CallbackAPIVersion.VERSION2,
            client_id=identity.client_id,
            protocol=MQTTProtocolVersion.MQTTv5,
            manual_ack=True,
        )
        client.will_set(
            identity.will_topic,
            identity.will_payload,
            qos=1,
            retain=True,
            properties=properties(
                PacketTypes.WILLMESSAGE, WillDelayInterval=identity.will_delay_s, ContentType="application/json"
            ),
        )
        client.max_inflight_messages = _WINDOW_DEFAULT  # the window is kept by the caller
        client.on_connect = self._did_connect
        client.on_disconnect = self._did_disconnect
        client.on_publish = self._did_publish
        client.on_subscribe = self._did_subscribe
        client.on_message = self._did_receive
        client.on_socket_close = self._did_close
        # Set before the dial, this keeps paho from writing by itself; called in the dialling thread first.
        client.on_socket_register_write = self._wants_write
        return client

    def _did_connect(self, _client: Any, _data: Any, _flags: Any, reason: Any, properties: Any) -> None:
        if reason.is_failure:
            self._lose(f"the broker refused us: {reason}")
            return
        self.window = getattr(properties, "ReceiveMaximum", _WINDOW_DEFAULT)
        self.packet_bytes_max = getattr(properties, "MaximumPacketSize", None)
        if not self._connected.done():
            self._connected.set_result(None)

    def _did_disconnect(self, _client: Any, _data: Any, flags: Any, reason: Any, _properties: Any) -> None:
        by_broker = flags.is_disconnect_packet_from_server
        self._lose(f"the broker ended the connection: {reason}" if by_broker else f"connection lost: {reason}")

    def _did_publish(self, _client: Any, _data: Any, packet_id: int, reason: Any, _properties: Any) -> None:
        waiting = self._waiting.pop(packet_id, None)
        if waiting is not None:
            waiting[0](reason.value)

    def _did_subscribe(self, _client: Any, _data: Any, _packet_id: int, reasons: Any, _properties: Any) -> None:
        refused = [str(reason) for reason in reasons if reason.is_failure]
        if refused:
            _log.error("the broker refuses our subscription; no commands will arrive", reason=refused[0])

    def _did_receive(self, _client: Any, _data: Any, message: MQTTMessage) -> None:
        properties = message.properties
        try:
            topic = message.topic
        except UnicodeDecodeError:
            self._lose("the broker sent a topic that is not UTF-8")
            return
        self._on_message(
            Received(
                topic=topic,
                payload=bytes(message.payload),
                qos=message.qos,
                retain=message.retain,
                response_topic=getattr(properties, "ResponseTopic", None),
                correlation=getattr(properties, "CorrelationData", None),
                expiry_s=getattr(properties, "MessageExpiryInterval", None),
                acknowledge=lambda: self._acknowledge(message),
            )
        )

    def _acknowledge(self, message: MQTTMessage) -> None:
        if (
            self._lost is None
            and message.qos > 0
            and self._client.ack(message.mid, message.qos) is not (MQTTErrorCode.MQTT_ERR_SUCCESS)
        ):
            self._lose("an acknowledgement could not be sent")

    def _did_close(self, _client: Any, _data: Any, _closed: Any) -> None:
        self._forget_socket()

    def _wants_write(self, _client: Any, _data: Any, _socket: Any) -> None:
        if self._socket is not None:  # joined: we are in the loop's thread
            self._wake.set()
