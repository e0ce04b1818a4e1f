"""Take models from a medium: a USB stick, a mounted image, any folder with a store on it.

The medium is a store like any other, and nothing on it is believed without signatures. If it is newer than what the box
has heard it refreshes the box; if it is older its metadata is ignored and it only gives bytes. Either way each slot
gets what its wish asks for, by an ordinary deployment.

``MediumWatch`` does that by itself for a medium below one folder, once per content.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final, Protocol

from agent.clock import Clock
from agent.deploy.desired import Desired
from agent.deploy.reconciler import Reconciler
from agent.deploy.refusals import Refusals
from agent.deploy.watch import Refresh, Watch
from agent.durable import read_json, write_json
from agent.errors import AgentError, BundleError, InvalidInputError, StateError, StoreError, TargetNotFoundError
from agent.events import EventBus, Severity, Stream
from agent.log import get_logger
from agent.question import Question

_log = get_logger("deploy.sideload")
_STAMP: Final = Path("metadata") / "timestamp.json"
_BEGIN_S: Final = 30.0  # a deployment under way may keep the slot for longer
_STAMP_BYTES_MAX: Final = 64 * 1024
_REMEMBERED_MAX: Final = 64
_REST_S_MAX: Final = 60.0
_ANSWER_TIMEOUT_S: Final = 30.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Taken:
    """What one slot got from the medium: a deployment, or why there is none."""

    slot: str
    deployment: str = ""
    code: str = ""  # nothing_new, bundle_not_found, …
    message: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """What a medium gave. ``origin``: stick (newer than the box was) or mirror (older: bytes only)."""

    path: str
    origin: str
    issued: int  # Unix seconds, of the metadata that counted
    taken: tuple[Taken, ...]


class Sideload:
    """Takes models from media."""

    def __init__(self, reconciler: Reconciler, watch: Watch, refusals: Refusals, events: EventBus) -> None:
        self._reconciler = reconciler
        self._watch = watch
        self._refusals = refusals
        self._events = events

    async def take(self, path: str, wish: Desired | None = None) -> Report:
        """Refresh from the folder ``path`` and begin what its models call for; deployments end by themselves.

        Args:
            path: Absolute.
            wish: Take this version and pin it, instead of what is wanted of each slot.

        Raises:
            InvalidInputError: no store is there.
            BundleError: it is refused; nothing changed.
            StoreError, StateError: it cannot be read, or the local disk.
        """
        if not path.startswith("/"):
            raise InvalidInputError(f"{path!r}: an absolute path is needed")
        self._events.emit(Stream.HEALTH, "sideload.begun", path=path)
        try:
            refresh = await self._watch.refresh(medium=path)
        except AgentError as error:
            if isinstance(error, BundleError):
                self._refusals.bundle(error, team="", name="", version="", source=path)
            self._events.emit(
                Stream.HEALTH, "sideload.failed", Severity.ERROR, path=path, code=error.code, message=str(error)
            )
            raise
        if wish is not None:
            await self._reconciler.want(wish)
            taken = [Taken(slot=wish.slot, deployment=wish.id)]
        else:
            taken = [await self._offer(slot, path) for slot in self._reconciler.wanted()]
        report = Report(path=path, origin=refresh.survey.origin, issued=refresh.survey.issued, taken=tuple(taken))
        self._tell(report, refresh)
        return report

    async def _offer(self, slot: str, path: str) -> Taken:
        try:
            async with asyncio.timeout(_BEGIN_S):
                record = await self._reconciler.offer(slot, path)
        except TimeoutError:
            return Taken(slot=slot, code="queued", message="it begins when the deployment under way has ended")
        except AgentError as error:
            if isinstance(error, BundleError) and not isinstance(error, TargetNotFoundError):
                self._refusals.bundle(error, team="", name=slot, version="", source=path)
            return Taken(slot=slot, code=error.code, message=str(error))
        if record is None:
            return Taken(slot=slot, code="nothing_new", message="what it offers serves already")
        return Taken(slot=slot, deployment=record.id)

    def _tell(self, report: Report, refresh: Refresh) -> None:
        begun = [item.deployment for item in report.taken if item.deployment]
        self._events.emit(
            Stream.HEALTH,
            "sideload.read",
            path=report.path,
            origin=report.origin,
            deployments=begun,
            revoked=len(refresh.revoked),
        )


class Known(Protocol):
    """Which media were handled."""

    def has(self, content: str) -> bool: ...

    def add(self, content: str) -> None: ...


class KnownMedia:
    """The contents that were handled, on disk: a reboot does not handle a stick again that stays plugged in."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._contents: list[str] | None = None

    def has(self, content: str) -> bool:
        """Say whether ``content`` was handled."""
        return content in self._read()

    def add(self, content: str) -> None:
        """Remember ``content``; what the disk does not take is handled again after the next start."""
        contents = [*self._read(), content][-_REMEMBERED_MAX:]
        self._contents = contents
        try:
            write_json(self._path, contents)
        except (OSError, StoreError) as error:
            _log.warning("handled medium not recorded", reason=str(error))

    def _read(self) -> list[str]:
        if self._contents is None:
            try:
                raw = read_json(self._path)
            except StateError:
                raw = None
            self._contents = [item for item in raw if isinstance(item, str)] if isinstance(raw, list) else []
        return self._contents


