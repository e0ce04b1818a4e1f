"""The link and the outbox against a real mosquitto."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import pytest
import uvloop
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import NameOID

from agent.config import OutboxConfig, TelemetryConfig
from agent.telemetry.topics import DEPLOY, HEALTH, METRICS
from tests.fakes.broker import black_hole, refusing, scripted, unfinished_handshake
from tests.fakes.telemetry import Device, until
from tools.demo.broker import Mosquitto, find_mosquitto
from tools.demo.receiver import Receiver

pytestmark = [pytest.mark.integration]
needs_mosquitto = pytest.mark.skipif(
    find_mosquitto() is None, reason="mosquitto is not installed (Debian: apt install mosquitto)"
)


@pytest.fixture
def broker(tmp_path: Path) -> Iterator[Mosquitto]:
    with Mosquitto(tmp_path / "broker") as running:
        yield running


def settings(port: int, **more: Any) -> TelemetryConfig:
    return TelemetryConfig(
        host="127.0.0.1",
        port=port,
        **{"reconnect_first_s": 0.05, "reconnect_cap_s": 0.2, "reported_interval_s": 0.0, **more},
    )


def self_signed(folder: Path, address: str) -> tuple[Path, Path]:
    """Write a certificate that is its own authority, and its key."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, address)])
    now = datetime.now(UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(hours=1))
        .not_valid_after(now + timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ip_address(address))]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    paths = folder / f"{address}.crt", folder / f"{address}.key"
    paths[0].write_bytes(certificate.public_bytes(Encoding.PEM))
    paths[1].write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    return paths


@pytest.fixture(params=["asyncio", "uvloop"])
def run(request: pytest.FixtureRequest) -> Any:
    factory = uvloop.new_event_loop if request.param == "uvloop" else asyncio.new_event_loop

    def runner(main: Any) -> Any:
        with asyncio.Runner(loop_factory=factory) as loop:
            return loop.run(main)

    return runner


@needs_mosquitto
def test_rows_appended_offline_arrive_once_after_connect(run: Any, broker: Mosquitto, tmp_path: Path) -> None:
    async def main() -> None:
        with Receiver(broker.host, broker.port) as receiver:
            device = Device(tmp_path, settings(broker.port))
            async with device.running(link=False):
                for number in range(60):
                    await device.outbox.append(METRICS, {"n": number})
                await device.outbox.append(DEPLOY, {"type": "deployment.confirmed"})
            device = Device(tmp_path, settings(broker.port))
            async with device.running():
                await until(lambda: sum(device.outbox.stats.rows) == 0)
            await until(lambda: receiver.report()["arrived"] == 61)
            report = receiver.report()
            assert (report["missing"], report["doubled"]) == (0, 0)
            telemetry = [m for m in receiver.messages() if m.topic.startswith(("evt/", "tel/"))]
            assert telemetry[0].topic == "evt/deploy", "the important class goes first"
            assert telemetry[1].value["n"] == 59, "measurements go newest first"

    run(main())


async def drain_until_stopped(device: Device, broker: Mosquitto, receiver: Receiver, *, rows: int) -> None:
    async with device.running():
        await until(lambda: device.outbox.stats.delivered >= rows)
        await asyncio.to_thread(broker.stop)
        await until(lambda: not device.link.connected and not receiver.connected)


@needs_mosquitto
def test_nothing_is_missing_when_the_broker_stops_while_the_outbox_drains(run: Any, tmp_path: Path) -> None:
    async def main() -> None:
        broker = Mosquitto(tmp_path / "broker")
        broker.start()
        receiver = Receiver(broker.host, broker.port)
        receiver.start()
        try:
            config = settings(broker.port, outbox=OutboxConfig(drain_rows_per_s_max=2000))
            device = Device(tmp_path, config)
            async with device.running():
                await until(lambda: device.link.connected)
                broker.kill()
                for number in range(600):
                    await device.outbox.append((METRICS, HEALTH, DEPLOY)[number % 3], {"n": number, "fill": "x" * 200})
            for _ in range(3):
                await asyncio.to_thread(broker.start)
                # An orderly stop: what mosquitto has acknowledged and not passed on, a kill -9 may cost it.
                await until(lambda: receiver.connected)
                await drain_until_stopped(Device(tmp_path, config), broker, receiver, rows=150)
            await asyncio.to_thread(broker.start)
            async with Device(tmp_path, config).running() as device:
                await until(lambda: sum(device.outbox.stats.rows) == 0)
                await until(lambda: receiver.report()["arrived"] == 600)
            report = receiver.report()
            assert report["missing"] == 0
            assert report["lost"] == 0
        finally:
            receiver.stop()
            broker.stop()

    run(main())


