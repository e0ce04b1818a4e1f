"""Signed fleet commands: verified in the trust child, offline if need be, at a bounded rate."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
from securesystemslib.dsse import Envelope
from securesystemslib.signer import CryptoSigner

from agent.bundles.puller import Puller
from agent.errors import AgentError, CommandError, OverloadedError, TransientError
from tests.fakes.device import DeviceWorld
from tests.fakes.store import StoreWorld

pytestmark = pytest.mark.integration

COMMAND = {"schema": "inferd-command/1", "id": "1", "name": "ping", "tenant": "default", "args": {}}


@pytest.fixture
def world(tmp_path: Path) -> StoreWorld:
    world = StoreWorld(tmp_path)
    world.publish()
    return world


@pytest.fixture
def device(tmp_path: Path, world: StoreWorld) -> DeviceWorld:
    device = DeviceWorld(tmp_path / "state", world)
    device.resolver().version("vision", "tiny", "", "stable")
    return device


def away(device: DeviceWorld) -> None:
    """Let the store be unreachable."""
    device.store = msgspec.structs.replace(device.store, urls=("http://127.0.0.1:9",))


def test_an_operators_command_is_accepted_without_the_store(world: StoreWorld, device: DeviceWorld) -> None:
    away(device)
    payload, keyid = device.command(world.command(COMMAND))
    assert payload == COMMAND
    assert keyid == world.operator.public_key.keyid


def test_a_new_box_learns_its_operators_from_the_store(tmp_path: Path, world: StoreWorld) -> None:
    payload, _ = DeviceWorld(tmp_path / "new", world).command(world.command(COMMAND))
    assert payload == COMMAND


def test_a_new_box_without_its_store_believes_nobody(tmp_path: Path, world: StoreWorld) -> None:
    device = DeviceWorld(tmp_path / "new", world)
    away(device)
    with pytest.raises(CommandError):
        device.command(world.command(COMMAND))


def _change(envelope: bytes, **changes: object) -> bytes:
    return json.dumps(json.loads(envelope) | changes).encode()


def _other_type(world: StoreWorld) -> bytes:
    envelope = Envelope(json.dumps(COMMAND).encode(), "application/json", {})
    envelope.sign(world.operator)
    return json.dumps(envelope.to_dict()).encode()


FORGED: dict[str, Callable[[StoreWorld], bytes]] = {
    "another signer": lambda world: world.command(COMMAND, signer=CryptoSigner.generate_ed25519()),
    "a team's key": lambda world: world.command(COMMAND, signer=world.teams["vision"]),
    "the store's online key": lambda world: world.command(COMMAND, signer=world.online),
    "a changed payload": lambda world: _change(world.command(COMMAND), payload="e30="),
    "no signature": lambda world: _change(world.command(COMMAND), signatures=[]),
    "another payload type": _other_type,
    "another tenant": lambda world: world.command(COMMAND | {"tenant": "rival"}),
    "no tenant": lambda world: world.command({"name": "ping"}),
    "nine signatures": lambda world: _change(world.command(COMMAND), signatures=[{}] * 9),
    "signatures that are none": lambda world: _change(world.command(COMMAND), signatures=[1]),
    "a signature that is no text": lambda world: _change(world.command(COMMAND), signatures=[{"keyid": 1, "sig": 2}]),
    "a payload that is no base64": lambda world: _change(world.command(COMMAND), payload="!"),
    "a payload that is a number": lambda world: _change(world.command(COMMAND), payload=7),
    "a type that is a number": lambda world: _change(world.command(COMMAND), payloadType=7),
    "a list": lambda world: b"[]",
    "no JSON": lambda world: b"hello",
    "nothing": lambda world: b"",
    "no UTF-8": lambda world: b"\xff",
    "duplicate keys": lambda world: world.command(COMMAND)[:-1] + b',"payload":"e30="}',
    "too many bytes": lambda world: b" " * 65_537,
}


@pytest.mark.parametrize("forge", FORGED.values(), ids=FORGED.keys())
def test_a_command_is_refused_with(
    world: StoreWorld, device: DeviceWorld, forge: Callable[[StoreWorld], bytes]
) -> None:
    with pytest.raises(AgentError) as caught:
        device.command(forge(world))
    assert caught.value.code == "command_refused", str(caught.value)


def test_a_flood_starts_a_bounded_number_of_processes(world: StoreWorld, device: DeviceWorld) -> None:
    async def run() -> list[type]:
        puller = device.puller(commands_burst=2, commands_per_s=0.5, now=lambda: 0.0)
        envelope = world.command(COMMAND)
        outcomes = await asyncio.gather(*(puller.verify_command(envelope) for _ in range(50)), return_exceptions=True)
        return [type(outcome) for outcome in outcomes]

    kinds = asyncio.run(run())
    assert kinds.count(OverloadedError) == 48


def test_a_medium_that_does_not_answer_is_given_up(
    world: StoreWorld, device: DeviceWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def run() -> None:
        await device.puller().survey([("vision", "tiny")], medium=str(world.root))

    monkeypatch.setattr("agent.bundles.puller._MEDIUM_TIMEOUT_S", 0.01)
    with pytest.raises(TransientError, match="does not answer"):
        asyncio.run(run())


def test_questions_about_trust_start_one_process_at_a_time(
    device: DeviceWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    running: list[int] = [0]
    most: list[int] = [0]

    async def ask(self: Puller, request: dict[str, Any], wanted: str) -> dict[str, Any]:
        running[0] += 1
        most[0] = max(most[0], running[0])
        await asyncio.sleep(0)
        running[0] -= 1
        return {"event": wanted}

    async def run() -> None:
        puller = device.puller()
        await asyncio.gather(*(puller.trust() for _ in range(50)))

    monkeypatch.setattr(Puller, "_ask", ask)
    asyncio.run(run())
    assert most == [1]


def test_the_rate_recovers(world: StoreWorld, device: DeviceWorld) -> None:
    now = [0.0]

    async def run() -> None:
        puller = device.puller(commands_burst=1, commands_per_s=0.5, now=lambda: now[0])
        envelope = world.command(COMMAND)
        await puller.verify_command(envelope)
        with pytest.raises(OverloadedError):
            await puller.verify_command(envelope)
        now[0] += 2.0
        await puller.verify_command(envelope)

    asyncio.run(run())
