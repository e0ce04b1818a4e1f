"""The daemon's side of the trust child: start it, follow its lines, map its errors, end it.

Runs in the daemon, so nothing here may parse store bytes or import the trust libraries; manifests are read from version
directories that the child has verified. Promises: no child outlives its call; what a child may write is bounded; a
flood of commands or of questions about trust starts a bounded number of processes.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any, Final

import msgspec

from agent.bundles.layout import MANIFEST_FILE
from agent.bundles.manifest import Manifest, Variant, parse_manifest
from agent.config import PolicyConfig, StoreConfig
from agent.errors import AgentError, CommandError, OverloadedError, StateError, TransientError, UntrustedError, by_code
from agent.log import get_logger
from agent.profile import Hardware, Profile

ENVELOPE_BYTES_MAX: Final = 64 * 1024
_LINE_BYTES_MAX: Final = 1024 * 1024
_SILENCE_S: Final = 600.0  # a child that says nothing for so long is stuck: each of its own waits is far shorter
_COMMAND_TIMEOUT_S: Final = 120.0
_END_TIMEOUT_S: Final = 5.0  # for one that was killed: a mount that hangs may hold it
_MEDIUM_TIMEOUT_S: Final = 120.0  # a mount may hang, and the trust files are held meanwhile

_log = get_logger("puller")
OnProgress = Callable[[Mapping[str, Any]], None]
OnRefused = Callable[[str, AgentError, Mapping[str, str]], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredBundle:
    """A verified version on this box. ``variants`` are those that can run here, best first."""

    path: Path
    manifest: Manifest
    manifest_sha256: str
    variants: tuple[Variant, ...]
    dropped: tuple[tuple[str, str], ...]  # (variant id, reason)
    bytes_fetched: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class ResolvedVersion:
    """What the store offers. ``bytes_missing``: upper bound of what a fetch would bring."""

    team: str
    name: str
    version: str
    seq: int
    manifest_sha256: str
    bytes_total: int
    bytes_missing: int


class IndexedVersion(msgspec.Struct, frozen=True, kw_only=True):
    """A version as a signed index names it."""

    version: str
    seq: int
    digest: str
    bytes: int
    reason: str


class SurveyedModel(msgspec.Struct, frozen=True, kw_only=True):
    """What the store says of one model."""

    team: str
    name: str
    channels: dict[str, IndexedVersion]
    newest: IndexedVersion | None
    revoked: tuple[IndexedVersion, ...]
    deprecated: tuple[IndexedVersion, ...]


class MissingModel(msgspec.Struct, frozen=True, kw_only=True):
    """A model of which the store says nothing, and why."""

    team: str
    name: str
    reason: str


class SurveyAnswer(msgspec.Struct, frozen=True, kw_only=True):
    """The child's ``surveyed`` line."""

    issued: int
    trusted_time: int
    origin: str
    models: tuple[SurveyedModel, ...]
    missing: tuple[MissingModel, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class VerifiedCommand:
    """A command whose signature holds. Expiry, addressee and repetition are not judged yet."""

    payload: dict[str, Any]
    keyid: str


class Puller:
    """Runs one trust child per call.

    Args:
        state_dir: The box's state folder.
        commands_per_s: Verifications that may be started per second, on average.
        commands_burst: How many may be started at once after a quiet time.
        now: Monotonic seconds.
        on_refused: Told of each source whose answer was refused: its address and why, and the request's team, name
            and version as far as it has them.
    """

    def __init__(
        self,
        config: StoreConfig,
        policy: PolicyConfig,
        state_dir: Path,
        hardware: Hardware,
        profile: Profile,
        *,
        commands_per_s: float = 0.5,
        commands_burst: int = 8,
        now: Callable[[], float] = time.monotonic,
        on_refused: OnRefused = lambda source, error, request: None,
    ) -> None:
        self._on_refused = on_refused
        self._request: dict[str, Any] = {
            "state_dir": str(state_dir.absolute()),
            "store": msgspec.to_builtins(config),
            "policy": msgspec.to_builtins(policy),
            "hardware": msgspec.to_builtins(hardware),
            "devices": list(profile.devices),
            "precisions": list(profile.precisions),
        }
        self._starts = _TokenBucket(commands_per_s, commands_burst, now)
        self._one_command = asyncio.Lock()
        self._one_report = asyncio.Lock()

    async def fetch(
        self,
        team: str,
        name: str,
        version: str,
        channel: str,
        *,
        medium: str = "",
        on_progress: OnProgress = lambda line: None,
    ) -> StoredBundle:
        """Return the version asked for, or the one ``channel`` points to if ``version`` is empty.

        ``medium`` is a folder that holds a store, asked instead of the configured ones.

        ``on_progress`` gets the ``resolved``, ``progress`` and ``verifying`` lines as they are (``child.py``).

        Raises:
            BundleError, StoreError, StateError: by the child's code. Nothing that serves was touched.
        """
        request = {"op": "fetch", "team": team, "name": name, "version": version, "channel": channel, "medium": medium}
        return _stored(await self._ask(request, "done", on_progress))

    async def check(self, path: Path) -> StoredBundle:
        """Return the bundle in ``path`` after every byte was hashed again; neither network nor expiry matter.

        Raises:
            BundleError, StateError: by the child's code.
        """
        return _stored(await self._ask({"op": "check", "path": str(path)}, "done"))

    async def inspect(self, path: Path) -> dict[str, Any]:
        """Return what the version in ``path`` and its models say about themselves (``summary.py``).

        Raises:
            BundleError, StateError: by the child's code.
        """
        answer = await self._ask({"op": "inspect", "path": str(path)}, "inspected")
        del answer["event"]
        return answer

    async def resolve(self, team: str, name: str, version: str, channel: str, *, medium: str = "") -> ResolvedVersion:
        """Return what the store, or ``medium``, offers now; two requests if that is nothing new.

        Raises:
            BundleError, StoreError, StateError: by the child's code.
        """
        request = {"op": "resolve", "team": team, "name": name, "version": version, "channel": channel}
        answer = await self._ask({**request, "medium": medium}, "resolved")
        del answer["event"]
        return msgspec.convert(answer, ResolvedVersion)

    async def survey(self, models: Sequence[tuple[str, str]], *, medium: str = "") -> SurveyAnswer:
        """Refresh, and return what the store, or ``medium``, says of these models (team, name).

        Raises:
            BundleError, StoreError, StateError, InvalidInputError: by the child's code.
        """
        request = {"op": "survey", "models": list(models), "medium": medium}
        try:
            async with asyncio.timeout(_MEDIUM_TIMEOUT_S if medium else None):
                answer = await self._ask(request, "surveyed")
        except TimeoutError as error:
            raise TransientError(f"{medium}: what is mounted there does not answer") from error
        return msgspec.convert(answer, SurveyAnswer)

    async def trust(self) -> dict[str, Any]:
        """Return whom this box trusts and how far, from its disk alone (``survey.trust_line``)."""
        async with self._one_report:  # anybody who may read may ask, and each child costs memory that models need
            answer = await self._ask({"op": "trust"}, "trust")
        del answer["event"]
        return answer

    async def verify_command(self, envelope: bytes) -> VerifiedCommand:
        """Return the payload of a signed command.

        Raises:
            OverloadedError: too many were offered; no process was started.
            CommandError: malformed or not signed by a current operator key.
            ExpiredError: this box has not seen its store for too long.
        """
        if len(envelope) > ENVELOPE_BYTES_MAX:
            raise CommandError(f"an envelope of {len(envelope)} bytes, at most {ENVELOPE_BYTES_MAX} are allowed")
        try:
            text = envelope.decode("utf-8")
        except UnicodeDecodeError as error:
            raise CommandError("the envelope is not UTF-8") from error
        if not self._starts.take():
            raise OverloadedError("too many commands to verify; this one was not looked at")
        async with self._one_command:
            try:
                async with asyncio.timeout(_COMMAND_TIMEOUT_S):
                    answer = await self._ask({"op": "verify_command", "envelope": text}, "command")
            except TimeoutError as error:
                raise TransientError("verifying a command took too long") from error
        return VerifiedCommand(payload=answer["payload"], keyid=answer["keyid"])

    async def _ask(
        self, request: dict[str, Any], wanted: str, on_line: OnProgress = lambda line: None
    ) -> dict[str, Any]:
        """Run one child and return the line with the event ``wanted``; the lines before go to ``on_line``."""
        async with _child() as process:
            await _send(process, json.dumps(self._request | request).encode())
            while line := await _read_line(process):
                answer = _parse_line(line)
                if answer.get("event") == wanted:
                    return answer
                if answer.get("event") == "error":
                    raise by_code(str(answer.get("code")), str(answer.get("message")), answer.get("retry_after_s"))
                if answer.get("event") == "refused":
                    self._tell_refused(answer, request)
                else:
                    on_line(answer)
            raise AgentError(f"the trust child ended with {await process.wait()} and no answer; its log says why")

    def _tell_refused(self, line: Mapping[str, Any], request: Mapping[str, Any]) -> None:
        about = {name: str(request.get(name, "")) for name in ("team", "name", "version")}
        self._on_refused(str(line.get("source")), by_code(str(line.get("code")), str(line.get("message"))), about)


class _TokenBucket:
    """So many per second on average, so many at once."""

    def __init__(self, rate: float, burst: int, now: Callable[[], float]) -> None:
        self._rate = rate
        self._burst = float(burst)
        self._now = now
        self._tokens = float(burst)
        self._at = now()

    def take(self) -> bool:
        now = self._now()
        self._tokens = min(self._burst, self._tokens + (now - self._at) * self._rate)
        self._at = now
        if self._tokens < 1.0:
            return False
        self._tokens -= 1.0
        return True


@asynccontextmanager
async def _child() -> AsyncIterator[asyncio.subprocess.Process]:
    """A trust child that does not outlive the block. Its standard error is ours."""
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-P",  # never import from the working directory
        "-m",
        "agent.bundles.child",
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        limit=_LINE_BYTES_MAX,
        env={
            key: value for key, value in os.environ.items() if not key.startswith(("NOTIFY_", "LISTEN_", "WATCHDOG_"))
        },
    )
    try:
        handle = os.pidfd_open(process.pid)
    except ProcessLookupError:  # it has ended and was reaped
        yield process
        return
    except OSError:  # no descriptor is left
        process.kill()
        raise
    try:
        yield process
    finally:
        with suppress(ProcessLookupError):
            signal.pidfd_send_signal(handle, signal.SIGKILL)  # by handle: the event loop alone reaps
        os.close(handle)
        try:
            async with asyncio.timeout(_END_TIMEOUT_S):
                await process.wait()
        except TimeoutError:
            _log.error("a trust child cannot be killed; it is left to the kernel", pid=process.pid)


