"""inferd: the composition root. The one module that knows every concrete class.

Scopes nest in the order they may stop: telemetry around engine around listeners. Starting goes outside in, so a box
serves what is on its disk before it speaks to any network; stopping goes inside out, so accepted requests are
answered, workers leave, and the last events reach the outbox.
"""

from __future__ import annotations

import asyncio
import fcntl
import os
import random
import secrets
import signal
import socket
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any, Final

import uvloop

from agent import __version__, sdnotify
from agent.adapters import (
    BundleStore,
    EngineHost,
    ReportedState,
    SignedTime,
    SpecMaker,
    TrustRecord,
    VersionInspector,
    learned_memory,
    measured_device,
    system_meter,
)
from agent.arena import Arena, ArenaKeeper
from agent.bundles.puller import Puller
from agent.clock import SystemClock
from agent.config import EXIT_BAD_CONFIG, Config, ModelConfig, ServingConfig
from agent.control import Box, Control
from agent.control_store import StoreVerbs
from agent.control_versions import VersionVerbs
from agent.deploy.desired import Desired
from agent.deploy.journal import Journal
from agent.deploy.plan import Plan
from agent.deploy.reconciler import Reconciler
from agent.deploy.refusals import Refusals
from agent.deploy.sideload import KnownMedia, MediumWatch, Sideload
from agent.deploy.slots import slot_of
from agent.deploy.watch import Watch
from agent.engine.book import VariantBook
from agent.engine.engine import Engine
from agent.engine.spawn import Spawned
from agent.engine.zygote import become_subreaper
from agent.errors import AgentError, ConfigError, StateError
from agent.events import EventBus, Severity, Stream
from agent.gpus import GpuWatch
from agent.heap import HeapTrimmer
from agent.log import get_logger, setup
from agent.metrics import Metrics
from agent.probe import free_memory, probe, readings
from agent.profile import Profile, choose, load_profiles
from agent.scales import Scales
from agent.serving.budget import ReceiveBudget
from agent.serving.frames import FrameServer
from agent.serving.http import HttpServer
from agent.serving.identity import AccessPolicy
from agent.serving.listeners import bind_tcp, bind_unix
from agent.serving.routes import Routes
from agent.supervisor import Component, Supervisor
from agent.telemetry.commands import CommandInbox
from agent.telemetry.link import MqttLink
from agent.telemetry.outbox import Outbox
from agent.telemetry.payloads import Stamper
from agent.telemetry.presence import Presence
from agent.telemetry.reporter import Reporter
from agent.telemetry.status import TelemetryStatus
from agent.telemetry.timesource import KernelClock, boot_id
from agent.telemetry.topics import Topics
from agent.waits import Waits
from agent.watchdog import Watchdog
from agent.wire import Limits

_log = get_logger("daemon")
_PROGRESS_TIMEOUT_S: Final = 10.0
_BOOT_GRACE_S: Final = 10.0
_NOTIFY_PATIENCE_S: Final = 2.0  # for a service manager that is busy


def check(config: Config) -> None:
    """Check what a configuration refers to on this machine.

    Raises:
        ConfigError: something that is not there.
    """
    choose(config.device.profile, probe(), load_profiles())


def run(config: Config, early: Mapping[str, Spawned]) -> int:
    """Run the daemon until it is told to stop; return the process's exit status.

    Args:
        config: Checked.
        early: Zygotes that were started already, by runtime.
    """
    setup(level=config.log.level, style=config.log.style)
    try:
        uvloop.run(serve(config, Path(os.path.abspath(config.device.state_dir)), early))
    except (AgentError, BaseExceptionGroup) as error:
        return _explain(error)
    return 0


