"""Signed commands to one device: made, sent over MQTT, and followed to their end.

A command says what, to whom and until when, under one operator's signature (DSSE). Its generation is the time in
milliseconds, so it only grows, on any machine with a clock: a device never goes back behind a newer command.

Absent on purpose: rollouts over many devices, and asking for keys and passwords (``cli.py``).
"""

from __future__ import annotations

import base64
import json
import queue
import ssl
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final

from paho.mqtt.client import Client, MQTTMessage
from paho.mqtt.enums import CallbackAPIVersion, MQTTProtocolVersion
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties
from securesystemslib.dsse import Envelope
from securesystemslib.signer import Signer

from agent.errors import AgentError, by_code
from tools.hub.errors import HubError

PAYLOAD_TYPE: Final = "application/vnd.inferd.command+json"
SCHEMA: Final = "inferd-command/1"
_ROOT: Final = "inferd/v1"
_NO_SUBSCRIBERS: Final = 0x10
_CONNECT_TIMEOUT_S: Final = 10.0
_GOOD: Final = frozenset({"done"})
_BAD: Final = frozenset({"failed", "refused", "expired"})


class BrokerError(HubError):
    """The MQTT broker cannot be reached, or does not let us do this."""

    code = "broker_failed"


class DeviceSilentError(HubError):
    """The device did not answer in time; the command may still be carried out until it expires."""

    code = "device_silent"


class CommandFailedError(HubError):
    """The device answered, and did not carry the command out."""

    code = "command_failed"


@dataclass(frozen=True, slots=True, kw_only=True)
class Broker:
    """Where to send. ``ca_file``: TLS."""

    host: str
    port: int
    username: str = ""
    password: str = ""
    ca_file: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class SignedCommand:
    """A command ready to be sent. ``envelope`` is the DSSE JSON; the rest repeats what it says."""

    id: str
    name: str
    tenant: str
    device: str
    lifetime_s: int
    envelope: bytes


def make_command(
    name: str,
    args: Mapping[str, Any],
    *,
    tenant: str,
    device: str,
    signer: Signer,
    now_s: float,
    lifetime_s: int,
    command_id: str = "",
) -> SignedCommand:
    """Return the signed command ``name`` for one device.

    Args:
        name: ``deploy``, ``default``, ``remove``, ``cancel`` or ``rollback``, or a read-only one.
        args: JSON-able, what the command says.
        tenant, device: To whom.
        signer: Of a key that the store's ``fleet/operators.json`` names.
        now_s: Unix seconds; the generation is made of it.
        lifetime_s: A device that hears it later refuses it.
        command_id: Names the command; the same id is carried out once. Empty: a new one.
    """
    identity = command_id or uuid.uuid4().hex
    payload = {
        "schema": SCHEMA,
        "id": identity,
        "name": name,
        "tenant": tenant,
        "device": device,
        "issued": round(now_s, 3),
        "not_after": round(now_s + lifetime_s, 3),
        "gen": int(now_s * 1000),
        "args": dict(args),
    }
    envelope = Envelope(json.dumps(payload, sort_keys=True).encode(), PAYLOAD_TYPE, {})
    envelope.sign(signer)
    return SignedCommand(
        id=identity,
        name=name,
        tenant=tenant,
        device=device,
        lifetime_s=lifetime_s,
        envelope=json.dumps(envelope.to_dict()).encode(),
    )


def generation(command: SignedCommand) -> int:
    """Return the generation that ``command`` was signed with."""
    payload = json.loads(base64.b64decode(json.loads(command.envelope)["payload"]))
    return int(payload["gen"])