async def _send(process: asyncio.subprocess.Process, data: bytes) -> None:
    assert process.stdin is not None
    with suppress(BrokenPipeError, ConnectionResetError):  # it died: its output says why
        process.stdin.write(data)
        await process.stdin.drain()
        process.stdin.close()


async def _read_line(process: asyncio.subprocess.Process) -> bytes:
    assert process.stdout is not None
    try:
        async with asyncio.timeout(_SILENCE_S):
            return await process.stdout.readline()
    except TimeoutError as error:
        raise TransientError(f"the trust child was silent for {_SILENCE_S:.0f} s") from error
    except ValueError as error:
        raise AgentError(f"the trust child wrote a line of more than {_LINE_BYTES_MAX} bytes") from error


def _parse_line(line: bytes) -> dict[str, Any]:
    try:
        value = msgspec.json.decode(line)
    except msgspec.DecodeError as error:
        raise AgentError(f"the trust child wrote no JSON: {line[:80]!r}") from error
    if not isinstance(value, dict):
        raise AgentError(f"the trust child wrote no object: {line[:80]!r}")
    return value


def _stored(answer: Mapping[str, Any]) -> StoredBundle:
    path = Path(answer["path"])
    digest = answer["manifest_sha256"]
    try:
        data = (path / MANIFEST_FILE).read_bytes()
    except OSError as error:
        raise StateError(f"{path}: {error.strerror}") from error
    if sha256(data).hexdigest() != digest:
        raise UntrustedError(f"{path}: the manifest changed after it was verified")
    manifest = parse_manifest(data)
    return StoredBundle(
        path=path,
        manifest=manifest,
        manifest_sha256=digest,
        variants=tuple(manifest.variant(variant) for variant in answer["variants"]),
        dropped=tuple((item["id"], item["reason"]) for item in answer["dropped"]),
        bytes_fetched=int(answer["bytes_fetched"]),
    )