async def serve(config: Config, state_dir: Path, early: Mapping[str, Spawned] | None = None) -> None:
    """Run on ``state_dir`` (absolute) until SIGTERM or SIGINT, then stop in order.

    Raises:
        StateError: another daemon uses the state folder, or it cannot be used.
        ConfigError: a listener cannot be opened.
    """
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    inherited = sdnotify.inherited_sockets()
    watchdog_s = sdnotify.watchdog_interval_s()
    become_subreaper()
    clock = SystemClock()
    events, metrics = EventBus(clock), Metrics()
    hardware = probe()
    choice = choose(config.device.profile, hardware, load_profiles())
    profile = choice.profile
    box = Box(
        config=config,
        hardware=hardware,
        choice=choice,
        started_wall_s=clock.wall(),
        started_monotonic_s=clock.monotonic(),
    )
    limits = Limits(header_bytes_max=config.serving.header_bytes_max, body_bytes_max=config.serving.body_bytes_max)
    supervisor = Supervisor(
        clock,
        on_restart=lambda name, error: events.emit(
            Stream.HEALTH, "component.restarted", Severity.WARNING, component=name, reason=str(error)
        ),
    )

    def record_end(failure: type[BaseException] | None, *_: object) -> None:
        """The last worker has left."""
        if failure is None:
            reconciler.stopped()

    async with AsyncExitStack() as stack:
        stack.callback(_lock(state_dir))
        # Telemetry: outermost, so that it hears of everything until the end.
        boot = boot_id()
        stamper = Stamper(
            clock, boot_id=boot, synchronized=KernelClock().synchronized, floor_s=SignedTime(state_dir, clock)
        )
        outbox = await stack.enter_async_context(
            Outbox(state_dir / "outbox.db", config.telemetry.outbox, boot_id=boot, metrics=metrics).opened()
        )
        reporter = Reporter(
            config.telemetry,
            events=events,
            outbox=outbox,
            metrics=metrics,
            stamper=stamper,
            clock=clock,
            rng=random.Random(),
            facts=lambda: {"processes": engine.processes()},
        )
        stack.enter_context(reporter.listening())
        events.emit(Stream.HEALTH, "daemon.started", version=__version__, profile=profile.name, why=choice.reason)
        # Engine and what it serves.
        stack.push(record_end)
        arena = Arena(
            bytes_max=config.shared_memory.arena_bytes_max, idle_bytes_max=config.shared_memory.arena_idle_bytes_max
        )
        engine = Engine(
            config.engine,
            scratch=state_dir / "scratch",
            wire=limits,
            events=events,
            metrics=metrics,
            arena=arena,
            limits=config.limits,
            cores=sorted(os.sched_getaffinity(0)) if _binds(config, profile) else (),
            meter=system_meter(config.engine, hardware, profile),
            learned=learned_memory(state_dir, hardware),
            spawned=early or {},
            gpus=lambda: free_memory(hardware),
            book=VariantBook(state_dir / "variants.json", device=measured_device(hardware)),
        )
        await stack.enter_async_context(engine.running())
        refusals = Refusals(events, clock)
        puller = Puller(
            config.store,
            config.policy,
            state_dir,
            hardware,
            profile,
            on_refused=lambda source, error, about: refusals.source(error, source=source, **about),
        )
        scales = Scales(state_dir / "scales.json")
        specs = SpecMaker(
            engine=config.engine,
            policy=config.policy,
            serving=config.serving,
            profile=profile,
            unified_memory=any(gpu.integrated for gpu in hardware.gpus),
            scales=scales.of,
        )
        journal = Journal(state_dir / "journal.db", device=measured_device(hardware))
        stack.push_async_callback(journal.close)
        store = BundleStore(
            puller,
            state_dir,
            keep_versions=config.deploy.keep_versions,
            collect_above_percent=config.store.collect_above_percent,
        )
        standing = TrustRecord(state_dir, clock)
        reconciler = Reconciler(
            config.deploy,
            store=store,
            host=EngineHost(engine, specs.version_spec),
            journal=journal,
            events=events,
            clock=clock,
            state_dir=state_dir,
            configured=[wish for model in config.models for wish in _configured(model)],
            poll_interval_s=config.store.poll_interval_s,
            refusals=refusals,
            clock_trusted=lambda: standing().clock_trusted,
            clock_quality=lambda: stamper.now()[1],
            boot_id=boot,
            on_revoked=config.policy.on_revoked,
        )
        watch = Watch(
            store=store,
            reconciler=reconciler,
            standing=standing,
            on_long_offline=config.policy.on_long_offline,
            poll_interval_s=config.store.poll_interval_s,
            events=events,
            refusals=refusals,
            clock=clock,
            metrics=metrics,
            rng=random.Random(),
        )
        sideload = Sideload(reconciler, watch, refusals, events)
        await reconciler.open()
        watch.look()
        if not reconciler.booted.is_set():
            engine.warm("onnx")
        # The fleet.
        topics = Topics(config.device.tenant, config.device.effective_id)
        presence = Presence(lambda: _birth(engine))
        link, inbox = None, None
        if config.telemetry.host:
            link = MqttLink(
                config.telemetry,
                topics=topics,
                outbox=outbox,
                presence=presence,
                stamper=stamper,
                clock=clock,
                metrics=metrics,
                on_command=lambda message: inbox.offer(message) if inbox is not None else None,
                rng=random.Random(),
                new_sid=lambda: secrets.token_hex(8),
            )
        gpus = GpuWatch(
            hardware.gpus,
            read=lambda: readings(hardware),
            interval_s=config.device.gpu_interval_s,
            clock=clock,
            events=events,
            metrics=metrics,
            on_lost=engine.device_lost,
            on_back=engine.device_back,
        )
        waits = Waits()
        control = Control(
            box,
            engine=engine,
            gpus=gpus,
            reconciler=reconciler,
            events=events,
            telemetry=TelemetryStatus(config.telemetry, outbox, link),
            store=StoreVerbs(config.policy, reconciler=reconciler, watch=watch, sideload=sideload, trust=puller.trust),
            versions=VersionVerbs(reconciler, engine, scales, specs.bounds_of, waits=waits),
            waits=waits,
            inspector=VersionInspector(puller, state_dir),
        )
        keeper = ArenaKeeper(arena, clock=clock, idle_s=config.shared_memory.arena_idle_s)
        components: list[Component] = [engine, reconciler, watch, reporter, keeper, HeapTrimmer(clock)]
        if any(gpu.uuid for gpu in hardware.gpus):
            components.append(gpus)
        if config.store.sideload_path:
            known = KnownMedia(state_dir / "media.json")
            poll_s = config.store.sideload_poll_s
            components.append(MediumWatch(config.store.sideload_path, sideload, known, clock=clock, poll_s=poll_s))
        if link is not None:
            commands = CommandInbox(
                state_dir / "commands.db",
                config.telemetry,
                topics=topics,
                verifier=puller,
                commander=control,
                outbox=outbox,
                presence=presence,
                stamper=stamper,
                events=events,
                clock=clock,
                metrics=metrics,
            )
            components.append(link)
            try:
                inbox = await stack.enter_async_context(commands.opened())
            except StateError as error:  # a command that cannot be recorded could be replayed; the models serve
                _log.error("no fleet commands until the next start", reason=str(error))
                events.emit(Stream.HEALTH, "commands.unavailable", Severity.ERROR, reason=str(error))
            else:
                reported = ReportedState(
                    reconciler=reconciler, engine=engine, presence=presence, inbox=inbox, events=events
                )
                components += [inbox, reported]
        if watchdog_s is not None:
            parts = {"journal": journal.wanted, "engine": engine.progress}
            components.append(
                Watchdog(
                    parts,
                    feed=lambda: sdnotify.notify("WATCHDOG=1"),
                    interval_s=watchdog_s,
                    patience_s=_PROGRESS_TIMEOUT_S,
                )
            )
        await stack.enter_async_context(supervisor.running(*components))
        # Listeners: innermost, so that intake stops first.
        # What is on disk is served before anybody may ask, unless a model takes its time.
        await _first_of(reconciler.booted, stop, timeout_s=_BOOT_GRACE_S)
        servers = _servers(config, inherited, engine=engine, control=control, metrics=metrics, arena=arena)
        await stack.enter_async_context(_listening(servers))
        status = f"STATUS=serving {', '.join(engine.models()) or 'no model yet'}"
        sdnotify.notify("READY=1", status, patience_s=_NOTIFY_PATIENCE_S)
        _log.info("ready", models=engine.models(), state_dir=str(state_dir))
        await stop.wait()
        sdnotify.notify("STOPPING=1", patience_s=_NOTIFY_PATIENCE_S)
        _log.info("stopping")
        events.emit(Stream.HEALTH, "daemon.stopping")
        waits.end()