@needs_mosquitto
def test_tls_is_spoken_and_another_authority_is_refused(run: Any, tmp_path: Path) -> None:
    certificate, key = self_signed(tmp_path, "127.0.0.1")
    other, _ = self_signed(tmp_path, "127.0.0.2")

    async def main(broker: Mosquitto) -> None:
        device = Device(tmp_path, settings(broker.port, tls_ca_file=str(certificate)))
        async with device.running():
            await until(lambda: device.link.connected)
            await device.outbox.append(DEPLOY, {"fill": "x" * 30_000})
            answers = device.metrics.counter("inferd_mqtt_acknowledged", "", ("answer",)).values
            await until(lambda: answers.get(("no_subscribers",), 0) >= 3)
        device = Device(tmp_path, settings(broker.port, tls_ca_file=str(other)))
        async with device.running():
            await until(lambda: "CERTIFICATE_VERIFY_FAILED" in device.link.last_error)

    lines = f"certfile {certificate}\nkeyfile {key}\n"
    with Mosquitto(tmp_path / "broker", extra=lines) as broker:
        run(main(broker))


@needs_mosquitto
def test_a_message_without_subscribers_is_kept(run: Any, broker: Mosquitto, tmp_path: Path) -> None:
    async def main() -> None:
        device = Device(tmp_path, settings(broker.port))
        async with device.running():
            await device.outbox.append(DEPLOY, {"type": "x"})
            answers = device.metrics.counter("inferd_mqtt_acknowledged", "", ("answer",)).values
            await until(lambda: answers.get(("no_subscribers",), 0) >= 1)
            assert device.outbox.stats.rows[0] == 1
            with Receiver(broker.host, broker.port) as receiver:
                await until(lambda: sum(device.outbox.stats.rows) == 0)
                await until(lambda: receiver.report()["arrived"] == 1)

    run(main())


@needs_mosquitto
def test_a_hold_that_runs_out_while_the_disk_is_slow_is_not_forgotten(
    run: Any, broker: Mosquitto, tmp_path: Path
) -> None:
    async def main() -> None:
        device = Device(tmp_path, settings(broker.port))
        quick = device.outbox.exchange

        async def slow(**arguments: Any) -> Any:
            rows = await quick(**arguments)
            await asyncio.sleep(0.7)  # longer than the first hold
            return rows

        device.outbox.exchange = slow  # type: ignore[method-assign]
        async with device.running():
            await device.outbox.append(DEPLOY, {"type": "x"})
            answers = device.metrics.counter("inferd_mqtt_acknowledged", "", ("answer",)).values
            await until(lambda: answers.get(("no_subscribers",), 0) >= 3)

    run(main())


@needs_mosquitto
def test_status_is_retained_and_says_stopped_after_an_orderly_end(run: Any, broker: Mosquitto, tmp_path: Path) -> None:
    async def main() -> None:
        device = Device(tmp_path, settings(broker.port))
        device.presence.report({"slots": {"m": "1.0.0"}}, generation=7)
        async with device.running():
            await until(lambda: device.link.connected)
            with Receiver(broker.host, broker.port, client_id="late") as receiver:
                born = (await until(lambda: receiver.messages("status")))[0]
                assert born.value["online"] is True
                assert born.value["agent"] == "test"
                reported = (await until(lambda: receiver.messages("reported")))[0]
                assert reported.value["gen_applied"] == 7
                device.presence.report({"slots": {"m": "2.0.0"}}, generation=8)
                await until(lambda: receiver.messages("reported")[-1].value["doc"] == {"slots": {"m": "2.0.0"}})
        with Receiver(broker.host, broker.port, client_id="later") as receiver:
            stopped = (await until(lambda: receiver.messages("status")))[0]
            assert (stopped.retain, stopped.value["online"], stopped.value["reason"]) == (True, False, "stopped")
            assert stopped.value["sid"] == born.value["sid"]

    run(main())


