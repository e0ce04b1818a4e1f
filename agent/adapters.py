"""Where domains meet: a verified bundle becomes the engine's spec, the engine becomes deployment's host.

Only the composition root uses this module. Each class here is a port's real implementation and holds no policy.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
import time
from collections.abc import Callable, Coroutine, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import msgspec

from agent import __version__
from agent.bundles import collection
from agent.bundles import manifest as manifests
from agent.bundles.attempt import read_attempt
from agent.bundles.floor import BUILD_TIME, FloorFile
from agent.bundles.freshness import judge
from agent.bundles.layout import Layout
from agent.bundles.manifest import Index, Manifest, Tensor, Variant, parse_index
from agent.bundles.puller import IndexedVersion, Puller, StoredBundle, SurveyedModel
from agent.bundles.structure import NATIVE_FORMATS
from agent.bundles.versions import list_versions
from agent.clock import Clock
from agent.config import MIB, EngineConfig, PolicyConfig, ServingConfig
from agent.deploy.interface import CODE, Extent, Interface, Labels, Port
from agent.deploy.ports import (
    Bundle,
    Collected,
    Copies,
    Evidence,
    Inventory,
    Kept,
    Loaded,
    Mark,
    Needed,
    News,
    Progress,
    Pull,
    Standing,
    Survey,
)
from agent.deploy.reconciler import Reconciler
from agent.deploy.rollout import Rollout
from agent.deploy.slots import model_of, version_beside
from agent.engine.engine import Engine
from agent.engine.growth import Bounds
from agent.engine.learned import Learned
from agent.engine.memory import HOST, estimate
from agent.engine.meter import NvmlDevices, SystemMeter
from agent.engine.shadow import Tally
from agent.engine.types import Keeping, VariantSpec, VersionSpec, forwarded_header_bytes
from agent.engine.version import Version
from agent.errors import AgentError, NotFoundError, PolicyError, SelfTestError, StateError, TransientError
from agent.events import EventBus
from agent.profile import Hardware, Profile
from agent.scales import Scale
from agent.telemetry.commands import CommandInbox
from agent.telemetry.presence import Presence

_ZYGOTES: Final[Mapping[str, str]] = {"onnxruntime": "onnx"}  # others are called as their runtime
_EXPORTED: Final = "pt2"  # a format of torch that has a zygote of its own, because reading it takes so much to import
_RUNTIME_PACKAGES: Final = ("onnxruntime", "onnxruntime_gpu", "torch")
_SELF_TEST_TIMEOUT_S: Final = 30.0
_RETIRE_TIMEOUT_S: Final = 30.0
_LOCK_WAIT_S: Final = 30.0
_EVERYTHING: Final = 1 << 62  # bytes: whatever can go
_FLOOR_READ_S: Final = 60.0
_ADDRESS_SPACE_BASE: Final = 4096 * MIB  # libraries, thread stacks and arenas reserve far more than they use
_RESIDENT_BASE: Final = 512 * MIB  # handler, requests, and what CUDA's libraries take of the host


class SpecMaker:
    """Translates a manifest and its ranked variants into what the engine loads."""

    def __init__(
        self,
        *,
        engine: EngineConfig,
        policy: PolicyConfig,
        serving: ServingConfig,
        profile: Profile,
        unified_memory: bool = False,
        scales: Callable[[str], Scale | None] = lambda model: None,
    ) -> None:
        """``unified_memory``: the GPU shares the host's; ``scales``: the workers an operator wants, if any."""
        self._unified_memory = unified_memory
        self._scales = scales
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

    def _latency_ms_max(self, model: str, declared_ms: int) -> float:
        """Return how long a golden input may take: what the publisher grants, or less where this box wants less."""
        own_ms = self._engine.of(model).selftest_ms_max
        return min(declared_ms, own_ms) if own_ms else declared_ms

    def _variant_spec(self, manifest: Manifest, variant: Variant, path: Path) -> VariantSpec:
        batching = manifest.batching
        pinned = self._engine.device_of(manifest.name) if variant.device.kind == "cuda" else ""
        device = {"kind": variant.device.kind, "index": int(pinned.partition(":")[2] or 0)}
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
                    "timeout_ms": self._latency_ms_max(manifest.name, golden.timeout_ms),
                }
                for golden in manifest.golden
            ],
            "warmup": _plain(manifest.warmup),
            "batching": {"max_batch": batching.max_batch, "max_delay_ms": batching.max_delay_ms, "axis": batching.axis},
            "session": _plain(variant.session),
            "threads": {
                "intra": threads,
                "inter": variant.threads.inter or 1,
            },
            "limits": {"memory_bytes": self._memory_bytes(variant), "open_files": self._engine.open_files_max},
            "sandbox": self._policy.sandbox,
            "code_sandbox": self._policy.code_sandbox if _brings_code(manifest, variant) else "none",
            "share_weights": workers.share_weights,
            "wire": {
                "header_bytes_max": forwarded_header_bytes(self._serving.header_bytes_max),
                "body_bytes_max": self._serving.body_bytes_max,
            },
        }
        runtime = _zygote(manifest, variant)
        on_cpu = variant.device.kind == "cpu"
        return VariantSpec(
            id=variant.id,
            runtime=runtime,
            precision=variant.precision,
            device="cpu" if on_cpu else f"{variant.device.kind}:{device['index']}",
            pinned_device=pinned,
            compute_min=variant.device.min_compute if not on_cpu else "",
            worker=worker,
            lanes=not manifest.handler.module,
            window=max(32, 2 * batching.max_batch),
            bounds=self.bounds_of(manifest.name),
            threads=threads,
            resident_bytes_max=self._engine.resident_bytes_max or _RESIDENT_BASE + 4 * variant.memory.host_mb * MIB,
            need=estimate(
                runtime=runtime,
                place=HOST if on_cpu else pinned or variant.device.kind,
                file_bytes=sum(manifest.file(name).size for name in variant.files),
                host_mib=variant.memory.host_mb,
                device_mib=variant.memory.device_mb,
                measured=variant.memory.source == "measured",
                unified=self._unified_memory,
            ),
        )

    def bounds_of(self, model: str) -> Bounds:
        """Return between what a model's number of workers may change."""
        workers, scale = self._engine.workers_of(model), self._scales(model)
        least, most = (workers.min, workers.max) if scale is None else (scale.least, scale.most)
        return Bounds(
            least=least,
            most=most or max(least, self._profile.workers_max),
            grow_delay_s=workers.grow_delay_ms / 1000,
            shrink_idle_s=workers.shrink_idle_s,
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
        devices=NvmlDevices(hardware) if hardware.gpus else None,
    )


