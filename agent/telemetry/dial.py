"""Reaching a broker without holding up the event loop: DNS, TCP and TLS run in a thread, the socket joins later.

paho-mqtt has no connect that does not block (its ``connect_async`` only postpones the blocking call), but any thread
may make its network calls, one at a time: ``connect`` runs in the dialling thread, all that follows in the loop's.
"""

from __future__ import annotations

import asyncio
import ssl
import threading
from contextlib import suppress
from pathlib import Path
from typing import Any

from paho.mqtt.client import Client
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties

from agent.config import TelemetryConfig
from agent.errors import LinkError

_PACKET_BYTES_MAX = 256 * 1024  # the largest message a broker may send us; commands are far smaller


def properties(packet: int, **values: Any) -> Properties:
    """Return MQTT 5 properties for a packet type, by their names in the specification."""
    made = Properties(packet)  # type: ignore[no-untyped-call]
    for name, value in values.items():
        setattr(made, name, value)
    return made


class Dialler:
    """Connects paho clients, one at a time.

    Args:
        config: Address, credentials, timeouts.
        receive_max: Commands the broker may have unacknowledged at us.
    """

    def __init__(self, config: TelemetryConfig, *, receive_max: int) -> None:
        self._config = config
        self._receive_max = receive_max
        self._last: threading.Thread | None = None

    async def dial(self, client: Client) -> None:
        """Connect ``client``'s socket and queue its CONNECT packet; nothing has been received yet.

        Raises:
            LinkError: no connection; the message says why. A thread that hangs in DNS is left behind, and no other
                is started before it has ended.
        """
        if self._last is not None and self._last.is_alive():
            raise LinkError("the attempt before is still stuck in name resolution or connect")
        loop = asyncio.get_running_loop()
        done: asyncio.Future[None] = loop.create_future()
        attempt = _Attempt(self._config, client, self._receive_max)

        def finish() -> None:
            if not done.done():
                done.set_result(None)

        def work() -> None:
            attempt.run()
            with suppress(RuntimeError):  # the loop is closed
                loop.call_soon_threadsafe(finish)

        self._last = threading.Thread(target=work, name="telemetry.dial", daemon=True)
        self._last.start()
        try:
            async with asyncio.timeout(self._config.connect_timeout_s * 2):  # paho's own covers one address only
                await done
        except TimeoutError as error:
            raise LinkError(f"no connection within {self._config.connect_timeout_s * 2:g} s") from error
        finally:
            if not done.done() or done.cancelled():
                attempt.abandon()
        if attempt.error is not None:
            raise LinkError(str(attempt.error) or type(attempt.error).__name__) from attempt.error


class _Attempt:
    """One blocking connect that its caller may lose interest in."""

    def __init__(self, config: TelemetryConfig, client: Client, receive_max: int) -> None:
        self._config = config
        self._client = client
        self._receive_max = receive_max
        self._lock = threading.Lock()
        self._abandoned = False
        self._finished = False
        self.error: Exception | None = None

    def run(self) -> None:
        """Connect; in the thread."""
        try:
            self._prepare()
            self._client.connect(
                self._config.host,
                self._config.port,
                self._config.keepalive_s,
                clean_start=False,
                properties=properties(
                    PacketTypes.CONNECT,
                    SessionExpiryInterval=self._config.session_expiry_s,
                    ReceiveMaximum=self._receive_max,
                    MaximumPacketSize=_PACKET_BYTES_MAX,
                ),
            )
        except (OSError, ValueError) as error:  # ssl.SSLError and gaierror are OSError, a bad name is a ValueError
            self.error = error
        with self._lock:
            self._finished = True
            if self._abandoned:
                _close(self._client)

    def abandon(self) -> None:
        """Nobody wants the connection any more; whoever comes last closes it."""
        with self._lock:
            self._abandoned = True
            if self._finished:
                _close(self._client)

    def _prepare(self) -> None:
        config = self._config
        self._client.connect_timeout = config.connect_timeout_s
        if config.username:
            password = Path(config.password_file).read_text().strip() if config.password_file else None
            self._client.username_pw_set(config.username, password)
        if config.tls_ca_file:
            context = ssl.create_default_context(cafile=config.tls_ca_file)
            if config.tls_certificate_file:
                context.load_cert_chain(config.tls_certificate_file, config.tls_key_file or None)
            self._client.tls_set_context(context)


def _close(client: Client) -> None:
    socket = client.socket()
    if socket is not None:
        with suppress(OSError):
            socket.close()
