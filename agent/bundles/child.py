"""The trust child: a short-lived process that talks to the store and checks every signature.

``python -m agent.bundles.child`` reads one JSON request from standard input, writes JSON lines to standard output and
exits. Operations: ``resolve``, ``fetch``, ``check``, ``inspect``, ``survey``, ``trust``, ``verify_command``. The last
line is the answer: ``resolved``, ``done``, ``inspected``, ``surveyed``, ``trust``, ``command`` or ``error`` (``code``,
``message``, ``retryable``). Before it may come ``resolved``, ``progress``, ``verifying`` and ``refused``: a source
whose answer does not hold (``source``, ``code``, ``message``). Exit status 0 means that the last line is an answer, an
error included.

A request with ``medium``, a folder, asks that instead of the configured stores.

Here untrusted bytes meet parsers, away from the daemon; the process dies with its parent.
"""

from __future__ import annotations

import ctypes
import json
import os
import resource
import signal
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal

import msgspec

from agent import __version__
from agent.bundles import recheck, zstd
from agent.bundles.floor import BUILD_TIME, FloorFile
from agent.bundles.layout import Layout
from agent.bundles.variants import Box, Runtime
from agent.config import MirrorConfig, PolicyConfig, StoreConfig
from agent.errors import (
    AgentError,
    CommandError,
    InvalidInputError,
    StateError,
    StoreError,
    TargetNotFoundError,
    UnsafeBundleError,
)
from agent.profile import Hardware

if TYPE_CHECKING:
    from agent.bundles.fetcher import Transport
    from agent.bundles.resolve import Resolver

REQUEST_BYTES_MAX: Final = 1024 * 1024
_INSPECT_BYTES_MAX: Final = 1024**3
_ASK_AGAIN_S: Final = 60  # an unknown signer makes the store be asked at most so often
_PR_SET_PDEATHSIG: Final = 1
_NICE: Final = 10  # inference goes first
_DESERTED: Final = 1  # exit status once the daemon is gone

# How manifests call a runtime -> distributions that provide it, and those of them built with CUDA.
_DISTRIBUTIONS: Final[Mapping[str, tuple[tuple[str, ...], tuple[str, ...]]]] = {
    "onnxruntime": (("onnxruntime-gpu", "onnxruntime"), ("onnxruntime-gpu",)),
    "torch": (("torch",), ("torch",)),
}


_SIGNER_LIBRARIES: Final = ("azure", "boto3", "botocore", "google.cloud", "hvac", "PyKCS11", "sigstore", "tkey")


