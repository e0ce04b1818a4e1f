"""Where domains meet: a verified bundle becomes the engine's spec, the engine becomes deployment's host.

Only the composition root uses this module. Each class here is a port's real implementation and holds no policy.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final

import msgspec

from agent.bundles.floor import BUILD_TIME, FloorFile
from agent.bundles.layout import Layout
from agent.bundles.manifest import Manifest, Variant
from agent.bundles.puller import Puller, StoredBundle
from agent.bundles.versions import collect, collect_staging
from agent.clock import Clock
from agent.config import MIB, EngineConfig, PolicyConfig, ServingConfig
from agent.deploy.ports import Bundle, Evidence, Loaded, Progress
from agent.deploy.reconciler import Reconciler
from agent.engine.engine import Engine
from agent.engine.growth import Bounds
from agent.engine.learned import Learned
from agent.engine.memory import HOST, estimate
from agent.engine.meter import NvmlDevices, SystemMeter
from agent.engine.types import Keeping, VariantSpec, VersionSpec, forwarded_header_bytes
from agent.engine.version import Version
from agent.errors import PolicyError, SelfTestError, StateError
from agent.events import EventBus
from agent.profile import Hardware, Profile
from agent.telemetry.commands import CommandInbox
from agent.telemetry.presence import Presence

_ZYGOTES: Final[Mapping[str, str]] = {"onnxruntime": "onnx"}
_SELF_TEST_TIMEOUT_S: Final = 30.0
_RETIRE_TIMEOUT_S: Final = 30.0
_FLOOR_READ_S: Final = 60.0
_ADDRESS_SPACE_BASE: Final = 4096 * MIB  # libraries, thread stacks and arenas reserve far more than they use


class SpecMaker:
    """Translates a manifest and its ranked variants into what the engine loads."""

    def __init__(self, *, engine: EngineConfig, policy: PolicyConfig, serving: ServingConfig, profile: Profile) -> None:
        self._engine = engine
        self._policy = policy
        self._serving = serving
        self._profile = profile

    def version_spec(
        self,
        bundle: Bundle,
    ) -> VersionSpec:
        """Return the spec of a bundle on disk.

        Raises:
            PolicyError: it brings handler code and this box's policy refuses that.
        """
        stored: StoredBundle = bundle.content
        manifest = stored.manifest
        if manifest.handler.module and self._policy.handler_code == "never":
            raise PolicyError(f"{manifest.name} brings handler code and [policy] handler_code is 'never'")
        return VersionSpec(
            model=manifest.name,
            version=manifest.version,
            digest=stored.manifest_sha256,
            variants=tuple(self._variant_spec(manifest, variant, stored.path) for variant in stored.variants),
            dropped=stored.dropped,
            keeping=Keeping(
                lazy=self._engine.lazy(manifest.name),
                keep_alive_s=self._engine.keep_alive_of(manifest.name),
                pinned=self._engine.of(manifest.name).pin,
            ),
        )

    def _variant_spec(self, manifest: Manifest, variant: Variant, path: Path) -> VariantSpec:
        batching = manifest.batching
        device = {"kind": variant.device.kind, "index": 0}
        workers = self._engine.workers_of(manifest.name)
        threads = variant.threads.intra or self._profile.intra_op_threads
        worker: dict[str, Any] = {
            "model": manifest.name,
            "version": manifest.version,
            "variant": variant.id,
            "runtime": variant.runtime,
            "precision": variant.precision,
            "device": device,
            "providers": list(variant.device.providers),
            "bundle_dir": str(path),
            "entry": variant.entry,
            "handler": _plain(manifest.handler),
            "signature": _plain(manifest.signature),
            "classes_file": manifest.classes.file if manifest.classes is not None else None,
            "golden": [
                {
                    **_plain(golden),
                    "compare": _plain(golden.per_variant.get(variant.id, golden.compare)),
                    "per_variant": {},
                }
                for golden in manifest.golden
            ],
            "warmup": {"runs": manifest.warmup.runs, "max_ms": manifest.warmup.max_ms},
            "batching": {"max_batch": batching.max_batch, "max_delay_ms": batching.max_delay_ms, "axis": batching.axis},
            "session": _plain(variant.session),
            "threads": {
                "intra": threads,
                "inter": variant.threads.inter or 1,
            },
            "limits": {"memory_bytes": self._memory_bytes(variant), "open_files": self._engine.open_files_max},
            "sandbox": self._policy.sandbox,
            "share_weights": workers.share_weights,
            "wire": {
                "header_bytes_max": forwarded_header_bytes(self._serving.header_bytes_max),
                "body_bytes_max": self._serving.body_bytes_max,
            },
        }
        runtime = _ZYGOTES.get(variant.runtime, variant.runtime)
        on_cpu = variant.device.kind == "cpu"
        device_name = variant.device.kind if on_cpu else f"{variant.device.kind}:0"
        return VariantSpec(
            id=variant.id,
            runtime=runtime,
            precision=variant.precision,
            device=device_name,
            worker=worker,
            lanes=not manifest.handler.module,
            window=max(32, 2 * batching.max_batch),
            bounds=Bounds(
                least=workers.min,
                most=workers.max or max(workers.min, self._profile.workers_max),
                grow_delay_s=workers.grow_delay_ms / 1000,
                shrink_idle_s=workers.shrink_idle_s,
            ),
            threads=threads,
            need=estimate(
                runtime=runtime,
                place=HOST if on_cpu else device_name,
                file_bytes=sum(manifest.file(name).size for name in variant.files),
                host_mib=variant.memory.host_mb,
                device_mib=variant.memory.device_mb,
                measured=variant.memory.source == "measured",
            ),
        )

    def _memory_bytes(self, variant: Variant) -> int:
        if self._engine.memory_bytes_max:
            return self._engine.memory_bytes_max
        if variant.device.kind != "cpu":
            return 0  # CUDA maps the whole address space of the device
        return _ADDRESS_SPACE_BASE + 4 * variant.memory.host_mb * MIB


def system_meter(config: EngineConfig, hardware: Hardware, profile: Profile) -> SystemMeter:
    """Return the meter of this box, with what its configuration and profile let models take."""
    share = config.memory_share or profile.memory_share
    return SystemMeter(
        budget_bytes=config.memory_budget_bytes or int(share * hardware.memory_bytes),
        device_share=config.device_memory_share,
        devices=NvmlDevices(len(hardware.gpus)) if hardware.gpus else None,
    )


def learned_memory(state_dir: Path, hardware: Hardware) -> Learned:
    """Return what models have taken of this box's memory so far."""
    return Learned(state_dir / "memory.json", hardware.fingerprint())


