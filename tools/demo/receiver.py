"""A witness of telemetry: subscribes to a tenant with a durable session and says what arrived, twice, or never.

Every message of a stream carries ``(device, stream, epoch, seq)``. De-duplicated by that key nothing may be missing
but what a gap record names. As a library: ``Receiver`` in a ``with`` block, then ``report()``; as a program::

    python -m tools.demo.receiver --broker 127.0.0.1:1883 --tenant default
"""

from __future__ import annotations

import json
import signal
import sys
import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Final

import click
from paho.mqtt.client import Client, MQTTMessage
from paho.mqtt.enums import CallbackAPIVersion, MQTTProtocolVersion
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties

_ROOT: Final = "inferd/v1"
_SESSION_EXPIRY_S: Final = 86_400
_MESSAGES_KEPT: Final = 10_000

Key = tuple[str, str, str]  # device, stream, epoch


@dataclass(frozen=True, slots=True)
class Message:
    """One publish as it arrived; ``value`` is its decoded JSON, ``None`` if it is none."""

    device: str
    topic: str  # below the device, e.g. "evt/deploy"
    value: Any
    retain: bool


@dataclass(slots=True)
class Sequence:
    """What arrived of one stream of one device in one epoch."""

    arrived: set[int] = field(default_factory=set)
    doubled: int = 0
    gaps: list[tuple[int, int, str]] = field(default_factory=list)  # first, last, reason

    def missing(self) -> list[int]:
        """Return the numbers up to the newest that neither arrived nor are named by a gap."""
        newest = max([*self.arrived, *(last for _, last, _ in self.gaps)], default=0)
        return [n for n in range(1, newest + 1) if n not in self.arrived and not self._in_gap(n)]

    def lost(self) -> int:
        """Return how many numbers are named by a gap and did not arrive."""
        return len({n for first, last, _ in self.gaps for n in range(first, last + 1)} - self.arrived)

    def _in_gap(self, number: int) -> bool:
        return any(first <= number <= last for first, last, _ in self.gaps)


class Tally:
    """The count over all streams."""

    def __init__(self) -> None:
        self.sequences: dict[Key, Sequence] = {}

    def add(self, device: str, value: Any) -> bool:
        """Count one message; return whether it is the first with its key (``True`` also if it has none)."""
        if not isinstance(value, dict) or "st" not in value:
            return True
        sequence = self.sequences.setdefault((device, value["st"], value["ep"]), Sequence())
        if "from" in value:
            gap = (value["from"], value["to"], value["reason"])
            if gap not in sequence.gaps:
                sequence.gaps.append(gap)
            return True
        if value["seq"] in sequence.arrived:
            sequence.doubled += 1
            return False
        sequence.arrived.add(value["seq"])
        return True

    def report(self) -> dict[str, Any]:
        """Return ``{arrived, doubled, missing, lost, streams: [...]}``, JSON-able."""
        streams = [
            {
                "device": device,
                "stream": stream,
                "epoch": epoch,
                "arrived": len(sequence.arrived),
                "doubled": sequence.doubled,
                "missing": _ranges(sequence.missing()),
                "lost": sequence.lost(),
                "gaps": [list(gap) for gap in sequence.gaps],
            }
            for (device, stream, epoch), sequence in sorted(self.sequences.items())
        ]
        everything = self.sequences.values()
        return {
            "arrived": sum(len(s.arrived) for s in everything),
            "doubled": sum(s.doubled for s in everything),
            "missing": sum(len(s.missing()) for s in everything),
            "lost": sum(s.lost() for s in everything),
            "streams": streams,
        }