def learned_memory(state_dir: Path, hardware: Hardware) -> Learned:
    """Return what models have taken of this box's memory so far."""
    return Learned(state_dir / "memory.json", hardware.fingerprint())


class BundleStore:
    """deploy's ``Store`` over the trust child and the version directories."""

    def __init__(
        self, puller: Puller, state_dir: Path, *, keep_versions: int, collect_above_percent: float = 85.0
    ) -> None:
        self._collect_above = collect_above_percent / 100
        self._puller = puller
        self._layout = Layout(state_dir)
        self._keep_versions = keep_versions
        self._one_collection = asyncio.Lock()  # each holds a thread

    async def fetch(
        self,
        *,
        team: str,
        name: str,
        version: str,
        channel: str,
        on_progress: Callable[[Progress], None],
        medium: str = "",
    ) -> Bundle:
        stored = await self._puller.fetch(
            team, name, version, channel, medium=medium, on_progress=lambda line: on_progress(_progress(line))
        )
        return _bundle(stored)

    async def check(self, path: Path) -> Bundle:
        return _bundle(await self._puller.check(path))

    async def resolve(self, *, team: str, name: str, version: str, channel: str, medium: str = "") -> Mark:
        found = await self._puller.resolve(team, name, version, channel, medium=medium)
        return Mark(version=found.version, digest=found.manifest_sha256, seq=found.seq, size_bytes=found.bytes_total)

    async def survey(self, models: Sequence[tuple[str, str]], *, medium: str = "") -> Survey:
        answer = await self._puller.survey(models, medium=medium)
        return Survey(
            issued=answer.issued,
            origin=answer.origin,
            models=tuple(_news(model) for model in answer.models),
            missing={f"{item.team}/{item.name}": item.reason for item in answer.missing},
        )

    async def heard(self) -> Sequence[News]:
        return await asyncio.to_thread(self._heard)

    def _heard(self) -> list[News]:
        found = []
        for path in self._layout.indexes():
            with contextlib.suppress(OSError, AgentError):  # the next refresh brings it anew
                found.append(_revoked_by(parse_index(path.read_bytes())))
        return found

    async def inventory(self) -> Inventory:
        items = await asyncio.to_thread(collection.inventory, self._layout)
        return Inventory(
            versions=tuple(_kept(item) for item in items if item.kind == "version"),
            pulls=tuple(
                Pull(digest=item.digest, size_bytes=item.size_bytes, idle_s=item.idle_s, held=item.held)
                for item in items
                if item.kind == "staging"
            ),
            free_bytes=collection.free_bytes(self._layout.root),
            used_share=collection.used_share(self._layout.root),
        )

    async def collect(
        self, needed: Callable[[], Coroutine[Any, Any, Needed]], *, room: bool = False, dry_run: bool = False
    ) -> list[Collected]:
        loop = asyncio.get_running_loop()

        def collect() -> list[Collected]:
            with _locked(self._layout.lock):  # perhaps after half a minute, in which deployments began and ended
                known = asyncio.run_coroutine_threadsafe(needed(), loop).result(_LOCK_WAIT_S)
                return self._collect_held(known, room, dry_run)

        async with self._one_collection:
            return await asyncio.to_thread(collect)

    def _collect_held(self, needed: Needed, room: bool, dry_run: bool) -> list[Collected]:
        full = collection.used_share(self._layout.root) > self._collect_above
        removals = collection.plan(
            collection.inventory(self._layout),
            collection.Needed(paths=needed.paths, digests=needed.digests, revoked=needed.revoked),
            keep=self._keep_versions,
            room_bytes=_EVERYTHING if room or full else 0,
        )
        if not dry_run:
            removals = collection.remove(self._layout, removals)
        return [_collected(removal) for removal in removals]


