"""A box that pulls: real trust child, real folders, its own view of what must never change."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any

import msgspec

from agent.bundles import child
from agent.bundles.fetcher import Transport
from agent.bundles.layout import Layout
from agent.bundles.puller import OnProgress, Puller, StoredBundle
from agent.bundles.resolve import Resolver
from agent.bundles.variants import Box, Runtime
from agent.config import PolicyConfig, StoreConfig
from agent.profile import Hardware, Profile
from tests.fakes.store import StoreWorld

HARDWARE = Hardware(arch="x86_64", cores=2, memory_bytes=8 << 30, cpu_features=("avx2",), gpu_reason="no driver")
PROFILE = Profile(name="test", description="", devices=("cpu",), precisions=("int8", "fp32"))


def box(**changes: Any) -> Box:
    """Return a CPU box; ``changes`` replaces fields."""
    values: dict[str, Any] = {
        "hardware": HARDWARE,
        "policy": PolicyConfig(),
        "devices": PROFILE.devices,
        "precisions": PROFILE.precisions,
        "runtimes": {"onnxruntime": Runtime(version="1.20.0")},
        "agent_version": "0.1.0",
        "codecs": ("zstd",),
    }
    return Box(**(values | changes))


class NearPuller(Puller):
    """A puller whose trust child's code runs in this process, under the test's clock."""

    def __init__(self, *args: Any, wall: Callable[[], float], **more: Any) -> None:
        super().__init__(*args, **more)
        self._wall = wall

    async def _ask(
        self, request: dict[str, Any], wanted: str, on_line: OnProgress = lambda line: None
    ) -> dict[str, Any]:
        lines: list[dict[str, Any]] = []
        around = child.Surroundings(wall=self._wall, synchronised=lambda: False, emit=lines.append)
        parsed = msgspec.json.decode(msgspec.json.encode(self._request | request), type=child.Request)
        try:
            answer = await asyncio.to_thread(child.handle, parsed, around)
        finally:
            for line in lines:
                if line["event"] == "refused":
                    self._tell_refused(line, request)
                else:
                    on_line(line)
        assert answer["event"] == wanted
        return dict(msgspec.json.decode(msgspec.json.encode(answer)))


class DeviceWorld:
    """A state folder and the calls a daemon makes on it."""

    def __init__(
        self,
        state: Path,
        world: StoreWorld,
        urls: Sequence[str] = (),
        *,
        policy: PolicyConfig | None = None,
        hardware: Hardware = HARDWARE,
        **store: Any,
    ) -> None:
        self.state = state
        self.layout = Layout(state)
        values: dict[str, Any] = {
            "urls": tuple(urls) or (world.url,),
            "anchor": str(world.anchor),
            "disk_reserve_bytes": 0,
            "stall_timeout_s": 5.0,
            "metadata_timeout_s": 5.0,
            "tries": 2,
        }
        self.store = StoreConfig(**(values | store))
        self.policy = policy or PolicyConfig()
        self.hardware = hardware
        self.lines: list[dict[str, Any]] = []

    def puller(self, **changes: Any) -> Puller:
        """Return a puller as the daemon makes it."""
        return Puller(self.store, self.policy, self.state, self.hardware, PROFILE, **changes)

    def near_puller(self, wall: Callable[[], float], **changes: Any) -> NearPuller:
        """Return a puller that needs no process, under the clock ``wall``."""
        return NearPuller(self.store, self.policy, self.state, self.hardware, PROFILE, wall=wall, **changes)

    def resolver(self, **changes: Any) -> Resolver:
        """Return what the child uses for metadata, in this process."""
        return Resolver(self.layout, self.store, Transport(stall_timeout_s=self.store.stall_timeout_s), **changes)

    def fetch(self, version: str = "", *, channel: str = "stable", name: str = "tiny") -> StoredBundle:
        """Fetch ``vision/<name>`` through a trust child."""

        async def run() -> StoredBundle:
            return await self.puller().fetch(
                "vision", name, version, channel, on_progress=lambda line: self.lines.append(dict(line))
            )

        return asyncio.run(run())

    def check(self, path: Path) -> StoredBundle:
        """Verify a version folder through a trust child."""

        async def run() -> StoredBundle:
            return await self.puller().check(path)

        return asyncio.run(run())

    def here(self, op: str, **fields: Any) -> dict[str, Any]:
        """Run the child's code in this process: quicker, for steps that a test only needs done."""
        return child.handle(msgspec.json.decode(self.request(op, **fields), type=child.Request))

    def command(self, envelope: bytes) -> tuple[dict[str, Any], str]:
        """Verify a command through a trust child."""

        async def run() -> tuple[dict[str, Any], str]:
            command = await self.puller().verify_command(envelope)
            return command.payload, command.keyid

        return asyncio.run(run())

    def request(self, op: str, **fields: Any) -> bytes:
        """Return a request for a child that the test starts itself."""
        value = {
            "op": op,
            "state_dir": str(self.state),
            "store": self.store,
            "policy": self.policy,
            "hardware": self.hardware,
            "devices": PROFILE.devices,
            "precisions": PROFILE.precisions,
        }
        return msgspec.json.encode(value | fields)

    def serving_bytes(self) -> dict[str, str]:
        """Return every file below ``versions/`` and ``active/`` with its hash and inode."""
        found = {}
        for folder in (self.state / "versions", self.state / "active"):
            for path in sorted(folder.rglob("*")):
                if path.is_file():
                    digest = sha256(path.read_bytes()).hexdigest()
                    found[str(path.relative_to(self.state))] = f"{path.stat().st_ino}:{digest}"
        return found