class Request(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What the daemon asks. Each operation reads the fields it needs."""

    op: Literal["resolve", "fetch", "check", "inspect", "survey", "trust", "verify_command"]
    state_dir: str
    store: StoreConfig = msgspec.field(default_factory=StoreConfig)
    policy: PolicyConfig = msgspec.field(default_factory=PolicyConfig)
    hardware: Hardware | None = None
    devices: tuple[str, ...] = ("cpu",)
    precisions: tuple[str, ...] = ()
    team: str = ""
    name: str = ""
    version: str = ""
    channel: str = "stable"
    path: str = ""
    medium: str = ""
    models: tuple[tuple[str, str], ...] = ()  # team and name
    envelope: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Surroundings:
    """The world of a request: the system clock (Unix seconds), whether it follows a time server (``None``: as the
    kernel says), and who is told the lines before the answer."""

    wall: Callable[[], float]
    synchronised: Callable[[], bool] | None
    emit: recheck.Emit


def main() -> int:
    """Serve one request."""
    _die_with_parent()
    os.nice(_NICE)
    os.umask(0o022)
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))  # a bundle may have 4,096 files, all open in a pull
    try:
        request = _read_request(sys.stdin.buffer.read(REQUEST_BYTES_MAX + 1))
        if request.op == "inspect":  # libraries read what a model file says of its own size
            resource.setrlimit(resource.RLIMIT_DATA, (_INSPECT_BYTES_MAX, _INSPECT_BYTES_MAX))
        answer = handle(request)
    except AgentError as error:
        answer = {"event": "error", "code": error.code, "message": str(error), "retryable": error.retryable}
        if error.retry_after_s:
            answer["retry_after_s"] = error.retry_after_s
    emit(answer)
    return 0


def handle(request: Request, around: Surroundings | None = None) -> dict[str, Any]:
    """Carry out ``request`` and return the answer line; ``AgentError`` if it fails."""
    around = around or Surroundings(wall=time.time, synchronised=None, emit=emit)
    layout = Layout(Path(request.state_dir))
    if request.op == "check":
        return recheck.check(Path(request.path), _box(request), around.emit)
    if request.op == "inspect":
        from agent.bundles.summary import version_summary  # only this operation looks into models

        try:
            return {"event": "inspected", **version_summary(Path(request.path))}
        except MemoryError as error:
            raise UnsafeBundleError(f"{request.path}: its models take too much memory to look into") from error
    # Here, because a check runs at every boot before anything serves and needs none of the trust libraries.
    _leave_out_signers()
    from agent.bundles import pull, survey
    from agent.bundles.fetcher import Transport
    from agent.bundles.resolve import Resolver

    store = request.store
    if request.medium:
        medium = MirrorConfig(url=medium_url(request.medium), metered=False)
        store = msgspec.structs.replace(store, urls=(), mirrors=(medium,), rate_bytes_per_s_max=0)
    transport = Transport(
        store.sources,
        stall_timeout_s=store.stall_timeout_s,
        connections=store.connections,
        rate_bytes_per_s_max=store.rate_bytes_per_s_max,
        certificate_dates=clock_believed(layout, around.wall()),
    )
    resolver = Resolver(
        layout,
        store,
        transport,
        wall=around.wall,
        synchronised=around.synchronised,
        on_refused=lambda source, error: _tell_refused(around, source, error),
        from_medium=bool(request.medium),
    )
    match request.op:
        case "verify_command":
            return verify_command(request.envelope.encode(), resolver, layout)
        case "trust":
            return survey.trust_line(resolver, layout, store, around.wall())
        case "survey":
            return survey.survey_line(resolver, request.models)
        case "resolve":
            resolved = resolver.version(request.team, request.name, request.version, request.channel)
            manifest = resolved.manifest
            here = layout.version(manifest.team, manifest.name, manifest.version, resolved.manifest_sha256).exists()
            return pull.resolved_line(resolved, manifest.total_size, 0 if here else manifest.total_size)
        case "fetch":
            return _fetch(request, store, layout, resolver, transport, around)


def _fetch(
    request: Request,
    store: StoreConfig,
    layout: Layout,
    resolver: Resolver,
    transport: Transport,
    around: Surroundings,
) -> dict[str, Any]:
    """Bring a version here, or take what an earlier fetch brought, if no store answers."""
    from agent.bundles import approved, pull  # see handle()

    wanted = (request.team, request.name, request.version, request.channel)
    try:
        resolved = resolver.version(*wanted, activate=True)
    except StoreError as unreachable:
        line = (
            None
            if request.medium
            else approved.take(resolver, wanted, _box(request), layout, around.wall(), around.emit)
        )
        if line is None:
            raise unreachable
        return line
    answer = pull.fetch(resolved, _box(request), layout, store, transport, around.emit)
    resolver.require_timely(resolved)  # a slow link may have taken days
    return answer


def medium_url(path: str) -> str:
    """Return a folder as the address of a store.

    Raises:
        InvalidInputError: it holds no store, or cannot be read.
    """
    folder = Path(path)
    try:
        found = (folder / "metadata" / "timestamp.json").is_file()
    except OSError as error:
        raise InvalidInputError(f"{path}: {error.strerror}") from error
    if not folder.is_absolute() or not found:
        raise InvalidInputError(f"{path}: no store is there that this service can read (no metadata/timestamp.json)")
    return folder.as_uri()


def verify_command(envelope: bytes, resolver: Resolver, layout: Layout) -> dict[str, Any]:
    """Return the ``command`` line for a signed command.

    The operator keys on this box decide. Only a box that has none, or that meets an unknown signer and has not
    refreshed for a minute, asks the store.

    Raises:
        CommandError: malformed, or not signed by a current operator key.
        ExpiredError: the metadata on this box is too old to name operators.
        UntrustedError: the files on this box do not hold.
    """
    from agent.bundles import commands  # see handle()

    parsed = commands.parse_envelope(envelope)
    try:
        payload, keyid = commands.verify_envelope(parsed, resolver.local_operators())
    except (commands.UnknownSignerError, StateError, TargetNotFoundError) as error:
        if not _may_ask(layout):
            raise CommandError(str(error)) from error
        try:
            operators = resolver.operators()
        except (StoreError, TargetNotFoundError):
            raise CommandError(str(error)) from error
        payload, keyid = commands.verify_envelope(parsed, operators)
    return {"event": "command", "payload": payload, "keyid": keyid}


def clock_believed(layout: Layout, wall: float) -> bool:
    """Say whether the system clock may judge certificates: it is not before the newest signature this box has seen."""
    try:
        floor = FloorFile(layout.floors).read()
    except StateError:
        floor = None
    return wall >= max(BUILD_TIME, floor.timestamp if floor is not None else 0)


def emit(line: dict[str, Any]) -> None:
    """Write one line to standard output; where nobody reads it any more, this process ends here.

    A killed daemon's pipe breaks a moment before the kernel kills its children. What is under way is as safe as under
    that kill, and an exception could be taken for the disk's or a socket's on its way up.
    """
    try:
        sys.stdout.write(json.dumps(line, separators=(",", ":")) + "\n")
        sys.stdout.flush()
    except BrokenPipeError:
        os._exit(_DESERTED)


def _tell_refused(around: Surroundings, source: str, error: AgentError) -> None:
    around.emit({"event": "refused", "source": source, "code": error.code, "message": str(error)})


def installed_runtimes() -> dict[str, Runtime]:
    """Return the runtimes installed in this environment, without importing them."""
    found: dict[str, Runtime] = {}
    for name, (distributions, with_cuda) in _DISTRIBUTIONS.items():
        for distribution in distributions:
            try:
                version = metadata.version(distribution)
            except metadata.PackageNotFoundError:
                continue
            found[name] = Runtime(version=version, cuda=distribution in with_cuda and "+cpu" not in version)
            break
    return found


def _leave_out_signers() -> None:
    """Keep securesystemslib from importing the cloud libraries of signers, which a box that has them does not need.

    They cost a second and 40 MB where they are installed, for keys that only a publisher has.
    """
    for name in _SIGNER_LIBRARIES:
        sys.modules.setdefault(name, None)  # type: ignore[arg-type] # Python's own mark of "not to be imported"


def _box(request: Request) -> Box:
    if request.hardware is None:
        raise InvalidInputError("the request names no hardware")
    return Box(
        hardware=request.hardware,
        policy=request.policy,
        devices=request.devices,
        precisions=request.precisions,
        runtimes=installed_runtimes(),
        agent_version=__version__,
        codecs=("zstd",) if zstd.available() else (),
    )


def _read_request(data: bytes) -> Request:
    if len(data) > REQUEST_BYTES_MAX:
        raise InvalidInputError(f"a request of more than {REQUEST_BYTES_MAX} bytes")
    try:
        return msgspec.json.decode(data, type=Request)
    except msgspec.DecodeError as error:
        raise InvalidInputError(f"request: {error}") from error


def _may_ask(layout: Layout) -> bool:
    try:
        floor = FloorFile(layout.floors).read()
    except StateError:
        return False
    return floor is None or abs(time.time() - floor.refreshed) > _ASK_AGAIN_S


def _die_with_parent() -> None:
    parent = os.getppid()
    try:
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    except (OSError, AttributeError):
        return
    if os.getppid() != parent:
        sys.exit(_DESERTED)  # it died in between


if __name__ == "__main__":
    sys.exit(main())