class VersionInspector:
    """control's ``Inspector`` over the trust child and the version directories; one look at a time."""

    def __init__(self, puller: Puller, state_dir: Path) -> None:
        self._puller = puller
        self._layout = Layout(state_dir)
        self._one = asyncio.Lock()

    async def inspect(self, team: str, name: str, version: str) -> dict[str, Any]:
        for stored in await asyncio.to_thread(list_versions, self._layout):
            if (stored.name, stored.version) == (name, version) and team in ("", stored.team):
                async with self._one:
                    return await self._puller.inspect(stored.path)
        raise NotFoundError(f"{name}@{version} is not on this box; inferctl deploy {name}@{version} brings it")


class LoadedVersion:
    """deploy's ``Loaded`` over the engine's ``Version``, which another slot may hold, too.

    Args:
        engine: Whose it is.
        version: What is loaded.
        beside: It is held by a slot beside its model's default.
        anew: What it did before now is no evidence.
    """

    def __init__(self, engine: Engine, version: Version, *, beside: bool, anew: bool = False) -> None:
        self.version = version
        self.beside = beside
        self._engine = engine
        self._before = self._all() if anew else Evidence()

    def evidence(self) -> Evidence:
        return self._all().since(self._before)

    def _all(self) -> Evidence:
        version = self.version
        variant = version.pool.spec.id if version.pool is not None else ""
        return Evidence(
            good=version.good,
            faults=version.faults,
            late=version.late,
            short=version.short,
            deaths=version.deaths,
            under_way=version.pool.outstanding if version.pool is not None else 0,
            ready=version.ready,
            reason=version.reason,
            variant=variant,
            latency=version.spread.counts(),
            recent=version.recent(),
            copies=_copies(self._engine.tried(version)),
        )

    async def self_test(self) -> None:
        timeout_s = min(_SELF_TEST_TIMEOUT_S, self._engine.hang_timeout_s)
        value = await self.version.self_test(timeout_s=timeout_s)
        if not value.get("ok"):
            raise SelfTestError(str(value.get("message") or "a golden output differs"))