def send(
    broker: Broker,
    command: SignedCommand,
    *,
    wait_s: float,
    on_reply: Callable[[dict[str, Any]], None] = lambda reply: None,
) -> dict[str, Any]:
    """Send ``command`` and follow it to its end.

    Args:
        broker: Where.
        command: What.
        wait_s: How long to wait for the end; 0: only until the broker has the command.
        on_reply: Hears each reply of the device, the last included.

    Returns:
        The last reply: ``{"id", "name", "status": "done", "result", …}``; with ``wait_s`` 0 ``{"status": "sent"}``.

    Raises:
        BrokerError: the broker cannot be reached, refuses us, or nobody hears the device's command topic.
        DeviceSilentError: no end within ``wait_s``.
        AgentError: the device refused or failed; the class is the device's error code's, where it has one.
    """
    with _connected(broker, command) as line:
        line.publish(command)
        if wait_s <= 0:
            return {"id": command.id, "name": command.name, "status": "sent"}
        for reply in line.replies(command, until=time.monotonic() + wait_s):
            on_reply(reply)
            ended = _ended(reply)
            if ended is not None:
                return ended
        raise _silent(command, line.status, wait_s)


class _Line:
    """A connection that hears one device's status and replies."""

    def __init__(self, client: Client, broker: Broker, base: str) -> None:
        self._client = client
        self._broker = broker
        self._base = base
        self._heard: queue.SimpleQueue[tuple[str, Any]] = queue.SimpleQueue()
        self._lost = ""
        self.status: dict[str, Any] | None = None  # the device's retained status, if it was ever there
        client.on_connect = self._did_connect
        client.on_disconnect = self._did_disconnect
        client.on_subscribe = lambda _c, _d, _id, reasons, _p: self._heard.put(("subscribed", reasons))
        client.on_publish = lambda _c, _d, _id, reason, _p: self._heard.put(("published", reason.value))
        client.on_message = self._did_receive

    def open(self) -> None:
        """Connect and subscribe."""
        try:
            self._client.connect(self._broker.host, self._broker.port, clean_start=True)
        except (OSError, ValueError) as error:
            raise self._unreachable(str(error)) from error
        self._client.loop_start()
        reason = self._await("connected", "the broker accepted the connection and says nothing")
        if reason.is_failure:
            raise BrokerError(f"{self._where()} refuses us: {reason}", hint="Check --username and the password.")
        reasons = self._await("subscribed", "the broker does not answer a subscription")
        refused = [str(reason) for reason in reasons if reason.is_failure]
        if refused:
            raise BrokerError(f"{self._where()} does not let us hear {self._base}/#: {refused[0]}")

    def publish(self, command: SignedCommand) -> None:
        """Hand the command to the broker; return once it has it for somebody."""
        about = Properties(PacketTypes.PUBLISH)  # type: ignore[no-untyped-call]
        about.ContentType = "application/vnd.dsse+json"
        about.MessageExpiryInterval = command.lifetime_s
        about.CorrelationData = command.id.encode()
        self._client.publish(f"{self._base}/cmd/{command.name}", command.envelope, qos=1, properties=about)
        code = self._await("published", "the broker does not acknowledge the command")
        if code == _NO_SUBSCRIBERS:
            raise BrokerError(
                f"no device hears {self._base}/cmd/{command.name}",
                hint="Check --device and --tenant against `inferctl status` on the box: it must have connected once.",
            )
        if code >= 0x80:
            raise BrokerError(f"{self._where()} refuses the command: reason 0x{code:02x}")

    def replies(self, command: SignedCommand, *, until: float) -> Iterator[dict[str, Any]]:
        """Yield the device's replies to ``command`` as they come, until the monotonic time ``until``."""
        while True:
            try:
                kind, value = self._heard.get(timeout=max(0.0, until - time.monotonic()))
            except queue.Empty:
                return
            if kind == "reply" and _answers(value, command):
                yield value["body"]
            elif kind == "lost":
                raise BrokerError(f"{self._where()}: {value}", hint="The command may be under way: ask the device.")

    def _await(self, wanted: str, complaint: str) -> Any:
        deadline = time.monotonic() + _CONNECT_TIMEOUT_S
        kept: list[tuple[str, Any]] = []
        while True:
            try:
                kind, value = self._heard.get(timeout=max(0.0, deadline - time.monotonic()))
            except queue.Empty as error:
                raise self._unreachable(complaint) from error
            if kind == wanted:
                for item in kept:
                    self._heard.put(item)
                return value
            if kind == "lost":
                raise self._unreachable(value)
            kept.append((kind, value))

    def _did_connect(self, client: Client, _data: Any, _flags: Any, reason: Any, _properties: Any) -> None:
        self._heard.put(("connected", reason))
        if not reason.is_failure:
            client.subscribe([(f"{self._base}/status", 1), (f"{self._base}/res/#", 1)])

    def _did_disconnect(self, _client: Client, _data: Any, _flags: Any, reason: Any, _properties: Any) -> None:
        self._heard.put(("lost", f"connection lost: {reason}"))

    def _did_receive(self, _client: Client, _data: Any, message: MQTTMessage) -> None:
        try:
            body = json.loads(message.payload)
        except ValueError:
            return
        if message.topic.endswith("/status"):
            self.status = body
        else:
            correlation = getattr(message.properties, "CorrelationData", None)
            self._heard.put(("reply", {"body": body, "correlation": correlation}))

    def _unreachable(self, reason: str) -> BrokerError:
        return BrokerError(
            f"{self._where()} cannot be reached: {reason}",
            hint="Check --broker HOST:PORT, and that the broker runs and this machine may reach it.",
        )

    def _where(self) -> str:
        return f"broker {self._broker.host}:{self._broker.port}"


