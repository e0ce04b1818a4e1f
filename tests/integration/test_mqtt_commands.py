"""Signed fleet commands, from the publisher's own code over a real broker to a device and back."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from securesystemslib.dsse import Envelope
from securesystemslib.exceptions import VerificationError
from securesystemslib.signer import CryptoSigner

from agent.bundles.puller import Puller
from agent.config import PolicyConfig, StoreConfig, TelemetryConfig
from agent.errors import CommandError, CommandExpiredError, CommandReplayError, LoadError
from agent.probe import probe
from agent.profile import load_profiles
from tests.fakes.broker import black_hole, refusing
from tests.fakes.store import StoreWorld
from tests.fakes.telemetry import Device, FakeVerified, until
from tools.demo.broker import Mosquitto, find_mosquitto
from tools.demo.receiver import Receiver
from tools.hub import keys
from tools.hub.commands import (
    Broker,
    BrokerError,
    CommandFailedError,
    DeviceSilentError,
    SignedCommand,
    make_command,
    send,
)
from tools.inferhub import main as inferhub

needs_mosquitto = pytest.mark.skipif(
    find_mosquitto() is None, reason="mosquitto is not installed (Debian: apt install mosquitto)"
)
pytestmark = [pytest.mark.integration]

OPERATOR = CryptoSigner.generate_ed25519()
STRANGER = CryptoSigner.generate_ed25519()
DEPLOY_ARGS = {"team": "files", "model": "magika", "version": "2.0.0"}


class EnvelopeVerifier:
    """Checks real signatures in this process, as the trust child does in its own."""

    def __init__(self, key: Any = OPERATOR.public_key) -> None:
        self._key = key

    async def verify_command(self, envelope: bytes) -> FakeVerified:
        try:
            parsed = Envelope.from_dict(json.loads(envelope))
            (keyid,) = parsed.verify([self._key], 1)
        except (KeyError, VerificationError) as error:
            raise CommandError("not signed by a current operator key") from error
        return FakeVerified(json.loads(parsed.payload), keyid)


@pytest.fixture
def broker(tmp_path: Path) -> Iterator[Mosquitto]:
    with Mosquitto(tmp_path / "broker") as running:
        yield running


def a_device(tmp_path: Path, broker: Mosquitto, *, verifier: Any = None, **more: Any) -> Device:
    config = TelemetryConfig(
        host=broker.host, port=broker.port, reconnect_first_s=0.05, reconnect_cap_s=0.2, reported_interval_s=0.0, **more
    )
    return Device(tmp_path, config, verifier=verifier or EnvelopeVerifier())


def command(name: str = "deploy", args: dict[str, Any] | None = None, **more: Any) -> SignedCommand:
    defaults: dict[str, Any] = {
        "tenant": "default",
        "device": "box-1",
        "signer": OPERATOR,
        "now_s": time.time(),
        "lifetime_s": 60,
    }
    return make_command(name, DEPLOY_ARGS if args is None else args, **{**defaults, **more})


async def sent(broker: Mosquitto, order: SignedCommand, *, wait_s: float = 90.0) -> tuple[dict[str, Any], list[str]]:
    """Send as the publisher does; return the last reply and the statuses on the way."""
    statuses: list[str] = []
    address = Broker(host=broker.host, port=broker.port)
    reply = await asyncio.to_thread(
        send, address, order, wait_s=wait_s, on_reply=lambda one: statuses.append(one["status"])
    )
    return reply, statuses


@needs_mosquitto
def test_a_signed_command_is_carried_out_once_and_answered(broker: Mosquitto, tmp_path: Path) -> None:
    async def main() -> None:
        async with a_device(tmp_path, broker).running() as device:
            await until(lambda: device.link.connected)
            order = command()
            reply, statuses = await sent(broker, order)
            assert statuses == ["accepted", "running", "done"]
            assert reply["result"] == {"state": "CONFIRMED", "model": "magika"}
            again, statuses = await sent(broker, order)
            assert statuses == ["duplicate"]
            assert again["result"] == {"state": "done", "result": {"state": "CONFIRMED", "model": "magika"}}
            assert device.commander.done == [("deploy", DEPLOY_ARGS, order.id)]

    asyncio.run(main())


@needs_mosquitto
def test_refusals_name_their_reason_and_nothing_is_carried_out(broker: Mosquitto, tmp_path: Path) -> None:
    async def main() -> None:
        async with a_device(tmp_path, broker).running() as device:
            await until(lambda: device.link.connected)
            newest = command()
            await sent(broker, newest)
            device.commander.done.clear()
            now = time.time()

            cases: list[tuple[SignedCommand, type[Exception], str]] = [
                (command(signer=STRANGER), Exception, "not signed by a current operator key"),
                (command(now_s=now - 100, lifetime_s=50), CommandExpiredError, "not to be carried out any more"),
                (command(now_s=now - 50, lifetime_s=100), CommandReplayError, "generation"),
                (command(args={"model": "other"}, command_id=newest.id), CommandReplayError, "another command"),
                (command("rollback", device="*"), Exception, "no device hears"),
            ]
            for order, kind, reason in cases:
                with pytest.raises(kind, match=reason):
                    await sent(broker, order)
            assert device.commander.done == []
            assert any(event.type == "command.refused" for event in device.events.recent())

    asyncio.run(main())


@needs_mosquitto
def test_a_command_for_another_box_or_topic_is_refused(broker: Mosquitto, tmp_path: Path) -> None:
    async def main() -> None:
        async with a_device(tmp_path, broker).running() as device:
            await until(lambda: device.link.connected)
            elsewhere = command(device="box-2")
            moved = SignedCommand(**{**_fields(elsewhere), "device": "box-1"})
            with pytest.raises(Exception, match="addressed to default/box-2"):
                await sent(broker, moved)
            renamed = SignedCommand(**{**_fields(command("rollback")), "name": "deploy"})
            with pytest.raises(Exception, match="signed as 'rollback' and sent as 'deploy'"):
                await sent(broker, renamed)
            assert device.commander.done == []

    asyncio.run(main())


def _fields(order: SignedCommand) -> dict[str, Any]:
    return {name: getattr(order, name) for name in SignedCommand.__dataclass_fields__}


@needs_mosquitto
def test_a_failure_comes_back_with_the_devices_code(broker: Mosquitto, tmp_path: Path) -> None:
    async def main() -> None:
        async with a_device(tmp_path, broker).running() as device:
            await until(lambda: device.link.connected)
            device.commander.error = LoadError("no variant loads")
            with pytest.raises(LoadError, match="no variant loads"):
                await sent(broker, command())

    asyncio.run(main())


@needs_mosquitto
def test_a_command_sent_while_the_device_was_off_is_carried_out_when_it_returns(
    broker: Mosquitto, tmp_path: Path
) -> None:
    async def main() -> None:
        async with a_device(tmp_path, broker).running() as device:  # its session is known from now on
            await until(lambda: device.link.connected)
        order = command()
        await sent(broker, order, wait_s=0)
        with pytest.raises(DeviceSilentError, match="offline"):
            await sent(broker, command("rollback", {"model": "m"}), wait_s=0.3)
        with Receiver(broker.host, broker.port) as receiver:
            async with a_device(tmp_path, broker).running() as device:
                await until(lambda: len(device.commander.done) == 2)
                replies = await until(
                    lambda: [m.value for m in receiver.messages("res/deploy") if m.value["status"] == "done"]
                )
                assert replies[0]["id"] == order.id

    asyncio.run(main())


@needs_mosquitto
def test_a_restart_in_the_middle_of_a_command_finishes_it_under_the_same_id(broker: Mosquitto, tmp_path: Path) -> None:
    async def main() -> None:
        order = command()
        async with a_device(tmp_path, broker).running() as device:
            await until(lambda: device.link.connected)
            device.commander.gate = asyncio.Event()
            await sent(broker, order, wait_s=0)
            await until(lambda: device.inbox.carrying_out)
        async with a_device(tmp_path, broker).running() as device:
            await until(lambda: device.commander.done)
            reply, _ = await sent(broker, order)
            assert reply["status"] in ("done", "duplicate"), "the first answer, or one from the record"
            assert device.commander.done == [("deploy", DEPLOY_ARGS, order.id)]

    asyncio.run(main())


@needs_mosquitto
def test_unsigned_commands_may_only_look(broker: Mosquitto, tmp_path: Path) -> None:
    async def main() -> None:
        async with a_device(tmp_path, broker).running() as device:
            await until(lambda: device.link.connected)
            for name, status in (("ping", "done"), ("report", "done"), ("rebirth", "done"), ("deploy", "refused")):
                bare = SignedCommand(**{**_fields(command(name)), "envelope": b""})
                bare = SignedCommand(**{**_fields(bare), "envelope": json.dumps({"id": bare.id}).encode()})
                with Receiver(broker.host, broker.port, client_id=f"watch-{name}") as receiver:
                    await sent(broker, bare, wait_s=0)
                    reply = (await until(lambda seen=receiver, one=name: seen.messages(f"res/{one}")))[0].value
                    assert reply["status"] == status
            assert [name for name, _, _ in device.commander.done] == ["report"]

    asyncio.run(main())


@needs_mosquitto
def test_a_flood_of_forged_commands_is_counted_not_answered(broker: Mosquitto, tmp_path: Path) -> None:
    async def main() -> None:
        async with a_device(tmp_path, broker, commands_per_minute_max=3).running() as device:
            await until(lambda: device.link.connected)
            counts = device.metrics.counter("inferd_commands", "", ("name", "status")).values
            for _ in range(10):
                await sent(broker, command(signer=STRANGER), wait_s=0)
            await until(lambda: sum(counts.values()) == 10)
            assert counts["deploy", "refused"] == 3
            assert counts["deploy", "dropped"] == 7

    asyncio.run(main())


@needs_mosquitto
def test_the_real_trust_child_verifies_a_command(broker: Mosquitto, tmp_path: Path) -> None:
    world = StoreWorld(tmp_path)
    puller = Puller(
        StoreConfig(urls=(f"file://{world.root}",), anchor=str(world.anchor)),
        PolicyConfig(),
        tmp_path / "state",
        probe(),
        load_profiles()[0],
    )
    (tmp_path / "state").mkdir()

    async def main() -> None:
        async with a_device(tmp_path, broker, verifier=puller).running() as device:
            await until(lambda: device.link.connected)
            reply, statuses = await sent(broker, command(signer=world.operator), wait_s=60)
            assert (reply["status"], statuses[0]) == ("done", "accepted")
            with pytest.raises(Exception, match="signed"):
                await sent(broker, command(signer=STRANGER), wait_s=60)
            assert len(device.commander.done) == 1

    asyncio.run(main())


@needs_mosquitto
def test_the_verbs_of_inferhub_send_and_explain(broker: Mosquitto, tmp_path: Path) -> None:
    keys.generate(tmp_path / "operator", role="operator", password=None)

    verifier = EnvelopeVerifier(keys.load_public(tmp_path / "operator.pub"))

    def call(*args: str) -> Any:
        common = ["--device", "box-1", "--broker", f"{broker.host}:{broker.port}", "--key", str(tmp_path / "operator")]
        return CliRunner().invoke(inferhub, [*args, *common], env={"INFERHUB_KEY_PASSWORD": ""})

    async def main() -> None:
        async with a_device(tmp_path, broker, verifier=verifier).running() as device:
            await until(lambda: device.link.connected)
            told = await asyncio.to_thread(call, "deploy", "magika@2.0.0", "--team", "files", "--json")
            assert told.exit_code == 0, told.output
            assert json.loads(told.output)["status"] == "done"
            told = await asyncio.to_thread(call, "rollback", "magika")
            assert (told.exit_code, told.output.strip()) == (0, "box-1: rollback magika: CONFIRMED")
            assert [name for name, _, _ in device.commander.done] == ["deploy", "rollback"]
            device.commander.error = LoadError("no variant loads")
            told = await asyncio.to_thread(call, "rollback", "magika", "--json")
            assert told.exit_code == 1
            assert json.loads(told.output)["error"]["code"] == "load_failed"

    asyncio.run(main())


@pytest.mark.parametrize("trap", [refusing, black_hole])
def test_an_unreachable_broker_is_named_with_what_to_check(trap: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tools.hub.commands._CONNECT_TIMEOUT_S", 0.3)
    with trap() as port, pytest.raises(BrokerError, match=f"127.0.0.1:{port} cannot be reached") as caught:
        send(Broker(host="127.0.0.1", port=port), command(), wait_s=1)
    assert "--broker" in caught.value.hint


def test_an_unknown_code_of_a_device_is_passed_on() -> None:
    from tools.hub.commands import _ended

    with pytest.raises(CommandFailedError, match="too hot"):
        _ended({"status": "failed", "code": "thermal", "message": "too hot"})