class BundleStore:
    """deploy's ``Store`` over the trust child and the version directories."""

    def __init__(self, puller: Puller, state_dir: Path, *, keep_versions: int) -> None:
        self._puller = puller
        self._layout = Layout(state_dir)
        self._keep_versions = keep_versions

    async def fetch(
        self, *, team: str, name: str, version: str, channel: str, on_progress: Callable[[Progress], None]
    ) -> Bundle:
        stored = await self._puller.fetch(
            team, name, version, channel, on_progress=lambda line: on_progress(_progress(line))
        )
        return _bundle(stored)

    async def check(self, path: Path) -> Bundle:
        return _bundle(await self._puller.check(path))

    async def resolve(self, *, team: str, name: str, version: str, channel: str) -> tuple[str, str]:
        found = await self._puller.resolve(team, name, version, channel)
        return found.version, found.manifest_sha256

    async def collect(self, keep: frozenset[Path]) -> None:
        await asyncio.to_thread(self._collect, keep)

    def _collect(self, keep: frozenset[Path]) -> None:
        collect(self._layout, keep, newest=self._keep_versions)
        collect_staging(self._layout, now=time.time())


class LoadedVersion:
    """deploy's ``Loaded`` over the engine's ``Version``."""

    def __init__(self, version: Version) -> None:
        self.version = version

    def evidence(self) -> Evidence:
        version = self.version
        variant = version.pool.spec.id if version.pool is not None else ""
        return Evidence(
            good=version.good,
            faults=version.faults,
            deaths=version.deaths,
            ready=version.ready,
            reason=version.reason,
            variant=variant,
        )

    async def self_test(self) -> None:
        value = await self.version.self_test(timeout_s=_SELF_TEST_TIMEOUT_S)
        if not value.get("ok"):
            raise SelfTestError(str(value.get("message") or "a golden output differs"))