async def _first_of(*events: asyncio.Event, timeout_s: float) -> None:
    """Return when one of the events is set, or the time is up."""
    async with asyncio.TaskGroup() as group:
        waiting = [group.create_task(event.wait()) for event in events]
        await asyncio.wait(waiting, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
        for task in waiting:
            task.cancel()


@asynccontextmanager
async def _listening(servers: Sequence[FrameServer | HttpServer]) -> AsyncIterator[None]:
    """All servers accept as long as the body runs; afterwards they stop intake together and drain side by side."""
    leave = asyncio.Event()

    async def hold(server: FrameServer | HttpServer, accepting: asyncio.Event) -> None:
        async with server.serving():
            accepting.set()
            await leave.wait()

    async with asyncio.TaskGroup() as group:
        try:
            for server in servers:
                accepting = asyncio.Event()
                group.create_task(hold(server, accepting))
                await accepting.wait()
            yield
        finally:
            leave.set()


def _servers(
    config: Config,
    inherited: dict[str, socket.socket],
    *,
    engine: Engine,
    control: Control,
    metrics: Metrics,
    arena: Arena,
) -> list[FrameServer | HttpServer]:
    serving = config.serving
    policy = AccessPolicy(config.auth, own_uid=os.getuid())
    budget = ReceiveBudget(serving.receive_bytes_max)
    routes = Routes(engine=engine, control=control, metrics=metrics, version=__version__)
    app = routes.app()
    common: dict[str, Any] = {"policy": policy, "budget": budget, "config": serving, "metrics": metrics, "arena": arena}
    frames = inherited.get("frames") or bind_unix(Path(serving.frame_socket))
    unix = inherited.get("http-unix") or bind_unix(Path(serving.http_socket))
    tcp = inherited.get("http") or _bind_tcp(serving)
    servers: list[FrameServer | HttpServer] = [
        FrameServer(frames, engine=engine, control=control, shared_memory=config.shared_memory, **common),
        HttpServer(unix, engine=engine, app=app, name="http-unix", **common),
    ]
    if tcp is not None:
        servers.append(HttpServer(tcp, engine=engine, app=app, name="http", **common))
    return servers


def _bind_tcp(serving: ServingConfig) -> socket.socket | None:
    return bind_tcp(serving.http_host, serving.http_port) if serving.http_port else None


def _lock(state_dir: Path) -> Callable[[], None]:
    """Hold the state folder for this process; return what lets it go."""
    try:
        state_dir.mkdir(parents=True, exist_ok=True, mode=0o700)
        descriptor = os.open(state_dir / "daemon.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise StateError(f"{state_dir}: {error.strerror}") from error
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(descriptor)
        raise StateError(f"{state_dir} is in use by another inferd") from error
    return lambda: os.close(descriptor)


def _binds(config: Config, profile: Profile) -> bool:
    return config.engine.pin_cores == "always" or (config.engine.pin_cores == "profile" and profile.pin_cores)


def _configured(model: ModelConfig) -> list[Desired]:
    """Return the wishes of one entry: for its default, and for each version beside it."""
    entry = f"{model.team}/{model.name}"
    agreed = ":incompatible" if model.allow_incompatible else ""  # another wish: one that was refused is tried again
    default = Desired(
        id=f"file:{entry}:{model.version or model.channel}{agreed}",
        slot=model.name,
        team=model.team,
        version=model.version,
        channel=model.channel,
        plan=Plan(allow_incompatible=model.allow_incompatible),
    )
    return [default] + [
        Desired(id=f"beside:{entry}:{version}", slot=slot_of(model.name, version), team=model.team, version=version)
        for version in model.beside
    ]


def _birth(engine: Engine) -> dict[str, Any]:
    active = [
        {
            "slot": row["slot"],
            "version": row.get("version"),
            "digest": row.get("digest"),
            "variant": row.get("variant"),
        }
        for row in engine.status()
        if "version" in row
    ]
    return {"agent": __version__, "active": active}


def _explain(error: BaseException) -> int:
    """Log why the daemon cannot run and return its exit status; a bug is raised again with its traceback."""
    leaves = _leaves(error)
    if not all(isinstance(leaf, AgentError) for leaf in leaves):
        raise error
    for leaf in leaves:
        _log.error("cannot run", code=getattr(leaf, "code", "internal"), reason=str(leaf))
    return EXIT_BAD_CONFIG if any(isinstance(leaf, ConfigError) for leaf in leaves) else 1


def _leaves(error: BaseException) -> list[BaseException]:
    if not isinstance(error, BaseExceptionGroup):
        return [error]
    return [leaf for inner in error.exceptions for leaf in _leaves(inner)]