class EngineHost:
    """deploy's ``Host`` over the engine."""

    def __init__(self, engine: Engine, specs: Callable[[Bundle], VersionSpec]) -> None:
        self._engine = engine
        self._specs = specs

    async def load(self, slot: str, bundle: Bundle) -> LoadedVersion:
        beside = bool(version_beside(slot))
        version = await self._engine.load(self._specs(bundle), beside=beside)
        return LoadedVersion(self._engine, version, beside=beside, anew=True)

    async def restore(self, slot: str, bundle: Bundle) -> LoadedVersion:
        beside = bool(version_beside(slot))
        version = await self._engine.restore(self._specs(bundle), beside=beside)
        return LoadedVersion(self._engine, version, beside=beside)

    def try_out(self, loaded: Loaded, *, canary_percent: float, shadow_percent: float) -> None:
        version = _held(loaded).version
        self._engine.try_out(version, canary_percent=canary_percent, shadow_percent=shadow_percent)

    def end_try(self, loaded: Loaded) -> None:
        self._engine.end_try(_held(loaded).version)

    def confirm(self, loaded: Loaded) -> None:
        held = _held(loaded)
        self._engine.confirm(held.version, beside=held.beside)

    def activate(self, slot: str, loaded: Loaded) -> LoadedVersion | None:
        beside, version = bool(version_beside(slot)), _held(loaded).version
        previous = self._engine.activate_beside(version) if beside else self._engine.activate(version)
        return LoadedVersion(self._engine, previous, beside=beside) if previous is not None else None

    async def retire(self, loaded: Loaded) -> None:
        held = _held(loaded)
        await self._engine.retire(held.version, beside=held.beside, timeout_s=_RETIRE_TIMEOUT_S)

    def expect(self, slot: str, reason: str) -> None:
        self._engine.expect(model_of(slot), reason, version=version_beside(slot))

    def forget(self, slot: str) -> None:
        self._engine.forget(model_of(slot), version=version_beside(slot))


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


class TrustRecord:
    """Where the box stands by what is on its disk; cheap enough to be asked every minute."""

    def __init__(self, state_dir: Path, clock: Clock) -> None:
        self._layout = Layout(state_dir)
        self._clock = clock

    def __call__(self) -> Standing:
        issued = 0
        with contextlib.suppress(StateError, OSError):
            floor = FloorFile(self._layout.floors).read()
            issued = floor.timestamp if floor is not None else 0
        attempt = read_attempt(self._layout.attempt)
        refused = attempt is not None and attempt.refused
        judged = judge(issued=issued, wall=self._clock.wall(), floor=BUILD_TIME, refused=refused)
        return Standing(freshness=str(judged.freshness), clock_trusted=judged.clock_trusted, age_s=judged.age_s)


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
            row["slot"]: {
                **{name: row.get(name) for name in ("version", "digest", "variant", "ready", "fallbacks")},
                # Models that come and go are no news to the fleet, nor are the seconds to the next try.
                "reason": "" if row["ready"] else row.get("lasting", row["reason"]),
                "selftest": _test_failure(row.get("selftest")),
                **({"canary": _canary(row["canary"])} if "canary" in row else {}),
            }
            for row in self._engine.status()
        }
        slots = self._reconciler.slots()
        for slot in slots:
            del slot["held_by"]  # comes and goes with applications; what waits for it says so
        return {"slots": [{**slot, "serving": serving.get(slot["slot"])} for slot in slots]}


@contextlib.contextmanager
def _locked(lock: Path) -> Iterator[None]:
    """Keep trust children and other collections away; ``TransientError`` if one does not end."""
    descriptor = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    deadline = time.monotonic() + _LOCK_WAIT_S
    try:
        while True:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError as error:
                if time.monotonic() > deadline:
                    raise TransientError("the store's files are in use; try again") from error
            time.sleep(0.02)
        yield
    finally:
        os.close(descriptor)


def _brings_code(manifest: Manifest, variant: Variant) -> bool:
    native = variant.trusted_native or any(manifest.file(path).format in NATIVE_FORMATS for path in variant.files)
    return bool(manifest.handler.module) or native


def _zygote(manifest: Manifest, variant: Variant) -> str:
    if variant.runtime == "torch" and manifest.file(variant.entry).format == _EXPORTED:
        return "torch-export"
    return _ZYGOTES.get(variant.runtime, variant.runtime)


def measured_device(hardware: Hardware) -> str:
    """Return what measurements of variants hold for: this hardware and driver, these runtimes, this agent.

    The runtimes by their metadata folders' names: ``importlib.metadata`` would cost the daemon two megabytes.
    """
    packages = Path(msgspec.__file__).parents[1]
    runtimes = sorted(
        folder.name.removesuffix(".dist-info")
        for name in _RUNTIME_PACKAGES
        for folder in packages.glob(f"{name}-*.dist-info")
    )
    return "/".join((hardware.fingerprint(), *runtimes, __version__))


def _test_failure(row: Mapping[str, Any] | None) -> str:
    """Return why the last self-test of what serves was not passed, empty if it was: its figures are no news."""
    return "" if row is None or row["ok"] else f"{row['variant']}: {row['message']}"


def _held(loaded: Loaded) -> LoadedVersion:
    assert isinstance(loaded, LoadedVersion)
    return loaded