class Receiver:
    """Receives in a thread of its own, reconnecting by itself, from construction of the ``with`` block to its end.

    Args:
        host, port: The broker.
        tenant: Whose devices to hear.
        client_id: Names the durable session: what arrives while we are away is kept by the broker.
        on_message: Hears each message, on the receiver's thread.
    """

    def __init__(
        self,
        host: str,
        port: int,
        *,
        tenant: str = "default",
        client_id: str = "inferd-receiver",
        on_message: Callable[[Message], None] | None = None,
    ) -> None:
        self._host, self._port = host, port
        self._prefix = f"{_ROOT}/{tenant}/d/"
        self._on_message = on_message
        self._lock = threading.Lock()
        self._tally = Tally()
        self._messages: list[Message] = []
        self._subscribed = threading.Event()
        self._client = Client(CallbackAPIVersion.VERSION2, client_id=client_id, protocol=MQTTProtocolVersion.MQTTv5)
        self._client.on_connect = self._did_connect
        self._client.on_subscribe = lambda *_: self._subscribed.set()
        self._client.on_message = self._did_receive
        self._client.reconnect_delay_set(1, 2)

    def start(self, *, timeout_s: float = 10.0) -> None:
        """Connect and subscribe.

        Raises:
            OSError: the broker cannot be reached.
            TimeoutError: it did not answer in time.
        """
        properties = Properties(PacketTypes.CONNECT)  # type: ignore[no-untyped-call]
        properties.SessionExpiryInterval = _SESSION_EXPIRY_S
        self._client.connect(self._host, self._port, clean_start=False, properties=properties)
        self._client.loop_start()
        if not self._subscribed.wait(timeout_s):
            self.stop()
            raise TimeoutError(f"{self._host}:{self._port} did not answer the subscription in {timeout_s:g} s")

    def stop(self) -> None:
        """Disconnect; the broker keeps the session."""
        self._client.disconnect()
        self._client.loop_stop()

    def __enter__(self) -> Receiver:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    @property
    def connected(self) -> bool:
        """Tell whether messages can arrive now."""
        return bool(self._client.is_connected())

    def report(self) -> dict[str, Any]:
        """Return the count so far; see ``Tally.report``."""
        with self._lock:
            return self._tally.report()

    def messages(self, topic: str = "") -> list[Message]:
        """Return the newest messages, oldest first, without doubled ones; only those of ``topic`` if it is given."""
        with self._lock:
            return [message for message in self._messages if not topic or message.topic == topic]

    def _did_connect(self, client: Client, _data: Any, _flags: Any, reason: Any, _properties: Any) -> None:
        if not reason.is_failure:
            client.subscribe(f"{self._prefix}#", qos=1)

    def _did_receive(self, _client: Client, _data: Any, message: MQTTMessage) -> None:
        device, _, topic = message.topic.removeprefix(self._prefix).partition("/")
        if topic.startswith("cmd/"):
            return
        try:
            value = json.loads(message.payload)
        except ValueError:
            value = None
        seen = Message(device, topic, value, message.retain)
        with self._lock:
            if self._tally.add(device, value):
                self._messages.append(seen)
                del self._messages[:-_MESSAGES_KEPT]
        if self._on_message is not None:
            self._on_message(seen)


def arrived_of(report: dict[str, Any], device: str, epoch: str) -> int:
    """Return how many distinct rows of one outbox of one device a ``Tally.report`` counts."""
    return sum(row["arrived"] for row in report["streams"] if (row["device"], row["epoch"]) == (device, epoch))


def _ranges(numbers: Iterable[int]) -> list[list[int]]:
    """Return sorted numbers as ``[[first, last], …]``."""
    ranges: list[list[int]] = []
    for number in numbers:
        if ranges and ranges[-1][1] == number - 1:
            ranges[-1][1] = number
        else:
            ranges.append([number, number])
    return ranges


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--broker", default="127.0.0.1:1883", show_default=True, metavar="HOST:PORT")
@click.option("--tenant", default="default", show_default=True)
@click.option("--client-id", default="inferd-receiver", show_default=True, help="Names the durable session.")
@click.option("--quiet", is_flag=True, help="Only the report at the end.")
def main(broker: str, tenant: str, client_id: str, quiet: bool) -> None:
    """Print telemetry as it arrives; at Ctrl-C say what was missing or doubled. Exit code 1 if something is missing."""
    host, _, port = broker.rpartition(":")

    def show(message: Message) -> None:
        click.echo(f"{message.device} {message.topic} {json.dumps(message.value)}")

    receiver = Receiver(
        host or "127.0.0.1", int(port), tenant=tenant, client_id=client_id, on_message=None if quiet else show
    )
    ended = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: ended.set())
    with receiver:
        ended.wait()
    report = receiver.report()
    click.echo(json.dumps(report, indent=1))
    sys.exit(1 if report["missing"] else 0)


if __name__ == "__main__":
    main()