@contextmanager
def _connected(broker: Broker, command: SignedCommand) -> Iterator[_Line]:
    client = Client(CallbackAPIVersion.VERSION2, protocol=MQTTProtocolVersion.MQTTv5, reconnect_on_failure=False)
    client.connect_timeout = _CONNECT_TIMEOUT_S
    if broker.username:
        client.username_pw_set(broker.username, broker.password or None)
    if broker.ca_file:
        try:
            client.tls_set_context(ssl.create_default_context(cafile=broker.ca_file))
        except (OSError, ssl.SSLError) as error:
            raise BrokerError(f"{broker.ca_file}: {error}", hint="--ca-file must be a PEM file.") from error
    line = _Line(client, broker, f"{_ROOT}/{command.tenant}/d/{command.device}")
    try:
        line.open()
        yield line
    finally:
        client.disconnect()
        client.loop_stop()


def _answers(heard: dict[str, Any], command: SignedCommand) -> bool:
    body = heard["body"]
    if not isinstance(body, dict) or "status" not in body:
        return False
    return body.get("id") == command.id or heard["correlation"] == command.id.encode()


def _ended(reply: dict[str, Any]) -> dict[str, Any] | None:
    """Return the reply if it tells a good end, ``None`` if the command goes on.

    Raises:
        AgentError: it tells a bad end.
    """
    status = reply["status"]
    facts = reply
    if status == "duplicate":
        facts = reply.get("result") or {}
        status = facts.get("state")
    if status in _GOOD:
        return reply
    if status in _BAD:
        raise _failure(str(facts.get("code", "")), f"the device says {status}: {facts.get('message', 'no reason')}")
    return None


# By what the device says, because the codes are shared with other refusals.
_ADVICE: Final = {
    "is pinned on the box": "On the box, inferctl unpin MODEL gives the model back to the fleet.",
    "operator key": "A box obeys the operators of its store: inferhub init --operator-key KEY.pub names them.",
}


def _failure(code: str, message: str) -> AgentError:
    """Return the error as its class, with a note on what to do where a refusal is common."""
    error = by_code(code, message)
    if error.code != code:
        return CommandFailedError(message, hint=f"The device's code is {code!r}.")
    for part, advice in _ADVICE.items():
        if part in message:
            error.add_note(advice)
    return error


def _silent(command: SignedCommand, status: dict[str, Any] | None, wait_s: float) -> DeviceSilentError:
    queued = f"The command waits for it until it expires, in at most {command.lifetime_s} s."
    if status is None:
        return DeviceSilentError(
            f"{command.device} did not answer within {wait_s:g} s and has never announced itself",
            hint="Check --device and --tenant against `inferctl status` on the box.",
        )
    if not status.get("online"):
        return DeviceSilentError(
            f"{command.device} is offline ({status.get('reason', 'unknown')})",
            hint=f"{queued} Look at the box: is it powered, and does it reach the broker?",
        )
    return DeviceSilentError(
        f"{command.device} is online and did not finish within {wait_s:g} s",
        hint=f"Give --wait more time, or look at `inferctl events` on the box. {queued}",
    )