def _bundle(stored: StoredBundle) -> Bundle:
    manifest = stored.manifest
    return Bundle(
        team=manifest.team,
        name=manifest.name,
        version=manifest.version,
        digest=stored.manifest_sha256,
        path=stored.path,
        interface=_interface(manifest),
        content=stored,
        rollout=_rollout(manifest.rollout),
    )


def _canary(status: Mapping[str, Any]) -> dict[str, Any]:
    """Return what the fleet is told of a candidate: what changes with each step only."""
    return {name: status[name] for name in ("version", "digest", "canary_percent", "shadow_percent")}


def _rollout(asked: manifests.Rollout | None) -> Rollout | None:
    if asked is None:
        return None
    return Rollout(
        canary=asked.canary or None,
        shadow=asked.shadow or None,
        step_s=asked.step_s or None,
        calls_min=asked.calls_min or None,
        agreement_min=asked.min_agreement or None,
    )


def _copies(tally: Tally) -> Copies:
    return Copies(
        compared=tally.compared,
        agreed=tally.agreed,
        skipped=sum(tally.skipped.values()),
        durations=tally.durations,
        originals=tally.originals,
        difference=tally.difference,
    )


def _interface(manifest: Manifest) -> Interface:
    signature, axis = manifest.signature, manifest.batching.axis
    stacked = all(tensor.shape and tensor.shape[0] == axis for tensor in (*signature.inputs, *signature.outputs))

    def extent(size: int | str | None) -> Extent:
        if not isinstance(size, str):
            return Extent() if size is None else Extent(low=size, high=size)
        bounds = signature.dims.get(size)
        low, high = (bounds.min, bounds.max) if bounds is not None else (0, None)
        if stacked and size == axis:  # a request's rows are one batch at most
            rows_max = manifest.batching.max_batch
            low, high = max(low, 1), rows_max if high is None else min(high, rows_max)
        return Extent(low=low, high=high, name=size)

    def ports(tensors: Iterable[Tensor]) -> dict[str, Port]:
        return {
            tensor.name: Port(dtype=tensor.dtype, shape=tuple(map(extent, tensor.shape)), layout=tensor.layout)
            for tensor in tensors
        }

    classes = manifest.classes
    return Interface(
        inputs=ports(signature.inputs),
        outputs=ports(signature.outputs),
        handler=manifest.handler.id or CODE,
        labels=Labels(count=classes.count, digest=manifest.file(classes.file).sha256) if classes is not None else None,
    )


def _news(model: SurveyedModel) -> News:
    return News(
        team=model.team,
        name=model.name,
        channels={channel: _mark(item) for channel, item in model.channels.items()},
        newest=_mark(model.newest) if model.newest is not None else None,
        revoked=tuple(map(_mark, model.revoked)),
        deprecated=tuple(map(_mark, model.deprecated)),
    )


def _revoked_by(index: Index) -> News:
    revoked = (entry for entry in index.versions if entry.status == "revoked")
    marks = (Mark(version=entry.version, digest=entry.manifest_sha256, reason=entry.reason) for entry in revoked)
    return News(team=index.team, name=index.name, channels={}, newest=None, revoked=tuple(marks), deprecated=())


def _mark(item: IndexedVersion) -> Mark:
    return Mark(version=item.version, digest=item.digest, seq=item.seq, size_bytes=item.bytes, reason=item.reason)


def _kept(item: collection.Stored) -> Kept:
    return Kept(
        team=item.team,
        name=item.name,
        version=item.version,
        digest=item.digest,
        seq=item.seq,
        path=item.path,
        size_bytes=item.size_bytes,
    )


def _collected(removal: collection.Removal) -> Collected:
    item = removal.item
    what = f"{item.team}/{item.name} {item.version}" if item.kind == "version" else f"pull of {item.digest[:12]}"
    return Collected(what=what, path=item.path, size_bytes=item.size_bytes, reason=removal.reason)


def _progress(line: Mapping[str, Any]) -> Progress:
    return Progress(
        phase=str(line.get("event", "")),
        version=str(line.get("version", "")),
        digest=str(line.get("manifest_sha256", "")),
        bytes_done=int(line.get("bytes_done", 0)),
        bytes_total=int(line.get("bytes_total", 0)),
        rate_bps=int(line.get("rate_bps", 0)),
    )


def _plain(value: Any) -> Any:
    return msgspec.to_builtins(value)