@needs_mosquitto
def test_the_will_is_published_when_the_device_vanishes(run: Any, broker: Mosquitto, tmp_path: Path) -> None:
    async def main() -> None:
        device = Device(tmp_path, settings(broker.port, will_delay_s=0, flush_timeout_s=0.0, session_expiry_s=60))
        with Receiver(broker.host, broker.port) as receiver:
            async with device.running():
                born = (await until(lambda: receiver.messages("status")))[0]
            # With no time to say goodbye the socket just closes, as after a kill.
            lost = await until(lambda: [m for m in receiver.messages("status") if not m.value["online"]])
            assert (lost[0].value["reason"], lost[0].value["sid"]) == ("lost", born.value["sid"])

    run(main())


@pytest.mark.parametrize(("trap", "turns_min"), [(black_hole, 20), (unfinished_handshake, 20), (refusing, 1)])
def test_a_broker_that_does_not_answer_is_not_felt(run: Any, trap: Any, turns_min: int, tmp_path: Path) -> None:
    """While the link tries, others on the loop go on: between two of their turns the loop is never held up."""

    async def main(port: int) -> None:
        device = Device(tmp_path, settings(port, connect_timeout_s=0.4))
        loop = asyncio.get_running_loop()
        losses = device.metrics.counter("inferd_mqtt_losses", "").values
        turns = [0]  # of another on the loop, up to each loss

        async def tick() -> None:
            while True:
                turns[-1] += 1
                if losses.get((), 0) >= len(turns):
                    turns.append(0)
                await asyncio.sleep(0)

        async with device.running():
            ticker = asyncio.create_task(tick())
            for _ in range(3):
                await device.outbox.append(DEPLOY, {"type": "x"})
            await until(lambda: len(turns) > 3)
            assert min(turns[:3]) >= turns_min
            assert not device.link.connected
            assert device.outbox.stats.rows[0] == 3
            assert device.supervisor.restarts == {}
            ticker.cancel()
        assert loop.is_running()

    with trap() as port:
        run(main(port))


CONNACK = bytes([0x20, 0x03, 0x00, 0x00, 0x00])  # accepted, no properties


@pytest.mark.parametrize(
    "answer",
    [
        pytest.param(bytes([0x20, 0x03, 0x00, 0x87, 0x00]), id="not authorized"),
        pytest.param(b"HTTP/1.1 400 Bad Request\r\n\r\n", id="another protocol"),
        pytest.param(b"\xff" * 64, id="length over four bytes"),
        pytest.param(CONNACK[:3], id="half an answer"),
        pytest.param(CONNACK + bytes([0x40, 0x01, 0x00]), id="acknowledgement without id"),
        pytest.param(CONNACK + bytes([0x30, 0x04, 0x00, 0x09, 0x61, 0x61]), id="topic longer than its packet"),
        pytest.param(CONNACK + bytes([0x30, 0x05, 0x00, 0x02, 0xFF, 0xFE, 0x00]), id="topic not UTF-8"),
        pytest.param(CONNACK + bytes([0xE0, 0x01, 0x8E]), id="session taken over"),
        pytest.param(CONNACK + bytes([0x20, 0x06, 0x00, 0x00, 0x03, 0x21, 0x00, 0x00]), id="forbidden value"),
    ],
)
def test_whatever_the_broker_sends_only_ends_the_connection(answer: bytes, tmp_path: Path) -> None:
    async def main(port: int) -> None:
        device = Device(tmp_path, settings(port, connect_timeout_s=0.3, keepalive_s=5))
        async with device.running():
            losses = device.metrics.counter("inferd_mqtt_losses", "").values
            await until(lambda: losses.get((), 0) >= 2, timeout_s=60)
            await device.outbox.append(DEPLOY, {"type": "x"})
            assert device.outbox.stats.rows[0] == 1
            assert device.supervisor.restarts == {}

    with scripted(answer) as port:
        asyncio.run(main(port))