class EngineHost:
    """deploy's ``Host`` over the engine."""

    def __init__(self, engine: Engine, specs: Callable[[Bundle], VersionSpec]) -> None:
        self._engine = engine
        self._specs = specs

    async def load(self, bundle: Bundle) -> LoadedVersion:
        return LoadedVersion(await self._engine.load(self._specs(bundle)))

    async def restore(self, bundle: Bundle) -> LoadedVersion:
        return LoadedVersion(await self._engine.restore(self._specs(bundle)))

    def confirm(self, loaded: Loaded) -> None:
        self._engine.confirm(_version(loaded))

    def activate(self, slot: str, loaded: Loaded) -> LoadedVersion | None:
        previous = self._engine.activate(_version(loaded))
        return LoadedVersion(previous) if previous is not None else None

    async def retire(self, loaded: Loaded) -> None:
        await self._engine.retire(_version(loaded), timeout_s=_RETIRE_TIMEOUT_S)

    def expect(self, slot: str, reason: str) -> None:
        self._engine.expect(slot, reason)


class SignedTime:
    """The newest signed time this box has seen (Unix seconds): its clock cannot truly be before it.

    Read from the trust child's floor file, at most once a minute.
    """

    def __init__(self, state_dir: Path, clock: Clock) -> None:
        self._file = FloorFile(Layout(state_dir).floors)
        self._clock = clock
        self._value = float(BUILD_TIME)
        self._read_at: float | None = None

    def __call__(self) -> float:
        now = self._clock.monotonic()
        if self._read_at is None or now - self._read_at > _FLOOR_READ_S:
            self._read_at = now
            with contextlib.suppress(StateError, OSError):
                floor = self._file.read()
                self._value = max(self._value, float(floor.timestamp if floor is not None else 0))
        return self._value


class ReportedState:
    """Keep the retained ``reported`` document equal to what this box serves; a component."""

    name = "daemon.reported"

    def __init__(
        self, *, reconciler: Reconciler, engine: Engine, presence: Presence, inbox: CommandInbox, events: EventBus
    ) -> None:
        self._reconciler = reconciler
        self._engine = engine
        self._presence = presence
        self._inbox = inbox
        self._events = events

    async def run(self) -> None:
        """Look again after each event until cancelled; equal content is not published again."""
        changed = asyncio.Event()
        with self._events.subscribed(lambda _: changed.set()):
            while True:
                changed.clear()
                self._presence.report(self._document(), generation=await self._inbox.generation())
                await changed.wait()

    def _document(self) -> dict[str, Any]:
        serving = {
            row["model"]: {
                **{name: row.get(name) for name in ("version", "digest", "variant", "ready", "fallbacks")},
                "reason": "" if row["ready"] else row["reason"],  # models that come and go are no news to the fleet
            }
            for row in self._engine.status()
        }
        return {"slots": [{**slot, "serving": serving.get(slot["slot"])} for slot in self._reconciler.slots()]}


def _version(loaded: Loaded) -> Version:
    assert isinstance(loaded, LoadedVersion)
    return loaded.version


def _bundle(stored: StoredBundle) -> Bundle:
    manifest = stored.manifest
    return Bundle(
        team=manifest.team,
        name=manifest.name,
        version=manifest.version,
        digest=stored.manifest_sha256,
        path=stored.path,
        content=stored,
    )


def _progress(line: Mapping[str, Any]) -> Progress:
    return Progress(
        phase=str(line.get("event", "")),
        version=str(line.get("version", "")),
        digest=str(line.get("manifest_sha256", "")),
        bytes_done=int(line.get("bytes_done", 0)),
        bytes_total=int(line.get("bytes_total", 0)),
    )


def _plain(value: Any) -> Any:
    return msgspec.to_builtins(value)