def stores_in(folder: Path) -> list[tuple[Path, str]]:
    """Return the stores that are mounted in ``folder`` or as it, with what tells their content apart."""
    try:
        folders = [folder, *sorted(child for child in folder.iterdir() if child.is_dir())]
    except OSError:
        return []  # nothing is mounted
    return [(place, content) for place in folders if (content := _content(place))]


class MediumWatch:
    """The supervised watcher of the folder where media are mounted: that folder, and those in it.

    A look is one ``scandir`` and a small file of each store found. Content is told apart by that file, the signed
    timestamp: a stick that is written anew is handled anew, one that is plugged in again is not. A folder whose media
    are refused or cannot be read rests, each time longer, up to a minute: a stick that changes all the time, or that
    is broken, costs little.
    """

    name = "deploy.media"

    def __init__(
        self,
        folder: str,
        sideload: Sideload,
        known: Known,
        *,
        clock: Clock,
        poll_s: float,
        look: Callable[[Path], Sequence[tuple[Path, str]]] = stores_in,
    ) -> None:
        self._mounted = Question(partial(look, Path(folder)), name="media")
        self._silent = False
        self._sideload = sideload
        self._known = known
        self._clock = clock
        self._poll_s = poll_s
        self._failures: dict[Path, int] = {}  # in a row
        self._rests_until: dict[Path, float] = {}  # monotonic

    async def run(self) -> None:
        """Look until cancelled."""
        while True:
            for path, content in await self._stores():
                rested = self._clock.monotonic() >= self._rests_until.get(path, 0.0)
                if rested and not self._known.has(content):
                    await self._handle(path, content)
            await self._clock.sleep(self._poll_s)

    async def _handle(self, path: Path, content: str) -> None:
        try:
            report = await self._sideload.take(str(path))
        except AgentError as error:
            _log.warning("medium refused", path=str(path), code=error.code, reason=str(error))
            self._rest(path)
            if error.retryable:
                return
        else:
            self._failures.pop(path, None)
            self._rests_until.pop(path, None)
            _log.info("medium read", path=str(path), origin=report.origin, slots=[item.slot for item in report.taken])
        self._known.add(content)

    def _rest(self, path: Path) -> None:
        failures = self._failures.pop(path, 0) + 1
        self._failures[path] = failures
        rest_s = min(_REST_S_MAX, self._poll_s * 2.0 ** min(failures, 16))
        self._rests_until[path] = self._clock.monotonic() + rest_s
        if len(self._failures) > _REMEMBERED_MAX:
            forgotten = next(iter(self._failures))
            del self._failures[forgotten], self._rests_until[forgotten]

    async def _stores(self) -> Sequence[tuple[Path, str]]:
        """Return what is mounted; nothing while a bad stick or mount does not answer."""
        try:
            found = await self._mounted.answer(_ANSWER_TIMEOUT_S)
        except TimeoutError:
            if not self._silent:
                _log.warning("what is mounted for media gives no answer")
            self._silent = True
            return ()
        self._silent = False
        return found


def plain(report: Report) -> dict[str, Any]:
    """Return JSON-able fields."""
    taken: list[Mapping[str, str]] = [
        {"slot": item.slot, "deployment": item.deployment, "code": item.code, "message": item.message}
        for item in report.taken
    ]
    return {"path": report.path, "origin": report.origin, "issued": report.issued, "slots": taken}


def _content(folder: Path) -> str:
    """Return what tells a store's content apart, an empty text if there is none that can be read."""
    try:
        if not (folder / _STAMP).is_file():
            return ""
        descriptor = os.open(folder / _STAMP, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)  # not all files answer
        with os.fdopen(descriptor, "rb") as file:
            return hashlib.sha256(file.read(_STAMP_BYTES_MAX) or b"").hexdigest()
    except OSError:
        return ""
